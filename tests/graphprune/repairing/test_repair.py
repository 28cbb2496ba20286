"""Repair: exact where nothing was lost, better than slicing where something was, and honest norms."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.operators import Convolution
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts, join
from graphprune.cutting.exported import cut_program
from graphprune.cutting.surgery import perform
from graphprune.registry import pattern
from graphprune.repairing import repair as module
from graphprune.repairing.calibration import features_of, positions_of
from graphprune.repairing.repair import Effort, Reference, least_squares, make_reference, repair, sampled
from tests.graphprune.networks import Literal, OptionA, SwiGlu, Tied, conv_bn, tokens
from tests.graphprune.oracle import scramble
from tests.graphprune.tiny import fitted, images


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=4, num_classes=5)


def pictures(size: int, count: int = 48) -> Tensor:
    """Smooth random images: neighbouring pixels are alike, as in real ones."""
    coarse = torch.randn(count, 3, size // 2, size // 2, generator=torch.Generator().manual_seed(3))
    fine = 0.3 * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(4))
    return functional.interpolate(coarse, size=(size, size), mode="bilinear") + fine


def many_tokens(count: int = 64) -> Tensor:
    basis = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    return torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(4)) @ basis


def grouped() -> nn.Module:
    layers = [conv_bn(3, 16), conv_bn(16, 16, groups=16), conv_bn(16, 16, groups=2), nn.Conv2d(16, 5, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv": (fitted, lambda: images(64, 1)[0]),
    "residual": (OptionA, lambda: pictures(8)),
    "grouped": (grouped, lambda: pictures(8)),
    "vit": (vit, lambda: pictures(32)),
    "swiglu": (lambda: SwiGlu(packed=True), many_tokens),
    "literal": (Literal, lambda: pictures(8)),
}
Built = tuple[nn.Module, ModelGraph, Tensor, Reference]


@cache
def built(name: str) -> Built:
    """A network with random weights, its graph, its images and what it computes on them."""
    build, data = CASES[name]
    torch.manual_seed(0)
    model, x = build(), data()
    if name != "conv":
        scramble(model, dtype=torch.float32)
    graph = trace(model, x[:2])
    return model.eval(), graph, x, make_reference(graph, [x])


def half(graph: ModelGraph, kinds: tuple[str, ...] = ("channels", "heads", "hidden", "kernel")) -> Cuts:
    """Every second unit of every site of these kinds, and the first two columns of every 3x3 kernel."""
    cuts = []
    for site in graph.all_sites:
        if site.kind == "kernel" and site.kind in kinds and site.size == 9:
            cuts.append(pattern("kernel").rewrite(site, (0, 1, 3, 4, 6, 7)))
        elif site.kind not in ("kernel", "block") and site.kind in kinds:
            cuts.append(Cuts(keep={site.atom: np.arange(0, site.size, 2)}))
    return join(*cuts)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def distance(got: Tensor, expected: Tensor) -> float:
    """Root mean squared difference as a share of the spread of what is expected."""
    return float((got - expected).norm() / (expected - expected.mean(0)).norm())


# --- nothing lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_a_cut_of_nothing_changes_nothing(name: str) -> None:
    model, graph, _, reference = built(name)
    whole = Cuts(
        keep={site.atom: np.arange(site.size) for site in graph.all_sites if site.kind not in ("kernel", "block")}
    )
    for cuts in (Cuts(), whole):
        pruned = copy.deepcopy(model)
        repair(pruned, model, graph, cuts, reference)
        state = pruned.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_before_the_first_cut_stay_as_they_are() -> None:
    model, graph, _, reference = built("residual")
    site = next(site for site in graph.all_sites if site.name == "three.0/kernel")
    cuts = pattern("kernel").rewrite(site, (3, 4, 5))
    pruned = perform(model, graph, cuts).model
    repair(pruned, model, graph, cuts, reference)
    before, after = model.state_dict(), pruned.state_dict()
    for name, value in before.items():
        earlier = name.split(".")[0] in ("stem", "one", "two")
        solved = ("0.weight", "running_mean", "running_var", "head.weight", "head.bias")
        assert torch.equal(value, after[name]) == (earlier or not name.endswith(solved)), name


def duplicated(bias: bool) -> nn.Module:
    """Channels 0 to 7 of the middle layer are computed twice: 8 to 15 are copies of them, read with other weights."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.Conv2d(16, 6, 3, padding=1, bias=bias)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    with torch.no_grad():
        for value in first.parameters():
            value[8:] = value[:8]
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
def test_redundant_channels_cost_nothing_once_repaired(bias: bool) -> None:
    model, x = duplicated(bias), pictures(8, 96)
    graph = trace(model, x[:2])
    site = next(site for site in graph.all_sites if site.size == 16)
    cuts = Cuts(keep={site.atom: np.array([0, 1, 10, 3, 12, 5, 6, 15]).astype(np.int64)})
    cuts = Cuts(keep={site.atom: np.sort(cuts.keep[site.atom])})
    pruned = perform(model, graph, cuts).model
    sliced = distance(outputs(pruned, x), outputs(model, x))
    repair(pruned, model, graph, cuts, make_reference(graph, [x]))
    assert sliced > 0.3
    assert distance(outputs(pruned, x), outputs(model, x)) < 1e-2
    assert distance(outputs(pruned, x + 0.1), outputs(model, x + 0.1)) < 2e-2, "other images too"


