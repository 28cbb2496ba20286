"""Heads: the levels, and attention over the kept heads against a second implementation."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from graphprune.coupling.graph import Site
from graphprune.coupling.tracing import trace
from graphprune.cutting.surgery import perform
from graphprune.patterns.heads import Heads
from tests.graphprune.networks import Attention, tokens
from tests.graphprune.oracle import scramble


def counts(heads: int) -> list[int]:
    return [level.count for level in Heads().levels(Site("a", "heads", heads, (), "a", atom=0, unit=64), 16)]


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(1, []), (2, [1]), (3, [2, 1]), (4, [3, 2, 1]), (6, [5, 4, 3, 2, 1]), (16, [14, 12, 10, 8, 6, 4, 2])],
)
def test_levels(heads: int, expected: list[int]) -> None:
    assert counts(heads) == expected


@pytest.mark.parametrize("heads", range(1, 65))
def test_never_all_or_none_and_not_many(heads: int) -> None:
    found = counts(heads)
    assert all(0 < count < heads for count in found)
    assert len(found) == len(set(found)) <= 15


def test_levels_of_a_values_width() -> None:
    """Quarters of whole blocks: a unit is one row in each of the heads."""
    site = Site("a", "value", 64, (), "a", atom=0, unit=3)
    assert [level.count for level in Heads().levels(site, 16)] == [48, 32, 16]


def by_hand(model: Attention, x: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Head by head with the dense weights, the scale that of the dense width."""
    x = model.stem(x)
    y = functional.layer_norm(x, (12,), model.norm.weight, model.norm.bias, model.norm.eps)
    width, layer = model.head_dim, model.weights["qkv"]
    total = x + model.proj.bias
    for head in heads:
        start = [part * model.num_heads * width + head * width for part in range(3)]
        q, k, v = (y @ layer.weight[at : at + width].T + layer.bias[at : at + width] for at in start)
        attention = torch.softmax(q @ k.mT / width**0.5, -1) @ v
        total = total + attention @ model.proj.weight[:, head * width : (head + 1) * width].T
    return model.head(total)


@pytest.mark.parametrize("fused_product", [True, False])
def test_attention_over_the_kept_heads(fused_product: bool) -> None:
    model = scramble(Attention(True, fused_product, heads=4, width=3))
    assert isinstance(model, Attention)
    (x,) = tokens()
    x = x.double()
    graph = trace(model, x)
    sites = [site for site in graph.all_sites if site.size == 4 and site.unit == 3]
    (site,) = [site for site in sites if site.kind == "heads"] or sites
    for keep in ((0, 2), (3,), (0, 1, 3)):
        pruned = perform(model, graph, Heads().rewrite(site, keep)).model
        assert pruned.num_heads == len(keep)
        assert pruned.weights["qkv"].weight.shape == (3 * len(keep) * 3, 12)
        with torch.no_grad():
            got, expected = pruned(x), by_hand(model, x, keep)
        assert np.allclose(got, expected, rtol=0, atol=1e-12)


def with_columns(model: Attention, stem: torch.Tensor, qkv: list[torch.Tensor], keep: list[int]) -> torch.Tensor:
    """Attention of queries, keys and values of two heads at the scale of 4 columns, of whose values some are kept."""
    q, k, v = qkv
    z = torch.softmax(q @ k.mT / 4**0.5, -1) @ v
    weight = model.proj.weight.unflatten(1, (2, 4))[:, :, keep].flatten(1)
    return model.head(stem + functional.linear(z.transpose(1, 2).flatten(2), weight, model.proj.bias))


@pytest.mark.parametrize("fused_product", [True, False])
def test_narrower_values(fused_product: bool) -> None:
    """Values that are projected apart: some of their columns in every head, queries and keys as they were."""
    model = scramble(Attention(False, fused_product, heads=2, width=4))
    assert isinstance(model, Attention)
    (x,) = (each.double() for each in tokens())
    graph = trace(model, x)
    (site,) = [site for site in graph.all_sites if site.kind == "value"]
    assert (site.size, site.unit) == (4, 2)
    keep = [0, 2, 3]
    pruned = perform(model, graph, Heads().rewrite(site, tuple(keep))).model
    with torch.no_grad():
        stem = model.stem(x)
        y = functional.layer_norm(stem, (12,), model.norm.weight, model.norm.bias, model.norm.eps)
        q, k, v = (model.weights[name](y).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv")
        assert np.allclose(pruned(x), with_columns(model, stem, [q, k, v[..., keep]], keep), rtol=0, atol=1e-12)
    assert pruned.get_parameter("proj.weight").shape == (12, 6)
    layer = next(layer for layer in graph.layers if layer.widths)
    smaller = layer.after({site.atom: 3})
    assert (smaller.heads, smaller.width, smaller.value_width) == (2, 4, 3)


@pytest.mark.parametrize("fused_product", [True, False])
def test_narrower_heads(fused_product: bool) -> None:
    """Queries, keys and values of one layer: the same columns of all three, at the scale of the dense width."""
    model = scramble(Attention(True, fused_product, heads=2, width=4))
    assert isinstance(model, Attention)
    (x,) = (each.double() for each in tokens())
    graph = trace(model, x)
    site, keep = graph.site["weights.qkv/head-width"], [0, 2, 3]
    assert (site.size, site.unit) == (4, 2)
    pruned = perform(model, graph, Heads().rewrite(site, tuple(keep))).model
    with torch.no_grad():
        stem = model.stem(x)
        y = functional.layer_norm(stem, (12,), model.norm.weight, model.norm.bias, model.norm.eps)
        packed = model.weights["qkv"](y).unflatten(-1, (3, 2, 4))[..., keep].permute(2, 0, 3, 1, 4)
        assert np.allclose(pruned(x), with_columns(model, stem, [*packed], keep), rtol=0, atol=1e-12)
    (layer,) = (layer for layer in graph.layers if layer.widths)
    smaller = layer.after({site.atom: 3})
    assert (smaller.heads, smaller.width, smaller.value_width) == (2, 3, 3)
