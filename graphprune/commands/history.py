"""`report` and `runs`: what earlier runs left behind."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from graphprune.commands import base
from graphprune.commands.base import Answer, Folder, OwnModel, Verb
from graphprune.commands.console import Bars
from graphprune.files.layout import REPORT, STUDY

if TYPE_CHECKING:
    from graphprune.engines.base import Engine
    from graphprune.record import Record
    from graphprune.reporting.conditions import Condition, EngineRow
    from graphprune.searching.study import Summary


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write report.html in DIR again from what is saved there.

    With --engine, --threads or --batch, each of which may be given several times, the delivered model is also measured
    under every combination of them, against the dense one. DIR keeps what was measured, for later reports.

    Example: graphprune report out --engine onnxruntime --engine openvino --batch 1 --batch 8 --gains
    """

    folder: Folder
    model: OwnModel = None
    title: Annotated[str, typer.Option(metavar="TEXT", help="Heading of the report.", show_default=False)] = ""
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="onnxruntime, or openvino (an extra). Default: as searched."),
    ] = None
    threads: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Threads of the engines. Default: as searched.")
    ] = None
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Images in a timed run. Default: as searched.")
    ] = None
    gains: Annotated[
        bool,
        typer.Option(
            "--gains",
            help="Compare what these engines, and that of the search, let a search cut. Layers that this machine has "
            "not timed there yet are timed now: some minutes for each.",
        ),
    ] = False

    def run(self) -> Answer:
        """Restore the result, measure what is asked for, write the report."""
        from graphprune import delivery
        from graphprune.reporting import comparison
        from graphprune.reporting.conditions import engine_rows
        from graphprune.reporting.report import write_report

        result = delivery.restore(self.folder, self.model)
        measurement = delivery.measurement_of(result)
        own = measurement.engine if measurement is not None else ""
        if engines := self._engines(own):
            with Bars() as bars:
                found = comparison.compare(result, self.folder, engines, self.gains, bars.update)
        else:
            found = comparison.known(result, self.folder)
        path = write_report(result, self.folder / REPORT, measurement, self.title or result.spec, found)
        measured = [_engine_facts(condition) for condition in found]
        facts = {"file": str(path), "trials": len(result.records), "met": result.met, "engines": measured}
        compared = [_engines(engine_rows(found, own))] if len(found) > 1 else []
        return Answer(facts, (*compared, f"{path}: {len(result.records)} trials"))

    def _engines(self, own: str) -> "list[Engine]":
        """Every engine that is asked for; with --gains, that of the search is one of them."""
        from graphprune.engines import settings_in

        asked, searched = (self.engine, self.threads, self.batch), settings_in(own)
        wanted = list(product(*(given or [searched[name]] for given, name in zip(asked, searched, strict=True))))
        if self.gains:
            wanted.insert(0, tuple(searched.values()))
        elif not any(asked):
            return []
        return [base.engine(name, threads=threads, batch=batch) for name, threads, batch in dict.fromkeys(wanted)]


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
        from graphprune.searching import study

        store = Path(self.store) / STUDY if Path(self.store).is_dir() else self.store
        summaries = study.list_studies(store)
        facts: dict[str, Any] = {"studies": [_summary_facts(summary) for summary in summaries]}
        view: tuple[Any, ...] = (_studies(summaries, str(store)),)
        if self.trials:
            records = {summary.name: study.Study.open(store, summary.name).records() for summary in summaries}
            facts["trials"] = {name: [_trial_facts(record) for record in found] for name, found in records.items()}
            view += tuple(_trials(name, found) for name, found in records.items())
        return Answer(facts, view)


def _engine_facts(condition: "Condition") -> dict[str, Any]:
    """A measured share as JSON; seconds are medians of a run."""
    share = condition.share
    return {
        "engine": share.engine,
        "share": share.value,
        "interval": [share.low, share.high],
        "seconds": {"dense": median(share.dense), "pruned": median(share.candidate)},
    }


def _engines(rows: "Sequence[EngineRow]") -> Table:
    table = Table(title="latency of the pruned model on each engine", title_justify="left")
    for heading in ("engine", "threads", "batch", "share of dense (95 %)", "verdict"):
        numeric = heading in ("threads", "batch", "share of dense (95 %)")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=heading != "verdict")
    for row in rows:
        table.add_row(row.engine, str(row.threads), str(row.batch), row.share, row.verdict)
    return table


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
