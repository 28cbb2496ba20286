"""What an error does to the output, against the network run with that error."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from graphprune.cutting.exported import plain_module
from graphprune.repairing import sensitivity
from graphprune.repairing.calibration import calibrate
from graphprune.repairing.sensitivity import DEPTH, POWER, Probe, calibrated, sensitivities
from tests.graphprune import tiny
from tests.graphprune.networks import Attention, Chain, SqueezeExcite, group_norm, images, tokens, vgg
from tests.graphprune.oracle import scramble

COPIES = 3000
SMALL = 1e-6


class InPlace(nn.Module):
    """Residual sums that are written into the branch and into the skip; a table that comes from parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.places, self.head = nn.Linear(4, 8), nn.Linear(8, 5)
        self.register_buffer("coordinates", torch.linspace(-1, 1, 4)[None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.one(x.relu())
        out += x
        branch = self.two(out.tanh())
        out += branch
        return self.head(out.mean((2, 3)) + self.places(self.coordinates))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "in place, flattened": (vgg, images(8)[0]),
    "norms of groups": (group_norm, images(8)[0]),
    "branch, dilation, no biases": (Chain, images(8)[0]),
    "depthwise, gate": (SqueezeExcite, images(6)[0]),
    "sums in place": (InPlace, images(8)[0]),
    "attention": (lambda: Attention(True, True), tokens()[0]),
    "attention spelled out": (lambda: Attention(True, False), tokens()[0]),
}


class Erring(fx.Interpreter):
    """Runs a graph with a small part of one typical error added at its node."""

    def __init__(self, module: fx.GraphModule, node: str, probe: Probe) -> None:
        super().__init__(module)
        self.node = node
        self.probe = probe

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name != self.node:
            return value
        arguments, named = self.fetch_args_kwargs_from_env(n)
        return value + SMALL * self.probe.difference((n, arguments, named, value))


def caused(graph: ModelGraph, node: str, probe: Probe, x: Tensor) -> float:
    """The squared difference of the outputs, summed over images [N], for an error of size one."""
    module = plain_module(graph.exported).eval()
    with torch.no_grad():
        (dense,), (wrong,) = map(tree_leaves, (module(x), Erring(module, node, probe).run(x)))
    return float(((wrong - dense) / SMALL).square().sum() / dense.square().mean())


def known(name: str) -> tuple[ModelGraph, Any, Tensor]:
    """A scrambled network in float64, its statistics, and its two images."""
    build, x = NETWORKS[name]
    model, x = scramble(build()), x.double()
    graph = trace(model, x)
    return graph, calibrate(graph, [x]), x


@pytest.mark.parametrize("name", NETWORKS)
def test_against_networks_that_really_err(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random projections of many copies of the images add up to the squared norm that each error really causes."""
    graph, statistics, x = known(name)
    monkeypatch.setattr(sensitivity, "IMAGES", COPIES * len(x))
    found = sensitivities(graph, statistics, [x.repeat(COPIES, *[1] * (x.dim() - 1))])
    exact: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for node, probe in sensitivity._probes(graph, statistics):
        exact.setdefault(probe.name, []).append((caused(graph, node, probe, x), probe.error))
    order = [node.name for node in graph.nodes]
    expected = {
        name: (sum(c for c, _ in pairs) / total) ** POWER * np.exp(DEPTH * order.index(name[0]) / len(order))
        for name, pairs in exact.items()
        if (total := sum(error for _, error in pairs)) > 0
    }
    unreached = expected.keys() - found.keys()
    assert {graph.layer[node].module for node, _ in unreached} == ({"places"} if name == "sums in place" else set())
    expected = {name: value for name, value in expected.items() if name in found}
    assert len(expected) >= 3
    nodes = {layer.node for layer in graph.layers}
    layers = [value for (node, _), value in expected.items() if node in nodes]
    mean = sum(layers) / len(layers)
    assert found == pytest.approx({name: value / mean for name, value in expected.items()}, rel=0.15)
    assert sum(value for (node, _), value in found.items() if node in nodes) == pytest.approx(len(layers))


@pytest.mark.parametrize("name", NETWORKS)
def test_typical_errors_are_as_large_as_they_say(name: str) -> None:
    """Of the layer's output energy, around its mean where the mean is free; on few images many are small."""
    graph, statistics, x = known(name)
    every = [(node, probe) for node, probe in sensitivity._probes(graph, statistics) if node in statistics]
    probes = [(node, probe) for node, probe in every if statistics[node].energy > 0]  # around its mean a table has none
    assert len(probes) >= 3
    for node, probe in probes:
        seen: list[Tensor] = []

        def noted(call: Any, probe: Probe = probe, seen: list[Tensor] = seen) -> Tensor:
            seen.append(probe.difference(call))
            return seen[-1]

        with torch.no_grad():
            Erring(plain_module(graph.exported).eval(), node, replace(probe, difference=noted)).run(x)
        outputs, moments = seen[0].shape[-1 if seen[0].dim() == 3 else 1], statistics[node]
        energy = float(seen[0].square().sum() / seen[0].numel() * outputs) / moments.energy
        assert energy == pytest.approx(probe.error, rel=0.05, abs=2e-3)
    assert sum(0.02 < probe.error < 1 for _, probe in probes) >= 2


def test_the_error_of_a_dropped_branch_is_the_branch_even_where_the_sum_is_written_in_its_place() -> None:
    for name in ("sums in place", "branch, dilation, no biases"):
        graph, statistics, x = known(name)
        probes = [(n, p) for n, p in sensitivity._probes(graph, statistics) if n in statistics.branches]
        assert len(probes) == len(graph.branches) >= 1
        for node, probe in probes:
            seen: list[float] = []

            def noted(call: Any, probe: Probe = probe, seen: list[float] = seen) -> Tensor:
                seen.append(float(probe.difference(call).square().sum() / call[3].square().sum()))
                return call[3]

            with torch.no_grad():
                Erring(plain_module(graph.exported).eval(), node, replace(probe, difference=noted)).run(x)
            assert seen == pytest.approx([statistics.branches[node]])
            assert seen == pytest.approx([probe.error])


def test_a_prober_is_freed_with_all_that_it_holds() -> None:
    graph, statistics, x = known("branch, dilation, no biases")
    made: list[Any] = []
    inner = sensitivity._Prober.__init__

    def noted(self: Any, *arguments: Any) -> None:
        inner(self, *arguments)
        made.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity._Prober, "__init__", noted)
        assert sensitivities(graph, statistics, [x])
    gc.collect()
    assert [reference() for reference in made] == [None]


def test_what_images_do_not_reach_counts_as_the_mean_and_input_may_be_written_to() -> None:
    class Writes(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.1
            return super().forward(x)

    for build in (InPlace, Writes):
        model, x = scramble(build()).requires_grad_(False), images(8)[0].double()
        model.coordinates = model.coordinates[0]  # without a batch axis
        graph = trace(model, x)
        statistics = calibrated(graph, [x])
        layers = {layer.module: layer.node for layer in graph.layers}
        assert (layers["places"], "channels") not in statistics.weights
        assert statistics.weight(layers["places"]) == 1
        assert statistics.weight(layers["one"]) not in (0, 1)
        assert statistics.weight(layers["one"], "kernel") != statistics.weight(layers["one"])
        assert statistics.weight(layers["two"], "kernel") == statistics.weight(layers["two"])


def test_a_typical_error_of_scores_is_what_they_lose_around_their_mean_over_the_keys() -> None:
    graph, statistics, x = known("attention spelled out")
    probes = sensitivity._probes(graph, statistics)
    ((node, probe),) = ((node, probe) for node, probe in probes if probe.name[0] in statistics.scores)
    seen: list[list[Tensor]] = []

    def noted(call: Any) -> Tensor:
        seen.append([y - y.mean(-1, keepdim=True) for y in (probe.difference(call), call[3])])
        return call[3]

    with torch.no_grad():
        Erring(plain_module(graph.exported).eval(), node, replace(probe, difference=noted)).run(x)
    lost, whole = (float(y.square().sum()) for y in seen[0])
    assert lost / whole == pytest.approx(probe.error)
    assert 0 < probe.error < 0.5


def test_what_the_output_does_not_see_weighs_nothing() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.unseen, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(16, 4)
            self.head.weight.data[:, 8:] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.seen(x), self.unseen(x)], 1).relu().mean((2, 3)))

    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(Blind().eval(), x)
    found = sensitivities(graph, calibrate(graph, [x]), [x])
    seen, unseen = (found[layer.node, "channels"] for layer in graph.layers[:2])
    assert unseen == 0
    assert seen > 0


