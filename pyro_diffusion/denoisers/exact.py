"""Posteriors known in closed form: the standing truth for samplers, bounds and guidance."""

import math

import torch
from pyro.distributions import Categorical, Delta, MixtureSameFamily, Normal, TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers.base import Denoiser
from pyro_diffusion.precision import full_precision
from pyro_diffusion.processes import Ability, CategoricalProcess, ForwardProcess
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_finite, check_tensor

__all__ = ["MixtureDenoiser", "TableDenoiser"]


class MixtureDenoiser(Denoiser):
    r"""The exact posterior of data from a mixture of isotropic normals under a Gaussian process.

    Data :math:`\sum_k w_k \mathcal N(m_k, s_k^2 I)` stays a mixture at every t. With responsibilities
    :math:`r_k \propto w_k\,\mathcal N(x_t;\, \alpha m_k, (\alpha^2 s_k^2 + \sigma^2) I)` and each
    component's conjugate posterior :math:`\mathcal N(\mu_k, c_k)`,

    .. math:: E[x_0|x_t] = \sum_k r_k \mu_k, \qquad
              Var[x_0|x_t] = \sum_k r_k \big(c_k + (\mu_k - E[x_0|x_t])^2\big)

    per coordinate. The returned normal has exactly these two moments (it is the exact posterior when there
    is one component), or is a point mass at the mean.

    Args:
        process: a Gaussian process of event_dim 1.
        weights: k positive numbers, normalized here.
        means: (k, d).
        variances: component variances s_k^2, scalar or (k,).
        point_mass: whether to report the mean alone, as DDPM does.

    Raises:
        ValueError: if the process is not a Gaussian one over vectors, or a shape is wrong.
    """

    is_exact = True
    weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(
        self,
        process: ForwardProcess,
        weights: Tensor,
        means: Tensor,
        variances: Tensor | float,
        point_mass: bool = False,
    ) -> None:
        super().__init__(process)
        require(process, Ability.TWEEDIE, argument="process")
        if process.event_dim != 1:
            raise ValueError(f"process: got event_dim={process.event_dim}, expected 1")
        for name, value in (("weights", weights), ("means", means)):
            check_tensor(name, value)
        if means.dim() != 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights, means: got shapes {tuple(weights.shape)}, {tuple(means.shape)}, expected "
                "(k,) and (k, d)"
            )
        if isinstance(variances, Tensor):
            check_tensor("variances", variances)
        variances = torch.as_tensor(variances, dtype=means.dtype, device=means.device)
        if variances.dim() > 1 or (variances.dim() == 1 and variances.shape != weights.shape):
            raise ValueError(
                f"variances: got shape {tuple(variances.shape)}, expected () or {tuple(weights.shape)}"
            )
        for name, value in (("weights", weights), ("means", means), ("variances", variances)):
            check_finite(name, value)
        for name, value in (("weights", weights), ("variances", variances)):
            if not bool((value > 0).all()):
                raise ValueError(f"{name}: got {float(value.min()):g}, expected positive numbers")
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means.clone())
        self.register_buffer("variances", variances.expand(len(means)).clone())
        self.point_mass = point_mass

    def data(self) -> TorchDistribution:
        """The distribution of x_0 itself."""
        level = Level(
            *(torch.tensor(v).to(self.means) for v in (0.0, math.inf, math.inf, 1.0, 0.0))
        )
        return self.marginal(level)

    def marginal(self, t: Tensor | Level) -> TorchDistribution:
        """The exact marginal of x_t, one scalar time."""
        if isinstance(t, Tensor) and t.dim():
            raise ValueError(f"t: got shape {tuple(t.shape)}, expected one time")
        level = self.process.level(t, self.means)
        scale = (level.alpha**2 * self.variances.unsqueeze(-1) + level.sigma**2).sqrt()
        parts = Normal(level.alpha * self.means, scale, validate_args=False).to_event(1)
        return MixtureSameFamily(
            Categorical(self.weights, validate_args=False), parts, validate_args=False
        )

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        level = self.process.level(t, xt, state="xt")
        if xt.shape[-1:] != self.means.shape[-1:]:
            raise ValueError(
                f"xt: got shape {tuple(xt.shape)}, expected a last dimension of {self.means.shape[-1]}, that "
                "of the means"
            )
        alpha, sigma = (v.unsqueeze(-2) if v.dim() else v for v in (level.alpha, level.sigma))
        s2 = self.variances.unsqueeze(-1)  # (k, 1), against batch + (k, d)
        total = alpha**2 * s2 + sigma**2
        gap = xt.unsqueeze(-2) - alpha * self.means
        log_r = self.weights.log() - 0.5 * (gap.square() / total + total.log()).sum(-1)
        r = log_r.softmax(-1).unsqueeze(-1)
        mu = self.means + alpha * s2 / total * gap
        mean = (r * mu).sum(-2)
        if self.point_mass:
            return Delta(mean, event_dim=1, validate_args=False)
        variance = (r * (s2 * sigma**2 / total + (mu - mean.unsqueeze(-2)).square())).sum(-2)
        return Normal(mean, variance.sqrt(), validate_args=False).to_event(1)


class TableDenoiser(Denoiser):
    r"""The exact per-symbol posterior of short sequences whose joint probabilities are a table.

    :math:`p(x_{0,i} = k | x_t) \propto \sum_{x_0: x_{0,i} = k} p(x_0) \prod_j q(x_{t,j} | x_{0,j})`,
    summed over all ``states ** length`` sequences.

    Args:
        process: a categorical process of event_dim 1.
        joint: probabilities, one dimension of size ``states`` per position.

    Raises:
        ValueError: if the table does not fit the process.
    """

    sequences: Tensor
    log_joint: Tensor

    def __init__(self, process: CategoricalProcess, joint: Tensor) -> None:
        super().__init__(process)
        check_tensor("joint", joint)
        require(process, Ability.SYMBOLS, argument="process")
        if set(joint.shape) != {process.states}:
            raise ValueError(
                f"joint: got shape {tuple(joint.shape)}, expected every dimension to be {process.states}, "
                "the number of states of the process"
            )
        self.states = process.states
        if process.event_dim != 1:
            raise ValueError(f"process: got event_dim={process.event_dim}, expected 1")
        check_finite("joint", joint)
        if bool((joint < 0).any()) or not bool((joint > 0).any()):
            raise ValueError("joint: got negative or only zero entries, expected probabilities")
        axes = [torch.arange(process.states)] * joint.dim()
        self.register_buffer("sequences", torch.cartesian_prod(*axes).reshape(-1, joint.dim()))
        self.register_buffer("log_joint", (joint / joint.sum()).reshape(-1).log())

    def forward(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> TorchDistribution:
        """The posterior over x_0, batch and event shape of xt."""
        if xt.shape[-1:] != self.sequences.shape[-1:]:
            raise ValueError(
                f"xt: got shape {tuple(xt.shape)}, expected a last dimension of {self.sequences.shape[-1]}, "
                "the positions of the table"
            )
        states = torch.arange(self.states, device=xt.device)
        evidence = self.process.coordinate_log_likelihood(xt, states, t)  # batch + (length, states)
        hot = torch.nn.functional.one_hot(self.sequences, len(states)).to(evidence.dtype)
        with full_precision(evidence):
            log_weights = self.log_joint.to(evidence.dtype) + torch.einsum(
                "...lk,nlk->...n", evidence, hot
            )
            probs = torch.einsum("...n,nlk->...lk", log_weights.softmax(-1), hot)
        return Categorical(probs=probs, validate_args=False).to_event(1)