# --- something lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_repaired_is_nearer_to_the_dense_model_than_sliced(name: str) -> None:
    model, graph, x, reference = built(name)
    cuts = half(graph)
    operation = perform(model, graph, cuts)
    assert operation.own_class == (name != "literal")
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = operation.model
    sliced = distance(outputs(pruned, x), outputs(model, x))
    repair(pruned, model, graph, cuts, reference)
    repaired = distance(outputs(pruned, x), outputs(model, x))
    assert repaired < 0.7 * sliced
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


def test_own_class_and_exported_graph_are_repaired_alike() -> None:
    model, graph, x, reference = built("vit")
    cuts = half(graph)
    own, exported = perform(model, graph, cuts).model, cut_program(graph, cuts, model)
    for pruned in (own, exported):
        repair(pruned, model, graph, cuts, reference)
    assert type(own) is type(model)
    assert torch.allclose(outputs(own, x), outputs(exported, x), rtol=0, atol=1e-4)
    names = {layer.weight for layer in graph.layers if layer.weight}
    assert names
    assert all(torch.equal(own.state_dict()[name], exported.state_dict()[name]) for name in names)


def test_tied_weights_are_not_made_worse() -> None:
    torch.manual_seed(0)
    model = scramble(Tied(), dtype=torch.float32)
    x = many_tokens()
    graph = trace(model, x[:2])
    sites = [site for site in graph.all_sites if site.kind not in ("kernel", "block")]
    assert sites
    cuts = join(*(Cuts(keep={site.atom: np.arange(site.size - 2)}) for site in sites))
    pruned = perform(model, graph, cuts).model
    sliced = distance(outputs(pruned, x), outputs(model, x))
    repair(pruned, model, graph, cuts, make_reference(graph, [x]))
    assert distance(outputs(pruned, x), outputs(model, x)) < sliced
    assert pruned.one.weight is pruned.two.weight


def test_every_layer_is_solved_on_what_the_pruned_model_gives_it() -> None:
    """The normal equations hold at every layer, for inputs taken from the repaired model itself."""
    model, graph, x, reference = built("conv")
    cuts = half(graph)
    pruned = perform(model, graph, cuts).model
    start = copy.deepcopy(pruned)
    repair(pruned, model, graph, cuts, reference)
    (kept,) = [
        keep for atom, keep in cuts.keep.items() if graph.atom_sizes[atom] == 32 and _produced_by(graph, atom, 1)
    ]
    inputs: list[Tensor] = []
    pruned.train()  # repair normalises with the images at hand, as training does
    for norm in (layer for layer in pruned.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = 0.0
    pruned[1][0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    dense_outputs = model[:1](x)
    with torch.no_grad():
        pruned(x)
        target = model[1][0](dense_outputs)[:, kept].flatten(2).transpose(1, 2).reshape(-1, len(kept)).double()
    columns = functional.unfold(functional.pad(inputs[0], _ends(pruned[1][0])), pruned[1][0].kernel_size, stride=2)
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1]).double()
    rows, target = rows - rows.mean(0), target - target.mean(0)
    weight, sliced = (net[1][0].weight.flatten(1).double() for net in (pruned, start))
    gram = rows.T @ rows
    pull = module.PULL * gram.diagonal().mean()
    gradient = (weight @ gram - target.T @ rows) + pull * (weight - sliced)
    assert gradient.abs().max() < 1e-4 * (target.T @ rows).abs().max()


def _produced_by(graph: ModelGraph, atom: int, number: int) -> bool:
    convolutions = [layer for layer in graph.layers if layer.module.endswith(".0")]
    return atom in convolutions[number].outputs.atoms()


def _ends(conv: nn.Module) -> tuple[int, ...]:
    return tuple(conv.ends)  # type: ignore[arg-type, return-value]


# --- batch norms ----------------------------------------------------------------------------------------------------


def test_norms_hold_the_statistics_of_the_pruned_model_and_keep_their_settings() -> None:
    model, graph, x, reference = built("residual")
    for number, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.1 + 0.01 * number
    cuts = half(graph)
    pruned = perform(model, graph, cuts).model
    settings = [(m.training, getattr(m, "momentum", None)) for m in pruned.modules()]
    repair(pruned, model, graph, cuts, reference)
    assert [(m.training, getattr(m, "momentum", None)) for m in pruned.modules()] == settings
    seen: dict[str, Tensor] = {}
    checked = 0
    for name, norm in pruned.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
    stored = {key: value.clone() for key, value in pruned.state_dict().items()}
    with torch.no_grad():
        pruned.train()(x)  # in training mode every norm passes on what it did while repair looked
    for name, value in seen.items():
        mean, variance = value.mean((0, 2, 3)), value.transpose(0, 1).flatten(1).var(1)
        assert torch.allclose(stored[f"{name}.running_mean"], mean, rtol=1e-3, atol=1e-4), name
        assert torch.allclose(stored[f"{name}.running_var"], variance, rtol=1e-3, atol=1e-5), name
        checked += 1
    assert checked == 5


