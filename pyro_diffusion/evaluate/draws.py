"""Many draws of a model, in batches that change nothing and on any number of processes."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_diffusion.denoisers.base import check_context
from pyro_diffusion.distributions.base import DenoisedDistribution
from pyro_diffusion.evaluate.batches import in_batches, shared_seed
from pyro_diffusion.evaluate.rows import find_view, named
from pyro_diffusion.processes import drawing_from
from pyro_diffusion.processes.row_noise import RowNoise
from pyro_diffusion.ranks import ProcessGroup, agree_on_values
from pyro_diffusion.validation import check_positive_int

__all__ = ["draw_samples"]


def draw_samples(
    distribution: TorchDistribution,
    num_samples: int,
    *,
    context: dict[str, Tensor] | None = None,
    batch_size: int = 512,
    progress: bool = False,
    seed: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Draws of a model, batch by batch, by noise that is keyed by row.

    Draw i is a function of the seed and of i: the same on any number of processes and, up to rounding, for
    any ``batch_size``. What couples the rows of a batch is excepted: adaptive steps, within their tolerance
    (of an SDE wholly, whose Brownian path is one for all rows), and distributions without an ``icdf``.

    Args:
        distribution: the model, a view of batch shape (), perhaps under Pyro's transforms; networks should be
            in ``eval()`` mode.
        num_samples: number n of draws.
        context: the denoiser's context, one row per draw.
        batch_size: draws made together.
        progress: whether to show a progress bar.
        seed: of the noise; drawn from torch's global generator if None.
        process_group: the processes that share the batches, such as ``torch.distributed.group.WORLD``; all of
            them call this with the same arguments, and get all draws. None for this process alone.

    Returns:
        (n,) + event, on the host.

    Raises:
        ValueError: for a distribution that is no view of a denoiser or has a batch shape, fewer than one draw
            or a context without exactly one row per draw.

    Example:
        >>> from pyro_diffusion.denoisers import MixtureDenoiser
        >>> from pyro_diffusion.distributions import Diffusion
        >>> from pyro_diffusion.processes import GaussianProcess
        >>> from pyro_diffusion.schedules import Cosine
        >>> denoiser = MixtureDenoiser(GaussianProcess(Cosine()), torch.ones(1), torch.zeros(1, 2), 1.0)
        >>> diffusion = Diffusion(denoiser, (2,), steps=5)
        >>> few = draw_samples(diffusion, 3, seed=0)
        >>> many = draw_samples(diffusion, 100, seed=0, batch_size=32)
        >>> bool(torch.isclose(few, many[:3], atol=1e-5).all())
        True
    """
    model = find_view("distribution", distribution, DenoisedDistribution)
    view = model.base
    check_positive_int("num_samples", num_samples)
    seed = shared_seed(seed, process_group)
    context = check_context(view.denoiser, context, num_samples)
    agree_on_values(named(context), process_group)
    index = torch.arange(num_samples, device=view.device)

    def work(rows: slice) -> tuple[Tensor]:
        with drawing_from(RowNoise(seed, index[rows])):
            if not context:
                return (distribution.sample((len(index[rows]),)),)
            given = view.condition(**{k: v[rows] for k, v in context.items()})
            return (model.around(given).sample(),)

    with torch.no_grad():
        draws = in_batches(work, num_samples, batch_size, process_group, progress, "sampling")
    return torch.cat([x for (x,) in draws])
