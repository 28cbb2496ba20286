"""The report: one HTML file that shows what was cut and what it bought. It works offline, in light and in dark."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from graphprune.files.atomic import write_text
from graphprune.plan import Choice
from graphprune.record import Record, Share
from graphprune.registry import pattern
from graphprune.reporting import plots
from graphprune.reporting.conditions import Condition, engine_rows, offers
from graphprune.reporting.drawing import SIZE, PlanLabels, draw
from graphprune.reporting.templates import render
from graphprune.reporting.wording import (
    SAME,
    headline,
    latency,
    percent,
    quantity,
    seconds,
    setting,
    signed,
    speed,
    warnings,
)
from graphprune.result import Result
from graphprune.timing.measure import Measurement, verdict

COSTS = {"latency": "latency", "flops": "FLOPs", "params": "parameters"}


@dataclass(frozen=True)
class Row:
    """A line of the main table. `bad` marks a change for the worse."""

    name: str
    dense: str
    pruned: str
    change: str
    bad: bool = False


@dataclass(frozen=True)
class Bound:
    """A part of the target: what was asked for, what was reached, whether that is enough."""

    name: str
    asked: str
    reached: str
    met: bool | None


@dataclass(frozen=True)
class Contender:
    """A line of the table of agents."""

    agent: str
    accuracy: str
    latency: str
    trials: str
    outcome: str
    chosen: bool = False


def write_report(
    result: Result,
    path: Path,
    measurement: Measurement | None = None,
    title: str = "",
    conditions: Sequence[Condition] = (),
) -> Path:
    """Write the report of a result to `path` and return it. The same result gives the same bytes.

    `measurement` is the final one (dense first, pruned last); without it the record's own latency is shown.
    `conditions` are the engines, threads and batches to show side by side. Raises InputError when the file cannot be
    written.
    """
    return write_text(path, render("report.html.j2", _context(result, measurement, title, conditions)))


def _context(
    result: Result, measurement: Measurement | None, title: str, conditions: Sequence[Condition]
) -> dict[str, object]:
    share = measurement.shares[-1] if measurement is not None else result.record.measured
    search = _searched(result)
    chosen = sorted({choice.pattern for choice in result.plan.choices})
    return {
        "title": title or result.spec or type(result.dense).__name__,
        "headline": headline(result, share),
        "good": share is not None and verdict(share) == "faster" and result.met,
        "warnings": warnings(result, share, measurement.timings[-1].error if measurement else None),
        "rows": _rows(result, share),
        "bounds": _bounds(result, share),
        "contenders": _contenders(result, search),
        "tradeoff": _tradeoff(result, search),
        "tradeoff_facts": _trial_facts(result.records),
        "drawing": draw(result.graph, PlanLabels(result.graph, result.plan)),
        "size": SIZE,
        "colours": {pattern: f"var(--pattern{number % 6})" for number, pattern in enumerate(chosen)},
        "plan": _plan(result),
        "latency": plots.distributions(share.dense, share.candidate) if share else None,
        "samples": len(share.candidate) if share else 0,
        "engines": engine_rows(conditions, share.engine if share else "") if len(conditions) > 1 else [],
        "offers": offers(conditions),
        "learning": _learning(result, search),
        "notes": result.notes,
        "facts": _facts(result, share),
    }


def _plan(result: Result) -> list[tuple[Choice, int, int]]:
    """The choices, how much of each site stays and how much there is, in the order of the graph."""
    chosen = {choice.site: choice for choice in result.plan.choices}
    sites = [site for site in result.graph.all_sites if site.name in chosen]
    return [(choice := chosen[site.name], *pattern(choice.pattern).kept(site, choice.keep)) for site in sites]


def _rows(result: Result, share: Share | None) -> list[Row]:
    before, after = result.dense_record, result.record
    rows = []
    if before.accuracy is not None and after.accuracy is not None:
        change = 100 * (after.accuracy - before.accuracy)
        rows.append(
            Row("accuracy on validation data", percent(before.accuracy), percent(after.accuracy),
                f"{signed(change, '+.1f')} points", change <= -SAME)
        )  # fmt: skip
    if share is not None:
        dense, pruned = median(share.dense), median(share.candidate)
        times = latency(dense, dense), latency(pruned, dense)
        name = f"latency, {setting(share.engine)}, median"
        rows.append(Row(name, *times, speed(share), verdict(share) != "faster"))
    for name, old, new in (("FLOPs", before.flops, after.flops), ("parameters", before.params, after.params)):
        if old and new:
            rows.append(
                Row(name, quantity(old), quantity(new), f"{signed(100 * (new / old - 1), '+.0f')} %", new > old)
            )
    return rows


def _limits(result: Result, share: Share | None) -> dict[str, float]:
    """The target as shares of the dense model; NaN where the dense model was not measured."""
    dense = result.dense_record
    latency = median(share.dense) if share is not None else math.nan
    return result.target.shares(
        {"latency": latency, "flops": dense.flops or math.nan, "params": dense.params or math.nan}
    )


def _bounds(result: Result, share: Share | None) -> list[Bound]:
    dense, pruned = result.dense_record, result.record
    reached = {
        "latency": share.high if share is not None else math.nan,
        "flops": pruned.flops / dense.flops if dense.flops else math.nan,
        "params": pruned.params / dense.params if dense.params else math.nan,
    }
    bounds = []
    for name, limit in _limits(result, share).items():
        value = reached[name]
        known = math.isfinite(value) and math.isfinite(limit)
        note = " (upper end of the 95 % interval)" if name == "latency" else ""
        text = f"{100 * value:.1f} %{note}" if math.isfinite(value) else "not measured"
        asked = f"at most {100 * limit:.1f} % of the dense model" if math.isfinite(limit) else "an absolute limit"
        bounds.append(Bound(COSTS[name], asked, text, value <= limit if known else None))
    return bounds


def _searched(result: Result) -> Record:
    """What the search ended with, before any fine-tuning; where that is not known, the trial with the chosen plan."""
    if result.searched is not None:
        return result.searched
    same = [record for record in result.records if record.plan == result.plan and record.accuracy is not None]
    return same[-1] if same else result.record


def _contenders(result: Result, search: Record) -> list[Contender]:
    if not result.rivals:
        return []
    winner = _contender(search.agent or "this plan", search, len(result.records), True)
    rivals = [_contender(name, record, 0, False) for name, record in result.rivals.items()]
    return [winner, *sorted(rivals, key=lambda rival: rival.agent)]


def _contender(agent: str, record: Record, trials: int, chosen: bool) -> Contender:
    if record.error is not None or record.accuracy is None:
        return Contender(agent, "–", "–", str(trials or "–"), f"failed: {record.error or 'no accuracy'}", chosen)
    if (share := record.measured) is not None:
        latency = f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"
    else:
        latency = f"{100 * record.predicted['latency']:.1f} %, predicted" if "latency" in record.predicted else "–"
    outcome = "meets the target" if record.feasible else "misses the target"
    return Contender(agent, percent(record.accuracy), latency, str(trials or "–"), outcome, chosen)


def _tradeoff(result: Result, search: Record) -> str | None:
    """The plot of all trials over the first cost that the target bounds."""
    limits = _limits(result, result.dense_record.measured or result.record.measured)
    name = next(iter(limits))
    trials = [
        plots.Trial(cost, record.accuracy, record.feasible)
        for record in result.records
        if record.accuracy is not None and record.error is None and (cost := _cost(record, name)) is not None
    ]
    marks = _marks(result, search, name)
    if not trials and len(marks) < 2:
        return None
    limit = limits[name] if math.isfinite(limits[name]) else None
    axis = f"{COSTS[name]}, share of the dense model" + (" (measured, else predicted)" if name == "latency" else "")
    return plots.tradeoff(trials, marks, limit, axis)


def _marks(result: Result, search: Record, name: str) -> list[plots.Mark]:
    """The dense model, the rivals' plans and the chosen one, over a cost; those not judged are left out."""
    told = [(agent, "rival", record) for agent, record in sorted(result.rivals.items())]
    if result.history:
        told += [("chosen, before fine-tuning", "chosen", search), ("chosen, fine-tuned", "finetuned", result.record)]
    else:
        told += [("chosen", "chosen", result.record)]
    judged = [("dense", "dense", 1.0, result.dense_record.accuracy)]
    judged += [(label, kind, cost, r.accuracy) for label, kind, r in told if (cost := _cost(r, name)) is not None]
    return [plots.Mark(label, kind, cost, accuracy) for label, kind, cost, accuracy in judged if accuracy is not None]


