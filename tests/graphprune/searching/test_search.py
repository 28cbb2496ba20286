"""The search from end to end on a fake engine: budgets, honest data, failures, kills; and once on the real one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.counting import count
from graphprune.cutting.surgery import apply
from graphprune.engines.base import Model, Timing
from graphprune.engines.fake import FakeEngine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError, StepError, TargetError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.plan import Choice, Plan
from graphprune.record import Record, Share
from graphprune.registry import chosen_patterns, patterns
from graphprune.result import Result
from graphprune.searching import search as module
from graphprune.searching import verification
from graphprune.searching.finalists import ranked
from graphprune.searching.search import search
from graphprune.searching.verification import CLOSE_ROUNDS, VERIFY_ROUNDS, Verification, Verified
from graphprune.target import Target
from graphprune.tasks.task import Task, top1
from graphprune.timing.measure import measure
from tests.agents.toys import problem as toy
from tests.graphprune.small_search import Builds, counted_builds, real_share, run, shared_cache  # noqa: F401 - fixtures
from tests.graphprune.tiny import CLASSES, batches, fitted, forbidden, task

# --- budgets --------------------------------------------------------------------------------------------------------


def test_a_latency_budget_is_met_and_the_dense_model_is_untouched() -> None:
    model = fitted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[tuple[str, int, int, str]] = []
    result = run(agent="dp", model=model, progress=lambda *step: told.append(step))
    assert result.met
    assert result.record.measured is not None
    assert result.record.measured.high <= 0.7
    assert real_share(result) == pytest.approx(result.record.measured.value, rel=1e-6)
    assert result.record.feasible
    assert result.notes == ()
    assert len(result.record.measured.candidate) == VERIFY_ROUNDS
    assert result.dense is model
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    check_facts(result)
    assert {stage for stage, *_ in told} == {"trace", "profile", "calibrate", "search", "verify"}
    assert any(note == "whole models" for *_, note in told), "probes are told under the stage profile"
    assert all(0 <= done <= total for _, done, total, _ in told)
    assert [note for stage, done, *_, note in told if stage == "search" and not done] == ["dp"]


def check_facts(result: Result) -> None:
    """What the record says is true of the model that came back."""
    work, model = task(), result.model
    assert not model.training
    counts, dense = count(model, work.example_inputs), count(result.dense, work.example_inputs)
    assert (result.record.flops, result.record.params) == (counts.flops, counts.params)
    assert (result.dense_record.flops, result.dense_record.params) == (dense.flops, dense.params)
    assert result.record.accuracy == work.accuracy(model)
    assert result.dense_record.accuracy == work.accuracy(result.dense)
    assert result.plan == result.record.plan
    assert result.plan in [record.plan for record in result.records]
    structure = apply(result.dense, result.plan)
    shapes = {name: value.shape for name, value in structure.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("target", "bounds"),
    [
        (Target(flops=0.4), {"flops": 0.4}),
        (Target(params=0.5), {"params": 0.5}),
        (Target(params=0.6, flops=0.5, latency=0.9), {"params": 0.6, "flops": 0.5, "latency": 0.9}),
        (Target(flops_g=0.0025, params_m=0.006, latency_ms=0.02), {}),
    ],
)
def test_other_budgets_are_counted_on_the_model_itself(target: Target, bounds: dict[str, float]) -> None:
    result = run(target, agent="dp", trials=3)
    check_facts(result)
    assert result.met
    flops, params = (getattr(result.record, name) / getattr(result.dense_record, name) for name in ("flops", "params"))
    have = {"flops": flops, "params": params, "latency": real_share(result)}
    assert all(have[name] <= limit for name, limit in bounds.items())
    if target.flops_g is not None:
        x = task().example_inputs
        assert count(result.model, x).flops <= 2_500_000
        assert count(result.model, x).params <= 6_000
        assert FakeEngine().seconds(onnx_bytes(result.model, x)) <= 2e-5


def least_flops() -> float:
    """The smallest share of FLOPs there is: 16 of 32 channels in both layers, every kernel cut to its centre."""
    dense = 256 * 32 * 3 * 9 + 64 * 32 * 32 * 9 + 32 * CLASSES
    return (256 * 16 * 3 + 64 * 16 * 16 + 16 * CLASSES) / dense


def test_an_impossible_target_names_the_best_there_is() -> None:
    with pytest.raises(TargetError, match=rf"no plan meets flops 0\.01 .* is flops {least_flops():.2f}$"):
        run(Target(flops=0.01))
    with pytest.raises(TargetError, match=r"no plan meets latency 0\.01.*can be reached is latency 0\.\d\d$") as caught:
        run(Target(latency=0.0101))
    best = float(str(caught.value).rsplit(" ", 1)[1])
    assert run(Target(latency=best + 0.03), trials=2).record.measured is not None


@dataclass
class SlowAtTheEnd(FakeEngine):
    """Candidates are slower by `factor` when they are verified than when they were searched."""

    factor: float = 1.5

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        timings = super().measure(models, rounds)
        if rounds != VERIFY_ROUNDS:
            return timings
        return [timings[0], *(Timing(tuple(self.factor * s for s in t.samples), t.error) for t in timings[1:])]


def test_of_alike_plans_the_nearest_to_the_dense_model_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LOOSENED", ())
    result = run(agent="dp", trials=8)
    own_metric = run(agent="dp", trials=8, task=replace(task(), metric=partial(top1)))
    best = max(result.records, key=lambda record: record.rank)
    assert result.plan == ranked(result.records, task().images)[0].plan != best.plan
    assert own_metric.plan == ranked(own_metric.records, 0)[0].plan == best.plan


def test_a_missed_target_is_said_and_the_nearest_plan_comes_back() -> None:
    result = run(Target(latency=0.6), trials=8, engine=SlowAtTheEnd())
    assert not result.met
    assert result.record.measured is not None
    excess = result.record.measured.high - 0.6
    assert excess > 0
    assert not result.record.feasible
    assert result.notes == (f"the target was missed: latency is {excess:.3f} above its limit",)
    assert result.record.predicted["latency"] == min(r.predicted["latency"] for r in result.records if r.accuracy)


def test_a_plan_that_just_misses_the_target_is_cut_a_little_more() -> None:
    result = run(Target(latency=0.6), agent="dp", trials=1, engine=SlowAtTheEnd(factor=1.1))
    (tried,) = result.records
    assert result.met
    assert result.record.measured is not None
    assert result.record.measured.high <= 0.6
    assert 0.7 * tried.predicted["latency"] < result.record.predicted["latency"] < tried.predicted["latency"]
    assert result.record.accuracy == task().accuracy(result.model)


def test_room_that_a_plan_leaves_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models are faster than predicted: a plan for all of the target is nearer to the dense model."""
    engine = SlowAtTheEnd(factor=0.8)
    loose = run(Target(latency=0.6), agent="dp", trials=1, engine=engine)
    monkeypatch.setattr(verification, "LOOSENED", ())
    tight = run(Target(latency=0.6), agent="dp", trials=1, engine=engine)
    assert loose.met
    assert tight.met
    assert loose.record.measured.high <= 0.6
    assert loose.record.measured.value > tight.record.measured.value
    assert loose.record.predicted["latency"] > tight.record.predicted["latency"]
    assert loose.record.deviation < tight.record.deviation
    assert tight.plan == tight.records[0].plan
    assert loose.record.accuracy == task().accuracy(loose.model)


