"""What torch's interface lists and a distribution known by its draws lacks: each says what to do instead."""

from typing import Any, Never

from torch import Tensor

from pyro_diffusion.validation import Shape

__all__ = ["NoClosedForms", "unavailable"]

DRAWS = "average draws, such as sample((1000,)).{}(0)"


def unavailable(distribution: Any, name: str, why: str, instead: str) -> NotImplementedError:
    """The error of something that a distribution does not have."""
    return NotImplementedError(f"{type(distribution).__name__}.{name}: {why}; {instead}")


class NoClosedForms:
    """Mixin for distributions whose moments, entropy and distribution function are integrals over draws.

    Every member raises a ``NotImplementedError``, as torch and Pyro expect of what is missing (Pyro's
    initializations and ``TraceMeanField_ELBO`` then turn to draws).
    """

    _instead = DRAWS

    @property
    def mean(self) -> Tensor:
        """Not available: average draws."""
        self._refuse("mean", "the mean has no closed form", self._instead.format("mean"))

    @property
    def variance(self) -> Tensor:
        """Not available, nor is ``stddev``: take that of draws."""
        self._refuse("variance", "the variance has no closed form", self._instead.format("var"))

    @property
    def mode(self) -> Tensor:
        """Not available."""
        self._refuse("mode", "the mode has no closed form", "maximize log_prob, or inspect draws")

    def cdf(self, value: Tensor) -> Tensor:
        """Not available: count draws below a value."""
        self._refuse("cdf", "there is no closed form", "count draws below the value")

    def icdf(self, value: Tensor) -> Tensor:
        """Not available: take quantiles of draws."""
        self._refuse("icdf", "there is no closed form", "take quantiles of draws")

    def entropy(self) -> Tensor:
        """Not available: average -log_prob over draws."""
        why, instead = "there is no closed form", "average -log_prob over draws"
        self._refuse("entropy", why, f"{instead} (an upper bound where log_prob is a lower bound)")

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Not available: values are too many, or real."""
        self._refuse("enumerate_support", "values are too many, or real", "use draws")

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Not available: draws carry no gradient."""
        why = "draws are not reparameterized"
        self._refuse("rsample", why, "use sample, or ProbabilityFlow for draws with gradients")

    def _refuse(self, name: str, why: str, instead: str) -> Never:
        raise unavailable(self, name, why, instead)
