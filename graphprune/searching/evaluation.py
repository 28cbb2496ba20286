"""From a choice vector to a record: cut, repair, judge, and measure what would become the best."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import inf
from typing import Self

from torch import Tensor, nn

from graphprune.counting import count
from graphprune.coupling.graph import Branch, ModelGraph
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.parts import holds_node
from graphprune.cutting.routes import Route
from graphprune.cutting.surgery import cut_along, perform
from graphprune.errors import StepError
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.onnx_files.surgery import OnnxSurgeon
from graphprune.plan import Plan
from graphprune.record import Record
from graphprune.repairing.repair import Reference, repair
from graphprune.searching.candidates import Candidates
from graphprune.searching.deviation import Watched, first_outputs
from graphprune.searching.judging import Asking
from graphprune.searching.problem import Choices, Sum
from graphprune.searching.study import Study
from graphprune.tasks.sequential import Bar, hopeless
from graphprune.tasks.task import Answers, Task, predict
from graphprune.timing.quiet import Stopwatch

Listener = Callable[[Record], None]


@dataclass
class Workbench:
    """Cuts and repairs copies of one dense model. The route of surgery is found once and checked there."""

    model: nn.Module
    graph: ModelGraph
    reference: Reference
    task: Task
    route: Route = field(default_factory=Route)
    widest: Cuts = field(default_factory=Cuts)
    """A cut that touches everything that candidates may touch."""

    def probe(self, cuts: Cuts) -> None:
        """Find how this model is cut, by a cut that touches everything that candidates may touch.

        Branches are dropped apart from the other cuts, since those inside them would not show.
        """
        self.widest = cuts
        self.route = perform(self.model, self.graph, replace(cuts, dropped=())).route
        if cuts.dropped and not self._may_drop(cuts.dropped):
            self.route = Route(own_class=False)

    def _may_drop(self, branches: tuple[Branch, ...]) -> bool:
        """Whether these branches can go along the route: none of them ends within a module that becomes a graph."""
        sums = [branch.node for branch in branches]
        whole = not any(holds_node(self.graph, part.path, sums) for part in self.route.parts)
        return whole and perform(self.model, self.graph, Cuts(dropped=branches)).own_class

    def settled(self, cuts: Cuts) -> Self:
        """A bench for these cuts alone, whose route leaves every module as it is that they do not need as a graph."""
        route = perform(self.model, self.graph, cuts).route
        return replace(self, route=route) if route.own_class else self

    def cut(self, cuts: Cuts) -> nn.Module:
        """A cut copy with the sliced weights."""
        return cut_along(self.model, self.graph, cuts, self.route)

    def build(self, cuts: Cuts) -> nn.Module:
        """A cut, repaired copy in evaluation mode."""
        pruned = self.cut(cuts)
        repair(pruned, self.model, self.graph, cuts, self.reference)
        return pruned.eval()

    def file(self, pruned: nn.Module, cuts: Cuts) -> bytes | None:
        """A candidate as ONNX, cut out of the dense graph; None where that cannot be done."""
        with suppress(StepError):
            if self.surgeon is not None:
                return self.surgeon.cut(cuts, pruned.state_dict())
        return None

    def answers(self, pruned: nn.Module, file: bytes | None) -> Answers:
        """What asks a candidate: its file where there is one, else the module itself, on its device."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in pruned.parameters())
        return self.asking.answers(file) if file is not None and on_cpu else partial(predict, pruned)

    @cached_property
    def dense_outputs(self) -> tuple[Tensor, ...]:
        """What the dense model answers to the first validation batches."""
        return first_outputs(partial(predict, self.model), [inputs for inputs, _ in self.task.validation])

    @cached_property
    def asking(self) -> Asking:
        """How files are asked, found once on the dense model."""
        assert self.surgeon is not None
        return Asking.fastest(self.surgeon.cut(Cuts()), self.surgeon.input_name, self.task.validation[0][0])

    @cached_property
    def surgeon(self) -> OnnxSurgeon | None:
        """What cuts the dense ONNX graph, made once; None where its cuts are not those of the module."""
        try:
            surgeon = OnnxSurgeon(self.graph)
            for cuts in (replace(self.widest, dropped=()), self.widest):  # what goes with a branch would not show
                surgeon.check(cuts)
        except StepError:
            return None
        return surgeon


