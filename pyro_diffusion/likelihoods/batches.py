"""A program on a batch of x_0: the sample dimension left of its plates, or single runs under vmap."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import pyro
import torch
from torch import Tensor

from pyro_diffusion.likelihoods.first_run import FirstRun
from pyro_diffusion.likelihoods.missing import without_missing
from pyro_diffusion.likelihoods.run import Message, collapse, log_density, observed, of_each_datum
from pyro_diffusion.validation import check_event_shape

__all__ = ["BatchedProgram", "Extract"]

# From observed sites and a number of sample dimensions to tensors that begin with these.
Extract = Callable[[list[Message], int], tuple[Tensor, ...]]


class BatchedProgram:
    """A program with one diffusion site, run at given x_0 and other latents.

    Args:
        program: the model with its arguments.
        first: what its first run found.
    """

    def __init__(self, program: Callable[[], Any], first: FirstRun) -> None:
        self._program, self._site, self._nesting = program, first.site, first.nesting
        self._dims, self._given = first.dims, {**first.subsamples, **first.idle}
        self.prior = first.site.diffusion
        self._batch_shape = self.prior.batch_shape
        # Dimensions of a plate that stay, and the batch shape of what is returned.
        dims = range(-len(self._batch_shape), 0)
        self._kept = [d for d in dims if self._batch_shape[d] != 1] if first.factorized else []
        ones = torch.Size((1,) * len(self._batch_shape))
        self._batch_out = self._batch_shape if first.factorized else ones
        self._redrawn: Collection[str] = ()

    def drawing(self, names: Collection[str]) -> Self:
        """The same program, which draws some observed sites anew in every run."""
        new = copy.copy(self)
        new._redrawn = names
        return new

    def run(self, x0: Tensor, latents: Mapping[str, Tensor]) -> list[Message]:
        """The observed sites of a single run."""
        return self._run_with(self._site.value(x0), latents)

    def run_batch(
        self,
        x0: Tensor,
        latents: Mapping[str, Tensor],
        extract: Extract,
        vectorized: Mapping[bool, bool],
    ) -> tuple[Tensor, ...]:
        """What is extracted from the observed sites at each x_0, tensors of shape sample + ...

        Args:
            x0: sample + batch + event.
            latents: other latents; dimensions beyond the site's own broadcast into sample.
            extract: what is wanted of the sites.
            vectorized: whether a batch is put left of the plates (else it is run under vmap), without
                (False) and with (True) latents that have sample dimensions.
                A program that draws, which vmap cannot do anew for each x_0, is run singly in its place.

        Raises:
            ValueError: for an x_0 of another shape.
        """
        own = self._batch_shape + self.prior.event_shape
        check_event_shape("x0", x0, own)
        shapes = {k: v.shape[: v.dim() - self._dims[k][1]] for k, v in latents.items()}
        sample = torch.broadcast_shapes(x0.shape[: x0.dim() - len(own)], *shapes.values())
        if not sample:
            return extract(self.run(x0, latents), 0)
        x0 = x0.expand(sample + own).reshape(-1, *own)
        many, one = {}, {}
        for name, value in latents.items():
            if not shapes[name]:
                one[name] = value
                continue
            nominal = value.shape[len(shapes[name]) :]
            many[name] = value.expand(sample + nominal).reshape(-1, *nominal)
        if vectorized[bool(many)]:
            out = extract(self._run_vectorized(x0, many, one), 1)
        elif self._redrawn:
            runs = [
                extract(self.run(x, {**one, **{k: v[i] for k, v in many.items()}}), 0)
                for i, x in enumerate(x0)
            ]
            out = tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
        else:
            # Checks of values, as validation makes them, are what vmap cannot do.
            with pyro.validation_enabled(False):
                out = torch.func.vmap(
                    lambda x, some: extract(self.run(x, {**one, **some}), 0), randomness="same"
                )(x0, many)
        return tuple(v.expand(len(x0), *v.shape[1:]).reshape(sample + v.shape[1:]) for v in out)

    def untouched(self, x0: Tensor, latents: Mapping[str, Tensor]) -> list[Message]:
        """The observed sites of a single run, with what is missing in them."""
        data = {**self._given, self._site.name: self._site.value(x0), **latents}
        return observed(self._program, data)

    def single(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first of latents that have sample dimensions."""
        return {k: v[(0,) * (v.dim() - self._dims[k][1])] for k, v in latents.items()}

    def log_probs(self, sites: list[Message], lead: int) -> tuple[Tensor, ...]:
        """Log-densities site by site, sample + batch."""
        return tuple(self.collapse(log_density(site), lead).sum(-1) for site in sites)

    def log_prob(self, sites: list[Message], lead: int) -> tuple[Tensor, ...]:
        """The log-density of all sites, sample + batch."""
        parts = self.log_probs(sites, lead)
        return (sum(parts[1:], parts[0]),)

    def collapse(self, x: Tensor, lead: int, event: int = 0) -> Tensor:
        """All but sample dimensions and those of the data gathered in one last dimension.

        Args:
            x: sample + plates + event.
            lead: number of sample dimensions.
            event: number of event dimensions.
        """
        out = collapse(x, lead, self._nesting, event, self._kept)
        return out.reshape(*out.shape[:lead], *self._batch_out, out.shape[-1])

    def _run_vectorized(
        self, x0: Tensor, many: dict[str, Tensor], one: dict[str, Tensor]
    ) -> list[Message]:
        """A run with the sample dimension left of all plates."""
        value = _pad(self._site.value(x0), self._nesting - self._site.batch_dims)
        padded = {k: _pad(v, self._nesting - self._dims[k][0]) for k, v in many.items()}
        return self._run_with(value, {**one, **padded})

    def _run_with(self, value: Tensor, latents: Mapping[str, Tensor]) -> list[Message]:
        data = {**self._given, self._site.name: value, **latents}
        sites = observed(self._program, data, self._redrawn)
        return [without_missing(of_each_datum(site)) for site in sites]


def _pad(x: Tensor, extra: int) -> Tensor:
    """Singleton dimensions after the first."""
    return x.reshape(x.shape[:1] + (1,) * extra + x.shape[1:])
