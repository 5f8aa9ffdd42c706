"""Two processes of a torch.distributed group against one: evaluation, sampling, noise of training steps."""

import json
import os
import re
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch.testing import assert_close

from pyro_diffusion import evaluate
from pyro_diffusion.distributions.bounded import _spread
from pyro_diffusion.processes import draw, drawing_from, global_batch
from pyro_diffusion.processes.global_batch import BatchNoise, Shard, current_shard, scoring_noise
from pyro_diffusion.processes.noise import fresh_seed
from tests import ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, rank by rank."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "ranks"
    with FileLock(f"{folder}.lock"):  # once for all of pytest's workers
        if not folder.exists():
            folder.mkdir()
            run_two(folder)
    found = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    refused = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return found, refused


def run_two(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(rank), "2", str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.wait()


def table(found, name):
    return [
        {k.partition("/")[2]: v for k, v in f.items() if k.startswith(f"{name}/")} for f in found
    ]


def test_evaluation_and_sampling_on_two_processes_are_bitwise_those_on_one(two):
    alone = ranks.evaluated(None)
    for rank in table(two[0], "evaluated"):
        assert rank.keys() == alone.keys()
        for name, value in alone.items():
            assert_close(rank[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def test_evaluation_and_sampling_in_other_batches_are_the_same_but_for_rounding():
    one, other = (ranks.evaluated(None, batch_size=size) for size in (7, 2))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_close(other[name], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def test_a_long_run_in_batches_of_7_64_and_1000():
    law = ranks.same_everywhere(ranks.SMALL["normal"])
    x = torch.randn(1000, 3)
    for function in (
        lambda size: evaluate.log_likelihood(law, x, num_terms=2, seed=1, batch_size=size).value,
        lambda size: evaluate.draw_samples(law, 1000, seed=1, batch_size=size),
    ):
        whole = function(1000)
        for size in (7, 64):
            assert_close(function(size), whole, rtol=1e-5, atol=1e-5)
        assert len(whole.unique(dim=0)) == 1000


def test_other_seeds_are_other_draws_and_none_is_drawn():
    law = ranks.same_everywhere(ranks.SMALL["normal"])
    draws = [evaluate.draw_samples(law, 3, seed=seed) for seed in (1, 1, 2, None, None)]
    assert draws[0].equal(draws[1])
    assert len({tuple(x.flatten().tolist()) for x in draws}) == 4


def test_without_a_seed_the_ranks_agree_on_one(two):
    assert two[0][0]["unseeded"].equal(two[0][1]["unseeded"])


# --- training -------------------------------------------------------------------------------------------


def test_the_gradient_of_two_processes_is_that_of_one_with_all_rows(two):
    alone = ranks.gradients(None)
    for rank in table(two[0], "gradients"):
        for name, value in alone.items():
            scale = value.abs().max()
            limit = (
                1e-4 if name.startswith("curve") else 1e-6
            )  # of 60 steps of Adam, or of one gradient
            assert ((rank[name] - value).abs().max() / scale) < limit, name


def test_the_documented_program_finds_the_same_on_two_processes(two):
    with torch.random.fork_rng(devices=[]):
        alone = ranks.documented()
    for rank in table(two[0], "documented"):
        for name, value in alone.items():
            assert_close(rank[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("batch", [(8,), (2, 8), (3, 2, 8)])
def test_positions_of_all_shards_are_one_stratified_set(batch):
    whole = _spread(torch.Size(batch), torch.device("cpu"), None)
    shards = [Shard(3, 0, 8), Shard(1, 3, 8), Shard(4, 4, 8)]
    parts = [
        _spread(torch.Size((*batch[:-1], shard.rows)), torch.device("cpu"), shard)
        for shard in shards
    ]
    assert torch.cat(parts, -1).equal(whole)
    assert_close(whole.flatten().sort().values, torch.arange(whole.numel()) / whole.numel())


@pytest.mark.parametrize("name", ranks.SMALL)
def test_scores_of_shards_are_those_of_the_whole_batch(name):
    small = ranks.SMALL[name]
    denoiser, x = small.denoiser(), small.data((2, 8))
    event = len(small.event_shape)

    def score(start, stop):
        rows = x.narrow(-1 - event, start, stop - start)
        with drawing_from(BatchNoise(5, Shard(stop - start, start, 8))):
            return small(denoiser).log_prob(rows)

    whole = score(0, 8)
    assert_close(torch.cat([score(0, 3), score(3, 4), score(4, 8)], -1), whole)


def test_noise_of_all_shards_is_that_of_the_whole_batch_and_repeats_nowhere():
    like = torch.zeros(())

    def normals(shard):
        batch = torch.Size((2, shard.rows))
        noise = scoring_noise(7, shard, batch, torch.device("cpu"))
        return noise.normal((*batch, 3), like, event_dim=1)

    whole = normals(Shard(8, 0, 8))
    assert torch.cat([normals(Shard(3, 0, 8)), normals(Shard(5, 3, 8))], 1).equal(whole)
    assert len(whole.unique()) == whole.numel()
    # Not the rows of a step: each rank has a stream of its own.
    parts = [
        scoring_noise(7, Shard(3, start, 9), torch.Size((2,)), torch.device("cpu"))
        for start in (0, 3, 6)
    ]
    assert len(torch.cat([part.normal((2, 3), like) for part in parts]).unique()) == 18


def test_every_rank_has_its_own_noise(two):
    first, second = table(two[0], "noises")
    for name in first:
        alike = torch.isclose(first[name], second[name])
        assert alike.all() if name == "same" else not alike.any(), name


def test_a_step_is_a_function_of_its_seed_and_number_and_leaves_the_generators_alone():
    law, x = ranks.SMALL["normal"], torch.zeros(4, 3)
    denoiser = law.denoiser()

    def scores(**given):
        with global_batch(len(x), **given):
            return torch.stack(
                [law(denoiser).log_prob(x), law(denoiser).log_prob(x), torch.rand(4)]
            )

    before = torch.get_rng_state()
    first = scores(seed=1, step=2)
    assert torch.get_rng_state().equal(before)
    assert first.equal(scores(seed=1, step=2))
    others = [first, scores(seed=1, step=3), scores(seed=2, step=2)]
    assert len(torch.cat(others).flatten().unique()) == 3 * 3 * 4


def test_no_two_sources_of_a_step_give_the_same_numbers():
    # Pyro's sites draw from torch's generators, `draw` from the rank's own, and each distribution has one.
    with global_batch(4, seed=1, step=2):
        sites = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
        draws = draw(dist.Normal(torch.zeros(4), 1.0))
        whole = [
            scoring_noise(s, current_shard(), torch.Size((4,)), CPU)
            for s in (fresh_seed(), fresh_seed())
        ]
        parts = [
            scoring_noise(s, current_shard(), torch.Size((5,)), CPU)
            for s in (fresh_seed(), fresh_seed())
        ]
        found = [sites, draws, *(noise.normal((4,), torch.zeros(())) for noise in whole + parts)]
    assert len(torch.cat(found).unique()) == 24
    # Those of a path that all rows of a rank share are the rank's, too; seeds of distributions are not.
    each = [BatchNoise(5, Shard(2, start, 4)) for start in (0, 2)]
    assert len({noise.joint_seed() for noise in each}) == 2
    assert len({noise.fresh_seed() for noise in each}) == 1


# --- refusals -------------------------------------------------------------------------------------------


def test_ranks_that_disagree_have_nothing_or_fail_are_told_so(two):
    first, second = two[1]
    expected = [
        r"ValueError: data: got other values on rank\(s\) \[1\] than on rank 0",
        r"ValueError: data: got other values on rank\(s\) \[1\] than on rank 0",
        r"ValueError: rows: got \[3, 4\] on ranks 0 to 1",
        r"ValueError: seed: got \[0, 1\] on ranks 0 to 1",
        None,
        r"ValueError: rows: got \[0, 1\] on 2 ranks, expected at least one on each",
        r"ValueError: step: got \[0, 1\] on 2 ranks",
        r"ValueError: process_group: got None in a default group of 2 processes",
    ]
    assert len(first) == len(second) == len(expected)
    for pattern, *messages in zip(expected, first, second, strict=True):
        for message in messages:
            assert pattern is None or re.match(pattern, message), message
    assert first[4].startswith("RuntimeError: rank 1 of 2 failed")
    assert second[4].startswith("ValueError: value: got 3 NaN")


def test_bad_input_is_named():
    law = ranks.SMALL["normal"]()
    x = torch.zeros(2, 3)
    for bad in (3, "world"):
        with pytest.raises(ValueError, match="process_group: got"):
            evaluate.log_likelihood(law, x, process_group=bad)
        with (
            pytest.raises(ValueError, match="process_group: got"),
            global_batch(2, seed=0, process_group=bad),
        ):
            pass
    for given in ({"rows": 0}, {"rows": -1}, {"rows": 1.5}):
        with pytest.raises(ValueError, match="rows: got"), global_batch(**given, seed=0):
            pass
    with pytest.raises(ValueError, match="seed: got"), global_batch(2, seed=-1):
        pass
    with pytest.raises(ValueError, match="step: got"), global_batch(2, seed=0, step=-1):
        pass
    with pytest.raises(ValueError, match="num_samples: got 0"):
        evaluate.draw_samples(law, 0)
    with pytest.raises(ValueError, match="distribution: got Normal, expected"):
        evaluate.draw_samples(torch.distributions.Normal(0.0, 1.0), 3)
    with pytest.raises(ValueError, match=r"distribution: got a Diffusion of batch shape \(2,\)"):
        evaluate.draw_samples(law.expand((2,)), 3)
    with pytest.raises(ValueError, match="context: got 'label' of shape"):
        context = {"label": torch.zeros(2, dtype=torch.long)}
        evaluate.draw_samples(ranks.SMALL["label"](context={}), 3, context=context)
