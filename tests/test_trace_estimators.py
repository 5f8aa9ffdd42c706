"""Traces of Jacobians: exact, unbiased, and as scattered as theory says."""

import pytest
import torch

from pyro_diffusion.dynamics import ExactTrace, Hutchinson, HutchPlusPlus
from pyro_diffusion.dynamics.trace_estimators import gaussian, rademacher, sphere
from pyro_diffusion.processes import SeededNoise

LAWS = {"rademacher": rademacher, "gaussian": gaussian, "sphere": sphere}
laws = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(matrix, trace, rows=None, seed=0):
    """Estimates for the map x -> matrix x, whose Jacobian is the matrix."""
    rows = torch.randn(3, len(matrix), dtype=torch.float64) if rows is None else rows
    rows = rows.detach().requires_grad_()
    return trace(rows @ matrix.T, rows, trace.probes(rows.detach(), SeededNoise(seed)))


def matrix(d, rank=None, seed=1):
    """Not symmetric; of a given rank."""
    a, b = torch.randn(2, d, rank or d, generator=generator(seed), dtype=torch.float64)
    return a @ b.T / d


def curved(rows, weight):
    return torch.tanh(rows @ weight.T) * rows.square()


def test_the_exact_trace_is_the_trace_of_the_jacobian():
    rows, weight = torch.randn(4, 5, dtype=torch.float64).requires_grad_(), matrix(5)
    trace = ExactTrace()
    got = trace(curved(rows, weight), rows, trace.probes(rows.detach(), SeededNoise(0)))
    expected = [
        torch.autograd.functional.jacobian(lambda r: curved(r, weight), row).trace() for row in rows
    ]
    assert got.shape == (1, 4)
    torch.testing.assert_close(got[0], torch.stack(expected))


@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(2, gaussian), Hutchinson(1, sphere)])
def test_estimates_carry_gradients(trace):
    weight = matrix(4).requires_grad_()
    rows = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    probes = trace.probes(rows.detach(), SeededNoise(0))

    def value(rows, weight):
        return trace(curved(rows, weight), rows, probes, differentiable=True)

    assert torch.autograd.gradcheck(value, (rows, weight))
    flat = trace(curved(rows, weight), rows, probes)
    assert not flat.requires_grad
    torch.testing.assert_close(flat, value(rows, weight).detach())


@laws
def test_probes_have_the_identity_for_covariance(law):
    # 5 standard errors in 36 entries: a false alarm in 50 000 runs.
    v = law(torch.randn(200_000, 6, generator=generator(), dtype=torch.float64))
    outer = v.unsqueeze(-1) * v.unsqueeze(-2)
    error = (outer.std(0) / len(v) ** 0.5).clamp(min=1e-12)
    assert ((outer.mean(0) - torch.eye(6)).abs() < 5 * error).all()
    assert v.dtype == torch.float64


def test_what_each_law_gets_right_without_scatter():
    diagonal = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    torch.testing.assert_close(
        linear(diagonal, Hutchinson(7)), torch.full((7, 3), 15.0, dtype=torch.float64)
    )
    multiple = 2 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(
        linear(multiple, Hutchinson(7, sphere)), torch.full((7, 3), 10.0, dtype=torch.float64)
    )
    assert linear(multiple, Hutchinson(7, gaussian)).std() > 1


@laws
def test_hutchinson_is_unbiased_and_scatters_as_theory_says(law):
    # Mean: 5 standard errors. Variance of v'Jv with S the symmetric part of J: 2 sum S_ij^2 (normal), the
    # same without the diagonal (signs), 2 d/(d+2) (sum S_ij^2 - tr^2/d) (sphere). 20 000 draws give the
    # variance to about 2%, and 10% are allowed: false alarms below one in 10 000.
    a, d = matrix(6), 6
    got = linear(a, Hutchinson(20_000, law))[:, 0]
    assert abs(got.mean() - a.trace()) < 5 * got.std() / len(got) ** 0.5
    s = (a + a.T) / 2
    expected = {
        rademacher: 2 * (s.square().sum() - s.diagonal().square().sum()),
        gaussian: 2 * s.square().sum(),
        sphere: 2 * d / (d + 2) * (s.square().sum() - a.trace() ** 2 / d),
    }[law]
    assert abs(got.var() / expected - 1) < 0.1


@laws
def test_hutch_plus_plus_is_exact_up_to_its_rank(law):
    for d, rank, probes in ((8, 2, 2), (8, 2, 3), (8, 3, 3), (3, 3, 5)):
        a = matrix(d, rank)
        got = linear(a, HutchPlusPlus(probes, law))
        assert got.shape == (probes, 3)
        torch.testing.assert_close(got, a.trace().expand(probes, 3))
    assert linear(matrix(8, 4), HutchPlusPlus(2, law)).std() > 1e-3


@laws
def test_sketches_of_few_dimensions_do_not_degenerate(law):
    # Of 2000 pairs of sign vectors in three dimensions a quarter would be parallel.
    a, rows = matrix(3, 2), torch.zeros(2000, 3, dtype=torch.float64)
    got = linear(a, HutchPlusPlus(2, law), rows)
    torch.testing.assert_close(got, a.trace().expand(2, 2000), rtol=1e-6, atol=1e-6)


def test_hutch_plus_plus_is_unbiased():
    # One sketch for each of 4000 rows; 5 standard errors over them.
    a = matrix(8)
    got = linear(a, HutchPlusPlus(2, gaussian), torch.zeros(4000, 8, dtype=torch.float64)).mean(0)
    assert abs(got.mean() - a.trace()) < 5 * got.std() / len(got) ** 0.5


def test_hutch_plus_plus_wins_where_the_spectrum_falls():
    q = torch.linalg.qr(matrix(16)).Q
    a = q @ torch.diag(0.5 ** torch.arange(16, dtype=torch.float64)) @ q.T
    rows = torch.zeros(500, 16, dtype=torch.float64)
    plain = linear(a, Hutchinson(12), rows).mean(0)
    better = linear(a, HutchPlusPlus(4), rows).mean(0)  # as many products
    assert better.var() < plain.var() / 8


def test_rows_have_their_own_probes_and_the_generator_fixes_them():
    a = matrix(5)
    first, again = linear(a, Hutchinson(4)), linear(a, Hutchinson(4))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not first[:, 0].equal(first[:, 1])
    assert not first.equal(linear(a, Hutchinson(4), seed=1))


TABLE = {
    "no probes": (lambda: Hutchinson(0), "num_probes: got 0, expected an integer >= 1"),
    "half a probe": (lambda: HutchPlusPlus(0.5), "num_probes: got 0.5"),
    "distribution by name": (
        lambda: Hutchinson(1, "rademacher"),
        "distribution: got 'rademacher', expected a map",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case):
    build, message = TABLE[case]
    with pytest.raises(ValueError, match=message):
        build()
