"""Progress: bars in a terminal, lines elsewhere."""

import io

from rich.console import Console

from graphprune.commands.console import Bars


def shown(terminal: bool) -> tuple[Bars, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=None)
    return Bars(console), stream


def run(bars: Bars) -> None:
    with bars:
        for done in range(5):
            bars.update("search", done, 4, f"best {done} %")
        bars.update("verify", 1, 8, "random [1]")
        bars.update("search", 2, 4, "another agent")
        epoch = bars.epochs("finetune", 3)
        epoch(1, 0.25, 0.875)


def test_a_pipe_gets_a_line_at_the_end_of_each_stage():
    bars, stream = shown(terminal=False)
    run(bars)
    lines = stream.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["search", "4/4"],
        ["verify", "1/8"],
        ["search", "2/4"],
        ["finetune", "1/3"],
    ]
    assert lines[0].endswith("best 4 %")
    assert lines[1].endswith("random [1]")
    assert lines[3].endswith("loss 0.250, validation 87.5 %")


def test_a_terminal_gets_one_bar_for_each_stage():
    bars, stream = shown(terminal=True)
    run(bars)
    last = stream.getvalue().split("\x1b[2K")[-1].split("\x1b")[0]
    assert [line.split()[0] for line in last.splitlines() if line.strip()] == ["search", "verify", "search", "finetune"]
    assert "best 4 %" in last
    assert "4/4" in last


def test_a_long_stage_says_something_now_and_then(monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("graphprune.commands.console.time.monotonic", lambda: float(next(clock)))
    bars, stream = shown(terminal=False)
    for done in range(10):
        bars.update("search", done, 100)
    lines = stream.getvalue().splitlines()
    assert 1 < len(lines) < 10
