"""Plug-in guidance for symbols: the likelihood of every single substitution."""

import math

import torch
from pyro.distributions import Categorical
from torch import Tensor

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import GuidedDenoiser, Twisted
from pyro_diffusion.likelihoods import Likelihood
from pyro_diffusion.likelihoods.base import check_likelihood
from pyro_diffusion.processes import Ability
from pyro_diffusion.schedules import Level
from pyro_diffusion.unwrapping import per_coordinate

__all__ = ["SubstitutionGuidance"]


class SubstitutionGuidance(GuidedDenoiser):
    r"""Tilt every symbol by the likelihood of putting it in the place of the likeliest one.

    With the mode :math:`\hat x` of the denoiser's posterior :math:`\prod_i p_{i, x_i}` and
    :math:`\ell_{ik} = \log p(y | \hat x \text{ with symbol } i \text{ replaced by } k)`,

    .. math::
        p(x_{0,i} = k | x_t, y) \approx \frac{p_{ik} e^{\ell_{ik}}}{\sum_j p_{ij} e^{\ell_{ij}}}, \qquad
        \log \psi_t = \hat\ell + \sum_i \log \sum_k p_{ik}\, e^{\ell_{ik} - \hat\ell},

    the plug-in rule of categorical data: finite differences in place of a gradient. A share ``floor`` of the
    denoiser's own probabilities is kept: where the likelihood ties symbols together, two substitutions may
    be possible that each alone is not, and a proposal must not deny them. With ``floor=0`` it is exact, for
    the posterior as the denoiser states it, when :math:`\log p(y | x_0)` is a sum of functions of one symbol
    each (noisy observations, symbol by symbol); otherwise a first-order approximation, which twisted SMC
    corrects as long as the floor is positive.

    Cost: one network evaluation, and one batch of (length) * (symbols - 1) + 1 runs of the program. Where the
    mode itself is impossible, substitutions tell nothing and the prior stands; then see
    :class:`~pyro_diffusion.guidance.SampledGuidance`.

    Args:
        denoiser: posterior p(x_0 | x_t), under a process of symbols.
        likelihood: log p(y | x_0), which must factorize over the plates around the diffusion site.
        floor: share of the prior in every symbol's probabilities, in [0, 1).

    Raises:
        ValueError: for a process of data that are no symbols, or a floor outside [0, 1).
    """

    needs = (Ability.SYMBOLS,)

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood, floor: float = 0.05) -> None:
        super().__init__(denoiser)
        self.likelihood = check_likelihood(likelihood)
        if not 0 <= floor < 1:
            raise ValueError(f"floor: got {floor}, expected a number in [0, 1)")
        self.floor = float(floor)

    def twisted(self, xt: Tensor, t: Tensor | Level, **context: Tensor) -> Twisted:
        """Prior, posterior and log-twist (one network evaluation).

        Raises:
            ValueError: if the likelihood does not factorize over a plate.
        """
        with torch.no_grad():
            prior = self.denoiser(xt, t, **context)
            log_probs = per_coordinate(prior).logits
            event = xt.shape[xt.dim() - self.process.event_dim :]
            batch, symbols = xt.shape[: xt.dim() - len(event)], log_probs.shape[-1]
            mode = log_probs.argmax(-1).reshape(*batch, -1)
            length = mode.shape[-1]
            # Row (i, j) puts the j-th symbol other than the mode's at place i; the last row is the mode.
            rows = mode.expand(length * (symbols - 1) + 1, *mode.shape).clone()
            steps = torch.arange(1, symbols, device=xt.device)
            for i in range(length):
                part = rows[i * (symbols - 1) : (i + 1) * (symbols - 1), ..., i]
                part += steps.reshape(-1, *(1,) * len(batch))
            log_likelihood = self.likelihood.log_prob((rows % symbols).reshape(-1, *batch, *event))
            if log_likelihood.shape[1:] != batch:
                raise ValueError(
                    f"likelihood: got one of all {tuple(batch)} data together, expected one that factorizes "
                    "over the plates (SampledGuidance takes any)"
                )
            best = log_likelihood[-1]
            gaps = (log_likelihood - best).where(best > -math.inf, 0.0)
            gaps = gaps[:-1].reshape(length, symbols - 1, *batch)
            gaps = torch.cat([torch.zeros_like(gaps[:, :1]), gaps], 1)
            gaps = gaps.movedim(
                (0, 1), (-2, -1)
            )  # batch + (length, symbols), counted from the mode's
            order = (torch.arange(symbols, device=xt.device) - mode.unsqueeze(-1)) % symbols
            tilt = gaps.gather(-1, order).reshape(log_probs.shape).to(log_probs.dtype)
            tilted = log_probs + tilt
            log_twist = best + tilted.logsumexp(-1).reshape(*batch, -1).sum(-1)
            probs = (1 - self.floor) * tilted.softmax(-1) + self.floor * log_probs.exp()
            posterior = Categorical(probs=probs, validate_args=False)
            return Twisted(prior, posterior.to_event(len(event)), log_twist)
