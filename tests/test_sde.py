"""The SDE view: marginals, orders, the continuous bound, and Pyro's contract.

Monte-Carlo comparisons accept 4 standard errors (a two-sided false alarm in 6e-5 of seeds for each figure, in
at most a few per cent of seeds over this file). The seed is fixed, so a test that passes passes always.
"""

import copy
import functools
import math
import pickle

import pyro
import pytest
import torch
import torchsde
from pyro import poutine
from torch import Tensor

from pyro_diffusion.denoisers import GaussianDenoiser, MixtureDenoiser
from pyro_diffusion.distributions import Diffusion, DiffusionSDE, QuantizedDecoder
from pyro_diffusion.dynamics import ForwardSDE, ReverseSDE, SDESolver
from pyro_diffusion.dynamics.brownian import IndependentIncrements, brownian_interval
from pyro_diffusion.dynamics.sde import KnownData
from pyro_diffusion.dynamics.sde_solver import METHODS
from pyro_diffusion.evaluate import log_likelihood
from pyro_diffusion.processes import Absorbing, GaussianProcess
from pyro_diffusion.schedules import Cosine, LogLinear, Rectified, SubVP
from tests.exact import SCHEDULES, mixture, mixture_law, slope
from tests.small_diffusions import SMALL_DIFFUSIONS, SmallDiffusion, Tiny, conditional

F64 = torch.float64
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
REAL = [small for small in SMALL_DIFFUSIONS if small.name not in ("absorbing", "uniform")]
every_kind = pytest.mark.parametrize("small", REAL, ids=lambda small: small.name)
BATCHES = [(), (1,), (2, 3)]


def build(small: SmallDiffusion, denoiser=None, **arguments) -> DiffusionSDE:
    arguments = {
        "solver": SDESolver(steps=4),
        "decoder": small.decoder,
        "context": small.context,
        **arguments,
    }
    return DiffusionSDE(denoiser or small.denoiser(), small.event_shape, **arguments)


def agree(x: Tensor, mean: Tensor, covariance: Tensor, slack: float = 0.0) -> None:
    """First two moments of rows, within 4 standard errors and a slack for the steps taken."""
    n, gap = len(x), x - mean
    error = (covariance.diagonal() / n).sqrt()
    assert (gap.mean(0).abs() <= 4 * error + slack * covariance.diagonal().sqrt()).all()
    products = gap.unsqueeze(-1) * gap.unsqueeze(-2)
    off = (products.mean(0) - covariance).abs()
    scale = covariance.diagonal().sqrt()
    assert (off <= 4 * products.std(0) / math.sqrt(n) + slack * scale * scale[:, None]).all(), off


def moments(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    law = mixture_law()
    second = (
        law.mixture_distribution.probs[:, None, None]
        * (
            law.component_distribution.mean.unsqueeze(-1)
            * law.component_distribution.mean.unsqueeze(-2)
            + torch.diag_embed(law.component_distribution.variance)
        )
    ).sum(0)
    covariance = second - law.mean.unsqueeze(-1) * law.mean
    return alpha * law.mean, alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=F64)


# Marginals, in closed form


@each_schedule
@pytest.mark.parametrize("stop", [0.5, 0.95])
def test_forward_paths_have_the_processs_marginals(make, stop):
    schedule = make()
    process = GaussianProcess(schedule)
    level = schedule.level(torch.tensor([0.0, stop], dtype=F64))
    x0 = mixture_law().sample((2000,))
    x = process.marginal(x0, torch.tensor(0.0, dtype=F64)).sample()
    sde = ForwardSDE(process, (2,), sde_type="stratonovich")
    times = torch.tensor([0.0, stop], dtype=F64)
    bm = IndependentIncrements(x.shape, F64)
    out = torchsde.sdeint(sde, x, times, bm=bm, method="heun", dt=stop / 100)[-1]
    agree(out, *moments(level.alpha[1], level.sigma[1]), slack=0.02)


@each_schedule
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_reverse_paths_restore_the_data(make, eta):
    schedule = make()
    denoiser = mixture(schedule)
    end = schedule.level(torch.tensor([0.0, 1.0], dtype=F64))
    x = mixture_law(end.alpha[1], end.sigma[1]).sample((2000,))
    out = SDESolver("heun", steps=100)(ReverseSDE(denoiser, (2,), eta), x)
    agree(out, *moments(end.alpha[0], end.sigma[0]), slack=0.02)


