"""The uniform plan: how much stays, which units stay, and that the plan applies."""

import copy
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from graphprune.cutting.surgery import apply
from graphprune.engines.fake import FakeEngine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.models import create
from graphprune.plan import Plan
from graphprune.timing.profile import Profile
from graphprune.timing.timings import TimingFile, default_cache_path
from graphprune.uniform import ALIGN, cached_block, magnitudes, uniform_plan


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))


Traced = tuple[nn.Module, ModelGraph, torch.Tensor]


def traced(spec: str) -> Traced:
    torch.manual_seed(0)
    model, images = create(spec).eval(), torch.randn(2, 3, 32, 32)
    return model, trace(model, images), images


@pytest.fixture(scope="module")
def vit() -> Traced:
    return traced("timm:vit_tiny_patch16_224?num_classes=10&img_size=32&depth=2")


@pytest.fixture(scope="module")
def resnet() -> Traced:
    return traced("cifar:resnet20")


def test_half_of_a_vit(vit: Traced) -> None:
    model, graph, images = vit
    plan = uniform_plan(graph, 0.5)
    assert {choice.site: (choice.pattern, choice.level, len(choice.keep)) for choice in plan.choices} == {
        f"blocks.{block}.{site}": expected
        for block in (0, 1)
        for site, expected in {
            "attn/heads": ("heads", "2 of 3", 2),
            "mlp.fc1/hidden": ("hidden", "384 of 768", 384),
        }.items()
    }
    pruned = apply(model, plan, graph)
    assert type(pruned) is type(model)
    assert pruned(images).shape == (2, 10)
    assert pruned.blocks[0].attn.qkv.weight.shape == (3 * 2 * 64, 192)
    assert pruned.blocks[1].mlp.fc2.weight.shape == (192, 384)


def test_at_least_one_head_stays(vit: Traced) -> None:
    _, graph, _ = vit
    levels = {choice.level for choice in uniform_plan(graph, 0.01, align=1).choices}
    assert levels == {"1 of 3", "8 of 768"}
    assert {choice.level for choice in uniform_plan(graph, 0.01, align=256).choices} == {"1 of 3", "256 of 768"}
    assert {choice.level for choice in uniform_plan(graph, 0.01, align=256).choices} == {"1 of 3", "256 of 768"}


@pytest.mark.parametrize(("keep", "align"), [(0.5, 16), (0.3, 8), (0.7, 1)])
def test_channels_in_whole_blocks(keep: float, align: int, resnet: Traced) -> None:
    model, graph, images = resnet
    plan = uniform_plan(graph, keep, align)
    sizes = {site.name: site.size for site in graph.all_sites if site.kind == "channels"}
    expected = {name: min(size, ceil(ceil(keep * size) / align) * align) for name, size in sizes.items()}
    kept = {choice.site: len(choice.keep) for choice in plan.choices}
    assert sizes
    assert {name: kept.get(name, size) for name, size in sizes.items()} == expected
    assert all(sizes[name] > count for name, count in kept.items())
    assert apply(model, plan, graph)(images).shape == (2, 10)


def test_a_share_that_is_exact_is_not_rounded_up() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 100, 1), nn.Conv2d(100, 4, 1)), torch.zeros(2, 3, 4, 4))
    assert [choice.level for choice in uniform_plan(graph, 0.07, align=1).choices] == ["7 of 100"]


def test_units_that_carry_no_weight_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    nn.init.ones_(model[0].weight)
    with torch.no_grad():
        model[0].weight[[1, 2, 6, 7]] *= 1e-3
        model[0].bias.zero_()
        model[2].weight.fill_(1.0)
    plan = uniform_plan(trace(model, torch.zeros(2, 3, 8, 8)), 0.5, align=1)
    assert plan.choices[0].keep == (0, 3, 4, 5)


def test_heads_count_their_own_rows_only(vit: Traced) -> None:
    model, images = copy.deepcopy(vit[0]), vit[2]
    qkv = model.blocks[0].attn.qkv
    with torch.no_grad():
        for part in range(3):
            qkv.weight[part * 192 + 64 : part * 192 + 128] *= 1e-3  # head 1 in queries, keys and values
        model.blocks[0].attn.proj.weight[:, 64:128] *= 1e-3
    choices = {choice.site: choice for choice in uniform_plan(trace(model, images), 0.5).choices}
    assert choices["blocks.0.attn/heads"].keep == (0, 2)


class Branches(nn.Module):
    """Two branches side by side, concatenated: the consumer's axis is a sum of both groups."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(9, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.join(torch.cat([self.left(images), self.right(images)], dim=1))


def test_a_group_beside_another_on_one_axis() -> None:
    model = Branches()
    graph = trace(model, torch.zeros(2, 3, 4, 4))
    site = graph.site["right/channels"]
    squared = {name: value.detach().double().square() for name, value in model.named_parameters()}
    columns, rows, bias = (
        squared["join.weight"].sum((0, 2, 3)),
        squared["right.weight"].sum((1, 2, 3)),
        squared["right.bias"],
    )
    expected = columns[4:] / columns.sum() + rows / rows.sum() + bias / bias.sum()
    torch.testing.assert_close(torch.from_numpy(magnitudes(graph, site.atom)), expected, rtol=1e-6, atol=0)


def test_keeping_all_is_the_empty_plan(resnet: Traced) -> None:
    _, graph, _ = resnet
    assert uniform_plan(graph, 1.0) == Plan(graph.signature, (), graph.inputs)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
def test_share_out_of_range(keep: float) -> None:
    graph = trace(nn.Conv2d(3, 4, 1), torch.zeros(2, 3, 4, 4))
    with pytest.raises(InputError, match="keep is the share"):
        uniform_plan(graph, keep)


def test_align_out_of_range() -> None:
    graph = trace(nn.Conv2d(3, 4, 1), torch.zeros(2, 3, 4, 4))
    with pytest.raises(InputError, match="align is a number of rows"):
        uniform_plan(graph, 0.5, align=0)


def test_block_comes_from_the_cache_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cached_block() == ALIGN

    def refuse(*_: object) -> None:
        raise AssertionError("nothing may be measured")

    monkeypatch.setattr(OnnxRuntimeEngine, "measure", refuse)
    other = Profile(FakeEngine(block=8))
    assert other.block == 8
    assert cached_block() == ALIGN  # the cache of another engine says nothing
    _copy_cache(other.engine.identity, OnnxRuntimeEngine().identity)
    assert cached_block() == 8
    graph = trace(nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 4, 3)), torch.zeros(2, 3, 16, 16))
    assert [choice.level for choice in uniform_plan(graph, 0.3).choices] == ["8 of 24"]


def _copy_cache(one: str, other: str) -> None:
    path = default_cache_path()
    path.write_text(path.read_text().replace(one, other))
    assert TimingFile(path, one).read() == {}
