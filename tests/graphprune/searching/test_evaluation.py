"""Records: what is counted, what is measured and when, what is served from the study, and what failure becomes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from graphprune.counting import Counts, count
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts
from graphprune.engines.fake import FakeEngine
from graphprune.errors import StepError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.plan import Choice, Plan
from graphprune.repairing.calibration import calibrate
from graphprune.repairing.repair import make_reference
from graphprune.searching import evaluation
from graphprune.searching.candidates import Candidates
from graphprune.searching.evaluation import Evaluator, Workbench
from graphprune.searching.problem import Choices, Sum
from graphprune.searching.study import Study, label
from graphprune.tasks.sequential import KEPT, Bar
from graphprune.tasks.task import Task
from graphprune.timing.quiet import Stopwatch
from tests.graphprune import tiny
from tests.graphprune.networks import Literal, images
from tests.graphprune.tiny import candidates, fitted, task

LOOSE = {"flops": 1.0}


@dataclass(frozen=True)
class Parts:
    """All that an evaluator needs and that no test changes."""

    model: nn.Module
    found: Candidates
    bench: Workbench
    costs: dict[str, Sum]
    dense_onnx: bytes

    def plan(self, choices: Choices) -> Plan:
        """The plan of a choice vector."""
        graph = self.found.graph
        drafts = [self.found.drafts[site.name][index] for site, index in zip(self.found.sites, choices, strict=True)]
        named = zip(self.found.sites, drafts, choices, strict=True)
        chosen = tuple(Choice(site.name, d.pattern, d.level, d.keep) for site, d, index in named if index)
        return Plan(graph.signature, chosen, graph.inputs)

    def vector(self, **levels: str) -> Choices:
        """A choice vector by the levels at sites, dense elsewhere; `conv2_kernel` is the site `1.0/kernel`."""
        names = {"conv1_kernel": "0.0/kernel", "conv2_kernel": "1.0/kernel", "conv1": "0.0/channels"}
        wanted = {names[name]: level for name, level in levels.items()}
        assert wanted.keys() <= {site.name for site in self.found.sites}
        drafts = ((site.name, self.found.drafts[site.name]) for site in self.found.sites)
        return tuple([d.level for d in options].index(wanted.get(name, "dense")) for name, options in drafts)

    def evaluator(self, limits: dict[str, float], **changed: Any) -> Evaluator:
        """A new evaluator with an empty study."""
        options = {s.name: [label(d.pattern, d.level) for d in self.found.drafts[s.name][1:]] for s in self.found.sites}
        stopwatch = Stopwatch(changed.pop("engine", FakeEngine()), self.dense_onnx)
        given = {"study": Study.open(None, "tests", options), **changed}
        return Evaluator(
            self.bench, self.found, self.costs, limits, stopwatch, plan_of=self.plan, agent="someone", seed=7, **given
        )


@cache
def parts() -> Parts:
    """The tiny network with a linear profile."""
    model, work = fitted(), task()
    graph = trace(model, work.example_inputs)
    found = candidates(graph, calibrate(graph, work.calibration))
    dense = count(model, work.example_inputs)
    costs = {
        "latency": found.cost(lambda operator: operator.flops, dense.flops),
        "flops": found.cost(lambda operator: operator.flops, dense.flops),
        "params": found.cost(lambda operator: operator.parameters, dense.params),
    }
    bench = Workbench(model, graph, make_reference(graph, work.calibration), work)
    return Parts(model, found, bench, costs, onnx_bytes(model, work.example_inputs))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Cuts]:
    """Every cut that was built, in order."""
    seen: list[Cuts] = []
    original: Callable[[Workbench, Cuts], nn.Module] = Workbench.build

    def build(self: Workbench, cuts: Cuts) -> nn.Module:
        seen.append(cuts)
        return original(self, cuts)

    monkeypatch.setattr(Workbench, "build", build)
    return seen


def squared_distance(dense: nn.Module, pruned: nn.Module, work: Task) -> float:
    """Of all validation outputs, relative to the dense ones."""
    inputs = torch.cat([inputs for inputs, _ in work.validation])
    with torch.no_grad():
        expected, outputs = dense.eval()(inputs), pruned(inputs)
    return float((outputs - expected).square().mean() / expected.square().mean())


def test_a_record_says_what_the_built_model_is() -> None:
    p, engine = parts(), FakeEngine()
    choices = p.vector(conv2_kernel="1x3 middle", conv1="16 of 32")
    record = p.evaluator(LOOSE, engine=engine)(choices)
    pruned = p.bench.build(p.found.cuts(choices))
    counts = count(pruned, p.bench.task.example_inputs)
    assert (record.flops, record.params) == (counts.flops, counts.params)
    assert record.accuracy == p.bench.task.accuracy(pruned)
    assert record.deviation == pytest.approx(squared_distance(p.model, pruned, p.bench.task), rel=1e-5)
    assert record.predicted == {name: cost(choices) for name, cost in p.costs.items()}
    assert (record.plan, record.agent, record.seed, record.error) == (p.plan(choices), "someone", 7, None)
    assert record.feasible
    assert record.environment["torch"] == version("torch")
    assert record.seconds > 0
    assert record.measured is not None
    times = engine.seconds(onnx_bytes(pruned, p.bench.task.example_inputs)), engine.seconds(p.dense_onnx)
    assert record.measured.value == pytest.approx(times[0] / times[1], rel=1e-9)
    assert record.measured.high == pytest.approx(record.measured.low)
    assert record.measured.candidate[0] == pytest.approx(times[0])


def test_only_what_would_become_the_best_is_measured() -> None:
    p = parts()
    engine = FakeEngine()
    evaluate = p.evaluator(LOOSE, engine=engine)
    vectors = [p.vector(conv2_kernel=level) for level in ("1x1 centre", "3x2 left", "1x3 middle", "2x2 top left")]
    best, measured = -1.0, 0
    for choices in [*vectors, p.vector()]:
        record = evaluate(choices)
        assert record.accuracy is not None
        assert (record.measured is not None) == (record.accuracy > best)
        best = max(best, record.accuracy)
        measured += record.measured is not None
        assert engine.models == 2 * measured
    assert 1 <= measured < 5, "the case holds both kinds"
    assert evaluate.best == best


def test_what_misses_a_limit_by_prediction_is_judged_but_not_measured() -> None:
    p, choices = parts(), parts().vector(conv2_kernel="3x2 left")
    share = p.costs["flops"](choices)
    above, exactly = p.evaluator({"flops": share * 0.999}), p.evaluator({"flops": share})
    record = above(choices)
    assert not record.feasible
    assert record.measured is None
    assert record.accuracy is not None
    assert above.best == -1
    assert exactly(choices).feasible


def test_a_measured_latency_overrules_the_predicted_one() -> None:
    p, choices = parts(), parts().vector(conv2_kernel="1x1 centre")
    predicted = p.costs["latency"](choices)
    slow = p.evaluator({"latency": predicted + 0.01}, engine=FakeEngine(block=64))
    record = slow(choices)
    assert record.measured is not None
    assert record.measured.value > predicted + 0.01
    assert not record.feasible
    assert slow.best == -1
    assert p.evaluator({"latency": record.measured.value})(choices).predicted["latency"] == predicted


def test_identical_plans_are_served_from_the_study(builds: list[Cuts]) -> None:
    p, choices = parts(), parts().vector(conv1_kernel="3x1 centre")
    first = p.evaluator(LOOSE)
    heard = []
    first.listener = heard.append
    record = first(choices)
    assert first(choices) == record
    assert len(builds) == 1
    assert heard == [record, record]
    later = p.evaluator({"flops": 0.01}, study=first.study)
    again = later(choices)
    assert len(builds) == 1
    assert not again.feasible, "feasible is a matter of the limits at hand"
    assert (again.accuracy, again.flops, again.seconds) == (record.accuracy, record.flops, record.seconds)
    assert first.study.records() == [record]


def test_a_plan_of_a_version_that_did_not_compare_outputs_is_judged_anew(builds: list[Cuts]) -> None:
    p = parts()
    choices, evaluate = p.vector(conv2_kernel="1x3 middle"), p.evaluator(LOOSE)
    known = p.evaluator(LOOSE)(choices)
    evaluate.study.add(replace(known, deviation=None))
    builds.clear()
    assert evaluate(choices).deviation == evaluate(choices).deviation == known.deviation
    assert len(builds) == 1


def test_failure_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    p, choices = parts(), parts().vector(conv1_kernel="3x1 centre")
    evaluate = p.evaluator(LOOSE)

    def broken(self: Workbench, cuts: Cuts) -> nn.Module:
        raise RuntimeError("it broke\nand here is why")

    monkeypatch.setattr(Workbench, "build", broken)
    record = evaluate(choices)
    assert record.error == "RuntimeError: it broke"
    assert (record.accuracy, record.feasible, record.measured) == (None, False, None)
    assert record.predicted["flops"] == p.costs["flops"](choices)
    assert evaluate.study.records() == [record]
    assert evaluate.best == -1
    monkeypatch.undo()
    assert evaluate(choices) == record, "a plan that failed is not tried again"
    assert evaluate(p.vector()).error is None


def test_an_engine_that_fails_and_outputs_that_are_nan_are_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    p, choices = parts(), parts().vector(conv1_kernel="3x1 centre")
    assert p.evaluator(LOOSE, engine=FakeEngine(failing={1}))(choices).error == "StepError: model 1 fails on demand"
    original = Workbench.build

    def poisoned(self: Workbench, cuts: Cuts) -> nn.Module:
        model = original(self, cuts)
        nn.init.constant_(model[-1].bias, float("nan"))
        return model

    monkeypatch.setattr(Workbench, "build", poisoned)
    assert "are not finite" in (p.evaluator(LOOSE)(choices).error or "")


def test_an_interrupt_is_no_failure_of_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Workbench, cuts: Cuts) -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workbench, "build", interrupted)
    evaluate = parts().evaluator(LOOSE)
    with pytest.raises(KeyboardInterrupt):
        evaluate(parts().vector())
    assert evaluate.study.records() == []


def test_a_probe_is_measured_whatever_its_accuracy(builds: list[Cuts]) -> None:
    p, choices = parts(), parts().vector(conv2_kernel="1x1 centre")
    evaluate = p.evaluator({"flops": 0.001})
    evaluate.best = 2.0
    record = evaluate.probe(choices)
    assert record.measured is not None
    assert not record.feasible
    assert evaluate.probe(choices).measured == record.measured
    assert len(builds) == 1
    failing = p.evaluator(LOOSE, engine=FakeEngine(failing={1}))
    assert failing.probe(choices).error == "StepError: model 1 fails on demand"
    assert failing.probe(choices).error == "StepError: model 1 fails on demand"
    assert len(builds) == 2, "what failed is stored as well"


# --- the bench ------------------------------------------------------------------------------------------------------


def test_what_is_built_is_new_repaired_repeatable_and_in_evaluation_mode() -> None:
    p, cuts = parts(), parts().found.cuts(parts().vector(conv1="16 of 32", conv2_kernel="3x1 left"))
    before = {name: value.clone() for name, value in p.model.state_dict().items()}
    p.model.train()
    try:
        one, two = p.bench.build(cuts), p.bench.build(cuts)
        assert p.model.training
    finally:
        p.model.eval()
    assert not any(module.training for module in one.modules())
    assert type(one) is type(p.model)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in p.model.state_dict().items())
    kept = cuts.keep[next(iter(cuts.keep))]
    sliced = before["0.0.weight"][kept]
    assert one[0][0].weight.shape == sliced.shape
    assert not torch.equal(one[1][0].weight, before["1.0.weight"][:, kept, :, :1]), "repaired"


def test_where_the_class_cannot_be_cut_the_exported_graph_is_built() -> None:
    torch.manual_seed(0)
    model, x = Literal().eval(), images()[0]
    graph = trace(model, x)
    site = next(site for site in graph.all_sites if site.kind == "channels")
    bench = Workbench(model, graph, make_reference(graph, [x]), task())
    cuts = Cuts(keep={site.atom: np.arange(site.size // 2)})
    bench.probe(cuts)
    assert not bench.route.own_class
    built = bench.build(cuts)
    assert isinstance(built, torch.fx.GraphModule)
    assert built(x).shape == model(x).shape
    assert count(built, x).flops < count(model, x).flops


def test_a_settled_bench_has_no_more_graphs_than_its_cuts_need() -> None:
    """A head width is written in the attention's code, hidden units are not."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=4).eval()
    x = images(32)[0]
    graph = trace(model, x)
    bench = Workbench(model, graph, make_reference(graph, [x]), task())
    hidden, width = (
        {graph.site[f"blocks.{number}.{name}"].atom: np.arange(32) for number in (0, 1)}
        for name in ("mlp.fc1/hidden", "attn.qkv/head-width")
    )
    bench.probe(Cuts(keep=hidden | width))
    assert [part.path for part in bench.route.parts] == ["blocks.0.attn", "blocks.1.attn"]
    settled = bench.settled(Cuts(keep=hidden))
    assert settled.route.own_class
    assert not settled.route.parts
    one, other = settled.build(Cuts(keep=hidden)), bench.build(Cuts(keep=hidden))
    assert type(one.blocks[0].attn) is type(model.blocks[0].attn) is not type(other.blocks[0].attn)
    assert torch.allclose(one(x), other(x), rtol=0, atol=1e-5)


