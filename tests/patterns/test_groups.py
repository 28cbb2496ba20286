"""Convolutions divided into groups: what is offered, who reads what, and that the groups compute the masked weights."""

from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from graphprune import candidates as tables
from graphprune.calibration import Statistics, calibrate
from graphprune.candidates import Candidates
from graphprune.compensation import Loss
from graphprune.cuts import resolve
from graphprune.drawing import PlanLabels, draw
from graphprune.errors import InputError
from graphprune.export import onnx_bytes
from graphprune.exported import cut_program
from graphprune.graph import ModelGraph, Site
from graphprune.operators import Absent, Convolution
from graphprune.pattern import Level
from graphprune.patterns.groups import Groups
from graphprune.plan import Choice, Plan
from graphprune.repair import make_reference, repair
from graphprune.surgery import operate
from graphprune.tracing import trace
from tests.graphprune.networks import Chain
from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble
from tests.graphprune.tiny import LinearProfile, candidates

GROUPS = Groups()


def site(filters: int, channels: int, order: int = 0) -> Site:
    given = {"kernel": (3, 3), "order": order, "filters": filters, "channels": channels}
    return Site("conv/kernel", "kernel", 9, ("conv",), "conv", **given)  # type: ignore[arg-type]


def chain(bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ModelGraph, torch.Tensor]:
    torch.manual_seed(0)
    model, x = scramble(Chain(bias), dtype=dtype), torch.randn(4, 3, 12, 8, dtype=dtype)
    return model, trace(model, x), x


def divided(graph: ModelGraph, name: str, level: str = "2 groups", seed: int = 3) -> Choice:
    made = graph.site[name]
    scores = np.random.default_rng(seed).normal(size=(made.filters, len(GROUPS.patches(made))))
    return Choice(made.name, "groups", level, GROUPS.choose(made, Level(level, 0), scores))


def plan(graph: ModelGraph, *choices: Choice) -> Plan:
    return Plan(graph.signature, choices, graph.inputs)


def test_levels_give_each_group_whole_blocks() -> None:
    assert GROUPS.levels(site(64, 64), 16) == (Level("2 groups", 128), Level("4 groups", 64))
    assert GROUPS.levels(site(64, 32), 16) == (Level("2 groups", 128),)
    assert GROUPS.levels(site(32, 64), 16) == (Level("2 groups", 64),)
    for other in (site(64, 16), site(16, 64), site(64, 3), site(48, 48), site(64, 64, order=-1)):
        assert GROUPS.levels(other, 16) == ()


def test_filters_go_where_the_total_score_is_highest() -> None:
    made = site(4, 8)
    patches = GROUPS.patches(made)
    assert patches[:2] == (((0, 3), (0, 3), (0, 4)), ((0, 3), (0, 3), (4, 8)))
    scores = np.random.default_rng(0).normal(size=(4, len(patches)))
    for level, shares in (("2 groups", [0, 0, 1, 1]), ("4 groups", [0, 1, 2, 3])):
        first = 0 if level == "2 groups" else 2
        found = GROUPS.rewrite(made, GROUPS.choose(made, Level(level, 0), scores)).groups["conv"]
        assert found == max(permutations(shares), key=lambda own: sum(scores[f, first + g] for f, g in enumerate(own)))


@pytest.mark.parametrize("keep", [(0, 1, 4, 5), (0, 2, 5, 7), (0, 1, 2, 4, 5, 6), (0, 1, 6), (0, 5), ()])
def test_what_are_no_groups_is_refused(keep: Sequence[int]) -> None:
    """Both filters in one group, halves that are none, three quarters, unlike shares, too few filters, nothing."""
    with pytest.raises(InputError, match="equally many"):
        GROUPS.rewrite(site(2, 8), tuple(keep))


def test_filters_that_must_stay_where_they_are_are_refused() -> None:
    with pytest.raises(InputError, match="free order"):
        GROUPS.rewrite(site(2, 8, order=-1), (0, 1, 6, 7))


@pytest.mark.parametrize("bias", [False, True])
def test_groups_compute_the_masked_weights_whatever_else_is_cut(bias: bool) -> None:
    model, graph, x = chain(bias)
    apart = Choice("three/kernel", "kernel", "1x3 top", (0, 1, 2))
    around = Choice("two.0/channels", "filter", "some", (0, 2, 3, 4, 7, 8, 11, 13))
    for choices in (
        [divided(graph, "one.0/kernel")],
        [divided(graph, "one.0/kernel", "4 groups"), apart, around],
        [divided(graph, "two.0/kernel", "4 groups"), apart],
    ):
        given = plan(graph, *choices)
        operation, cuts = operate(model, graph, given), resolve(graph, given)
        assert operation.own_class
        expected = masked_outputs(graph, given, model, (x,))
        assert relative_error(expected, outputs_of(model, (x,))) > 1e-3
        for pruned in (operation.model, cut_program(graph, cuts, model)):
            assert relative_error(outputs_of(pruned, (x,)), expected) < 1e-10
        node = graph.site[choices[0].site].node
        conv = operation.model.get_submodule(graph.layer[node].module)
        operator = cuts.operator(graph.layer[node])
        assert isinstance(operator, Convolution)
        assert operator.groups == conv.groups == int(choices[0].level[0])
        assert operator.parameters == conv.weight.numel()
        assert (conv.in_channels, conv.out_channels) == (operator.inputs, operator.outputs)
        assert type(conv) is nn.Conv2d
        assert list(operation.model.state_dict()) == list(model.state_dict())


