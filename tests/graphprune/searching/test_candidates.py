"""Tables against the networks that are really cut, and against the closed form layer by layer."""

import math
from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from graphprune.counting import count
from graphprune.coupling.graph import Layer, ModelGraph
from graphprune.coupling.operators import Convolution, Operator
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.surgery import perform
from graphprune.registry import patterns
from graphprune.repairing.calibration import Statistics, calibrate
from graphprune.repairing.compensation import Consumer, Loss, rank_units
from graphprune.searching import candidates as module
from graphprune.searching.candidates import Candidates, kept_features
from graphprune.searching.problem import Sum
from tests.graphprune.networks import ChannelShuffle, conv_bn
from tests.graphprune.oracle import axis_mask, scramble
from tests.graphprune.tiny import LinearProfile, candidates


class Joined(nn.Module):
    """Two convolutions whose outputs are concatenated for a third."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 32, 3), nn.Conv2d(64, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.cat([self.one(x), self.two(x)], 1)))


def conv_net() -> nn.Module:
    """Strides, biases, norms, a 5x5 kernel, flattening, hidden units; no layer that can be divided into groups of 16,
    which would exclude other choices.
    """
    convolutions = [*conv_bn(3, 32), nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(), nn.Conv2d(48, 32, 5, padding=2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 80), nn.ReLU(), nn.Linear(80, 5))


def vit() -> nn.Module:
    """Two blocks of a small timm ViT."""
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=5)


BUILDERS = {"conv": (conv_net, 8), "vit": (vit, 32), "joined": (Joined, 8), "shuffle": (ChannelShuffle, 8)}
Built = tuple[nn.Module, ModelGraph, Statistics, Tensor]


@cache
def built(name: str) -> Built:
    """A scrambled network, its graph, its moments on eight images, an example."""
    build, size = BUILDERS[name]
    torch.manual_seed(0)
    model = scramble(build(), dtype=torch.float32)
    x = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    graph = trace(model, x[:2])
    return model, graph, calibrate(graph, [x]), x[:2]


@cache
def collected(name: str) -> Candidates:
    """Its candidates."""
    _, graph, statistics, _ = built(name)
    return candidates(graph, statistics)


def random_choices(made: Candidates, times: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Choice vectors drawn uniformly, every option of every site."""
    rng = np.random.default_rng(seed)
    sizes = [len(made.drafts[site.name]) for site in made.sites]
    return [tuple(int(rng.integers(size)) for size in sizes) for _ in range(times)]


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "vit", "joined"])
def test_flops_and_parameters_are_those_of_the_cut_network(name: str) -> None:
    model, graph, _, x = built(name)
    made, dense = collected(name), count(model, x)
    flops = made.cost(lambda operator: operator.flops, dense.flops)
    params = made.cost(lambda operator: operator.parameters, dense.params)
    weights = {layer.weight for layer in graph.layers}
    zero = (0,) * len(made.sites)
    assert flops(zero) == pytest.approx(1, rel=1e-12)
    assert params(zero) == pytest.approx(1, rel=1e-12)
    gone = 0
    for choices in random_choices(made, 4):
        pruned = perform(model, graph, made.cuts(choices)).model
        counts = count(pruned, x)
        assert flops(choices) * dense.flops == pytest.approx(counts.flops, rel=1e-12)
        # The table knows the layers' weights; biases and norms of cut channels go as well.
        state = dict(pruned.named_parameters())
        others = sum(
            v.numel() - (state[n].numel() if n in state else 0) for n, v in model.named_parameters() if n not in weights
        )
        gone += others
        assert params(choices) * dense.params == pytest.approx(counts.params + others, rel=1e-12)
        batched = flops.batch(np.array([choices, zero]))
        assert batched == pytest.approx([flops(choices), 1.0], rel=1e-12)
    assert gone > 0


def test_what_layers_do_not_explain_is_a_constant() -> None:
    made = collected("conv")
    layers = sum(layer.operator.flops for layer in made.graph.layers)
    choices = random_choices(made, 1)[0]
    exact = made.cost(lambda operator: operator.flops, layers)
    loose = made.cost(lambda operator: operator.flops, 4 * layers)
    assert loose((0,) * len(choices)) == pytest.approx(1)
    assert loose(choices) == pytest.approx(0.75 + exact(choices) / 4)
    tight = made.cost(lambda operator: operator.flops, layers / 2)
    assert tight(choices) == pytest.approx(exact(choices)), "layers that claim more than the whole are scaled down"