@dataclass
class Evaluator:
    """Judges choice vectors. Failure is a value; identical plans are served from the study.

    `costs` predict shares of the dense model, `limits` bound them. A record is feasible when the prediction, and the
    measured latency where there is one, keep to the limits.
    """

    bench: Workbench
    candidates: Candidates
    costs: Mapping[str, Sum]
    limits: Mapping[str, float]
    stopwatch: Stopwatch
    study: Study
    plan_of: Callable[[Choices], Plan]
    agent: str
    seed: int
    listener: Listener | None = None
    best: float = field(default=-1.0)
    bar: Bar = field(default_factory=Bar)

    def __call__(self, choices: Choices) -> Record:
        """The record of a choice vector, new or from the study."""
        plan = self.plan_of(choices)
        record = self.study.find(plan, self.agent, self.seed)
        if record is None or self._deserves_more(record):
            record = self._judge(choices)
            self.study.add(record)
        record = replace(record, feasible=self._feasible(record), agent=self.agent, seed=self.seed)
        if record.feasible and record.accuracy is not None and not record.images:
            self.best = max(self.best, record.accuracy)
            self.bar.raise_by(record.accuracy)
        if self.listener is not None:
            self.listener(record)
        return record

    def probe(self, choices: Choices) -> Record:
        """A record with a measured latency, whatever its accuracy (it is judged on the first images only), or an error.

        A stored one makes a resumed search go the same way.
        """
        plan = self.plan_of(choices)
        record = self.study.find(plan, self.agent, self.seed)
        if record is None or (record.measured is None and record.error is None):
            record = self._judge(choices, always=True)
            self.study.add(record)
        return record

    def _deserves_more(self, record: Record) -> bool:
        """Whether a candidate that was given up might be among the best by now, since another agent set another bar,
        or was judged by a version that did not compare outputs.
        """
        if not record.compared:
            return True
        if record.accuracy is None or not record.images:
            return False
        correct = round(record.accuracy * record.images)
        return not hopeless(correct, record.images, self.bench.task.images, self.bar.height)

    def _judge(self, choices: Choices, always: bool = False) -> Record:
        start, blank = time.perf_counter(), self.blank(choices)
        try:
            record = self._evaluate(blank, choices, always)
        except Exception as error:  # whatever a candidate does wrong, the search goes on
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            record = replace(blank, error=f"{type(error).__name__}: {text}")
        record = replace(record, seconds=time.perf_counter() - start)
        return replace(record, feasible=self._feasible(record))

    def _evaluate(self, blank: Record, choices: Choices, always: bool) -> Record:
        cuts = self.candidates.cuts(choices)
        pruned = self.bench.build(cuts)
        counts = count(pruned, self.bench.task.example_inputs)
        file = self.bench.file(pruned, cuts)
        watched = Watched(self.bench.answers(pruned, file), self.bench.dense_outputs)
        found = self.bench.task.judge(watched, inf if always else self.bar.height)
        images = 0 if found.complete else found.images
        record = replace(
            blank, accuracy=found.accuracy, deviation=watched.deviation, images=images, flops=counts.flops,
            params=counts.params,
        )  # fmt: skip
        if always or (found.complete and found.accuracy > self.best and self._feasible(record)):
            exported = file or onnx_bytes(pruned, self.bench.task.example_inputs)
            record = replace(record, measured=self.stopwatch.share(exported))
        return record

    def blank(self, choices: Choices) -> Record:
        """What is known of a choice vector before it is judged: what it is predicted to cost, as shares of the dense
        model.
        """
        predicted = {name: cost(choices) for name, cost in self.costs.items()}
        plan = self.plan_of(choices)
        return Record(plan, predicted=predicted, agent=self.agent, seed=self.seed, environment=environment())

    def _feasible(self, record: Record) -> bool:
        if record.error is not None or record.accuracy is None:
            return False
        shares = dict(record.predicted)
        if record.measured is not None:
            shares["latency"] = record.measured.value
        return all(shares[name] <= limit * (1 + 1e-9) for name, limit in self.limits.items())
