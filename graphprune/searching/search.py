"""One search, end to end: trace, profile, calibrate, let the agent choose, and verify what it found."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from graphprune import models
from graphprune.counting import count
from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from graphprune.cutting.surgery import remember
from graphprune.engines.base import Engine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError, StepError, TargetError
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.pattern import Pattern
from graphprune.plan import Plan
from graphprune.record import Record
from graphprune.registry import agent as create_agent
from graphprune.registry import chosen_patterns
from graphprune.repairing.repair import FINE, make_reference
from graphprune.repairing.sensitivity import calibrated
from graphprune.result import Result
from graphprune.searching.candidates import Candidates
from graphprune.searching.evaluation import Evaluator, Workbench
from graphprune.searching.past import PROBLEM
from graphprune.searching.probing import PROBE_SEED, corrected, likely_plans, saving_factor
from graphprune.searching.problem import BudgetSpent, Choices, Decision, Problem, Sum
from graphprune.searching.problem_file import pack
from graphprune.searching.study import Study, label
from graphprune.searching.verification import Verification, Verified
from graphprune.searching.views import graph_view
from graphprune.target import Target
from graphprune.tasks.task import Task
from graphprune.timing.measure import share
from graphprune.timing.profile import Profile
from graphprune.timing.quiet import Stopwatch

if TYPE_CHECKING:
    from graphprune.agents.base import Agent

Progress = Callable[[str, int, int, str], None]
"""Called with the stage, the steps done, their number, and a note such as the best result so far."""
MARGIN = 0.96
"""The search aims a little below the latency target, so that the verified upper bound still meets it."""


def _quiet(stage: str, done: int, total: int, note: str) -> None:
    """No progress is shown."""


def search(  # noqa: PLR0913 - the public entry: what is searched, for what, by whom, and where it is kept
    model: nn.Module | str,
    task: Task,
    target: Target,
    agent: "str | Agent" = "autosculpt",
    trials: int = 200,
    seed: int = 0,
    *,
    engine: Engine | None = None,
    study: str | Path | None = None,
    rivals: Sequence[str] = (),
    patterns: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Find the most accurate pruned model that meets the target, with at most `trials` evaluations by each agent.

    `model` is a module or a spec string; `agent` a name, or an agent of your own (one with a loaded policy, say).
    `engine` (ONNX Runtime, one thread) is what latency means. `study` is an SQLite file or a storage URL: a killed
    search that is started again with the same arguments goes on where it was. `rivals` names agents that get the same
    problem for comparison, `patterns` those that may be used; None is all that may gain on the engine. Never
    fine-tunes. Raises InputError for input that cannot be used, TargetError, with the best that can be reached, where
    no plan meets the target.
    """
    if trials < 1:
        raise InputError(f"a search needs at least one trial, not {trials}")
    searcher = create_agent(agent) if isinstance(agent, str) else agent
    others = [create_agent(name) for name in rivals]
    engine = engine or OnnxRuntimeEngine()
    allowed = chosen_patterns(patterns, engine)
    spec, module = (model, models.create(model)) if isinstance(model, str) else ("", model)
    session = Session.prepare(module, task, target, engine, allowed, study, progress or _quiet)
    problem = session.solve(searcher, trials, seed)
    result = session.verify(problem, searcher.name, seed)
    records = {one.name: session.verify(session.solve(one, trials, seed), one.name, seed).record for one in others}
    return replace(result, spec=spec, rivals=records, study="" if study is None else str(study))


