"""What each pattern gains on this machine: at every site of a model, or on typical layers where no model is given.

The typical layers are small networks, traced like any other, so that patterns are asked as in a search.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphprune.coupling.graph import Layer, ModelGraph
from graphprune.coupling.operators import Attention, Convolution, Linear, Operator, Weighted
from graphprune.coupling.tracing import trace
from graphprune.pattern import Pattern
from graphprune.reporting.tables import SOLID, layout
from graphprune.timing.cases import Case, cases, legal_cases, operators
from graphprune.timing.profile import Profile, Progress

ROWS = 197
"""Tokens of a vision transformer: 14 x 14 patches and the class token."""
HEAD = 64
"""Width of its heads."""
UNABLE = "the engine cannot run it"


@dataclass(frozen=True)
class Cell:
    """What a level of a pattern does to the layers of `sites` sites of one shape; of several, medians.

    `speedup` is dense time / time, infinite where nothing is left and NaN where the engine cannot run it, `flops_share`
    the share of FLOPs kept. `reason` says why it is not offered, empty where it is.
    """

    pattern: str
    level: str
    shape: str
    speedup: float
    flops_share: float
    reason: str = ""
    sites: int = 1

    @property
    def efficiency(self) -> float:
        """Speed-up x share of FLOPs kept: 1 where time falls as FLOPs do; NaN where no layer is left."""
        return self.speedup * self.flops_share

    def to_dict(self) -> dict[str, str | float | None]:
        """For JSON, which knows neither NaN nor infinity: None."""
        numbers = {"speedup": self.speedup, "flops_share": self.flops_share, "efficiency": self.efficiency}
        names = {"pattern": self.pattern, "level": self.level, "shape": self.shape, "reason": self.reason}
        return {
            **names,
            "sites": self.sites,
            **{name: number if math.isfinite(number) else None for name, number in numbers.items()},
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Self:
        """Read a cell back. Raises KeyError for a field that is missing."""
        told = {name: body[name] for name in ("pattern", "level", "shape", "flops_share", "reason", "sites")}
        unknown = math.nan if body["reason"] == UNABLE else math.inf
        return cls(speedup=unknown if body["speedup"] is None else body["speedup"], **told)


def cells(
    graphs: Mapping[str, ModelGraph], profile: Profile, patterns: Sequence[Pattern], progress: Progress | None = None
) -> list[Cell]:
    """All levels of all patterns in all graphs, offered or not; one cell for what has pattern, level and shape alike.

    A graph's name is the shape of its cells; where the name is empty, each site's layers are. What is not known yet is
    measured.
    """
    profile.fill([o for graph in graphs.values() for o in operators(graph, patterns, profile.block)], progress)
    found = [cell for name, graph in graphs.items() for cell in _cells(name, graph, profile, patterns)]
    return list(_merged(found))


def _cells(name: str, graph: ModelGraph, profile: Profile, patterns: Sequence[Pattern]) -> Iterator[Cell]:
    found = [case for case in cases(graph, patterns, profile.block) if case.layers]
    offered = {(case.site.name, case.pattern.name, case.level) for case in legal_cases(found, graph, profile)}
    for case in found:
        speedup = profile.gain(case.dense, case.cut) if _flops(case.cut) else math.inf
        legal = (case.site.name, case.pattern.name, case.level) in offered
        yield Cell(
            case.pattern.name, _level(case), name or _shape(graph, case), speedup,
            _flops(case.cut) / max(1, _flops(case.dense)),
            "" if legal else _reason(speedup, case.pattern.refusal(profile.engine)),
        )  # fmt: skip


def _flops(found: Iterable[Operator]) -> int:
    return sum(operator.flops for operator in found)


def _reason(speedup: float, refusal: str) -> str:
    return UNABLE if math.isnan(speedup) else refusal or "no gain beyond noise"


def _level(case: Case) -> str:
    """The level's name; a number of units as a percentage, so that sites of different sizes compare."""
    size, count = case.site.size, case.level.count
    return f"{100 * count / size:.0f} %" if case.level.name == f"{count} of {size}" else case.level.name


def _shape(graph: ModelGraph, case: Case) -> str:
    """The first layer that decides about the site, and how many others its cuts reach."""
    nodes = {layer.node: layer for layer in case.layers}
    first: Layer = nodes.get(case.site.node, case.layers[0])
    others = len(case.layers) - 1
    return describe(first.operator) + (f" +{others}" if others else "")


def describe(operator: Operator) -> str:
    """An operator in some words: kind, sizes, and the size of what it reads."""
    groups = f" in {operator.groups} groups" if isinstance(operator, Weighted) and operator.groups > 1 else ""
    if isinstance(operator, Convolution):
        stride = f"/{max(operator.stride)}" if max(operator.stride) > 1 else ""
        kernel, size = "x".join(map(str, operator.kernel)), f"{operator.height}x{operator.width}"
        if operator.groups > 1 and operator.groups == operator.inputs:
            return f"depthwise {kernel}{stride} {operator.outputs} on {size}"
        return f"conv {kernel}{stride} {operator.inputs}→{operator.outputs}{groups} on {size}"
    if isinstance(operator, Linear):
        return f"linear {operator.inputs}→{operator.outputs}{groups} on {operator.rows} rows"
    if isinstance(operator, Attention):
        return f"attention {operator.heads}x{operator.width} on {operator.queries} rows"
    return type(operator).__name__.lower()


