"""Figures of the report as inline SVG: small, the same bytes for the same data, in the colours of the page.

matplotlib knows no CSS, so it draws in stand-in colours which are replaced by the page's variables; light and dark
need one drawing. Text stays text.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "surface": "#040404",
    "good": "#050505",
    "dense": "#060606",
    "bad": "#070707",
    "accent": "#080808",
    "rival": "#090909",
}
"""Name of a CSS variable -> what matplotlib draws instead of it."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "graphprune",
    "font.size": 9.5,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


LONGEST = 3.0
"""Latencies are shown up to so many times the larger median: a single disturbed run must not squeeze all others."""


@dataclass(frozen=True)
class Trial:
    """A point of the trade-off: `cost` as a share of the dense model, accuracy in [0, 1]."""

    cost: float
    accuracy: float
    met: bool = True


@dataclass(frozen=True)
class Mark:
    """A point with a name. `kind` is "dense", "chosen", "finetuned" or "rival"."""

    name: str
    kind: str
    cost: float
    accuracy: float


def tradeoff(trials: Sequence[Trial], marks: Sequence[Mark], limit: float | None, cost: str) -> str:
    """Accuracy over cost of all trials; `limit` is the target, `cost` the name of the horizontal axis."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.4, 4.0)
        if limit is not None:
            axes.axvline(limit, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(  # above the axes, where no point lies
                f"target {limit:.2f}", (limit, 1), (0, 3), ("data", "axes fraction"), "offset points",
                fontsize=9, horizontalalignment="center",
            )  # fmt: skip
        for met, colour, marker, name in ((False, "muted", "x", "misses the target"), (True, "accent", "o", "trial")):
            found = [trial for trial in trials if trial.met is met]
            if found:
                axes.scatter(
                    [trial.cost for trial in found],
                    [trial.accuracy for trial in found],
                    s=22,
                    marker=marker,
                    color=COLOURS[colour],
                    alpha=0.65,
                    linewidths=1.2 if marker == "x" else 0,
                    label=f"{name} ({len(found)})",
                )
        _draw_marks(axes, marks)
        axes.set_xlabel(cost)
        axes.set_ylabel("accuracy on validation data")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        axes.margins(0.06)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.4)
        points = ", ".join(f"{mark.name} {100 * mark.accuracy:.1f} % at {mark.cost:.2f}" for mark in marks)
        return _svg(figure, "tradeoff", f"Accuracy against {cost}, {len(trials)} trials; {points}")


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    look = {
        "dense": ("*", 170, "dense", True),
        "chosen": ("D", 80, "good", True),
        "finetuned": ("^", 95, "good", True),
        "rival": ("s", 60, "rival", False),
    }
    shapes = "sPvXpd<>h"
    rivals = 0
    for mark in marks:
        marker, size, colour, filled = look[mark.kind]
        if mark.kind == "rival":
            marker, rivals = shapes[rivals % len(shapes)], rivals + 1
        face = COLOURS[colour] if filled else "none"
        edge = COLOURS["surface"] if filled else COLOURS[colour]
        axes.scatter(
            [mark.cost], [mark.accuracy], s=size, marker=marker, facecolor=face, edgecolor=edge, linewidths=1.3,
            zorder=3 + (mark.kind == "rival"), label=mark.name,
        )  # fmt: skip


def distributions(dense: Sequence[float], pruned: Sequence[float]) -> str:
    """How the latency samples (seconds) of both models spread: the share of runs that were at least as fast."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.4, 3.0)
        scale, unit = (1e3, "ms") if median(dense) >= 1e-4 else (1e6, "µs")
        for name, samples, colour, style in (("dense", dense, "dense", "--"), ("pruned", pruned, "good", "-")):
            ordered = sorted(sample * scale for sample in samples)
            shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
            label = f"{name}, median {median(ordered):.3g} {unit}"
            axes.step([ordered[0], *ordered], [0, *shares], where="post", color=COLOURS[colour], linestyle=style,
                      linewidth=2, label=label)  # fmt: skip
            axes.axvline(median(ordered), color=COLOURS[colour], linewidth=0.8)
        runs = [sample * scale for sample in (*dense, *pruned)]
        end = LONGEST * scale * max(median(dense), median(pruned))
        beyond = sum(run > end for run in runs)
        if beyond:
            axes.set_xlim(min(runs) - 0.05 * (end - min(runs)), end)
        longer = f"; {beyond} of {len(runs)} runs took longer than shown" if beyond else ""
        axes.set_xlabel(f"latency of one run, {unit}{longer}")
        axes.set_ylabel("runs at most so long")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return _svg(
            figure, "latency", "Distribution of the latency samples of both models, medians as in the first table"
        )


def learning(history: Sequence[tuple[int, float, float]], dense: float | None, before: float | None) -> str:
    """Fine-tuning: validation accuracy and training loss after each epoch, from (epoch, loss, accuracy)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.8), layout="constrained")
        accuracy, loss = figure.subplots(1, 2)
        epochs = [epoch for epoch, *_ in history]
        marker = "o" if len(history) < 40 else ""
        accuracy.plot(epochs, [entry[2] for entry in history], color=COLOURS["good"], marker=marker, markersize=4)
        lines = [(dense, "dense", "dense"), (before, "before", "muted")]
        known = sorted((value, name, colour) for value, name, colour in lines if value is not None)
        for number, (value, name, colour) in enumerate(known):
            below = number < len(known) - 1  # names of lines that are close do not meet, and none is on the curve
            accuracy.axhline(value, color=COLOURS[colour], linestyle="--", linewidth=1.2)
            accuracy.annotate(
                name, (1, value), (4, 0), ("axes fraction", "data"), "offset points", fontsize=9,
                verticalalignment="top" if below else "bottom", color=COLOURS[colour],
            )  # fmt: skip
        accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        accuracy.set_ylabel("accuracy on validation data")
        loss.plot(epochs, [entry[1] for entry in history], color=COLOURS["accent"], marker=marker, markersize=4)
        loss.set_ylabel("training loss")
        for axes in (accuracy, loss):
            axes.set_xlabel("epoch")
            axes.set_facecolor("none")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        last = f"{100 * history[-1][2]:.1f} % after epoch {history[-1][0]}"
        return _svg(figure, "learning", f"Validation accuracy and training loss of each epoch; {last}")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    return figure, axes


def _svg(figure: Figure, name: str, alternative: str) -> str:
    """The figure as an SVG element with a text for those who cannot see it.

    Its ids begin with `name`, so that several fit on one page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(alternative)}"', 1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would style the whole page
    text = re.sub(r"(font-family:|font: [\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()
