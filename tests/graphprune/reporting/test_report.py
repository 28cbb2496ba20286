"""The report: what it says is what the result holds, it needs nothing from outside, and the picture is the model."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from graphprune.engines.base import Timing
from graphprune.errors import InputError
from graphprune.models import create
from graphprune.plan import Choice, Plan
from graphprune.record import Record, Share
from graphprune.registry import pattern
from graphprune.reporting import plots
from graphprune.reporting.conditions import Condition
from graphprune.reporting.drawing import LINE, RADIUS, WIDTH, PlanLabels, draw
from graphprune.reporting.flow import collapse, rows, segments
from graphprune.reporting.grid import Cell
from graphprune.reporting.report import write_report
from graphprune.reporting.wording import headline, quantity, seconds
from graphprune.result import Result
from graphprune.target import Target
from graphprune.timing.measure import Measurement, share
from graphprune.uniform import uniform_plan

KERNEL = Choice("body.inner/kernel", "kernel", "3x1 left", (0, 3, 6))
FILTER = Choice("body.inner/channels", "filter", "16 of 32", tuple(range(16)))


class Block(nn.Module):
    """A residual block with a wide inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.outer(torch.relu(self.inner(images)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.classifier = nn.Conv2d(3, 8, 3, padding=1), Block(), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.relu(self.body(self.stem(images))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return trace(Small(), torch.zeros(2, 3, 8, 8))


def timed(ratio: float, seed: int = 0) -> Share:
    rng = np.random.default_rng(seed)
    dense, cut = 1e-3 * np.exp(0.01 * rng.normal(size=(2, 40)))
    samples = Timing(tuple(dense.tolist())), Timing(tuple((ratio * cut).tolist()))
    return share(*samples, "an engine 1.0, 2 threads, batch 8")


def a_result(graph: ModelGraph, ratio: float = 0.5, accuracy: float = 0.904) -> Result:
    """A search of five trials, one failed and one beyond the target, with two rivals."""
    plan = Plan(graph.signature, (KERNEL, FILTER), graph.inputs)
    base = Record(
        plan, accuracy, True, {"latency": 0.48}, timed(ratio), 25_000_000, 120_000, agent="autosculpt", seed=7,
        seconds=2.0, environment={"torch": "2.15.0", "processor": "A <Processor>"},
    )  # fmt: skip
    other = replace(base, plan=Plan(graph.signature, (KERNEL,), graph.inputs), measured=None)
    trials = (
        other,
        replace(other, accuracy=None, feasible=False, error="no kernel for this\nsecond line"),
        replace(other, accuracy=0.91, feasible=False, predicted={"latency": 0.7}),
        base,
        replace(other, accuracy=0.5),
    )
    dense = Record(Plan(graph.signature), 0.917, True, {"latency": 1.0}, timed(1.0), 81_000_000, 270_000)
    rivals = {
        "uniform": replace(base, agent="uniform", accuracy=0.551, measured=timed(0.53), feasible=False),
        "dp": replace(base, agent="dp", accuracy=None, error="it broke"),
    }
    return Result(
        nn.Identity(), Small(), graph, plan, base, dense, Target(latency=0.55, params=0.5), trials, "cifar:small",
        notes=("a <b>note</b>",), rivals=rivals, searched=replace(base, accuracy=0.906),
    )  # fmt: skip


def written(result: Result, folder: Path, **options: object) -> str:
    path = write_report(result, folder / "report.html", **options)  # type: ignore[arg-type]
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tables as rows of texts, headings, all ids, all references, unclosed elements."""

    EMPTY = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        for name in ("href", "src", "xlink:href", "aria-labelledby"):
            self.references += [given[name] or ""] if name in given else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


# --- the page -----------------------------------------------------------------------------------------------------


def test_page_is_whole_and_needs_nothing_from_outside(graph: ModelGraph, tmp_path: Path) -> None:
    result = replace(a_result(graph), history=((1, 1.5, 0.8), (2, 1.0, 0.9)))
    text = written(result, tmp_path)
    page = Page(text)
    assert page.open == []
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    for reference in page.references:
        assert reference.removeprefix("#") in page.ids
    assert set(re.findall(r"https?://[^\"' <)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 300_000


def test_pictures_are_well_formed_and_have_a_text(graph: ModelGraph, tmp_path: Path) -> None:
    text = written(replace(a_result(graph), history=((1, 1.5, 0.8), (2, 1.0, 0.9))), tmp_path)
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    labelled = [picture for picture in pictures if "aria-hidden" not in picture]
    assert len(labelled) == 4
    for picture in pictures:
        ElementTree.fromstring(picture if "xmlns=" in picture else picture.replace("<svg", '<svg xmlns="s"', 1))
    assert all(re.match(r"<svg[^>]*role=\"img\"[^>]*aria-label=\"[^\"]{20,}", picture) for picture in labelled)
    assert not re.search(r"#0[1-9]0[1-9]0[1-9]", text)  # no stand-in colour is left


def test_same_result_gives_the_same_bytes(graph: ModelGraph, tmp_path: Path) -> None:
    first = written(a_result(graph), tmp_path)
    assert written(a_result(graph), tmp_path) == first


def test_main_table(graph: ModelGraph, tmp_path: Path) -> None:
    result = a_result(graph)
    table = Page(written(result, tmp_path)).tables[0]
    measured = result.record.measured
    assert measured is not None
    assert table[0] == ["", "dense", "pruned", "change"]
    assert table[1] == ["accuracy on validation data", "91.7 %", "90.4 %", "−1.3 points"]
    assert table[2][:3] == [
        "latency, batch 8, 2 threads, median",
        *(f"{median(x) * 1e3:.3f} ms" for x in (measured.dense, measured.candidate)),
    ]
    low, high = f"{1 / measured.high:.2f}", f"{1 / measured.low:.2f}"
    assert table[2][3] == f"{1 / measured.value:.2f} times as fast (95 % interval {low} to {high}): faster"
    assert table[3:] == [["FLOPs", "81.0 M", "25.0 M", "−69 %"], ["parameters", "270 k", "120 k", "−56 %"]]


def test_target_is_judged_by_the_upper_bound(graph: ModelGraph, tmp_path: Path) -> None:
    result = a_result(graph)
    text = " ".join("".join(Page(written(result, tmp_path)).texts).split())
    assert result.record.measured is not None
    high = f"{100 * result.record.measured.high:.1f} % (upper end of the 95 % interval), met"
    assert f"latency at most 55.0 % of the dense model; reached {high}" in text
    assert "parameters at most 50.0 % of the dense model; reached 44.4 %, met." in text
    beyond = replace(result, record=replace(result.record, measured=replace(result.record.measured, high=0.56)))
    assert "56.0 % (upper end of the 95 % interval), missed" in " ".join(
        "".join(Page(written(beyond, tmp_path)).texts).split()
    )


def test_a_mix_counts_the_positions_of_all_filters(graph: ModelGraph, tmp_path: Path) -> None:
    result, site, mix = a_result(graph), graph.site["body.inner/kernel"], pattern("kernel-mix")
    level = mix.levels(site, 16)[-1]
    choice = Choice(site.name, mix.name, level.name, mix.sample(site, level))
    _, _, plan = Page(written(replace(result, plan=replace(result.plan, choices=(choice,))), tmp_path)).tables
    assert plan[1:] == [["body.inner/kernel", "kernel-mix", "3x1 1x3", f"{32 * 3} of {32 * 9}"]]


def test_plan_and_rivals(graph: ModelGraph, tmp_path: Path) -> None:
    result = a_result(graph)
    _, agents, plan = Page(written(result, tmp_path)).tables
    assert plan[1:] == [
        ["body.inner/channels", "filter", "16 of 32", "16 of 32"],
        ["body.inner/kernel", "kernel", "3x1 left", "3 of 9"],
    ]
    assert [row[0] for row in agents[1:]] == ["autosculpt", "dp", "uniform"]
    assert [agents[1][1], *agents[1][3:]] == ["90.6 %", "5", "meets the target (chosen)"]
    assert agents[2][1:] == ["–", "–", "–", "failed: it broke"]
    assert [agents[3][1], agents[3][4]] == ["55.1 %", "misses the target"]
    rival = result.rivals["uniform"].measured
    assert rival is not None
    assert agents[3][2] == f"{100 * rival.value:.1f} % ({100 * rival.low:.1f} to {100 * rival.high:.1f})"


def test_all_trials_are_accounted_for(graph: ModelGraph, tmp_path: Path) -> None:
    text = written(a_result(graph), tmp_path)
    assert "5 trials; missing the target: 1; failed and not in the plot: 1 (no kernel for this)." in text
    assert "trial (3)" in text
    assert "misses the target (1)" in text
    assert "target 0.55" in text


def test_fine_tuned_result_shows_both_accuracies(graph: ModelGraph, tmp_path: Path) -> None:
    result = a_result(graph)
    tuned = replace(result, record=replace(result.record, accuracy=0.915), history=((1, 1.5, 0.9), (2, 1.0, 0.915)))
    text = written(tuned, tmp_path)
    agents = Page(text).tables[1]
    assert agents[1][:2] == ["autosculpt", "90.6 %"], "as finely repaired as the rivals, not as in the trial"
    assert "before fine-tuning 90.6 % at 0.50, chosen, fine-tuned 91.5 % at 0.50" in text
    assert "before fine-tuning 90.4 % at 0.50" in written(replace(tuned, searched=None), tmp_path)
    assert 'id="tuning"' in text
    assert 'id="tuning"' not in written(result, tmp_path)


def test_text_from_outside_is_no_markup(graph: ModelGraph, tmp_path: Path) -> None:
    result = a_result(graph)
    result = replace(result, rivals={"<i>agent": result.rivals["uniform"]})
    text = written(result, tmp_path, title="<script>alert(1)</script>")
    assert "<script" not in text
    assert "<i>" not in text
    assert "a <b>" not in text
    assert "a <b>note</b>" in Page(text).texts
    assert "A <Processor>" in Page(text).texts


@pytest.mark.parametrize(
    ("ratio", "good", "expected"),
    [
        (0.5, True, "2.0x faster at 1.3 points lost"),
        (0.9, True, "1.11x faster at 1.3 points lost"),
        (1.0, False, "Not measurably faster than the dense model, at 1.3 points lost"),
        (1.25, False, "Slower than the dense model (1.25 times its latency), at 1.3 points lost"),
    ],
)
def test_headline(graph: ModelGraph, tmp_path: Path, ratio: float, good: bool, expected: str) -> None:
    measured = replace(timed(ratio), value=ratio, low=ratio * 0.99, high=ratio * 1.005)
    result = a_result(graph)
    result = replace(result, record=replace(result.record, measured=measured))
    assert headline(result, measured) == expected
    text = written(result, tmp_path)
    assert f'<h1 class="{"good" if good else "bad"}">{expected}</h1>' in text
    assert ("The pruned model is slower" in text) is (ratio > 1.1)
    assert ("it is no speed-up" in text) is (ratio == 1.0)


def test_accuracy_in_the_headline(graph: ModelGraph) -> None:
    measured = timed(0.5)
    assert headline(a_result(graph, accuracy=0.9168), measured).endswith("x faster at the same accuracy")
    assert headline(a_result(graph, accuracy=0.93), measured).endswith("x faster at 1.3 points gained")
    assert headline(a_result(graph), None) == "69% fewer FLOPs at 1.3 points lost; the latency was not measured"


def test_missed_target_is_said(graph: ModelGraph, tmp_path: Path) -> None:
    text = written(replace(a_result(graph), met=False), tmp_path)
    assert 'role="alert">The target was missed' in text
    assert '<h1 class="bad">' in text
    assert "The target was missed" not in written(a_result(graph), tmp_path)


def test_final_measurement_replaces_the_one_of_the_search(graph: ModelGraph, tmp_path: Path) -> None:
    final = timed(0.25, seed=3)
    timings = (Timing(final.dense), Timing(final.candidate))
    table = Page(written(a_result(graph), tmp_path, measurement=Measurement("e", ("a", "b"), timings))).tables[0]
    assert table[2][2] == f"{median(final.candidate) * 1e3:.3f} ms"
    broken = Measurement("e", ("a", "b"), (timings[0], Timing(error="it does not load")))
    text = written(a_result(graph), tmp_path, measurement=broken)
    assert "The pruned model could not be run: it does not load" in text
    assert "the latency was not measured" in text


def test_engines_are_shown_side_by_side(graph: ModelGraph, tmp_path: Path) -> None:
    result = a_result(graph)
    assert result.record.measured is not None
    text = written(result, tmp_path)
    own = Condition(result.record.measured, (Cell("kernel", "3x1 left", "conv 3x3", 1.5, 1 / 3, sites=2),))
    assert written(result, tmp_path, conditions=[Condition(result.record.measured)]) == text, "nothing to compare"
    refused = Cell("kernel", "3x1 left", "conv 3x3", 1.0, 1 / 3, "no gain beyond noise", sites=2)
    other = Condition(replace(timed(0.7), engine="openvino 2026.4, CPU, 1 threads"), (refused,))
    page = Page(written(result, tmp_path, conditions=[own, other]))
    assert page.open == []
    tables = {table[0][0]: table for table in page.tables if table not in Page(text).tables}
    times = [f"{median(x) * 1e3:.3f} ms" for x in (result.record.measured.dense, result.record.measured.candidate)]
    assert tables["engine"][1][:5] == ["an engine 1.0", "2", "8", *times]
    assert tables["engine"][2][:3] == ["openvino 2026.4", "1", "1"]
    counts, differences = [table for table in page.tables if table[0][0] == "pattern"]
    assert counts[1] == ["kernel", "2 of 2", "0 of 2"]
    assert differences[1] == ["kernel", "conv 3x3", "2", "3x1 left", "1.50×", "no (1.00×)"]
    same = Page(written(result, tmp_path, conditions=[own, replace(other, cells=own.cells)]))
    assert "All of them offer the same levels." in same.texts


def test_names_of_lines_that_are_close_do_not_meet() -> None:
    """Two texts of 9 pixels, one on its line and one below it."""
    for dense, before in ((0.99, 0.985), (0.985, 0.99)):
        text = plots.learning([(1, 1.0, 0.5), (2, 0.5, 0.9)], dense, before)
        height = {name: float(y) for y, name in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>(dense|before)</text>', text)}
        assert abs(height["dense"] - height["before"]) >= 9
        assert (height["dense"] < height["before"]) is (dense > before)


def test_a_disturbed_run_does_not_squeeze_the_others() -> None:
    calm = plots.distributions([1e-3] * 9 + [1.5e-3], [5e-4] * 10)
    assert "took longer" not in calm
    disturbed = plots.distributions([1e-3] * 9 + [1.0], [5e-4] * 10)
    assert "latency of one run, ms; 1 of 20 runs took longer than shown" in disturbed
    ticks = [float(label) for label in re.findall(r">([\d.]+)</text>", disturbed)]
    assert max(ticks) <= 3


def test_bare_result(graph: ModelGraph, tmp_path: Path) -> None:
    plan = Plan(graph.signature, (), graph.inputs)
    bare = Result(nn.Identity(), Small(), graph, plan, Record(plan), Record(plan), Target(latency_ms=3))
    text = written(bare, tmp_path)
    assert "Pruned accuracy unknown; the latency was not measured" in text
    assert "Nothing was cut." in text
    assert "graphprune · Small" in text
    assert Page(text).open == []


def test_folder_that_cannot_be_written(graph: ModelGraph, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_report(a_result(graph), tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-5, "30.0 µs"), (0.0012345, "1.23 ms"), (0.0999, "99.9 ms"), (12.3, "12.3 s"), (600, "10.0 min")],
)
def test_times(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12"), (1234, "1.23 k"), (81_102_080, "81.1 M"), (4.1e9, "4.10 G")])
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


# --- the picture --------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        "cifar:resnet20",
        "timm:vit_tiny_patch16_224?img_size=32&depth=3",
        "timm:densenet121?block_config=(3,4)&growth_rate=16",
    ],
)
def network(request: pytest.FixtureRequest) -> ModelGraph:
    return trace(create(request.param), torch.zeros(2, 3, 32, 32))


def test_collapsed_graph_keeps_what_depends_on_what(network: ModelGraph) -> None:
    whole, flow = network.to_networkx(), collapse(network)
    layers = [layer.node for layer in network.layers]
    assert [name for name in flow if not flow.nodes[name]["join"]] == layers
    assert all(flow.in_degree(name) > 1 for name in flow if flow.nodes[name]["join"])
    for layer in layers:
        assert networkx.descendants(flow, layer) & set(layers) == networkx.descendants(whole, layer) & set(layers)


def test_segments_end_where_one_tensor_is_alive(network: ModelGraph) -> None:
    flow = collapse(network)
    order = list(flow)
    found = segments(flow)
    assert [name for segment in found for name in segment] == order
    position = {name: number for number, name in enumerate(order)}
    ends = [position[segment[-1]] for segment in found[:-1]]
    expected = [
        number
        for number in range(len(order) - 1)
        if all(position[a] == number for a, b in flow.edges if position[a] <= number < position[b])
    ]
    assert ends == expected


def test_rows_hold_all_nodes_in_order_and_fit(network: ModelGraph) -> None:
    flow = collapse(network)
    found = rows(flow, 7)
    assert [name for row in found for name in row] == list(flow)
    assert max(sum(not flow.nodes[name]["join"] for name in row) for row in found) <= 7


def test_drawing_holds_every_layer_once_and_nothing_overlaps(network: ModelGraph) -> None:
    plan = uniform_plan(network, 0.5)
    drawing = draw(network, PlanLabels(network, plan))
    assert len(drawing.boxes) == len(network.layers)
    places = [(box.x, box.y, box.x + WIDTH, box.y + drawing.box_height) for box in drawing.boxes]
    places += [(j.x - RADIUS, j.y - RADIUS, j.x + RADIUS, j.y + RADIUS) for j in drawing.joins]
    assert min(place[0] for place in places) >= 0
    assert max(place[2] for place in places) <= drawing.width
    assert max(place[3] for place in places) <= drawing.height
    for number, (left, top, right, bottom) in enumerate(places):
        for other in places[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    marked = [box for box in drawing.boxes if box.patterns]
    assert len(marked) >= len(plan.choices)
    assert all(len(box.lines) >= 2 for box in drawing.boxes)


def test_every_edge_is_drawn_once_and_no_arc_crosses_a_box(network: ModelGraph) -> None:
    drawing, flow = draw(network, PlanLabels(network, Plan(network.signature, (), network.inputs))), collapse(network)
    found = rows(flow, 7)
    edges = {(a if a in row else None, b) for row in found for a, b in flow.edges if b in row}
    firsts = {row[0] for row in found}
    direct = {(a, b) for row in found for a, b in pairwise(row)} | {(None, b) for b in firsts}
    assert len(drawing.arrows) == len(edges & direct)
    assert len(drawing.arcs) == len(edges - direct)
    assert len(drawing.turns) == len(found) - 1
    for path in drawing.arcs:
        across = float(re.match(r"M\S+ \S+V([\d.]+)q0 -5", path).group(1)) - 5  # type: ignore[union-attr]
        assert across > 0
        assert not any(box.y <= across <= box.y + drawing.box_height for box in drawing.boxes)


def test_boxes_tell_what_was_chosen(graph: ModelGraph) -> None:
    drawing = draw(graph, PlanLabels(graph, Plan(graph.signature, (KERNEL, FILTER), graph.inputs)))
    stem, inner, outer, classifier = drawing.boxes
    assert inner.lines == ("body.inner", "conv 3×1, 8→16", "16 of 32", "3x1 left")
    assert inner.patterns == ("filter", "kernel")
    assert inner.title.startswith("body.inner: conv 3×3, 8→32 becomes conv 3×1, 8→16; ")
    assert (outer.lines, outer.patterns, outer.reads) == (("body.outer", "conv 1×1, 16→8"), (), ("filter",))
    for dense in (stem, classifier):
        assert (dense.patterns, dense.reads) == ((), ())
        assert dense.title.endswith("dense")
    assert drawing.box_height >= 4 * LINE
    assert [join.symbol for join in drawing.joins] == ["+"]


def test_arrows_of_a_residual_block(graph: ModelGraph) -> None:
    drawing = draw(graph, PlanLabels(graph, Plan(graph.signature, (), graph.inputs)))
    assert len(drawing.arcs) == 1  # stem -> addition
    assert len(drawing.arrows) == 4
    assert drawing.turns == ()
    stem, join = drawing.boxes[0], drawing.joins[0]
    assert drawing.arcs[0].startswith(f"M{stem.x + WIDTH / 2 + 5:g} {stem.y:g}V")
    assert drawing.arcs[0].endswith(f"V{join.y - RADIUS:g}")


def test_plan_of_another_model(graph: ModelGraph) -> None:
    with pytest.raises(InputError, match="another model"):
        draw(graph, PlanLabels(graph, Plan("0" * 16)))
