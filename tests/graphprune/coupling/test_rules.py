"""Every entry of the rule table: random cuts through a tiny network around the operator, against the masked oracle."""

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.rules import RULES
from graphprune.coupling.tracing import operator_name, trace
from graphprune.cutting.surgery import perform
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

OPERATORS = {name.partition(",")[0] for name in STRUCTURAL}
POINTWISE = sorted(set(RULES) - OPERATORS)
PLANS = ((0, 1.0), (3, 0.5), (5, 0.5))
"""Seeds of random plans, and the share of groups that each cuts."""


def _operators(graph: ModelGraph) -> set[str]:
    return {operator_name(call.node) for call in graph.calls.values()}


def test_every_structural_case_is_an_entry() -> None:
    assert set(RULES) >= OPERATORS


@pytest.mark.parametrize("name", STRUCTURAL)
def test_cut_through_a_structural_operator(name: str) -> None:
    body, kind, layers = STRUCTURAL[name]
    torch.manual_seed(0)
    model = scramble(Around(body, kind, layers))
    inputs = [torch.randn(LAYERS[kind][1], dtype=torch.float64)]
    graph = trace(model, inputs)
    assert name.partition(",")[0] in _operators(graph), "the case does not reach the operator"
    cut = {member.parameter for site in graph.all_sites for member in _members(graph, site.atom)}
    assert any(parameter.startswith("before") for parameter in cut), "nothing can be cut in front of the operator"
    for seed, groups in PLANS:
        plan = random_plan(graph, np.random.default_rng(seed), groups=groups, kernels=groups)
        check_masked_equivalence(model, graph, plan, inputs)


@pytest.mark.parametrize(("kind", "pool"), [(3, "max_pool1d"), (3, "avg_pool1d"), (4, "max_pool2d"), (5, "avg_pool3d")])
def test_what_a_pool_slides_over_is_frozen(kind: int, pool: str) -> None:
    """Here the channels are last, where a pool takes them for a place."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(3, 8), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(getattr(torch.nn.functional, pool)(self.before(x), 2))

    graph = trace(Pooled(), torch.randn(2, *[4] * (kind - 2), 3))
    (group,) = (group for group in graph.all_groups if "before.bias" in {m.parameter for m in group.members})
    assert group.size == 8
    assert group.frozen[0].startswith(f"spatial ({pool}")


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
