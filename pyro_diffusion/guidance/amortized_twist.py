r"""A twist for a program that is asked again and again, learned from its own simulations."""

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.guidance.base import GuidedDenoiser, check_denoiser
from pyro_diffusion.guidance.learned_twist import LearnedTwist
from pyro_diffusion.guidance.linear_prediction import LinearPrediction
from pyro_diffusion.likelihoods import Likelihood, ProgramLikelihood
from pyro_diffusion.nn import MLP
from pyro_diffusion.processes import Ability
from pyro_diffusion.processes.abilities import require
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_positive_int

__all__ = ["AmortizedTwist"]

AT_ONCE = 2**18  # numbers of the states that are simulated together
MOST_LOG_SCALE = 3.0


class AmortizedTwist(nn.Module):
    r"""log p(y | x_t) as a normal density whose moments a small network finds in x_t: for any y at once.

    .. math::
        \log \psi_t(x_t) = \log \mathcal N\big(y;\; m(x_t, t),\; S(x_t, t)\big), \qquad
        m = \bar m + L\, \delta, \quad S = L\, T T^T L^T,

    where :math:`\bar m` and :math:`L L^T` are mean and covariance of the best *linear* prediction of y from
    x_t (in closed form, from moments of simulations), and a network gives :math:`\delta` and the lower
    triangle T from x_t, with a share that vanishes where x_t is noise. It is trained by

    .. math:: \max\; E_{x_0 \sim p,\; y \sim p(y | x_0),\; t,\; x_t \sim q(x_t | x_0)} \log \psi_t(x_t),

    draws of the frozen prior through the program: a lower bound of :math:`E \log p(y | x_t)` whose maximum
    is the normal of the right mean and covariance of y given x_t. Exact for normal data and linear normal
    readings, before any training but for the moments' Monte-Carlo error; else approximate. Unlike
    guidance by the denoiser's derivative it knows how y spreads, in programs that are not linear too, and it
    is smooth: :class:`TwistedSMC <pyro_diffusion.infer.TwistedSMC>` draws from the chain's kernel times the
    twist of the *next* level, linearized there (``GuidedDenoiser.follow``). Its weights are exact
    whatever the network has learned: a bad twist costs effective sample size.

    The twist is itself the ``guidance`` of particles and guides, for any data of the sites it was made for::

        twist = AmortizedTwist(ProgramLikelihood(model, (y,)))
        fit_amortized(twist, twist.simulate(20_000))
        TwistedSMC(prior, ProgramLikelihood(model, (other,)), twist).run()

    Values of all observed sites that depend on x_0 are one vector, standardized; rows of a plate that the
    likelihood factorizes over are data with readings of their own. Other latents and arguments are those of
    the likelihood it was made with.

    Args:
        likelihood: of the program, with data of the right shape; their values do not matter.
        network: called with states (N, n) of about unit variance and log-SNR (N,), returns at least
            m + m (m + 1) / 2 numbers a datum, which are 0 before training; an :class:`~pyro_diffusion.nn.MLP`
            if None.
        hidden: widths of that MLP, whose layers are residual blocks with layer norm.

    Raises:
        ValueError: for a likelihood that is none of a program, whose data are joint, incomplete (a mask, NaN)
            or factors; for a prior of other than real data, with a context, or whose noise differs by
            coordinate.

    References:
        Papamakarios, Sterratt & Murray, arXiv 1805.07226 (neural likelihoods); Lawson et al.,
        arXiv 2206.05952 (twists that are learned).
    """

    ready: Tensor
    _rows: Tensor

    def __init__(
        self,
        likelihood: ProgramLikelihood,
        network: nn.Module | None = None,
        *,
        hidden: Sequence[int] = (256, 256, 256),
    ) -> None:
        super().__init__()
        if not isinstance(likelihood, ProgramLikelihood):
            raise ValueError(
                f"likelihood: got {type(likelihood).__name__}, expected a ProgramLikelihood, which simulates"
            )
        _check_prior(likelihood)
        self._likelihood = (likelihood,)  # no part of the state
        self.size = likelihood.event_shape.numel()
        self.readings = readings_of(likelihood).shape[-1]
        self.linear = LinearPrediction(self.size, self.readings)
        count = self.readings + self.readings * (self.readings + 1) // 2
        if network is None:
            outputs = -(-count // self.size)
            network = MLP(self.size, hidden, outputs, norm=True, residual=True)
        self.network = network
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("_rows", torch.tril_indices(self.readings, self.readings), False)

    @torch.no_grad()
    def simulate(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of the prior and the program's readings of them; the first call takes their moments.

        Args:
            num_samples: N, draws of data; those of a plate are rows of their own. At first more data than
                they and their readings have numbers, many times as many for good moments.

        Returns:
            ``"x0"``, (N times rows, n), and ``"y"``, (N times rows, m).
        """
        check_positive_int("num_samples", num_samples, at_least=2)
        (likelihood,) = self._likelihood
        prior = likelihood.prior
        rows, least = likelihood.batch_shape.numel(), self.size + self.readings
        if not bool(self.ready) and num_samples * rows <= least:
            raise ValueError(
                f"num_samples: got {num_samples} at first, of {rows} data each, expected more than {least} "
                "data, of which moments are taken"
            )
        one = rows * self.size
        found: dict[str, list[Tensor]] = {"x0": [], "y": []}
        for start in range(0, num_samples, most := max(AT_ONCE // one, 1)):
            x = prior.sample(torch.Size([min(most, num_samples - start)]))
            own = x.dtype if x.is_floating_point() else torch.get_default_dtype()
            x0 = prior.decoder.encode(x, prior.dtype or own)
            found["x0"].append(x0.reshape(-1, self.size))
            found["y"].append(likelihood.simulate(x0).reshape(-1, self.readings).to(x0))
        simulations = {name: torch.cat(parts) for name, parts in found.items()}
        if not bool(self.ready):
            self.to(x0.device)
            self.linear.fit(simulations["x0"], simulations["y"])
            self.ready.fill_(True)
        return simulations

    def training_model(self, x0: Tensor, y: Tensor) -> None:
        """A program that observes simulated readings given noisy states: for SVI with an empty guide.

        Its loss is that of standardized readings. Levels are stratified over [0, 1] in time.

        Args:
            x0: data, (N, n), of :meth:`simulate`.
            y: their readings, (N, m).

        Raises:
            ValueError: before the first simulations.
        """
        self._check_ready("training_model")
        pyro.module("twist", self)
        (likelihood,) = self._likelihood
        process, event = likelihood.prior.denoiser.process, likelihood.event_shape
        offsets = torch.arange(len(x0), dtype=x0.dtype, device=x0.device)
        data = x0.reshape(-1, *event)
        level = process.level((torch.rand_like(offsets[:1]) + offsets / len(x0)) % 1, data)
        xt = process.marginal(data, level).sample().reshape(x0.shape)
        mean, root = self.moments(xt, level)
        with pyro.plate("simulations", len(x0)):
            normal = dist.MultivariateNormal(mean, scale_tril=root, validate_args=False)
            pyro.sample("y", normal, obs=self.linear.standardized(y))

    def moments(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the covariance of standardized y, (N, m) and (N, m, m).

        Args:
            x: states, (N, n).
            level: one for all, or one a state.
        """
        alpha, sigma, clock = (
            v.double().reshape(-1, 1) for v in (level.alpha, level.sigma, level.clock)
        )
        mean, root = self.linear(x, alpha, sigma)
        out = self.network(
            self.linear.scaled(x, alpha, sigma), clock.flatten().to(x).expand(len(x))
        )
        m = self.readings
        out = out.flatten(1).to(x) * self.linear.share(alpha, sigma).to(x)
        bias, entries = out[:, :m], out[:, m : m + self._rows.shape[1]]
        square = out.new_zeros(len(x), m, m)
        square[:, self._rows[0], self._rows[1]] = entries
        log_scale = square.diagonal(dim1=-1, dim2=-2)
        bounded = MOST_LOG_SCALE * (log_scale / MOST_LOG_SCALE).tanh()
        triangle = square.tril(-1) + torch.diag_embed(bounded.exp())
        return mean + (root @ bias.unsqueeze(-1)).squeeze(-1), root @ triangle

    def log_prob(self, x: Tensor, level: Level, y: Tensor) -> Tensor:
        r"""log psi_t in nats of y in its own units, (N,).

        Args:
            x: states, (N, n).
            level: one for all, or one a state.
            y: readings, (N, m) or (m,).
        """
        return self.log_density(*self.moments(x, level), y)

    def log_density(self, mean: Tensor, root: Tensor, y: Tensor) -> Tensor:
        """The log-density of y under :meth:`moments`, nats of y in its own units, (N,)."""
        away = (self.linear.standardized(y) - mean).unsqueeze(-1)
        u = torch.linalg.solve_triangular(root, away, upper=False).squeeze(-1)
        log_scale = root.diagonal(dim1=-1, dim2=-2).log().sum(-1) + self.linear.unit.log().sum()
        constant = self.readings * math.log(2 * math.pi)
        return -0.5 * (u.square().sum(-1) + constant) - log_scale.to(u)

    def forward(self, denoiser: Denoiser, likelihood: Likelihood) -> GuidedDenoiser:
        """The guidance by this twist: what guides and particles call.

        Args:
            denoiser: posterior p(x_0 | x_t) of the prior.
            likelihood: of the same program at the data asked about.

        Raises:
            ValueError: before the first simulations; for a likelihood with other readings or data.
        """
        self._check_ready("guidance")
        check_denoiser(denoiser)
        if not isinstance(likelihood, ProgramLikelihood):
            raise ValueError(
                f"likelihood: got {type(likelihood).__name__}, expected a ProgramLikelihood, whose "
                "observations are known"
            )
        y = readings_of(likelihood)
        found = (likelihood.event_shape.numel(), y.shape[-1])
        if found != (self.size, self.readings):
            raise ValueError(
                f"likelihood: got data of {found[0]} numbers with {found[1]} readings, expected "
                f"{self.size} and {self.readings}, as the twist was trained on"
            )
        return LearnedTwist(denoiser, likelihood, self, y)

    def _check_ready(self, name: str) -> None:
        if not bool(self.ready):
            raise ValueError(
                f"{name}: got an AmortizedTwist without simulations, expected twist.simulate(n) (and "
                "training, fit_amortized(twist, simulations)) before"
            )


def readings_of(likelihood: ProgramLikelihood) -> Tensor:
    """What was observed of each datum, batch + (m,).

    Raises:
        ValueError: if several data are observed jointly, and as ``ProgramLikelihood.observations``.
    """
    if not likelihood.factorized and likelihood.batch_shape.numel() > 1:
        raise ValueError(
            "likelihood: got data in plates that are observed jointly, expected observations of each datum"
        )
    return likelihood.observations()


def _check_prior(likelihood: ProgramLikelihood) -> None:
    prior = likelihood.prior
    needs = (Ability.NUMBERS, Ability.TWEEDIE, Ability.ISOTROPIC)
    require(prior.denoiser.process, *needs, argument="likelihood", by="AmortizedTwist")
    if prior.context:
        raise ValueError(
            f"likelihood: got a prior with context {', '.join(prior.context)}, expected one without"
        )