def test_mode_and_counters_of_the_dense_model_stay() -> None:
    model, graph, _, reference = built("residual")
    cuts = half(graph)
    pruned = perform(model, graph, cuts).model.train()
    repair(pruned, model, graph, cuts, reference)
    assert pruned.training
    assert not model.training
    assert pruned.stem[1].num_batches_tracked == model.stem[1].num_batches_tracked


# --- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_holds_dense_outputs_at_its_positions() -> None:
    model, graph, x, _ = built("residual")
    reference = make_reference(graph, [x[:30], x[30:]], Effort(48, 48 * 5))
    assert torch.equal(reference.images, x)
    outputs_seen: dict[str, Tensor] = {}
    watched = copy.deepcopy(model)  # other tests share the model itself
    for name, layer in watched.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(lambda _, __, out, name=name: outputs_seen.update({name: out}))
    outputs(watched, x)
    for layer in graph.layers:
        got, dense = reference.outputs[layer.node], outputs_seen[layer.module]
        positions = reference.positions[layer.node]
        flat = dense.flatten(2) if dense.dim() == 4 else dense[:, :, None]
        expected = torch.stack([flat[n, :, p] for n in range(len(x)) for p in positions])
        assert len(positions) == min(5, flat.shape[-1])
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)


def test_few_images_of_large_models_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, x, _ = built("residual")
    assert torch.equal(make_reference(graph, [x[:16], x[16:]], Effort(20, 400)).images, x[:20])
    monkeypatch.setattr(module, "USUAL_ACTIVATION", 8 * 32)  # the largest activation is 8 channels of 8 x 8
    assert len(make_reference(graph, [x], Effort(24, 400)).images) == 12
    assert len(make_reference(graph, [x[:5]], Effort(24, 400)).images) == 5


def test_as_many_rows_as_asked_for_and_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, x, _ = built("conv")
    layers = [layer for layer in graph.layers if layer.weight]
    spatial = [layer.node for layer in layers if isinstance(layer.operator, Convolution)]
    outputs = make_reference(graph, [x], Effort(20, 400)).outputs
    assert [len(outputs[node]) for node in spatial] == [400] * len(spatial)
    monkeypatch.setattr(module, "LARGEST_REFERENCE", 100 * sum(layer.outputs.size for layer in layers))
    outputs = make_reference(graph, [x], Effort(20, 400)).outputs
    assert [len(outputs[node]) for node in spatial] == [100] * len(spatial)
    monkeypatch.setattr(module, "LARGEST_INPUTS", 60 * max(map(features_of, layers)))
    outputs = make_reference(graph, [x], Effort(20, 400)).outputs
    assert [len(outputs[node]) for node in spatial] == [60] * len(spatial)


def test_sampled_rows_are_images_by_positions() -> None:
    value = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    positions = torch.tensor([7, 0])
    expected = [value[n, :, p // 5, p % 5] for n in range(2) for p in (7, 0)]
    assert torch.equal(sampled(value, False, positions), torch.stack(expected))
    rows = value.reshape(2, 12, 5)
    assert torch.equal(sampled(rows, True, positions), torch.stack([rows[n, p] for n in range(2) for p in (7, 0)]))


# --- least squares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("pull", [module.PULL, 0.5])
def test_least_squares_against_numpy(centred: bool, pull: float) -> None:
    """The pull is more rows of data: sqrt(pull) times the identity, whose targets are the weights to start from."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 300, 6, generator=generator, dtype=torch.float64) + 1
    targets = torch.randn(2, 300, 3, generator=generator, dtype=torch.float64) + inputs[..., :3]
    start = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    best, shift = least_squares(inputs, targets, start, centred, pull)
    for group in range(2):
        x, y = inputs[group].numpy(), targets[group].numpy()
        mean_x, mean_y = (x.mean(0), y.mean(0)) if centred else (np.zeros(6), np.zeros(3))
        x, y = x - mean_x, y - mean_y
        strength = pull * np.square(x).sum(0).mean()
        rows = np.concatenate([x, np.sqrt(strength) * np.eye(6)])
        wanted = np.concatenate([y, np.sqrt(strength) * start[group].numpy().T])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
        assert np.allclose(best[group], expected, rtol=0, atol=1e-8)
        assert np.allclose(shift[group], mean_y - expected @ mean_x, rtol=0, atol=1e-8)


def test_without_data_the_start_stays() -> None:
    start = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    best, shift = least_squares(torch.zeros(1, 10, 4), torch.zeros(1, 10, 3), start, True)
    assert torch.allclose(best, start)
    assert not shift.any()


def test_positions_fit_linear_layers_after_pooling() -> None:
    _, graph, _, reference = built("conv")
    linear = graph.layers[-1]
    assert reference.positions[linear.node].tolist() == [0]
    assert positions_of(linear, 3, torch.Generator()).tolist() == [0]
    assert tokens()[0].shape[1] == 5
