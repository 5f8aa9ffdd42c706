"""Student-t noise of 3 degrees of freedom; of 30, and of so many that it is normal noise."""

import torch

from process_rows import Row
from process_rows._atoms import F64, ExactStudentT, bounds, density, sampled
from pyro_diffusion.processes import GaussianProcess, StudentTProcess
from pyro_diffusion.samplers import AdamsMoulton, Ancestral
from pyro_diffusion.schedules import LogLinear

SCHEDULE = LogLinear(7.0, -16.0)


def row_student_t(draws: int) -> Row:
    process = ExactStudentT(SCHEDULE, 3.0)
    wide = bounds(ExactStudentT(SCHEDULE, 30.0), draws // 10)
    text = ", ".join(f"K = {k}: {gap:.3f} ({error:.3f})" for k, (gap, error) in wide.items())
    samplers = {"ancestral": Ancestral(), "deterministic": AdamsMoulton()}
    return Row(
        "Student-t, 3 d.o.f.",
        False,
        bounds(process, draws),
        sampled(process, samplers, draws),
        density(StudentTProcess(LogLinear(4.0, -18.0), 3.0)),
        [f"Student-t, 30 d.o.f., gap at {text}"],
        {
            "Student-t, 1e20 d.o.f., bridge against normal noise": (limit(), 1e-10),
            "Student-t, 3 d.o.f., bridge over marginal by quadrature": (quadrature(), 1e-6),
        },
    )


def limit() -> float:
    """Largest relative difference of a bridge's log-density from the Gaussian process's."""
    x0, xt = torch.randn(2, 1000, 3, dtype=F64)
    ours, theirs = (
        p.bridge(xt, x0, 0.3, 0.5).log_prob(x0)
        for p in (StudentTProcess(SCHEDULE, 1e20), GaussianProcess(SCHEDULE))
    )
    return float(((ours - theirs).abs() / theirs.abs()).max())


def quadrature() -> float:
    """Largest relative error of a bridge integrated over the marginal, 3 degrees of freedom."""
    process, x0 = StudentTProcess(SCHEDULE, 3.0), torch.full((3001, 1), 0.7, dtype=F64)
    u = torch.linspace(-30.0, 30.0, 3001, dtype=F64).unsqueeze(-1)
    late, early = (process.level(torch.tensor(t, dtype=F64), x0) for t in (0.6, 0.3))
    xt = late.alpha * x0 + late.sigma * u.sinh()
    share = process.marginal(x0, late).log_prob(xt).exp() * (late.sigma * u.cosh())[:, 0] * 0.02
    xs = torch.linspace(-3.0, 3.0, 7, dtype=F64).reshape(-1, 1, 1)
    found = (process.bridge(xt, x0, early, late).log_prob(xs).exp() * share).sum(-1)
    wanted = process.marginal(x0[:7], early).log_prob(xs[:, 0]).exp()
    return float((found / wanted - 1).abs().max())
