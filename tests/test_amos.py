"""Amos: steps computed by hand, its state, and its use under SVI."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_diffusion.optim import Amos, JointOptim
from pyro_diffusion.optim.amos import typical_scale

F64 = torch.float64
GRADIENTS = ([3.0, 4.0], [-1.0, 2.0], [0.5, 0.0])


def steps_of(weight, gradients, **options):
    """Weights after each step under given gradients."""
    weight = torch.tensor(weight, dtype=F64, requires_grad=True)
    optimizer, out = Amos([weight], **options), []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=F64)
        optimizer.step()
        out.append(weight.detach().clone())
    return out, optimizer.state[weight]


def test_the_first_two_steps_by_hand():
    """xi = .1, eta = .5, beta = .9: the corrected second moment is the mean square of 12.5 in both steps."""
    (first, second), state = steps_of(
        [1.0, -2.0], [[3.0, 4.0], [4.0, 3.0]], lr=0.1, scale=0.5, beta=0.9
    )
    # gamma = .01; theta - .005 theta - .05 g / sqrt(12.5)
    root = math.sqrt(12.5)
    expected = [0.995 - 0.05 * 3 / root, -1.99 - 0.05 * 4 / root]
    torch.testing.assert_close(first, torch.tensor(expected, dtype=F64))
    # b = .01: c = (1 + .25 * sqrt(.1) * .01)^(-1/2), d = 1 / (1 + .25 * sqrt(.05) * .01)
    gamma = 0.01 / math.sqrt(1 + 0.25 * math.sqrt(0.1) * 0.01)
    d = 1 / (1 + 0.25 * math.sqrt(0.05) * 0.01)
    expected = [
        x - d * (0.5 * gamma * x + 0.05 * g / root) for x, g in zip(expected, (4, 3), strict=True)
    ]
    torch.testing.assert_close(second, torch.tensor(expected, dtype=F64))
    assert float(state["b"]) == pytest.approx(0.01 + gamma * 1.01)


def test_later_steps_are_the_published_recursion():
    """In plain numbers, with gradients of unequal size and a decay that is felt."""
    weights, v, b, xi, eta, beta = [1.0, -2.0], 0.0, 0.0, 0.8, 0.3, 0.95
    found, state = steps_of(weights, GRADIENTS * 5, lr=xi, scale=eta, beta=beta)
    for t, (gradient, after) in enumerate(zip(GRADIENTS * 5, found, strict=True), start=1):
        square = sum(g * g for g in gradient) / 2
        v = beta * v + (1 - beta) * square
        hat = v / (1 - beta**t)
        gamma = (1 + xi**0.5 * b / 4) ** -0.5 * xi**2 * square / hat
        d = 1 / (1 + (xi * eta) ** 0.5 * b / 4)
        weights = [
            w - d * (gamma * w / 2 + xi * eta * g / hat**0.5)
            for w, g in zip(weights, gradient, strict=True)
        ]
        b += gamma * (1 + b)
        torch.testing.assert_close(after, torch.tensor(weights, dtype=F64))
    assert float(state["b"]) == pytest.approx(b) and b > 1


def test_without_memory_every_gradient_has_length_one():
    """beta = 0: v is the gradient's own mean square, so a step is that of its sign, whatever its size."""
    found, _ = steps_of([0.0], [[7.0], [-0.01]], lr=0.1, scale=0.5, beta=0.0)
    assert float(found[0]) == pytest.approx(-0.05)
    d, gamma = (
        1 / (1 + 0.25 * math.sqrt(0.05) * 0.01),
        0.01 / math.sqrt(1 + 0.25 * math.sqrt(0.1) * 0.01),
    )
    assert float(found[1]) == pytest.approx(-0.05 * (1 - d * gamma / 2) + d * 0.05)


@pytest.mark.parametrize("per_output", [False, True])
def test_momentum_averages_the_steps(per_output):
    """m = .9 m + .1 delta from zero, delta that of the recursion at the weights reached, in plain numbers."""
    xi, eta, beta, weights = 0.4, 0.5, 0.9, [[1.0, -2.0], [0.5, 3.0]]
    gradients = [
        [[3.0, 4.0], [0.1, -0.2]],
        [[-1.0, 2.0], [0.3, 0.1]],
        [[0.5, 0.0], [-0.1, 0.4]],
    ] * 3
    options = {"lr": xi, "scale": eta, "beta": beta, "momentum": 0.9, "per_output": per_output}
    found, state = steps_of(weights, gradients, **options)
    groups = [[0], [1]] if per_output else [[0, 1]]
    v, b = [0.0] * len(groups), [0.0] * len(groups)
    m = [[0.0, 0.0], [0.0, 0.0]]
    for t, (gradient, after) in enumerate(zip(gradients, found, strict=True), start=1):
        for k, rows in enumerate(groups):
            square = sum(g * g for i in rows for g in gradient[i]) / (2 * len(rows))
            v[k] = beta * v[k] + (1 - beta) * square
            hat = v[k] / (1 - beta**t)
            gamma = (1 + xi**0.5 * b[k] / 4) ** -0.5 * xi**2 * square / hat
            d = 1 / (1 + (xi * eta) ** 0.5 * b[k] / 4)
            for i in rows:
                for j in range(2):
                    delta = d * (gamma * weights[i][j] / 2 + xi * eta * gradient[i][j] / hat**0.5)
                    m[i][j] = 0.9 * m[i][j] + 0.1 * delta
                    weights[i][j] -= m[i][j]
            b[k] += gamma * (1 + b[k])
        torch.testing.assert_close(after, torch.tensor(weights, dtype=F64))
    assert state["b"].flatten().tolist() == pytest.approx(b) and min(b) > 0.1


