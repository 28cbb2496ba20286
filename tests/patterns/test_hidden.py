"""Hidden units: the levels, and that the halves of a gated MLP stay aligned."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from graphprune.coupling.graph import ModelGraph, Site
from graphprune.coupling.tracing import trace
from graphprune.cutting.surgery import perform
from graphprune.patterns.hidden import Hidden
from tests.graphprune.networks import SwiGlu, tokens
from tests.graphprune.oracle import scramble

KEEP = (0, 3, 4, 9, 15)


def counts(size: int, block: int) -> list[int]:
    return [level.count for level in Hidden().levels(Site("a", "hidden", size, (), "a", atom=0), block)]


def test_quarters_and_an_eighth_in_whole_blocks() -> None:
    assert counts(768, 16) == [576, 384, 192, 96]
    assert counts(64, 16) == [48, 32, 16]
    assert counts(32, 16) == [16]
    assert counts(16, 16) == []
    assert counts(16, 4) == [12, 8, 4]
    assert counts(8, 1) == [6, 4, 2, 1]


def test_a_plain_mlp_keeps_rows_of_one_layer_and_columns_of_the_next() -> None:
    torch.manual_seed(0)
    model = scramble(torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.GELU(), torch.nn.Linear(16, 5)))
    graph = trace(model, tokens()[0].double())
    pruned = perform(model, graph, Hidden().rewrite(hidden(graph), KEEP)).model
    assert torch.equal(pruned[0].weight, model[0].weight[list(KEEP)])
    assert torch.equal(pruned[0].bias, model[0].bias[list(KEEP)])
    assert torch.equal(pruned[2].weight, model[2].weight[:, list(KEEP)])
    assert torch.equal(pruned[2].bias, model[2].bias)


def hidden(graph: ModelGraph) -> Site:
    (site,) = [site for site in graph.all_sites if site.kind == "hidden" and site.size == 16]
    return site


@pytest.mark.parametrize("packed", [True, False])
def test_a_gated_mlp_keeps_the_same_units_of_both_halves(packed: bool) -> None:
    model = scramble(SwiGlu(packed))
    (x,) = tokens()
    x = x.double()
    graph = trace(model, x)
    pruned = perform(model, graph, Hidden().rewrite(hidden(graph), KEEP)).model
    stream = model.stem(x)
    y = functional.rms_norm(stream, (12,), model.norm.weight, model.norm.eps)
    up, bias = model.up.weight, model.up.bias
    gate, gate_bias = (up[16:], bias[16:]) if packed else (model.gate.weight, model.gate.bias)
    with torch.no_grad():
        total = stream + model.down.bias
        for unit in KEEP:
            value = y @ up[unit] + bias[unit]
            total = (
                total
                + (value * functional.silu(y @ gate[unit] + gate_bias[unit]))[..., None] * model.down.weight[:, unit]
            )
        assert np.allclose(pruned(x), model.head(total), rtol=0, atol=1e-12)
