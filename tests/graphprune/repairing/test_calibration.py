"""Moments against a brute-force unfold of what enters each layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.coupling.graph import Layer, ModelGraph
from graphprune.coupling.operators import Convolution, Linear
from graphprune.coupling.tracing import trace
from graphprune.cutting.window import windowed
from graphprune.repairing import calibration
from graphprune.repairing.calibration import (
    Moments,
    by_channel,
    by_tap,
    calibrate,
    gram,
    largest_activation,
    positions_of,
    vectors,
)
from graphprune.repairing.compensation import score_error
from tests.graphprune.networks import Attention, conv_bn, tokens
from tests.graphprune.oracle import scramble
from tests.graphprune.random_networks import ChannelAttention, GroupedQueries

CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "grouped": lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "strided": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "all at once": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(2, 1), dilation=(2, 1), groups=2),
    "pointwise": lambda: nn.Conv2d(3, 4, 1),
}


def batches(channels: int, sizes: tuple[int, ...] = (3, 2), height: int = 7, width: int = 8) -> list[Tensor]:
    """Batches of different lengths, correlated and not centred."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    noise = [torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64) for n in sizes]
    return [torch.einsum("nchw,dc->ndhw", x, mix) + 0.5 for x in noise]


def unfolded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs of every output position: [groups, images * positions, features]."""
    columns = functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    images, _, count = columns.shape
    split = columns.reshape(images, conv.groups, -1, count)
    return split.permute(1, 0, 3, 2).reshape(conv.groups, images * count, -1)


def only_moments(model: nn.Module, data: list[Tensor]) -> tuple[ModelGraph, Moments]:
    graph = trace(model, data[0])
    (moments,) = calibrate(graph, data).values()
    return graph, moments


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    torch.manual_seed(0)
    conv = CONVOLUTIONS[name]().double()
    data = batches(conv.in_channels)
    _, moments = only_moments(conv, data)
    rows = torch.cat([unfolded(conv, x) for x in data], 1)
    assert torch.allclose(moments.second, rows.mT @ rows / rows.shape[1], rtol=0, atol=1e-11)
    assert torch.allclose(moments.mean, rows.mean(1), rtol=0, atol=1e-12)
    assert torch.equal(moments.weight, conv.weight.detach().reshape(conv.groups, -1, rows.shape[-1]))
    outputs = torch.einsum("gof,grf->gro", moments.weight, rows)
    variance = outputs.var(1, correction=0).sum().item()
    assert moments.energy == pytest.approx(variance, rel=1e-10), "a bias makes the mean free"


def test_linear_on_tokens_without_a_bias() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7, bias=False).double()
    data = [tokens()[0].double() + 1, tokens()[0][:1].double()]
    _, moments = only_moments(linear, data)
    rows = torch.cat([x.reshape(-1, 12) for x in data])
    assert torch.allclose(moments.second[0], rows.T @ rows / len(rows), rtol=0, atol=1e-12)
    assert torch.allclose(moments.mean[0], rows.mean(0), rtol=0, atol=1e-12)
    assert moments.energy == pytest.approx(linear(rows).square().sum(1).mean().item(), rel=1e-10)
    assert torch.equal(moments.matrix, moments.second)


def test_every_layer_of_a_network_sees_its_own_inputs() -> None:
    model = scramble(Attention(True, True))
    x = tokens()[0].double()
    seen: dict[str, Tensor] = {}
    graph = trace(model, x)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
    with torch.no_grad():
        model(x)
    statistics = calibrate(graph, [x])
    layers = {layer.module: layer for layer in graph.layers if layer.weight}
    assert set(layers) == set(seen) >= {"weights.qkv", "proj", "head"}
    for name, layer in layers.items():
        rows = seen[name].reshape(-1, seen[name].shape[-1])
        assert torch.allclose(statistics[layer.node].second[0], rows.T @ rows / len(rows), rtol=0, atol=1e-10)


def test_batches_add_up_and_progress_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*conv_bn(3, 4), nn.Conv2d(4, 5, 1)).double().eval()
    data = batches(3, (1, 4, 2))
    graph = trace(model, data[1])
    seen: list[tuple[int, int]] = []
    apart = calibrate(graph, data, lambda done, total: seen.append((done, total)))
    together = calibrate(graph, [torch.cat(data)])
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert list(apart) == list(together)
    assert len(apart) == 2
    for name, moments in apart.items():
        assert torch.allclose(moments.second, together[name].second, rtol=0, atol=1e-12)
        assert torch.allclose(moments.mean, together[name].mean, rtol=0, atol=1e-12)


def test_large_batches_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*conv_bn(3, 4), nn.Conv2d(4, 5, 1)).double().eval()
    data = torch.cat(batches(3, (1, 4, 2)))
    graph = trace(model, data)
    whole = calibrate(graph, [data])
    monkeypatch.setattr(calibration, "LARGEST_BATCH", 2 * largest_activation(graph) + 1)
    lengths: list[int] = []
    run = calibration._Collector.run
    monkeypatch.setattr(calibration._Collector, "run", lambda self, x: (lengths.append(len(x)), run(self, x))[1])
    parts = calibrate(graph, [data])
    assert lengths == [2, 2, 2, 1]
    for name, moments in parts.items():
        assert torch.allclose(moments.second, whole[name].second, rtol=0, atol=1e-12)
        assert torch.allclose(moments.mean, whole[name].mean, rtol=0, atol=1e-12)


def test_what_hardly_varies_is_not_lost_to_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    data = 1000 + torch.randn(4096, 6) @ torch.diag(torch.logspace(-2, 0, 6))
    moments = calibrate(trace(model, data[:2]), [data[:1000], data[1000:]])["linear"]
    exact = torch.cov(data.double().T, correction=0)
    sizes = exact.diagonal().sqrt()
    assert ((moments.matrix[0] - exact).abs() < 1e-4 * sizes[:, None] * sizes).all()


class Uses(nn.Module):
    """Convolutions with a bias, before a batch norm, before a batch norm and something else, before neither."""

    def __init__(self) -> None:
        super().__init__()
        self.biased, self.plain = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, bias=False)
        self.before, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.shared, self.other = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.linear, self.bare = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.before(functional.relu(self.plain(self.biased(x))))))
        y = self.shared(x)
        return self.bare(functional.relu(self.linear((self.other(y) + y).mean((2, 3)))))


def test_where_a_constant_shift_of_the_output_is_free() -> None:
    model = scramble(Uses())
    data = batches(3)
    graph = trace(model, data[0])
    statistics = calibrate(graph, data)
    free = {graph.layer[node].module: moments.free_mean for node, moments in statistics.items()}
    expected = {"biased": True, "plain": False, "before": True, "shared": False, "linear": True, "bare": False}
    assert free == expected
    for moments in statistics.values():
        centred = moments.second - torch.einsum("gf,ge->gfe", moments.mean, moments.mean)
        assert torch.allclose(moments.matrix, centred if moments.free_mean else moments.second, rtol=0, atol=1e-14)


def test_the_dense_model_is_left_alone() -> None:
    model = scramble(nn.Sequential(*conv_bn(3, 4), nn.Dropout(0.9), nn.Conv2d(4, 2, 1))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = batches(3)
    graph = trace(model, data[0])
    first, second = calibrate(graph, data), calibrate(graph, data)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(graph.exported.state_dict[name], value) for name, value in before.items())
    assert all(torch.equal(first[name].second, second[name].second) for name in first), "dropout or norms were active"


# --- which positions ------------------------------------------------------------------------------------------------


def test_a_sample_holds_as_many_vectors_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(calibration, "LEAST_ROWS", 10)
    monkeypatch.setattr(calibration, "ROWS_PER_FEATURE", 0)
    conv = nn.Conv2d(3, 5, 3, bias=False).double()
    data = batches(3, (2, 2))
    _, moments = only_moments(conv, data)
    # 10 vectors over 4 images: 3 of each, 12 in all, which a matrix of 27 features shows as its rank.
    assert torch.linalg.matrix_rank(moments.second[0], rtol=1e-9) == 12
    rows = torch.cat([unfolded(conv, x) for x in data], 1)[0]
    scatter = moments.second[0] * 12
    # Each vector of the sample is one of the brute-force rows: only such a row leaves the scatter's range unchanged.
    projector = scatter @ torch.linalg.pinv(scatter, rtol=1e-9)
    inside = ((rows @ projector - rows).norm(dim=1) < 1e-8).sum()
    assert inside == 12


def test_positions_are_distinct_and_spread_over_the_whole_output() -> None:
    conv = Convolution(1, 3, 4, 8, 10, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1))
    random = torch.Generator().manual_seed(0)
    assert conv.output_size == (4, 5)
    few = torch.stack([positions_of(layer(conv), 6, random) for _ in range(200)])
    assert few.shape == (200, 6)
    assert all(len(set(row)) == 6 for row in few.tolist())
    assert torch.bincount(few.flatten(), minlength=20).min() > 30, "each of 20 positions is drawn about 60 times"
    assert few.max() == 19
    assert sorted(positions_of(layer(conv), 99, random).tolist()) == list(range(20))
    assert sorted(positions_of(layer(Linear(5, 12, 7)), 99, random).tolist()) == list(range(5))


def layer(operator: Convolution | Linear) -> Layer:
    return Layer("x", "x", "x.weight", None, None, None, operator)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 9)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_vectors_of_a_window_give_the_outputs_of_the_small_kernel(
    size: tuple[int, int], stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride, dilation, dilation, groups=2, bias=False).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    whole = Convolution(1, 4, 6, *size, (3, 3), (stride, stride), (dilation, dilation), (dilation,) * 4, 2)
    for window in [((0, 1), (0, 3)), ((2, 3), (0, 3)), ((0, 3), (2, 3)), ((1, 3), (1, 3)), ((1, 2), (1, 2))]:
        small, operator = windowed(conv, window), whole.window(*window)
        outputs = small(x).detach().flatten(2)
        positions = torch.randperm(outputs.shape[-1])[:5]
        rows = vectors(x, operator, positions)
        weight = small.weight.detach().reshape(2, 3, -1)
        assert torch.equal(by_channel(by_tap(weight, operator), operator), weight)
        found = torch.einsum("gof,grf->gro", by_tap(weight, operator), rows)
        expected = outputs[:, :, positions].reshape(3, 2, 3, -1).permute(1, 0, 3, 2).reshape(2, -1, 3)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", [3, 255, 256, 513])
def test_gram_is_the_whole_product_however_wide(features: int) -> None:
    x = torch.randn(2, 7, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(gram(x), torch.einsum("grf,gre->gfe", x, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused_product", [True, False])
def test_scores_of_an_attention_product(fused_product: bool) -> None:
    """What is lost of the scores, around their mean over the keys, without some columns: computed score by score."""
    model = scramble(Attention(True, fused_product, heads=2, width=4))
    assert isinstance(model, Attention)
    data = [torch.randn(n, 5, 12, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (3, 2)]
    graph = trace(model, data[0])
    (moments,) = calibrate(graph, data).scores.values()
    y = model.norm(model.stem(torch.cat(data)))
    q, k, _ = model.weights["qkv"](y).reshape(5, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    added = torch.einsum("nhtd,nhsd->nhtsd", q, k)
    added = added - added.mean(3, keepdim=True)
    for gone in ([2], [0, 3], [1, 2, 3]):
        mask = torch.zeros(4, dtype=torch.bool)
        mask[gone] = True
        lost = (added[..., mask].sum(-1) ** 2).sum() / (added.sum(-1) ** 2).sum()
        assert score_error(moments, mask) == pytest.approx(lost.item(), rel=1e-10)


def test_scores_of_queries_with_fewer_axes_or_fewer_heads_on_the_keys() -> None:
    """Learned queries without batch and heads; grouped queries, two heads for each of the keys'."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.kv, self.proj = nn.Parameter(torch.randn(3, 4)), nn.Linear(12, 16), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.proj(((self.query @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([True, False, False, False])
    for model in (scramble(Learned()), scramble(GroupedQueries(12, 2))):
        graph = trace(model, x)
        (moments,) = calibrate(graph, [x]).scores.values()
        if isinstance(model, Learned):
            q, k = model.query, model.kv(x)[..., :8].unflatten(-1, (2, 4)).transpose(1, 2)
        else:
            q = model.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
            k = model.kv(x).unflatten(-1, (2, 4)).transpose(1, 2)[..., :2].repeat_interleave(2, 1)
        added = torch.einsum("...td,...sd->...tsd", q, k)
        added = added - added.mean(-2, keepdim=True)
        gone = mask[: added.shape[-1]]
        lost = (added[..., gone].sum(-1) ** 2).sum() / (added.sum(-1) ** 2).sum()
        assert score_error(moments, gone) == pytest.approx(lost.item(), rel=1e-10)


def test_no_scores_where_the_columns_are_pixels() -> None:
    """Attention of channels to channels multiplies over the positions."""
    model = nn.Sequential(ChannelAttention(8, 2))
    assert calibrate(trace(model, torch.randn(2, 6, 8)), [torch.randn(2, 6, 8)]).scores == {}
