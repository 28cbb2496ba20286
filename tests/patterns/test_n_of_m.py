"""Masks of 2 in 4: how a plan tells them, what is chosen, that zeros stay, and where they are refused."""

import copy
import json
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.counting import count
from graphprune.coupling.graph import ModelGraph, Site
from graphprune.coupling.operators import Absent, Masked
from graphprune.coupling.tracing import trace
from graphprune.cutting import surgery
from graphprune.cutting.cuts import Cuts, resolve
from graphprune.cutting.masked import MaskedConv2d, MaskedLinear
from graphprune.cutting.routes import Route
from graphprune.cutting.semi_structured import is_two_to_four
from graphprune.cutting.surgery import cut_along, operate
from graphprune.engines import fake
from graphprune.engines.fake import FakeEngine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.pattern import Level
from graphprune.patterns.n_of_m import NOfM, mask_plan
from graphprune.plan import Choice, Plan
from graphprune.record import Record
from graphprune.registry import chosen_patterns
from graphprune.repairing.calibration import calibrate
from graphprune.repairing.compensation import Loss
from graphprune.repairing.repair import make_reference, repair
from graphprune.reporting.drawing import PlanLabels, draw
from graphprune.result import Result
from graphprune.searching import candidates as tables
from graphprune.training.recipe import Recipe
from tests.graphprune.networks import conv_bn
from tests.graphprune.onnx_route import difference
from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble
from tests.graphprune.small_search import run, shared_cache  # noqa: F401 - a fixture of every search
from tests.graphprune.tiny import CLASSES, LinearProfile, candidates, task

MASK = NOfM()


def site(filters: int, channels: int, kernel: tuple[int, int] = (1, 1)) -> Site:
    return Site("fc/kernel", "kernel", 1, ("fc",), "fc", kernel=kernel, filters=filters, channels=channels)


class Pointwise(nn.Module):
    """A 1x1 convolution with a batch norm in a residual branch, and two linear layers; the stem reads 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = conv_bn(3, 16), nn.Sequential(conv_bn(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.down(torch.relu(self.up((x + self.point(x)).mean((2, 3)))))


LAYERS = ("point.0.0", "up", "down")
SITES = tuple(f"{layer}/kernel" for layer in LAYERS)


def traced(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ModelGraph, torch.Tensor]:
    torch.manual_seed(0)
    model, x = scramble(Pointwise(), dtype=dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    return model, trace(model, x), x


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the weights of the masked layers are zero."""
    return {name: model.get_submodule(name).weight == 0 for name in LAYERS}  # type: ignore[operator]


