"""The end of a search: its best plans are repaired with more effort and measured anew, until one of them holds.

What is said of the search's plans was measured while it went on, and their latency is mostly a prediction. So the plan
that is delivered is measured again, as the file that will be delivered, in a process of its own. If none holds, the one
that missed the target least is cut a little more. If the one that holds leaves room, it is cut a little less.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from torch import nn

from graphprune import engines
from graphprune.counting import count
from graphprune.errors import StepError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.record import Record, Share
from graphprune.searching.deviation import Watched
from graphprune.searching.evaluation import Evaluator
from graphprune.searching.finalists import ranked, standard_error
from graphprune.searching.problem import Problem
from graphprune.searching.tightening import loosened, tightened
from graphprune.tasks.task import predict, top1

if TYPE_CHECKING:
    from graphprune.cutting.routes import Route
    from graphprune.searching.search import Session

FINALISTS = 8
"""Plans of the search that are verified at most, in the order of `finalists.ranked`, until one holds."""
TIGHTENED = (1.5, 2.5, 4.0)
"""Where none of them holds, the one that missed the target least is made cheaper by so many times what it missed."""
LOOSENED = (0.8, 0.4, 0.2)
"""Where one holds, it gets so much of the room that it leaves, one after the other, if it is the better for it."""
LEAST_ROOM = 0.01
"""Room that is worth a measurement, as a share of the target."""
STEPS = FINALISTS + len(TIGHTENED) + 1 + len(LOOSENED)
"""Plans that are verified at most."""
VERIFY_ROUNDS = 60
CLOSE_ROUNDS = 240
"""Rounds of a second measurement, where only the width of the first one's interval missed the target."""


@dataclass(frozen=True)
class Verified:
    """A plan as it would be delivered: `excess` is by how much the worst bound is missed (negative: all are kept)."""

    excess: float
    record: Record
    module: nn.Module
    route: "Route"

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return self.excess <= 0


@dataclass
class Verification:
    """Verifies the plans of one agent's problem. What was measured is kept in the study, so that it can go on."""

    session: "Session"
    problem: Problem
    evaluator: Evaluator
    agent: str
    seen: list[Verified] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self) -> Verified:
        """What is delivered: the first plan that holds, else the one that misses the target least."""
        self.session.progress("verify", 0, STEPS, self.agent)
        for record in self.finalists():
            found = self.attempt(record)
            if found is not None and found.holds:
                return self.loosened(self.judged(found))
        if not self.seen:
            raise StepError(f"no plan of {self.agent} could be verified: {self.failures[0]}")
        return self.judged(min(self.seen, key=lambda found: found.excess))

    @property
    def images(self) -> int:
        """Of which accuracies are shares, 0 where they are none."""
        return self.session.task.images if self.session.task.metric is top1 else 0

    def finalists(self) -> Iterator[Record]:
        """What to verify, one plan after another, while `seen` tells what became of those before."""
        session = self.session
        plans = ranked(self.problem.records, self.images)
        slowest, asked = inf, 0
        for record in plans:
            if asked < FINALISTS and self._may_hold(record, slowest):
                asked += 1
                yield record
                if self.seen:
                    slowest = self.seen[-1].record.predicted["latency"] - self.seen[-1].excess / 2
        if self.seen and "latency" in session.limits:
            nearest = min(self.seen, key=lambda found: found.excess)
            choices = session.choices(nearest.record.plan)
            for times in TIGHTENED:
                overrun = self.problem.overrun(choices) - times * nearest.excess / session.limits["latency"]
                cheaper = tightened(self.problem, choices, overrun)
                if cheaper is not None:
                    yield self.evaluator.blank(cheaper)
        yield min(plans, key=lambda record: record.predicted["latency"])

    def loosened(self, found: Verified) -> Verified:
        """A plan that is cut less than one that holds, where it holds too and is the better for it.

        By how much its predicted latency may grow is told by what was measured, however wrong predictions are.
        """
        for share in LOOSENED:
            room = -found.excess / self.session.limits.get("latency", inf)
            if room < LEAST_ROOM:
                break
            limit = found.record.predicted["latency"] * (1 + share * room)
            roomy = replace(self.problem, limits={**self.problem.limits, "latency": limit})
            longer = loosened(roomy, self.session.choices(found.record.plan), 1.0)
            other = None if longer is None else self.attempt(self.evaluator.blank(longer))
            if other is not None and other.holds and self._nearer(other := self.judged(other), found):
                found = other
        return found

    def attempt(self, record: Record) -> Verified | None:
        """A plan repaired and measured; None where that fails: whatever it does wrong, the next one may hold."""
        try:
            self.seen.append(self._verified(record))
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return None
        measured = self.seen[-1].record.measured
        note = f"{self.agent}: {measured.value:.3f} of dense latency" if measured else self.agent
        self.session.progress("verify", len(self.seen) + len(self.failures), STEPS, note)
        return self.seen[-1]

    def judged(self, found: Verified) -> Verified:
        """The same with the accuracy and the deviation of what would be delivered."""
        watched = Watched(partial(predict, found.module), self.session.bench.dense_outputs)
        judgement = self.session.task.judge(watched, 0.0)
        accuracy, off = judgement.accuracy, watched.deviation
        return replace(found, record=replace(found.record, accuracy=accuracy, deviation=off, images=0))

    def _nearer(self, other: Verified, found: Verified) -> bool:
        """Whether one plan's outputs are nearer to the dense model's, and not fewer of its answers right, by more than
        one standard error, as in `finalists.ranked`.
        """
        (accuracy, off), (reached, own) = (_figures(plan.record) for plan in (other, found))
        return off < own and accuracy >= reached - standard_error(reached, self.images)

    def _may_hold(self, record: Record, slowest: float) -> bool:
        """Whether a plan is worth being verified: by its measurement in the search or, without one, if it is predicted
        to be faster than what just missed the target, since that would miss it too.
        """
        if record.measured is not None and "latency" in self.session.limits:
            return record.measured.value <= self.session.limits["latency"]
        return record.predicted["latency"] <= slowest

    def _verified(self, record: Record) -> Verified:
        """A plan, finely repaired, with a new measurement."""
        session = self.session
        cuts = session.candidates.cuts(session.choices(record.plan))
        bench = session.finer.settled(cuts)
        pruned = bench.build(cuts)
        counts = count(pruned, session.task.example_inputs)
        checked = replace(
            record, measured=session.study.verified(record.plan), flops=counts.flops, params=counts.params
        )
        if checked.measured is None:
            exported = onnx_bytes(pruned, session.task.example_inputs)  # what will be delivered
            checked = replace(checked, measured=self._measured(exported))
            session.study.keep_verified(checked)
        excess = max(session.excess(checked).values())
        return Verified(excess, replace(checked, feasible=excess <= 0), pruned, bench.route)

    def _measured(self, exported: bytes) -> Share:
        """The latency share of a file, with an interval that is narrow enough to decide."""
        fresh = engines.settings_of(self.session.stopwatch.engine) is not None
        measured = self.evaluator.stopwatch.share(exported, VERIFY_ROUNDS, fresh)
        if measured.value <= self.session.limits.get("latency", 0.0) < measured.high:
            measured = self.evaluator.stopwatch.share(exported, CLOSE_ROUNDS, fresh)
        return measured


def _figures(record: Record) -> tuple[float, float]:
    """Accuracy and deviation of a plan that was judged."""
    assert record.accuracy is not None
    assert record.deviation is not None
    return record.accuracy, record.deviation
