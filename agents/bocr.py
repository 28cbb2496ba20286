"""BOCR: Bayesian optimisation of few variables, one for each cluster of sites, then of one variable for each site.

Fan, Mu and Zhang, ECCV 2022, arXiv 2109.10591. From the paper: sites clustered by the distribution of their units'
importance (`clusters`); one ratio per cluster; a Gaussian process with expected improvement, Optuna's, after ten Sobol
points; what it learns are the ratios that were executed, not those that were asked for; rollback at half of the trials,
or from two fifths of them on once the last tenth brought nothing better (trials 100, 80 and 20 of 200), to one variable
per site, where the process starts with all executed ratios and looks within the bounds of the ten best feasible plans.
Gradual rollback (`bocr-gradual`) goes through a middle cut of the same dendrogram. `bo` is the same search without
clusters.

`optuna.samplers.GPSampler` (5.0) has a Matern kernel of order 5/2 with a length scale per variable, hyperparameters at
their maximum a posteriori, a fitted noise, and maximises the *logarithm* of expected improvement (Ament et al. 2023,
arXiv 2310.20708) from 2048 quasi-random points and ten local searches.

Ours: ratios pick options on the sites' (cost, error) fronts under the action wall; a cluster's executed ratio is the
mean over its sites; a plan that was evaluated before is varied until it is new, and clusters that offer nothing new
roll back at once; bounds reach to the next option on both sides, because what ten plans agree in would otherwise be
settled for good, and stay [0, 1] where fewer than ten plans are feasible. The middle cut has as many clusters as the
geometric mean of the first cut and the sites (the paper's are 3, then 9, then all for ResNet-56, which has 27 blocks)
and rolls back by the same rule at three quarters of the trials.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats.qmc import Sobol

from graphprune.agents.clusters import Dendrogram, Labels
from graphprune.agents.fronts import Fronts
from graphprune.agents.policies import reproducible
from graphprune.agents.wall import only_plan
from graphprune.errors import StepError
from graphprune.searching.environment import reward
from graphprune.searching.problem import Choices, Floats, Problem
from graphprune.searching.storage import one_line

POINTS = 10
"""Sobol points before the first proposal; with few trials a quarter of them."""
CLUSTERS = 3
"""In the first cut."""
DEADLINES = (0.5, 0.75)
"""At which shares of the trials the first and the middle cut roll back at the latest."""
LEEWAY = 0.1
"""So much earlier, as a share of the trials, a cut may roll back if it stalls."""
STALL = 0.1
"""The share of the trials that must go by without a better plan to count as a stall."""
BEST = 10
"""How many feasible plans give the bounds."""
WIDTHS = (0.0, *np.linspace(0.01, 1.0, 100).tolist())
"""Deviations of the noise that is added to a proposal until its plan is new."""
RATIO = FloatDistribution(0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Sample:
    """An evaluated plan: the ratios [sites] that were executed, its reward, and whether it met the target."""

    executed: Floats
    value: float
    feasible: bool


@dataclass(frozen=True, eq=False)
class Box:
    """Bounds of the variables: `low` and `high` [variables]."""

    low: Floats
    high: Floats


def averages(executed: Floats, labels: Labels) -> Floats:
    """The mean ratio of each cluster [variables], from ratios [sites]."""
    return np.array([executed[labels == label].mean() for label in range(labels.max() + 1)])


def rolls_back(values: Sequence[float], trials: int, deadline: float) -> bool:
    """Whether a cut that ends at a share `deadline` of the trials is left after the rewards `values` [trials done]."""
    done, window = len(values), max(1, round(STALL * trials))
    stalled = done > window and max(values[-window:]) <= max(values[:-window])
    return done >= deadline * trials or (stalled and done >= (deadline - LEEWAY) * trials)


def bounds(samples: Iterable[Sample], fronts: Fronts) -> Box:
    """The best feasible samples' ratios at each site, with the options next to them; [0, 1] if they are too few."""
    feasible = sorted((sample for sample in samples if sample.feasible), key=lambda sample: -sample.value)
    if len(feasible) < BEST:
        return Box(np.zeros(len(fronts.ratios)), np.ones(len(fronts.ratios)))
    executed = np.stack([sample.executed for sample in feasible[:BEST]])
    low, high = executed.min(axis=0), executed.max(axis=0)
    for site, ratios in enumerate(fronts.ratios):
        places = np.unique(ratios[~np.isnan(ratios)])
        low[site] = places[max(np.searchsorted(places, low[site]) - 1, 0)]
        high[site] = places[min(np.searchsorted(places, high[site], side="right"), len(places) - 1)]
    return Box(low, high)


