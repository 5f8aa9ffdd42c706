"""The local classifier test: is a posterior right at one observation, of which no exact draws are known?"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.evaluate.classifiers import fit_classifiers, scores
from pyro_diffusion.evaluate.simulated_pairs import (
    Posterior,
    RobustScale,
    answers,
    flat,
    observed_sites,
    settings,
    simulate,
)
from pyro_diffusion.validation import (
    check_finite,
    check_number,
    check_positive_int,
    check_tensor,
    kind_of,
)

__all__ = ["LocalTwoSampleTest", "local_c2st"]

TOGETHER = 2**22  # hidden units of all networks and rows in one batch


@dataclass(frozen=True)
class LocalTwoSampleTest:
    """How far a posterior at one observation is from the exact one, by a classifier.

    Attributes:
        statistic: mean square of the classifier's probability less 1/2, over draws at the observation; 0 if
            they cannot be told from exact ones, 1/4 if always.
        null: (num_permutations,), statistics of classifiers whose labels were permuted.
        p_value: chance of such a statistic or a larger one if the posterior is exact for all data (exact).
    """

    statistic: float
    null: Tensor
    p_value: float

    def __str__(self) -> str:
        high = float(self.null.quantile(0.95))
        return f"{self.statistic:.4f}, of which chance explains {high:.4f} (p = {self.p_value:.2g})"


def local_c2st(
    model: Callable[..., Any],
    posterior: Posterior,
    observations: Mapping[str, Tensor],
    *args: Any,
    num_simulations: int = 1000,
    num_samples: int = 1000,
    num_permutations: int = 99,
    observed: Collection[str] | None = None,
    parallel: bool | None = None,
    hidden: int = 32,
    iterations: int = 100,
    learning_rate: float = 1e-2,
    **kwargs: Any,
) -> LocalTwoSampleTest:
    r"""Local classifier two-sample test of a posterior at one observation, without exact draws.

    A classifier learns to tell the pairs :math:`(\theta_q, y)`, with :math:`\theta_q` drawn from the
    posterior under test, from simulated ones :math:`(\theta, y)`. At the observation :math:`y_o` its
    probability d is 1/2 at every draw if the posterior there is exact; so

    .. math:: t = \frac{1}{n} \sum_{i=1}^n \big(d(\theta_i, y_o) - \tfrac12\big)^2,
              \qquad \theta_i \sim q(\theta | y_o).

    Its distribution by chance is that under classifiers trained alike, the two latents of every pair
    exchanged at random. With R of them, p is one plus the number of statistics at least as large, over
    R + 1.

    If the posterior is exact *for all data*, p is at most a with a probability of at most a (permutations
    are exact). If it is exact at the observation and wrong elsewhere, a classifier of little skill may say
    otherwise. A high p is no proof of exactness: it is what this classifier could find, from simulations of
    which few may be near the observation.

    Args:
        model: a Pyro program with latent and observed sites.
        posterior: as of :func:`~pyro_diffusion.evaluate.sbc`; its first draw for each simulation is used,
            and all of them for the observation.
        observations: values of the observed sites, by name.
        args: the model's arguments.
        num_simulations: pairs that the classifier learns from.
        num_samples: draws of an ``AutoAmortized`` at the observation; another posterior decides it itself.
        num_permutations: number R of classifiers with permuted labels; no p is below 1 / (R + 1).
        observed: as of ``sbc``.
        parallel: as of ``sbc``.
        hidden: width of the classifiers' two layers.
        iterations: full-batch steps.
        learning_rate: of AdamW.
        kwargs: the model's keyword arguments.

    Raises:
        ValueError: as ``sbc``, and for observations that lack a site or are of another shape.

    Example:
        >>> import pyro
        >>> from pyro.distributions import Normal
        >>> def model():
        ...     x = pyro.sample("x", Normal(0.0, 1.0))
        ...     pyro.sample("y", Normal(x, 1.0), obs=torch.tensor(0.0))
        >>> exact = lambda data: {"x": Normal(data["y"] / 2, 0.5 ** 0.5).sample((99,))}
        >>> at = {"y": torch.tensor(1.0)}
        >>> test = local_c2st(model, exact, at, num_simulations=200, num_permutations=19, iterations=20)
        >>> test.p_value > 0.04
        True

    References:
        Linhart, Gramfort & Rodrigues, arXiv 2306.03580 (the test and its statistic, with equal sizes).
    """
    check_positive_int("num_simulations", num_simulations, at_least=20)
    check_positive_int("num_samples", num_samples)
    check_positive_int("num_permutations", num_permutations, at_least=10)
    check_positive_int("hidden", hidden)
    check_positive_int("iterations", iterations)
    check_number("learning_rate", learning_rate, above=0, at_most=1e3)
    observed, parallel = settings(posterior, observed, parallel)
    names = observed_sites(model, args, kwargs, observed)
    sites = simulate(model, num_simulations, args, kwargs, parallel)
    here = _here(observations, {name: sites[name] for name in names})
    at = next(answers(posterior, here, names, num_samples))
    latents = [name for name in at if name in sites]
    answered: dict[str, list[Tensor]] = {name: [] for name in latents}
    for drawn in answers(posterior, sites, names, 1):
        for name in latents:
            answered[name].append(drawn[name][0])
    proposed = flat({name: torch.stack(values) for name, values in answered.items()}, latents)
    exact, data = flat(sites, latents), flat(sites, names)
    # the scales know no label, or permuting labels would not be exact
    both = torch.cat([exact, proposed])
    of_latents, of_data = RobustScale(both, "latents"), RobustScale(data, "data")
    own = of_latents(flat(at, latents))
    asked = torch.cat([own, of_data(flat(here, names)).expand(len(own), -1)], 1)
    told = [torch.cat([of_latents(z), of_data(data)], 1) for z in (exact, proposed)]
    found = _statistics(told, asked, num_permutations, hidden, iterations, learning_rate)
    statistic, null = float(found[0]), found[1:]
    p_value = (1 + int((null >= statistic).sum())) / (1 + num_permutations)
    return LocalTwoSampleTest(statistic, null, p_value)


def _here(observations: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The observation as data of one row."""
    shapes = {name: tuple(value.shape[1:]) for name, value in data.items()}
    if not isinstance(observations, Mapping):
        raise ValueError(
            f"observations: got {kind_of(observations)}, expected a dictionary of {list(shapes)}"
        )
    missing = [name for name in shapes if name not in observations]
    if missing:
        raise ValueError(f"observations: got no value of {missing}, expected all of {list(shapes)}")
    found = {}
    for name, shape in shapes.items():
        value = check_tensor(f"observations[{name!r}]", observations[name])
        if tuple(value.shape) != shape:
            raise ValueError(
                f"observations[{name!r}]: got shape {tuple(value.shape)}, expected {shape}"
            )
        check_finite(f"observations[{name!r}]", value)
        found[name] = value.unsqueeze(0)
    return found


def _statistics(
    told: list[Tensor],
    asked: Tensor,
    num_permutations: int,
    width: int,
    iterations: int,
    learning_rate: float,
) -> Tensor:
    """The statistic of the true labels, and of permuted ones, (1 + num_permutations,)."""
    dtype = torch.get_default_dtype()
    rows, asked = torch.cat(told).to(dtype), asked.to(dtype)
    half = len(rows) // 2
    swapped = torch.rand(num_permutations, half, device=rows.device) < 0.5
    first = torch.cat([torch.zeros_like(swapped[:1]), swapped]).to(dtype)
    labels = torch.cat([first, 1 - first], 1)
    chunk = max(1, TOGETHER // (len(rows) * width))
    found = []
    for part in labels.split(chunk):
        weights = torch.full_like(part, 1 / len(rows))
        layers = fit_classifiers(rows, part, weights, width, iterations, learning_rate)
        with torch.no_grad():
            found.append((scores(asked, layers).sigmoid() - 0.5).square().mean(1))
    return torch.cat(found).cpu()