@dataclass
class Session:
    """Everything that the agents of one search share."""

    module: nn.Module
    graph: ModelGraph
    task: Task
    target: Target
    candidates: Candidates
    bench: Workbench
    costs: dict[str, Sum]
    limits: dict[str, float]
    error: Sum
    study: Study
    dense: Record
    stopwatch: Stopwatch
    progress: Progress

    @classmethod
    def prepare(
        cls, module: nn.Module, task: Task, target: Target, engine: Engine, allowed: Sequence[Pattern],
        study: str | Path | None, progress: Progress,
    ) -> "Session":  # fmt: skip
        """Trace, profile, calibrate, and build the tables."""
        progress("trace", 0, 1, "")
        graph = remember(module, trace(module, task.example_inputs))
        task = task.with_reference(module).shuffled()
        counts = count(module, task.example_inputs)
        dense_onnx = onnx_bytes(module, task.example_inputs)
        timing = engine.measure([dense_onnx])[0]
        if timing.error is not None:
            raise StepError(f"the dense model does not run: {timing.error}")
        stopwatch = Stopwatch(engine, dense_onnx, timing.median)
        dense = Record(
            Plan(graph.signature, (), graph.inputs), _dense_accuracy(module, task), predicted={"latency": 1.0},
            measured=share(timing, timing, engine.identity), flops=counts.flops, params=counts.params,
            environment=environment(),
        )  # fmt: skip
        progress("trace", 1, 1, f"{len(graph.nodes)} operators, {len(graph.all_sites)} sites")
        statistics = calibrated(graph, task.calibration, partial(progress, "calibrate"))
        stopwatch.look()
        profile = Profile(engine)
        candidates = Candidates(graph, profile, allowed, statistics)
        candidates.collect(lambda done, total: progress("profile", done, total, "operators"))
        stopwatch.look()
        costs = {
            "latency": latency_cost(candidates),
            "flops": candidates.cost(lambda operator: operator.flops, counts.flops),
            "params": candidates.cost(lambda operator: operator.parameters, counts.params),
        }
        limits = target.shares({"latency": stopwatch.fastest, "flops": counts.flops, "params": counts.params})
        bench = Workbench(module, graph, make_reference(graph, task.calibration), task)
        store = Study.open(study, _study_name(module, graph, task, engine), _labels(graph, profile))
        session = cls(
            module, graph, task, target, candidates, bench, costs, limits, candidates.error(), store,
            dense, stopwatch, progress,
        )  # fmt: skip
        session.bench.probe(candidates.cuts(session.problem(1, session._aims()).completions[0]))
        session._correct_latency()
        session._check_reachable()
        store.attach(PROBLEM, pack(session.problem(1, session._aims())))
        return session

    # --- the problem ---------------------------------------------------------------------------------------------

    def problem(self, trials: int, limits: dict[str, float]) -> Problem:
        """The problem that agents get, without an evaluator yet."""
        graph, profile = self.graph, self.candidates.profile
        nodes = {node.name: number for number, node in enumerate(graph.nodes)}
        total = _seconds(profile, graph)
        latency = {layer.node: profile.seconds(layer.operator) / total for layer in graph.layers} if total else {}
        decisions = self.candidates.decisions(self.error, nodes)
        return Problem(
            decisions, graph_view(graph, latency, self._curves(decisions)),
            {name: self.costs[name] for name in limits}, limits, self.error, _no_evaluator, trials,
            graph.signature, graph.inputs,
        )  # fmt: skip

    def _curves(self, decisions: Sequence[Decision]) -> dict[str, list[float]]:
        """The error of each site's options at its node, as five quantiles."""
        return {
            site.node: np.quantile([option.error for option in decision.options], [0, 0.25, 0.5, 0.75, 1]).tolist()
            for site, decision in zip(self.candidates.sites, decisions, strict=True)
        }

    def _aims(self) -> dict[str, float]:
        return {name: limit * (MARGIN if name == "latency" else 1.0) for name, limit in self.limits.items()}

    def _check_reachable(self) -> None:
        problem = self.problem(1, self._aims())
        if not problem.feasible(problem.cheapest):
            reach = ", ".join(f"{name} {cost(problem.cheapest):.2f}" for name, cost in problem.costs.items())
            asked = ", ".join(f"{name} {limit:.2f}" for name, limit in self.limits.items())
            raise TargetError(f"no plan meets {asked} of the dense model; the best that can be reached is {reach}")

    def _correct_latency(self) -> None:
        """Scale what the layers save by what a few likely plans really save.

        Their times are compared with the dense model's of the same moment, so it does not matter when the profile was
        made.
        """
        if "latency" not in self.limits or not self.candidates.sites:
            return
        problem = self.problem(1, self._aims())
        evaluator, pairs = self._evaluator(problem, "probe", 0), []
        plans = likely_plans(problem, np.random.default_rng(PROBE_SEED))
        for number, choices in enumerate(plans, 1):
            measured = evaluator.probe(choices).measured
            if measured is not None:
                pairs.append((self.costs["latency"](choices), measured.value))
            self.progress("profile", number, len(plans), "whole models")
        self.costs["latency"] = corrected(self.costs["latency"], saving_factor(pairs))

    def _evaluator(self, problem: Problem, agent: str, seed: int) -> Evaluator:
        return Evaluator(
            self.bench, self.candidates, self.costs, self.limits, self.stopwatch, self.study, problem.plan, agent, seed
        )  # fmt: skip

    @cached_property
    def finer(self) -> Workbench:
        """A bench that repairs with more effort than a search can spend on each candidate."""
        return replace(self.bench, reference=make_reference(self.graph, self.task.calibration, FINE))

    # --- search and verification -----------------------------------------------------------------------------------

    def pose(self, agent: str, trials: int, seed: int) -> Problem:
        """The problem with its evaluator, for an agent of this name."""
        problem = self.problem(trials, self._aims())
        evaluator = self._evaluator(problem, agent, seed)
        evaluator.listener = lambda record: self._report(problem, agent)
        problem.evaluator = evaluator
        self.progress("search", 0, trials, agent)
        return problem

    def solve(self, agent: "Agent", trials: int, seed: int) -> Problem:
        """Run one agent; its records are in the problem."""
        problem = self.pose(agent.name, trials, seed)
        with suppress(BudgetSpent):
            agent.run(problem, np.random.default_rng(seed))
        if not any(record.accuracy is not None for record in problem.records):
            reasons = sorted({record.error for record in problem.records if record.error}) or ["none was tried"]
            raise StepError(f"no candidate of {agent.name} could be evaluated: {'; '.join(reasons)}")
        return problem

    def _report(self, problem: Problem, agent: str) -> None:
        best = max((r for r in problem.records), key=lambda record: record.rank, default=None)
        note = agent
        if best is not None and best.accuracy is not None and best.feasible:
            at = best.measured.value if best.measured else best.predicted["latency"]
            note = f"{agent}: best {best.accuracy:.1%} at {at:.2f} of dense latency"
        self.progress("search", len(problem.records) + 1, problem.trials, note)

    def verify(self, problem: Problem, agent: str, seed: int) -> Result:
        """Measure the best plans again, in a fresh process if the engine allows it; take the first that holds."""
        found = Verification(self, problem, self._evaluator(problem, agent, seed), agent).run()
        return Result(
            found.module, self.module, self.graph, found.record.plan, found.record, self.dense, self.target,
            records=tuple(problem.records), met=found.holds, notes=tuple(self._notes(found)), searched=found.record,
        )  # fmt: skip

    def excess(self, record: Record) -> dict[str, float]:
        """By how much each bound is missed (negative: kept), latency by the upper end of its interval."""
        assert record.measured is not None
        have = {
            "latency": record.measured.high,
            "flops": record.flops / max(self.dense.flops, 1),
            "params": record.params / max(self.dense.params, 1),
        }
        return {name: have[name] - limit for name, limit in self.limits.items()}

    def choices(self, plan: Plan) -> Choices:
        """The choice vector of a plan."""
        chosen = {choice.site: choice for choice in plan.choices}
        vector = []
        for site in self.candidates.sites:
            choice = chosen.get(site.name)
            drafts = self.candidates.drafts[site.name]
            vector.append(
                next(n for n, d in enumerate(drafts) if (d.pattern, d.keep) == (choice.pattern, choice.keep))
                if choice
                else 0
            )
        return tuple(vector)

    def _notes(self, found: Verified) -> list[str]:
        notes, record, route = [], found.record, found.route
        if not found.holds:
            missed = self.excess(record)
            worst = max(missed, key=lambda name: missed[name])
            notes.append(f"the target was missed: {worst} is {missed[worst]:.3f} above its limit")
        if record.measured is not None and record.measured.high >= 1:
            notes.append("the pruned model is not measurably faster than the dense one")
        if not route.own_class:
            notes.append("sizes are written in the module's code: the result is the exported graph, not your class")
        if route.parts:
            paths = [part.path for part in route.parts]
            notes.append(f"sizes are written in their code, so these modules are exported graphs: {', '.join(paths)}")
        return notes


