"""A result as a folder, and back: what `prune`, `finetune` and `demo` write and the other verbs read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from graphprune import checkpoint, engines, models
from graphprune.counting import Counts, count
from graphprune.coupling.tracing import trace
from graphprune.cutting import surgery
from graphprune.engines.base import Engine, Timing
from graphprune.errors import InputError, StepError
from graphprune.files import tensors
from graphprune.files.atomic import write_bytes, write_text
from graphprune.files.layout import DENSE_ONNX, DENSE_WEIGHTS, PRUNED_ONNX, REPORT, TRIALS
from graphprune.onnx_files.export import export_onnx
from graphprune.plan import Plan
from graphprune.record import Record
from graphprune.reporting.report import write_report
from graphprune.result import Result
from graphprune.target import Target
from graphprune.timing.measure import Measurement, measure

ROUNDS = 50
"""Interleaved samples of the final measurement."""

MISSED = "the target was missed"
"""How the note begins that says so; the final measurement's replaces the one of the search."""

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Delivery:
    """What lies in the folder: the result with final numbers, both models' counts, and their measurement."""

    folder: Path
    result: Result
    dense: Counts
    pruned: Counts
    measurement: Measurement


def deliver(result: Result, folder: Path, engine: Engine, progress: Progress, title: str = "") -> Delivery:
    """Export both models, measure them against each other, and write everything that the folder holds.

    The returned result has the final latency, FLOPs and parameters, and
    `met` says whether they meet the target. Raises StepError where an export fails, InputError where the disk does.
    """
    inputs = surgery.example_inputs(result.graph.inputs)
    files = [folder / DENSE_ONNX, folder / PRUNED_ONNX]
    for number, (model, file) in enumerate(zip((result.dense, result.model), files, strict=True)):
        progress("export", number, 2, "")
        export_onnx(model, file, inputs)
    progress("export", 2, 2, "equal to torch")
    progress("measure", 0, 1, "dense and pruned in turns")
    measurement = timed(files, engine)
    progress("measure", 1, 1, f"{measurement.speedup:.2f}x, {measurement.verdict}")
    dense, pruned = count(result.dense, inputs), count(result.model, inputs)
    final = _final(result, dense, pruned, measurement)
    checkpoint.save(final, folder)
    write_bytes(folder / DENSE_WEIGHTS, tensors.to_bytes(result.dense))
    write_text(folder / TRIALS, json.dumps([json.loads(record.to_json()) for record in result.records]))
    write_report(final, folder / REPORT, measurement, title)
    return Delivery(folder, final, dense, pruned, measurement)


def timed(files: Sequence[Path], engine: Engine, rounds: int = ROUNDS) -> Measurement:
    """Measure ONNX files against the first one; real engines do so in a fresh process."""
    return measure(files, rounds=rounds, engine=engine, fresh=engines.settings_of(engine) is not None)


def _final(result: Result, dense: Counts, pruned: Counts, measurement: Measurement) -> Result:
    """The result with what was counted and measured at the end."""
    share = measurement.shares[-1]
    if share is None:
        raise StepError(f"the pruned model cannot be measured: {measurement.timings[-1].error}")
    record = replace(result.record, measured=share, flops=pruned.flops, params=pruned.params)
    before = replace(result.dense_record, flops=dense.flops, params=dense.params)
    limits = result.target.shares(
        {"latency": measurement.timings[0].median, "flops": dense.flops, "params": dense.params}
    )
    # The upper bound of the interval counts: a target that is met by luck is not met.
    reached = {"latency": share.high, "flops": pruned.flops / dense.flops, "params": pruned.params / dense.params}
    missed = [
        f"{name} {reached[name]:.3f} instead of {limit:.3f}" for name, limit in limits.items() if reached[name] > limit
    ]
    kept = tuple(note for note in result.notes if not note.startswith(MISSED))
    notes = (*kept, f"{MISSED}: {', '.join(missed)}") if missed else kept
    return replace(result, record=record, dense_record=before, met=not missed, notes=notes)


def load(folder: Path, spec: str | None = None) -> nn.Module:
    """The pruned model of a folder; `spec` names the dense one where a saved Python function must not be imported."""
    return checkpoint.load(folder, None if spec is None else models.create(spec))


def read_plan(folder: Path) -> Plan:
    """The plan of a folder whose model has been loaded."""
    return Plan.from_json((folder / checkpoint.PLAN).read_text(encoding="utf-8"))


def restore(folder: Path, spec: str | None = None, weights: Path | None = None) -> Result:
    """The result that a folder holds. The dense model gets the weights that are given, else those of the folder.

    `spec` is as in `load`. Raises InputError for a folder that holds no result.
    """
    facts = checkpoint.read_result(folder)
    pruned = load(folder, spec)
    plan = read_plan(folder)
    model = models.create(spec or facts["spec"], weights)
    if weights is None and (folder / DENSE_WEIGHTS).exists():
        tensors.fill(model, tensors.read(folder / DENSE_WEIGHTS))
    model.eval()
    return Result(
        model=pruned,
        dense=model,
        graph=surgery.remember(model, trace(model, surgery.example_inputs(plan.inputs))),
        plan=plan,
        record=facts["record"],
        dense_record=facts["dense_record"],
        target=Target(**facts["target"]),
        records=_trials(folder / TRIALS),
        spec=facts["spec"],
        met=facts["met"],
        notes=tuple(facts["notes"]),
        history=tuple((int(epoch), loss, accuracy) for epoch, loss, accuracy in facts["history"]),
        rivals=facts["rivals"],
        searched=facts["searched"],
    )


def measurement_of(result: Result) -> Measurement | None:
    """The final measurement as the saved record keeps it; None where nothing was measured."""
    share = result.record.measured
    if share is None:
        return None
    return Measurement(share.engine, (DENSE_ONNX, PRUNED_ONNX), (Timing(share.dense), Timing(share.candidate)))


def _trials(path: Path) -> tuple[Record, ...]:
    if not path.exists():
        return ()
    try:
        return tuple(Record.from_json(json.dumps(record)) for record in json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold trials: {error}") from None
