"""Amos: steps of Adam's kind, whose rate and weight decay fall by themselves."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.validation import check_number

__all__ = ["Amos", "typical_scale"]


def typical_scale(parameter: Tensor) -> float:
    r"""The scale of trained weights by their shape: :math:`1/\sqrt{\text{inputs}}`, .5 for vectors.

    A tensor of two and more dimensions is taken for weights, outputs first, as torch has them.
    """
    return 0.5 if parameter.dim() < 2 else 1 / math.sqrt(parameter[0].numel())


class Amos(torch.optim.Optimizer):
    r"""Adam with three numbers of state a tensor, and a decay towards the scale that weights should have.

    For every tensor :math:`\theta` of target scale :math:`\eta`, with gradient g and rate :math:`\xi`,

    .. math::

        v &\leftarrow \beta v + (1 - \beta)\,\overline{g^2}, \qquad \hat v = v / (1 - \beta^t), \\
        \gamma &= (1 + \tfrac14 \sqrt\xi\, b)^{-1/2}\, \xi^2\, \overline{g^2} / \hat v, \\
        \theta &\leftarrow \theta - (1 + \tfrac14 \sqrt{\xi \eta}\, b)^{-1}
            \big(\tfrac12 \gamma\, \theta + \xi\, \eta\, g / \sqrt{\hat v}\big), \\
        b &\leftarrow b + \gamma\,(1 + b),

    where the bar is the mean over the tensor. A step has the length :math:`\xi \eta` at first, in units of
    the tensor's typical gradient; b grows and shortens the steps, so that neither a schedule nor the number
    of steps is needed. State is v, b and the number of steps, three numbers a tensor; Adam's is twice the
    weights.

    Two options of the paper use more of it. ``per_output`` keeps a v and a b for every output of a tensor of
    weights, the bar being the mean over its inputs. ``momentum`` takes the moving average of the steps
    :math:`m \leftarrow \mu m + (1 - \mu)\,\delta`, of zeros at first, for the step: one number a weight, half
    of Adam's.

    Args:
        params: parameters, or dictionaries of them with options of their own, as of every torch optimizer.
        lr: :math:`\xi`, about one over the square root of the number of independent batches in the data.
        beta: :math:`\beta`, in [0, 1).
        scale: :math:`\eta`; by default that of each tensor's shape, :math:`1/\sqrt{\text{inputs}}` of weights
            and .5 of vectors.
        eps: least :math:`\hat v`, below which gradients are taken for zero.
        momentum: :math:`\mu`, in [0, 1).
        per_output: whether v and b are kept for every output, the first dimension of weights.

    Raises:
        ValueError: for a rate or scale outside (0, 1e6], an eps that is not positive, a beta or momentum
            outside [0, 1), and sparse gradients.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Amos([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.detach()  # 1 - .01 / 2 - .1 * .5
        tensor([0.9450, 0.9450])

    References:
        Tian and Parikh, arXiv 2210.11693, algorithm 1 (v and b reduced over axes, optional momentum).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        beta: float = 0.999,
        scale: float | None = None,
        eps: float = 1e-18,
        momentum: float = 0.0,
        per_output: bool = False,
    ) -> None:
        check_number("lr", lr, above=0, at_most=1e6)
        check_number("eps", eps, above=0)
        for name, value in (("beta", beta), ("momentum", momentum)):
            if check_number(name, value, at_least=0) >= 1:
                raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1)")
        if scale is not None:
            check_number("scale", scale, above=0, at_most=1e6)
        options = {"lr": lr, "beta": beta, "scale": scale, "eps": eps}
        super().__init__(params, {**options, "momentum": momentum, "per_output": bool(per_output)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ValueError("params: got one with a sparse gradient, expected dense ones")
        xi, beta, scale = group["lr"], group["beta"], group["scale"]
        eta = typical_scale(parameter) if scale is None else scale
        square = _mean_square(gradient, group["per_output"])
        state = self.state[parameter]
        if not state:
            state["step"] = square.new_zeros(())
            state["v"], state["b"] = torch.zeros_like(square), torch.zeros_like(square)
            if group["momentum"]:
                state["m"] = torch.zeros_like(parameter, dtype=square.dtype)
        step, v, b = state["step"], state["v"], state["b"]
        step += 1
        v.lerp_(square, 1 - beta)
        # 1 - beta^t, without the cancellation of the first steps.
        known = -torch.expm1(step * math.log(beta)) if beta > 0 else 1.0
        corrected = (v / known).clamp(min=group["eps"])
        gamma = (1 + 0.25 * xi**0.5 * b).rsqrt() * xi**2 * square / corrected
        shorter = 1 / (1 + 0.25 * (xi * eta) ** 0.5 * b)
        decay, rate = 0.5 * shorter * gamma, shorter * xi * eta * corrected.rsqrt()
        b += gamma * (1 + b)
        # in one step: a decay below the rounding of 1 would be lost in a factor of its own
        change = decay * parameter.to(square.dtype) + rate * gradient.to(square.dtype)
        if group["momentum"]:
            change = state["m"].lerp_(change, 1 - group["momentum"])
        parameter.sub_(change)


def _mean_square(gradient: Tensor, per_output: bool) -> Tensor:
    """Over the tensor, or over the inputs of every output; at least in single precision."""
    square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
    if per_output and gradient.dim() > 1:
        return square.mean(tuple(range(1, gradient.dim())), keepdim=True)
    return square.mean()
