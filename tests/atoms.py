"""Data of finitely many points: posterior, marginals and kernels are exact under any linear process."""

import torch
from pyro.distributions import Categorical, Delta, MixtureSameFamily

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.discrete import Quantized
from pyro_diffusion.processes import StudentTProcess
from pyro_diffusion.unwrapping import per_coordinate

F64 = torch.float64


class AtomsDenoiser(Denoiser):
    """The posterior mean of points (k, d) of given weights."""

    point_mass = True

    def __init__(self, process, atoms, weights):
        super().__init__(process)
        self.register_buffer("atoms", atoms)
        self.register_buffer("weights", weights / weights.sum())

    def marginal(self, level):
        """The mixture that x_t is drawn from, at one level."""
        parts = self.process.noised(level.alpha * self.atoms, level.sigma)
        return MixtureSameFamily(Categorical(self.weights), parts)

    def log_weights(self, xt, level):
        """Of every point given x_t, batch + (k,)."""
        alpha, sigma = (v.unsqueeze(-2) if v.dim() else v for v in (level.alpha, level.sigma))
        parts = self.process.noised(alpha * self.atoms, sigma)
        return (self.weights.log() + parts.log_prob(xt.unsqueeze(-2))).log_softmax(-1)

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt, state="xt")
        mean = self.log_weights(xt, level).exp() @ self.atoms
        return Delta(mean, event_dim=1)


class IntegersDenoiser(AtomsDenoiser):
    """The whole posterior of evenly spaced numbers, one a datum."""

    point_mass = False

    def forward(self, xt, t, **context):
        level = self.process.level(t, xt, state="xt")
        logits = self.log_weights(xt, level).unsqueeze(-2)
        return Quantized(logits, self.atoms[:, 0]).to_event(1)


class ExactStudentT(StudentTProcess):
    """The kernel of such a posterior is the mixture of its points' bridges."""

    def combine(self, xt, posterior, coefficients):
        base = per_coordinate(posterior)
        if not isinstance(base, Quantized):
            return super().combine(xt, posterior, coefficients)
        points = base.values.reshape(-1, 1).expand(*xt.shape[:-1], -1, 1)
        wide = [c.unsqueeze(-2) if c.dim() else c for c in coefficients]
        parts = super().combine(
            xt.unsqueeze(-2), self.point_mass(points), type(coefficients)(*wide)
        )
        return MixtureSameFamily(Categorical(logits=base.logits.squeeze(-2)), parts)