def test_an_output_of_its_own_does_not_mind_the_others():
    """Gradients of one row a thousand times larger leave the other row's step as it was."""
    small, large = [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3e3, 4e3]]
    options = {"lr": 0.1, "scale": 0.5, "per_output": True}
    (one,), _ = steps_of([[0.0, 0.0], [0.0, 0.0]], [small], **options)
    (two,), _ = steps_of([[0.0, 0.0], [0.0, 0.0]], [large], **options)
    torch.testing.assert_close(one, two)
    (whole,), _ = steps_of([[0.0, 0.0], [0.0, 0.0]], [large], lr=0.1, scale=0.5)
    assert abs(float(whole[0, 0])) < 0.01 * abs(float(one[0, 0]))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def test_state_is_three_numbers_a_tensor():
    def numbers(kind, **options):
        net = network()
        optimizer = kind(net.parameters(), lr=0.1, **options)
        net(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        return sum(x.numel() for state in optimizer.state.values() for x in state.values())

    tensors = len(list(network().parameters()))
    weights = sum(p.numel() for p in network().parameters())
    outputs = 16 + 1 + 1 + 1  # those of weights, and a number each for the two vectors
    assert numbers(Amos) == 3 * tensors
    assert numbers(Amos, momentum=0.9, per_output=True) == weights + tensors + 2 * outputs
    assert numbers(torch.optim.AdamW) == 2 * weights + tensors


def test_scales_by_shape_and_by_group():
    assert typical_scale(torch.zeros(3, 16)) == 0.25
    assert typical_scale(torch.zeros(5, 4, 2, 2)) == 0.25
    assert typical_scale(torch.zeros(7)) == typical_scale(torch.zeros(())) == 0.5
    pair = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    for x in pair:
        x.grad = torch.ones(2)
    groups = [
        {"params": pair[:1]},
        {"params": pair[1:2], "scale": 0.2},
        {"params": pair[2:], "lr": 0.3},
    ]
    Amos(groups, lr=0.1, scale=2.0).step()
    moved = [-float(x.detach()[0]) for x in pair]
    assert moved == pytest.approx([0.1 * 2, 0.1 * 0.2, 0.3 * 2])


def test_no_gradient_no_step():
    weights, state = steps_of([1.0, -2.0], [[0.0, 0.0]], lr=0.1)
    assert weights[0].tolist() == [1.0, -2.0] and state["b"] == 0
    weight = torch.ones(2, requires_grad=True)
    optimizer = Amos([weight], lr=0.1)
    optimizer.step()
    assert not optimizer.state and optimizer.step(lambda: torch.tensor(3.0)) == 3


def fit(optim, steps, net=None):
    net = net or network()
    torch.manual_seed(1)
    x = torch.randn(64, 8)
    y = x[:, :1].sin()

    def model():
        pyro.module("net", net)
        pyro.sample("y", pyro.distributions.Normal(net(x), 0.5).to_event(2), obs=y)

    svi = SVI(model, lambda: None, optim, Trace_ELBO())
    return net, [svi.step() for _ in range(steps)]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "per_output": True}])
def test_it_trains_under_svi_and_goes_on_from_a_file(tmp_path, options):
    def make():
        return JointOptim(Amos, {"lr": 0.1, **options})

    whole, losses = fit(make(), 60)
    assert losses[-1] < losses[0] - 20
    pyro.clear_param_store()
    first = make()
    half, _ = fit(first, 30)
    first.save(str(tmp_path / "amos.safetensors"))
    second = make()
    second.load(str(tmp_path / "amos.safetensors"))
    fit(second, 30, half)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_half_precision_weights_have_a_state_of_single(momentum):
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    weight.sum().backward()
    optimizer = Amos([weight], lr=0.5, momentum=momentum)
    optimizer.step()
    assert optimizer.state[weight]["v"].dtype == torch.float32
    assert weight.dtype == torch.bfloat16 and weight.isfinite().all() and (weight < 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"^lr: got 0\.0, expected a finite number > 0"),
        ({"lr": 0.1, "beta": 1.0}, r"^beta: got 1\.0, expected a number in \[0, 1\)"),
        ({"lr": 0.1, "momentum": 1.0}, r"^momentum: got 1\.0, expected a number in \[0, 1\)"),
        ({"lr": 0.1, "scale": -1.0}, r"^scale: got -1\.0"),
        ({"lr": 0.1, "eps": 0.0}, r"^eps: got 0\.0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Amos([torch.ones(2, requires_grad=True)], **options)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"^params: got one with a sparse gradient"):
        Amos(table.parameters(), lr=0.1).step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_decay_below_the_rounding_of_one_is_kept(momentum):
    """Rate 1e-4: weights in single precision shrink by 1e-5 in 2000 steps, as those in double do."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.ones(1000, dtype=dtype, requires_grad=True) for dtype in (torch.float32, F64))
    optimizers = [Amos([weight], lr=1e-4, momentum=momentum) for weight in (one, two)]
    for _ in range(2000):
        two.grad = torch.randn(1000, dtype=F64, generator=generator)
        one.grad = two.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert abs(float((one.detach() - two.detach()).mean())) < 1e-6
