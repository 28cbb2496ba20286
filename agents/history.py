"""What AMC takes from earlier searches: transfer, augmented transfer, an assistant, and the way back to scratch.

Mu et al. 2021 (arXiv 2107.08815) speed up the search for ratios with three boosts from logged runs. The names are
theirs; what follows is our reading, not their text:

- *transfer*: the plans recorded by earlier searches, whichever agent proposed them, are retraced through their own
  problem, and the policy is trained on these transitions; the rewards of each task are standardised, so that an easy
  task counts no more than a hard one;
- *augmented transfer*: the policy is trained over many cheap tasks, which are the problems of earlier searches under
  random budgets; plans are judged by the error table and standardised by what random ratios reach on the same task;
- *fallback*: a policy from elsewhere begins on probation. Its first plans, `PROBATION` or fewer where the trials are
  few, take turns with as many random ones. As soon as an exact one-sided Mann-Whitney U test finds its rewards smaller
  (p at most `DOUBT`, so three of each at the earliest; looked at after every turn, so that of policies no better than
  random somewhat more than that share is given up), the search goes on with fresh weights that learn from the random
  plans alone, and no more than the policy's few trials are lost;
- *assistant*: see `graphprune.agents.belief`, the regressor of what a plan is worth that screens what the policy draws.

No search learns from problems of the model that it prunes.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import numpy as np
from scipy.stats import mannwhitneyu

from graphprune.agents.belief import Belief
from graphprune.agents.ddpg import Episode, RatioPolicy
from graphprune.agents.ratios import RatioEpisodes, Vectors, Walks, retrace, walk
from graphprune.agents.wall import passes
from graphprune.errors import InputError
from graphprune.searching.environment import reward
from graphprune.searching.past import Past
from graphprune.searching.problem import Floats, Problem

REPLAYS = 400
"""Gradient steps on retraced plans."""
TASKS = 40
"""Imagined tasks, each a problem and a budget."""
EPISODES = 16
"""Plans imagined for each of them, the first half of them at random."""
PRACTICE = 16
"""Gradient steps after each of them."""
NOISE = 0.25
"""The deviation of the noise with which the policy imagines its half."""
BUDGETS = (0.05, 0.8)
"""Random budgets: shares of the way from the cheapest plan to the dense model."""
PROBATION = 6
"""The most plans of its own that a taught policy has to show."""
DOUBT = 0.05
"""The p-value at which a taught policy counts as worse than random."""


def others(pasts: Sequence[Past], problem: Problem) -> list[Past]:
    """The searches of other models that speak of them in the same features. Raises InputError if there is none."""
    width = problem.graph.features.shape[1]
    found = [
        past for past in pasts if past.problem.model != problem.model and past.problem.graph.features.shape[1] == width
    ]
    if not found:
        raise InputError("the study of earlier searches holds none of another model, and none may learn from its own")
    return found


def replay(policy: RatioPolicy, pasts: Sequence[Past]) -> int:
    """Transfer: train a policy on what was recorded; returns the number of plans. Its memory is empty afterwards."""
    plans = 0
    for past in pasts:
        judged = {choices: record for choices, record in past.judged if passes(past.problem, choices)}
        if not judged:
            continue
        rewards = np.array([reward(past.problem, record, choices) for choices, record in judged.items()])
        episodes = RatioEpisodes(past.problem, len(judged), lambda done, rewards=rewards: rewards)  # type: ignore[misc]
        walks = retrace(episodes, np.array(list(judged)))
        _remember(policy, walks, standardised(rewards, rewards))
        plans += len(judged)
    if plans:
        policy.train(REPLAYS)
        policy.replay.reset()
    return plans


def practise(policy: RatioPolicy, pasts: Sequence[Past], rng: np.random.Generator) -> None:
    """Augmented transfer: train a policy on imagined tasks. Its memory is empty afterwards."""
    for _ in range(TASKS):
        task = rebudgeted(pasts[int(rng.integers(len(pasts)))].problem, rng.uniform(*BUDGETS))
        walks = _imagined(policy, task)
        _remember(policy, walks, standardised(walks.worth, walks.worth[: EPISODES // 2]))
        policy.train(PRACTICE)
    policy.replay.reset()


def rebudgeted(problem: Problem, share: float) -> Problem:
    """The problem under another budget: `share` of the way from the cheapest plan (0) to the dense model (1)."""
    limits = {}
    for name in problem.limits:
        least, dense = problem.costs[name](problem.cheapest), problem.costs[name](problem.dense)
        limits[name] = least + share * max(dense - least, 0.0)
    return replace(problem, limits=limits, records=[], _seen={})


def standardised(rewards: Floats, among: Floats) -> Floats:
    """Rewards in deviations from the mean of some."""
    return np.asarray((rewards - among.mean()) / max(float(among.std()), 1e-6), dtype=np.float64)


def worse(own: Sequence[float], random: Sequence[float]) -> bool:
    """Whether rewards are smaller than those of random plans, by the one-sided Mann-Whitney U test."""
    return bool(mannwhitneyu(own, random, alternative="less", method="exact").pvalue <= DOUBT)


def _imagined(policy: RatioPolicy, task: Problem) -> Walks:
    """Episodes judged by the error table: half of them random, half of them the policy's with noise."""
    belief = Belief(task)

    def judge(plans: Vectors) -> Floats:
        return belief.predict(plans)[0]

    half = EPISODES // 2
    episodes = RatioEpisodes(task, EPISODES, judge)
    return walk(
        episodes, lambda seen: np.concatenate([policy.answers(seen[:half], inf), policy.answers(seen[half:], NOISE)])
    )


def _remember(policy: RatioPolicy, walks: Walks, values: Floats) -> None:
    """Keep episodes whose values are standardised already, an equal share for each step."""
    policy.replay.baseline, policy.replay.scale = 0.0, 1.0
    shares = values / walks.actions.shape[1]
    for observations, actions, share in zip(walks.observations, walks.actions, shares.tolist(), strict=True):
        policy.remember(Episode(observations, actions, share))
