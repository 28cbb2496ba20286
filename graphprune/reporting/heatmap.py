"""A picture of what patterns gain: one panel per pattern, its levels as rows, shapes of layers as columns."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from graphprune.errors import InputError
from graphprune.files import atomic
from graphprune.reporting.grid import Cell

FORMATS = (".png", ".svg", ".pdf")
COLOURS = "RdYlBu"
"""Red where time falls less than FLOPs, pale at 1, blue where it falls more; told apart by colour-blind readers too."""
RANGE = 2.0
"""Efficiencies from 1 / RANGE to RANGE are told apart, on a logarithmic scale."""
STYLE = {"font.size": 8, "hatch.linewidth": 0.5, "svg.fonttype": "none", "svg.hashsalt": "graphprune"}
WIDTH, HEIGHT = 0.62, 0.26
"""Inches of a cell."""
LEFT, RIGHT, TITLE, HEAD = 1.6, 0.5, 0.3, 0.9
"""Inches for the names of levels, beside the last column, for a panel's title, and for the scale above all panels."""
LABELS, LETTER = 0.35, 0.036
"""Inches below a panel, and what each letter of the longest name of a shape adds."""


def check(path: Path) -> None:
    """Raise InputError where the ending names no format: before minutes of measuring rather than after."""
    if path.suffix not in FORMATS:
        raise InputError(f"a picture ends in {', '.join(FORMATS)}, not {path.suffix or 'nothing'!r}: {path.name}")


def draw(cells: Sequence[Cell], path: Path, title: str) -> Path:
    """Write the picture; the ending of `path` is its format. Raises InputError for another ending than those known."""
    check(path)
    panels = [[c for c in cells if c.pattern == name] for name in dict.fromkeys(c.pattern for c in cells)]
    sizes = [_size(panel) for panel in panels]
    width = max(8.0, LEFT + WIDTH * max((columns for _, columns, _ in sizes), default=1) + RIGHT)
    height = HEAD + sum(TITLE + HEIGHT * rows + labels for rows, _, labels in sizes)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        top = height - HEAD
        for panel, (rows, columns, labels) in zip(panels, sizes, strict=True):
            top -= TITLE + HEIGHT * rows
            place = (LEFT / width, top / height, WIDTH * columns / width, HEIGHT * rows / height)
            _panel(figure.add_axes(place), panel)
            top -= labels
        _scale(figure, width, height, title)
        buffer = BytesIO()
        figure.savefig(buffer, format=path.suffix[1:], dpi=130, metadata=_metadata(path))
    return atomic.write_bytes(path, buffer.getvalue())


def _metadata(path: Path) -> dict[str, None] | None:
    """Nothing that differs from run to run."""
    return {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else None


def _size(panel: Sequence[Cell]) -> tuple[int, int, float]:
    """Rows, columns, and inches for the names of the columns."""
    shapes = _names(panel, "shape")
    return len(_names(panel, "level")), len(shapes), LABELS + LETTER * max(map(len, shapes))


def _names(panel: Sequence[Cell], axis: str) -> list[str]:
    """The levels or shapes of a panel; percentages from large to small, all else in the order of the cells."""
    names = list(dict.fromkeys(getattr(cell, axis) for cell in panel))
    return sorted(names, key=lambda name: -float(name[:-2]) if name.endswith(" %") else 0.0)


def _panel(axes: Axes, panel: Sequence[Cell]) -> None:
    levels, shapes = _names(panel, "level"), _names(panel, "shape")
    for cell in panel:
        _cell(axes, shapes.index(cell.shape), levels.index(cell.level), cell)
    axes.set_xlim(0, len(shapes))
    axes.set_ylim(len(levels), 0)
    axes.set_xticks([column + 0.6 for column in range(len(shapes))], shapes, rotation=35, ha="right", fontsize=7)
    axes.set_yticks([row + 0.5 for row in range(len(levels))], levels)
    axes.tick_params(length=0)
    axes.set_title(panel[0].pattern, loc="left", fontweight="bold", fontsize=10, pad=4)
    axes.set_facecolor("#f4f4f4")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(axes: Axes, column: int, row: int, cell: Cell) -> None:
    colour = _colour(cell.efficiency)
    hatch = "////" if cell.reason else None
    edge = "#888888" if cell.reason else "white"
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=edge, linewidth=0.8, hatch=hatch))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if cell.reason else None
    ink = "white" if not cell.reason and _dark(colour) else "black"
    axes.text(column + 0.5, row + 0.5, _text(cell.speedup), ha="center", va="center", color=ink, bbox=box)


def _text(speedup: float) -> str:
    if math.isnan(speedup):
        return "fails"
    return "gone" if math.isinf(speedup) else f"{speedup:.2f}"


def _norm() -> LogNorm:
    return LogNorm(1 / RANGE, RANGE, clip=True)


def _colour(efficiency: float) -> tuple[float, ...]:
    if math.isnan(efficiency):
        return (0.8, 0.8, 0.8, 1.0)
    return tuple(matplotlib.colormaps[COLOURS](_norm()(max(efficiency, 1e-6))))


def _dark(colour: Sequence[float]) -> bool:
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _scale(figure: Figure, width: float, height: float, title: str) -> None:
    """Title, colour scale and the meaning of hatching, above the panels."""
    figure.text(0.15 / width, 1 - 0.12 / height, title, va="top", fontsize=10, fontweight="bold")
    colours = matplotlib.cm.ScalarMappable(_norm(), COLOURS)
    axes = figure.add_axes((0.3 / width, 1 - 0.58 / height, 2.1 / width, 0.14 / height))
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal")
    bar.set_ticks([1 / RANGE, 0.7, 1, 1.4, RANGE], labels=[f"≤ {1 / RANGE:g}", "0.7", "1", "1.4", f"≥ {RANGE:g}"])
    bar.minorticks_off()
    note = "number: speed-up of the layers; colour: speed-up x share of FLOPs kept; hatched: not offered here"
    figure.text(2.75 / width, 1 - 0.51 / height, note, va="center", fontsize=8)
