"""Every entry of the rule table: random cuts through a tiny network around the operator, against the masked oracle."""

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.graph import ModelGraph
from graphprune.rules import RULES
from graphprune.surgery import perform
from graphprune.tracing import operator_name, trace
from tests.graphprune.oracle import (
    check_masked_equivalence,
    cuts_of,
    masked_outputs,
    outputs_of,
    random_plan,
    relative_error,
    scramble,
)
from tests.graphprune.rule_cases import LAYERS, STRUCTURAL, Around, Elementwise

POINTWISE = sorted(set(RULES) - set(STRUCTURAL))


def _operators(graph: ModelGraph) -> set[str]:
    return {operator_name(call.node) for call in graph.calls.values()}


def test_every_structural_case_is_an_entry() -> None:
    assert set(STRUCTURAL) <= set(RULES)


@pytest.mark.parametrize("name", STRUCTURAL)
def test_cut_through_a_structural_operator(name: str) -> None:
    body, kind, layers = STRUCTURAL[name]
    torch.manual_seed(0)
    model = scramble(Around(body, kind, layers))
    inputs = [torch.randn(LAYERS[kind][1], dtype=torch.float64)]
    graph = trace(model, inputs)
    assert name in _operators(graph), "the case does not reach the operator"
    cut = {member.parameter for site in graph.all_sites for member in _members(graph, site.atom)}
    assert any(parameter.startswith("before") for parameter in cut), "nothing can be cut in front of the operator"
    plan = random_plan(graph, np.random.default_rng(0), groups=1.0, kernels=1.0)
    check_masked_equivalence(model, graph, plan, inputs)


def _members(graph: ModelGraph, atom: int) -> tuple:
    return next((group.members for group in graph.all_groups if group.atom == atom), ())


@pytest.fixture(scope="module")
def pointwise() -> tuple[nn.Module, ModelGraph, list[torch.Tensor], list[torch.Tensor]]:
    """One network with a branch for each elementwise operator; its pruned and its masked outputs."""
    torch.manual_seed(0)
    model = scramble(Elementwise(POINTWISE))
    inputs = [torch.randn(2, 3, 4, 4, dtype=torch.float64)]
    graph = trace(model, inputs)
    plan = random_plan(graph, np.random.default_rng(0), groups=1.0)
    pruned = perform(model, graph, cuts_of(graph, plan))
    assert pruned.own_class
    assert len(plan.choices) == 1
    masked = masked_outputs(graph, plan, model, inputs)
    return graph, outputs_of(pruned.model, inputs), masked, outputs_of(model, inputs)


@pytest.mark.parametrize("name", POINTWISE)
def test_cut_through_an_elementwise_operator(name: str, pointwise: tuple) -> None:
    graph, pruned, masked, dense = pointwise
    branch = POINTWISE.index(name)
    assert name in _operators(graph)
    assert relative_error([pruned[branch]], [masked[branch]]) < 1e-10
    if name != "zeros_like":
        assert relative_error([pruned[branch]], [dense[branch]]) > 1e-3, "the cut must change the output"
