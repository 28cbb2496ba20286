"""Symmetries of GNN-RL's two-level network, and which site is seen where."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from graphprune.agents.encoder import EDGE_TYPES
from graphprune.agents.fronts import Fronts
from graphprune.agents.gnn_rl import ShrinkingEnv
from graphprune.agents.motifs import UNITS, WIDTH, LayerGraph, Motifs, RatioHead, left, site_features
from graphprune.searching.problem import GraphView, Problem
from tests.agents.toys import problem

SIZES = (4, 3, 5, 2)


def built(kind: Callable[[Problem], torch.nn.Module], made: Problem) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(made)


def head(made: Problem) -> RatioHead:
    torch.manual_seed(0)
    return RatioHead(ShrinkingEnv(Fronts(made), lambda _: 0.0).observation_space, made, 0.3)


def with_importance(made: Problem, site: int, importance: tuple[float, ...]) -> Problem:
    decisions = list(made.decisions)
    decisions[site] = replace(decisions[site], importance=importance)
    return replace(made, decisions=tuple(decisions))


def observed(made: Problem, count: int = 3) -> dict[str, Tensor]:
    """Random observations of a problem."""
    rng = np.random.default_rng(0)
    asked = [rng.integers(len(decision.options), size=count) for decision in made.decisions]
    return {
        "asked": torch.from_numpy(np.stack(asked, axis=1)).float(),
        "kept": torch.from_numpy(rng.random((count, len(made.decisions)))).float(),
        "state": torch.from_numpy(rng.random((count, 2))).float(),
    }


def test_the_most_important_units_are_left() -> None:
    importance = (3.0, 1.0, 4.0, 1.0, 5.0)
    assert left(importance, 1.0).tolist() == [5, 4, 3, 1, 1]
    assert left(importance, 0.6).tolist() == [5, 4, 3]
    assert left(importance, 0.61).tolist() == [5, 4, 3, 1]
    assert left(importance, 0.0).tolist() == left((), 0.5).tolist() == []
    many = left(tuple(range(1000)), 0.5)
    assert len(many) == UNITS
    assert many == pytest.approx(np.linspace(999, 500, UNITS))


@pytest.mark.parametrize("units", [8, 100])
def test_a_motif_does_not_depend_on_the_order_of_units(units: int) -> None:
    rng = np.random.default_rng(0)
    importance = rng.random(units)
    plain = with_importance(problem(sizes=SIZES), 1, tuple(importance))
    permuted = with_importance(plain, 1, tuple(rng.permutation(importance)))
    assert torch.equal(built(Motifs, plain)(), built(Motifs, permuted)())


def test_only_the_motifs_of_a_site_show_its_importance() -> None:
    made = problem(sizes=SIZES)
    other = with_importance(made, 1, tuple(2.0 ** np.arange(8)))
    differs = (built(Motifs, made)() - built(Motifs, other)()).abs().amax(dim=1) > 1e-4
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 7
    assert built(Motifs, made).first.tolist() == [0, 4, 7, 12]


def test_a_motif_is_that_of_its_star_alone() -> None:
    """Messages as SAGE defines them, written down for one star."""
    motifs = built(Motifs, problem(sizes=SIZES))
    index = 5
    own = motifs.part[len(motifs.hubs) :] == index
    nodes = torch.cat([motifs.hub(motifs.hubs[[index]]), motifs.unit(motifs.units[own])])
    for layer in motifs.layers:
        around = torch.cat([nodes[1:].mean(dim=0, keepdim=True), nodes[:1].expand(len(nodes) - 1, -1)])
        nodes = nodes + torch.relu(layer.lin_l(around) + layer.lin_r(nodes))
    assert torch.allclose(motifs()[index], nodes.mean(dim=0), atol=1e-5)


def test_an_edge_is_described_by_the_sites_that_make_its_tensor() -> None:
    made = problem(sizes=SIZES)
    made.decisions = tuple(replace(own, node=node) for own, node in zip(made.decisions, (0, 0, 3, 5), strict=True))
    graph = built(LayerGraph, made)
    motifs = torch.randn(2, 4, WIDTH)
    found = graph.edge_features(motifs)
    sources = [*made.graph.edges[0], *made.graph.edges[0]]
    assert found.shape == (2, len(sources), EDGE_TYPES + WIDTH)
    for edge, source in enumerate(sources):
        own = [site for site, decision in enumerate(made.decisions) if decision.node == source]
        expected = motifs[:, own].mean(dim=1) if own else torch.zeros(2, WIDTH)
        assert torch.allclose(found[:, edge, EDGE_TYPES:], expected, atol=1e-6)
        assert found[:, edge, :EDGE_TYPES].sum(dim=1).tolist() == [1, 1]


def test_one_layer_carries_a_site_along_its_own_edges_only() -> None:
    """Node 2 of the chain makes what node 3 reads: both ends of that edge hear of it, no other node does."""
    made = problem(sizes=SIZES)
    graph = built(LayerGraph, made)
    graph.layers, graph.norms = graph.layers[:1], graph.norms[:1]
    asked = torch.tensor([0, 4, 7, 12])
    plain = built(Motifs, made)()[asked][None]
    changed = built(Motifs, with_importance(made, 2, tuple(2.0 ** np.arange(8))))()[asked][None]
    differs = (graph(plain) - graph(changed)).abs().amax(dim=2)[0] > 0
    assert differs.tolist() == [False, False, True, True, False, False]


def test_weights_have_the_same_shapes_for_every_problem() -> None:
    first, second = head(problem(0, sizes=(2, 3))).state_dict(), head(problem(1, sizes=(4,) * 7)).state_dict()
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}


def test_a_batch_is_many_single_observations() -> None:
    made = problem(sizes=SIZES)
    network, seen = head(made), observed(made)
    alone = [network({name: value[[row]] for name, value in seen.items()}) for row in range(3)]
    assert network(seen).shape == (3, 5)
    assert torch.allclose(network(seen), torch.cat(alone), atol=1e-5)
    assert (network(seen)[:, :4] - 0.3).abs().max() < 0.05


def test_renaming_the_nodes_changes_nothing() -> None:
    made = problem(sizes=SIZES)
    order = np.random.default_rng(0).permutation(len(made.graph.features))
    place = np.argsort(order)
    view = GraphView(made.graph.features[order], place[made.graph.edges], made.graph.edge_types)
    decisions = tuple(replace(decision, node=int(place[decision.node])) for decision in made.decisions)
    renamed = replace(made, graph=view, decisions=decisions)
    assert torch.allclose(head(made)(observed(made)), head(renamed)(observed(made)), atol=1e-5)


def test_site_features_are_the_tables_of_the_site_alone() -> None:
    made = problem(sizes=SIZES, pairs=False)
    table = site_features(made)[2]
    cost, error = made.costs["latency"].factors[2].table, made.error.factors[2].table
    assert table.shape == (5, 6)
    assert table[:, 0] == pytest.approx(np.linspace(1, 0.2, 5))
    assert table[:, 1] == pytest.approx(np.log2(np.maximum(8 * np.linspace(1, 0.2, 5), 1)) / 8)
    assert table[:, 2] / table[:, 4] == pytest.approx((cost[0] - cost) / (cost[0] - cost[-1]), abs=1e-6)
    assert table[:, 3] / table[:, 5] == pytest.approx(error / error[-1], abs=1e-6)
    assert np.mean([own[0, 4] for own in site_features(made)]) == pytest.approx(1)
    assert np.mean([own[0, 5] for own in site_features(made)]) == pytest.approx(1)