@pytest.mark.parametrize("eta", [0.5, 1.5])
def test_every_eta_has_the_marginals_half_way(eta):
    schedule = SubVP()
    level = schedule.level(torch.tensor([0.5, 1.0], dtype=F64))
    x = mixture_law(level.alpha[1], level.sigma[1]).sample((4000,))
    sde = ReverseSDE(mixture(schedule), (2,), eta, sde_type="stratonovich")
    bm = IndependentIncrements(x.shape, F64)
    times = torch.tensor([0.0, 0.5], dtype=F64)
    out = torchsde.sdeint(sde, x, times, bm=bm, method="heun", dt=0.0025)[-1]
    agree(out, *moments(level.alpha[0], level.sigma[0]), slack=0.02)


def test_known_data_walks_the_bridge():
    """From q(x_1 | x_0) the reverse SDE of a known x_0 has the marginals q(x_t | x_0)."""
    schedule = Cosine(6.0, -6.0)
    process = GaussianProcess(schedule)
    x0 = torch.tensor([1.5, -0.5], dtype=F64).expand(4000, 2)
    level = schedule.level(torch.tensor([0.3, 1.0], dtype=F64))
    x = process.marginal(x0, torch.tensor(1.0, dtype=F64)).sample()
    sde = ReverseSDE(KnownData(process, x0), (2,), sde_type="stratonovich")
    bm = IndependentIncrements(x.shape, F64)
    times = torch.tensor([0.0, 0.7], dtype=F64)
    out = torchsde.sdeint(sde, x, times, bm=bm, method="heun", dt=0.0025)[-1]
    agree(out, level.alpha[0] * x0[0], level.sigma[0] ** 2 * torch.eye(2, dtype=F64), slack=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_samples_are_data(method):
    law = DiffusionSDE(mixture(Cosine(8.0, -8.0)), (2,), solver=SDESolver(method, steps=250))
    agree(law.sample((3000,)), *moments(torch.tensor(1.0), torch.tensor(0.0)), slack=0.03)


@pytest.mark.parametrize("method", ["heun", "srk"])
def test_adaptive_samples_are_data(method):
    denoiser = mixture(Cosine(6.0, -6.0))
    law = DiffusionSDE(
        denoiser, (2,), solver=SDESolver(method, adaptive=True, rtol=0.05, atol=0.05)
    )
    agree(law.sample((1000,)), *moments(torch.tensor(1.0), torch.tensor(0.0)), slack=0.05)


# Algebra


@each_schedule
def test_the_drift_is_that_of_the_score(make):
    """-(f x - (1 + eta^2)/2 g^2 s) with s from the mixture's own density."""
    schedule = make()
    sde = ReverseSDE(mixture(schedule), (2,), 0.7)
    for t in (0.15, 0.6, 0.9):
        time = torch.tensor(t, dtype=F64)
        level = schedule.level(time)
        x = torch.randn(5, 2, dtype=F64, requires_grad=True)
        (score,) = torch.autograd.grad(mixture_law(level.alpha, level.sigma).log_prob(x).sum(), x)
        f, g2 = schedule.f(time), schedule.g2(time)
        expected = -(f * x - 0.5 * (1 + 0.49) * g2 * score)
        torch.testing.assert_close(sde.f(1 - time, x), expected, rtol=1e-7, atol=1e-7)
        ones = torch.ones_like(x)
        torch.testing.assert_close(sde.g_prod(1 - time, x, ones), ones * (0.7 * g2.sqrt()))


@each_schedule
def test_a_tabulated_walk_is_the_sde_itself(make):
    """Same motion, same steps: coefficients from the table and on the fly."""
    denoiser = mixture(make())
    x = torch.randn(3, 2, dtype=F64)
    for method, steps in (("euler", 8), ("heun", 8), ("srk", 8)):
        sde = ReverseSDE(denoiser, (2,), sde_type=METHODS[method].sde_type)
        pyro.set_rng_seed(1)
        tabulated = SDESolver(method, steps=steps)(sde, x)
        pyro.set_rng_seed(1)
        # The check of the contract draws once before the walk, for both.
        bm = IndependentIncrements(x.shape, F64)
        times = torch.tensor([0.0, 1.0], dtype=F64)
        plain = torchsde.sdeint(sde, x, times, bm=bm, method=method, dt=1 / steps)[-1]
        torch.testing.assert_close(tabulated, plain, rtol=1e-9, atol=1e-9)


def test_an_image_is_walked_as_its_numbers():
    small = next(small for small in SMALL_DIFFUSIONS if small.name == "image")
    denoiser = small.denoiser()
    x = torch.randn(3, 4)
    sde = ReverseSDE(denoiser, small.event_shape)
    u = torch.tensor(0.25)
    level = denoiser.process.level(torch.tensor(0.75), x.reshape(3, 1, 2, 2))
    estimate = denoiser(x.reshape(3, 1, 2, 2), level).mean.reshape(3, 4)
    node = sde.nodes(u.double())
    torch.testing.assert_close(sde.f(u, x), node.state.float() * x + node.data.float() * estimate)


def test_rows_do_not_depend_on_their_batch():
    denoiser = mixture(Cosine())
    x = torch.randn(4, 2, dtype=F64)
    sde = ReverseSDE(denoiser, (2,), 0.0)
    whole = SDESolver("heun", steps=20)(sde, x)
    torch.testing.assert_close(
        whole[:1], SDESolver("heun", steps=20)(sde, x[:1]), rtol=1e-12, atol=1e-12
    )


# Orders


class Rescaled(torchsde.BaseBrownian):
    """One path over [0, 1] that many grids ask."""

    def __init__(self, fine: Tensor):
        # Increments W and integrals U over the cells of the finest grid.
        self.w, self.u = fine
        self.cells = len(self.w)

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        first, last = round(float(ta) * self.cells), round(float(tb) * self.cells)
        w, h = self.w[first:last], 1 / self.cells
        total = w.sum(0)
        if not return_U:
            return total
        before = w.cumsum(0) - w
        return total, (self.u[first:last] + h * before).sum(0)

    def __repr__(self):
        return "Rescaled"

    dtype = property(lambda self: self.w.dtype)
    device = property(lambda self: self.w.device)
    shape = property(lambda self: self.w.shape[1:])
    levy_area_approximation = "space-time"


def path(cells: int, rows: int) -> Rescaled:
    h = 1 / cells
    w = torch.randn(cells, rows, 2, dtype=F64) * math.sqrt(h)
    return Rescaled((w, h * (w / 2 + torch.randn_like(w) * math.sqrt(h / 12))))


@functools.cache
def paths_of_one_motion():
    """A walk by any method under the same motion from the same start, and the most accurate walk."""
    # Components that overlap: where paths may fall to either side of a gap, errors are the gap's size.
    denoiser = MixtureDenoiser(
        GaussianProcess(LogLinear(2.0, -3.0)),
        torch.ones(2, dtype=F64),
        torch.tensor([[1.0, 0.0], [-1.0, 0.3]], dtype=F64),
        0.25,
    )
    # Much noise, so that it is the noise's error that shows.
    cells, eta = 1024, 2.0
    torch.manual_seed(0)
    bm, x = path(cells, 300), torch.randn(300, 2, dtype=F64)
    times = torch.tensor([0.0, 1.0], dtype=F64)

    def walk(method: str, steps: int) -> Tensor:
        sde = ReverseSDE(denoiser, (2,), eta, sde_type=METHODS[method].sde_type)
        return torchsde.sdeint(sde, x, times, bm=bm, method=method, dt=1 / steps)[-1]

    return walk, walk("srk", cells)


@pytest.mark.parametrize("method", METHODS)
def test_strong_order(method):
    """Paths under one Brownian motion, against the most accurate: the slope of the root mean square error."""
    walk, reference = paths_of_one_motion()
    grids = (32, 64, 128)
    errors = [(walk(method, k) - reference).square().mean().sqrt().item() for k in grids]
    assert abs(slope(grids, errors) - METHODS[method].strong_order) <= 0.25, errors


def linear_variance(method: str, steps: int, schedule) -> Tensor:
    """The variance that a method gives a linear SDE, exactly: its response to the start and to each normal.

    Data N(0, 0.25): the exact posterior mean is linear, so a walk is a linear map of its start and its noise.
    """

    class Basis(torchsde.BaseBrownian):
        """Row i of step j is 1 where the row asks for that step's W (or H), 0 elsewhere."""

        shape = torch.Size([2 * steps + 1, 1])
        dtype, device = F64, torch.device("cpu")
        levy_area_approximation = "space-time"

        def __call__(self, ta, tb=None, return_U=False, return_A=False):
            h = float(tb) - float(ta)
            j = round(float(ta) * steps)
            w, u = torch.zeros(2, *self.shape, dtype=F64)
            w[1 + j], u[1 + j] = math.sqrt(h), h * math.sqrt(h) / 2
            u[1 + steps + j] = h * math.sqrt(h / 12)
            return (w, u) if return_U else w

        def __repr__(self):
            return "Basis"

    class Linear(ReverseSDE):
        def drift(self, y, node):
            gain = level_gain(node.level)
            return node.state * y + node.data * gain * y

    def level_gain(level):
        return 0.25 * level.alpha / (0.25 * level.alpha**2 + level.sigma**2)

    process = GaussianProcess(schedule)
    sde = Linear(KnownData(process, torch.zeros(1)), (1,), sde_type=METHODS[method].sde_type)
    y = torch.zeros(2 * steps + 1, 1, dtype=F64)
    end = schedule.level(torch.tensor(1.0, dtype=F64))
    y[0] = (0.25 * end.alpha**2 + end.sigma**2).sqrt()
    times = torch.tensor([0.0, 1.0], dtype=F64)
    out = torchsde.sdeint(sde, y, times, bm=Basis(), method=method, dt=(1 + 1e-13) / steps)[-1]
    return out.square().sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", [LogLinear(3.0, -3.0), Cosine(3.0, -3.0)], ids=repr)
def test_weak_order(method, schedule):
    """Error of the final variance on normal data, in closed form: no draw is made."""
    start = schedule.level(torch.tensor(0.0, dtype=F64))
    exact = 0.25 * start.alpha**2 + start.sigma**2
    grids = (32, 64, 128, 256)
    errors = [(linear_variance(method, k, schedule) - exact).abs().item() for k in grids]
    assert abs(slope(grids, errors) - METHODS[method].weak_order) <= 0.25, errors


# Brownian motion


def test_independent_increments_have_the_right_law():
    bm = IndependentIncrements((20000, 2), F64)
    w, u = bm(0.25, 0.75, return_U=True)
    h, n = 0.5, w.numel()
    for got, variance in ((w * w, h), (u * u, h**3 / 3), (w * u, h**2 / 2)):
        assert abs(got.mean() - variance) <= 4 * got.std() / math.sqrt(n)
    assert bm(0.75, 1.0).shape == (20000, 2) and "reached=1.0" in repr(bm)
    with pytest.raises(ValueError, match="one after another"):
        bm(0.5, 1.0)
    with pytest.raises(ValueError, match="one after another"):
        bm(1.0)


def test_increments_come_from_the_generator_that_is_given():
    draws = [
        IndependentIncrements((3, 2), generator=torch.Generator().manual_seed(seed))(0.0, 1.0)
        for seed in (1, 1, 2)
    ]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_torchs_generator_fixes_the_interval():
    """numpy's does not matter."""
    ws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ws.append(brownian_interval((3, 2))(0.2, 0.4))
    assert ws[0].equal(ws[1]) and not ws[0].equal(ws[2])


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_seed_fixes_the_samples(adaptive):
    law = DiffusionSDE(
        mixture(Cosine(4.0, -4.0)),
        (2,),
        solver=SDESolver("srk", steps=None if adaptive else 10, adaptive=adaptive),
    )
    draws = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        draws.append(law.sample((3,)))
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


# The bound


def test_the_path_divergence_is_the_diffusion_term():
    """torchsde's logqp between the bridge and the model, against the integral over t."""
    schedule = Cosine(4.0, -6.0)
    denoiser, process = mixture(schedule, point_mass=True), GaussianProcess(schedule)
    x0 = mixture_law().sample((1,)).expand(1000, 2)
    start = process.marginal(x0, torch.tensor(1.0, dtype=F64)).sample()
    sde = ReverseSDE(KnownData(process, x0), (2,), prior=denoiser, noise_type="diagonal")
    bm = IndependentIncrements((1000, 3), F64)
    times = torch.tensor([0.0, 1.0], dtype=F64)
    _, paths = torchsde.sdeint(sde, start, times, bm=bm, logqp=True, method="euler", dt=1 / 200)
    law = DiffusionSDE(denoiser, (2,))
    position = (torch.arange(100, dtype=F64)[:, None] + torch.rand(100, 1000, dtype=F64)) / 100
    terms = law.bound_terms(x0.expand(100, 1000, 2), position).mean(0)
    error = math.hypot(paths.sum(0).std() / 1000**0.5, terms.std() / 1000**0.5)
    assert abs(paths.sum(0).mean() - terms.mean()) <= 4 * error + 0.01 * terms.mean()
    assert error < 0.03 * terms.mean()


@pytest.mark.parametrize("schedule", [LogLinear(5.0, -8.0), SubVP(log_snr_max=5.0)], ids=repr)
def test_the_discrete_bound_tends_to_the_continuous_one(schedule):
    """Its excess falls like 1 / steps; point masses, so that both read the mean alone."""
    denoiser = mixture(schedule, point_mass=True)
    data = mixture_law().sample((3000,))
    times = torch.arange(3000, dtype=F64) / 3000
    limit = DiffusionSDE(denoiser, (2,)).bound_terms(data, (times + 0.5 / 3000))
    gaps = []
    for steps in (50, 100):
        grid = torch.linspace(0, 1, steps + 1, dtype=F64)
        chain = Diffusion(denoiser, (2,), times=grid)
        # The reverse step's cost at t_j times its number, minus the integrand in the middle of the step.
        pyro.set_rng_seed(7)
        terms = chain.reverse_terms(data, times)
        gaps.append((terms - limit).mean().item())
    error = 4 * limit.std().item() / 3000**0.5
    assert gaps[0] > 0 and abs(gaps[0] - 2 * gaps[1]) <= 3 * error + 0.2 * gaps[0], (gaps, error)


def test_one_site_is_unbiased_for_every_datum():
    denoiser = mixture(Cosine(6.0, -6.0))
    data = mixture_law().sample((4,))
    copies = data.repeat(40, 1)
    estimates = torch.stack(
        [DiffusionSDE(denoiser, (2,)).log_prob(copies).view(40, 4).mean(0) for _ in range(150)]
    )
    law = DiffusionSDE(denoiser, (2,))
    many = data.expand(4000, 4, 2)
    position = ((torch.arange(4000, dtype=F64) + torch.rand(4000, dtype=F64)) / 4000)[:, None]
    whole = -(law.prior_terms(data) + law.decoder_terms(many) + law.reverse_terms(many, position))
    error = (estimates.var(0) / 150 + whole.var(0) / 4000).sqrt()
    assert ((estimates.mean(0) - whole.mean(0)).abs() <= 4 * error).all()


def test_standard_normal_data_reach_their_likelihood():
    """The exact posterior of normal data leaves only what the prior and the decoder lose: nothing."""
    process = GaussianProcess(LogLinear(8.0, -8.0))
    denoiser = MixtureDenoiser(process, torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), 1.0)
    data = denoiser.data().sample((2000,))
    got = log_likelihood(DiffusionSDE(denoiser, (3,)), data, num_terms=64)
    gap = (got.value - denoiser.data().log_prob(data)) / 3
    assert abs(gap.mean()) <= 4 * gap.std() / 2000**0.5 and gap.std() / 2000**0.5 < 0.02


