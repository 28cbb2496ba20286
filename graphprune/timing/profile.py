"""What each operator costs on the engine: measured once per machine, then read from a cache."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

from graphprune.coupling.operators import Absent, Convolution, Operator, key
from graphprune.engines.base import Engine, Timing
from graphprune.timing.microbench import METHOD
from graphprune.timing.passes import PASSES, REFERENCES, Samples, lots, measure_lot
from graphprune.timing.timings import TimingFile, default_cache_path

Progress = Callable[[int, int], None]
"""Called with the number of operators measured so far and the number to measure."""

LEAST_NOISE = 0.005
"""Standard deviation of a time's logarithm that is assumed even where the passes agree by chance."""

MOST_GAIN = 100.0
"""The gain that is stated where next to nothing is left: finite, so that it has a logarithm and fits into JSON."""

BLOCKS = (16, 8, 4)
BLOCK_WIDTHS = tuple(range(32, 68, 4))
"""Output channels of the convolutions whose times tell the vector block."""
BLOCK_OPERATORS = tuple(Convolution(1, 32, width, 14, 14, (3, 3), padding=(1, 1, 1, 1)) for width in BLOCK_WIDTHS)


@dataclass
class Profile:
    """Times of operators on one engine, at its batch; `cache` is the file that keeps them for all processes of this
    machine, for each engine, number of threads and batch apart.

    Times are stated for the speed that the machine had when it was first profiled, so that operators measured at
    different moments compare. An operator that the engine cannot run has a Timing with an error, NaN seconds, and
    never a gain. A layer that is gone takes no time, and no engine is asked.
    """

    engine: Engine
    cache: Path = field(default_factory=default_cache_path)
    _samples: dict[str, Samples] = field(default_factory=dict, repr=False)
    _timings: dict[Operator, Timing] = field(default_factory=lambda: {Absent(): Timing((0.0,))}, repr=False)

    def timing(self, operator: Operator) -> Timing:
        """Samples in seconds per execution, one for each pass (`graphprune.timing.passes`); measured now if need be."""
        if operator not in self._timings:
            self.fill([operator])
        return self._timings[operator]

    def seconds(self, operator: Operator) -> float:
        """The median time of one execution in seconds; NaN where the engine cannot run the operator."""
        return self.timing(operator).median

    def gain(self, dense: Iterable[Operator], cut: Iterable[Operator]) -> float:
        """Time of the dense operators / time of those that replace them: above 1 is faster, at most `MOST_GAIN`."""
        before, after = list(dense), list(cut)
        self.fill([*before, *after])
        cost = sum(map(self.seconds, after))
        whole = sum(map(self.seconds, before))
        return min(whole / cost, MOST_GAIN) if cost else MOST_GAIN

    def beyond_noise(self, dense: Iterable[Operator], cut: Iterable[Operator]) -> bool:
        """Whether the gain exceeds what two measurements of the same thing differ by (95 %, one-sided)."""
        gain = self.gain(dense, cut)
        return gain > math.exp(1.645 * math.sqrt(2) * self.noise)

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the logarithm of an operator's time, from how far repeated passes disagree.

        The median disagreement over a fixed set of operators, so that it does not depend on what else was measured, as
        a normal distribution would have it: two passes with deviation s differ by 0.6745 * sqrt(2) * s in the median,
        and the time pools them: s / sqrt(2).
        """
        operators = [*REFERENCES, *BLOCK_OPERATORS]
        self.fill(operators)
        samples = [self._samples[name] for name in map(key, operators) if name in self._samples]
        gaps = [abs(math.log(first / second)) for first, second, *_ in samples]
        spread = median(gaps) / (0.6745 * math.sqrt(2)) if gaps else 0.0
        return max(LEAST_NOISE, spread / math.sqrt(PASSES))

    @cached_property
    def block(self) -> int:
        """The vector block in channels (16, 8 or 4): convolutions cost whole multiples of it.

        Each candidate predicts that a convolution with c output channels costs ceil(c / block), and is judged by the
        squared error of the measured times' logarithms, up to a common factor. The largest is taken unless a smaller
        one halves the error: noise must not decide between candidates that fit alike.
        """
        self.fill(BLOCK_OPERATORS)
        measured = [math.log(self.seconds(operator)) for operator in BLOCK_OPERATORS]

        def misfit(block: int) -> float:
            errors = [time - math.log(math.ceil(c / block)) for time, c in zip(measured, BLOCK_WIDTHS, strict=True)]
            centre = sum(errors) / len(errors)
            return sum((error - centre) ** 2 for error in errors)

        found, *smaller = BLOCKS
        for block in smaller:
            found = block if misfit(block) < misfit(found) / 2 else found
        return found

    def fill(self, operators: Iterable[Operator], progress: Progress | None = None) -> None:
        """Measure all that is not known yet, in interleaved lots, and keep each lot as it comes.

        A killed process loses at most the lot in flight.
        """
        missing = self._recall(operators)
        if not missing:
            return
        for lot in lots(self._recall(REFERENCES), self.engine.batch):
            self._keep(measure_lot(self.engine, lot, {}))
        references = {o: self.seconds(o) for o in REFERENCES if self._timings[o].error is None}
        missing = self._recall(missing)
        done = 0
        for lot in lots(missing, self.engine.batch):
            self._keep(measure_lot(self.engine, lot, references))
            done += len(lot)
            if progress is not None:
                progress(done, len(missing))

    @property
    def _file(self) -> TimingFile:
        return TimingFile(self.cache, f"{self.engine.identity}; method {METHOD}")

    def _recall(self, operators: Iterable[Operator]) -> list[Operator]:
        """Take what the cache holds; returns the others, each once."""
        unknown = [operator for operator in dict.fromkeys(operators) if operator not in self._timings]
        if unknown:
            self._samples.update(self._file.read())
        for operator in unknown:
            if (samples := self._samples.get(key(operator))) is not None:
                self._timings[operator] = Timing(samples)
        return [operator for operator in unknown if operator not in self._timings]

    def _keep(self, measured: dict[Operator, Samples | str]) -> None:
        fresh: dict[str, Samples] = {}
        for operator, outcome in measured.items():
            if isinstance(outcome, str):
                self._timings[operator] = Timing(error=outcome)
            else:
                self._timings[operator] = Timing(outcome)
                fresh[key(operator)] = outcome
        self._samples.update(fresh)
        self._file.append(fresh)
