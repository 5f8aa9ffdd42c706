"""Noise that is paired with the data of a minibatch: couplings for flow matching."""

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torch.distributions import constraints

from pyro_diffusion.processes.abilities import Ability
from pyro_diffusion.processes.gaussian import GaussianProcess
from pyro_diffusion.processes.levels import Rates
from pyro_diffusion.processes.linear import BridgeCoefficients
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import Shape, kind_of

__all__ = ["CoupledGaussian"]


class CoupledGaussian(GaussianProcess):
    r""":math:`x_t = \alpha_t x_0 + \sigma_t z_{\pi}`, normal noise paired with data by optimal transport.

    The data :math:`x_0^{(i)}` of a batch and as many draws :math:`z^{(j)} \sim \mathcal N(0, I)` are paired
    by the permutation

    .. math:: \pi = \arg\min_\pi \sum_i \| x_0^{(i)} - z^{(\pi_i)} \|^2 .

    Data and noise keep their distributions; but noise depends on the data it goes with, and paths from one to
    the other cross less, the larger the batch the less. The flow of a denoiser that is trained under it (a
    ``Diffusion`` site with ``objective=FlowMatching()``) is straighter, and takes fewer
    steps. A batch of one datum is independent noise. At the ends of the schedule, what is left of the data at
    t = 1 and of noise at t = 0 counts to the first order in :math:`\alpha_1/\sigma_1` and
    :math:`\sigma_0/\alpha_0`, not to the second, as the two are correlated: for densities take wide ends.

    **What is valid.** The regression learns :math:`\hat x_0 = E[x_0 | x_t]` of the *coupled* pair. As
    :math:`z = (x_t - \alpha \hat x_0) / \sigma` holds in expectation for any coupling, the probability flow
    is the same function of :math:`\hat x_0` as ever: ``ProbabilityFlow`` (draws, exact densities, chains by
    NUTS) and all deterministic samplers are right. **What is not:** given :math:`x_0`, the state is not
    :math:`\mathcal N(\alpha x_0, \sigma^2)`. There is no bridge that draws, no transition, no score, and no
    posterior to which an observation of x_0 adds its likelihood; hence no bound, chain, SDE, stochastic
    sampler or guidance. All of these are refused, the process lacks their abilities.
    A bound under a :class:`GaussianProcess` with the network would be one, of another model, and loose.

    Rows are paired over all batch dimensions of what is drawn together, each ``sample_shape`` apart: those of
    the minibatch in a plate that subsamples, and of all plates around. So a row's state depends on its
    batch. A context that differs by row is refused in training: data of one label would get only part
    of the noise, and generation from all of it would be wrong.

    Another coupling is a subclass with another :meth:`pairs`, whose results are checked. The assignment costs
    :math:`O(n^3)` on the CPU, once per draw of a batch (with a round trip to the host): batches up to about a
    thousand.

    Args:
        schedule: signal and noise scales; ``Rectified`` for straight lines in time.
        event_dim: number of rightmost dimensions that make one datum.

    Example:
        >>> from pyro_diffusion.processes import draw
        >>> from pyro_diffusion.schedules import Rectified
        >>> process = CoupledGaussian(Rectified())
        >>> x0 = torch.tensor([[2.0], [-2.0], [0.0], [1.0]])
        >>> z = draw(process.marginal(x0, 0.999))
        >>> torch.equal(z.argsort(0), x0.argsort(0))
        True

    References:
        Tong et al., arXiv 2302.00482; Pooladian et al., arXiv 2304.14772; for labels, Cheng & Schwing,
        arXiv 2503.10636.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        {Ability.NUMBERS, Ability.LINEAR, Ability.ISOTROPIC, Ability.ODE}
    )

    def pairs(self, x0: Tensor, noise: Tensor) -> Tensor:
        """For each datum the index of its noise: a permutation, (n,), on the device of the data.

        Args:
            x0: data, (n, d).
            noise: normal numbers, (n, d), detached, as the data are.

        A draw raises a ValueError naming ``pairs`` for what is no permutation: noise that is used twice, or
        not at all, is no longer normal.
        """
        # Of the squared distances, only the products depend on the pairing.
        gain = (x0.double() @ noise.double().T).cpu().numpy()
        _, column = linear_sum_assignment(gain, maximize=True)
        return torch.from_numpy(column).to(x0.device)

    def marginal(self, x0: Tensor, t: Tensor | Level) -> TorchDistribution:
        """States of a batch of data; they are drawn together and have no density of their own."""
        level = self.level(t, x0, state="x0")
        return _CoupledStates(self, x0, level.alpha * x0, level.sigma)

    def transition(self, xs: Tensor, s: Tensor | Level, t: Tensor | Level) -> TorchDistribution:
        """Refused: states are not Markov.

        Raises:
            ValueError: always.
        """
        raise self._lacks(Ability.MARKOV)

    def coefficients(self, s: Level, t: Level, eta: float = 1.0) -> BridgeCoefficients:
        """Weights of the deterministic bridge.

        Raises:
            ValueError: for another eta than 0, which bounds, chains and stochastic samplers have.
        """
        if eta != 0:
            raise self._lacks(Ability.INDEPENDENT)
        return super().coefficients(s, t, eta)

    def divergence_rate(
        self, x0: Tensor, xt: Tensor, posterior: TorchDistribution, rates: Rates
    ) -> Tensor:
        """Refused: no bound in continuous time.

        Raises:
            ValueError: always.
        """
        raise self._lacks(Ability.SDE)

    def coordinate_log_likelihood(self, xt: Tensor, values: Tensor, t: Tensor | Level) -> Tensor:
        """Refused: the state's density given x_0 is unknown.

        Raises:
            ValueError: always.
        """
        raise self._lacks(Ability.FACTORIZED)

    def _lacks(self, ability: Ability) -> ValueError:
        return ValueError(
            f"process: got {type(self).__name__}, which lacks {ability.value}, expected ProbabilityFlow for "
            "densities, a deterministic sampler such as AdamsMoulton() for draws, FlowMatching() as "
            "objective, or a process such as GaussianProcess"
        )


class _CoupledStates(TorchDistribution):
    """loc + scale z for a batch, z paired with its data: draws alone."""

    has_rsample = True
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, process: CoupledGaussian, x0: Tensor, loc: Tensor, scale: Tensor) -> None:
        split = loc.dim() - process.event_dim
        self.process, self.x0, self.loc, self.scale = process, x0, loc, scale
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=False)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        rows, size = self.batch_shape.numel(), self.event_shape.numel()
        if rows > 1 and noise.numel() > 0:
            x0 = self.x0.detach().expand(self.loc.shape).reshape(rows, size)
            draws = noise.reshape(-1, rows, size)
            paired = [z[_permutation(self.process.pairs(x0, z), x0)] for z in draws]
            noise = torch.stack(paired).reshape(shape)
        return self.loc + self.scale * noise

    def log_prob(self, value: Tensor) -> Tensor:
        del value
        raise self.process._lacks(Ability.INDEPENDENT)

    @property
    def mean(self) -> Tensor:
        raise self.process._lacks(Ability.INDEPENDENT)

    @property
    def variance(self) -> Tensor:
        raise self.process._lacks(Ability.INDEPENDENT)


def _permutation(index: object, x0: Tensor) -> Tensor:
    """Indices of noise for all rows of the data, checked."""
    wanted = f"a permutation of 0 ... {len(x0) - 1}, ({len(x0)},) of torch.int64 on {x0.device}"
    if not isinstance(index, Tensor):
        raise ValueError(f"pairs: got {kind_of(index)}, expected {wanted}")
    if index.shape != x0.shape[:1] or index.dtype != torch.int64 or index.device != x0.device:
        raise ValueError(
            f"pairs: got {tuple(index.shape)} of {index.dtype} on {index.device}, expected {wanted}"
        )
    if not torch.equal(index.sort().values, torch.arange(len(x0), device=x0.device)):
        missing = len(x0) - len(index[(index >= 0) & (index < len(x0))].unique())
        raise ValueError(
            f"pairs: got indices that leave out {missing} draw(s) of noise, expected {wanted}"
        )
    return index
