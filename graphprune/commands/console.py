"""What a person sees while graphprune works, on standard error, and the tables at the end."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10
"""Where standard error is no terminal, progress is a line at the end of each stage, and one every so often."""


class Bars:
    """One progress bar per stage, with a note beside it (the best result so far).

    `update` is what `graphprune.search` calls. Where standard error is a file or a pipe, plain lines take the place
    of bars.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage, self._line, self._printed = "", "", ""
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say()
        self._bars.stop()

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps of a stage are done; `note` is shown beside the bar."""
        if stage != self._stage or self._task is None:
            self._task = self._begin(stage)
        self._bars.update(self._task, completed=done, total=total, note=note)
        seconds = time.monotonic() - self._started
        self._line = f"{stage:<9} {done}/{total}  {seconds:.0f} s  {note}".rstrip()
        if done >= total or time.monotonic() - self._said > LINE_SECONDS:
            self._say()

    def stage(self, stage: str) -> Callable[[int, int], None]:
        """A callback for work that counts steps and has nothing to note."""
        return lambda done, total: self.update(stage, done, total)

    def epochs(self, stage: str, total: int) -> Callable[[int, float, float], None]:
        """A callback for training: the stage counts epochs and shows loss and validation accuracy."""
        self.update(stage, 0, total)
        return lambda epoch, loss, accuracy: self.update(
            stage, epoch, total, f"loss {loss:.3f}, validation {100 * accuracy:.1f} %"
        )

    def _begin(self, stage: str) -> TaskID:
        """A new bar; a stage that comes back later (the search of another agent) gets another one."""
        self._say()
        if self._task is not None:
            self._bars.stop_task(self._task)
        self._stage, self._started, self._line = stage, time.monotonic(), ""
        return self._bars.add_task(stage, note="")

    def _say(self) -> None:
        if not self.console.is_terminal and self._line != self._printed and self._line:
            self.console.print(self._line, markup=False, highlight=False, soft_wrap=True)
            self._printed = self._line
        self._said = time.monotonic()
