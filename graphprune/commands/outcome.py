"""How a finished pruning is told: the table dense / pruned / change, and the same as JSON."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from graphprune.commands.base import Answer

if TYPE_CHECKING:
    from graphprune.commands.steps import Scores
    from graphprune.delivery import Delivery
    from graphprune.record import Record


def answer(delivery: "Delivery", scores: "Scores") -> Answer:
    """The outcome of a run, with everything that is in its folder."""
    notes = [f"note: {note}" for note in delivery.result.notes]
    where = f"written to {delivery.folder}: {', '.join(_files(delivery))}"
    return Answer(facts(delivery, scores), (comparison(delivery, scores), "\n".join([*notes, where])))


def with_rivals(answer: Answer, delivery: "Delivery", found: "Record") -> Answer:
    """The answer with the table of rivals beside it; `found` is the winner's record before fine-tuning."""
    records = {found.agent: found, **delivery.result.rivals}
    facts = {**answer.facts, "before_finetuning": {agent: rival_facts(record) for agent, record in records.items()}}
    first, *rest = answer.view
    return Answer(facts, (first, rivals(records), *rest))


def _files(delivery: "Delivery") -> list[str]:
    return sorted(path.name for path in delivery.folder.iterdir() if path.is_file())


def facts(delivery: "Delivery", scores: "Scores") -> dict[str, Any]:
    """The outcome as JSON: accuracies in [0, 1], latencies in seconds per run, FLOPs as multiply-adds x 2."""
    result, share = delivery.result, _share(delivery)
    dense, pruned = (timing.median for timing in delivery.measurement.timings)
    return {
        "spec": result.spec,
        "met": result.met,
        "verdict": delivery.measurement.verdict,
        "accuracy": {name: {"dense": before, "pruned": after} for name, (before, after) in scores.items()},
        "latency": {"dense": dense, "pruned": pruned},
        "speedup": {"value": 1 / share.value, "low": 1 / share.high, "high": 1 / share.low},
        "flops": {"dense": delivery.dense.flops, "pruned": delivery.pruned.flops},
        "params": {"dense": delivery.dense.params, "pruned": delivery.pruned.params},
        "engine": delivery.measurement.engine,
        "notes": list(result.notes),
        "out": str(delivery.folder),
        "files": _files(delivery),
    }


def _share(delivery: "Delivery") -> Any:
    return delivery.measurement.shares[-1]


def comparison(delivery: "Delivery", scores: "Scores") -> Table:
    """Accuracy, measured latency with its interval, FLOPs and parameters: dense, pruned, change."""
    from graphprune.reporting.wording import setting

    share = _share(delivery)
    table = Table(title=f"{delivery.result.spec or 'the model'} on {delivery.measurement.engine}", title_justify="left")
    table.add_column("")
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right")
    for name, (before, after) in scores.items():
        table.add_row(name, f"{100 * before:.1f} %", f"{100 * after:.1f} %", f"{100 * (after - before):+.1f} points")
    dense, pruned = (timing.median for timing in delivery.measurement.timings)
    speedup = f"{1 / share.value:.2f}x ({1 / share.high:.2f} to {1 / share.low:.2f}) {delivery.measurement.verdict}"
    table.add_row(f"latency, {setting(share.engine)}", f"{1e3 * dense:.3f} ms", f"{1e3 * pruned:.3f} ms", speedup)
    table.add_row("FLOPs", *_counts(delivery.dense.flops, delivery.pruned.flops, 1e6, "M"))
    table.add_row("parameters", *_counts(delivery.dense.params, delivery.pruned.params, 1e3, "k"))
    return table


def _counts(before: int, after: int, unit: float, sign: str) -> tuple[str, str, str]:
    return f"{before / unit:.1f} {sign}", f"{after / unit:.1f} {sign}", f"{100 * (after / before - 1):+.0f} %"


def rivals(records: Mapping[str, "Record"]) -> Table:
    """The best plan of each agent on the same problem, before fine-tuning."""
    table = Table(
        title="each agent's best plan for the same target, before fine-tuning\n"
        "(accuracy on the validation slice, latency as a share of dense)",
        title_justify="left",
    )
    table.add_column("agent")
    for heading in ("accuracy", "predicted", "measured (95 %)", "target"):
        table.add_column(heading, justify="right", no_wrap=heading.startswith("measured"))
    for agent, record in records.items():
        table.add_row(agent, *_rival(record))
    return table


def _rival(record: "Record") -> tuple[str, str, str, str]:
    if record.error is not None or record.accuracy is None:
        return "failed", "", "", record.error or "no accuracy"
    predicted = f"{record.predicted['latency']:.3f}" if "latency" in record.predicted else "-"
    share = record.measured
    measured = f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})" if share else "-"
    return f"{100 * record.accuracy:.1f} %", predicted, measured, "met" if record.feasible else "missed"


def rival_facts(record: "Record") -> dict[str, Any]:
    """A rival's record as JSON."""
    return {
        "accuracy": record.accuracy,
        "predicted": dict(record.predicted),
        "measured": record.measured.value if record.measured else None,
        "feasible": record.feasible,
        "error": record.error,
    }
