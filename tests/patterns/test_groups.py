"""Layers divided into groups: what is offered, who reads what, and that the groups compute the masked weights."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional

from graphprune.counting import count
from graphprune.coupling.graph import ModelGraph, Site
from graphprune.coupling.operators import Absent, Convolution, Operator
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import resolve
from graphprune.cutting.division import GroupedLinear
from graphprune.cutting.exported import cut_program
from graphprune.cutting.surgery import apply, operate
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.onnx_files.surgery import OnnxSurgeon
from graphprune.pattern import Level, shared_equally
from graphprune.patterns.groups import Groups
from graphprune.plan import Choice, Plan
from graphprune.repairing.calibration import Statistics, calibrate
from graphprune.repairing.compensation import Loss
from graphprune.repairing.repair import make_reference, repair
from graphprune.reporting.drawing import PlanLabels, draw
from graphprune.reporting.grid import describe
from graphprune.searching import candidates as tables
from graphprune.searching.candidates import Candidates
from tests.graphprune.networks import Chain
from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble
from tests.graphprune.tiny import LinearProfile, candidates

GROUPS = Groups()


class Mlp(nn.Module):
    """Three linear layers inside a residual block; the outputs of the first two may be put in any order."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(12, 16), nn.LayerNorm(16)
        self.one, self.two, self.three = nn.Linear(16, 24, bias), nn.Linear(24, 16, bias), nn.Linear(16, 16, bias)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        hidden = functional.gelu(self.one(self.norm(x)))
        return self.head(x + self.three(functional.relu(self.two(hidden))))


Traced = tuple[nn.Module, ModelGraph, torch.Tensor]


def mlp(bias: bool = True, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (4, 5, 12)) -> Traced:
    """The network on vectors or on tokens."""
    torch.manual_seed(0)
    model, x = scramble(Mlp(bias), dtype=dtype), torch.randn(shape, dtype=dtype)
    return model, trace(model, x), x


def site(filters: int, channels: int, order: int = 0) -> Site:
    given = {"kernel": (3, 3), "order": order, "filters": filters, "channels": channels}
    return Site("conv/kernel", "kernel", 9, ("conv",), "conv", **given)  # type: ignore[arg-type]


def chain(bias: bool = False, dtype: torch.dtype = torch.float64) -> Traced:
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


@pytest.mark.parametrize("columns", [[0, 1], [2, 3, 4, 5], [0, 0, 1, 2]])
def test_the_assignment_is_the_best_where_most_filters_like_the_same(columns: list[int]) -> None:
    scores = -np.exp(np.random.default_rng(0).normal(size=(48, 6))) - np.arange(6)
    share, given = 48 // len(columns), scores.copy()
    found = shared_equally(scores, columns)
    assert np.bincount(found).tolist() == [share] * len(columns)
    rows, taken = linear_sum_assignment(scores[:, np.repeat(columns, share)], maximize=True)
    best = scores[rows, np.repeat(columns, share)[taken]].sum()
    assert scores[rows, np.array(columns)[found]].sum() == pytest.approx(best, rel=1e-12)
    assert (scores == given).all()


def test_a_linear_layer_is_offered_where_its_outputs_may_stand_in_any_order() -> None:
    _, graph, _ = mlp()
    kernels = {made.name: made for made in graph.all_sites if made.order >= 0}
    assert kernels.keys() == {"one/kernel", "two/kernel"}
    one = kernels["one/kernel"]
    assert (one.kernel, one.filters, one.channels, one.size) == ((1, 1), 24, 16, 1)
    assert [level.name for level in GROUPS.levels(one, 4)] == ["2 groups"]


def test_a_linear_layer_that_is_more_than_that_has_no_site() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = Mlp()
    model.one = Scaled(16, 24)
    model.two.register_forward_hook(lambda *_: None)
    sites = trace(model, torch.randn(2, 12)).all_sites
    assert [made.name for made in sites if made.kind == "kernel"] == ["stem/kernel", "three/kernel", "head/kernel"]


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
        conv, operator = masked_and_divided((model, graph, x), choices, 1e-10)
        assert isinstance(operator, Convolution)
        assert (conv.in_channels, conv.out_channels) == (operator.inputs, operator.outputs)
        assert type(conv) is nn.Conv2d