def test_what_moves_or_cuts_the_channels_or_filters_excludes_groups() -> None:
    model, graph, _ = chain()
    two = divided(graph, "two.0/kernel")
    for other in (
        divided(graph, "one.0/kernel"),
        Choice("one.0/channels", "filter", "some", tuple(range(12))),
        Choice("two.0/channels", "filter", "some", tuple(range(8))),
    ):
        with pytest.raises(InputError, match=r"'two\.0' cannot be divided into groups"):
            operate(model, graph, plan(graph, two, other))


def test_no_gather_remains_in_the_file() -> None:
    model, graph, x = chain(dtype=torch.float32)
    given = plan(graph, divided(graph, "one.0/kernel", "4 groups"))
    nodes = onnx.load_from_string(onnx_bytes(operate(model, graph, given).model, x)).graph.node
    groups = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "group"]
    assert sorted(groups) == [1, 1, 1, 4]
    assert not {"Gather", "Concat", "Split", "BatchNormalization"} & {node.op_type for node in nodes}


def test_a_dropped_branch_takes_its_groups_with_it() -> None:
    _, graph, _ = chain()
    cuts = resolve(graph, plan(graph, divided(graph, "two.0/kernel")))
    assert cuts.operator(graph.layer[graph.site["two.0/kernel"].node]) != Absent()
    branch = next(site for site in graph.all_sites if site.branch)
    assert branch.branch
    assert {graph.site[name].node for name in ("one.0/kernel", "two.0/kernel")} <= branch.branch.inside
    both = resolve(graph, plan(graph, divided(graph, "two.0/kernel"), Choice(branch.name, "block", "removed", ())))
    assert not both.groups


def test_repair_solves_each_group() -> None:
    model, graph, _ = chain(dtype=torch.float32)
    images = torch.randn(96, 3, 12, 8)
    cuts = resolve(graph, plan(graph, divided(graph, "one.0/kernel")))
    pruned = operate(model, graph, plan(graph, divided(graph, "one.0/kernel"))).model
    sliced = pruned.one[0].weight.clone()
    with torch.no_grad():
        stream = model.stem(images)
        wanted = model.one[0](stream)[:, cuts.kept[graph.site["one.0/kernel"].order]]

    def error() -> float:
        with torch.no_grad():
            return float((pruned.one[0](stream) - wanted).var((0, 2, 3)).sum() / wanted.var((0, 2, 3)).sum())

    before = error()
    repair(pruned, model, graph, cuts, make_reference(graph, [images]))
    assert not torch.equal(pruned.one[0].weight, sliced)
    assert error() < before * 0.99


@pytest.fixture(params=[1024, 1])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Candidates, Statistics]:
    """The candidates of the chain and what they were made from, with tables of that many pairs at most."""
    monkeypatch.setattr(tables, "LARGEST_TABLE", request.param)
    _, graph, _ = chain(dtype=torch.float32)
    statistics = calibrate(graph, [torch.randn(32, 3, 12, 8)])
    return candidates(graph, statistics, LinearProfile(block=2)), statistics


def test_tables_know_the_error_of_each_filter(known: tuple[Candidates, Statistics]) -> None:
    made, statistics = known
    node = made.graph.site["two.0/kernel"].node
    layer, moments = made.graph.layer[node], statistics[node]
    options = [draft for draft in made.drafts["two.0/kernel"] if draft.pattern == "groups"]
    assert [draft.level for draft in options] == ["2 groups", "4 groups"]
    for draft in options:
        expected = 0.0
        for filter_, (_, _, (first, last)) in enumerate(draft.cuts.patches(layer)):
            own = torch.tensor([filter_])
            weight = moments.weight[:, own].double()
            share = weight @ moments.matrix * weight
            kept = torch.arange(first * 9, last * 9)
            expected += Loss(moments, own).error(kept) * float(share.sum()) / moments.energy
        assert made._layer_error(layer, draft.cuts) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("other", ["one.0/kernel", "one.0/channels", "two.0/channels", "three/kernel"])
def test_tables_know_what_excludes_groups(known: tuple[Candidates, Statistics], other: str) -> None:
    made, _ = known
    names = [site.name for site in made.sites]
    cost = made.cost(lambda operator: operator.flops, made.graph.flops)
    pairs = product(enumerate(made.drafts[other]), enumerate(made.drafts["two.0/kernel"]))
    for (first, left), (second, right) in pairs:
        choices = [0] * len(names)
        choices[names.index(other)], choices[names.index("two.0/kernel")] = first, second
        excluded = bool(right.cuts.groups) and (bool(left.cuts.order) or "channels" in other) and first > 0
        mixed = bool(right.cuts.mixes) and other == "two.0/channels" and first > 0 and tables.LARGEST_TABLE > 1
        assert np.isinf(cost(choices)) == (excluded or mixed), (left.level, right.level)
        if excluded:
            with pytest.raises(InputError, match="cannot be divided"):
                made.cuts(choices)
        else:
            assert made.cuts(choices)


def test_people_see_groups() -> None:
    _, graph, _ = chain()
    boxes = [
        box for box in draw(graph, PlanLabels(graph, plan(graph, divided(graph, "one.0/kernel")))).boxes if box.patterns
    ]
    assert [box.patterns for box in boxes] == [("groups",)]
    assert "2 groups" in boxes[0].title
