"""Symmetries that the policy network must have."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from graphprune.agents.encoder import ALL, PATTERN_FEATURES, PairScorer, Sight, pattern_features, typed_edges
from graphprune.searching.environment import Observer
from graphprune.searching.problem import Factor, GraphView, Problem, Sum
from graphprune.searching.views import VIEW_FEATURES
from tests.agents.toys import problem

PREFIXES = np.array([[1, 0], [0, 2], [3, 1]])


def scorer(made: Problem, sight: Sight = ALL) -> PairScorer:
    torch.manual_seed(0)
    return PairScorer(Observer(made).space, made, sight)


def scores(network: PairScorer, made: Problem, prefixes: np.ndarray = PREFIXES) -> Tensor:
    seen = {name: torch.from_numpy(value) for name, value in Observer(made)(prefixes).items()}
    with torch.no_grad():
        return network(seen)


def test_weights_have_the_same_shapes_for_every_problem() -> None:
    first = scorer(problem(0, sizes=(2, 3))).state_dict()
    second = scorer(problem(1, sizes=(4,) * 7)).state_dict()
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}


def test_a_batch_is_many_single_observations() -> None:
    made = problem(0, sizes=(4, 3, 5, 2))
    network = scorer(made)
    together = scores(network, made)
    alone = torch.cat([scores(network, made, row[None]) for row in PREFIXES])
    assert together.shape == (3, 6)
    assert torch.allclose(together, alone, atol=1e-5)


def test_renaming_the_nodes_changes_nothing() -> None:
    made = problem(0, sizes=(4, 3, 5, 2))
    order = np.random.default_rng(0).permutation(len(made.graph.features))
    place = np.argsort(order)
    view = GraphView(made.graph.features[order], place[made.graph.edges], made.graph.edge_types)
    decisions = tuple(replace(decision, node=int(place[decision.node])) for decision in made.decisions)
    renamed = replace(made, graph=view, decisions=decisions)
    assert torch.allclose(scores(scorer(made), made), scores(scorer(renamed), renamed), atol=1e-5)


@pytest.mark.parametrize("change", ["features", "edge_types", "edges"])
def test_every_part_of_the_graph_matters(change: str) -> None:
    made = problem(0, sizes=(4, 3, 5, 2))
    parts = {
        "features": made.graph.features + 1,
        "edge_types": 1 - made.graph.edge_types,
        "edges": np.roll(made.graph.edges, 1, axis=1) * np.array([[1], [0]]),
    }
    other = replace(made, graph=replace(made.graph, **{change: parts[change]}))
    assert not torch.allclose(scores(scorer(made), made), scores(scorer(other), other), atol=1e-5)


def test_every_edge_is_there_in_both_directions() -> None:
    view = GraphView(np.zeros((3, 1), np.float32), np.array([[0, 1], [1, 2]]), np.array([0, 1]))
    edges, kinds = typed_edges(view)
    rows = [(*edge, int(kind)) for edge, kind in zip(edges.T.tolist(), kinds.argmax(dim=1), strict=True)]
    assert sorted(rows) == [(0, 1, 0), (1, 0, 1), (1, 2, 2), (2, 1, 2)]
    assert (kinds.sum(dim=1) == 1).all()


def test_pattern_features_say_what_an_option_is() -> None:
    option = replace(problem().decisions[0].options[1], geometry=(0, 1, 0) * 3, kept_share=0.3, error=0.5, gain=2.0)
    row = pattern_features("kernel", option)
    assert len(row) == PATTERN_FEATURES
    assert row[:9] == [0, 1, 0] * 3
    assert row[9:13] == pytest.approx([1, 0.3, np.log(0.5001) / 4, np.log(2)])
    assert sum(row[13:]) == 1
    assert pattern_features("heads", replace(option, geometry=()))[:10] == [0] * 10


def changes() -> dict[str, tuple[Problem, Problem]]:
    """By the part of the sight that alone shows it: a problem, and the same with a difference."""
    made = problem(0, sizes=(4, 3, 5, 2))
    rng = np.random.default_rng(0)
    made.graph = replace(made.graph, features=rng.normal(size=(6, len(VIEW_FEATURES))).astype(np.float32))
    features, curves = made.graph.features.copy(), made.graph.features.copy()
    features[5] += 1  # the node of no site: only through the graph can it matter
    curves[:, -5:] += 1
    other = [replace(decision.options[1], geometry=(0, 1, 0) * 3) for decision in made.decisions]
    reshaped = tuple(
        replace(decision, options=(decision.options[0], option, *decision.options[2:]))
        for decision, option in zip(made.decisions, other, strict=True)
    )
    worse = tuple(
        replace(decision, options=tuple(replace(option, error=3 * option.error) for option in decision.options))
        for decision in made.decisions
    )
    table = Sum(0.0, tuple(Factor(factor.sites, factor.table**2) for factor in made.error.factors))
    return {
        "nodes": (made, replace(made, graph=replace(made.graph, features=2 * made.graph.features))),
        "graph": (made, replace(made, graph=replace(made.graph, features=features))),
        "patterns": (made, replace(made, decisions=reshaped)),
        "errors": (
            made, replace(made, graph=replace(made.graph, features=curves), decisions=worse, error=table)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("part", ["nodes", "graph", "patterns", "errors"])
def test_what_an_ablation_takes_away_is_not_seen(part: str) -> None:
    made, other = changes()[part]
    blind = Sight(**{part: False})
    assert not torch.allclose(scores(scorer(made), made), scores(scorer(other), other), atol=1e-5)
    assert torch.equal(scores(scorer(made, blind), made), scores(scorer(other, blind), other))


def test_ablations_have_the_parameters_of_the_whole() -> None:
    made = problem(0, sizes=(4, 3))
    whole = {name: value.shape for name, value in scorer(made).state_dict().items()}
    for part in ("nodes", "graph", "patterns", "errors"):
        own = scorer(made, Sight(**{part: False})).state_dict()
        assert {name: value.shape for name, value in own.items()} == whole


@pytest.mark.parametrize("fused", [False, True])
def test_the_encoding_is_renewed_after_every_update(fused: bool) -> None:
    made = problem(0, sizes=(4, 3, 5, 2))
    network = scorer(made)
    stale = scores(network, made)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1, fused=fused)
    seen = {name: torch.from_numpy(value) for name, value in Observer(made)(PREFIXES).items()}
    network(seen).sum().backward()
    optimiser.step()
    fresh = scorer(made)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(scores(network, made), scores(fresh, made))
    assert not torch.allclose(scores(network, made), stale, atol=1e-3)