def masked_and_divided(traced: Traced, choices: Sequence[Choice], tolerance: float) -> tuple[nn.Module, Operator]:
    """The module that the first choice divides and its operator, of a network that computes the masked weights."""
    model, graph, x = traced
    given = plan(graph, *choices)
    operation, cuts = operate(model, graph, given), resolve(graph, given)
    assert operation.own_class
    assert list(operation.model.state_dict()) == list(model.state_dict())
    expected = masked_outputs(graph, given, model, (x,))
    assert relative_error(expected, outputs_of(model, (x,))) > 1e-3
    for pruned in (operation.model, cut_program(graph, cuts, model)):
        assert relative_error(outputs_of(pruned, (x,)), expected) < tolerance
    assert count(operation.model, x).flops == sum(cuts.operator(layer).flops for layer in graph.layers)
    layer = graph.layer[graph.site[choices[0].site].node]
    module, operator = operation.model.get_submodule(layer.module), cuts.operator(layer)
    assert operator.groups == module.groups == int(choices[0].level[0])
    assert operator.parameters == module.weight.numel()
    return module, operator


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 12), (4, 5, 12)])
def test_groups_of_linear_layers_compute_the_masked_weights(bias: bool, shape: tuple[int, ...]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, graph, x = mlp(bias, dtype, shape)
        around = Choice("two/hidden", "hidden", "some", (0, 2, 3, 4, 7, 8, 11, 13))
        for choices in (
            [divided(graph, "one/kernel")],
            [divided(graph, "one/kernel", "4 groups"), around],
            [divided(graph, "two/kernel", "4 groups")],
        ):
            linear, operator = masked_and_divided((model, graph, x), choices, tolerance)
            assert isinstance(linear, GroupedLinear)
            assert (linear.in_features, linear.out_features) == (operator.inputs, operator.outputs)


def test_what_cuts_or_moves_the_inputs_or_outputs_of_a_linear_layer_excludes_groups() -> None:
    model, graph, _ = mlp()
    for other in (
        divided(graph, "one/kernel"),
        Choice("one/hidden", "hidden", "some", tuple(range(12))),
        Choice("two/hidden", "hidden", "some", tuple(range(8))),
    ):
        with pytest.raises(InputError, match="'two' cannot be divided into groups"):
            operate(model, graph, plan(graph, divided(graph, "two/kernel"), other))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 12), (4, 5, 12)])
def test_linear_layers_in_groups_are_products_side_by_side_in_every_file(bias: bool, shape: tuple[int, ...]) -> None:
    model, graph, x = mlp(bias, torch.float32, shape)
    given = plan(graph, divided(graph, "one/kernel", "4 groups"))
    pruned = operate(model, graph, given).model
    other = scramble(operate(model, graph, given).model, 1, torch.float32)
    cuts, surgeon = resolve(graph, given), OnnxSurgeon(graph)
    files = [
        (pruned, onnx_bytes(pruned, x)), (pruned, surgeon.cut(cuts)), (other, surgeon.cut(cuts, other.state_dict())),
    ]  # fmt: skip
    for module, file in files:
        proto = onnx.load_from_string(file)
        (found,) = OnnxRuntimeEngine().run(file, {proto.graph.input[0].name: x.numpy()})
        assert relative_error([torch.from_numpy(found)], outputs_of(module, (x,))) < 1e-4
        kinds = [node.op_type for node in proto.graph.node]
        assert sum(kinds.count(kind) for kind in ("MatMul", "Gemm")) == 4 + 4
        assert (kinds.count("Concat"), kinds.count("Gather"), kinds.count("Shape")) == (1, 0, 0)
        assert (kinds.count("Split"), kinds.count("Slice")) in ((1, 0), (0, 4))  # which the engine joins


def test_linear_layers_of_a_bare_file_are_divided(tmp_path: Path) -> None:
    model, graph, x = mlp(dtype=torch.float32)
    file = tmp_path / "dense.onnx"
    file.write_bytes(onnx_bytes(model, x))
    other = trace(file)
    choice = divided(graph, "one/kernel")
    (there,) = [made for made in other.all_sites if made.kind == "kernel" and made.filters == 24]
    cut = apply(file, plan(other, Choice(there.name, *astuple(choice)[1:])), other)
    (found,) = OnnxRuntimeEngine().run(cut.SerializeToString(), {cut.graph.input[0].name: x.numpy()})
    expected = outputs_of(operate(model, graph, plan(graph, choice)).model, (x,))
    assert relative_error([torch.from_numpy(found)], expected) < 1e-4


def test_a_plan_with_groups_and_the_weights_come_back() -> None:
    model, graph, x = mlp()
    given = plan(graph, divided(graph, "one/kernel"))
    pruned = scramble(apply(model, given), 1)
    back = Plan.from_json(given.to_json())
    assert back == given
    loaded = apply(Mlp().double(), back)
    loaded.load_state_dict(pruned.state_dict())
    assert torch.equal(loaded.eval()(x), pruned(x))


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


