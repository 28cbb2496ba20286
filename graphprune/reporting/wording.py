"""How the report says things: the outcome in a sentence, what to be warned of, and numbers with sensible digits."""

import math

from graphprune.engines import settings_in
from graphprune.record import Share
from graphprune.result import Result
from graphprune.timing.measure import verdict

SAME = 0.05
"""Points of accuracy that are no change with the one decimal that is printed."""


def headline(result: Result, share: Share | None) -> str:
    """The outcome in plain words: "1.9x faster at 0.4 points lost"."""
    if share is None:
        return f"{_fewer(result)}{_points(result)}; the latency was not measured"
    how = verdict(share)
    if how == "faster":
        speed = f"{1 / share.value:.{1 if share.value < 0.85 else 2}f}x faster"
    elif how == "slower":
        speed = f"Slower than the dense model ({share.value:.2f} times its latency)"
    else:
        speed = "Not measurably faster than the dense model"
    return f"{speed}{' ' if how == 'faster' else ', '}{_points(result)}"


def _fewer(result: Result) -> str:
    before, after = result.dense_record.flops, result.record.flops
    if not before or not after:
        return "Pruned "
    change = after / before - 1
    return f"{abs(change):.0%} {'more' if change > 0 else 'fewer'} FLOPs "


def _points(result: Result) -> str:
    before, after = result.dense_record.accuracy, result.record.accuracy
    if before is None or after is None:
        return "accuracy unknown"
    change = 100 * (after - before)
    if abs(change) < SAME:
        return "at the same accuracy"
    return f"at {abs(change):.1f} points {'gained' if change > 0 else 'lost'}"


def warnings(result: Result, share: Share | None, failure: str | None) -> list[str]:
    """What must not be overlooked, one sentence each. `failure` is why the pruned model could not be timed."""
    found = [f"The pruned model could not be run: {failure}"] if failure else []
    if share is not None and verdict(share) == "slower":
        found.append("The pruned model is slower than the dense one on this engine. Do not deploy it for speed.")
    if share is not None and verdict(share) == "no difference beyond noise":
        found.append("The difference in latency lies within the noise of the measurement: it is no speed-up.")
    if not result.met:
        found.append("The target was missed; this is the nearest plan that was found.")
    if result.record.error is not None:
        found.append(f"This plan failed: {result.record.error}")
    return found


def speed(share: Share) -> str:
    """The ratio with its interval, said the way round that is easy to read: how much faster, or how much slower."""
    value, low, high = share.value, share.low, share.high
    if value <= 1:
        value, low, high = 1 / value, 1 / high, 1 / low
    word = "as fast" if share.value <= 1 else "as long"
    return f"{value:.2f} times {word} (95 % interval {low:.2f} to {high:.2f}): {verdict(share)}"


def setting(identity: str) -> str:
    """How an engine ran, from its identity: "batch 1, 1 thread"."""
    told = settings_in(identity)
    return f"batch {told['batch']}, {told['threads']} thread{'s' if told['threads'] > 1 else ''}"


def signed(value: float, form: str) -> str:
    """A change with its sign, which is a true minus."""
    return format(value, form).replace("-", "−")


def percent(value: float) -> str:
    """A share in [0, 1] as per cent with one decimal."""
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """A time with three digits and a fitting unit."""
    if value >= 100:
        return f"{value / 60:.1f} min"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{_digits(value * factor)} {unit}"
    raise AssertionError("every time has a unit")


def latency(value: float, reference: float) -> str:
    """A time in seconds, three digits, in the unit that fits `reference`, so that the two can be compared."""
    unit, factor = ("s", 1.0) if reference >= 1 else ("ms", 1e3) if reference >= 1e-4 else ("µs", 1e6)
    return f"{_digits(value * factor)} {unit}"


def quantity(value: float) -> str:
    """A count with three digits and a suffix."""
    for suffix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{_digits(value / factor)} {suffix}"
    return f"{value:g}"


def _digits(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}"
