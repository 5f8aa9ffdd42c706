"""Multistep samplers: the bridge to an x_0 extrapolated from past evaluations of the denoiser."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Data, Parameterization, V
from pyro_diffusion.processes import Ability, ForwardProcess
from pyro_diffusion.processes.linear import BridgeCoefficients
from pyro_diffusion.samplers.ancestral import DDIM
from pyro_diffusion.samplers.base import Denoise, State
from pyro_diffusion.samplers.exponential import (
    average_weights,
    by_coordinate,
    canonical,
    step_rule,
)
from pyro_diffusion.schedules import Level
from pyro_diffusion.validation import check_positive_int

__all__ = ["AdamsBashforth", "AdamsMoulton", "DPMSolverPP", "UniPC"]


class MultistepCoefficients(NamedTuple):
    r"""Rows of a multistep sampler, as :meth:`AdamsBashforth.step` uses them.

    The output F that is extrapolated is a weighted sum of the state and its posterior mean, as
    :math:`\hat x_0 = c_{skip}\,x + c_{out}\,F`.

    Attributes:
        bridge: from t to s.
        output_x: :math:`-c_{skip}/c_{out}`, weight of the state in F.
        output_x0: :math:`1/c_{out}`, weight of the posterior mean in F.
        state: weight of the state in the x_0 that the bridge goes to.
        weights: weights of the last outputs in it, newest first.
        correction: weights of the last outputs in what is added to the state before the step (none without a
            corrector).
    """

    bridge: BridgeCoefficients
    output_x: Tensor
    output_x0: Tensor
    state: Tensor
    weights: Tensor
    correction: Tensor


class AdamsBashforth(DDIM):
    r"""Exponential Adams-Bashforth: DDIM whose :math:`x_0` is the average of a polynomial over the step.

    In half log-SNR :math:`u = \lambda/2` the bridge from t to s is the probability flow itself if it goes to

    .. math:: \bar x_0 = \frac{\int_{u_t}^{u_s} e^u \hat x_0(u)\,du}{\int_{u_t}^{u_s} e^u\,du} , \qquad
              \hat x_0 = c_{skip}\,x + c_{out}\,F .

    F is what a network of the given parameterization would output: the data, the noise, the velocity, ...
    The linear part is integrated exactly, and F is the polynomial in u through its last ``order`` values,
    for any spacing of the grid. The fewer values of the first steps do little harm, as the posterior mean
    hardly moves at the noise end. ``order=1`` with ``Data()`` is DDIM. One network evaluation a step;
    processes with a flow, in any scale. The denoiser's own parameterization does not matter here.

    At ``eta=0`` the sampler is deterministic, of this order, and also goes towards noise. Otherwise the
    bridge is DDIM's of that eta, of strong order 1 and weak order min(order, 2).

    Args:
        order: number of values, 1 to 4.
        eta: fraction of the bridge's standard deviation that is fresh noise, in [0, 1].
        extrapolate: what F is, ``Data()`` by default; ``Noise()`` is DEIS, ``EDMPreconditioning(s)`` is of
            Rosenbrock type for data of standard deviation s.

    Raises:
        ValueError: if order lies outside 1 to 4, eta outside [0, 1], F is no parameterization, or is another
            than ``Data()`` although eta > 0 (its share of the state would follow the flow, not the SDE).

    References:
        Zhang & Chen (DEIS), arXiv 2204.13902; Hochbruck & Ostermann, Acta Numerica 2010, section 2.5;
        with noise, Xue et al. (SA-Solver), arXiv 2309.05019.
    """

    needs = (Ability.LINEAR,)
    corrects = False
    middle = False  # whether a linear F is averaged by its middle value
    values_at_last = 4  # at most so many values in the last step, which is never corrected
    least_order = 1

    def __init__(
        self, order: int = 3, eta: float = 0.0, extrapolate: Parameterization | None = None
    ) -> None:
        super().__init__(eta)
        least = self.least_order
        if check_positive_int("order", order, at_least=least) > 4:
            raise ValueError(f"order: got {order}, expected an integer from {least} to 4")
        self.extrapolate = Data() if extrapolate is None else extrapolate
        if not isinstance(self.extrapolate, Parameterization):
            raise ValueError(
                f"extrapolate: got {extrapolate!r}, expected a parameterization such as Data() or V()"
            )
        if eta > 0 and not isinstance(self.extrapolate, Data):
            raise ValueError(
                f"extrapolate: got {self.extrapolate!r} with eta={eta:g}, expected Data() when noise is drawn"
            )
        self.values = order - self.corrects
        self.order = order if eta == 0 else None
        self.weak_order = min(order, 2) if eta > 0 else None

    def __repr__(self) -> str:
        order = self.values + self.corrects
        return f"{type(self).__name__}(order={order}, eta={self.eta:g}, {self.extrapolate!r})"

    def coefficients(self, process: ForwardProcess, s: Level, t: Level) -> MultistepCoefficients:
        """The bridge's at this eta and the weights of the outputs F, in float64 until the end.

        Raises:
            ValueError: for a process without a flow (free variance where eta > 0), or an infinite log-SNR.
        """
        bridge = super().coefficients(process, s, t)
        late, early = 0.5 * t.log_snr.double(), 0.5 * s.log_snr.double()
        h = early - late
        if not bool(torch.isfinite(h).all()):
            raise ValueError(
                f"schedule: got an infinite log-SNR for {self!r}, expected finite ends of the grid"
            )
        state, weights, correction = by_coordinate(self._tables, late, h)
        if self.corrects:
            gap = bridge.x0.unsqueeze(1) * correction
            correction = torch.cat([gap[1:], torch.zeros_like(gap[:1])])
        _, skip, out = canonical(self.extrapolate, late)
        table = (-skip / out / torch.hypot(t.alpha, t.sigma), 1 / out, state / t.sigma)
        return MultistepCoefficients(
            bridge, *(v.to(t.sigma) for v in (*table, weights, correction))
        )

    def _tables(self, late: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the state, of the values, and of the corrector's change of x_0, for steps in a row."""
        z = h - 0.5 * torch.log1p(self.eta**2 * torch.expm1(-2 * h))
        state, weights = self._weights(late, h, z)
        if not self.corrects:
            return state, weights, weights[:, :0]
        # What the completed step's x_0 should have been, less what it was.
        shifted = torch.nn.functional.pad(weights, (1, 0))
        return state, weights, self._weights(late, h, z, ahead=True)[1] - shifted

    def _weights(
        self, late: Tensor, h: Tensor, z: Tensor, ahead: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Weights of the state and of the outputs at hand (``ahead``: and of the one at the step's end)."""
        count, extra = len(h), int(ahead)
        most = min(self.values, count)
        state, moments = step_rule(self.extrapolate, late, h, z, self.values + extra)
        table = h.new_zeros(count, self.values + extra)

        def fill(rows: Tensor, n: int) -> None:
            past = rows.unsqueeze(-1) + torch.arange(n, device=h.device)
            nodes = (late[past] - late[rows, None]) / h[rows, None]
            nodes = torch.cat([nodes.new_ones(len(rows), extra), nodes], -1)
            known = moments[rows, : n + extra]
            if self.middle and n + extra == 2:
                known = known[:, :1] * known.new_tensor([1.0, 0.5])
            weights = average_weights(nodes, known)
            table[rows] = torch.nn.functional.pad(weights, (0, self.values - n))

        for n in range(1, most + 1):
            first = 0 if n == self.values else count - n
            rows = torch.arange(first, count - n + 1, device=h.device)
            fill(rows, n)
        if self.values_at_last < most and not ahead:
            fill(torch.zeros_like(rows[:1]), self.values_at_last)
        return state, table

    def step(
        self,
        process: ForwardProcess,
        denoise: Denoise,
        state: State,
        s: Level,
        t: Level,
        c: MultistepCoefficients,
    ) -> State:
        r"""The bridge to the average of the extrapolated posterior mean.

        .. math::
            F_0 &= \big(\hat x_0(x_t) - c_{skip}\,x_t\big) / c_{out}, \qquad
            x_t' = x_t + \textstyle\sum_i d_i F_i, \\
            \bar x_0 &= a\,x_t' + \textstyle\sum_i w_i F_i, \qquad
            x_s = r\,x_t' + k\,\bar x_0 + \sqrt v\,z ,

        with the outputs :math:`F_1, F_2, \ldots` of the steps before from ``state.history``. The weights a
        (``c.state``) and :math:`w_i` (``c.weights``) make :math:`\bar x_0` the average over the step of
        the polynomial through the :math:`F_i`. With a corrector :math:`d_i` (``c.correction``, otherwise
        zero) is k of the step before times the change in its weights when :math:`F_0` is one of its values,
        too. r, k and v are DDIM's, see :meth:`DDIM.step`.
        """
        x = state.x
        outputs = (c.output_x * x + c.output_x0 * denoise(x, t).mean, *state.history)
        if self.corrects:
            x = x + _sum(c.correction, outputs)
        x0 = c.state * x + _sum(c.weights, outputs)
        kept = self.values - 1 + self.corrects
        return State(self.bridge_step(process, x, x0, c.bridge), outputs[:kept])


class AdamsMoulton(AdamsBashforth):
    r"""Exponential Adams-Bashforth-Moulton: predicts, and corrects once the step's end was evaluated.

    The prediction is :class:`AdamsBashforth` of one order less. The output F where it ends serves twice: for
    the next step, and to correct this one by the polynomial through one value more. Hence one network
    evaluation a step. The last step is not corrected, which would take one more; it extrapolates linearly.
    Steps of up to 0.7 in half log-SNR are corrected in full, longer ones less, those of 1.7 not at all: there
    the polynomial is no guide, and under trained networks the correction of a long step did harm (digits,
    five evaluations: error 0.37, without it 0.17).

    With its defaults this is the package's choice for few steps, on the grid
    :func:`~pyro_diffusion.schedules.focused_log_snr`; see the guide on choosing a sampler. At ``eta=0``
    deterministic and of the given order; otherwise of strong order 1 and weak order 2. Processes
    with a flow, in any scale.

    Args:
        order: number of values that the correction uses, 2 to 4.
        eta: fraction of the bridge's standard deviation that is fresh noise, in [0, 1].
        extrapolate: what F is; by default ``V()``, exact for centred normal data of standard deviation 1,
            and ``Data()`` when noise is drawn.

    Raises:
        ValueError: as :class:`AdamsBashforth`, with orders from 2.

    References:
        The mechanism of UniPC, Zhao et al., arXiv 2302.04867, with another F.
    """

    corrects = True
    values_at_last = 2
    least_order = 2
    # Steps in half log-SNR: up to which in full, from which not at all.
    corrected: tuple[float, float] | None = (0.7, 1.7)

    def __init__(
        self, order: int = 4, eta: float = 0.0, extrapolate: Parameterization | None = None
    ) -> None:
        if extrapolate is None:
            extrapolate = V() if eta == 0 else Data()
        super().__init__(order, eta, extrapolate)

    def _tables(self, late: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, weights, correction = super()._tables(late, h)
        if self.corrected is not None:
            full, none = self.corrected
            share = ((none - h.abs()) / (none - full)).clamp(0, 1)
            correction = share.unsqueeze(-1) * correction
        return state, weights, correction


class UniPC(AdamsMoulton):
    r"""UniPC-p with data prediction and :math:`B(h) = e^h - 1` ("bh2").

    :class:`AdamsMoulton` of order p + 1 on the posterior mean itself, with the average of a linear
    polynomial taken as its middle value. One network evaluation a step; deterministic, of order p + 1;
    processes with a flow, in any scale.

    Args:
        predictor_order: p, 1 to 3.

    Raises:
        ValueError: if p lies outside 1 to 3.

    References:
        Zhao et al., UniPC, arXiv 2302.04867, algorithms 7 and 8.
    """

    middle = True
    values_at_last = 4
    corrected = None  # every step in full, as published

    def __init__(self, predictor_order: int = 3) -> None:
        if check_positive_int("predictor_order", predictor_order) > 3:
            raise ValueError(
                f"predictor_order: got {predictor_order}, expected an integer from 1 to 3"
            )
        self.predictor_order = predictor_order
        super().__init__(predictor_order + 1, extrapolate=Data())

    def __repr__(self) -> str:
        return f"UniPC(predictor_order={self.values})"


class DPMSolverPP(AdamsBashforth):
    r"""DPM-Solver++(2M), and with ``eta=1`` SDE-DPM-Solver++(2M).

    Second-order :class:`AdamsBashforth` on the posterior mean, with the average of a linear polynomial
    taken as its middle value,

    .. math:: \bar x_0 = \left(1 + \frac{h}{2 h'}\right) \hat x_0(u_t) - \frac{h}{2 h'}\,\hat x_0(u_t - h'),

    h this step in half log-SNR and h' the one before; the first step is DDIM's. One network evaluation a
    step; processes with a flow, in any scale. Deterministic of order 2 at ``eta=0``; otherwise of strong
    order 1 and weak order 2.

    Args:
        eta: fraction of the bridge's standard deviation that is fresh noise, in [0, 1].

    Raises:
        ValueError: if eta lies outside [0, 1].

    References:
        Lu et al., DPM-Solver++, arXiv 2211.01095, algorithm 2 and appendix A.
    """

    middle = True

    def __init__(self, eta: float = 0.0) -> None:
        super().__init__(order=2, eta=eta)

    def __repr__(self) -> str:
        return f"DPMSolverPP(eta={self.eta:g})"


def _sum(weights: Tensor, outputs: tuple[Any, ...]) -> Tensor:
    """Weighted sum over as many outputs as there are yet."""
    total: Tensor = sum(w * value for w, value in zip(weights, outputs, strict=False))
    return total