def test_repair_solves_each_group_of_a_linear_layer() -> None:
    model, graph, _ = mlp(dtype=torch.float32)
    tokens = torch.randn(96, 5, 12)
    given = plan(graph, divided(graph, "one/kernel"))
    cuts, pruned = resolve(graph, given), operate(model, graph, given).model
    repair(pruned, model, graph, cuts, make_reference(graph, [tokens]))
    with torch.no_grad():
        inputs = model.norm(model.stem(tokens)).flatten(0, 1)
        wanted = model.one(inputs)[:, cuts.kept[graph.site["one/kernel"].order]]
        parts = zip(inputs.chunk(2, 1), wanted.chunk(2, 1), strict=True)
        ones = torch.ones(len(inputs), 1)
        best = [
            torch.cat([part, ones], 1) @ torch.linalg.lstsq(torch.cat([part, ones], 1), y).solution for part, y in parts
        ]
        least = (torch.cat(best, 1) - wanted).square().sum()
        assert (pruned.one(inputs) - wanted).square().sum() < 1.01 * least
        assert (operate(model, graph, given).model.one(inputs) - wanted).square().sum() > 1.05 * least


@pytest.fixture(params=[1024, 1])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Candidates, Statistics]:
    """The candidates of the chain and what they were made from, with tables of that many pairs at most."""
    monkeypatch.setattr(tables, "LARGEST_TABLE", request.param)
    _, graph, _ = chain(dtype=torch.float32)
    statistics = calibrate(graph, [torch.randn(32, 3, 12, 8)])
    return candidates(graph, statistics, LinearProfile(block=2)), statistics


def test_tables_know_the_error_of_each_filter(known: tuple[Candidates, Statistics]) -> None:
    assert_errors_of_filters(*known, "two.0/kernel")


def test_tables_know_the_error_of_each_output_of_a_linear_layer() -> None:
    _, graph, _ = mlp(dtype=torch.float32)
    statistics = calibrate(graph, [torch.randn(32, 5, 12)])
    assert_errors_of_filters(candidates(graph, statistics, LinearProfile(block=2)), statistics, "two/kernel")


def assert_errors_of_filters(made: Candidates, statistics: Statistics, name: str) -> None:
    node = made.graph.site[name].node
    layer, moments = made.graph.layer[node], statistics[node]
    options = [draft for draft in made.drafts[name] if draft.pattern == "groups"]
    assert [draft.level for draft in options] == ["2 groups", "4 groups"]
    taps = made.graph.site[name].size
    for draft in options:
        expected = 0.0
        for filter_, (_, _, (first, last)) in enumerate(draft.cuts.patches(layer)):
            own = torch.tensor([filter_])
            weight = moments.weight[:, own].double()
            share = weight @ moments.matrix * weight
            kept = torch.arange(first * taps, last * taps)
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


def test_tables_exclude_what_surgery_does_with_linear_layers() -> None:
    _, graph, _ = mlp(dtype=torch.float32)
    made = candidates(graph, calibrate(graph, [torch.randn(32, 5, 12)]), LinearProfile(block=2))
    cost = made.cost(lambda operator: operator.flops, made.graph.flops)
    sizes = [len(made.drafts[site.name]) for site in made.sites]
    outcomes = Counter()
    for one, other in combinations(range(len(sizes)), 2):
        for first, second in product(range(1, sizes[one]), range(1, sizes[other])):
            choices = [0] * len(sizes)
            choices[one], choices[other] = first, second
            refused = False
            try:
                made.cuts(choices)
            except InputError:
                refused = True
            assert np.isinf(cost(choices)) == refused, choices
            outcomes[refused, "groups" in (made.drafts[made.sites[other].name][second].pattern)] += 1
    assert len(outcomes) == 3, "both happen, and only groups are refused"


@pytest.mark.parametrize(("build", "name"), [(chain, "one.0/kernel"), (mlp, "one/kernel")])
def test_people_see_groups(build: Callable[[], Traced], name: str) -> None:
    _, graph, _ = build()
    given = plan(graph, divided(graph, name))
    boxes = [box for box in draw(graph, PlanLabels(graph, given)).boxes if box.patterns]
    assert [box.patterns for box in boxes] == [("groups",)]
    assert ", 2 groups;" in boxes[0].title
    layer = graph.layer[graph.site[name].node]
    assert "16→24 in 2 groups" in describe(resolve(graph, given).operator(layer))