def all_held(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    found = zeros_of(model)
    return all(int(zero.sum()) * 2 == zero.numel() and torch.equal(zero, before[name]) for name, zero in found.items())


# --- units and levels ----------------------------------------------------------------------------------------------


def test_levels_are_for_whole_quadruples_of_1x1_kernels() -> None:
    assert MASK.levels(site(6, 8), 16) == (Level("2:4", 1),)
    assert MASK.levels(site(7, 8), 16) == (Level("2:4", 2),)
    for other in (site(6, 6), site(6, 8, (3, 3)), site(6, 8, (1, 3))):
        assert MASK.levels(other, 16) == ()


@pytest.mark.parametrize("shape", [(5, 8), (6, 8), (7, 8), (3, 52)])
def test_the_two_highest_scores_of_each_quadruple_stay(shape: tuple[int, int]) -> None:
    made = site(*shape)
    (level,) = MASK.levels(made, 16)
    scores = np.random.default_rng(0).normal(size=shape)
    keep = MASK.choose(made, level, scores)
    mask = MASK.rewrite(made, keep).masks["fc"]
    assert mask.shape == shape
    for row, start in product(range(shape[0]), range(0, shape[1], 4)):
        pairs = combinations(range(4), 2)
        best = max(pairs, key=lambda pair: scores[row, start : start + 4][list(pair)].sum())
        assert tuple(np.flatnonzero(mask[row, start : start + 4])) == best


def test_every_mask_has_numbers_of_its_own() -> None:
    made = site(1, 8)
    masks = {}
    for keep in range(36):
        masks[keep] = MASK.rewrite(made, (keep,)).masks["fc"]
        again = MASK.choose(made, Level("2:4", 1), masks[keep].astype(float))
        assert again == (keep,)
    assert len({mask.tobytes() for mask in masks.values()}) == 36


@pytest.mark.parametrize("keep", [(), (0,), (0, 0), (0, 1), (0, 6**12 + 36), (0, 2 * 6**12), (0, 6**12, 2 * 6**12)])
def test_what_is_no_mask_is_refused(keep: tuple[int, ...]) -> None:
    """Too few numbers, two of one chunk, a digit beyond the last quadruple, a chunk left out, too many."""
    with pytest.raises(InputError, match="one number for each 12"):
        MASK.rewrite(site(7, 8), keep)
    assert MASK.rewrite(site(7, 8), (0, 6**12 + 35)).masks


def test_the_plan_of_a_large_layer_stays_small_and_exact() -> None:
    made = site(3072, 768)
    keep = MASK.choose(made, MASK.levels(made, 16)[0], np.random.default_rng(0).normal(size=(3072, 768)))
    plan = Plan("model", (Choice("fc/kernel", "n-of-m", "2:4", keep),))
    text = plan.to_json()
    assert len(text) < 0.45 * 3072 * 768, "less than half a byte for each weight"
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert max(keep) < 2**53
    assert MASK.kept(made, keep) == (3072 * 384, 3072 * 768)


# --- what is computed ----------------------------------------------------------------------------------------------


def test_masked_layers_compute_the_masked_weights_on_every_route(tmp_path: Path) -> None:
    model, graph, x = traced()
    plan = mask_plan(graph)
    assert tuple(choice.site for choice in plan.choices) == tuple(sorted(SITES))
    operation, cuts = operate(model, graph, plan), resolve(graph, plan)
    assert operation.own_class
    expected = masked_outputs(graph, plan, model, (x,))
    assert relative_error(expected, outputs_of(model, (x,))) > 1e-3
    for pruned in (operation.model, cut_along(model, graph, cuts, Route(own_class=False))):
        assert relative_error(outputs_of(pruned, (x,)), expected) < 1e-10
    kinds = [type(operation.model.get_submodule(name)) for name in LAYERS]
    assert kinds == [MaskedConv2d, MaskedLinear, MaskedLinear]
    assert list(operation.model.state_dict()) == list(model.state_dict())
    model, graph, x = traced(torch.float32)
    gp.export_onnx(model, tmp_path / "dense.onnx", x)
    assert difference(model, graph, mask_plan(graph), tmp_path / "dense.onnx") < 1e-4


def test_a_mask_saves_neither_flops_nor_parameters() -> None:
    model, graph, x = traced()
    plan = mask_plan(graph)
    cuts = resolve(graph, plan)
    operators = [cuts.operator(graph.layer[graph.site[name].node]) for name in SITES]
    assert all(isinstance(operator, Masked) for operator in operators)
    assert sum(cuts.operator(layer).flops for layer in graph.layers) == graph.flops
    assert sum(cuts.operator(layer).parameters for layer in graph.layers) == graph.parameter_count
    assert count(operate(model, graph, plan).model, x) == count(model, x)


def test_masked_layers_are_traced_as_what_they_are_and_not_masked_again() -> None:
    model, graph, x = traced()
    again = trace(operate(model, graph, mask_plan(graph)).model, x)
    assert [layer.operator for layer in again.layers] == [layer.operator for layer in graph.layers]
    assert not {*SITES} & again.site.keys()


def test_a_weight_that_two_layers_share_has_no_site() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(self.two(self.one(x)))

    sites = trace(Tied(), torch.randn(2, 8)).all_sites
    assert [site.name for site in sites if site.kind == "kernel"] == ["own/kernel"]


@pytest.mark.parametrize("site_name", ["up/hidden", "down/hidden", "stem.0/channels"])
def test_what_cuts_the_inputs_or_outputs_excludes_a_mask(site_name: str) -> None:
    model, graph, _ = traced()
    name = site_name if site_name in graph.site else "up/hidden"
    other = graph.site[name]
    choice = Choice(name, "filter" if other.kind == "channels" else "hidden", "some", tuple(range(8)))
    plan = mask_plan(graph)
    with pytest.raises(InputError, match="cannot be masked: what it reads is cut or moved, or filters are cut"):
        operate(model, graph, replace(plan, choices=(*plan.choices, choice)))


def test_a_dropped_branch_takes_its_mask_with_it() -> None:
    _, graph, _ = traced()
    (branch,) = [site for site in graph.all_sites if site.branch]
    plan = mask_plan(graph)
    cuts = resolve(graph, replace(plan, choices=(*plan.choices, Choice(branch.name, "block", "removed", ()))))
    node = graph.site["point.0.0/kernel"].node
    assert cuts.operator(graph.layer[node]) == Absent()
    assert node not in cuts.masks
    assert len(cuts.masks) == 2


# --- zeros stay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_class", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_in_training(own_class: bool, optimizer: str) -> None:
    model, graph, _ = traced(torch.float32)
    cuts = resolve(graph, mask_plan(graph))
    pruned = copy.deepcopy(cut_along(model, graph, cuts, Route(own_class=own_class))).train()
    before, weights = zeros_of(pruned), pruned.get_submodule("up").weight.detach().clone()
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    options = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    steps = made(pruned.parameters(), lr=0.05, weight_decay=0.01, **options)
    for _ in range(3):
        steps.zero_grad()
        pruned(torch.randn(8, 3, 8, 8)).square().mean().backward()
        steps.step()
    assert all_held(pruned, before)
    assert not torch.allclose(pruned.get_submodule("up").weight, weights)


def result(images: torch.Tensor | None = None) -> Result:
    model, graph, _ = traced(torch.float32)
    plan = mask_plan(graph, () if images is None else [images])
    record = Record(plan, 0.5, flops=1, params=1)
    return Result(operate(model, graph, plan).model, model, graph, plan, record, record, gp.Target(flops=1.0))


def test_zeros_stay_through_fine_tuning_and_a_saved_result(tmp_path: Path) -> None:
    given = result()
    tuned = gp.finetune(given, task(), recipe=Recipe(epochs=1, precision="float32"))
    assert all_held(tuned.model, zeros_of(given.model))
    gp.save(tuned, tmp_path)
    loaded = gp.load(tmp_path, Pointwise())
    assert type(loaded.up) is MaskedLinear
    for name, value in tuned.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert json.loads((tmp_path / "plan.json").read_text())["choices"][0]["pattern"] == "n-of-m"


def test_repair_solves_each_output_on_what_it_keeps() -> None:
    model, graph, _ = traced(torch.float32)
    images = torch.randn(256, 3, 8, 8)
    plan = mask_plan(graph, [images])
    cuts, pruned = resolve(graph, plan), operate(model, graph, plan).model
    before, plain = zeros_of(pruned), copy.deepcopy(pruned)
    repair(pruned, model, graph, cuts, make_reference(graph, [images]))
    assert all_held(pruned, before)
    wanted = outputs_of(model, (images,))[0]
    errors = [(outputs_of(one, (images,))[0] - wanted).var(0).sum() / wanted.var(0).sum() for one in (plain, pruned)]
    assert errors[1] < 0.7 * errors[0]


# --- scores, errors, search ----------------------------------------------------------------------------------------


def test_calibration_says_which_weights_matter() -> None:
    _, graph, _ = traced(torch.float32)
    images = torch.randn(256, 3, 8, 8)
    statistics = calibrate(graph, [images])
    errors = []
    for plan in (mask_plan(graph), mask_plan(graph, [images])):
        masks = resolve(graph, plan).masks
        errors.append(sum(Loss(statistics[node]).masked(mask) for node, mask in masks.items()))
    assert 0 < errors[1] < errors[0]


def test_a_plan_for_some_sites() -> None:
    _, graph, _ = traced()
    assert [choice.site for choice in mask_plan(graph, sites=["up/kernel"]).choices] == ["up/kernel"]
    assert mask_plan(graph, sites=[]).choices == ()
    with pytest.raises(
        InputError, match=r"masked at 'stem\.0/kernel'; possible: point\.0\.0/kernel, up/kernel, down/kernel"
    ):
        mask_plan(graph, sites=["stem.0/kernel"])


@pytest.mark.parametrize("entries", [1024, 1])
def test_tables_know_masks_on_an_engine_with_kernels_for_them(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LARGEST_TABLE", entries)
    _, graph, _ = traced(torch.float32)
    statistics = calibrate(graph, [torch.randn(256, 3, 8, 8)])
    refused = candidates(graph, statistics, _Halving(block=4))  # whatever was measured
    assert "n-of-m" not in {draft.pattern for drafts in refused.drafts.values() for draft in drafts}
    made = candidates(graph, statistics, _Halving(block=4, engine=FakeEngine(sparse_kernels=True)))
    error, cost = made.error(), made.cost(lambda operator: operator.flops, graph.flops)
    names = [site.name for site in made.sites]
    (number,) = [names.index("up/kernel")]
    dense = [0] * len(names)
    (option,) = [n for n, draft in enumerate(made.drafts["up/kernel"]) if draft.pattern == "n-of-m"]
    choices = [*dense[:number], option, *dense[number + 1 :]]
    draft = made.drafts["up/kernel"][option]
    assert (draft.level, draft.share) == ("2:4", 0.5)
    node = graph.site["up/kernel"].node
    assert draft.cuts.masks[node].mean() == 0.5
    expected = Loss(statistics[node]).masked(draft.cuts.masks[node])
    assert error(choices) - error(dense) == pytest.approx(statistics.weight(node) * expected)
    assert cost(choices) == cost(dense) == 1
    hidden = names.index("up/hidden")
    choices[hidden] = 1
    assert np.isinf(cost(choices))
    decision = made.decisions(error, {node.name: n for n, node in enumerate(graph.nodes)})[number]
    assert [decision.options[n].geometry for n in (0, option)] == [(1.0,) * 9, (0.5,) * 9]
    assert len(decision.importance) == 16


class _Halving(LinearProfile):
    """A profile whose masked operators take half of the time."""

    def seconds(self, operator: object) -> float:
        if isinstance(operator, Masked):
            assert operator in self.filled
            return operator.flops * 0.5e-9
        return super().seconds(operator)  # type: ignore[arg-type]


def test_a_search_masks_on_an_engine_that_declares_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "SECONDS_PER_NODE", 1e-9)  # a tiny model would take its time for its nodes alone
    torch.manual_seed(0)
    model, engine = (
        nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval(),
        FakeEngine,
    )
    found = run(gp.Target(latency=0.7), "dp", 2, model=model, patterns=("n-of-m",), engine=engine(sparse_kernels=True))
    assert found.met
    assert ("1/kernel", "n-of-m") in {(choice.site, choice.pattern) for choice in found.plan.choices}
    assert is_two_to_four(found.model[1].weight)
    assert found.record.flops == found.dense_record.flops


@pytest.mark.parametrize("target", [gp.Target(latency=0.9), gp.Target(flops=0.9)])
def test_a_search_by_name_is_refused_where_zeros_are_multiplied(target: gp.Target) -> None:
    engine = FakeEngine()
    with pytest.raises(InputError, match=r"'n-of-m' cannot be used on fake, .*: masks gain nothing but on engines"):
        run(target, patterns=("filter", "n-of-m"), engine=engine)
    assert engine.models == 0


def test_it_is_never_offered_where_zeros_are_multiplied() -> None:
    for engine in (None, FakeEngine(), OnnxRuntimeEngine()):
        assert "n-of-m" not in {pattern.name for pattern in chosen_patterns(None, engine)}
    assert "n-of-m" in {pattern.name for pattern in chosen_patterns(None, FakeEngine(sparse_kernels=True))}


# --- people --------------------------------------------------------------------------------------------------------


def test_people_see_masks() -> None:
    _, graph, _ = traced()
    plan = mask_plan(graph, sites=["up/kernel"])
    boxes = [box for box in draw(graph, PlanLabels(graph, plan)).boxes if box.patterns]
    assert [box.patterns for box in boxes] == [("n-of-m",)]
    assert boxes[0].title == "up: linear, 16→24 becomes linear, 16→24, masked; n-of-m 2:4"


def test_nothing_masked_is_nothing_cut() -> None:
    model, graph, x = traced()
    assert resolve(graph, Plan(graph.signature, (), graph.inputs)) == Cuts()
    assert (
        relative_error(outputs_of(surgery.apply(model, mask_plan(graph, sites=[])), (x,)), outputs_of(model, (x,))) == 0
    )
