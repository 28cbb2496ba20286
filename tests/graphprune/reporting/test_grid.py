"""What patterns gain, as cells, text and picture."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.operators import Attention, Convolution, Linear, Operator
from graphprune.coupling.tracing import trace
from graphprune.engines.fake import SECONDS_PER_NODE, SECONDS_PER_PRODUCT, FakeEngine
from graphprune.errors import InputError
from graphprune.patterns.filter import Filter
from graphprune.patterns.kernel import Kernel
from graphprune.registry import patterns
from graphprune.reporting import grid, heatmap
from graphprune.reporting.grid import Cell
from graphprune.reporting.tables import WIDTH
from graphprune.timing.profile import Profile
from tests.graphprune import tiny

BOTH = [Filter(), Kernel()]
GAINING = Cell("kernel", "3x1 left", "conv", 2.5, 1 / 3)
LOSING = Cell("kernel", "3x1 right", "conv", 0.9, 1 / 3, "no gain beyond noise")
FAILING = Cell("filter", "50 %", "conv", math.nan, 0.5, "the engine cannot run it")
GONE = Cell("block", "gone", "branch", math.inf, 0.0)


def seconds(operator: Operator) -> float:
    """What the fake engine takes for a convolution whose outputs are whole blocks, with the addition after it."""
    return operator.flops / 2 * SECONDS_PER_PRODUCT + 2 * SECONDS_PER_NODE


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    """Two 3x3 convolutions of 32 channels and a classifier."""
    return trace(tiny.network(), torch.zeros(2, 3, 16, 16))


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile(FakeEngine(), tmp_path / "timings.jsonl")


@pytest.mark.parametrize("cell", [GAINING, LOSING, FAILING, GONE])
def test_a_cell_survives_json(cell: Cell) -> None:
    again = Cell.from_dict(json.loads(json.dumps(cell.to_dict(), allow_nan=False)))
    assert str(again) == str(cell), "as text, since NaN is not equal to itself"


def test_cells_are_the_gains_of_all_levels(graph: ModelGraph, profile: Profile) -> None:
    found = {(cell.shape, cell.level): cell for cell in grid.cells({"": graph}, profile, BOTH)}
    second = Convolution(1, 32, 32, 16, 16, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1))
    column = second.window((0, 3), (1, 2))
    cell = found["conv 3x3/2 32→32 on 16x16", "3x1 centre"]
    assert cell.speedup == pytest.approx(seconds(second) / seconds(column))
    assert cell.flops_share == pytest.approx(1 / 3)
    assert cell.efficiency == pytest.approx(cell.speedup / 3)
    first = Convolution(1, 3, 32, 16, 16, (3, 3), padding=(1, 1, 1, 1))
    half = found["conv 3x3 3→32 on 16x16 +1", "50 %"]
    assert half.flops_share == pytest.approx(0.5)
    both = seconds(first) + seconds(second)
    assert half.speedup == pytest.approx(both / (both / 2 + 2 * SECONDS_PER_NODE))
    assert len(found) == 2 + 2 * len(Kernel().levels(graph.site["0.0/kernel"], 16))


def test_what_is_legal_has_no_reason(graph: ModelGraph, profile: Profile) -> None:
    found = grid.cells({"": graph}, profile, BOTH)
    legal = {
        (pattern.name, level.name)
        for pattern in BOTH
        for level in pattern.legal(graph, graph.site["0.0/kernel"], profile)
    }
    own = [cell for cell in found if cell.shape == "conv 3x3 3→32 on 16x16"]
    assert {(cell.pattern, cell.level) for cell in own if not cell.reason} == legal
    assert legal


def test_what_gains_nothing_says_so(graph: ModelGraph, tmp_path: Path) -> None:
    found = grid.cells({"": graph}, Profile(tiny.Weighted(factor=0), tmp_path / "timings.jsonl"), BOTH)
    assert {cell.reason for cell in found} == {"no gain beyond noise"}
    assert all(cell.speedup == pytest.approx(1) or cell.speedup < 1 for cell in found)


def test_masks_gain_nothing_where_zeros_are_multiplied(tmp_path: Path) -> None:
    """They are timed for `graphprune profile`, which says so; with kernels for them they are offered."""
    graph = trace(nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 10)), torch.zeros(2, 768))
    for engine, gain, refused in ((FakeEngine(), 1.0, True), (FakeEngine(sparse_kernels=True), 1.6, False)):
        profile = Profile(engine, tmp_path / "timings.jsonl")
        found = [cell for cell in grid.cells({"": graph}, profile, list(patterns().values())) if cell.level == "2:4"]
        assert (found[0].pattern, found[0].shape) == ("n-of-m", "linear 768→768 on 1 rows")
        assert found[0].speedup == pytest.approx(gain, rel=0.2)
        assert found[0].flops_share == 1
        assert bool(found[0].reason) is refused
        assert ("masks gain nothing but on engines with 2:4 kernels: 2:4 1.00x" in _words(grid.table(found))) is refused


def _words(table: str) -> str:
    return " ".join(table.split())


def test_sites_of_one_shape_are_one_cell(profile: Profile) -> None:
    layers = [nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)]
    graph = trace(nn.Sequential(*layers), torch.zeros(2, 32, 8, 8))
    found = grid.cells({"": graph}, profile, BOTH)
    assert {(cell.pattern, cell.sites) for cell in found} == {("kernel", 3), ("filter", 2)}
    named = grid.cells({"a": graph, "b": graph}, profile, BOTH)
    assert [cell.shape for cell in named] == ["a"] * len(found) + ["b"] * len(found)


def test_progress_and_everything_measured_in_one_go(graph: ModelGraph, profile: Profile) -> None:
    seen: list[tuple[int, int]] = []
    assert profile.block == 16
    found = grid.cells({"": graph}, profile, BOTH, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1
    assert grid.cells({"": graph}, profile, BOTH, lambda *_: pytest.fail("nothing was left to measure")) == found


def test_an_engine_that_runs_nothing(graph: ModelGraph, profile: Profile) -> None:
    assert profile.block == 16
    profile.engine.failing = range(10**6)  # type: ignore[attr-defined]
    found = grid.cells({"": graph}, profile, [Kernel()])
    assert {cell.reason for cell in found} == {"the engine cannot run it"}
    assert found[0].to_dict()["speedup"] is None
    assert "fails" in grid.table(found)


def test_efficiency_and_json() -> None:
    assert GAINING.efficiency == pytest.approx(2.5 / 3)
    assert math.isnan(GONE.efficiency)
    assert (GONE.to_dict()["speedup"], GONE.to_dict()["efficiency"]) == (None, None)
    assert GAINING.to_dict() == {
        "pattern": "kernel", "level": "3x1 left", "shape": "conv", "reason": "", "sites": 1, "speedup": 2.5,
        "flops_share": 1 / 3, "efficiency": GAINING.efficiency,
    }  # fmt: skip


def test_the_table_tells_gains_and_losses() -> None:
    other = Cell("kernel", "3x1 centre", "conv", 2.8, 1 / 3)
    text = grid.table([GAINING, other, LOSING, FAILING, GONE])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1] == "kernel conv 1 3x1 2.50-2.80x (33 %); no gain beyond noise: 3x1 right 0.90x (33 %)"
    assert lines[2] == "filter conv 1 the engine cannot run it: 50 % fails (50 %)"
    assert lines[3] == "block branch 1 gone (0 %)"


def test_the_table_fits_a_terminal(graph: ModelGraph, profile: Profile) -> None:
    text = grid.table(grid.cells({"": graph}, profile, BOTH))
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (Convolution(1, 64, 32, 9, 8, (5, 5)), "conv 5x5 64→32 on 9x8"),
        (Convolution(1, 64, 64, 8, 8, (3, 3), stride=(2, 2), groups=64), "depthwise 3x3/2 64 on 8x8"),
        (Convolution(1, 64, 64, 8, 8, (3, 3), groups=4), "conv 3x3 64→64 in 4 groups on 8x8"),
        (Linear(197, 192, 768), "linear 192→768 on 197 rows"),
        (Attention(1, 3, 197, 197, 64, 64), "attention 3x64 on 197 rows"),
    ],
)
def test_operators_in_words(operator: Operator, words: str) -> None:
    assert grid.describe(operator) == words


def test_typical_layers_reach_every_pattern() -> None:
    graphs = grid.typical_graphs()
    reached = {
        pattern.name
        for graph in graphs.values()
        for site in graph.all_sites
        for pattern in patterns().values()
        if site.kind in pattern.kinds and pattern.levels(site, 16)
    }
    assert reached == set(patterns())


# --- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture_shows_each_cell(tmp_path: Path) -> None:
    file = heatmap.draw([GAINING, LOSING, FAILING, GONE], tmp_path / "new" / "gains.svg", "a title")
    text = file.read_text()
    for word in ("a title", "kernel", "filter", "block", "3x1 left", "50 %", "2.50", "0.90", "fails", "gone"):
        assert f">{word}</text>" in text
    assert "<pattern" in text  # the hatching of what is not offered
    assert "<pattern" not in heatmap.draw([GAINING], tmp_path / "gaining.svg", "").read_text()


def test_equal_cells_draw_equal_pictures(tmp_path: Path) -> None:
    first, second = (heatmap.draw([GAINING, LOSING], tmp_path / f"{n}.svg", "t").read_bytes() for n in range(2))
    assert first == second
    assert heatmap.draw([GAINING], tmp_path / "gains.png", "t").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a picture ends in .png, .svg, .pdf, not '.gif'"):
        heatmap.draw([GAINING], tmp_path / "gains.gif", "t")
    assert not list(tmp_path.iterdir())


def test_a_dropped_branch_is_gone_and_has_no_efficiency(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return (x + self.inner(x)).mean((2, 3))

    graph = trace(Residual(), torch.zeros(2, 3, 8, 8))
    (cell,) = grid.cells({"": graph}, Profile(FakeEngine(), tmp_path / "cache"), [patterns()["block"]])
    assert (cell.speedup, cell.flops_share, cell.reason) == (math.inf, 0, "")
    assert math.isnan(cell.efficiency)
