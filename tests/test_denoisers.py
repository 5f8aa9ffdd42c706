"""Networks read as posteriors: plumbing, evidence by Bayes' rule, and the variances."""

import copy

import pytest
import torch
from pyro.distributions import Categorical, Delta, Normal
from torch import nn
from torch.testing import assert_close

from pyro_diffusion.denoisers import (
    CategoricalDenoiser,
    Data,
    Denoiser,
    EDMPreconditioning,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    MixtureDenoiser,
    Noise,
    Score,
    TableDenoiser,
    TimeVariance,
    V,
    Variance,
    Velocity,
    uniform_levels,
    unit_variance,
)
from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import EDM as KarrasSchedule
from pyro_diffusion.schedules import Cosine, Level, LogLinear, Rectified
from pyro_diffusion.unwrapping import per_coordinate
from tests.exact import DTYPES, MEANS, VARIANCES, WEIGHTS

F64 = torch.float64


class Net(nn.Module):
    """An arbitrary row-wise network with any number of outputs; it remembers its arguments."""

    def __init__(self, outputs=1, symbols=0):
        super().__init__()
        self.outputs = outputs
        self.embedding = nn.Embedding(symbols, 1) if symbols else None
        self.mix = nn.Parameter(torch.randn(3, outputs))

    def forward(self, x, log_snr, **context):
        self.seen = x, log_snr, context
        if self.embedding is not None:
            x = self.embedding(x)[..., 0]
        far = x.reshape(len(x), -1).mean(1).reshape(-1, *[1] * (x.dim() - 1))
        level = log_snr.to(x.dtype).reshape(far.shape) / 10
        parts = torch.stack([x, far.expand(x.shape), (x * level).sin()], -1)
        out = torch.tanh(parts @ self.mix)
        return out[..., 0] if self.outputs == 1 else out


