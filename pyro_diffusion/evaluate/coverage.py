"""Expected coverage of posterior regions around reference points: the whole posterior, not its marginals."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.evaluate.calibration import RankStatistics, sbc
from pyro_diffusion.evaluate.simulated_pairs import (
    Posterior,
    RobustScale,
    Values,
    flat,
    observed_sites,
    settings,
    simulate,
)
from pyro_diffusion.validation import check_positive_int, kind_of

__all__ = ["tarp"]

References = Callable[[Values], Mapping[str, Tensor]]


def tarp(
    model: Callable[..., Any],
    posterior: Posterior,
    *args: Any,
    num_simulations: int = 500,
    references: References | None = None,
    num_references: int = 1000,
    observed: Collection[str] | None = None,
    num_samples: int = 99,
    parallel: bool | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> RankStatistics:
    r"""Expected coverage by balls around reference points (TARP), over all latents together.

    A latent :math:`\theta^*` and data y are simulated. Around a reference point r(y), the ball that reaches
    as far as :math:`\theta^*` holds a share of the posterior's draws,

    .. math:: f = \frac{1}{L} \#\{l : |\theta_l - r| < |\theta^* - r|\},

    which is uniform if the posterior is exact, whatever the reference points, as long as they depend on the
    data alone. So this is simulation-based calibration (:func:`~pyro_diffusion.evaluate.sbc`) of one
    quantity, ``"distance"``, and exact in the same way: ``p_value()`` tests the uniformity of the ranks L f,
    ``ecdf("distance")`` is the expected coverage at credibility k / (L + 1), and ``envelope`` its limits.
    Coverage above the diagonal at high credibility says that the posterior is too wide, below it too narrow.

    By default the reference point is the latent of that one of ``num_references`` further simulations whose
    data are nearest to y. It knows the data, so that a posterior that ignores them, such as the prior, is
    found out; marginal ranks and reference points drawn from the prior both pass it.

    Args:
        model: a Pyro program with latent and observed sites.
        posterior: as of ``sbc``.
        args: the model's arguments.
        num_simulations: number of pairs of latents and data.
        references: function of the observed sites' values that returns a point, {latent: value}; it may be
            random.
        num_references: further simulations that reference points are taken from, without ``references``.
        observed: as of ``sbc``.
        num_samples: as of ``sbc``.
        parallel: as of ``sbc``.
        progress: whether to show a progress bar.
        kwargs: the model's keyword arguments.

    Returns:
        The ranks of distances. Distances are Euclidean over all latents that the posterior returns, each
        coordinate by its interquartile range over the further simulations.

    Raises:
        ValueError: as ``sbc``; and for reference points without a latent, of another shape or not finite.

    Example:
        >>> import pyro
        >>> from pyro.distributions import Normal
        >>> def model():
        ...     x = pyro.sample("x", Normal(0.0, 1.0))
        ...     pyro.sample("y", Normal(x, 1.0), obs=torch.tensor(0.0))
        >>> exact = lambda data: {"x": Normal(data["y"] / 2, 0.5 ** 0.5).sample((99,))}
        >>> tarp(model, exact, num_simulations=200, num_references=200).p_value() > 0.001
        True
        >>> narrow = lambda data: {"x": Normal(data["y"] / 2, 0.2).sample((99,))}
        >>> tarp(model, narrow, num_simulations=200, num_references=200).p_value() < 0.001
        True

    References:
        Lemos et al., arXiv 2302.03026.
    """
    check_positive_int("num_references", num_references, at_least=10)
    if references is not None and not callable(references):
        raise ValueError(
            f"references: got {type(references).__name__}, expected a function of observations"
        )
    observed, parallel = settings(posterior, observed, parallel)
    names = observed_sites(model, args, kwargs, observed)
    others = simulate(model, num_references, args, kwargs, parallel)
    distance = _Distance(others, names, references)
    return sbc(
        model,
        posterior,
        *args,
        num_simulations=num_simulations,
        observed=names,
        quantities={"distance": distance},
        num_samples=num_samples,
        parallel=parallel,
        progress=progress,
        **kwargs,
    )


class _Distance:
    """Distances of latents, the true one first, from a reference point that depends on the data."""

    def __init__(self, others: Values, names: list[str], references: References | None) -> None:
        self.others, self.names, self.references = others, names, references
        data = flat(others, names)
        self.data_scale = RobustScale(data, "simulated data")
        self.data = self.data_scale(data)
        self.latents: list[str] | None = None

    def __call__(self, sites: Values) -> Tensor:
        # what the posterior returns is known from its first answer
        latents = [n for n in sites if n not in self.names]
        if self.latents != latents:
            self.latents = latents
            points = flat(self.others, latents)
            self.scale = RobustScale(points, "simulated latents")
            self.points = self.scale(points)
        rows = self.scale(flat(sites, latents))
        return (rows - self._reference(sites, latents)).norm(dim=1)

    def _reference(self, sites: Values, latents: list[str]) -> Tensor:
        data = {name: sites[name][0] for name in self.names}
        if self.references is None:
            here = self.data_scale(flat({k: v[None] for k, v in data.items()}, self.names))
            return self.points[(self.data - here).square().sum(1).argmin()]
        point = self.references(data)
        shapes = {name: tuple(sites[name].shape[1:]) for name in latents}
        if not isinstance(point, Mapping):
            raise ValueError(f"references: got {kind_of(point)}, expected a dictionary of {shapes}")
        found = {
            name: tuple(torch.as_tensor(point[name]).shape) for name in latents if name in point
        }
        if found != shapes:
            raise ValueError(f"references: got a point of shapes {found}, expected {shapes}")
        values = {name: torch.as_tensor(point[name])[None] for name in latents}
        return self.scale(flat(values, latents))[0]
