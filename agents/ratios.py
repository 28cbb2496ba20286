"""Episodes as AMC sees them: an embedding of the layer that is next, and a number between 0 and 1 to answer with.

He et al. 2018 (AMC, arXiv 1802.03494) embed a layer by its index, shape, stride, FLOPs, what is reduced already, what
the rest could still reduce, and the action before. Ours: the model graph's features at the site's node, what its
patterns are, figures of the error and cost tables given what is decided, how far the action wall lets it go,
and the ratio that was executed before. Its size does not depend on the model, so one policy serves any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnvWrapper

from graphprune.agents.encoder import pattern_features
from graphprune.agents.episodes import Episodes, Judge
from graphprune.agents.fronts import Fronts
from graphprune.searching.environment import BOUND, OPTION_FEATURES, STATE_FEATURES, Observation, Observer
from graphprune.searching.problem import Floats, Problem

POINTS = (0.25, 0.5, 0.75, 1.0)
"""The ratios at which a site's options are described."""
Vectors = NDArray[np.int64]
Embeddings = NDArray[np.float32]


class RatioEpisodes(VecEnvWrapper):  # type: ignore[misc]
    """Episodes of one problem whose actions [N, 1] say how much to cut, observations [N, D] embed the next site.

    An action of 0 is the lowest ratio that the action wall leaves at a site, 1 the highest, and of the options left the
    one whose place on the site's front is nearest is taken. AMC cuts ratios off at its bound instead; but then the
    critic is asked what comes after ratios that the bound never lets through, and believes too well of them. What was
    executed, not what was asked for, is `executed` [N, decided sites] as ratios and `actions` as actions.
    """

    def __init__(self, problem: Problem, count: int, judge: Judge) -> None:
        self.fronts = Fronts(problem)
        self.places = _places(self.fronts)
        self._sites = _site_features(problem)
        self._described = [
            [self.fronts.nearest(site, point, ~np.isnan(ratios)) for point in POINTS]
            for site, ratios in enumerate(self.fronts.ratios)
        ]
        self._masks: NDArray[np.bool_] = np.zeros((count, 0), dtype=np.bool_)
        self._site = 0
        self.executed: Floats = np.zeros((count, 0))
        self.actions: Floats = np.zeros((count, 0))
        size = self._sites.shape[1] + STATE_FEATURES + OPTION_FEATURES * len(POINTS) + 3
        super().__init__(
            Episodes(Observer(problem), count, judge),
            spaces.Box(-BOUND, BOUND, (size,), np.float32),
            spaces.Box(0.0, 1.0, (1,), np.float32),
        )

    def reset(self) -> Embeddings:
        """Start all episodes."""
        self.executed = self.actions = np.zeros((self.num_envs, 0))
        return self._embedded(self.venv.reset())

    def step_async(self, actions: NDArray[Any]) -> None:
        """Turn actions [N, 1] into options under the wall, and take those."""
        low, high = self._bounds()
        legal = self._masks[:, : len(self.fronts.ratios[self._site])]
        pairs = zip((low + actions[:, 0] * (high - low)).tolist(), legal, strict=True)
        self.take(np.array([self.fronts.nearest(self._site, ratio, mask) for ratio, mask in pairs], dtype=np.int64))

    def take(self, options: Vectors) -> None:
        """Take options [N] instead; `step_wait` then tells what that leads to."""
        low, high = self._bounds()
        ratios = self.places[self._site, options]
        actions = (ratios - low) / np.maximum(high - low, 1e-9)
        self.executed = np.concatenate([self.executed[:, : self._site], ratios[:, None]], axis=1)
        self.actions = np.concatenate([self.actions[:, : self._site], actions[:, None]], axis=1)
        self.venv.step_async(options)

    def step_wait(self) -> tuple[Embeddings, Floats, NDArray[np.bool_], list[dict[str, Any]]]:
        """What the steps lead to; `finished` of the episodes inside are the plans when all are done."""
        observation, rewards, done, infos = self.venv.step_wait()
        return self._embedded(observation), rewards, done, infos

    def _embedded(self, observation: Observation) -> Embeddings:
        """[N, D] of what `Observer` tells of the next site."""
        count, site = len(observation["site"]), int(observation["site"][0, 0])
        self._site = site
        self._masks = self.venv.action_masks()
        before = self.executed[:, site - 1 : site] if site else np.zeros((count, 1))
        parts = [
            np.tile(self._sites[site], (count, 1)),
            observation["state"],
            observation["options"][:, self._described[site]].reshape(count, -1),
            *(bound[:, None] for bound in self._bounds()),
            before,
        ]
        embedded: Embeddings = np.concatenate(parts, axis=1).clip(-BOUND, BOUND).astype(np.float32)
        return embedded

    def _bounds(self) -> tuple[Floats, Floats]:
        """The lowest and the highest ratio that the wall leaves at the next site: [N] each."""
        left = np.where(self._masks, self.places[self._site], np.nan)
        return np.nanmin(left, axis=1), np.nanmax(left, axis=1)


def _places(fronts: Fronts) -> Floats:
    """The ratio at which each option of each site stands, NaN beyond a site's last option: [sites, options]."""
    sizes = np.array([len(ratios) for ratios in fronts.ratios])
    columns = [fronts.executed(tuple(np.minimum(option, sizes - 1).tolist())) for option in range(sizes.max())]
    return np.where(np.arange(sizes.max()) < sizes[:, None], np.stack(columns, axis=1), np.nan)


def _site_features(problem: Problem) -> Floats:
    """What never changes of each site: its node's features, compressed, and the mean of its patterns': [sites, F]."""
    nodes = problem.graph.features[[decision.node for decision in problem.decisions]].astype(np.float64)
    patterns = [
        np.mean([pattern_features(decision.kind, option) for option in decision.options], axis=0)
        for decision in problem.decisions
    ]
    return np.concatenate([np.sign(nodes) * np.log1p(np.abs(nodes)), np.stack(patterns)], axis=1)


@dataclass(frozen=True, eq=False)
class Walks:
    """N finished episodes of one problem.

    `observations` [N, sites, D], the executed `actions` [N, sites], the `plans` [N, sites], and what the episodes'
    judge holds them to be worth [N].
    """

    observations: Embeddings
    actions: Floats
    plans: Vectors
    worth: Floats


def walk(episodes: RatioEpisodes, choose: Callable[[Embeddings], Floats]) -> Walks:
    """Run all episodes to their end; `choose` answers embeddings [N, D] with actions [N]."""

    def answer(site: int, observation: Embeddings) -> None:
        episodes.step_async(choose(observation)[:, None])

    return _finished(episodes, answer)


def retrace(episodes: RatioEpisodes, plans: Vectors) -> Walks:
    """The episodes that end in given plans [N, sites], which the wall must let through."""
    return _finished(episodes, lambda site, _: episodes.take(plans[:, site]))


def _finished(episodes: RatioEpisodes, answer: Callable[[int, Embeddings], None]) -> Walks:
    observation, observations = episodes.reset(), []
    done = np.zeros(1, dtype=np.bool_)
    while not done[0]:
        observations.append(observation)
        answer(len(observations) - 1, observation)
        observation, worth, done, _ = episodes.step_wait()
    return Walks(np.stack(observations, axis=1), episodes.actions, episodes.venv.finished, worth)