def test_everything_the_tables_need_is_measured_in_advance() -> None:
    _, graph, statistics, _ = built("conv")
    profile = LinearProfile()
    made = candidates(graph, statistics, profile)
    before = set(profile.filled)
    whole = sum(profile.seconds(layer.operator) for layer in graph.layers)
    latency = made.cost(profile.seconds, whole)
    for choices in random_choices(made, 5):
        operators = [made.cuts(choices).operator(layer) for layer in graph.layers]
        assert set(operators) <= before
        assert latency(choices) == pytest.approx(sum(map(profile.seconds, operators)) / whole)
    assert profile.filled == before


def test_what_the_engine_cannot_time_is_no_option_and_costs_nothing() -> None:
    _, graph, statistics, _ = built("conv")

    def failing(operator: Operator) -> bool:
        return isinstance(operator, Convolution) and (operator.inputs == 3 or operator.kernel[0] == 1)

    profile = LinearProfile(failing=failing)
    made = candidates(graph, statistics, profile)
    whole = sum(layer.operator.flops for layer in graph.layers if not failing(layer.operator)) * 1e-9
    latency = made.cost(profile.seconds, whole)
    assert "0/kernel" not in made.drafts
    assert "0/channels" not in made.drafts
    assert "1x3 middle" not in [draft.level for draft in made.drafts["3/kernel"]]
    assert "3x1 centre" in [draft.level for draft in made.drafts["3/kernel"]]
    assert latency((0,) * len(made.sites)) == pytest.approx(1)
    assert all(0 < latency(choices) <= 1 for choices in random_choices(made, 20))


def test_a_combination_that_the_engine_cannot_time_is_never_within_a_limit() -> None:
    _, graph, statistics, _ = built("conv")
    both = {(16, (3, 1))}
    profile = LinearProfile(failing=lambda o: isinstance(o, Convolution) and (o.inputs, o.kernel) in both)
    made = candidates(graph, statistics, profile)
    latency = made.cost(profile.seconds, sum(layer.operator.flops for layer in graph.layers) * 1e-9)
    names = [site.name for site in made.sites]
    levels = [draft.level for draft in made.drafts["3/kernel"]]
    choices = [0] * len(names)
    choices[names.index("3/kernel")] = levels.index("3x1 centre")
    assert latency(choices) < 1
    choices[names.index("0/channels")] = 1
    assert latency(choices) == math.inf


# --- errors ---------------------------------------------------------------------------------------------------------