def _merged(found: Sequence[Cell]) -> Iterator[Cell]:
    """Cells that agree in pattern, level and shape as one, which is offered where at least half of them are."""
    same: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in found:
        same.setdefault((cell.pattern, cell.level, cell.shape), []).append(cell)
    for alike in same.values():
        refused = sorted(cell.reason for cell in alike if cell.reason)
        yield replace(
            alike[0],
            speedup=median(cell.speedup for cell in alike),
            flops_share=median(cell.flops_share for cell in alike),
            reason=refused[0] if 2 * len(refused) > len(alike) else "",
            sites=len(alike),
        )


# --- what is printed ------------------------------------------------------------------------------------------------


def table(found: Sequence[Cell]) -> str:
    """The cells as text: a line for each pattern and shape, with speed-up and the share of FLOPs kept of each level."""
    rows = []
    for pattern in dict.fromkeys(cell.pattern for cell in found):
        own = [cell for cell in found if cell.pattern == pattern]
        for shape in dict.fromkeys(cell.shape for cell in own):
            levels = [cell for cell in own if cell.shape == shape]
            rows.append((pattern, shape, str(max(cell.sites for cell in levels)), _levels(levels)))
    heading = "levels: dense time / time (share of FLOPs kept)"
    return "\n".join(layout(("pattern", "shape", "sites", heading), rows, numbers=(2,)))


def _levels(found: Sequence[Cell]) -> str:
    parts = [_told([cell for cell in found if not cell.reason])]
    for reason in dict.fromkeys(cell.reason for cell in found if cell.reason):
        parts.append(f"{reason}: {_told([cell for cell in found if cell.reason == reason])}")
    return "; ".join(filter(None, parts))


def _told(found: Sequence[Cell]) -> str:
    """Levels in short: those of one shape in different places (`3x1 left`, `3x1 right`) are told once."""
    parts = []
    for (shape, share), same in groupby(found, lambda cell: (_place_free(cell.level), cell.flops_share)):
        members = list(same)
        name = members[0].level if len(members) == 1 else shape
        gain = _gain([cell.speedup for cell in members])
        parts.append(" ".join(filter(None, (name, gain, f"({100 * share:.0f} %)"))).replace(" ", SOLID))
    return ", ".join(parts)


def _gain(speedups: Sequence[float]) -> str:
    """From the least to the largest; nothing to tell where nothing is left to time."""
    if any(map(math.isnan, speedups)):
        return "fails"
    ends = [f"{speedup:.2f}" for speedup in (min(speedups), max(speedups)) if math.isfinite(speedup)]
    return f"{'-'.join(dict.fromkeys(ends))}x" if ends else ""


def _place_free(level: str) -> str:
    """`3x1` of `3x1 left`; all of `50 %`."""
    return level if level.endswith("%") else level.split(maxsplit=1)[0]


# --- typical layers -------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """x + branch(x): what is inside the branch may be cut, and the branch as a whole."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> the same shape."""
        return torch.relu(x + self.branch(x))


def _basic(channels: int, kernel: int) -> nn.Module:
    """Two convolutions, as in a ResNet's basic block."""

    def conv() -> nn.Module:
        return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)

    return _Residual(conv(), nn.BatchNorm2d(channels), nn.ReLU(), conv(), nn.BatchNorm2d(channels))


def _inverted(channels: int, kernel: int) -> nn.Module:
    """A depthwise convolution between two pointwise ones, as in MobileNetV2."""
    narrow = channels // 6
    return _Residual(
        nn.Conv2d(narrow, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(),
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
        nn.BatchNorm2d(channels), nn.ReLU6(),
        nn.Conv2d(channels, narrow, 1, bias=False), nn.BatchNorm2d(narrow),
    )  # fmt: skip


def _stem(channels: int, kernel: int) -> nn.Module:
    """The first convolution of an ImageNet network and a pointwise one that reads it."""
    first = nn.Conv2d(3, channels, kernel, stride=2, padding=kernel // 2, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1))


def _transformer(width: int) -> nn.Module:
    """Patch embedding, one block, and a classifier, so that the embedding width may be cut as well."""
    from timm.models.vision_transformer import Block

    block = Block(width, width // HEAD, qkv_bias=True)
    return nn.Sequential(nn.Linear(768, width), block, nn.LayerNorm(width), nn.Linear(width, 10))


def _typical() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, model and input shape of each shape of the grid."""
    for channels, size in ((16, 32), (32, 16), (64, 56), (128, 28), (256, 14), (512, 7)):
        yield f"conv 3x3 {channels} on {size}x{size}", lambda c=channels: _basic(c, 3), (channels, size, size)  # type: ignore[misc]
    yield "conv 5x5 64 on 28x28", lambda: _basic(64, 5), (64, 28, 28)
    yield "conv 7x7/2 3→64 on 224x224", lambda: _stem(64, 7), (3, 224, 224)
    for channels, kernel, size in ((144, 3, 56), (240, 5, 14), (192, 7, 28)):
        name = f"depthwise {kernel}x{kernel} {channels} on {size}x{size}"
        yield name, lambda c=channels, k=kernel: _inverted(c, k), (channels // 6, size, size)  # type: ignore[misc]
    for width in (192, 384, 768):
        yield f"transformer {width} on {ROWS} rows", lambda w=width: _transformer(w), (ROWS, 768)  # type: ignore[misc]


def typical_graphs(progress: Progress | None = None) -> dict[str, ModelGraph]:
    """The traced networks of the general grid, by the name of their shape."""
    graphs = {}
    shapes = list(_typical())
    for number, (name, build, shape) in enumerate(shapes):
        graphs[name] = trace(build().eval(), torch.zeros(2, *shape))
        if progress is not None:
            progress(number + 1, len(shapes))
    return graphs
