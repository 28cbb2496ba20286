"""The views of a graph against hand-counted small networks and against a second way of counting."""

import math
from itertools import combinations

import networkx
import numpy as np
import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from graphprune.models import create
from graphprune.searching.views import COUPLING, FEATURES, FLOW, VIEW_FEATURES, graph_view


class Residual(nn.Module):
    """stem -> relu -> (+ inner(relu)) -> mean -> linear: stem and the second convolution share a group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.inner = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.stem(images))
        return self.classifier((hidden + self.inner(hidden)).mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> ModelGraph:
    torch.manual_seed(0)
    return trace(Residual(), torch.zeros(2, 3, 8, 16))


@pytest.fixture(scope="module")
def vit() -> ModelGraph:
    model = create("timm:vit_tiny_patch16_224?num_classes=10&img_size=32&depth=2&embed_dim=48")
    return trace(model, torch.zeros(2, 3, 32, 32))


def column(name: str, matrix: np.ndarray, graph: ModelGraph) -> dict[str, float]:
    names = VIEW_FEATURES if matrix.shape[1] == len(VIEW_FEATURES) else FEATURES
    return {node.name: float(value) for node, value in zip(graph.nodes, matrix[:, names.index(name)], strict=True)}


def test_networkx_by_hand(small: ModelGraph) -> None:
    view = small.to_networkx()
    names = ["conv2d", "relu", "conv2d_1", "add", "mean", "linear"]
    assert list(view.nodes) == names
    assert set(view.edges) == {
        ("conv2d", "relu"), ("relu", "conv2d_1"), ("relu", "add"), ("conv2d_1", "add"), ("add", "mean"),
        ("mean", "linear"),
    }  # fmt: skip
    facts = dict(view.nodes["conv2d"])
    del facts["groups"]
    assert facts == {
        "op": "conv2d", "module": "stem", "shape": (1, 8, 4, 8), "flops": 2 * 8 * 4 * 8 * 27, "parameters": 8 * 27,
    }  # fmt: skip
    assert view.nodes["add"]["flops"] == 0
    assert view.edges["relu", "add"]["shape"] == (1, 8, 4, 8)
    channels = next(group.name for group in small.all_groups if group.kind == "channels" and not group.frozen)
    assert [channels in view.nodes[name]["groups"] for name in names] == [True] * 6


def test_networkx_totals(vit: ModelGraph) -> None:
    view = vit.to_networkx()
    assert networkx.is_directed_acyclic_graph(view)
    assert sum(flops for _, flops in view.nodes(data="flops")) == vit.flops
    assert sum(count for _, count in view.nodes(data="parameters")) == vit.parameter_count


def test_pyg_flow_is_the_networkx_graph(vit: ModelGraph) -> None:
    data, view = vit.to_pyg(), vit.to_networkx()
    assert data.validate(raise_on_error=True)
    names = [node.name for node in vit.nodes]
    flow = data.edge_index[:, data.edge_type == FLOW].T.tolist()
    assert {(names[a], names[b]) for a, b in flow} == set(view.edges)
    assert len(flow) == view.number_of_edges()
    assert data.x.shape == (len(names), len(FEATURES))
    assert data.x.dtype is torch.float32


def test_coupled_layers_are_those_that_share_an_atom(vit: ModelGraph) -> None:
    data = vit.to_pyg()
    names = [node.name for node in vit.nodes]
    edges = [(names[a], names[b]) for a, b in data.edge_index[:, data.edge_type == COUPLING].T.tolist()]
    atoms = {layer.node: layer.inputs.atoms() | layer.outputs.atoms() for layer in vit.layers}
    atoms = {node: {atom for atom in found if vit.atom_sizes[atom] > 1} for node, found in atoms.items()}
    share = {frozenset(pair) for pair in combinations(atoms, 2) if atoms[pair[0]] & atoms[pair[1]]}
    assert {frozenset(edge) for edge in edges} <= share
    reached = networkx.Graph(edges)
    for one, other in share:
        assert networkx.has_path(reached, one, other)
    assert len(edges) <= sum(map(len, atoms.values()))
    assert len(edges) < len(share)


def test_features_by_hand(small: ModelGraph) -> None:
    x = small.to_pyg().x.numpy()
    assert column("is convolution", x, small) == {
        "conv2d": 1, "relu": 0, "conv2d_1": 1, "add": 0, "mean": 0, "linear": 0,
    }  # fmt: skip
    kinds = x[:, [FEATURES.index(name) for name in FEATURES if name.startswith("is ")]]
    assert kinds.sum(1).tolist() == [1] * 6
    assert column("is other", x, small)["add"] == 0
    assert column("log2 of the first size / 8", x, small)["conv2d"] == pytest.approx(3 / 8)
    assert column("log2 of the other sizes / 8", x, small)["conv2d_1"] == pytest.approx(3 / 8)
    flops = {"conv2d": 8 * 32 * 27, "conv2d_1": 8 * 32 * 24, "linear": 40}
    expected = {name: 3 * flops.get(name, 0) / sum(flops.values()) for name in column(FEATURES[0], x, small)}
    assert column("FLOPs / mean of a layer", x, small) == pytest.approx(expected)
    assert column("kernel height / 3", x, small)["conv2d_1"] == pytest.approx(1 / 3)
    assert column("kernel width / 3", x, small)["conv2d_1"] == 1
    strides = {"conv2d": 1, "relu": 0, "conv2d_1": 0.5, "add": 0, "mean": 0, "linear": 0}
    assert column("stride / 2", x, small) == strides


def test_what_agents_see(small: ModelGraph) -> None:
    latency = {"conv2d": 3e-3, "conv2d_1": 1e-3, "linear": math.nan}
    view = graph_view(small, latency, {"conv2d_1": [0.0, 0.1, 0.2, 0.4, 0.8]})
    assert view.features.shape == (6, len(VIEW_FEATURES))
    assert view.features.dtype == np.float32
    assert np.isfinite(view.features).all()
    shares = column("latency / mean of a layer", view.features, small)
    assert shares == {"conv2d": 1.5, "relu": 0, "conv2d_1": 0.5, "add": 0, "mean": 0, "linear": 0}
    assert view.features[2, -5:] == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8])
    assert not view.features[[0, 1, 3, 4, 5], -5:].any()
    weight = small.exported.state_dict["stem.weight"].detach().numpy().astype(np.float64)
    spread = column("standard deviation of the weights x sqrt(weights of an output)", view.features, small)
    assert spread["conv2d"] == pytest.approx(np.sqrt(27 * (np.mean(weight**2) - np.mean(weight) ** 2)), rel=1e-5)
    size = column("mean |weight| x sqrt(weights of an output)", view.features, small)
    assert size["conv2d"] == pytest.approx(np.sqrt(27) * np.abs(weight).mean(), rel=1e-5)
    assert size["relu"] == spread["relu"] == 0
    data = small.to_pyg()
    assert view.edges.tolist() == data.edge_index.tolist()
    assert view.edge_types.tolist() == data.edge_type.tolist()
    np.testing.assert_array_equal(view.features[:, : len(FEATURES)], data.x.numpy())


def test_features_are_of_order_one(vit: ModelGraph) -> None:
    view = graph_view(vit, {layer.node: 1e-4 for layer in vit.layers}, {})
    assert np.abs(view.features).max() < 10
    assert view.edges.min() >= 0
    assert view.edges.max() < len(vit.nodes)


def test_a_curve_has_five_points(small: ModelGraph) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        graph_view(small, {}, {"conv2d": [0.0, 1.0]})
