"""Invariant 1: the pruned network equals the dense one with the cut structures masked, for random plans."""

import numpy as np
import pytest
import torch

from graphprune.coupling.tracing import trace
from graphprune.plan import Choice, Plan
from tests.graphprune.networks import NETWORKS, Attention, tokens, vgg
from tests.graphprune.oracle import (
    check_masked_equivalence,
    masked_outputs,
    outputs_of,
    random_plan,
    relative_error,
    scramble,
)

FALLBACK = {"literal", "split_concat", "attention_flat"}
"""Networks with literals that no attribute holds; all others must keep their class."""


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_equals_masked(name: str) -> None:
    """Two random plans: to 1e-10 in float64, to 1e-5 in float32 (the graph of a model serves any precision)."""
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, rng = scramble(build()), np.random.default_rng(0)
    doubles = [x.double() for x in inputs]
    graph = trace(model, doubles)
    first = check_masked_equivalence(model, graph, random_plan(graph, rng), doubles)
    second = check_masked_equivalence(model.float(), graph, random_plan(graph, rng), inputs)
    assert first.own_class is second.own_class is (name not in FALLBACK)


@pytest.mark.parametrize("name", ["vgg", "channel_shuffle", "attention_explicit", "transposed", "literal"])
def test_cutting_nothing_changes_nothing(name: str) -> None:
    """A plan that keeps every unit of every site, and an empty plan."""
    build, inputs = NETWORKS[name]
    model = scramble(build(), dtype=torch.float32)
    graph = trace(model, inputs)
    whole = tuple(Choice(site.name, site.kind, "all", tuple(range(site.size))) for site in graph.all_sites)
    for choices in (whole, ()):
        result = check_masked_equivalence(model, graph, Plan(graph.signature, choices, graph.inputs), inputs)
        assert result.own_class
        assert result.route.attributes == ()
        old, new = model.state_dict(), result.model.state_dict()
        assert list(old) == list(new)
        assert all(torch.equal(old[key], new[key]) for key in old if old[key].shape == new[key].shape)
        assert sum(value.numel() for value in new.values()) == sum(value.numel() for value in old.values())
        assert relative_error(outputs_of(result.model, inputs), outputs_of(model, inputs)) == 0


def test_attention_scale_stays_that_of_the_dense_model() -> None:
    """Cutting the width of a head must not change the scale of the scores; recomputing it here must be caught."""
    model = scramble(Attention(fused_weights=True, fused_product=False))
    inputs = [x.double() for x in tokens()]
    graph = trace(model, inputs)
    width = next(site for site in graph.all_sites if site.size == 4)
    plan = Plan(graph.signature, (Choice(width.name, width.kind, "2 of 4", (0, 2)),), graph.inputs)
    pruned = check_masked_equivalence(model, graph, plan, inputs).model
    assert pruned.scale == 4**-0.5
    pruned.scale = 2**-0.5
    assert relative_error(outputs_of(pruned, inputs), masked_outputs(graph, plan, model, inputs)) > 1e-3


def test_the_oracle_without_a_plan_is_the_model() -> None:
    model = scramble(vgg())
    inputs = [x.double() for x in NETWORKS["vgg"][1]]
    graph = trace(model, inputs)
    masked = masked_outputs(graph, Plan(graph.signature), model, inputs)
    assert relative_error(masked, outputs_of(model, inputs)) < 1e-14