def by_mask(layer: Layer, cuts: Cuts) -> Tensor:
    """The kept features of a layer from masks of booleans."""
    keep = {atom: tuple(indices.tolist()) for atom, indices in cuts.keep.items()}
    mask = axis_mask(layer.inputs, keep)
    if isinstance(layer.operator, Convolution):
        kernel = np.zeros(layer.operator.kernel, dtype=bool)
        rows, columns = cuts.windows.get(layer.node, ((0, None), (0, None)))
        kernel[slice(*rows), slice(*columns)] = True
        mask = mask[: len(mask) // layer.operator.groups, None, None] & kernel
    return torch.from_numpy(np.flatnonzero(mask))


@pytest.mark.parametrize("name", ["conv", "vit", "joined"])
def test_errors_are_the_closed_form_of_all_cuts_of_a_layer_together(name: str) -> None:
    _, graph, statistics, _ = built(name)
    made = collected(name)
    error = made.error()
    assert error((0,) * len(made.sites)) == 0
    for choices in random_choices(made, 5, seed=1):
        cuts = made.cuts(choices)
        expected = sum(statistics.branches[branch.node] for branch in cuts.dropped)
        for node, moments in statistics.items():
            kept = by_mask(graph.layer[node], cuts)
            assert torch.equal(kept_features(graph.layer[node], cuts), kept)
            if len(kept) < moments.second.shape[-1] and not cuts.drops(graph.layer[node]):
                expected += Loss(moments).error(kept)
        assert error(choices) == pytest.approx(expected, rel=1e-9)
        assert expected > 0


def test_kernels_of_grouped_convolutions() -> None:
    made = collected("shuffle")
    (layer,) = [layer for layer in made.graph.layers if layer.module == "second.0"]
    kernel = next(n for n, site in enumerate(made.sites) if site.node == layer.node and site.kind == "kernel")
    error, zero = made.error(), [0] * len(made.sites)
    for option, draft in enumerate(made.drafts[made.sites[kernel].name]):
        choices = [*zero[:kernel], option, *zero[kernel + 1 :]]
        kept = by_mask(layer, draft.cuts)
        assert len(kept) == 12 // layer.operator.groups * len(draft.keep)
        expected = Loss(made.statistics[layer.node]).error(kept) if option else 0
        assert error(choices) == pytest.approx(expected, rel=1e-9)


def test_large_tables_fall_apart_into_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collected("conv")
    _, graph, statistics, x = built("conv")
    monkeypatch.setattr(module, "LARGEST_TABLE", 8)
    apart = candidates(graph, statistics)
    model = built("conv")[0]
    assert [site.name for site in apart.sites] == [site.name for site in whole.sites]
    sums: list[tuple[Sum, Sum]] = [(made_apart, made_whole) for made_apart, made_whole in [
        (apart.error(), whole.error()),
        (
            apart.cost(lambda o: o.flops, count(model, x).flops),
            whole.cost(lambda o: o.flops, count(model, x).flops),
        ),
    ]]  # fmt: skip
    factors = [factor for total, _ in sums for factor in total.factors]
    assert all(len(factor.sites) == 1 or factor.table.size <= 8 for factor in factors), "no large table"
    assert any(len(factor.sites) == 1 for factor in factors)
    zero = [0] * len(apart.sites)
    for total, exact in sums:
        assert total(zero) == pytest.approx(exact(zero), abs=1e-12)
        change = 0.0
        everywhere = random_choices(apart, 1, seed=3)[0]
        for number, site in enumerate(apart.sites):
            for option in range(len(apart.drafts[site.name])):
                alone = [*zero[:number], option, *zero[number + 1 :]]
                assert total(alone) == pytest.approx(exact(alone), rel=1e-9, abs=1e-12), site.name
            alone = [*zero[:number], everywhere[number], *zero[number + 1 :]]
            change += exact(alone) - exact(zero)
        assert total(everywhere) == pytest.approx(exact(zero) + change, rel=1e-9)


# --- which units stay -----------------------------------------------------------------------------------------------


def kept(made: Candidates, site: str, option: int) -> list[int]:
    return list(made.drafts[site][option].keep)


def best(scores: np.ndarray, amount: int) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:amount].tolist())


def test_units_are_ranked_for_their_consumers() -> None:
    made = collected("conv")
    moments = {made.graph.layer[node].module: m for node, m in made.statistics.items()}
    channels = rank_units([Consumer(moments["3"], torch.arange(32 * 9).reshape(32, 9))], 32)
    assert kept(made, "0/channels", 1) == best(channels, 16)
    flattened = rank_units([Consumer(moments["8"], torch.arange(512).reshape(32, 16))], 32)
    assert kept(made, "5/channels", 1) == best(flattened, 16)
    hidden = rank_units([Consumer(moments["10"], torch.arange(80)[:, None])], 80)
    assert [kept(made, "8/hidden", option) for option in (1, 2, 3)] == [best(hidden, n) for n in (64, 32, 16)]


def test_units_beside_others_on_a_concatenated_axis_are_ranked_alone() -> None:
    made = collected("joined")
    (moments,) = [m for node, m in made.statistics.items() if made.graph.layer[node].module == "last"]
    features = torch.arange(64 * 9).reshape(64, 9)
    for name, rows in (("one", features[:32]), ("two", features[32:])):
        assert kept(made, f"{name}/channels", 1) == best(rank_units([Consumer(moments, rows)], 32), 16)


def test_without_calibrated_consumers_magnitude_ranks_and_the_cut_share_is_the_error() -> None:
    model, graph, _, _ = built("conv")
    made = candidates(graph, Statistics({}, {}))
    first, norm, second = model[0], model[1], model[3]
    parts = [
        first.weight.flatten(1),
        norm.weight[:, None],
        norm.bias[:, None],
        second.weight.transpose(0, 1).flatten(1),
    ]
    scores = sum((part.double().square().sum(1) / part.double().square().sum()).detach().numpy() for part in parts)
    assert kept(made, "0/channels", 1) == best(scores, 16)
    error, names = made.error(), [site.name for site in made.sites]
    for choices in random_choices(made, 5):
        shares = [len(made.drafts[n][c].keep) / graph.site[n].size for n, c in zip(names, choices, strict=True)]
        assert error(choices) == pytest.approx(sum(1 - share for share in shares))


