"""The contract every network keeps, over a table of networks."""

import copy
import math
import pickle

import pyro
import pytest
import torch

from pyro_diffusion.nn import (
    MLP,
    ConditionalMLP,
    DiT,
    LabelContext,
    SetTransformer,
    TensorContext,
    Transformer,
    UNet,
)
from pyro_diffusion.nn.embedding import with_waves
from pyro_diffusion.nn.transformer import _attention

ROWS = 4


def contexts():
    return {"label": LabelContext(3, 8, dropout=0.5), "type": TensorContext(5, 6, dropout=0.5)}


def context_values(rows=ROWS):
    return {"label": torch.arange(rows) % 3, "type": torch.randn(rows, 5)}


def mlp(**options):
    return MLP(3, **{"hidden": (16, 16, 24), "embedding": 12, **options})


def unet(**options):
    return UNet(2, **{"width": 8, **options})


def transformer(**options):
    return Transformer(5, 6, **{"width": 16, "depth": 2, "heads": 2, **options})


def dit(**options):
    return DiT(2, **{"width": 16, "depth": 2, "heads": 2, **options})


def sets(**options):
    return SetTransformer(3, **{"width": 16, "depth": 2, "heads": 2, **options})


FAMILIES = {
    "mlp": (
        mlp,
        (3,),
        [
            {},
            {"hidden": (8,)},
            {"hidden": (3, 3)},
            {"embedding": 7},
            {"frequencies": (1.0, 4.0)},
            {"norm": True},
            {"residual": True},
        ],
    ),
    "unet": (
        unet,
        (2, 8, 8),
        [
            {},
            {"attention": False},
            {"levels": (1,)},
            {"levels": (1, 2, 3)},
            {"levels": (2, 1), "blocks": 2},
            {"width": 40},
            {"width": 5},
            {"levels": (1, 2, 2), "attention": (0, 1)},
        ],
    ),
    "dit": (dit, (2, 4, 6), [{}, {"patch": 1}, {"depth": 1, "heads": 1}]),
    "sets": (sets, (5, 3), [{}, {"depth": 1, "heads": 1}, {"frequencies": (1.0, 2.0)}]),
    "transformer": (
        transformer,
        (6,),
        [{}, {"depth": 1, "heads": 1}, {"heads": 4}, {"relative": True}],
    ),
}
TABLE = [
    pytest.param(build, shape, options, outputs, id=f"{name}-{index}-{outputs}")
    for name, (build, shape, table) in FAMILIES.items()
    for index, options in enumerate(table)
    for outputs in (1, 2, 5)
]
ONE_EACH = [
    pytest.param(build, shape, id=name) for name, (build, shape, _table) in FAMILIES.items()
]


def data(shape, rows=ROWS, dtype=torch.float32):
    if shape == (6,):
        return torch.randint(5, (rows, *shape))
    return torch.randn(rows, *shape, dtype=dtype)


