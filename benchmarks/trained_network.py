"""Few-step samplers on a trained network: beside diffusers' schedulers on one grid, from the same noise."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the networks' classes are there
from pyro_diffusion import checkpoint
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.samplers import AdamsMoulton, Sampler, simulate
from pyro_diffusion.schedules import focused_log_snr, uniform_log_snr

EVALUATIONS = (5, 10, 20)
ACCURATE = 400
Walk = Callable[[Denoiser, Tensor, Tensor], Tensor]


def load(file: str, device: str) -> tuple[Denoiser, tuple[int, ...]]:
    """Network and image shape of a file of ``save_model`` (a distribution), or of examples/digits.py."""
    if file == "digits":
        import digits

        return digits.trained(Path("results/digits")).to(device), digits.EVENT_SHAPE
    import images  # noqa: F401 (registers its class)

    model = checkpoint.load_model(file, device=device)
    return model.denoiser, tuple(model.event_shape)


def multistep(name: str, order: int) -> Walk:
    """A multistep scheduler of diffusers on a given grid."""
    import diffusers

    def walk(denoiser: Denoiser, times: Tensor, x: Tensor) -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # its advice on other settings
            scheduler = getattr(diffusers, name)(prediction_type="sample", solver_order=order)
        level = denoiser.process.schedule.level(times.flip(0))
        scheduler.sigmas = (level.sigma / level.alpha).cpu()
        scheduler.num_inference_steps = len(times) - 1
        scheduler.timesteps = torch.arange(len(times) - 1, 0, -1)
        return _walked(scheduler, denoiser, times, x)

    return walk


def ddim(denoiser: Denoiser, times: Tensor, x: Tensor) -> Tensor:
    """diffusers' DDIMScheduler, whose table of alphas is the grid's."""
    import diffusers

    steps = len(times) - 1
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.register_to_config(num_train_timesteps=steps)
    scheduler.alphas_cumprod = denoiser.process.schedule.level(times).alpha.square()
    scheduler.num_inference_steps = steps
    scheduler.timesteps = torch.arange(steps, 0, -1)
    return _walked(scheduler, denoiser, times, x)


def _walked(scheduler: object, denoiser: Denoiser, times: Tensor, x: Tensor) -> Tensor:
    level = denoiser.process.levels(times.flip(0), x.dtype, x.device)
    for i, t in enumerate(scheduler.timesteps):  # type: ignore[attr-defined]
        mean = denoiser(x, level.at(i)).mean
        x = scheduler.step(mean, int(t), x).prev_sample  # type: ignore[attr-defined]
    return x


def peers() -> dict[str, Walk]:
    """diffusers' schedulers; none, and a line that says so, where it is not installed."""
    try:
        import diffusers
    except ImportError:
        print("diffusers is not installed: our own samplers alone")
        return {}
    print(f"diffusers {diffusers.__version__}")
    found: dict[str, Walk] = {"diffusers DDIM": ddim}
    for title, name, orders in (
        ("DPM-Solver++", "DPMSolverMultistepScheduler", (2, 3)),
        ("UniPC", "UniPCMultistepScheduler", (2, 3)),
        ("DEIS", "DEISMultistepScheduler", (2, 3)),
    ):
        found |= {f"diffusers {title} {k}": multistep(name, k) for k in orders}
    return found


def compare(
    file: str,
    count: int,
    device: str,
    ours: dict[str, Sampler],
    worse: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Distances to the end of the ODE, and whether the first of our samplers is worse in no cell."""
    denoiser, shape = load(file, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=generator).to(device)
    schedule = denoiser.process.schedule

    def end(steps: int) -> Tensor:
        return simulate(denoiser, uniform_log_snr(schedule, steps), x, AdamsMoulton())

    accurate = end(ACCURATE)

    def error(last: Tensor) -> Tensor:
        return (last - accurate).flatten(1).square().mean(1).double().cpu()

    theirs, fine = peers(), True
    print(
        f"{file}: {count} images {shape}, data in [-1, 1]; rms per pixel from the ODE's end, which moves by "
        f"{float(error(end(ACCURATE // 2)).mean().sqrt()):.5f} from {ACCURATE // 2} steps to {ACCURATE}"
    )
    for title, grid in (("uniform", uniform_log_snr), ("focused", focused_log_snr)):
        print(f"\n{f'{title}_log_snr, evaluations':<30}" + "".join(f"{n:>9}" for n in EVALUATIONS))
        default: list[Tensor] = []
        walks: dict[str, Walk] = {
            name: lambda q, t, x, s=sampler: simulate(q, t, x, s) for name, sampler in ours.items()
        }
        for name, walk in (walks | theirs).items():
            reads = ours[name].evaluations if name in ours else 1
            cells = [
                error(walk(denoiser, grid(schedule, max(n // reads, 1)), x)) for n in EVALUATIONS
            ]
            default = default or cells
            row = "".join(f"{float(c.mean().sqrt()):>9.4f}" for c in cells)
            print(f"{name:<30}{row}", end="", flush=True)
            lost: list[int] = []
            if name in theirs:
                lost = [
                    n for n, a, b in zip(EVALUATIONS, default, cells, strict=True) if worse(a, b)
                ]
                fine &= not lost
            print(f"   the default is worse at {lost}" if lost else "")
    if theirs:
        print(f"\nthe default is no worse than diffusers' in any cell, as wanted: {fine}")
    return fine