def test_what_is_cut_less_and_no_better_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "loosened", lambda problem, choices, overrun: problem.cheapest)
    result = run(Target(latency=0.6), agent="dp", trials=1, engine=SlowAtTheEnd(factor=0.8))
    assert result.plan == result.records[0].plan


def test_without_a_latency_target_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs and parameters are known before: there is nothing that a measurement would tell."""
    monkeypatch.setattr(verification, "loosened", lambda *_: pytest.fail("there is room"))
    assert run(Target(flops=0.5), agent="dp", trials=1).met


def test_what_was_measured_in_the_search_is_verified_where_it_met_the_target() -> None:
    """Of two that were measured one missed; of two that were not the slower is skipped, for what missed since."""
    times = {"slow": (0.58, 0.62), "quick": (0.59, 0.55), "like slow": (0.58, None), "faster": (0.5, None)}
    records = [
        Record(
            Plan("", (Choice(name, "", "", ()),)), 0.9, measured is None or measured <= 0.6, {"latency": predicted},
            None if measured is None else Share(measured, measured, measured, (), (), ""), deviation=number / 10,
        )
        for number, (name, (predicted, measured)) in enumerate(times.items())
    ]  # fmt: skip
    session: Any = SimpleNamespace(task=task(), limits={"latency": 0.6})
    asked = []
    made = Verification(session, replace(toy(), records=records), None, "")
    for record in made.finalists():
        asked.append(record.plan.choices[0].site)
        made.seen.append(Verified(0.04, record, None, None))
        if len(asked) == 2:
            break
    assert asked == ["quick", "faster"]


@dataclass
class UnsteadyAtTheEnd(FakeEngine):
    """Of the first measurement of a candidate that is verified, two samples in five are three times as long."""

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        timings = super().measure(models, rounds)
        if rounds != VERIFY_ROUNDS:
            return timings
        return [
            timings[0],
            *(Timing(tuple(s * (1 + 2 * (n % 5 < 2)) for n, s in enumerate(t.samples))) for t in timings[1:]),
        ]


def test_a_wide_interval_is_narrowed_before_a_plan_is_given_up() -> None:
    steady, unsteady = (
        run(Target(latency=0.6), agent="dp", trials=8, engine=kind()) for kind in (FakeEngine, UnsteadyAtTheEnd)
    )
    assert unsteady.met
    assert unsteady.plan == steady.plan
    assert unsteady.record.measured is not None
    assert len(unsteady.record.measured.candidate) == CLOSE_ROUNDS


def test_a_result_that_is_no_faster_says_so() -> None:
    result = run(Target(flops=0.8), trials=2, engine=SlowAtTheEnd(factor=3))
    assert result.met, "only FLOPs were asked for"
    assert "the pruned model is not measurably faster than the dense one" in result.notes


# --- patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("filter",), ("kernel",), ("kernel", "filter", "kernel")])
def test_only_the_chosen_patterns_are_used(names: tuple[str, ...]) -> None:
    result = run(Target(latency=0.8), trials=6, patterns=names)
    used = {choice.pattern for record in result.records for choice in record.plan.choices}
    assert used == set(names)


def test_all_patterns_are_the_default() -> None:
    names = tuple(name for name in patterns() if name != "n-of-m")  # which gains nothing on most engines
    assert chosen_patterns(None) == tuple(patterns()[name] for name in names) == chosen_patterns(names[::-1])
    assert chosen_patterns(None, FakeEngine(sparse_kernels=True)) == tuple(patterns().values())
    assert run(trials=3).plan == run(trials=3, patterns=names).plan


@pytest.mark.parametrize("names", [("filter", "fliter"), ()])
def test_unknown_and_no_patterns_are_refused_before_anything_is_measured(names: tuple[str, ...]) -> None:
    engine = FakeEngine()
    with pytest.raises(InputError, match=r"known are .*filter.*kernel"):
        run(patterns=names, engine=engine)
    assert engine.calls == 0


# --- honest data ----------------------------------------------------------------------------------------------------


def test_test_data_is_never_read_and_validation_data_never_calibrates(monkeypatch: pytest.MonkeyPatch) -> None:
    work = task()
    with pytest.raises(AssertionError, match="the test data was read"):
        work.test_accuracy(fitted())
    given: list[torch.Tensor] = []
    for name in ("calibrated", "make_reference"):
        original = getattr(module, name)

        def spy(graph: Any, *rest: Any, original: Any = original) -> Any:
            given.extend(next(x for x in rest if isinstance(x, tuple)))
            return original(graph, *rest)

        monkeypatch.setattr(module, name, spy)
    run(task=work, trials=2, rivals=("magnitude",))
    held_out = torch.cat([x for x, _ in work.validation]).flatten(1)
    seen = torch.cat(given).flatten(1)
    assert len(seen) == 3 * sum(map(len, work.calibration))  # statistics, repair, finer repair
    assert not (seen[:, None, :8] == held_out[None, :, :8]).all(-1).any()


def test_without_labels_the_metric_is_agreement_with_the_dense_model() -> None:
    result = run(task=task(labelled=False), trials=3)
    assert result.dense_record.accuracy == 1
    x = torch.cat([batch for batch, _ in task().validation])
    with torch.no_grad():
        agreement = (result.model(x).argmax(1) == result.dense.eval()(x).argmax(1)).double().mean().item()
    assert result.record.accuracy == pytest.approx(agreement)


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_candidate_that_fails_is_a_record_and_the_search_goes_on(builds: Builds) -> None:
    told: list[tuple[str, int, int, str]] = []
    whole = run(progress=lambda *step: told.append(step))
    (probes,) = {number for _, _, number, note in told if note == "whole models"}
    builds.restart(stop_at=probes + 1)
    builds.error = ZeroDivisionError("no luck")
    result = run()
    assert result.records[0].error == "ZeroDivisionError: no luck"
    assert [record.plan for record in result.records] == [record.plan for record in whole.records]
    assert [record.error for record in result.records[1:]] == [None] * 5
    assert result.met


def test_probes_and_verifications_may_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LOOSENED", ())
    # Models arrive in pairs (dense, candidate) after the dense one: the first probe, and the last, verified one.
    probed = FakeEngine(failing={2})
    whole = run(engine=probed, seed=1)
    result = run(engine=FakeEngine(failing={2, probed.models - 1}), seed=1)
    assert result.met
    assert result.plan != whole.plan
    assert result.record.rank <= whole.record.rank


def test_when_everything_fails_the_reason_is_given() -> None:
    run()  # fills the cache of operator times
    with pytest.raises(StepError, match=r"no candidate of random could be evaluated: .*fails on demand"):
        run(engine=FakeEngine(failing=range(1, 10_000)))
    with pytest.raises(StepError, match="the dense model does not run: model 0 fails on demand"):
        run(engine=FakeEngine(failing={0}))


@dataclass
class NoRows(FakeEngine):
    """Cannot run convolutions whose kernel has a single row, nor linear layers outside of whole models."""

    def seconds(self, model: Model) -> float:
        import onnx

        graph = onnx.load_from_string(model).graph
        shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        kernels = [shapes[n.input[1]] for n in graph.node if n.op_type == "Conv" and n.input[1] in shapes]
        if any(shape[2] == 1 and shape[3] > 1 for shape in kernels):
            raise InputError("kernels with one row are not supported")
        if graph.name == "microbench" and any(node.op_type == "MatMul" for node in graph.node):
            raise InputError("no products alone")
        return super().seconds(model)

    @property
    def identity(self) -> str:
        return "no rows"


def test_operators_that_the_engine_cannot_run_are_no_options() -> None:
    result = run(engine=NoRows(), agent="dp", trials=3)
    assert result.met
    assert all(record.error is None for record in result.records)
    levels = {choice.level for record in result.records for choice in record.plan.choices}
    assert levels
    assert not any(level.startswith("1x3") for level in levels)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_any_work() -> None:
    engine = FakeEngine()
    with pytest.raises(InputError, match="unknown agent 'nobody'"):
        run(agent="nobody", engine=engine)
    with pytest.raises(InputError, match="unknown agent 'noone'"):
        run(rivals=("uniform", "noone"), engine=engine)
    with pytest.raises(InputError, match="at least one trial, not 0"):
        run(trials=0, engine=engine)
    with pytest.raises(InputError, match="has no model 'nothing_of_this_name'"):
        run(model="timm:nothing_of_this_name", engine=engine)
    assert engine.calls == 0


def test_a_dense_model_that_gives_nan_is_refused() -> None:
    model = fitted()
    nn.init.constant_(model[-1].bias, float("nan"))
    with pytest.raises(InputError, match="NaN"):
        run(model=model)


def test_a_model_without_anything_to_cut() -> None:
    bare = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, CLASSES))
    with pytest.raises(TargetError, match=r"the best that can be reached is flops 1\.00"):
        run(Target(flops=0.5), model=bare)
    result = run(Target(flops=1.0), model=bare, trials=2)
    assert result.met
    assert result.plan.choices == ()
    assert result.record.flops == result.dense_record.flops


# --- rivals and parts -----------------------------------------------------------------------------------------------


def test_rivals_get_the_same_problem() -> None:
    result = run(agent="dp", trials=4, rivals=("random", "uniform", "magnitude"))
    assert list(result.rivals) == ["random", "uniform", "magnitude"]
    for name, record in result.rivals.items():
        assert record.error is None
        assert record.measured is not None
        assert record.feasible, name
        assert record.measured.high <= 0.7
    alone = run(agent="magnitude", trials=4)
    assert result.rivals["magnitude"].plan == alone.plan
    assert result.rivals["magnitude"].accuracy == alone.record.accuracy


def test_a_user_task_from_loaders_and_a_model_by_name() -> None:
    work = Task.from_loaders(batches(64, 5), batches(32, 6), test=forbidden_loader())
    result = search("cifar:resnet20?num_classes=4", work, Target(flops=0.9), "magnitude", 1, engine=FakeEngine())
    assert result.spec == "cifar:resnet20?num_classes=4"
    assert result.met
    assert result.study == ""


def forbidden_loader() -> Iterator[Any]:
    yield from forbidden()


# --- the real engine ------------------------------------------------------------------------------------------------


def test_the_budget_holds_in_a_fresh_process_on_the_real_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 4. Timings of a busy machine vary, so the bounds are wide; half the channels save about half."""
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    engine, limit = OnnxRuntimeEngine(), 0.85
    try:
        result = search(fitted(), task(), Target(latency=limit), "dp", 2, engine=engine, patterns=("filter",))
    except TargetError:
        pytest.skip("the machine is too busy: half the channels measure no faster")
    assert result.record.measured is not None
    assert result.met == (result.record.measured.high <= limit)
    assert result.met or any("the target was missed" in note for note in result.notes)
    files = [tmp_path / "dense.onnx", tmp_path / "pruned.onnx"]
    for file, model in zip(files, (result.dense, result.model), strict=True):
        file.write_bytes(onnx_bytes(model, task().example_inputs))
    share = measure([str(file) for file in files], rounds=60, engine=engine, fresh=True).shares[1]
    assert share is not None
    assert share.engine == engine.identity == result.record.measured.engine
    if result.met:
        assert share.low <= 1.25 * limit
    assert 0.2 < share.value / result.record.measured.value < 5