def _seconds(profile: Profile, graph: ModelGraph) -> float:
    """The time of all layers that the engine can time alone."""
    return sum(time for layer in graph.layers if isfinite(time := profile.seconds(layer.operator)))


def _dense_accuracy(module: nn.Module, task: Task) -> float:
    """The accuracy to hold on to; outputs or a metric that are NaN are the caller's input, not a failure of ours."""
    try:
        return task.accuracy(module)
    except StepError as error:
        raise InputError(f"the dense model cannot be judged: {error}") from None


def _no_evaluator(choices: Choices) -> Record:
    raise StepError("this problem is not to be evaluated")


def latency_cost(candidates: Candidates) -> Sum:
    """The predicted latency share: the sum of the layers' times."""
    return candidates.cost(candidates.profile.seconds, _seconds(candidates.profile, candidates.graph))


def _labels(graph: ModelGraph, profile: Profile) -> dict[str, list[str]]:
    """What any pattern of the engine could do at each site, chosen for this search or not.

    A plan is a plan, so searches with other patterns share the study, and its columns are fixed when it is made.
    """
    options = {
        site.name: [
            label(pattern.name, level.name)
            for pattern in chosen_patterns(None, profile.engine)
            if site.kind in pattern.kinds
            for level in pattern.levels(site, profile.block)
        ]
        for site in graph.all_sites
    }
    return {site: labels for site, labels in options.items() if labels}


def _study_name(module: nn.Module, graph: ModelGraph, task: Task, engine: Engine) -> str:
    """Names what a stored accuracy and latency belong to: the model, its weights, the data with labels, the engine."""
    digest = hashlib.sha256(f"{graph.signature} {engine.identity}".encode())
    judged = (tensor for batch in task.validation for tensor in batch if tensor is not None)
    for tensor in (*module.state_dict().values(), *judged, *task.calibration):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{type(module).__name__} {task.name} {digest.hexdigest()[:12]}"
