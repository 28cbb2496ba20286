"""Measures operators in passes, with references beside them that tell how fast the machine is at that moment."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

from graphprune.coupling.operators import Convolution, Linear, Operator
from graphprune.engines.base import Engine, Timing
from graphprune.timing.microbench import Microbench, microbench

REFERENCES: tuple[Operator, ...] = (
    Convolution(1, 32, 32, 16, 16, (3, 3), padding=(1, 1, 1, 1)),
    Convolution(1, 64, 64, 8, 8, (3, 3), padding=(1, 1, 1, 1)),
    Linear(64, 192, 192),
)
"""Timed in every pass: a shared machine is 20 % slower for seconds on end, and these are slower with the others."""

LOT_OPERATORS = 48
LOT_BYTES = 1 << 26
"""Operators timed interleaved, and the size of their models, all of which are in memory at once."""

ROUNDS = 3
"""Runs of a model in one pass, of which the fastest counts: what disturbs a run only ever adds to its time."""
PASSES = 2
"""Every operator is measured in so many passes, each with models loaded anew."""
MOST_PASSES = 5
AGREEMENT = 0.06
"""Passes whose logarithms differ by more are followed by another one, up to MOST_PASSES."""

SHORTEST = 1e-8
"""Seconds; noise can make a difference of two times vanish, but no operator takes less than some clock cycles."""

Benches = dict[Operator, Microbench]
Samples = tuple[float, ...]
"""Seconds per execution of one operator, one for each pass."""


def lots(operators: Sequence[Operator], batch: int) -> Iterator[Benches]:
    """The operators' models at a batch size, in lots that fit into memory together."""
    lot: Benches = {}
    size = 0
    for operator in operators:
        bench = microbench(operator, batch)
        weight = len(bench.model) + len(bench.baseline)
        if lot and (len(lot) == LOT_OPERATORS or size + weight > LOT_BYTES):
            yield lot
            lot, size = {}, 0
        lot[operator] = bench
        size += weight
    if lot:
        yield lot


def measure_lot(engine: Engine, lot: Benches, nominal: Mapping[Operator, float]) -> dict[Operator, Samples | str]:
    """The samples of every operator of the lot, or the text of the error that prevented them.

    `nominal` holds seconds of the references; where it does, times are stated for a machine that is as fast as it was
    then. An operator is measured again while no two of its passes agree; passes in which its time vanished (the other
    model was disturbed) count only where nothing else was found.
    """
    references = {operator: microbench(operator, engine.batch) for operator in nominal}
    measured: dict[Operator, Samples] = {operator: () for operator in lot}
    failed: dict[Operator, str] = {}
    for number in range(MOST_PASSES):
        wanted = [o for o in lot if o not in failed and (number < PASSES or not _agree(measured[o]))]
        if not wanted:
            break
        outcomes = _pass(engine, {o: lot[o] for o in wanted} | references)
        scale = _scale(outcomes, nominal)
        for operator in wanted:
            outcome = outcomes[operator]
            if isinstance(outcome, str):
                failed[operator] = outcome
            else:
                measured[operator] += (outcome * scale if outcome > SHORTEST else SHORTEST,)
    return {operator: failed.get(operator, _seen(samples)) for operator, samples in measured.items()}


def _pass(engine: Engine, benches: Benches) -> dict[Operator, float | str]:
    models = [model for bench in benches.values() for model in (bench.model, bench.baseline)]
    timings = engine.measure(models, ROUNDS)
    pairs = zip(timings[::2], timings[1::2], strict=True)
    return {
        operator: _difference(model, baseline, benches[operator].copies)
        for operator, (model, baseline) in zip(benches, pairs, strict=True)
    }


def _difference(model: Timing, baseline: Timing, copies: int) -> float | str:
    """Seconds of one copy, or the error."""
    if (error := model.error or baseline.error) is not None:
        return error
    return max((min(model.samples) - min(baseline.samples)) / copies, SHORTEST)


def _scale(outcomes: Mapping[Operator, float | str], nominal: Mapping[Operator, float]) -> float:
    """By how much the machine is faster now than when the references were first measured (below 1: slower)."""
    ratios = [seconds / now for o, seconds in nominal.items() if not isinstance(now := outcomes[o], str)]
    return median(ratios) if ratios else 1.0


def _agree(samples: Samples) -> bool:
    """Whether the closest two samples are close enough; where a time vanished, that is no agreement."""
    seen = sorted(sample for sample in samples if sample > SHORTEST)
    return min((math.log(b / a) for a, b in pairwise(seen)), default=math.inf) <= AGREEMENT


def _seen(samples: Samples) -> Samples:
    """The samples without those in which the time vanished, where enough are left."""
    seen = tuple(sample for sample in samples if sample > SHORTEST)
    return seen if len(seen) >= PASSES else samples
