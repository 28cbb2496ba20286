"""In which order the plans of a search are verified: not only by how many answers were right."""

from collections.abc import Sequence
from math import sqrt

from graphprune.record import Record


def ranked(records: Sequence[Record], images: int) -> list[Record]:
    """The judged records, the best first, each plan once.

    The best of many accuracies owes something to luck. So those within one standard error of the best, as feasible as
    that, come first, by the deviation of their outputs, which is known better (the rule of one standard error: Breiman
    et al. 1984, section 3.4.3; `benchmarks/signals.py`). Accuracies are shares of so many `images`; with 0 images they
    are none, and only equal ones count as alike.
    """
    judged = sorted((r for r in records if r.accuracy is not None), key=lambda r: r.rank, reverse=True)
    plans = list({record.plan: record for record in judged}.values())
    if not plans:
        return []
    feasible, best, _ = plans[0].rank
    bar = best - standard_error(best, images)

    def order(record: Record) -> tuple[bool, float]:
        alike = (record.feasible, record.images) == (feasible, plans[0].images) and record.rank[1] >= bar
        return (False, record.deviation or 0.0) if alike else (True, 0.0)

    return sorted(plans, key=order)


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy over so many images; even a perfect one has it (the estimate of Agresti and Coull 1998, z = 1)."""
    share = (accuracy * images + 0.5) / (images + 1)
    return sqrt(share * (1 - share) / (images + 1)) if images else 0.0
