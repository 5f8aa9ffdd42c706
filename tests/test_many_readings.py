"""Conjugate gradients that go on until enough is done: more readings than a matrix is formed for."""

import functools

import pytest
import torch
from torch.testing import assert_close

from pyro_diffusion.guidance import MMPS, DataCovariance, DiffPIR, PiGDM
from pyro_diffusion.guidance.calibrated_covariance import CalibratedCovariance
from pyro_diffusion.guidance.krylov import conjugate_gradients
from tests.linear_gaussian import F64, NormalDenoiser, Reading

SIZE, EARLY = 80, torch.tensor(0.55, dtype=F64)


def decades(size, low, high):
    """A random rotation and eigenvalues of many sizes."""
    rotation, _ = torch.linalg.qr(torch.randn(size, size, dtype=F64))
    return rotation, torch.logspace(low, high, size, dtype=F64)


def counting(matrix):
    calls = []

    def apply(p):
        calls.append(len(p))
        product = p @ matrix
        return product, (product,)

    return apply, calls


def test_a_row_that_meets_a_direction_which_s_denies_stops_there_for_good():
    # Started anew from the residual it would go on, and astray.
    generator, directions = torch.Generator().manual_seed(0), []
    root = torch.linalg.qr(torch.randn(50, 4, 4, dtype=F64, generator=generator)).Q
    s = root @ torch.diag(torch.tensor([-2.0, 1.0, 3.0, 10.0], dtype=F64)) @ root.mT
    b = torch.randn(50, 4, dtype=F64, generator=generator)

    def apply(p):
        directions.append(p)
        return (s @ p.unsqueeze(-1)).squeeze(-1), (p,)

    found = torch.stack([conjugate_gradients(apply, b, k, least=0.9).u for k in range(1, 9)])
    p = torch.stack(directions[-8:])
    denied = torch.einsum("kri,rij,krj->kr", p, s, p) <= 0.9 * p.square().sum(-1)
    after = denied.cummax(0).values[1:]
    moved = found.diff(dim=0).norm(dim=-1) > 1e-9
    assert not (after & moved).any()
    assert after.any(0).sum() > 40 and moved.any(0).sum() > 10  # of 50: it is about something


def test_a_tolerance_is_kept_in_every_row():
    """Rows stop one by one, each as if alone, and the last of them ends the work."""
    torch.manual_seed(0)
    rotation, values = decades(60, 0, 2)
    matrix = rotation * values @ rotation.mT
    b = torch.randn(5, 60, dtype=F64) * torch.tensor([0.0, 0.01, 1, 10, 1e3], dtype=F64)[:, None]
    apply, calls = counting(matrix)
    u, (image,) = conjugate_gradients(apply, b, 1000, tolerance=0.1)
    left = (b - u @ matrix).square().mean(-1).sqrt()
    assert (left <= 0.1 * (1 + 1e-6)).all()
    assert left[3] > 0.01 and not u[:2].any()  # no more than was asked for
    assert_close(image, u @ matrix)
    assert len(calls) < 1000
    for row in (2, 3, 4):
        assert_close(conjugate_gradients(apply, b[row : row + 1], 1000, tolerance=0.1).u[0], u[row])
    with pytest.raises(ValueError, match=r"tolerance: got -1"):
        conjugate_gradients(apply, b, 5, tolerance=-1.0)


def reading():
    """Normal data of many variances, all of it read with little noise."""
    torch.manual_seed(1)
    rotation, values = decades(SIZE, -4, 1)
    covariance = rotation * values @ rotation.mT
    denoiser = NormalDenoiser(torch.zeros(SIZE, dtype=F64), covariance)
    matrix = torch.randn(SIZE, SIZE, dtype=F64) / SIZE**0.5
    x0 = torch.randn(SIZE, dtype=F64) * values.sqrt() @ rotation.mT
    y = matrix @ x0 + 0.05 * torch.randn(SIZE, dtype=F64)
    return denoiser, Reading(matrix, y, 0.05)


def gaps(method, xt, t):
    """Root mean square of default and eight iterations away from the direct solver, in posterior sds."""
    denoiser, read = reading()
    likelihood = read.likelihood(denoiser)
    exact = method(denoiser, likelihood, solver="direct")(xt, t).mean
    _, given = denoiser.given(denoiser.process.level(t))
    sd = read.posterior(denoiser(xt, t).mean, given)[1].diagonal().sqrt()
    found = (method(denoiser, likelihood), method(denoiser, likelihood, iterations=8))
    return [float(((m(xt, t).mean - exact) / sd).square().mean().sqrt()) for m in found]


