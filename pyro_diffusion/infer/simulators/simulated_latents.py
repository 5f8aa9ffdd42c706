"""What a guide that learns from simulations does with its program: find sites, simulate, check, pack."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor, nn

from pyro_diffusion.infer.simulators.conditional_posterior import ConditionalPosterior, MakeDenoiser
from pyro_diffusion.infer.simulators.described import check_described, described
from pyro_diffusion.infer.simulators.designs import Call, simulates_alike
from pyro_diffusion.infer.simulators.intervals import bounded_places, by_normal_quantiles
from pyro_diffusion.infer.simulators.observed_data import check_by_name, check_data
from pyro_diffusion.infer.simulators.packed import at_edge, is_far, pack, unconstrained
from pyro_diffusion.infer.simulators.simulations import (
    Simulator,
    find_sites,
    observed_nodes,
    simulate,
)
from pyro_diffusion.infer.simulators.site_checks import check_whole
from pyro_diffusion.infer.simulators.standardized import (
    LOG,
    LOG_OF_COUNTS,
    Standardized,
)
from pyro_diffusion.likelihoods.run import isolated
from pyro_diffusion.unreliable import warn_unreliable
from pyro_diffusion.validation import check_finite, check_positive_int, check_tensor

__all__ = ["SimulatedLatents", "Values", "check_data"]

LEAST = 20  # simulations that scales may be taken from
Values = dict[str, Tensor]


class SimulatedLatents(AutoContinuous):
    """Base of :class:`~pyro_diffusion.infer.AutoAmortized`: its simulations, and the data that it is given.

    Args:
        model: the program.
        summary: of the data.
        make_denoiser: of the sizes of latents and summary.
        observed: names of the observed sites, if given.
        latents: names of the latents of interest, if given.
        vectorized: whether simulations are one run in a plate, if given.

    Attributes:
        dropped: simulations that were not finite, of all so far.
    """

    prototype_trace: Any
    posterior: Any
    structure: Tensor
    _unconstrained_shapes: dict[str, torch.Size]

    def __init__(
        self,
        model: Callable[..., Any],
        summary: nn.Module | None,
        make_denoiser: MakeDenoiser,
        observed: Collection[str] | None,
        latents: Collection[str] | None,
        vectorized: bool | None,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: got {type(model).__name__}, expected a Pyro program")
        if summary is not None and not isinstance(summary, nn.Module):
            raise ValueError(f"summary: got {type(summary).__name__}, expected a module")
        if not callable(make_denoiser) or isinstance(make_denoiser, nn.Module):
            raise ValueError(
                f"denoiser: got {type(make_denoiser).__name__}, expected a function of the sizes of latents "
                "and summary that returns one"
            )
        if vectorized not in (None, True, False):
            raise ValueError(f"vectorized: got {vectorized!r}, expected True, False or None")
        shown: set[str] = set()  # the latents, once they are known
        super().__init__(poutine.block(model, hide_fn=lambda m: _hidden(m, shown)), init_to_sample)
        # In tuples, so that none becomes a submodule before it is built into one.
        self._program, self._shown = (model,), (shown,)
        self._parts = (summary, make_denoiser)
        self._names, self._vectorized = (latents, observed), vectorized
        self._simulator: Simulator | None = None
        self._call: tuple[
            Call, ...
        ] = ()  # of the first simulations; in a tuple, as it may hold modules
        self._described, self._compared = torch.empty(0, dtype=torch.uint8), False
        self.dropped = 0

    def simulate(self, num_samples: int, *args: Any, **kwargs: Any) -> Values:
        """Joint draws of latents and observed sites from the program: what the guide learns from.

        The first call, with at least 20 valid draws, sets the scales of latents and data, and the limit on
        the Mahalanobis distance of data beyond which the guide warns: a simulation exceeds it with a
        probability of at most 1/1000 (one in n/2, with fewer than n = 2000 draws).

        Args:
            num_samples: number of simulations.
            args: the model's; data among them only tell which sites are observed.
            kwargs: likewise.

        Returns:
            (n,) + the shape of each site by name, without simulations that are not finite, which are counted
            in a warning. Leaving out those of infinite data changes no posterior given finite data; latents
            at the edge of their support are left out, too.

        Raises:
            ValueError: for a program without observed sites or without latents, with discrete latents,
                latents of varying number, shape or support, or of one that has no transform; for factors,
                masks and scales; for a plate that subsamples; if no simulation is finite; for values that
                single precision does not tell apart.
        """
        check_positive_int("num_samples", num_samples)
        simulator = self._prepare(args, kwargs)
        return self._valid(simulate(simulator, num_samples, args, kwargs))

    def accept(self, simulations: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Values:
        """Simulations made elsewhere, checked and without invalid ones, as :meth:`simulate` returns them.

        Args:
            simulations: (n,) + shape of each latent and each observed site.
            args: the model's.
            kwargs: likewise.

        Raises:
            ValueError: as :meth:`simulate`, and for missing sites or other shapes.
        """
        simulator = self._prepare(args, kwargs)
        return self._valid(self._checked(simulations, simulator))

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites, known after the first simulations."""
        return () if self._simulator is None else tuple(self._simulator.observed)

    @property
    def vectorized(self) -> bool:
        """Whether simulations are one run of the program in a plate, known after the first simulations."""
        return self._simulator is not None and self._simulator.vectorized

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        state = pyro.util.get_rng_state()  # so that a first call draws what a later one would
        self._simulator, self._call = self._find(args, kwargs), ((args, kwargs),)
        self._shown[0].clear()
        self._shown[0].update(self._simulator.latents)
        with isolated():
            super()._setup_prototype(*args, **kwargs)
        by_normal_quantiles(self.prototype_trace)
        pyro.util.set_rng_state(state)
        self._described = described(self._simulator, self.prototype_trace)

    def _prepare(self, args: Any, kwargs: Any) -> Simulator:
        """Look at the program, once, and build what is learned if no state was loaded."""
        if self._simulator is None:
            self._setup_prototype(*args, **kwargs)
        simulator = self._simulator
        assert simulator is not None
        if "posterior" not in self._modules:
            self.posterior = self._build(simulator)
        try:
            self._check_state(simulator)
            if "structure" not in self._buffers:
                self.register_buffer("structure", self._described.to(self.posterior.count.device))
            elif not self._compared:
                check_described(self._described, self.structure)
            self._compared = True
        except ValueError:
            self._simulator = None
            raise
        return simulator

    def _find(self, args: Any, kwargs: Any) -> Simulator:
        """The program and its sites."""
        latents, observed = self._names
        return find_sites(self._program[0], args, kwargs, latents, observed, self._vectorized)

    def _build(self, simulator: Simulator) -> nn.Module:
        """What is learned, untrained."""
        shapes = [(site.shape, site.log) for site in simulator.observed.values()]
        bounded = bounded_places(self.prototype_trace, self._unconstrained_shapes)
        return ConditionalPosterior(self.latent_dim, shapes, *self._parts, bounded)

    def _check_state(self, simulator: Simulator) -> None:
        """Refuse a state that was loaded and is not of this program."""
        shapes = [(site.shape, site.positive) for site in simulator.observed.values()]
        own: Any = self._modules["posterior"]
        found = (own.latent_size, [(s.loc.shape, int(s.log) == LOG) for s in own._sites])
        if found != (self.latent_dim, shapes):
            raise ValueError(
                f"model: got {self.latent_dim} unconstrained latents and data of shapes "
                f"{[tuple(s) for s, _ in shapes]}, expected {found[0]} and "
                f"{[tuple(s) for s, _ in found[1]]}, those of the state that was loaded"
            )
        # a state of counts that were seen as they are goes on seeing them so
        for s, (name, site) in zip(own._sites, simulator.observed.items(), strict=True):
            if int(s.log) == LOG_OF_COUNTS and not site.counts:
                raise ValueError(
                    f"site {name!r}: got one of other data, expected counts, as in the state that was loaded"
                )

    def _ready(self, name: str) -> Any:
        posterior: Any = self._modules.get("posterior")
        if posterior is None or not int(posterior.count):
            raise ValueError(
                f"{name}: got a guide without simulations, expected guide.simulate(n) or "
                "guide.accept(simulations) and training first, or a state to load"
            )
        return posterior

    def _checked(self, simulations: Mapping[str, Tensor], simulator: Simulator) -> Values:
        """The values of all sites, of one number of rows."""
        sites = {**simulator.latents, **simulator.observed}
        missing = [name for name in sites if name not in simulations]
        if missing:
            raise ValueError(
                f"simulations: got no values of {missing}, expected all of {list(sites)}"
            )
        values = {name: check_tensor(name, torch.as_tensor(simulations[name])) for name in sites}
        rows = {v.shape[0] if v.dim() else None for v in values.values()}
        wrong = [n for n, v in values.items() if len(rows) > 1 or v.shape[1:] != sites[n].shape]
        if wrong or None in rows or 0 in rows:
            got = {n: tuple(v.shape) for n, v in values.items()}
            expected = {n: ("n", *site.shape) for n, site in sites.items()}
            raise ValueError(f"simulations: got shapes {got}, expected {expected}")
        return values

    def _to_train_on(self, simulations: Mapping[str, Tensor]) -> tuple[Simulator, Values]:
        """The simulator, and the values of all its sites.

        Raises:
            ValueError: before the first simulations, and for other sites or shapes.
        """
        if self._simulator is None:
            raise ValueError(
                f"training_model: got {type(self).__name__} before it has seen its model, expected "
                "simulate or accept first"
            )
        values = self._checked(simulations, self._simulator)
        for name, value in values.items():
            if value.device.type == "cpu":  # elsewhere a look at values would cost a wait
                check_finite(f"simulations[{name!r}]", value)
        return self._simulator, values

    def _valid(self, values: Values) -> Values:
        """Without rows that are not finite; the first time, take the scales from the others."""
        assert self._simulator is not None
        posterior: Any = self._modules["posterior"]
        rows = len(next(iter(values.values())))
        parts = self._scaled_parts(values)
        real = [scale._real(x).reshape(rows, -1) for _, scale, x in parts]
        dropped = 0
        kept: slice | Tensor = slice(None)
        latents = [x for (n, _, _), x in zip(parts, real, strict=True) if n.startswith("latents")]
        edge = at_edge(self, values) if any(is_far(x) for x in latents) else None
        # a sum is finite only if all its terms are: rows are looked at one by one only where one is not
        if edge is not None or not all(bool(x.sum().isfinite()) for x in real):
            kept = torch.cat(real, -1).isfinite().all(-1)
            kept = kept if edge is None else kept & ~edge
            dropped = rows - int(kept.sum())
        if dropped:
            self.dropped += dropped
            if dropped == rows:
                raise ValueError(
                    f"simulations: got {rows} simulations none of which is finite and inside of its "
                    "support, expected some that are"
                )
            cut = "" if edge is None else f"; {int(edge.sum())} there, where the prior is cut"
            warnings.warn(
                f"simulations: {dropped} of {rows} were NaN, infinite, or at the edge of their support "
                f"or beyond, and were dropped{cut}",
                stacklevel=3,
            )
            values = {name: value[kept] for name, value in values.items()}
        if not int(posterior.count):
            if rows - dropped < LEAST:
                raise ValueError(
                    f"simulations: got {rows - dropped} valid ones, expected at least {LEAST} the first "
                    "time, to take the scales of latents and data from"
                )
            self._check_varying(values)
            for name, scale, x in parts:
                valid = x[kept].reshape(-1, *scale.loc.shape)
                if bool(scale.loses(valid).any()):
                    raise ValueError(
                        f"{name}: got values that vary by less than {scale.loc.dtype} tells apart, about "
                        f"{float(valid.double().abs().max()):.6g}, expected ones less a number near them"
                    )
            self._fit_scales(values)
        return values

    def _check_varying(self, values: Values) -> None:
        for name, value, _ in unconstrained(self, values):
            if name not in self.observed and len(value) > 1 and bool((value == value[:1]).all()):
                raise ValueError(
                    f"site {name!r}: got a latent that is the same in all simulations, expected one that "
                    "varies, with a density; name the others, latents=[...] (sites=[...] of an AutoJoint)"
                )

    def _scaled_parts(self, values: Values) -> list[tuple[str, Standardized, Tensor]]:
        """What is standardized: a name for errors, the scale, and all simulated values."""
        posterior: Any = self._modules["posterior"]
        assert self._simulator is not None
        latents = self._pack(values, next(iter(values.values())).shape[:1])
        names = [f"site {name!r}" for name in self._simulator.observed]
        data = [values[name] for name in self._simulator.observed]
        sites = zip(names, posterior._sites, data, strict=True)
        return [("latents (unconstrained)", posterior.latents, latents), *sites]

    def _fit_scales(self, values: Values) -> None:
        """Take all scales from simulations."""
        posterior: Any = self._modules["posterior"]
        assert self._simulator is not None
        latents = self._pack(values, next(iter(values.values())).shape[:1])
        posterior.fit_scales(latents, [values[name] for name in self._simulator.observed])

    def _data(self, args: Any, kwargs: Any) -> tuple[list[Tensor], torch.Size]:
        """The observed values in the model's arguments, checked, and the batch shape of the observations."""
        simulator = self._prepare(args, kwargs)
        nodes = observed_nodes(simulator, args, kwargs)
        check_whole(nodes)
        values = {name: torch.as_tensor(node["value"]) for name, node in nodes.items()}
        found = self._data_of(values)
        if not simulates_alike(simulator, self._call[0], (args, kwargs), values):
            self._warn_other_program("other data alone")
        return found

    def _warn_other_program(self, expected: str) -> None:
        """Warn of arguments that are not of the program that was learned."""
        warn_unreliable(
            "arguments: got others than those of the first simulations, under which the program "
            f"simulates something else, expected {expected}; the guide answers as if they were the "
            "same (let what varies, such as a design, be sampled and observed)"
        )

    def _data_of(self, values: Mapping[str, Tensor]) -> tuple[list[Tensor], torch.Size]:
        """Values of observed sites, checked, and the batch shape of the observations."""
        self._ready("guide")
        simulator = self._simulator
        if simulator is None:
            raise ValueError(
                "guide: got one that has not seen its model, expected simulate or accept first, or, of a "
                "state that was loaded, a call with data in the model's arguments, guide(x)"
            )
        check_by_name(values)
        found, batch = [], torch.Size()
        for name, site in simulator.observed.items():
            if name not in values:
                raise ValueError(f"site {name!r}: got no data, expected values of it")
            value = check_data(name, values[name], site.shape, site)
            lead = value.dim() - len(site.shape)
            found.append(value)
            batch = torch.broadcast_shapes(batch, value.shape[:lead])
        return [
            x.expand(batch + site.shape)
            for x, site in zip(found, simulator.observed.values(), strict=True)
        ], batch

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        # the network may be of single precision, and the program of double
        for site, free in super()._unpack_latent(latent):
            yield site, free.to(site["value"].dtype)

    def _pack(self, values: Mapping[str, Tensor], batch: torch.Size) -> Tensor:
        """Unconstrained latents in one vector, batch + (latent size,)."""
        return pack(self, values, batch)

    def _build_stored(self, state_dict: Any, own: str) -> nn.Module | None:
        """What is learned, of the shapes in a state."""
        if f"{own}latents.loc" not in state_dict:
            return None
        count = 0
        while f"{own}observed.{count}.loc" in state_dict:
            count += 1
        sites = [f"{own}observed.{i}." for i in range(count)]
        shapes = [(state_dict[f"{s}loc"].shape, int(state_dict[f"{s}log"])) for s in sites]
        size = state_dict[f"{own}latents.loc"].numel()
        bounded = state_dict.get(f"{own}prediction.bounded", torch.zeros(0)).tolist()
        return ConditionalPosterior(size, shapes, *self._parts, bounded)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A fresh guide is built from the shapes of what it loads.
        if "posterior" not in self._modules:
            built = self._build_stored(state_dict, f"{prefix}posterior.")
            if built is not None:
                self.posterior = built
        if f"{prefix}structure" in state_dict:
            stored = state_dict[f"{prefix}structure"]
            if self._simulator is not None:  # otherwise once it has seen its program
                try:
                    check_described(self._described, stored)
                except ValueError as error:
                    args[-1].append(str(error))
                    return
            self.register_buffer("structure", stored.clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _hidden(msg: Any, shown: set[str]) -> bool:
    """What the guide's prototype does not see: nuisance latents, and observed sites without data."""
    sample = msg["type"] == "sample" and type(msg["fn"]).__name__ != "_Subsample"
    return bool(sample and not msg["is_observed"] and msg["name"] not in shown)
