"""`report` and `runs`: what earlier runs left behind."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from graphprune.commands.base import Answer, Folder, OwnModel, Verb
from graphprune.layout import REPORT, STUDY

if TYPE_CHECKING:
    from graphprune.record import Record
    from graphprune.study import Summary


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write report.html in DIR again from what is saved there."""

    folder: Folder
    model: OwnModel = None
    title: Annotated[str, typer.Option(metavar="TEXT", help="Heading of the report.", show_default=False)] = ""

    def run(self) -> Answer:
        """Restore the result, write the report."""
        from graphprune import delivery
        from graphprune.report import write_report

        result = delivery.restore(self.folder, self.model)
        measurement = delivery.measurement_of(result)
        path = write_report(result, self.folder / REPORT, measurement, self.title or result.spec)
        facts = {"file": str(path), "trials": len(result.records), "met": result.met}
        return Answer(facts, (f"{path}: {len(result.records)} trials",))


@dataclass(frozen=True, kw_only=True)
class Runs(Verb):
    """List the studies in a store: how many trials, how many failed, the best accuracy and its latency.

    STORE is the folder that prune or demo wrote to, an SQLite file, or a database URL that Optuna knows. The same
    store opens in optuna-dashboard.
    """

    store: Annotated[str, typer.Argument(metavar="STORE", help="DIR, FILE or URL.")] = "out"
    trials: Annotated[bool, typer.Option("--trials", help="List every trial of every study as well.")] = False

    def run(self) -> Answer:
        """Read the store."""
        from graphprune import study

        store = Path(self.store) / STUDY if Path(self.store).is_dir() else self.store
        summaries = study.list_studies(store)
        facts: dict[str, Any] = {"studies": [_summary_facts(summary) for summary in summaries]}
        view: tuple[Any, ...] = (_studies(summaries, str(store)),)
        if self.trials:
            records = {summary.name: study.Study.open(store, summary.name).records() for summary in summaries}
            facts["trials"] = {name: [_trial_facts(record) for record in found] for name, found in records.items()}
            view += tuple(_trials(name, found) for name, found in records.items())
        return Answer(facts, view)


def _summary_facts(summary: "Summary") -> dict[str, Any]:
    return asdict(summary) | {"date": summary.date.isoformat() if summary.date else None}


def _trial_facts(record: "Record") -> dict[str, Any]:
    return {
        "agent": record.agent,
        "seed": record.seed,
        "accuracy": record.accuracy,
        "predicted": dict(record.predicted),
        "measured": record.measured.value if record.measured else None,
        "feasible": record.feasible,
        "error": record.error,
        "seconds": record.seconds,
    }


def _studies(summaries: list["Summary"], store: str) -> Table:
    table = Table("study", title=store, title_justify="left")
    for heading in ("trials", "failed", "best accuracy", "its latency", "last trial"):
        table.add_column(heading, justify="right")
    for summary in summaries:
        table.add_row(
            summary.name,
            str(summary.trials),
            str(summary.failures),
            _percent(summary.accuracy),
            _share(summary.latency),
            f"{summary.date:%Y-%m-%d %H:%M}" if summary.date else "-",
        )
    return table


def _trials(name: str, records: list["Record"]) -> Table:
    table = Table(title=name, title_justify="left")
    for heading in ("trial", "agent", "accuracy", "predicted latency", "measured", "target"):
        table.add_column(heading, justify="left" if heading == "agent" else "right")
    for number, record in enumerate(records):
        verdict = "failed" if record.error is not None else "met" if record.feasible else "missed"
        measured = _share(record.measured.value if record.measured else None)
        predicted = _share(record.predicted.get("latency"))
        table.add_row(str(number), record.agent, _percent(record.accuracy), predicted, measured, verdict)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