@pytest.mark.parametrize("name", ["DataCovariance", "CalibratedCovariance"])
def test_products_beside_the_denoiser_go_on_until_the_shift_is_right(name):
    """A thousandth of the noise is left, under a hundredth of a posterior sd; eight products leave more."""
    covariance = reading()[0].covariance
    methods = {
        "DataCovariance": functools.partial(DataCovariance, covariance=covariance),
        "CalibratedCovariance": Untrusting,
    }
    default, eight = gaps(methods[name], torch.randn(6, SIZE, dtype=F64), EARLY)
    assert default < 0.01
    assert eight > 0.1


class Untrusting(CalibratedCovariance):
    """No derivative is trusted."""

    def _calibrations(self, xt, context):
        found = super()._calibrations(xt, context)
        return [(rows, c._replace(trusted=torch.zeros_like(c.trusted))) for rows, c in found]


def test_products_through_the_denoiser_are_few(monkeypatch):
    """Eight; fewer of conjugate gradients where the system is solved before; or as many as asked for."""
    denoiser, read = reading()
    likelihood = read.likelihood(denoiser)
    walks = []
    back = MMPS.covariance

    def counted(self, at, level, v):
        walks.append(level)
        return back(self, at, level, v)

    monkeypatch.setattr(MMPS, "covariance", counted)
    xt = torch.randn(6, SIZE, dtype=F64)

    def count(t, **options):
        walks.clear()
        MMPS(denoiser, likelihood, **options)(xt, torch.tensor(t, dtype=F64))
        return len(walks)

    assert count(0.9) == count(0.05) == 8
    assert 1 <= count(0.05, solver="cg") < count(0.9, solver="cg") == 8
    assert count(0.05, iterations=20) == 20


def test_a_derivative_that_is_not_symmetric_leaves_no_larger_residual():
    """A trained network's: conjugate gradients leave many times the residual, the default less than it."""

    class Skewed(NormalDenoiser):
        def given(self, level):
            gain, covariance = super().given(level)
            return gain @ (torch.eye(SIZE, dtype=F64) + 2 * turn), covariance

    normal, read = reading()
    turn = torch.randn(SIZE, SIZE, dtype=F64)
    turn = (turn - turn.mT) / SIZE**0.5
    denoiser = Skewed(normal.mean, normal.covariance)
    likelihood, xt = read.likelihood(denoiser), torch.randn(6, SIZE, dtype=F64)

    def left(**options):
        guided = MMPS(denoiser, likelihood, **options)
        at, level = guided._linearized(xt, EARLY, {})
        solved = guided._iterated(at, level, options.get("solver") or guided.solver_at(at))
        u = torch.linalg.lstsq(read.matrix.mT / 0.05, solved.pulled.mT).solution.mT
        system = u + at.push(guided.covariance(at, level, solved.pulled))
        return (at.residual - system).norm(dim=-1) / at.residual.norm(dim=-1)

    assert (left() <= 1 + 1e-6).all()
    assert (left(solver="cg") > 3).any()


@pytest.mark.parametrize("method", [PiGDM, DiffPIR])
def test_other_covariances_are_not_stopped_early(method):
    """PiGDM's derivative is in its shift alone: products with its V are cheap."""
    denoiser, read = reading()
    likelihood, xt = read.likelihood(denoiser), torch.randn(6, SIZE, dtype=F64)
    t = torch.tensor(0.5, dtype=F64)
    exact = method(denoiser, likelihood, solver="direct")(xt, t).mean
    prior = denoiser(xt, t).mean
    found = method(denoiser, likelihood)(xt, t).mean
    eight = method(denoiser, likelihood, iterations=8)(xt, t).mean
    size = (exact - prior).norm()
    assert (found - exact).norm() < 0.3 * (eight - exact).norm()
    assert (found - exact).norm() < 0.2 * size


@pytest.mark.parametrize(
    ("method", "most"), [(MMPS, 32), (PiGDM, 64), (DiffPIR, 64)], ids=["MMPS", "PiGDM", "DiffPIR"]
)
def test_how_many_readings_are_solved_directly(method, most):
    """A product through the denoiser is a backward pass, so fewer are made there."""
    denoiser, read = reading()
    xt = torch.randn(2, SIZE, dtype=F64)
    for size, direct in ((most, True), (most + 1, False)):
        fewer = Reading(read.matrix[:size], read.y[:size], 0.05)
        guided = method(denoiser, fewer.likelihood(denoiser))
        at, _ = guided._linearized(xt, EARLY, {})
        assert (guided.solver_at(at) == "direct") == direct
