"""Engines side by side: every number in the tables against the values that it was made from."""

import math

import pytest

from graphprune.engines.base import Timing
from graphprune.reporting.conditions import Condition, engine_rows, offers
from graphprune.reporting.grid import Cell
from graphprune.timing.measure import share

RUNTIME, VINO = "onnxruntime 1.32.0, CPUExecutionProvider, {} threads, a processor", "openvino 2026.4, CPU, {} threads"


def condition(engine: str, dense: float, pruned: float, cells: tuple[Cell, ...] | None = None) -> Condition:
    """Every sample takes the same time, so that the interval has no width."""
    return Condition(share(Timing((dense,) * 5), Timing((pruned,) * 5), engine), cells)


def test_rows_are_in_the_order_of_engine_threads_and_batch_whatever_the_order_of_measuring() -> None:
    own = RUNTIME.format(2)
    found = engine_rows(
        [
            condition(VINO.format(1), 1e-3, 2e-3),
            condition(own, 2e-3, 1e-3),
            condition(RUNTIME.format(1) + ", batch 8", 0.02, 0.02),
            condition(RUNTIME.format(1), 4e-3, 1e-3),
        ],
        own,
    )
    assert [(row.engine, row.threads, row.batch) for row in found] == [
        ("onnxruntime 1.32.0", 1, 1),
        ("onnxruntime 1.32.0", 1, 8),
        ("onnxruntime 1.32.0", 2, 1),
        ("openvino 2026.4", 1, 1),
    ]
    assert [row.own for row in found] == [False, False, True, False]
    assert [row.share.partition(" (")[0] for row in found] == ["25.0 %", "100.0 %", "50.0 %", "200.0 %"]
    assert [row.verdict for row in found] == ["faster", "no difference beyond noise", "faster", "slower"]
    assert (found[1].dense, found[1].pruned) == ("20.0 ms", "20.0 ms")


NONE = "no gain beyond noise"
HERE = (
    Cell("kernel", "3x1 left", "conv", 1.5, 1 / 3, sites=3),
    Cell("kernel", "3x1 right", "conv", 1.4, 1 / 3, sites=3),
    Cell("kernel", "1x1 centre", "other conv", 0.9, 1 / 9, NONE),
    Cell("filter", "75 %", "conv", 1.2, 0.75, sites=2),
    Cell("block", "removed", "conv", math.inf, 0.0, sites=2),
)
THERE = (
    Cell("kernel", "3x1 left", "conv", 1.05, 1 / 3, NONE, sites=3),
    Cell("kernel", "3x1 right", "conv", 1.6, 1 / 3, sites=3),
    Cell("kernel", "1x1 centre", "other conv", math.nan, 1 / 9, "the engine cannot run it"),
    Cell("filter", "50 %", "conv", 1.9, 0.5, sites=2),
    Cell("block", "removed", "conv", math.inf, 0.0, NONE, sites=2),
)


def test_offers_are_counted_at_every_site_and_only_differences_are_listed() -> None:
    unasked = condition(RUNTIME.format(2), 2e-3, 1e-3)
    found = offers([condition(VINO.format(1), 1.0, 0.5, THERE), unasked, condition(RUNTIME.format(1), 1.0, 0.5, HERE)])
    assert found is not None
    assert found.titles == (("onnxruntime 1.32.0", "batch 1, 1 thread"), ("openvino 2026.4", "batch 1, 1 thread"))
    assert found.counts == (
        ("kernel", ("6 of 7", "3 of 7")),
        ("filter", ("2 of 2", "2 of 2")),
        ("block", ("2 of 2", "0 of 2")),
    )
    told = {(one.pattern, one.level): one for one in found.differences}
    assert told.keys() == {("kernel", "3x1 left"), ("filter", "75 %"), ("filter", "50 %"), ("block", "removed")}
    assert told["kernel", "3x1 left"].gains == (("1.50×", True), ("no (1.05×)", False))
    assert (told["kernel", "3x1 left"].layers, told["kernel", "3x1 left"].sites) == ("conv", 3)
    assert told["filter", "75 %"].gains == (("1.20×", True), ("not tried", False))
    assert told["filter", "50 %"].gains == (("not tried", False), ("1.90×", True))
    assert told["block", "removed"].gains == (("nothing left", True), (f"no: {NONE}", False))


@pytest.mark.parametrize("cells", [None, HERE])
def test_offers_of_one_engine_differ_nowhere(cells: tuple[Cell, ...] | None) -> None:
    found = offers([condition(VINO.format(1), 1.0, 0.5, cells), condition(RUNTIME.format(1), 1.0, 0.5)])
    assert (found is None) is (cells is None)
    assert found is None or found.differences == ()