class BoxedSampler(GPSampler):  # type: ignore[misc]
    """Optuna's Gaussian process; it learns from points anywhere in the unit cube but proposes inside a box only."""

    def __init__(self, box: Box, seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=1)
        edges = enumerate(zip(box.low.tolist(), box.high.tolist(), strict=True))
        self.space = {str(number): FloatDistribution(low, high) for number, (low, high) in edges if low < high}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, FloatDistribution]:
        """The box, not what the trials so far have in common."""
        return self.space


class Process:
    """A Gaussian process over ratios [variables] that proposes where improvement is most to be expected."""

    def __init__(self, box: Box, rng: np.random.Generator) -> None:
        self.box = box
        self.rng = rng
        with one_line("Optuna cannot begin a search", StepError):
            self.sampler = BoxedSampler(box, int(rng.integers(2**31)))
            self.study = optuna.create_study(direction="maximize", sampler=self.sampler)

    def tell(self, point: Floats, value: float) -> None:
        """Learn the value of a point."""
        ratios = {str(number): ratio for number, ratio in enumerate(point.tolist())}
        self.study.add_trial(create_trial(params=ratios, distributions=dict.fromkeys(ratios, RATIO), value=value))

    def ask(self) -> Floats:
        """The next point. The trial that asks is told to have failed, so that only executed points are learnt from."""
        with reproducible(self.rng), one_line("Optuna cannot propose ratios", StepError):
            trial = self.study.ask(dict.fromkeys(self.sampler.space, RATIO))
            self.study.tell(trial, state=TrialState.FAIL)
        return np.array([trial.params.get(str(number), low) for number, low in enumerate(self.box.low.tolist())])


class BayesianOptimisation:
    """One variable for each site from the first trial on."""

    name = "bo"

    def clusters(self, sites: int) -> tuple[int, ...]:
        """How many clusters there are before each rollback."""
        return ()

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search until the trials are spent or no new plan turns up."""
        if (plan := only_plan(problem)) is not None:
            problem.evaluate(plan)
            return
        sites = len(problem.decisions)
        tree = Dendrogram.of(problem.decisions)
        cuts = [*(tree.cut(clusters) for clusters in self.clusters(sites)), np.arange(sites)]
        search = Search(problem, rng)
        search.scatter(cuts[0])
        for number, (labels, deadline) in enumerate(zip(cuts, [*DEADLINES[: len(cuts) - 1], inf], strict=True)):
            box = bounds(search.samples.values() if number else (), search.fronts)
            search.optimise(labels, box, deadline)


class BOCR(BayesianOptimisation):
    """One variable for each of a few clusters, then directly one for each site."""

    name = "bocr"

    def clusters(self, sites: int) -> tuple[int, ...]:
        """The first cut."""
        return (CLUSTERS,)


class GradualBOCR(BayesianOptimisation):
    """One variable for each of a few clusters, then for each of more clusters, then for each site."""

    name = "bocr-gradual"

    def clusters(self, sites: int) -> tuple[int, ...]:
        """The first cut and the middle one."""
        return CLUSTERS, max(CLUSTERS, round((CLUSTERS * sites) ** 0.5))


class Search:
    """One run: the plans that were evaluated, in their order."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem = problem
        self.rng = rng
        self.fronts = Fronts(problem)
        self.samples: dict[Choices, Sample] = {}

    @property
    def values(self) -> list[float]:
        """The rewards so far."""
        return [sample.value for sample in self.samples.values()]

    def scatter(self, labels: Labels) -> None:
        """Evaluate the first Sobol points, of one ratio for each cluster."""
        count = min(POINTS, max(2, self.problem.trials // 4))
        sequence = Sobol(int(labels.max()) + 1, seed=int(self.rng.integers(2**31)))
        for point in sequence.random_base2((POINTS - 1).bit_length())[:count]:
            self.evaluate(point, labels)

    def optimise(self, labels: Labels, box: Box, deadline: float) -> None:
        """Let a Gaussian process choose a ratio for each cluster within a box [sites] until it is time to roll back."""
        process = Process(Box(averages(box.low, labels), averages(box.high, labels)), self.rng)
        for sample in self.samples.values():
            process.tell(averages(sample.executed, labels), sample.value)
        while self.problem.remaining and not rolls_back(self.values, self.problem.trials, deadline):
            new = self.evaluate(process.ask(), labels)
            if new is None:
                return
            process.tell(averages(new.executed, labels), new.value)

    def evaluate(self, point: Floats, labels: Labels) -> Sample | None:
        """Evaluate a new plan at a point [variables] or, where that is known, near it; None if none turns up."""
        for width in WIDTHS:
            ratios = np.clip(point + width * self.rng.normal(size=len(point)), 0.0, 1.0)
            plan = self.fronts.plan(ratios[labels].tolist())
            if plan not in self.samples:
                value = reward(self.problem, record := self.problem.evaluate(plan), plan)
                self.samples[plan] = Sample(self.fronts.executed(plan), value, record.rank[0])
                return self.samples[plan]
        return None