class Constant(nn.Module):
    """A network that returns one number, or given logits, everywhere."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", torch.as_tensor(value))

    def forward(self, x, log_snr, **context):
        return self.value.expand(*x.shape, *self.value.shape)


def gaussian(event_dim, **options):
    def make():
        process = GaussianProcess(Cosine(), event_dim)
        variance = options.get("variance", lambda: None)()
        outputs = 1 + (variance.outputs if variance is not None else 0)
        parameterization = options.get("parameterization")
        return GaussianDenoiser(Net(outputs), process, parameterization, variance)

    return make


def exact():
    return MixtureDenoiser(GaussianProcess(Cosine()), WEIGHTS.float(), MEANS.float(), VARIANCES)


def table(process):
    joint = torch.arange(1.0, 9.0).reshape(2, 2, 2)
    return lambda: TableDenoiser(process(Rectified(), 2), joint)


# name: (maker, event shape, symbols of the state or 0)
DENOISERS = {
    "default": (gaussian(1), (3,), 0),
    "scalar event": (gaussian(0, parameterization=Data()), (), 0),
    "image": (gaussian(3, parameterization=Noise()), (2, 3, 3), 0),
    "score": (gaussian(1, parameterization=Score()), (3,), 0),
    "velocity": (gaussian(2, parameterization=Velocity()), (2, 3), 0),
    "edm, learned variance": (
        gaussian(3, parameterization=EDMPreconditioning(), variance=LearnedVariance),
        (2, 3, 3),
        0,
    ),
    "time variance": (
        gaussian(1, variance=lambda: TimeVariance([-8.0, 0.0, 9.0], [-1.0, 0.5, 0.2])),
        (3,),
        0,
    ),
    "levels": (
        lambda: LevelsDenoiser(Net(4), GaussianProcess(KarrasSchedule(), 2), uniform_levels(4)),
        (2, 3),
        0,
    ),
    "absorbing": (lambda: CategoricalDenoiser(Net(4, 5), Absorbing(Cosine(), 4)), (6,), 5),
    "uniform": (lambda: CategoricalDenoiser(Net(4, 4), Uniform(Rectified(), 4, 2)), (2, 3), 4),
    "mixture": (exact, (2,), 0),
    "table absorbing": (table(Absorbing), (3,), 3),
    "table uniform": (table(Uniform), (3,), 2),
}
each = pytest.mark.parametrize(("make", "event", "symbols"), DENOISERS.values(), ids=DENOISERS)


def draw(shape, symbols, dtype=torch.float32):
    return torch.randint(symbols, shape) if symbols else torch.randn(shape, dtype=dtype)


def numbers(law):
    """What identifies a posterior, per datum."""
    base = per_coordinate(law)
    if isinstance(base, Categorical):
        return (base.probs,)
    return base.mean, base.variance


# Contract


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (4, 2, 3)])
def test_shapes(make, event, symbols, dtype, batch):
    denoiser = make().to(dtype)
    assert isinstance(denoiser, Denoiser)
    xt = draw((*batch, *event), symbols, dtype)
    times = [torch.rand(batch, dtype=dtype), torch.tensor(0.4, dtype=dtype)]
    times.append(denoiser.process.level(times[0]))
    if not isinstance(denoiser, TableDenoiser):
        times.append(0.4)
    if len(batch) > 1:
        times += [torch.rand(batch[-1:], dtype=dtype), torch.rand(*batch[:-1], 1, dtype=dtype)]
    for t in times:
        law = denoiser(xt, t)
        assert law.batch_shape == batch and law.event_shape == event
        x0 = law.sample()
        assert x0.shape == xt.shape and law.log_prob(x0).shape == batch
        for value in numbers(law):
            assert value.dtype == dtype and bool(torch.isfinite(value).all())
        if symbols:
            assert per_coordinate(law).probs.shape == (*xt.shape, denoiser.process.states)


@each
def test_rows_are_independent(make, event, symbols):
    denoiser = make().double()
    xt, t = draw((2, 3, *event), symbols, F64), torch.rand(2, 3, dtype=F64)
    whole = numbers(denoiser(xt, t))
    last_row = numbers(denoiser(xt, t[1]))
    for i in range(3):
        alone = numbers(denoiser(xt[1, i], t[1, i]))
        for a, b, c in zip(whole, last_row, alone, strict=True):
            assert_close(a[1, i], c)
            assert_close(b[1, i], c)


@each
def test_times_and_levels_agree(make, event, symbols):
    denoiser, xt, t = make(), draw((3, *event), symbols), torch.rand(3)
    laws = numbers(denoiser(xt, t)), numbers(denoiser(xt, denoiser.process.level(t)))
    for a, b in zip(*laws, strict=True):
        assert torch.equal(a, b)
    for bad in (-0.1, torch.tensor([0.1, 1.1, 0.3])):
        with pytest.raises(ValueError, match=r"^t: got times from"):
            denoiser(xt, bad)


@each
def test_copies(make, event, symbols):
    denoiser, other = make(), make()
    other.load_state_dict(denoiser.state_dict())
    xt, t = draw((3, *event), symbols), torch.rand(3)
    for copied in (other, copy.deepcopy(denoiser)):
        for a, b in zip(numbers(denoiser(xt, t)), numbers(copied(xt, t)), strict=True):
            assert torch.equal(a, b)


@each
def test_gradients_are_finite(make, event, symbols):
    """In every parameter and in the state, over the whole range of times, ends included."""
    denoiser = make()
    t = torch.linspace(0, 1, 7)
    xt = draw((7, *event), symbols).requires_grad_(not symbols)
    law = denoiser(xt, t)
    total = sum(value.sum() for value in numbers(law)) + law.log_prob(law.sample()).sum()
    leaves = [*denoiser.parameters()] + ([] if symbols else [xt])
    for leaf in leaves:
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert bool(torch.isfinite(gradient).all())


# The network's side


@each
def test_the_network_sees_one_batch_dimension(make, event, symbols):
    denoiser = make()
    if not hasattr(denoiser, "network"):
        return
    for batch in ((), (4,), (2, 3)):
        xt, t = draw((*batch, *event), symbols), torch.rand(batch)
        denoiser(xt, t)
        x, log_snr, _ = denoiser.network.seen
        count = max(1, torch.Size(batch).numel())
        assert x.shape == (count, *event) and log_snr.shape == (count,)
        level = denoiser.process.schedule.level(t)
        assert_close(log_snr, level.log_snr.reshape(-1))
        if not symbols:
            wide = level.unsqueeze(len(event))
            norm = denoiser_norm(denoiser, wide)
            assert_close(x, (xt / norm).reshape(x.shape))
        else:
            assert torch.equal(x, xt.reshape(x.shape))


def denoiser_norm(denoiser, level):
    data = getattr(getattr(denoiser, "parameterization", None), "sigma_data", 1.0)
    return ((data * level.alpha) ** 2 + level.sigma**2).sqrt()


def test_context_is_flattened_and_broadcast():
    denoiser = GaussianDenoiser(
        Net(), GaussianProcess(Cosine()), context_event_dims={"grid": 2, "number": 0}
    )
    xt, t = torch.randn(4, 3, 2), torch.rand(3)
    label, vector = torch.randint(9, (3,)), torch.randn(4, 1, 5)
    grid, number = torch.randn(6, 7), torch.randn(4, 3)
    denoiser(xt, t, label=label, vector=vector, grid=grid, number=number, nothing=None)
    _, _, seen = denoiser.network.seen
    assert set(seen) == {"label", "vector", "grid", "number"}
    assert torch.equal(seen["label"], label.expand(4, 3).reshape(12))
    assert torch.equal(seen["vector"], vector.expand(4, 3, 5).reshape(12, 5))
    assert torch.equal(seen["grid"], grid.expand(12, 6, 7))
    assert torch.equal(seen["number"], number.reshape(12))
    assert denoiser.context_event_dim("vector", vector) == 1
    assert denoiser.context_event_dim("label", label) == 0
    assert denoiser.context_event_dim("grid", grid) == 2
    with pytest.raises(ValueError, match=r"^label: got shape \(5,\), expected .* \(4, 3\)"):
        denoiser(xt, t, label=torch.zeros(5, dtype=torch.int64))


def test_exact_denoisers_ignore_context():
    label = {"label": torch.tensor(1)}
    x, symbols = torch.zeros(2), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(exact()(x, 0.5, **label).mean, exact()(x, 0.5).mean)
    means = [table(Uniform)()(symbols, 0.5, **k).base_dist.probs for k in ({}, label)]
    assert torch.equal(*means)


# Gaussian denoisers


def test_defaults():
    denoiser = GaussianDenoiser(Net(), GaussianProcess(Cosine()))
    assert denoiser.parameterization == V() and denoiser.variance is None
    assert isinstance(denoiser(torch.zeros(3), 0.5), Delta)


@pytest.mark.parametrize(
    "parameterization", [Noise(), Data(), V(), Score(), Velocity(), EDMPreconditioning(0.7)]
)
def test_mean_inverts_the_target(parameterization):
    """A network that returns the right target recovers the data, over images and (B,) times."""
    process = GaussianProcess(KarrasSchedule(), event_dim=3)
    t = torch.rand(4, dtype=F64)
    level = process.level(t)
    x0 = torch.randn(4, 1, 2, 2, dtype=F64)
    xt = level.alpha * x0 + level.sigma * torch.randn_like(x0)
    target = parameterization.target(x0, xt, level.alpha, level.sigma)

    class Oracle(nn.Module):
        def forward(self, x, log_snr):
            return target

    denoiser = GaussianDenoiser(Oracle(), process, parameterization)
    assert_close(denoiser(xt, t).mean, x0, rtol=1e-6, atol=1e-6)


def test_outputs_are_mean_then_variance():
    process = GaussianProcess(LogLinear(4.0, -4.0))
    denoiser = GaussianDenoiser(
        Constant(torch.tensor([0.5, -1.0])), process, Data(), LearnedVariance()
    )
    law = denoiser(torch.randn(3, 2), torch.tensor([0.0, 0.5, 1.0]))
    assert_close(law.mean, torch.full((3, 2), 0.5))
    expected = torch.sigmoid(torch.tensor([-4.0, 0.0, 4.0])) * torch.tensor(-1.0).exp()
    assert_close(law.variance, expected[:, None].expand(3, 2))


# Variances


def test_unit_variance_is_the_posterior_of_standard_normal_data():
    for schedule in (Cosine(), KarrasSchedule(), Rectified()):
        level = schedule.level(torch.linspace(0, 1, 9, dtype=F64))
        # Precisions add: 1 of the prior, alpha^2 / sigma^2 of the state.
        assert_close(unit_variance(level), 1 / (1 + (level.alpha / level.sigma) ** 2))


def test_learned_variance_is_clamped():
    level = Cosine().level(torch.tensor(0.5, dtype=F64))
    head = torch.tensor([-99.0, -2.0, 0.0, 2.0, 99.0], dtype=F64)
    expected = torch.tensor([-3.0, -2.0, 0.0, 2.0, 3.0], dtype=F64).exp() / 2
    assert_close(LearnedVariance(3.0)(head, level), expected)
    assert LearnedVariance.outputs == 1 and TimeVariance.outputs == 0
    with pytest.raises(ValueError, match=r"^network: got no variance head"):
        LearnedVariance()(None, level)
    with pytest.raises(NotImplementedError):
        Variance()(None, level)


def log_ratio(variance, log_snr):
    log_snr = torch.as_tensor(log_snr)
    level = Level(log_snr, log_snr, log_snr, log_snr, log_snr)
    return (variance(None, level) / unit_variance(level)).log()


def test_time_variance_interpolates():
    variance = TimeVariance([-4.0, 0.0, 2.0], [1.0, -1.0, 3.0])
    where = torch.tensor([-9.0, -4.0, -3.0, 0.0, 0.5, 2.0, 5.0])
    expected = torch.tensor([1.0, 1.0, 0.5, -1.0, 0.0, 3.0, 3.0])
    assert_close(log_ratio(variance, where), expected, rtol=1e-5, atol=1e-5)
    assert_close(log_ratio(variance, where.reshape(7, 1, 1))[:, 0, 0], expected, rtol=0, atol=1e-5)
    assert_close(log_ratio(variance, -3.0), torch.tensor(0.5))
    assert_close(log_ratio(TimeVariance([0.0, 1.0]), where), torch.zeros(7), rtol=0, atol=1e-6)


def test_time_variance_parameters():
    assert [p.shape for p in TimeVariance([0.0, 1.0]).parameters()] == [(2,)]
    fixed = TimeVariance([0.0, 1.0], [0.5, 0.5], trainable=False)
    assert list(fixed.parameters()) == [] and set(fixed.state_dict()) == {"knots", "log_ratio"}
    given = torch.zeros(2)
    variance = TimeVariance([0.0, 1.0], given)
    with torch.no_grad():
        variance.log_ratio += 1
    assert given.tolist() == [0, 0]
    log_ratio(variance, torch.tensor([0.25])).sum().backward()
    assert_close(variance.log_ratio.grad, torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize(
    ("knots", "ratio", "message"),
    [
        ([0.0], None, r"^log_snr: got \[0.0\], expected at least two increasing knots"),
        ([1.0, 0.0], None, r"^log_snr: got \[1.0, 0.0\]"),
        ([0.0, 0.0], None, r"^log_snr: got"),
        ([0.0, float("inf")], None, r"^log_snr: got 1 NaN or infinite"),
        ([0.0, 1.0], [0.0], r"^log_ratio: got shape \(1,\), expected \(2,\)"),
    ],
)
def test_time_variance_refuses(knots, ratio, message):
    with pytest.raises(ValueError, match=message):
        TimeVariance(knots, ratio)


# Evidence: finitely many values


@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
def test_levels_are_bayes_rule(event):
    """Given log-priors from the network, p(v | x_t) is proportional to prior times normal density."""
    process = GaussianProcess(Cosine(), event_dim=len(event))
    values = torch.tensor([-1.0, -0.2, 0.6, 1.0], dtype=F64)
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    denoiser = LevelsDenoiser(Constant(prior.log() + 5), process, values)
    xt, t = torch.randn(5, *event, dtype=F64), torch.rand(5, dtype=F64)
    level = process.level(t)
    density = Normal(level.alpha[..., None] * values, level.sigma[..., None]).log_prob(
        xt[..., None]
    )
    expected = (prior.log() + density).softmax(-1)
    law = denoiser(xt, t)
    assert_close(per_coordinate(law).probs, expected)
    assert_close(law.mean, (expected * values).sum(-1))
    second = (expected * values**2).sum(-1)
    assert_close(law.variance, second - law.mean**2, rtol=1e-6, atol=1e-9)


def test_levels_need_no_network_near_the_data():
    values = uniform_levels(17)
    denoiser = LevelsDenoiser(Constant(torch.zeros(17)), GaussianProcess(Cosine()), values)
    x0 = values[torch.randint(17, (50, 3))]
    xt = denoiser.process.marginal(x0, 0.0).sample()
    assert_close(denoiser(xt, 0.0).mean, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [Absorbing, Uniform])
def test_symbols_are_bayes_rule(make):
    process = make(Rectified(), 3)
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    denoiser = CategoricalDenoiser(Constant(prior.log() - 2), process)
    xt = torch.arange(len(process.noise))
    for t in (0.0, 0.3, 1.0):
        t = torch.tensor(t, dtype=F64)
        each_x0 = torch.arange(3)[:, None].expand(3, len(xt))
        likelihood = per_coordinate(process.marginal(each_x0, t)).probs.gather(
            -1, xt.expand(3, -1)[..., None]
        )[..., 0]
        expected = prior * likelihood.T
        expected = expected / expected.sum(-1, keepdim=True)
        assert_close(per_coordinate(denoiser(xt, t)).probs, expected)


def test_masking_copies_what_is_seen_and_asks_for_what_is_not():
    process = Absorbing(Rectified.full(), 3)
    logits = torch.tensor([1.0, -2.0, 0.5])
    denoiser = CategoricalDenoiser(Constant(logits), process)
    probs = per_coordinate(denoiser(torch.tensor([0, 1, 2, process.mask]), 0.6)).probs
    assert_close(probs, torch.cat([torch.eye(3), logits.softmax(-1)[None]]))
    assert "values" not in denoiser.state_dict()


def quantized(dtype=F64):
    logits = torch.tensor([[0.0, 1.0, -1.0], [3.0, 0.0, 0.0]], dtype=dtype)
    return Quantized(logits, torch.tensor([-1.0, 0.25, 2.0], dtype=dtype)), logits.softmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized(dtype):
    law, p = quantized(dtype)
    v = law.values
    assert law.batch_shape == (2,) and law.event_shape == ()
    assert_close(law.probs, p)
    assert_close(law.mean, (p * v).sum(-1))
    assert_close(law.variance, (p * v**2).sum(-1) - law.mean**2)
    grid = v[:, None].expand(3, 2)
    assert_close(law.log_prob(grid), p.log().T)
    assert law.log_prob(torch.full((2,), 0.3, dtype=dtype)).tolist() == [-torch.inf] * 2
    assert_close(law.log_prob(torch.full((2,), 0.25 + 1e-7, dtype=dtype)), p.log()[:, 1])
    assert law.sample((4,)).shape == (4, 2) and law.sample().dtype == dtype


def test_quantized_expands():
    law, p = quantized()
    wide = law.expand((5, 2))
    assert wide.batch_shape == (5, 2) and wide.sample().shape == (5, 2)
    again = wide.expand((4, 5, 2)).to_event(1)
    assert again.batch_shape == (4, 5) and again.event_shape == (2,)
    assert_close(again.mean, law.mean.expand(4, 5, 2))
    assert_close(again.base_dist.probs, p.expand(4, 5, 2, 3))
    assert again.log_prob(again.sample()).shape == (4, 5)


def test_quantized_samples_have_their_frequencies():
    """False-alarm rate: four normal tests at 4.4 standard errors, about 5e-5."""
    law, p = quantized()
    draws = law.sample((20_000,))
    for k in range(2):
        share = (draws == law.values[k]).double().mean(0)
        error = (p[:, k] * (1 - p[:, k]) / 20_000).sqrt()
        assert bool(((share - p[:, k]).abs() < 4.4 * error).all())


def test_uniform_levels():
    assert_close(uniform_levels(5), torch.tensor([-1, -0.5, 0, 0.5, 1]))
    assert_close(uniform_levels(3, 0.0, 4.0), torch.tensor([0.0, 2.0, 4.0]))


def test_quantized_is_steady_far_from_zero():
    """The variance does not cancel in float32."""
    law = Quantized(torch.zeros(2), torch.tensor([1000.0, 1000.1]))
    assert float(law.variance) == pytest.approx(0.05**2, rel=1e-2)


# Bad input


def test_processes():
    gaussian_process, categorical = GaussianProcess(Cosine()), Uniform(Cosine(), 3)
    cases = [
        (
            lambda: GaussianDenoiser(Net(), categorical),
            r"^process: got Uniform, which lacks data of real numbers",
        ),
        (lambda: LevelsDenoiser(Net(), categorical, uniform_levels(3)), r"^process: got Uniform"),
        (lambda: CategoricalDenoiser(Net(), gaussian_process), r"^process: got GaussianProcess"),
        (lambda: GaussianDenoiser(Net(), Cosine()), r"^process: got Cosine, expected a Forward"),
        (lambda: Denoiser(None), r"^process: got NoneType"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError):
        Denoiser(gaussian_process)(torch.zeros(2), 0.5)


@pytest.mark.parametrize("bad", ["noise", V, 3])
def test_parameterization(bad):
    with pytest.raises(ValueError, match=r"^parameterization: got .*expected one of Noise\(\)"):
        GaussianDenoiser(Net(), GaussianProcess(Cosine()), bad)


@pytest.mark.parametrize("bad", ["learned", LearnedVariance, unit_variance])
def test_variance(bad):
    with pytest.raises(ValueError, match=r"^variance: got .*expected LearnedVariance\(\)"):
        GaussianDenoiser(Net(), GaussianProcess(Cosine()), variance=bad)


@pytest.mark.parametrize("values", [[0.0], [1.0, 0.0], [0.0, 0.0], [[0.0, 1.0]], [0.0, torch.nan]])
def test_values(values):
    with pytest.raises(ValueError, match=r"^values: got shape .* increasing"):
        LevelsDenoiser(Net(), GaussianProcess(Cosine()), torch.tensor(values))


@pytest.mark.parametrize(
    ("make", "symbols", "expected"),
    [
        (lambda net: GaussianDenoiser(net, GaussianProcess(Cosine())), 0, r"\(4, 3, 1\)"),
        (
            lambda net: GaussianDenoiser(
                net, GaussianProcess(Cosine()), variance=LearnedVariance()
            ),
            0,
            r"\(4, 3, 2\)",
        ),
        (
            lambda net: LevelsDenoiser(net, GaussianProcess(Cosine()), uniform_levels(7)),
            0,
            r"\(4, 3, 7\)",
        ),
        (lambda net: CategoricalDenoiser(net, Absorbing(Cosine(), 5)), 5, r"\(4, 3, 5\)"),
    ],
)
def test_network_output(make, symbols, expected):
    for shape in ((3, 6), (1,), (2,), (3, 3, 2)):

        class Bad(nn.Module):
            def forward(self, x, log_snr, shape=shape):
                return torch.zeros(len(x), *shape)

        with pytest.raises(ValueError, match=rf"^network: got an output of shape .*{expected}"):
            make(Bad())(draw((4, 3), symbols), 0.5)


# Precision and checks


def test_time_variance_of_float32_reads_float64_levels():
    assert_close(
        log_ratio(TimeVariance([-1.0, 1.0], [-1.0, 1.0]), torch.tensor([0.5], dtype=F64)),
        torch.tensor([0.5], dtype=F64),
    )


def test_network_output_without_the_batch():
    class Bad(nn.Module):
        def forward(self, x, log_snr):
            return x.sum()

    with pytest.raises(ValueError, match=r"^network: got"):
        GaussianDenoiser(Bad(), GaussianProcess(Cosine()))(torch.zeros(4, 3), 0.5)


def test_the_network_sees_one_dtype():
    denoiser = GaussianDenoiser(Net(), GaussianProcess(Cosine()))
    denoiser(torch.zeros(4, 3), torch.tensor(0.5, dtype=F64))
    x, log_snr, _ = denoiser.network.seen
    assert x.dtype == log_snr.dtype


def test_quantized_broadcasts_its_value():
    law, p = quantized()
    assert_close(law.log_prob(torch.tensor(0.25, dtype=F64)), p.log()[:, 1])


def test_a_table_in_float64_takes_a_number_as_time():
    x, single = torch.zeros(3, dtype=torch.int64), table(Uniform)()
    close = single(x, 0.4).base_dist.probs, single.double()(x, 0.4).base_dist.probs.float()
    torch.testing.assert_close(*close)
