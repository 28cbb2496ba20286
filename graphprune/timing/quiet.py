"""Candidates measured against the dense model, in quiet moments as far as there are any.

What else a machine does (other cores, on a virtual one other guests) takes caches and memory from a model that is being
timed, and from small models more than from large ones: their share of the dense model's time grows by a tenth and more,
for seconds or minutes (`benchmarks/moments.py`). No number of samples of such a moment helps. The dense model's own
time tells these moments apart, since interference only ever adds.
"""

import time
from dataclasses import dataclass
from math import inf
from statistics import median

from graphprune.engines.base import Engine
from graphprune.errors import StepError
from graphprune.record import Share
from graphprune.timing.measure import measure

ROUNDS = 20
ALIKE = 1.05
"""A moment is quiet where the dense model takes at most so many times its fastest time so far."""
RETRIES = 4
"""How often a measurement is repeated at most, after pauses that begin with its own length and double."""
LONGEST_PAUSE = 5.0
"""Seconds."""


@dataclass
class Stopwatch:
    """Measures on one engine against one dense model (ONNX bytes). `fastest` is its least median time in seconds, as
    far as the machine can be expected to be as fast again.
    """

    engine: Engine
    dense: bytes
    fastest: float = inf

    def look(self) -> None:
        """Learn what the dense model takes at this moment."""
        self.fastest = min(self.fastest, self.engine.measure([self.dense], ROUNDS)[0].median)

    def share(self, candidate: bytes, rounds: int = ROUNDS, fresh: bool = False) -> Share:
        """The candidate's latency share at batch 1, in a process of its own if it is to be `fresh`.

        Where the moment is not quiet, the measurement is repeated after a pause, and the one with the fastest dense
        model counts. Where that does not help, less is expected of the machine from then on, which may have become
        slower. Raises StepError where the candidate cannot be run.
        """
        start = time.perf_counter()
        found = self._once(candidate, rounds, fresh)
        pause = time.perf_counter() - start
        for _ in range(RETRIES):
            if median(found.dense) <= ALIKE * self.fastest:
                break
            time.sleep(min(pause, LONGEST_PAUSE))
            pause *= 2
            found = min(found, self._once(candidate, rounds, fresh), key=lambda share: median(share.dense))
        else:
            self.fastest = min(median(found.dense), ALIKE * self.fastest)
        return found

    def _once(self, candidate: bytes, rounds: int, fresh: bool) -> Share:
        measurement = measure([self.dense, candidate], rounds=rounds, engine=self.engine, fresh=fresh)
        share = measurement.shares[-1]
        if share is None:
            raise StepError(measurement.timings[-1].error or "the candidate could not be measured")
        self.fastest = min(self.fastest, median(share.dense))
        return share