def _cost(record: Record, name: str) -> float | None:
    if name == "latency" and record.measured is not None:
        return record.measured.value
    return record.predicted.get(name)


def _trial_facts(records: Iterable[Record]) -> str:
    found = list(records)
    failed = [record for record in found if record.error is not None]
    missed = sum(record.error is None and not record.feasible for record in found)
    text = f"{len(found)} trials; missing the target: {missed}; failed and not in the plot: {len(failed)}"
    reasons = sorted({str(record.error).splitlines()[0] for record in failed if record.error})
    return f"{text} ({'; '.join(reasons[:3])}{'; …' if len(reasons) > 3 else ''})." if reasons else f"{text}."


def _learning(result: Result, search: Record) -> str | None:
    if not result.history:
        return None
    return plots.learning(result.history, result.dense_record.accuracy, search.accuracy)


def _facts(result: Result, share: Share | None) -> Mapping[str, str]:
    facts = {
        "model": result.spec or type(result.dense).__name__,
        "inputs": "; ".join(f"{dtype} {' × '.join(map(str, shape))}" for dtype, shape in result.graph.inputs),
        "engine": share.engine if share is not None else "",
        "agent": result.record.agent,
        "seed": str(result.record.seed),
        "trials": str(len(result.records)),
        "time in trials": seconds(spent) if (spent := sum(record.seconds for record in result.records)) else "",
        "study": result.study,
        "signature of the graph": result.graph.signature,
    }
    return {name: text for name, text in facts.items() if text} | dict(sorted(result.record.environment.items()))
