"""What a guide that learns from simulations does with plates of rows: their sizes, masks and latents."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_diffusion.infer.simulators.conditional_posterior import MakeDenoiser, default_denoiser
from pyro_diffusion.infer.simulators.designs import rows_alike
from pyro_diffusion.infer.simulators.hierarchical_posterior import HierarchicalPosterior
from pyro_diffusion.infer.simulators.intervals import by_normal_quantiles
from pyro_diffusion.infer.simulators.level_networks import Rows
from pyro_diffusion.infer.simulators.observed_data import check_by_name, check_data
from pyro_diffusion.infer.simulators.plates import Level, find_levels
from pyro_diffusion.infer.simulators.rows import (
    check_sizes_seen,
    data_rows,
    expected_shape,
    latent_places,
    latent_rows,
    level_sizes,
    without_masked,
)
from pyro_diffusion.infer.simulators.simulated_latents import (
    SimulatedLatents,
    Values,
)
from pyro_diffusion.infer.simulators.simulations import SimulatedSite, Simulator, observed_nodes
from pyro_diffusion.infer.simulators.site_checks import check_whole
from pyro_diffusion.infer.simulators.site_encoders import (
    SiteEncoders,
    check_encoders,
    check_stored,
)
from pyro_diffusion.infer.simulators.standardized import Standardized
from pyro_diffusion.likelihoods.run import isolated

__all__ = ["SimulatedLevels"]

# What AutoContinuous takes from a run of the program; sizes of plates are among it.
SHAPES = (
    "prototype_trace",
    "_prototype_frames",
    "_unconstrained_shapes",
    "_cond_indep_stacks",
    "latent_dim",
    "_places",
)


class SimulatedLevels(SimulatedLatents):
    """Base of :class:`~pyro_diffusion.infer.AutoAmortized`: plates whose rows are a set, of any size.

    Args:
        model: as all but the last two, of :class:`SimulatedLatents`.
        summary: of whole data, without plates of rows.
        make_denoiser: of the sizes of latents and context, if given.
        observed: names of the observed sites, if given.
        latents: names of the latents of interest, if given.
        vectorized: whether simulations are one run in a plate, if given.
        plates: names of the plates whose rows are a set, if given.
        encoders: modules of observed sites, by name.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        summary: nn.Module | None,
        make_denoiser: MakeDenoiser | None,
        observed: Collection[str] | None,
        latents: Collection[str] | None,
        vectorized: bool | None,
        plates: Collection[str] | None,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        make = default_denoiser if make_denoiser is None else make_denoiser
        super().__init__(model, summary, make, observed, latents, vectorized)
        if summary is not None and plates:
            raise ValueError(
                f"summary: got {type(summary).__name__} for the rows of {plates!r}, expected None: a module "
                "summarizes whole data"
            )
        # in a tuple, so that none becomes a submodule before it is built into one
        self._given_encoders = (check_encoders(encoders, summary),)
        self._plates = () if summary is not None else plates
        self._make_rows = make_denoiser
        self._levels: tuple[Level, ...] = ()
        self._simulated: dict[str, Any] = {}

    @property
    def _encoders(self) -> dict[str, nn.Module]:
        return self._given_encoders[0]

    @property
    def in_levels(self) -> bool:
        """Whether the program has plates of rows, known after the first simulations."""
        return len(self._levels) > 1

    def _find(self, args: Any, kwargs: Any) -> Simulator:
        loaded, plates = self._modules.get("posterior"), self._plates
        if loaded is not None:  # trained on many rows, and maybe given one now
            sizes = loaded.sizes if isinstance(loaded, HierarchicalPosterior) else ()
            plates = [each.plate for each in sizes if each.plate]
        simulator = super()._find(args, kwargs)
        unknown = [name for name in self._encoders if name not in simulator.observed]
        if unknown:
            raise ValueError(
                f"encoders: got {unknown}, expected names of observed sites out of "
                f"{list(simulator.observed)}"
            )
        try:
            self._levels = find_levels(simulator, args, kwargs, plates)
        except ValueError as error:
            if loaded is None or not str(error).startswith("plates:"):
                raise
            raise ValueError(f"model: {error}, those of the state that was loaded") from error
        return simulator

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self._find_places()
        self._simulated = {name: getattr(self, name) for name in SHAPES}

    def _find_places(self) -> None:
        shapes = self._unconstrained_shapes
        self._places = latent_places(self._levels, self.prototype_trace, shapes)

    def _take_shapes(self, args: Any, kwargs: Any) -> None:
        """Take shapes from a run of the program whose plates have other sizes than before."""
        state = pyro.util.get_rng_state()
        with isolated():
            super(SimulatedLatents, self)._setup_prototype(*args, **kwargs)
        by_normal_quantiles(self.prototype_trace)
        pyro.util.set_rng_state(state)
        self._find_places()

    def _as_simulated(self) -> None:
        """Take the shapes of the simulations again."""
        for name, value in self._simulated.items():
            setattr(self, name, value)

    def _build(self, simulator: Simulator) -> nn.Module:
        if not self.in_levels:
            if self._encoders:
                self._parts = (
                    SiteEncoders(list(simulator.observed), self._encoders),
                    self._parts[1],
                )
            return super()._build(simulator)
        return HierarchicalPosterior(self._sizes(simulator), self._make_rows, self._encoders)

    def _sizes(self, simulator: Simulator) -> Any:
        zeros = {n: torch.zeros(site.shape) for n, site in simulator.observed.items()}
        rows = data_rows(simulator, self._levels, zeros, {}, torch.Size())
        places = self._simulated["_places"]
        return level_sizes(simulator, self._levels, rows, places, self._encoders)

    def _build_stored(self, state_dict: Any, own: str) -> nn.Module | None:
        if f"{own}structure" not in state_dict:
            if f"{own}summary.sites" in state_dict:
                names = SiteEncoders.stored(state_dict[f"{own}summary.sites"], self._encoders)
                self._parts = (SiteEncoders(names, self._encoders), self._parts[1])
            return super()._build_stored(state_dict, own)
        sizes = HierarchicalPosterior.stored(state_dict[f"{own}structure"])
        check_stored({s.name for each in sizes for s in each.observed if s.encoded}, self._encoders)
        return HierarchicalPosterior(sizes, self._make_rows, self._encoders)

    def _check_state(self, simulator: Simulator) -> None:
        if not self.in_levels:
            super()._check_state(simulator)
            return
        own: Any = self._modules["posterior"]
        sizes = self._sizes(simulator)
        # as many rows as may be: their number in the simulations is of no consequence now
        if [e._replace(size=0) for e in own.sizes] != [e._replace(size=0) for e in sizes]:
            raise ValueError(
                f"model: got levels {sizes}, expected {own.sizes}, those of the state that was loaded"
            )

    # Simulations.

    def _latent_rows(self, values: Mapping[str, Tensor], batch: torch.Size) -> list[Tensor]:
        """Simulated, unconstrained latents of every level."""
        self._as_simulated()
        return latent_rows(self._pack(values, batch), self._places)

    def _rows(
        self, values: Mapping[str, Tensor], batch: torch.Size, masks: Mapping[str, Any]
    ) -> Rows:
        assert self._simulator is not None
        return data_rows(self._simulator, self._levels, values, masks, batch)

    def _scaled_parts(self, values: Values) -> list[tuple[str, Standardized, Tensor]]:
        if not self.in_levels:
            return super()._scaled_parts(values)
        posterior: Any = self._modules["posterior"]
        batch = next(iter(values.values())).shape[:1]
        latents, data = self._latent_rows(values, batch), self._rows(values, batch, {})
        found: list[Any] = []
        for level, own, z, xs in zip(
            self._levels, posterior.levels, latents, data.values, strict=True
        ):
            if level.latents:
                found.append((f"latents {list(level.latents)} (unconstrained)", own.latents, z))
            names = [f"site {name!r}" for name in level.observed]
            found += zip(names, own.observed, xs, strict=True)
        return found

    def _fit_scales(self, values: Values) -> None:
        if not self.in_levels:
            super()._fit_scales(values)
            return
        posterior: Any = self._modules["posterior"]
        batch = next(iter(values.values())).shape[:1]
        posterior.fit_scales(self._latent_rows(values, batch), self._rows(values, batch, {}))

    # Data.

    def _data(self, args: Any, kwargs: Any) -> tuple[Any, torch.Size]:
        simulator = self._prepare(args, kwargs)
        self._ready("guide")
        if not self.in_levels:
            return super()._data(args, kwargs)
        nodes = observed_nodes(simulator, args, kwargs)
        check_whole({name: {**node, "mask": None} for name, node in nodes.items()})
        masks = {name: node["mask"] for name, node in nodes.items()}
        values, shapes = {}, {}
        given = {name: torch.as_tensor(node["value"]) for name, node in nodes.items()}
        for name, node in nodes.items():
            site = simulator.observed[name]
            values[name] = without_masked(given[name], node["mask"], site.event_dim)
            shapes[name] = expected_shape(site, self._levels, node)
        data, batch = self._checked_rows(values, shapes, masks)
        if self._sizes_of(data) != [place.shape[:-1] for place in self._places]:
            self._take_shapes(args, kwargs)
        posterior: Any = self._modules["posterior"]
        check_sizes_seen(posterior.sizes, data.present)
        if not rows_alike(simulator, self._levels, self._call[0], (args, kwargs), given):
            self._warn_other_program("other data, other numbers of rows and masks of rows alone")
        return data, batch

    def _data_of(self, values: Mapping[str, Tensor]) -> tuple[Any, torch.Size]:
        if not self.in_levels:
            return super()._data_of(values)
        self._as_simulated()  # without arguments the program cannot be run at other sizes
        assert self._simulator is not None
        check_by_name(values)
        observed = self._simulator.observed
        missing = [name for name in observed if name not in values]
        if missing:
            raise ValueError(f"site {missing[0]!r}: got no data, expected values of it")
        shapes = {name: site.shape for name, site in observed.items()}
        return self._checked_rows(values, shapes, {})

    def _checked_rows(
        self, values: Mapping[str, Any], shapes: dict[str, torch.Size], masks: Mapping[str, Any]
    ) -> tuple[Rows, torch.Size]:
        assert self._simulator is not None
        found, batch = {}, torch.Size()
        for name, shape in shapes.items():
            site = self._simulator.observed[name]
            said = "simulated" if shape == site.shape else "the plates of this run have it"
            if not masks:
                said += " (the guide itself, called as the model is, takes other numbers of rows)"
            found[name] = check_data(name, values[name], shape, site, said)
            lead = found[name].dim() - len(shape)
            batch = torch.broadcast_shapes(batch, found[name].shape[:lead])
        full = {name: x.expand(batch + shapes[name]) for name, x in found.items()}
        return self._rows(full, batch, masks), batch

    def _sizes_of(self, data: Rows) -> list[torch.Size]:
        """Rows of every level, none where there are no latents."""
        return [
            here.shape[here.dim() - len(level.dims) :] if level.latents else torch.Size()
            for here, level in zip(data.present, self._levels, strict=True)
        ]

    def _latent_sites(self) -> dict[str, SimulatedSite]:
        """The latents, with the shapes of the last run."""
        assert self._simulator is not None
        nodes = self.prototype_trace.nodes
        return {
            name: site._replace(shape=nodes[name]["value"].shape)
            for name, site in self._simulator.latents.items()
        }
