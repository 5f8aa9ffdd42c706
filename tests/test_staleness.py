"""What is kept from one call to the next follows what it was computed from."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, ProbabilityFlow
from pyro_diffusion.distributions.base import kept_uniform
from pyro_diffusion.dynamics import ODESolver, ReverseSDE, SDESolver
from pyro_diffusion.infer import DDPM, TwistedSMC
from pyro_diffusion.likelihoods import ProgramLikelihood
from pyro_diffusion.processes import GaussianProcess
from pyro_diffusion.schedules import Cosine, LearnedSchedule, TabulatedBetas, uniform
from tests.exact import BETAS, Gauge, mixture
from tests.small_diffusions import Tiny

STEPS = 6


def grid() -> torch.Tensor:
    return uniform(STEPS, torch.float64)


def data() -> torch.Tensor:
    return torch.randn(5, 2, dtype=torch.float64)


# --- grids with a gradient --------------------------------------------------------------------------


def test_times_have_a_gradient_whatever_came_before():
    times = grid().requires_grad_()
    chain, x = Diffusion(mixture(Cosine()), (2,), times=times), data()
    for before in (chain.sample, lambda: chain.log_prob(x).sum().backward()):
        before()
        times.grad = None
        chain.log_prob(x).sum().backward()
        gradient, direction = times.grad, torch.randn_like(times)
        direction[[0, -1]] = 0  # the ends of [0, 1]
        ends = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                times.add_(step * direction)
            ends.append(chain.log_prob(x).sum().detach())
        expected = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-5)


def test_the_chain_spelled_out_passes_gradients_to_times():
    times = grid().requires_grad_()
    chain = DDPM(mixture(Cosine()), (2,), times=times)
    for _ in range(2):
        with torch.no_grad():
            pyro.poutine.trace(chain.model).get_trace(data())
        guide = pyro.poutine.trace(chain.guide).get_trace(data())
        model = pyro.poutine.trace(pyro.poutine.replay(chain.model, guide)).get_trace(data())
        (gradient,) = torch.autograd.grad(model.log_prob_sum() - guide.log_prob_sum(), times)
        assert (gradient[1:-1] != 0).all()


def test_times_are_learned():
    # A bound that a step of gradient ascent on the grid raises, under the same noise.
    times = grid().requires_grad_()
    chain, x = Diffusion(mixture(Cosine()), (2,), times=times), data()
    optimizer = torch.optim.SGD([times], lr=1e-5)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        value = -chain.log_prob(x).sum()
        value.backward()
        times.grad[[0, -1]] = 0
        optimizer.step()
        values.append(value.item())
    assert values[2] < values[1] < values[0]


# --- grids and schedules that change ----------------------------------------------------------------


def levels(process, times=None):
    return process.levels(grid() if times is None else times).log_snr


def test_a_grid_changed_in_place_is_another_grid():
    schedule, times = Cosine(), grid()
    process = GaussianProcess(schedule, event_dim=0)
    first = levels(process, times)
    assert levels(process, times) is first
    times[1:-1] -= 0.01
    torch.testing.assert_close(levels(process, times), schedule.log_snr(times))
    Diffusion(mixture(schedule), (2,), times=times)
    times[2] = times[1]
    with pytest.raises(ValueError, match="times: got a grid that is not increasing"):
        Diffusion(mixture(schedule), (2,), times=times)


def test_the_common_grid_survives_writing():
    chain = Diffusion(mixture(Cosine()), (2,), steps=STEPS)
    chain.times[1] = 0.9
    again = Diffusion(mixture(Cosine()), (2,), steps=STEPS)
    torch.testing.assert_close(again.times, uniform(STEPS))
    kept_uniform(STEPS, torch.float32)[1] = 0.9
    torch.testing.assert_close(kept_uniform(STEPS, torch.float32), uniform(STEPS))
    with torch.device("meta"):
        assert kept_uniform(71, torch.float32).device.type == "cpu"


def attribute(schedule):
    schedule.scale = 3.0


def replaced(schedule):
    schedule.knots = schedule.knots + 1


def in_place(schedule):
    schedule.knots.add_(1)


def loaded(schedule):
    schedule.load_state_dict(TabulatedBetas(BETAS / 2).state_dict())


CHANGES = {
    "attribute": (lambda: Gauge(2.0), attribute),
    "buffer replaced": (lambda: TabulatedBetas(BETAS), replaced),
    "buffer in place": (lambda: TabulatedBetas(BETAS), in_place),
    "state loaded": (lambda: TabulatedBetas(BETAS), loaded),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_schedule_that_changes_forgets(name):
    build, change = CHANGES[name]
    used, fresh, times = GaussianProcess(build()), GaussianProcess(build()), grid()
    used.levels(times)
    change(used.schedule)
    change(fresh.schedule)
    got, expected = used.levels(times), fresh.levels(times)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=0, atol=0)


def test_flows_and_paths_follow_a_table_that_is_loaded():
    def denoiser(betas=BETAS):
        return GaussianDenoiser(Tiny((2,)).double(), GaussianProcess(TabulatedBetas(betas)))

    used, other, x = denoiser(), denoiser(BETAS / 2), data()
    flow = ProbabilityFlow(used, (2,), solver=ODESolver("rk4", steps=4))
    sde, solver = ReverseSDE(used, (2,)), SDESolver("euler", steps=4)
    with torch.no_grad():
        flow.log_prob(x), solver(sde, x)
        used.load_state_dict(other.state_dict())
        expected = ProbabilityFlow(other, (2,), solver=ODESolver("rk4", steps=4)).log_prob(x)
        torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=0)
        ends = []
        for path in (sde, ReverseSDE(other, (2,))):
            pyro.set_rng_seed(1)
            ends.append(solver(path, x))
        torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_particles_follow_a_schedule_that_is_trained():
    schedule = LearnedSchedule(5, 8.0, -8.0)
    process = GaussianProcess(schedule)
    prior = MixtureDenoiser(process, torch.ones(1), torch.zeros(1, 2), 1.0)

    def model():
        x = pyro.sample("x", Diffusion(prior, (2,), steps=STEPS))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(3.0))

    def build():
        return TwistedSMC(
            Diffusion(prior, (2,), steps=STEPS), ProgramLikelihood(model), num_particles=8
        )

    def evidence(smc):
        pyro.set_rng_seed(0)
        return smc.run().log_evidence.value

    used = build()
    before = evidence(used)
    with torch.no_grad():
        schedule.heights.copy_(torch.linspace(-2, 2, 5))
    assert evidence(used) == evidence(build()) != before


# --- modes, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Diffusion, DiffusionSDE, ProbabilityFlow])
def test_inference_mode_leaves_nothing_behind(build):
    denoiser = GaussianDenoiser(Tiny((2,)), GaussianProcess(TabulatedBetas(BETAS.float())))
    x = torch.randn(3, 2)
    how = {
        Diffusion: {"steps": 61},
        DiffusionSDE: {"solver": SDESolver(steps=7)},
        ProbabilityFlow: {"solver": ODESolver("rk4", steps=4)},
    }[build]
    with torch.inference_mode():
        law = build(denoiser, (2,), **how)
        law.sample(), law.log_prob(x)
        scored = law.log_prob(x)
    torch.testing.assert_close(scored.clone(), law.log_prob(x).detach())
    for each in (law, build(denoiser, (2,), **how)):
        each.log_prob(x).sum().backward()
    with torch.inference_mode():
        times = uniform(STEPS)
    if build is Diffusion:
        chain = Diffusion(denoiser, (2,), times=times)
        chain.sample()
        chain.log_prob(x).sum().backward()


def test_copies_leave_what_is_kept():
    times = grid().requires_grad_()
    denoiser, x = mixture(Gauge(2.0)), data()
    for grids in (times, grid()):
        Diffusion(denoiser, (2,), times=grids).log_prob(x)
        first = levels(denoiser.process, grids)
        stored = io.BytesIO()
        torch.save(denoiser, stored)
        stored.seek(0)
        for twin in (
            copy.deepcopy(denoiser),
            pickle.loads(pickle.dumps(denoiser)),
            torch.load(stored, weights_only=False),
        ):
            assert not {"_kept", "_stamp"} & set(twin.process.__dict__)
            twin.process.schedule.scale = 3.0
        torch.testing.assert_close(levels(denoiser.process, grids), first)
