"""An objective is checked against its model when a distribution is built, not by what comes out of it."""

import pytest
import torch
from exact import mixture
from small_diffusions import Tiny

from pyro_diffusion.denoisers import (
    NPR,
    CategoricalDenoiser,
    GaussianDenoiser,
    LearnedVariance,
    LevelsDenoiser,
    TimeVariance,
    VarianceDenoiser,
    uniform_levels,
    unit_variance,
)
from pyro_diffusion.distributions import (
    Bound,
    Diffusion,
    FlowMatching,
    Hybrid,
    MomentRegression,
    Objective,
    QuantizedDecoder,
    RedDiff,
    Simple,
    Weighted,
)
from pyro_diffusion.processes import Absorbing, GaussianProcess, Uniform
from pyro_diffusion.schedules import Cosine, Rectified


def symbols(process):
    return CategoricalDenoiser(Tiny((3,), 5), process(Rectified.full(), 5))


def gaussian(variance=None):
    outputs = 1 + (0 if variance is None else variance.outputs)
    return GaussianDenoiser(Tiny((3,), outputs), GaussianProcess(Cosine()), variance=variance)


def weight(s, t, steps):
    return torch.ones_like(s)


NUMBERS = [
    *(RedDiff(), Simple(), FlowMatching(), Hybrid(), MomentRegression()),
    Weighted(weight, mean_only=True),
]


@pytest.mark.parametrize("process", [Absorbing, Uniform])
@pytest.mark.parametrize("objective", NUMBERS, ids=lambda o: type(o).__name__)
def test_squared_errors_are_refused_for_symbols(objective, process):
    with pytest.raises(
        ValueError, match=f"objective: got {type(objective).__name__} under {process.__name__}"
    ):
        Diffusion(symbols(process), (3,), 4, objective=objective)


@pytest.mark.parametrize("objective", [Bound(), Weighted(weight)], ids=["bound", "weighted"])
def test_the_bound_of_symbols_is_taken(objective):
    law = Diffusion(symbols(Absorbing), (3,), 4, objective=objective)
    assert law.log_prob(torch.randint(5, (64, 3))).isfinite().all()


POINTS = {
    "gaussian": gaussian,
    "variance denoiser": lambda: VarianceDenoiser(gaussian(LearnedVariance())),
    "mixture": lambda: mixture(Cosine(), point_mass=True),
}


@pytest.mark.parametrize("name", POINTS)
def test_hybrid_needs_a_variance(name):
    denoiser = POINTS[name]()
    shape = (2,) if name == "mixture" else (3,)
    assert denoiser.point_mass
    with pytest.raises(ValueError, match="objective: got Hybrid with a point mass"):
        Diffusion(denoiser, shape, 4, objective=Hybrid())
    Diffusion(denoiser, shape, 4, objective=Simple())


VARIANCES = {
    "learned": lambda: gaussian(LearnedVariance()),
    "time": lambda: gaussian(TimeVariance([-10.0, 10.0])),
    "function": lambda: VarianceDenoiser(gaussian(), unit_variance),
    "head": lambda: VarianceDenoiser(gaussian(), NPR(), Tiny((3,))),
}


@pytest.mark.parametrize("name", VARIANCES)
def test_hybrid_takes_any_variance(name):
    denoiser = VARIANCES[name]()
    assert not denoiser.point_mass
    law = Diffusion(denoiser, (3,), 4, objective=Hybrid())
    assert law.log_prob(torch.randn(64, 3)).isfinite().all()


def test_hybrid_takes_levels():
    denoiser = LevelsDenoiser(Tiny((3,), 4), GaussianProcess(Cosine()), uniform_levels(4))
    law = Diffusion(denoiser, (3,), 4, decoder=QuantizedDecoder(4), objective=Hybrid())
    assert law.log_prob(torch.randint(4, (64, 3))).isfinite().all()


def test_moment_regression_needs_a_head():
    for denoiser in (
        gaussian(),
        gaussian(LearnedVariance()),
        VarianceDenoiser(gaussian(), unit_variance),
    ):
        with pytest.raises(
            ValueError, match=r"objective: got MomentRegression .*NPR\(\) or SN\(\)"
        ):
            Diffusion(denoiser, (3,), 4, objective=MomentRegression())
    law = Diffusion(VARIANCES["head"](), (3,), 4, objective=MomentRegression())
    assert law.log_prob(torch.randn(64, 3)).isfinite().all()


def test_another_denoiser_or_objective_is_checked_again():
    law = Diffusion(gaussian(), (3,), 4, objective=Simple())
    with pytest.raises(ValueError, match="objective: got Hybrid"):
        law.replace(objective=Hybrid())


class Broken(Objective):
    """Costs that are NaN, though the network is fine."""

    def reverse_term(self, step):
        return step.xt.sum(-1) * torch.nan


def test_costs_that_are_nan_name_their_objective():
    x = torch.zeros(40, 3)
    broken = Weighted(lambda s, t, steps: s * torch.nan)
    with pytest.raises(ValueError, match=r"^weight: got .* NaN"):
        Diffusion(gaussian(), (3,), 4, objective=broken).log_prob(x)
    with pytest.raises(ValueError, match=r"^denoiser: got NaN .*, and finite costs of Broken$"):
        Diffusion(gaussian(), (3,), 4, objective=Broken()).log_prob(x)
