"""Simulation-based calibration: is a posterior sampler right for the program that it is meant for?"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from tqdm import tqdm

from pyro_diffusion.evaluate.arviz_versions import build
from pyro_diffusion.evaluate.simulated_pairs import (
    Posterior,
    Values,
    answers,
    observed_sites,
    settings,
    simulate,
)
from pyro_diffusion.validation import check_finite, check_positive_int, check_tensor

__all__ = ["RankStatistics", "sbc"]


@dataclass(frozen=True)
class RankStatistics:
    r"""Ranks of true values among posterior draws, one per simulation.

    Attributes:
        ranks: name of a test quantity -> (num_simulations,), integers in 0 ... ``num_samples``.
        num_samples: number L of posterior draws that each true value is ranked among.

    Raises:
        ValueError: for ranks that are no integers in 0 to L.
    """

    ranks: Mapping[str, Tensor]
    num_samples: int

    def __post_init__(self) -> None:
        check_positive_int("num_samples", self.num_samples)
        for name, ranks in self.ranks.items():
            what = f"ranks[{name!r}]"
            if check_tensor(what, ranks).dim() != 1 or ranks.is_floating_point() or not len(ranks):
                raise ValueError(
                    f"{what}: got shape {tuple(ranks.shape)} of {ranks.dtype}, expected a vector of integers"
                )
            if not bool(((ranks >= 0) & (ranks <= self.num_samples)).all()):
                raise ValueError(
                    f"{what}: got {int(ranks.min())} to {int(ranks.max())}, expected ranks in 0 to "
                    f"{self.num_samples}"
                )

    def p_value(self, name: str | None = None, bins: int | None = None) -> float:
        """Chance of ranks at least as uneven as these, were the posterior exact.

        A chi-square test on bins, with scipy's survival function (an approximation that is good for five or
        more expected in a bin). Over several quantities it is Bonferroni's: the smallest times their number,
        valid however they depend on one another.

        Args:
            name: one quantity; all of them if not given.
            bins: at most L + 1; by default up to 20, with at least five ranks expected in each.

        Raises:
            ValueError: for an unknown quantity, or bins fewer than 2 or more than L + 1.
        """
        if name is None:
            return min(1.0, min(self.p_value(each, bins) for each in self.ranks) * len(self.ranks))
        ranks = self._of(name)
        wanted = min(20, len(ranks) // 5, self.num_samples + 1)
        bins = max(2, wanted) if bins is None else check_positive_int("bins", bins, at_least=2)
        if bins > self.num_samples + 1:
            raise ValueError(
                f"bins: got {bins}, expected at most {self.num_samples + 1}, num_samples + 1"
            )
        # Bins hold equally many ranks, give or take one; what is expected follows the true number.
        bin_of_rank = torch.arange(self.num_samples + 1) * bins // (self.num_samples + 1)
        expected = bin_of_rank.bincount(minlength=bins) * (len(ranks) / (self.num_samples + 1))
        observed = bin_of_rank[ranks.long()].bincount(minlength=bins)
        statistic = ((observed - expected).square() / expected).sum()
        return float(stats.chi2.sf(float(statistic), bins - 1))

    def ecdf(self, name: str) -> Tensor:
        """Share of the ranks below k, for k = 1 ... L; (k / (L + 1)) in expectation, shape (L,)."""
        counts = self._of(name).bincount(minlength=self.num_samples + 1)
        return counts.cumsum(0)[:-1].double() / counts.sum()

    def envelope(self, level: float = 0.95, num_simulations: int = 2000) -> tuple[Tensor, Tensor]:
        r"""Limits that the whole :meth:`ecdf` of an exact posterior keeps within, with probability ``level``.

        Binomial limits at every k, all at one pointwise level, which is adjusted so that they hold together:
        the (1 - level) quantile of the smallest pointwise p-value over simulated uniform ranks.

        Args:
            level: simultaneous coverage of one quantity's curve, in (0, 1).
            num_simulations: sets of uniform ranks drawn to adjust it.

        Returns:
            Lower and upper limits, each (L,).

        References:
            Sailynoja, Burkner & Vehtari, arXiv 2103.10522, section 2.2.
        """
        check_positive_int("num_simulations", num_simulations)
        if not 0 < level < 1:
            raise ValueError(f"level: got {level}, expected a number in (0, 1)")
        n, size = len(next(iter(self.ranks.values()))), self.num_samples + 1
        share = torch.arange(1, size, dtype=torch.float64) / size
        uniform = torch.randint(size, (num_simulations, n))
        counts = torch.zeros(num_simulations, size, dtype=torch.long)
        counts.scatter_add_(1, uniform, torch.ones_like(uniform))
        below = counts.cumsum(1)[:, :-1].numpy()
        tail = torch.as_tensor(stats.binom.cdf(below, n, share.numpy()))
        other = torch.as_tensor(stats.binom.sf(below - 1, n, share.numpy()))
        smallest = torch.minimum(tail, other).amin(1)
        pointwise = float(smallest.quantile(1 - level))
        limits = [stats.binom.ppf(q, n, share.numpy()) / n for q in (pointwise, 1 - pointwise)]
        lower, upper = (torch.as_tensor(limit) for limit in limits)
        return lower, upper

    def to_arviz(self) -> Any:
        r"""Ranks as probability integral transforms, in ArviZ's group ``prior_sbc``.

        Values are (rank + 1/2) / (L + 1), uniform under an exact posterior up to their grid: what ArviZ's
        ``plot_ecdf_pit`` and ``plot_ecdf`` take.

        Returns:
            ``InferenceData`` (0.23) or ``DataTree`` (1.x), the quantities as variables of one chain.
        """
        pit = {
            name: ((ranks.double() + 0.5) / (self.num_samples + 1)).numpy()[None]
            for name, ranks in self.ranks.items()
        }
        return build({"prior_sbc": pit}, attrs={"inference_library": "pyro_diffusion"})

    def _of(self, name: str) -> Tensor:
        if name not in self.ranks:
            raise ValueError(f"name: got {name!r}, expected one of {sorted(self.ranks)}")
        return self.ranks[name]


def sbc(
    model: Callable[..., Any],
    posterior: Posterior,
    *args: Any,
    num_simulations: int = 500,
    observed: Collection[str] | None = None,
    quantities: Mapping[str, Callable[[Values], Tensor]] | None = None,
    thin: int = 1,
    num_samples: int = 99,
    parallel: bool | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> RankStatistics:
    r"""Simulation-based calibration: rank true values among draws of the posterior given data they made.

    A latent :math:`\theta` and data y are simulated from the program, and the inference under test draws
    :math:`\theta_1, \dots, \theta_L` given y. If it is exact, all L + 1 are exchangeable, and the rank of
    :math:`f(\theta)` among :math:`f(\theta_l)` is uniform on 0 ... L for every test quantity f.
    Ties are broken at random, so discrete quantities are uniform as well. Hollows at both ends say that the
    posterior is too wide, heaps that it is too narrow, a slope that it is biased.

    It tests *independent* draws. Those of a Markov chain must be thinned (``thin``) until their effective
    sample size is about L, and draws that one run of SMC resampled share their ancestors: take many more
    particles than draws, and draw by ``torch.multinomial``, as ``Particles.sample`` spreads its draws evenly.
    Otherwise the ends of the histogram rise (or fall) though the posterior is right. A uniform
    rank is necessary, not sufficient: the prior passes where a quantity depends on the latents alone, so
    include one that depends on the data (its log-likelihood, say).

    Args:
        model: a Pyro program with latent and observed sites.
        posterior: ``posterior(observations)``, with a dict of every observed site's value, returns draws
            {site: (L,) + the site's shape}, as ``Predictive`` and ``MCMC.get_samples`` do; or a trained
            :class:`~pyro_diffusion.infer.AutoAmortized` itself, which is asked about many at once.
        args: the model's arguments.
        num_simulations: number of pairs of latents and data.
        observed: names of the observed sites; by default those that the model observes when it is run (their
            values are then replaced by simulated ones).
        quantities: name -> function of {site: (n,) + shape} that returns (n,) + any shape, one test
            quantity per number; the observed sites are there too, repeated n times. By default every
            coordinate of every site that the posterior returns and the model draws.
        thin: keep every so-many-th draw.
        num_samples: draws L of an ``AutoAmortized``; another posterior decides it itself.
        parallel: whether to simulate in one run under a plate, as in ``Predictive``; if None, as an
            ``AutoAmortized`` found out for its model, and one by one otherwise.
        progress: whether to show a progress bar.
        kwargs: the model's keyword arguments.

    Raises:
        ValueError: for a model without observed sites, with ``pyro.factor`` (which cannot be simulated) or
            with a plate that draws its rows, or a posterior whose draws are too few, of varying number, or
            not finite.

    Example:
        >>> import pyro
        >>> from pyro.distributions import Normal
        >>> def model():
        ...     x = pyro.sample("x", Normal(0.0, 1.0))
        ...     pyro.sample("y", Normal(x, 1.0), obs=torch.tensor(0.0))
        >>> exact = lambda data: {"x": Normal(data["y"] / 2, 0.5 ** 0.5).sample((99,))}
        >>> ranks = sbc(model, exact, num_simulations=200)
        >>> ranks.p_value() > 0.001
        True

    References:
        Talts et al., arXiv 1804.06788; Modrak et al., arXiv 2211.02383 (quantities that depend on the data).
    """
    check_positive_int("num_simulations", num_simulations, at_least=10)
    check_positive_int("thin", thin)
    check_positive_int("num_samples", num_samples)
    observed, parallel = settings(posterior, observed, parallel)
    names = observed_sites(model, args, kwargs, observed)
    sites = simulate(model, num_simulations, args, kwargs, parallel)
    ranks: dict[str, list[Tensor]] = {}
    counts = set()
    drawn = answers(posterior, sites, names, num_samples)
    bar = tqdm(drawn, desc="calibration", total=num_simulations, disable=not progress)
    for i, found in enumerate(bar):
        truth = {name: value[i] for name, value in sites.items()}
        data = {name: truth[name] for name in names}
        draws = {name: value[::thin] for name, value in found.items()}
        counts.add(_check_draws(draws, truth))
        for name, rank in _ranks(draws, truth, data, quantities).items():
            ranks.setdefault(name, []).append(rank)
    if len(counts) > 1:
        raise ValueError(f"posterior: got {sorted(counts)} draws, expected always the same number")
    return RankStatistics({k: torch.stack(v).cpu() for k, v in ranks.items()}, counts.pop())


def _check_draws(draws: Values, truth: Values) -> int:
    sizes = {k: tuple(v.shape) for k, v in draws.items() if k in truth}
    wrong = {k: v for k, v in sizes.items() if v[1:] != tuple(truth[k].shape)}
    lengths = {v[0] for v in sizes.values()}
    if wrong or len(lengths) != 1 or min(lengths) < 1:
        expected = {k: ("L", *truth[k].shape) for k in sizes}
        raise ValueError(f"posterior: got shapes {sizes}, expected {expected or 'latent sites'}")
    for name in sizes:
        check_finite(f"posterior: {name}", draws[name])
    return lengths.pop()


def _ranks(
    draws: Values,
    truth: Values,
    data: Values,
    quantities: Mapping[str, Callable[[Values], Tensor]] | None,
) -> dict[str, Tensor]:
    """Rank of every test quantity's true value, ties broken at random."""
    latents = {k: torch.cat([truth[k].unsqueeze(0), v]) for k, v in draws.items() if k in truth}
    size = len(next(iter(latents.values())))
    sites = {**latents, **{k: v.expand(size, *v.shape) for k, v in data.items()}}
    values = latents if quantities is None else {k: f(sites) for k, f in quantities.items()}
    ranks: dict[str, Tensor] = {}
    for name, value in values.items():
        check_finite(f"quantities[{name!r}]", value.detach())
        rows = value.detach().reshape(size, -1)
        smaller, equal = ((rows[1:] < rows[0]).sum(0), (rows[1:] == rows[0]).sum(0))
        rank = smaller + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long()
        single = value.dim() == 1
        ranks |= {name if single else f"{name}[{i}]": r for i, r in enumerate(rank)}
    return ranks