class OfAccuracy(nn.Module):
    """Right on a share of the striped images of the tiny task, spread over all of them."""

    def __init__(self, labels: torch.Tensor, share: float) -> None:
        super().__init__()
        right = torch.rand(len(labels), generator=torch.Generator().manual_seed(3)).argsort() < share * len(labels)
        self.answers = torch.where(right, labels, (labels + 1) % 4)
        self.images = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.images
        self.images += len(x)
        return nn.functional.one_hot(self.answers[first : first + len(x)], 4).float()


def test_hopeless_candidates_are_given_up_and_judged_anew_where_another_bar_is_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, labels = tiny.images(640, 4)
    batches = list(zip(x.split(32), labels.split(32), strict=True))
    work = Task.from_loaders(None, batches, calibration=[x[:8]]).shuffled()
    shuffled = torch.cat([y for _, y in work.validation if y is not None])
    made = parts()
    bench = replace(made.bench, task=work)
    asked: list[OfAccuracy] = []

    def judged(accuracy: float) -> Callable[[Workbench, Cuts], nn.Module]:
        def build(self: Workbench, cuts: Cuts) -> nn.Module:
            asked.append(OfAccuracy(shuffled, accuracy))
            return asked[-1]

        return build

    monkeypatch.setattr("graphprune.searching.evaluation.count", lambda *_: Counts(1, 1))
    monkeypatch.setattr(Workbench, "answers", lambda _, pruned, __: pruned)
    vectors = [tuple(vector) for vector in np.ndindex(*(len(made.found.drafts[s.name]) for s in made.found.sites))]
    keen = replace(made.evaluator(LOOSE), bench=bench)
    monkeypatch.setattr(Workbench, "build", judged(0.9))
    assert [keen(vector).images for vector in vectors[1 : KEPT + 1]] == [0] * KEPT
    assert {model.images for model in asked} == {640}
    monkeypatch.setattr(Workbench, "build", judged(0.5))
    given_up = keen(vectors[KEPT + 1])
    assert 0 < given_up.images == asked[-1].images <= 128
    assert given_up.accuracy == pytest.approx(0.5, abs=0.2)
    builds = len(asked)
    assert keen(vectors[KEPT + 1]).images == given_up.images
    assert len(asked) == builds
    modest = replace(keen, agent="another", bar=Bar(), best=-1.0)
    whole = modest(vectors[KEPT + 1])
    assert (whole.images, whole.accuracy, asked[-1].images) == (0, 0.5, 640)
    assert replace(keen, agent="a third")(vectors[KEPT + 1]).images == 0  # served what is known best
    assert keen(vectors[KEPT + 1]).images == given_up.images  # a search that goes on sees what it saw
    assert len(asked) == builds + 1


