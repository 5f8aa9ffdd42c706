"""Traces of Jacobians, exact or estimated, all by vector-Jacobian products."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_diffusion.precision import full_precision
from pyro_diffusion.processes.noise import NoiseSource
from pyro_diffusion.validation import check_positive_int, check_seed, check_tensor

__all__ = [
    "ExactTrace",
    "HutchPlusPlus",
    "Hutchinson",
    "TraceEstimator",
    "check_trace_estimator",
    "gaussian",
    "pull_back",
    "rademacher",
    "sphere",
]

ProbeDistribution = Callable[[Tensor], Tensor]

# What perceptrons, transformers and closed-form posteriors are made of. Batched products of these are right
# to second order, as the tests compare with a loop; that of torch's group norm raises or is silently wrong.
BATCHED = frozenset(
    f"{name}Backward{index}"
    for names, index in (
        (
            "Add Addcmul Addmm Bmm Cat Clone Cos Div Exp Expand Gelu Log Logsumexp Mm Mul NativeLayerNorm "
            "Neg Permute Pow Relu ReshapeAlias Select Sigmoid Silu Sin Slice Softmax Softplus Split "
            "SplitWithSizes Sqrt Stack Sub T Tanh Transpose Unbind UnsafeView Unsqueeze View Where",
            0,
        ),
        ("Add Div Mul Pow Squeeze Sub Sum", 1),
    )
    for name in names.split()
) | {"torch::autograd::AccumulateGrad"}


def rademacher(normal: Tensor) -> Tensor:
    """Signs: the least variance of all probes with independent coordinates; exact for diagonal Jacobians."""
    check_tensor("normal", normal)
    return torch.where(normal < 0, -1.0, 1.0).to(normal.dtype)


def gaussian(normal: Tensor) -> Tensor:
    """Standard normal probes."""
    return check_tensor("normal", normal)


def sphere(normal: Tensor) -> Tensor:
    r"""Uniform on the sphere of radius :math:`\sqrt d`; exact for multiples of the identity."""
    if check_tensor("normal", normal).dim() == 0 or not normal.is_floating_point():
        raise ValueError(
            f"normal: got shape {tuple(normal.shape)} of {normal.dtype}, expected real vectors (..., d)"
        )
    return normal * (math.sqrt(normal.shape[-1]) / normal.norm(dim=-1, keepdim=True))


class TraceEstimator:
    r"""The trace of a Jacobian, or an estimate of it, row by row.

    **Implementing a trace estimator.** :meth:`probes` draws the vectors, once per path; calling the object
    with them gives the estimates at one point of it. ``pull_back`` computes products
    :math:`v^\top J`, all in one backward pass where it can. Estimates must be unbiased, for a density to be.
    Take random numbers from ``noise`` alone, with the rows of ``like`` as batch dimensions: then a row's
    estimate does not depend on the others in its batch.

    Attributes:
        columns: independent estimates that one call returns.
        stochastic: whether they are random. Set it where they are: the density is then called unbiased, not
            exact, and refused where it would be exponentiated.
        seed: fixes the probes of a stochastic one; None lets each distribution draw its own.

    Example:
        Of the d vectors of a random orthogonal basis, k: unbiased, and exact for k = d.

        >>> from pyro_diffusion.processes import SeededNoise
        >>> class Orthogonal(TraceEstimator):
        ...     stochastic = True
        ...     def __init__(self, k):
        ...         self.k = k
        ...     def probes(self, like, noise):
        ...         d = like.shape[1]
        ...         normal = noise.normal((d, *like.shape), like, event_dim=1)
        ...         basis = torch.linalg.qr(normal.transpose(0, 1)).Q
        ...         return math.sqrt(d) * basis.transpose(0, 1)[: self.k]
        ...     def __call__(self, output, rows, probes, differentiable=False):
        ...         products = pull_back(output, rows, probes, differentiable)
        ...         return (products * probes).sum(-1).mean(0, keepdim=True)
        >>> rows, trace = torch.randn(5, 4, requires_grad=True), Orthogonal(4)
        >>> estimate = trace(rows.sin(), rows, trace.probes(rows.detach(), SeededNoise(0)))
        >>> torch.allclose(estimate, rows.cos().sum(-1), atol=1e-5)
        True
    """

    columns = 1
    stochastic = False
    seed: int | None = None

    def probes(self, like: Tensor, noise: NoiseSource) -> Tensor:
        """Vectors to be kept along a path, (k, n, d) for rows ``like`` of shape (n, d)."""
        raise NotImplementedError

    def __call__(
        self, output: Tensor, rows: Tensor, probes: Tensor, differentiable: bool = False
    ) -> Tensor:
        """Estimates of tr(d output / d rows) of each row, (columns, n).

        Args:
            output: a function of ``rows``, (n, d), each row of its own row alone.
            rows: (n, d), in the graph of ``output``.
            probes: as :meth:`probes` gave them.
            differentiable: whether the estimates carry a graph.
        """
        raise NotImplementedError


class ExactTrace(TraceEstimator):
    """The trace itself: d vector-Jacobian products, one per coordinate, in one batched call."""

    def probes(self, like: Tensor, noise: NoiseSource) -> Tensor:
        """The basis vectors, (d, n, d)."""
        n, d = like.shape
        return torch.eye(d, dtype=like.dtype, device=like.device).unsqueeze(1).expand(d, n, d)

    def __call__(
        self, output: Tensor, rows: Tensor, probes: Tensor, differentiable: bool = False
    ) -> Tensor:
        """The trace of each row, (1, n)."""
        pulled = pull_back(output, rows, probes, differentiable)
        return pulled.diagonal(dim1=0, dim2=2).sum(-1).unsqueeze(0)

    def __repr__(self) -> str:
        return "ExactTrace()"


class Hutchinson(TraceEstimator):
    r"""Hutchinson's estimate :math:`v^\top J v` for random v with :math:`E[v v^\top] = I`: unbiased.

    Args:
        num_probes: number of vectors v, each one estimate; the spread between them is the standard error.
        distribution: of the probes: ``rademacher``, ``gaussian``, ``sphere``, or any map of standard
            normal draws (..., d) to vectors of covariance I.
        seed: fixes the probes, for Markov chains and repeatable scores.

    Raises:
        ValueError: for fewer than one probe.

    References:
        Grathwohl et al. (FFJORD), arXiv 1810.01367; Song et al., arXiv 2011.13456, section 4.3.
    """

    stochastic = True

    def __init__(
        self,
        num_probes: int = 1,
        distribution: ProbeDistribution = rademacher,
        seed: int | None = None,
    ) -> None:
        self.columns = self.num_probes = check_positive_int("num_probes", num_probes)
        self.distribution, self.seed = distribution, seed
        if seed is not None:
            self.seed = check_seed("seed", seed)
        if not callable(distribution):
            raise ValueError(
                f"distribution: got {distribution!r}, expected a map of normal draws such as rademacher, "
                "gaussian or sphere"
            )

    def probes(self, like: Tensor, noise: NoiseSource) -> Tensor:
        """Random vectors, (num_probes, n, d)."""
        return self.distribution(_normal(self.columns, like, noise))

    def __call__(
        self, output: Tensor, rows: Tensor, probes: Tensor, differentiable: bool = False
    ) -> Tensor:
        """One estimate per probe, (num_probes, n)."""
        return (probes * pull_back(output, rows, probes, differentiable)).sum(-1)

    def __repr__(self) -> str:
        return f"Hutchinson({self.columns}, {self.distribution.__name__}, seed={self.seed})"


class HutchPlusPlus(Hutchinson):
    r"""Hutch++: exact on a random sketch of the Jacobian's range, Hutchinson on the rest.

    .. math:: tr(Q^\top J Q) + g^\top (I - QQ^\top)\, J\, (I - QQ^\top)\, g, \qquad
              Q = \text{orth}(J^\top S)

    with as many normal columns of S as probes g: three vector-Jacobian products per probe. Unbiased, and
    exact if the Jacobian's rank is at most the number of probes. Gradients hold the sketch Q fixed; they are
    unbiased too, but not the derivative of one instance's figure.

    Args:
        num_probes: number of vectors g, and of columns of S.
        distribution: of the probes g, see :class:`Hutchinson`.
        seed: fixes S and g.

    Raises:
        ValueError: for fewer than one probe.

    References:
        Meyer et al., Hutch++: optimal stochastic trace estimation, arXiv 2010.09649.
    """

    def probes(self, like: Tensor, noise: NoiseSource) -> Tensor:
        """Random vectors for the sketch and for the rest, (2 num_probes, n, d)."""
        # Two sign vectors may be parallel, and then the sketch has one dimension less.
        normal = _normal(2 * self.columns, like, noise)
        return torch.cat([normal[: self.columns], self.distribution(normal[self.columns :])])

    def __call__(
        self, output: Tensor, rows: Tensor, probes: Tensor, differentiable: bool = False
    ) -> Tensor:
        """One estimate per probe, (num_probes, n)."""
        sketch, rest = probes.split(self.columns)
        with torch.no_grad():
            image = pull_back(output, rows, sketch, differentiable=False, keep=True)
            basis = torch.linalg.qr(image.permute(1, 2, 0)).Q.permute(2, 0, 1)  # (k, n, d)
            with full_precision(rest):
                inside = torch.einsum("knd,jnd->jkn", basis, rest)
                rest = rest - torch.einsum("jkn,knd->jnd", inside, basis)
        vectors = torch.cat([basis, rest])
        products = (vectors * pull_back(output, rows, vectors, differentiable)).sum(-1)
        return products[: len(basis)].sum(0) + products[len(basis) :]

    def __repr__(self) -> str:
        return f"HutchPlusPlus({self.columns}, {self.distribution.__name__}, seed={self.seed})"


def pull_back(
    output: Tensor, rows: Tensor, vectors: Tensor, differentiable: bool, keep: bool = False
) -> Tensor:
    r"""Products :math:`v^\top J` with the Jacobian of each row, (k, n, d).

    Args:
        output: a function of ``rows``, (n, d), each row of its own row alone.
        rows: (n, d), in the graph of ``output``.
        vectors: v, (k, n, d).
        differentiable: whether the products carry a graph.
        keep: whether the graph of ``output`` is needed again.

    One batched backward pass, but k passes where a graph is wanted through operations that are not in
    :data:`BATCHED`: the second derivatives of a batched pass are not right for every operation.
    """
    retain = differentiable or keep
    if differentiable and (len(vectors) == 1 or not _operations(output, rows) <= BATCHED):
        return torch.stack(
            [torch.autograd.grad(output, rows, v, create_graph=True)[0] for v in vectors]
        )
    (pulled,) = torch.autograd.grad(
        *(output, rows, vectors),
        is_grads_batched=True,
        create_graph=differentiable,
        retain_graph=retain,
    )
    return pulled


def _operations(output: Tensor, rows: Tensor) -> set[str]:
    """Names of the operations that lead to ``output``, those that lead to ``rows`` left out."""
    seen, waiting = {rows.grad_fn, None}, [output.grad_fn]
    names = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        names.add(node.name())
        waiting.extend(before for before, _ in node.next_functions)
    return names


def check_trace_estimator(trace: object) -> TraceEstimator:
    """Refuse anything but a trace object.

    Raises:
        ValueError: for another object.
    """
    if not isinstance(trace, TraceEstimator):
        raise ValueError(
            f"trace: got {trace!r}, expected a TraceEstimator such as ExactTrace() or "
            "Hutchinson(num_probes=4)"
        )
    return trace


def _normal(count: int, like: Tensor, noise: NoiseSource) -> Tensor:
    return noise.normal((count, *like.shape), like, event_dim=1)
