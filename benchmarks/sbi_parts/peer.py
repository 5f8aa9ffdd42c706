"""The toolbox sbi beside us: its NPSE, FMPE and NPE on the same simulations.

As in its documentation (batches of 200, Adam at 5e-4, a tenth held out, standardized data), but for three
settings that make rows comparable. Its networks are as wide as gives them as many weights as ours have. It
trains for as many seconds of one processor as ours did (the wall time of an idle one), and then takes the
weights that were best on its held-out simulations. NPSE and FMPE do not stop before that, so that all of the
time is theirs.
"""

import contextlib
import importlib
import io
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sbi_parts import VARIANCE, bernoulli_prior

__all__ = ["METHODS", "draw", "fit", "toolbox"]

# method: class, function that builds its network, architecture
METHODS = {
    "NPSE": ("NPSE", "posterior_score_nn", "mlp"),
    "FMPE": ("FMPE", "posterior_flow_nn", "mlp"),
    "NPE": ("NPE", "posterior_nn", "maf"),  # its default
    "NPE-nsf": ("NPE", "posterior_nn", "nsf"),  # that of sbibm's published figures
}
BATCH = 200
# Epochs without a better one: NPE overfits, and ends by its default; the others have all of the time.
PATIENCE = {"NPE": 20, "NPSE": 2**31 - 1, "FMPE": 2**31 - 1}


class Silent:
    """A tracker that writes no files."""

    log_dir = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Nothing."""

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""


def toolbox() -> tuple[ModuleType, ModuleType, ModuleType] | None:
    """sbi's modules `inference`, `neural_nets` and `utils`; None where it is not installed."""
    folder = Path(__file__).resolve().parents[1]
    path = sys.path[:]
    # `benchmarks/sbi.py` hides the library of its name from a script of its folder
    sys.path[:] = [each for each in path if Path(each or ".").resolve() != folder]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = ["sbi.inference", "sbi.neural_nets", "sbi.utils"]
            inference, networks, utils = (importlib.import_module(name) for name in names)
            return inference, networks, utils
    except ModuleNotFoundError as error:
        print(f"sbi is not installed ({error}): its rows are left out", flush=True)
        return None
    finally:
        sys.path[:] = path


def width(build: Callable[[int], torch.nn.Module], parameters: int) -> int:
    """The width whose network has at most so many parameters, by bisection."""
    low, high = 8, 512
    while high - low > 1:
        middle = (low + high) // 2
        count = sum(each.numel() for each in build(middle).parameters())
        low, high = (middle, high) if count <= parameters else (low, middle)
    return low


def prior_of(name: str, utils: ModuleType, device: str) -> Any:
    """The prior of a task's theta as sbi takes it."""
    if name == "two_moons":
        ones = torch.ones(2, device=device)
        return utils.BoxUniform(-ones, ones, device=device)
    covariance = VARIANCE * torch.eye(10)
    if name == "bernoulli_glm":
        covariance = bernoulli_prior().covariance_matrix
    return torch.distributions.MultivariateNormal(
        torch.zeros(10, device=device), covariance.to(device)
    )


def timed(kind: type, seconds: float) -> type:
    """A trainer of sbi that ends after so many seconds of the processor."""

    class Timed(kind):  # type: ignore[misc, valid-type]
        def _converged(self, epoch: int, stop_after_epochs: int) -> bool:
            if epoch == 0:
                self.started = time.process_time()
            done = super()._converged(epoch, stop_after_epochs)  # notes the best weights
            if not done and time.process_time() - self.started > seconds:
                self._neural_net.load_state_dict(self._best_model_state_dict)
                done = True
            return bool(done)

    Timed.__name__ = kind.__name__
    return Timed


def fit(
    method: str, name: str, simulations: dict[str, Tensor], parameters: int, seconds: float
) -> tuple[Callable[[str], Any], dict[str, Any]]:
    """A function of a device that gives sbi's posterior, and what its training took."""
    found = toolbox()
    if found is None:
        raise ModuleNotFoundError(f"{method}: expected sbi to be installed")
    inference, networks, utils = found
    kind, builder, model = METHODS[method]
    theta, x = simulations["theta"], simulations["x"]

    def network(hidden: int) -> Callable[..., torch.nn.Module]:
        return getattr(networks, builder)(model, hidden_features=hidden)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden = width(lambda each: network(each)(theta[:100], x[:100]), parameters)
        start, cpu = time.perf_counter(), time.process_time()
        trainer = timed(getattr(inference, kind), seconds)(
            prior_of(name, utils, "cpu"),
            network(hidden),
            tracker=Silent(),
            show_progress_bars=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            estimator = trainer.append_simulations(theta, x).train(
                training_batch_size=BATCH, stop_after_epochs=PATIENCE[kind]
            )
        took = {
            "steps": trainer.epoch * -(-round(0.9 * len(theta)) // BATCH),
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "parameters": sum(each.numel() for each in estimator.parameters()),
        }

    def posterior(device: str) -> Any:
        """By sbi's default way to draw: an SDE, an ODE or the flow, none outside the prior."""
        prior = prior_of(name, utils, device)
        return trainer.build_posterior(estimator.to(device), prior=prior)

    return posterior, took


def draw(posterior: Any, count: int, x: Tensor) -> Tensor:
    """Draws at one observation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return posterior.sample((count,), x=x.unsqueeze(0), show_progress_bars=False).detach()