def test_a_candidate_is_cut_out_of_the_dense_graph_without_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    p, choices = parts(), parts().vector(conv2_kernel="1x3 middle", conv1="16 of 32")
    cuts, bench = p.found.cuts(choices), replace(p.bench, widest=p.found.cuts(choices))
    pruned = bench.build(cuts)
    monkeypatch.setattr(evaluation, "onnx_bytes", None)
    assert replace(p, bench=bench).evaluator(LOOSE)(choices).error is None
    assert bench.surgeon is not None
    assert bench.file(pruned, cuts) == bench.surgeon.cut(cuts, pruned.state_dict())
    assert bench.surgeon is bench.surgeon


@pytest.mark.parametrize("broken", ["make_template", "OnnxSurgeon.check", "OnnxSurgeon.cut"])
def test_a_candidate_that_cannot_be_cut_there_is_exported(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, choices = parts(), parts().vector(conv2_kernel="1x3 middle")
    bench, cuts = replace(p.bench), p.found.cuts(choices)
    pruned, calls = bench.build(cuts), []

    def refuse(*given: object) -> None:
        calls.append(given)
        raise StepError("not here")

    monkeypatch.setattr(f"graphprune.onnx_files.surgery.{broken}", refuse)
    assert bench.file(pruned, cuts) is None
    if broken != "OnnxSurgeon.cut":
        assert bench.file(pruned, cuts) is None
        assert len(calls) == 1, "what failed once is not tried again"
    record = replace(p, bench=bench).evaluator(LOOSE)(choices)
    assert record.accuracy == p.bench.task.accuracy(pruned)
    exported = FakeEngine().seconds(onnx_bytes(pruned, p.bench.task.example_inputs))
    assert record.measured is not None
    assert record.measured.candidate[0] == pytest.approx(exported)


def test_a_single_cut_that_is_refused_has_no_file() -> None:
    p, choices = parts(), parts().vector(conv1="16 of 32")
    bench, cuts = replace(p.bench), p.found.cuts(choices)
    pruned = bench.build(cuts)
    assert bench.surgeon is not None
    assert bench.file(pruned, cuts) == bench.surgeon.cut(cuts, pruned.state_dict())
    bench.surgeon.template = replace(bench.surgeon.template, fixed=dict.fromkeys(cuts.kept, "view"))
    assert bench.file(pruned, cuts) is None