def test_the_likelihood_table_tells_the_terms_apart():
    denoiser = mixture(LogLinear(6.0, -6.0))
    data = mixture_law().sample((200,))
    got = log_likelihood(DiffusionSDE(denoiser, (2,)), data, num_terms=50)
    terms = got.terms
    assert got.kind == "lower bound" and got.evaluations == 52 and len(terms.steps) == 50
    total = terms.prior + terms.decoder + terms.reverse
    assert total == pytest.approx(-got.mean.value, rel=1e-9)
    assert float(terms.steps.sum()) == pytest.approx(terms.reverse, rel=1e-9)
    for part in ("prior", "decoder", "reverse"):
        assert 0 < getattr(terms, f"{part}_standard_error") < 1
    assert terms.log_snr[-1] == pytest.approx(-6.0) and got.standard_error.shape == (200,)
    assert len(log_likelihood(DiffusionSDE(denoiser, (2,)), data[:1]).terms.steps) == 128


def test_gradient_of_the_bound():
    """By finite differences, at fixed noise."""
    law = DiffusionSDE(mixture(Cosine()), (2,))
    x = torch.randn(5, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(law.log_prob, x)


# Pyro's contract


@every_kind
def test_support_holds_the_samples(small: SmallDiffusion):
    view = build(small)
    assert view.support.event_dim == view.event_dim == len(small.event_shape)
    assert not view.has_rsample
    assert view.support.check(view.sample((5,))).all()


@every_kind
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sample_shape", [(), (4,)])
def test_shapes(small: SmallDiffusion, batch, sample_shape):
    view = build(small).expand(batch)
    assert view.batch_shape == batch and view.event_shape == small.event_shape
    value = view.sample(sample_shape)
    assert value.shape == sample_shape + batch + small.event_shape and not value.requires_grad
    score = view.log_prob(value)
    assert score.shape == sample_shape + batch and score.isfinite().all()
    assert view.log_prob(small.data()).shape == batch
    assert view.bound_terms(value, 0.3).shape == sample_shape + batch


@every_kind
def test_expand_twice_mask_and_to_event(small: SmallDiffusion):
    view = build(small)
    once = view.expand((3,))
    twice = once.expand((2, 3))
    assert isinstance(twice, DiffusionSDE) and twice.denoiser is view.denoiser
    value = small.data((2, 3))
    assert twice.log_prob(value).equal(view.log_prob(value))
    assert twice.log_prob(value).equal(once.log_prob(value))
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(twice.mask(mask).log_prob(value), view.log_prob(value) * mask)
    assert twice.to_event(1).log_prob(value).shape == (2,)


@every_kind
def test_pickle_and_deepcopy(small: SmallDiffusion):
    view, value = build(small).expand((2,)), small.data((2,))
    view.sample()
    for copied in (pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        assert copied.log_prob(value).equal(view.log_prob(value))
        assert copied.expand((3, 2)).sample().shape == (3, 2, *small.event_shape)


@every_kind
def test_float64(small: SmallDiffusion):
    context = {k: v.double() if v.is_floating_point() else v for k, v in small.context.items()}
    view = build(small, small.denoiser().double(), context=context)
    value = small.data((6,), dtype=F64)
    assert view.log_prob(value).dtype == F64
    assert view.sample().dtype == (F64 if small.levels is None else torch.int64)
    assert view.log_prob(value.to(torch.float32)).dtype == F64


def test_an_instance_scores_alike_and_another_afresh():
    denoiser, value = SMALL_DIFFUSIONS[0].denoiser(), SMALL_DIFFUSIONS[0].data((32,))
    first, second = build(SMALL_DIFFUSIONS[0], denoiser), build(SMALL_DIFFUSIONS[0], denoiser)
    before = torch.get_rng_state()
    assert first.log_prob(value).equal(first.log_prob(value))
    assert torch.get_rng_state().equal(before)
    assert not first.log_prob(value).equal(second.log_prob(value))


def test_plates_and_context():
    denoiser = conditional()
    labels = torch.tensor([0, 1, 2])

    def model(x=None):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            law = DiffusionSDE(denoiser, (3,), solver=SDESolver(steps=3), context={"label": labels})
            return pyro.sample("x", law, obs=x)

    for x in (None, torch.randn(2, 3, 3)):
        trace = poutine.trace(model).get_trace(x)
        trace.compute_log_prob()
        assert trace.nodes["x"]["log_prob"].shape == (2, 3)
        assert trace.nodes["x"]["value"].shape == (2, 3, 3)


def test_context_reaches_its_row():
    """Labels change the drift of their own row alone."""
    denoiser = conditional()
    x = torch.randn(3, 3)
    one = ReverseSDE(denoiser, (3,), context={"label": torch.tensor([0, 1, 2])})
    other = ReverseSDE(denoiser, (3,), context={"label": torch.tensor([0, 2, 2])})
    u = torch.tensor(0.5)
    changed = (one.f(u, x) != other.f(u, x)).any(1)
    assert changed.tolist() == [False, True, False]


def test_replace_and_condition():
    law = DiffusionSDE(conditional(), (3,), solver=SDESolver("srk", steps=7), eta=0.5)
    assert law.condition(label=torch.tensor([0, 1])).batch_shape == (2,)
    changed = law.replace(solver=SDESolver("heun", steps=9))
    assert (changed.solver, changed.eta) == (SDESolver("heun", steps=9), 0.5)


def test_quantized_data():
    denoiser = GaussianDenoiser(Tiny((3,)), GaussianProcess(Cosine()))
    law = DiffusionSDE(denoiser, (3,), solver=SDESolver(steps=5), decoder=QuantizedDecoder(4))
    assert law.sample((2,)).dtype == torch.int64
    assert law.log_prob(torch.tensor([0, 3, 1])).shape == ()


# Bad input


def gaussian(**arguments):
    return DiffusionSDE(mixture(Cosine()), (2,), **arguments)


def categorical():
    return SMALL_DIFFUSIONS[-4].denoiser()


BAD = {
    "categorical": (
        lambda: DiffusionSDE(categorical(), (3,)),
        "denoiser: got .* under Absorbing, which lacks a stochastic",
    ),
    "no denoiser": (lambda: DiffusionSDE(Tiny((2,)), (2,)), "denoiser: got Tiny"),
    "event": (lambda: DiffusionSDE(mixture(Cosine()), (2, 2)), "event_shape: got"),
    "solver": (lambda: gaussian(solver="srk"), "solver: got 'srk', expected an SDESolver"),
    "steps": (lambda: gaussian(solver=SDESolver(steps=0)), "steps: got 0"),
    "eta": (lambda: gaussian(eta=-0.1), "eta: got -0.1"),
    "eta nan": (lambda: gaussian(eta=math.nan), "eta: got nan"),
    "method": (
        lambda: gaussian(solver=SDESolver("dopri5")),
        "method: got 'dopri5', expected one of euler",
    ),
    "adaptive euler": (
        lambda: gaussian(solver=SDESolver(adaptive=True)),
        "adaptive: got True with method 'euler'",
    ),
    "rtol": (
        lambda: gaussian(solver=SDESolver("heun", adaptive=True, rtol=0.0)),
        "rtol: got 0.0, expected a tolerance > 0",
    ),
    "atol": (
        lambda: gaussian(solver=SDESolver("heun", adaptive=True, atol=-1.0)),
        "atol: got -1.0",
    ),
    "rtol of fixed steps": (
        lambda: SDESolver("euler", rtol=0.1),
        r"rtol: got 0.1 for adaptive=False, expected no rtol \(it takes steps\)",
    ),
    "atol of fixed steps": (lambda: SDESolver("srk", atol=0.1), "atol: got 0.1 for adaptive=False"),
    "steps of adaptive ones": (
        lambda: SDESolver("srk", adaptive=True, steps=50),
        r"steps: got 50 for adaptive=True, expected no steps \(it takes rtol, atol\)",
    ),
    "decoder": (lambda: gaussian(decoder=3), "decoder: got 3"),
    "infinite": (
        lambda: DiffusionSDE(mixture(Rectified.full()), (2,), validate_args=True),
        "schedule: got",
    ),
    "value": (lambda: gaussian(validate_args=True).log_prob(torch.zeros(3)), "value: got shape"),
    "nan": (
        lambda: gaussian(validate_args=True).log_prob(torch.full((2,), math.nan)),
        "value: got 2 NaN",
    ),
    "time": (
        lambda: gaussian(validate_args=True).bound_terms(torch.zeros(2), 1.5),
        "t: got times",
    ),
    "forward of categorical": (
        lambda: ForwardSDE(Absorbing(Rectified.full(), 3), (3,)),
        "process: got Absorbing",
    ),
    "forward without ends": (
        lambda: ForwardSDE(GaussianProcess(Rectified.full()), (3,)),
        "schedule: got log-SNR ends",
    ),
    "reverse of a network": (lambda: ReverseSDE(Tiny((2,)), (2,)), "denoiser: got Tiny"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    build_it, message = case
    with pytest.raises(ValueError, match=f"^{message}"):
        build_it()
