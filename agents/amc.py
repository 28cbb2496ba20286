"""AMC: deep deterministic policy gradients choose a ratio for each site, in order, and the wall keeps the budget.

He et al. 2018, ECCV, arXiv 1802.03494. From the paper: DDPG over an embedding of the layer that is next, one ratio per
layer, bounded so that the budget stays in reach, the executed ratio in the replay memory; the reward of the finished
plan is given to each of its steps, less a moving average, and gamma is 1; random ratios first, then truncated normal
noise around the actor's answer that decays exponentially. Ours: an answer is a place between the bounds of the wall
(`graphprune.agents.ratios` says why), it picks the nearest option of a site's (cost, error) front, the actor's
gradients are inverted at its bounds (`graphprune.agents.bounded`), what the warm-up taught is learned at once when it
ends, and what is drawn is drawn anew, with more noise, where it was evaluated before.

`History` adds what Mu et al. 2021 (arXiv 2107.08815) take from earlier runs: see `graphprune.agents.history`.
"""

from collections.abc import Iterator
from math import inf

import numpy as np

from graphprune.agents.belief import Belief, promise
from graphprune.agents.ddpg import Episode, RatioPolicy
from graphprune.agents.history import PROBATION, others, practise, replay, worse
from graphprune.agents.policies import Learner, adopt
from graphprune.agents.ratios import RatioEpisodes, Vectors, walk
from graphprune.agents.wall import only_plan
from graphprune.searching.environment import reward
from graphprune.searching.past import History, read_past
from graphprune.searching.problem import Choices, Floats, Problem

DRAWS = 16
"""Plans that the policy draws for one trial."""
WARM_UP = 0.2
"""The share of the trials that is spent on random ratios."""
NOISE = (0.5, 0.15, 0.05)
"""Deviations of the noise: after the warm-up (AMC's), of a policy that was taught before, and at the last trial."""
WIDENINGS = 5
"""How often the noise is doubled, before it is uniform, where every plan drawn was evaluated before."""
UPDATES = 8
"""Gradient steps for each trial."""


class Amc(Learner):
    """Ratios by DDPG; `history` says what it takes from earlier searches, which are read at once.

    `load_policy` before `run` starts from the weights of an earlier run, on any model. Raises InputError if the study
    of earlier searches cannot be used.
    """

    name = "amc"

    def __init__(self, history: History = History()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.history = history
        self._pasts = () if history.study is None else read_past(history.study)

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search until the trials are spent or no new plan turns up."""
        if (plan := only_plan(problem)) is not None:
            problem.evaluate(plan)
            return
        search = Search(problem, rng, Belief(problem) if self.history.assistant else None)
        try:
            search.spend(self._taught(search.policy, problem, rng))
        finally:
            self._weights = search.policy.weights()

    def _taught(self, policy: RatioPolicy, problem: Problem, rng: np.random.Generator) -> bool:
        """Teach a policy all that is known before the first trial; whether that is anything."""
        if self._weights is not None:
            adopt(policy.ddpg.policy, self._weights)
        if self._pasts:
            pasts = others(self._pasts, problem)
            if self.history.augment:
                practise(policy, pasts, rng)
            if self.history.transfer:
                replay(policy, pasts)
        return self._weights is not None or bool(self._pasts)


class Search:
    """One run: a policy, perhaps an assistant, and what the plans tried so far were worth."""

    def __init__(self, problem: Problem, rng: np.random.Generator, assistant: Belief | None = None) -> None:
        self.problem = problem
        self.assistant = assistant
        self.rewards: dict[Choices, float] = {}
        self.lessons: list[Episode] = []
        self.episodes = RatioEpisodes(problem, DRAWS, self.judge)
        self.policy = RatioPolicy(self.episodes, rng)
        self.fell_back = False

    def judge(self, plans: Vectors) -> Floats:
        """What drawn plans [N, sites] promise, by the assistant; without one they are all alike."""
        return np.zeros(len(plans)) if self.assistant is None else promise(self.assistant, plans)

    def spend(self, taught: bool = False) -> None:
        """Spend the trials, until none is left or no new plan turns up; a taught policy begins on probation."""
        for noise in self._noises(taught):
            if not self.problem.remaining or not self._try(noise):
                return

    def _noises(self, taught: bool) -> Iterator[float]:
        """The noise of one trial after another; between trials the policy learns."""
        if taught:
            yield from self._probation()
        if not taught or self.fell_back:
            while len(self.lessons) < WARM_UP * self.problem.trials:
                yield inf
            self.policy.train(UPDATES * len(self.lessons))
        first, left = NOISE[int(taught and not self.fell_back)], self.problem.remaining
        for step in range(left):
            yield first * (NOISE[2] / first) ** (step / left)
            self.policy.train(UPDATES)

    def _probation(self) -> Iterator[float]:
        """Turns of a taught policy and of random ratios, until it is found worse, and given up, or has passed."""
        for _ in range(min(PROBATION, 1 + self.problem.trials // 8)):
            yield from (NOISE[1], inf)
            values = [lesson.value for lesson in self.lessons]
            if worse(values[::2], values[1::2]):
                self._fall_back()
                return

    def _fall_back(self) -> None:
        """Go on with fresh weights, from the random plans alone."""
        self.fell_back = True
        self.policy.restart()
        self.policy.replay.reset()
        lessons, self.lessons = self.lessons[1::2], []
        for lesson in lessons:
            self._learn(lesson)

    def _try(self, noise: float) -> bool:
        """Evaluate the most promising new plan that the policy draws; whether there is one."""
        for spread in [*(noise * 2**widening for widening in range(WIDENINGS)), inf]:
            drawn = walk(self.episodes, lambda seen, spread=spread: self.policy.answers(seen, spread))  # type: ignore[misc]
            plans = list(map(tuple, drawn.plans.tolist()))
            fresh = [row for row, plan in enumerate(plans) if plan not in self.rewards]
            if fresh:
                row = max(fresh, key=lambda row: drawn.worth[row])
                value = reward(self.problem, self.problem.evaluate(plans[row]), plans[row])
                self.rewards[plans[row]] = value
                self._learn(Episode(drawn.observations[row], drawn.actions[row], value))
                if self.assistant is not None:
                    self.assistant.learn(drawn.plans[[row]], np.array([value]))
                return True
        return False

    def _learn(self, lesson: Episode) -> None:
        """Remember an episode, and how rewards are to be seen from now on."""
        self.lessons.append(lesson)
        self.policy.remember(lesson)
        self.policy.replay.centre(np.array([known.value for known in self.lessons]), len(lesson.actions))
