"""The report: one HTML file that shows what was cut and what it bought. It works offline, in light and in dark."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from graphprune import plots
from graphprune.atomic import write_text
from graphprune.drawing import LINE, RADIUS, WIDTH, draw
from graphprune.measure import Measurement, verdict
from graphprune.plan import Choice
from graphprune.record import Record, Share
from graphprune.result import Result

TEMPLATE = "report.html.j2"
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


def write_report(result: Result, path: Path, measurement: Measurement | None = None, title: str = "") -> Path:
    """Write the report of a result to `path` and return it. The same result gives the same bytes.

    `measurement` is the final one (dense first, pruned last); without it the record's own latency is shown. Raises
    InputError when the file cannot be written.
    """
    template = resources.files("graphprune").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return write_text(path, environment.from_string(template).render(_context(result, measurement, title)))


def _context(result: Result, measurement: Measurement | None, title: str) -> dict[str, object]:
    share = measurement.shares[-1] if measurement is not None else result.record.measured
    sampled = share if share is not None and share.dense and share.candidate else None
    search = _searched(result)
    chosen = sorted({choice.pattern for choice in result.plan.choices})
    return {
        "title": title or result.spec or type(result.dense).__name__,
        "headline": headline(result, share),
        "good": share is not None and verdict(share) == "faster" and result.met,
        "warnings": _warnings(result, share),
        "rows": _rows(result, share),
        "bounds": _bounds(result, share),
        "contenders": _contenders(result, search),
        "tradeoff": _tradeoff(result, search),
        "tradeoff_facts": _trial_facts(result.records),
        "drawing": draw(result.graph, result.plan),
        "size": {"width": WIDTH, "line": LINE, "radius": RADIUS},
        "colours": {pattern: f"--pattern{number % 6}" for number, pattern in enumerate(chosen)},
        "plan": _plan(result),
        "latency": Markup(plots.distributions(sampled.dense, sampled.candidate)) if sampled else None,
        "samples": len(sampled.candidate) if sampled else 0,
        "learning": _learning(result, search),
        "notes": result.notes,
        "facts": _facts(result, share),
    }


def _plan(result: Result) -> list[tuple[Choice, int]]:
    """The choices and the sizes of their sites, in the order of the graph."""
    chosen = {choice.site: choice for choice in result.plan.choices}
    return [(chosen[site.name], site.size) for site in result.graph.all_sites if site.name in chosen]


def headline(result: Result, share: Share | None) -> str:
    """The outcome in plain words: "1.9x faster at 0.4 points lost"."""
    if share is None:
        cut = 1 - result.record.flops / max(1, result.dense_record.flops)
        return f"{cut:.0%} fewer FLOPs, {_points(result)}; the latency was not measured"
    how = verdict(share)
    if how == "faster":
        speed = f"{1 / share.value:.{1 if share.value < 0.85 else 2}f}x faster"
    elif how == "slower":
        speed = f"Slower than the dense model ({share.value:.2f} times its latency)"
    else:
        speed = "Not measurably faster than the dense model"
    return f"{speed}{' ' if how == 'faster' else ', '}{_points(result)}"


def _points(result: Result) -> str:
    before, after = result.dense_record.accuracy, result.record.accuracy
    if before is None or after is None:
        return "accuracy unknown"
    change = 100 * (after - before)
    if abs(change) < 0.05:
        return "at the same accuracy"
    return f"at {abs(change):.1f} points {'gained' if change > 0 else 'lost'}"


def _warnings(result: Result, share: Share | None) -> list[str]:
    found = []
    if share is not None and verdict(share) == "slower":
        found.append("The pruned model is slower than the dense one on this engine. Do not deploy it for speed.")
    if share is not None and verdict(share) == "no difference beyond noise":
        found.append("The difference in latency lies within the noise of the measurement: it is no speed-up.")
    if not result.met:
        found.append("The target was missed; this is the nearest plan that was found.")
    if result.record.error is not None:
        found.append(f"This plan failed: {result.record.error}")
    return found


def _rows(result: Result, share: Share | None) -> list[Row]:
    before, after = result.dense_record, result.record
    rows = []
    if before.accuracy is not None and after.accuracy is not None:
        change = 100 * (after.accuracy - before.accuracy)
        rows.append(
            Row("accuracy on validation data", percent(before.accuracy), percent(after.accuracy),
                f"{change:+.1f} points".replace("-", "−"), change <= -0.05)
        )  # fmt: skip
    if share is not None:
        rows.append(
            Row("latency, batch 1, median", seconds(median(share.dense)), seconds(median(share.candidate)),
                _speed(share), verdict(share) != "faster")
        )  # fmt: skip
    for name, dense, pruned in (("FLOPs", before.flops, after.flops), ("parameters", before.params, after.params)):
        if dense and pruned:
            saved = f"{100 * (pruned / dense - 1):+.0f} %".replace("-", "−")
            rows.append(Row(name, quantity(dense), quantity(pruned), saved, pruned > dense))
    return rows


def _speed(share: Share) -> str:
    """The ratio with its interval, said the way round that is easy to read: how much faster, or how much slower."""
    value, low, high = share.value, share.low, share.high
    if value <= 1:
        value, low, high = 1 / value, 1 / high, 1 / low
    word = "as fast" if share.value <= 1 else "as long"
    return f"{value:.2f} times {word} (95 % interval {low:.2f} to {high:.2f}): {verdict(share)}"


def _limits(result: Result, share: Share | None) -> dict[str, float]:
    """The target as shares of the dense model; NaN where the dense model was not measured."""
    dense = result.dense_record
    latency = median(share.dense) if share is not None and share.dense else math.nan
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
    """What the search found, before any fine-tuning: the trial with the chosen plan."""
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


def _tradeoff(result: Result, search: Record) -> Markup | None:
    """The plot of all trials over the first cost that the target bounds."""
    limits = _limits(result, result.dense_record.measured or result.record.measured)
    name = next(iter(limits))
    trials = [
        plots.Trial(cost, record.accuracy, record.feasible)
        for record in result.records
        if record.accuracy is not None and record.error is None and (cost := _cost(record, name)) is not None
    ]
    marks = [plots.Mark("dense", "dense", 1.0, a)] if (a := result.dense_record.accuracy) is not None else []
    tuned = bool(result.history)
    chosen = [("chosen, before fine-tuning", "chosen", search)] if tuned else [("chosen", "chosen", result.record)]
    chosen += [("chosen, fine-tuned", "finetuned", result.record)] if tuned else []
    rivals = [(agent, "rival", record) for agent, record in sorted(result.rivals.items())]
    for label, kind, record in (*rivals, *chosen):
        cost = _cost(record, name)
        if cost is not None and record.accuracy is not None:
            marks.append(plots.Mark(label, kind, cost, record.accuracy))
    if not trials and len(marks) < 2:
        return None
    limit = limits[name] if math.isfinite(limits[name]) else None
    axis = f"{COSTS[name]}, share of the dense model" + (" (measured, else predicted)" if name == "latency" else "")
    return Markup(plots.tradeoff(trials, marks, limit, axis))


def _cost(record: Record, name: str) -> float | None:
    if name == "latency" and record.measured is not None:
        return record.measured.value
    return record.predicted.get(name)


def _trial_facts(records: Iterable[Record]) -> str:
    found = list(records)
    failed = [record for record in found if record.error is not None]
    missed = sum(record.error is None and not record.feasible for record in found)
    text = f"{len(found)} trials, {missed} of them miss the target, {len(failed)} failed and are not in the plot"
    reasons = sorted({str(record.error).splitlines()[0] for record in failed if record.error})
    return f"{text}: {'; '.join(reasons[:3])}{' …' if len(reasons) > 3 else ''}." if reasons else f"{text}."


def _learning(result: Result, search: Record) -> Markup | None:
    if not result.history:
        return None
    return Markup(plots.learning(result.history, result.dense_record.accuracy, search.accuracy))


def _facts(result: Result, share: Share | None) -> Mapping[str, str]:
    facts = {
        "model": result.spec or type(result.dense).__name__,
        "inputs": "; ".join(f"{dtype} {' × '.join(map(str, shape))}" for dtype, shape in result.graph.inputs),
        "engine": share.engine if share is not None else "",
        "agent": result.record.agent,
        "seed": str(result.record.seed),
        "trials": str(len(result.records)),
        "time in trials": seconds(sum(record.seconds for record in result.records)),
        "study": result.study,
        "signature of the graph": result.graph.signature,
    }
    return {name: text for name, text in facts.items() if text} | dict(sorted(result.record.environment.items()))


def percent(value: float) -> str:
    """A share in [0, 1] as per cent with one decimal."""
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """A time with three digits and a fitting unit."""
    if value >= 100:
        return f"{value / 60:.1f} min"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{_digits(value * factor)} {unit}"
    raise AssertionError("every time has a unit")


def quantity(value: float) -> str:
    """A count with three digits and a suffix."""
    for suffix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{_digits(value / factor)} {suffix}"
    return f"{value:g}"


def _digits(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}"