def test_groups_that_only_grouped_convolutions_read() -> None:
    _, graph, statistics, _ = built("shuffle")
    made = candidates(graph, statistics, LinearProfile(block=1))
    error, zero = made.error(), [0] * len(made.sites)
    grouped = [
        n for n, site in enumerate(made.sites) if site.kind == "channels" and not reads_densely(graph, site.atom)
    ]
    assert grouped, "the network has such a group"
    for number in grouped:
        site = made.sites[number]
        for option, draft in enumerate(made.drafts[site.name]):
            alone = [*zero[:number], option, *zero[number + 1 :]]
            assert error(alone) == pytest.approx(1 - len(draft.keep) / site.size)


def reads_densely(graph: ModelGraph, atom: int) -> bool:
    return any(layer.groups is None and atom in layer.inputs.atoms() for layer in graph.layers)


# --- what agents see ------------------------------------------------------------------------------------------------


def test_decisions() -> None:
    made = collected("conv")
    nodes = {node.name: number for number, node in enumerate(made.graph.nodes)}
    error, zero = made.error(), [0] * len(made.sites)
    decisions = made.decisions(error, nodes)
    assert [decision.site for decision in decisions] == [site.name for site in made.sites]
    for number, (decision, site) in enumerate(zip(decisions, made.sites, strict=True)):
        dense, *others = decision.options
        assert (decision.kind, decision.node) == (site.kind, nodes[site.node])
        assert (dense.pattern, dense.error, dense.gain, dense.kept_share) == ("dense", 0, 1, 1)
        assert dense.keep == tuple(range(site.size))
        layers = [made.graph.layer[node] for node in site.layers]
        for index, option in enumerate(others, start=1):
            cut = sum(made.drafts[site.name][index].cuts.operator(layer).flops for layer in layers)
            assert option.gain == pytest.approx(sum(layer.operator.flops for layer in layers) / cut)
            units = patterns()[option.pattern].units(site)
            assert option.kept_share == len(option.keep) / units < 1
            assert option.error == error([*zero[:number], index, *zero[number + 1 :]])
            assert bool(option.geometry) == (site.kind == "kernel")
    by_name = {decision.site: decision for decision in decisions}
    bits = {option.level: "".join(f"{bit:.0f}" for bit in option.geometry) for option in by_name["3/kernel"].options}
    assert bits["2x2 top left"] == "110110000"
    assert bits["1x3 bottom"] == "000000111"
    assert bits["dense"] == "111111111"
    larger = {option.level: "".join(f"{bit:.0f}" for bit in option.geometry) for option in by_name["5/kernel"].options}
    assert larger == {
        "dense": "111111111", "3x3 centre": "000010000", "5x1 centre": "010010010", "1x5 middle": "000111000",
    }  # fmt: skip


def test_sites_without_an_option_are_left_out() -> None:
    _, graph, statistics, _ = built("conv")
    made = candidates(graph, statistics, LinearProfile(block=80))
    assert [site.name for site in made.sites] == ["0/kernel", "3/kernel", "5/kernel"]
    assert made.cuts((0, 0, 0)) == Cuts()


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_importance_has_a_value_for_each_unit_and_follows_its_weights(name: str) -> None:
    made, graph = collected(name), built(name)[1]
    nodes = {node.name: number for number, node in enumerate(graph.nodes)}
    assert made.sites
    for decision, site in zip(made.decisions(made.error(), nodes), made.sites, strict=True):
        if site.branch is not None:
            assert decision.importance == ()
        elif site.kind == "kernel":
            weight = graph.exported.state_dict[graph.layer[site.node].weight].detach().abs()
            expected = [float(weight[:, channel].mean()) for channel in range(weight.shape[1])]
            assert decision.importance == pytest.approx(expected)
        else:
            assert len(decision.importance) == site.size
            assert min(decision.importance) > 0