def awaken(network):
    """Replaces the zeros of a fresh network, so that its output depends on its input."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("build, shape, options, outputs", TABLE)
def test_shape_contract_and_zero_start(build, shape, options, outputs):
    network = build(outputs=outputs, context=contexts(), **options)
    x = data(shape)
    expected = x.shape if outputs == 1 else (*x.shape, outputs)
    out = network(x, torch.randn(ROWS), **context_values())
    assert network.outputs == outputs
    assert out.shape == expected
    assert (out == 0).all()
    awake = awaken(network)(x, torch.randn(ROWS), **context_values())
    assert awake.shape == expected
    assert awake.isfinite().all() and (awake != 0).any()


@pytest.mark.parametrize("build, shape", ONE_EACH)
@pytest.mark.parametrize("rows", [0, 1])
def test_small_batches(build, shape, rows):
    network = awaken(build(context=contexts()))
    assert network(data(shape, rows), torch.zeros(rows), **context_values(rows)).shape[0] == rows


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_float64(build, shape):
    network = awaken(build(context=contexts(), outputs=2).double().eval())
    x, level, values = data(shape, dtype=torch.float64), torch.randn(ROWS), context_values()
    out = network(x, level.double(), **values)
    assert out.dtype == torch.float64
    single = network.float()(x.float() if x.is_floating_point() else x, level, **values)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_bfloat16(build, shape):
    """Values to 2^-8 a layer of the float32 network's, and a gradient for every weight."""
    network = awaken(build(context=contexts(), outputs=2).eval())
    x, level, values = data(shape), torch.randn(ROWS), context_values()
    expected = network(x, level, **values)
    half = network.bfloat16()
    out = half(x.bfloat16() if x.is_floating_point() else x, level.bfloat16(), **values)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_compiles_into_one_graph(build, shape):
    """Contexts and dropout included; ``fullgraph`` is an error where the graph would break."""
    network = awaken(build(context=contexts(), dropout=0.1)).train()
    x, level, values = data(shape), torch.randn(ROWS), context_values()
    torch.manual_seed(1)
    expected = network(x, level, **values)
    torch.manual_seed(1)
    # torch's compiler switches the checks of torch.distributions off, for good
    with pyro.settings.context(validate_distributions_torch=True):
        network.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(network(x, level, **values), expected)
        torch.compiler.reset()


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_level_may_have_another_dtype_than_the_weights(build, shape):
    out = build()(data(shape), torch.zeros(ROWS, dtype=torch.float64))
    assert out.dtype == torch.float32


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_a_row_does_not_depend_on_its_batch(build, shape):
    network = awaken(build(context=contexts(), outputs=2).double().eval())
    x, level = data(shape, dtype=torch.float64), torch.randn(ROWS, dtype=torch.float64)
    values = context_values()
    together = network(x, level, **values)
    for row in range(ROWS):
        one = {name: value[row : row + 1] for name, value in values.items()}
        alone = network(x[row : row + 1], level[row : row + 1], **one)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_output_depends_on_level_and_context(build, shape):
    network = awaken(build(context=contexts()).eval())
    x, values = data(shape), context_values()
    base = network(x, torch.zeros(ROWS), **values)
    assert not torch.allclose(base, network(x, torch.ones(ROWS), **values))
    for name, value in values.items():
        changed = {**values, name: value.roll(1, 0)}
        assert not torch.allclose(base, network(x, torch.zeros(ROWS), **changed))


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_infinite_levels_are_finite(build, shape):
    network = awaken(build())
    level = torch.tensor([float("inf"), -float("inf"), 20.0, -20.0])
    x = data(shape, 1).expand(ROWS, *shape)
    out = network(x, level)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:2], out[2:])


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_gradients_reach_every_parameter(build, shape):
    network = awaken(build(context=contexts(), outputs=2))
    for module in network.conditioning.contexts:
        module.dropout = 0.5
    loss = 0.0
    for values in ({}, context_values()):
        x = data(shape)
        x.requires_grad_(x.is_floating_point())
        loss = loss + network(x, torch.randn(ROWS), **values).square().sum()
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
    assert x.grad is None or (x.grad.flatten(1) != 0).any(1).all()


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_a_fresh_network_starts_to_learn(build, shape):
    """The zero layers hold the signal back for a step or two, not for good."""
    network = build()
    x, level = data(shape), torch.randn(ROWS)
    target = torch.randn(network(x, level).shape)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(x, level) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_missing_context_is_the_null_context(build, shape):
    network = awaken(build(context=contexts()).eval())
    x, level, values = data(shape), torch.randn(ROWS), context_values()
    missing = network(x, level)
    torch.testing.assert_close(missing, network(x, level, label=None, type=None), rtol=0, atol=0)
    assert not torch.allclose(missing, network(x, level, **values))
    part = network(x, level, label=values["label"])
    torch.testing.assert_close(part, network(x, level, **{**values, "type": None}))


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_context_dropout_gives_the_null_context_in_training_only(build, shape):
    always = {"label": LabelContext(3, 8, dropout=1.0)}
    network = awaken(build(context=always))
    x, level, label = data(shape), torch.randn(ROWS), torch.arange(ROWS) % 3
    torch.testing.assert_close(network(x, level, label=label), network(x, level))
    network.eval()
    assert not torch.allclose(network(x, level, label=label), network(x, level))


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_dropout_in_training_only(build, shape):
    network = awaken(build(dropout=0.5))
    x, level = data(shape), torch.randn(ROWS)
    assert not torch.allclose(network(x, level), network(x, level))
    network.eval()
    torch.testing.assert_close(network(x, level), network(x, level), rtol=0, atol=0)


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_same_seed_same_network(build, shape):
    torch.manual_seed(3)
    first = build(context=contexts()).state_dict()
    torch.manual_seed(3)
    second = build(context=contexts()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_no_draw_when_there_is_nothing_to_drop(build, shape):
    network = build(context={"label": LabelContext(3, 8, dropout=0.0)})
    before = torch.get_rng_state()
    network(data(shape).clone(), torch.zeros(ROWS))
    values = torch.zeros(ROWS, dtype=torch.long)
    x = torch.zeros(ROWS, *shape, dtype=torch.long if shape == (6,) else torch.float32)
    after_data = torch.get_rng_state()
    network(x, torch.zeros(ROWS), label=values)
    assert torch.equal(after_data, torch.get_rng_state())
    assert not torch.equal(before, after_data)


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_one_level_of_all_rows(build, shape):
    network = build(context=contexts())
    for p in network.parameters():  # a fresh one returns zeros
        p.data = p.data + 0.1 * torch.randn_like(p)
    x, level = data(shape), torch.tensor(0.7)
    network.eval()  # of contexts, too, none are left out by chance
    for each in ({}, context_values()):
        torch.testing.assert_close(
            network(x, level, **each), network(x, level.expand(ROWS), **each)
        )


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_wrong_input_is_named(build, shape):
    network = build(context=contexts())
    x, level = data(shape), torch.zeros(ROWS)
    with pytest.raises(ValueError, match=r"x: got shape \(4, .*expected \(N, "):
        network(x.unsqueeze(1), level)
    with pytest.raises(ValueError, match="x: got"):
        network(x[..., :1], level)
    with pytest.raises(ValueError, match=r"log_snr: got shape \(1,\), expected \(4,\)"):
        network(x, level[:1])
    with pytest.raises(ValueError, match="context: got colour, expected label, type"):
        network(x, level, colour=level)
    with pytest.raises(ValueError, match=r"label: got 7, expected integers in \[0, 2\]"):
        network(x, level, label=torch.tensor([0, 1, 7, 2]))
    with pytest.raises(ValueError, match=r"label: got shape \(3,\), expected \(4, ...\)"):
        network(x, level, label=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"type.*got shape \(4, 2\), expected \(N, 5\)"):
        network(x, level, type=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="context: got label, expected no context"):
        build()(x, level, label=level)


@pytest.mark.parametrize(
    "build, options, message",
    [
        (MLP, {"event_size": 0}, "event_size: got 0, expected an integer >= 1"),
        (MLP, {"event_size": 2, "hidden": ()}, r"hidden: got \(\), expected"),
        (MLP, {"event_size": 2, "outputs": 0}, "outputs: got 0"),
        (MLP, {"event_size": 2, "embedding": 1}, "embedding: got 1"),
        (MLP, {"event_size": 2, "context": {"x": LabelContext(2, 2)}}, "context: got the name 'x'"),
        (MLP, {"event_size": 2, "context": {"a b": LabelContext(2, 2)}}, "got the name 'a b'"),
        (UNet, {"channels": 1, "width": 0}, "width: got 0"),
        (UNet, {"channels": 1, "levels": ()}, "levels: got"),
        (UNet, {"channels": 1, "blocks": 0}, "blocks: got 0"),
        (UNet, {"channels": 1, "attention": (2,)}, r"attention: got \(2,\), .*levels from 0 to 1"),
        (DiT, {"channels": 1, "patch": 0}, "patch: got 0"),
        (DiT, {"channels": 1, "width": 18, "heads": 2}, "width: got 18, .*multiple of 4"),
        (DiT, {"channels": 1, "width": 12, "heads": 5}, "width: got 12, .*heads=5"),
        (SetTransformer, {"event_size": 0}, "event_size: got 0"),
        (SetTransformer, {"event_size": 2, "frequencies": 3.0}, "frequencies: got 3.0"),
        (MLP, {"event_size": 2, "frequencies": (1.0, -2.0)}, "frequencies: got -2.0"),
        (Transformer, {"states": 2, "length": 0}, "length: got 0"),
        (
            Transformer,
            {"states": 2, "length": 3, "width": 9, "heads": 2},
            "width: got 9, .*heads=2",
        ),
        (
            Transformer,
            {"states": 2, "length": 3, "noise_level": False, "context": {"y": TensorContext(2, 2)}},
            "context: got y, expected none",
        ),
    ],
)
def test_wrong_options_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_everything_is_made_on_the_device_of_the_weights(build, shape):
    """The meta device stands in for a GPU: an operand left on the CPU is an error on both."""
    network = build(context={"type": TensorContext(5, 6, dropout=0.5)}, dropout=0.5).to("meta")
    x, level = data(shape).to("meta"), torch.zeros(ROWS, device="meta")
    for values in ({}, {"type": torch.zeros(ROWS, 5, device="meta")}):
        out = network(x, level, **values)
        assert out.device.type == "meta" and out.shape[: x.dim()] == x.shape


@pytest.mark.parametrize("build, shape", ONE_EACH)
def test_copies_and_pickles(build, shape):
    network = awaken(build(context=contexts()).eval())
    x, level, values = data(shape), torch.randn(ROWS), context_values()
    expected = network(x, level, **values)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other(x, level, **values), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm, residual", [(False, False), (True, False), (True, True)])
def test_mlp_formula(norm, residual):
    options = {"norm": norm, "residual": residual, "frequencies": (2.0,) if norm else ()}
    network = awaken(mlp(hidden=(4, 4, 6), **options).double())
    x, level = torch.randn(5, 3).double(), torch.randn(5).double()
    scales_shifts = network.modulation(network.conditioning(level, 5, {}))
    h = torch.cat([x, (2 * x).sin(), (2 * x).cos()], 1) if norm else x
    for i, (start, width) in enumerate([(0, 4), (8, 4), (16, 6)]):
        scale = scales_shifts[:, start : start + width]
        shift = scales_shifts[:, start + width : start + 2 * width]
        layer = network.layers[i]
        u = h @ layer.weight.T + layer.bias
        if norm:
            u = (u - u.mean(1, True)) / (u.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        u = u * (1 + scale) + shift
        u = u * u.sigmoid()
        if residual and i == 1:
            u = u @ network.blocks[1].weight.T + network.blocks[1].bias
        h = h + u if i == 1 else u
    expected = h @ network.last.weight.T + network.last.bias
    torch.testing.assert_close(network(x, level), expected)


def test_unet_sizes():
    network = awaken(UNet(1, width=8, levels=(1, 2, 2)))
    for height, width in ((8, 8), (8, 12), (16, 4), (28, 28)):
        x = torch.randn(2, 1, height, width)
        assert network(x, torch.zeros(2)).shape == x.shape
    fits = "multiples of 4: padded to 8 by 12 these fit, or cropped to 8 by 8$"
    with pytest.raises(ValueError, match=f"x: got images of 8 by 10, expected {fits}"):
        network(torch.zeros(2, 1, 8, 10), torch.zeros(2))
    with pytest.raises(ValueError, match=r"of 3 by 9, expected .* padded to 4 by 12 these fit$"):
        network(torch.zeros(2, 1, 3, 9), torch.zeros(2))


def test_unet_attends_where_it_is_told():
    """A pixel moves another that no convolution joins to it only where pixels attend to each other."""
    for attention, joined in (((), False), ((0,), True), ((1,), True), (True, True)):
        network = awaken(UNet(1, width=8, levels=(1, 1), attention=attention).double())
        far = network.last.weight.new_zeros(1, 1, 64, 4).requires_grad_()
        (gradient,) = torch.autograd.grad(network(far, far.new_zeros(1))[0, 0, 0, 0], far)
        groups = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert groups and network.attention == ((1,) if attention is True else attention)
        attends = any("project" in name for name, _ in network.named_parameters())
        assert attends == joined and gradient.isfinite().all()


def test_dit_cuts_images_into_patches():
    """A network of no blocks' effect: each patch depends on its own pixels and its place alone."""
    network = awaken(DiT(2, patch=2, width=16, depth=1, heads=2).double())
    for projection in (network.blocks[0].project_out, network.blocks[0].mlp[-1]):
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    x, level = torch.randn(1, 2, 4, 6).double(), torch.zeros(1).double()
    base = network(x, level)
    for row, column in ((0, 0), (1, 5), (3, 2)):
        changed = x.clone()
        changed[0, 1, row, column] += 1.0
        moved = (network(changed, level) - base)[0].abs() > 1e-9
        patch = torch.zeros(4, 6, dtype=torch.bool)
        top, left = row // 2 * 2, column // 2 * 2
        patch[top : top + 2, left : left + 2] = True
        assert (moved == patch).all()
    flat = network(torch.zeros_like(x), level)[0].unfold(1, 2, 2).unfold(2, 2, 2)
    assert (flat[:, 0, 0] - flat[:, 1, 0]).abs().max() > 1e-6  # places are told apart
    assert (flat[:, 0, 0] - flat[:, 0, 1]).abs().max() > 1e-6


def test_dit_sizes():
    network = awaken(DiT(1, patch=4, width=16, depth=1, heads=2))
    for height, width in ((8, 8), (4, 12), (28, 28)):
        x = torch.randn(2, 1, height, width)
        assert network(x, torch.zeros(2)).shape == x.shape
    with pytest.raises(ValueError, match=r"of 9 by 8, expected multiples of 4: padded to 12 by 8"):
        network(torch.zeros(2, 1, 9, 8), torch.zeros(2))


def test_sets_have_no_order_and_any_size():
    network = awaken(sets(outputs=2).double().eval())
    level = torch.zeros(2, dtype=torch.float64)
    for size in (1, 2, 7):
        x, order = torch.randn(2, size, 3).double(), torch.randperm(size)
        torch.testing.assert_close(network(x[:, order], level), network(x, level)[:, order])
    x = torch.randn(2, 4, 3).double()
    changed = x.clone()
    changed[:, 0] += 1.0
    assert ((network(changed, level) - network(x, level)).abs().amax((0, 2, 3)) > 1e-6).all()


def test_waves_are_sines_and_cosines():
    x = torch.tensor([[0.5, -1.0]])
    expected = [[0.5, -1.0]]
    for function in (math.sin, math.cos):
        expected[0] += [function(k * value) for k in (2.0, 3.0) for value in (0.5, -1.0)]
    torch.testing.assert_close(with_waves(x, (2.0, 3.0)), torch.tensor(expected))
    half = with_waves(x.bfloat16(), (2.0, 3.0))
    torch.testing.assert_close(half, torch.tensor(expected))
    assert with_waves(x, ()) is x


def test_weights_do_not_load_under_other_frequencies():
    """Nothing in their shapes would tell."""
    with pytest.raises(ValueError, match=r"frequencies: got \[1.0, 2.0\], expected \[1.0, 3.0\]"):
        mlp(frequencies=(1, 3)).load_state_dict(mlp(frequencies=(1, 2)).state_dict())


def test_unet_channels_and_outputs_do_not_mix():
    """Output k of channel c is output channel c * outputs + k of the last convolution."""
    network = UNet(2, width=8, outputs=3)
    with torch.no_grad():
        network.last.bias.copy_(torch.arange(6.0))
    out = network(torch.randn(1, 2, 8, 8), torch.zeros(1))
    expected = torch.arange(6.0).view(2, 1, 1, 3).expand(2, 8, 8, 3)
    torch.testing.assert_close(out[0], expected)


def test_transformer_tokens():
    network = awaken(Transformer(4, 6, width=16, depth=1, heads=2))
    x = torch.randint(4, (2, 6))
    expected = network(x, torch.zeros(2))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(network(x.to(dtype), torch.zeros(2)), expected)
    with pytest.raises(ValueError, match=r"x: got dtype torch.float32, expected integers"):
        network(x.float(), torch.zeros(2))


def test_transformer_sees_both_ways_and_knows_positions():
    network = awaken(Transformer(4, 6, width=16, depth=1, heads=2).double().eval())
    level = torch.zeros(1, dtype=torch.float64)
    x = torch.tensor([[0, 1, 2, 3, 0, 1]])
    base = network(x, level)
    for position in range(6):
        changed = x.clone()
        changed[0, position] = (changed[0, position] + 1) % 4
        moved = (network(changed, level) - base).abs().amax(-1)[0]
        assert (moved > 1e-8).all()
    same = network(torch.zeros_like(x), level)
    assert (same[0, 0] - same[0, 1]).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("relative", [False, True])
def test_causal_transformer_sees_itself_and_what_is_before(relative, dtype):
    options = {"width": 16, "depth": 2, "heads": 2, "relative": relative, "causal": True}
    network = awaken(Transformer(4, 6, **options).to(dtype).eval())
    level, x = torch.zeros(1, dtype=dtype), torch.tensor([[0, 1, 2, 3, 0, 1]])
    base = network(x, level)
    for position in range(6):
        changed = x.clone()
        changed[0, position] = (changed[0, position] + 1) % 4
        moved = (network(changed, level) - base).abs().amax(-1)[0]
        assert (moved[:position] == 0).all() and (moved[position:] > 0).all()


def test_relative_positions_are_distances():
    """Heads that attend to neighbours alone: the logits depend on a symbol and its neighbours, no more."""
    network = awaken(Transformer(4, 8, width=16, depth=1, heads=2, relative=True).double().eval())
    with torch.no_grad():
        network.positions[:, :6] = -torch.inf  # i - j from -7 to -2
        network.positions[:, 9:] = -torch.inf
    x = torch.tensor([[3, 0, 1, 2, 2, 0, 1, 2]])
    out = network(x, torch.zeros(1, dtype=torch.float64))[0]
    torch.testing.assert_close(out[2], out[6])  # both within 0 1 2
    assert (out[3] - out[4]).abs().max() > 1e-6  # within 1 2 2 and 2 2 0: left is not right
    assert (out[1] - out[5]).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_by_every_path(dtype):
    """Fused or not, against the formula in float64; 2^-8 relative rounding of half precision."""
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    bias = torch.randn(4, 6, 6, dtype=torch.float64)
    for added in (None, bias):
        logits = query @ key.mT / 8**0.5 + (0.0 if added is None else added)
        expected = logits.softmax(-1) @ value
        given = [v.to(dtype) for v in (query, key, value)]
        out = _attention(*given, None if added is None else added.to(dtype), 0.0)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_transformer_without_a_noise_level():
    network = awaken(Transformer(4, 6, width=16, depth=2, heads=2, noise_level=False).eval())
    x = torch.randint(4, (3, 6))
    one, other = network(x, torch.zeros(3)), network(x, torch.full((3,), 5.0))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not any("modulation" in name for name in network.state_dict())
    with pytest.raises(ValueError, match="context: got y, expected no context"):
        network(x, torch.zeros(3), y=torch.zeros(3, 2))


def test_conditional_mlp():
    """Zeros when fresh; rows apart; each input counts; bad shapes are named."""
    network = ConditionalMLP(2, 3, width=8, depth=2, frequencies=(1.0, 2.0))
    x, level, y = torch.randn(4, 2), torch.randn(4), torch.randn(4, 3)
    assert not network(x, level, y).any()
    awaken(network)
    out = network(x, level, y)
    assert out.shape == (4, 2)
    assert torch.allclose(network(x[1:2], level[1:2], y[1:2]), out[1:2], atol=1e-6)
    assert not torch.allclose(network(-x, level, y), out)
    assert not torch.allclose(network(x, -level, y), out)
    assert not torch.allclose(network(x, level, -y), out)
    for wrong, message in (
        ((x[:, :1], level, y), r"x: got shape \(4, 1\), expected \(N, 2\)"),
        ((x, level, y[:, :1]), r"y: got shape \(4, 1\), expected \(N, 3\)"),
        ((x, level[:3], y), "x, log_snr, y: got 4, "),
    ):
        with pytest.raises(ValueError, match=message):
            network(*wrong)
    with pytest.raises(ValueError, match="context_size: got 0"):
        ConditionalMLP(2, 0)


def conditional_mlp():
    return ConditionalMLP(3, 2, width=16, depth=2)


@pytest.mark.parametrize(
    "build, shape, context",
    [
        *(
            pytest.param(*each.values, context, id=f"{each.id}-{context}")
            for each in ONE_EACH
            for context in (0, 1)
        ),
        pytest.param(conditional_mlp, (3,), 1, id="conditional"),
    ],
)
def test_one_level_is_embedded_once(build, shape, context):
    """And says what the same level of every row says, in values and gradients, unless it has one itself."""
    conditional = build is conditional_mlp
    options = {} if conditional or not context else {"context": contexts()}
    network = awaken(build(**options).double().eval())
    values = context_values() if context else {}
    if conditional:
        values = {"y": torch.randn(ROWS, 2, dtype=torch.float64)}
    rows = []
    first = network.level if conditional else network.conditioning.level_in
    first.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    x = data(shape, dtype=torch.float64)
    results = []
    level = torch.tensor(0.7, dtype=torch.float64).expand(ROWS)
    for own in (level, level.clone()):
        network.zero_grad()
        out = network(x, own, **values)
        out.square().sum().backward()
        grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        results.append([out.detach(), *grads])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    slopes = []
    for own in (level.detach().requires_grad_(), level.clone().requires_grad_()):
        slopes += torch.autograd.grad(network(x, own, **values).square().sum(), own)
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
    assert rows == [1, ROWS, ROWS, ROWS]