def test_images_go_through_in_as_many_passes_as_memory_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, statistics, _ = known("branch, dilation, no biases")
    x = torch.randn(400, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    passes: list[int] = []
    inner = sensitivity._Prober.probe
    monkeypatch.setattr(sensitivity, "IMAGES", 400)
    monkeypatch.setattr(sensitivity._Prober, "probe", lambda self, part: (passes.append(len(part)), inner(self, part)))
    whole = sensitivities(graph, statistics, [x])
    probed = [node for node, _ in sensitivity._probes(graph, statistics)]
    each = sum(int(torch.Size(node.shape).numel()) * (1 + probed.count(node.name)) for node in graph.nodes)
    monkeypatch.setattr(sensitivity, "LARGEST_PASS", 7 * each + 1)
    told: list[tuple[int, int]] = []
    parts = sensitivities(graph, statistics, [*x.split(150)], lambda done, total: told.append((done, total)))
    assert passes == [400, *[7] * 57, 1]
    assert told == [*((7 * number, 400) for number in range(1, 58)), (400, 400)]
    assert parts == pytest.approx(whole, rel=0.35)


def test_networks_without_a_gradient_weigh_all_alike() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bucketize(self.two(self.one(x).relu()), torch.tensor([0.0]))

    x = torch.randn(4, 3, 8, 8)
    graph = trace(Steps().eval(), x)
    statistics = calibrate(graph, [x])
    statistics.weights = sensitivities(graph, statistics, [x])
    assert statistics.weights == {}
    assert statistics.weight(graph.layers[0].node) == 1.0


def test_the_table_counts_each_layer_and_branch_by_its_weight() -> None:
    """Errors add up, so without the weight of one layer just its own are missing; branches bring theirs with them."""
    graph, statistics, _ = known("branch, dilation, no biases")
    candidates = tiny.candidates(graph, statistics)
    plan = [0 if site.branch else len(candidates.drafts[site.name]) - 1 for site in candidates.sites]
    dropped = [int(site.branch is not None) for site in candidates.sites]
    whole, branch = (candidates.error()(choices) for choices in (plan, dropped))
    parts = []
    for node in statistics:
        statistics.weights = {(node, "channels"): 0.0}
        parts.append(whole - candidates.error()(plan))
    assert sum(part > 1e-3 for part in parts) >= 3
    assert sum(parts) == pytest.approx(whole)
    statistics.weights = dict.fromkeys(((node, "channels") for node in [*statistics, *statistics.branches]), 3.0)
    heavier = tiny.candidates(graph, statistics).error()
    assert branch > 0
    assert [heavier(plan), heavier(dropped)] == pytest.approx([3 * whole, 3 * branch])
