"""Deep Q-learning over offered cuts: one head scores each, so weights fit any problem and any number of cuts.

Stable-Baselines3's DQN collects, explores and keeps the slow copy; what it lacks is here: the target of double DQN
(van Hasselt, Guez, Silver, AAAI 2016, arXiv 1509.06461) and prioritised replay (Schaul et al. 2016, arXiv 1511.05952).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn

from graphprune.agents.cutting import CUT_FEATURES, SITUATION_FEATURES, Cuts, Cutting, Situations
from graphprune.agents.encoder import PATTERN_FEATURES, WIDTH, GraphEncoder, pattern_table, typed_edges
from graphprune.agents.replay import PrioritisedReplay
from graphprune.searching.problem import Floats

MEMORY = 8192
"""Transitions that are kept."""
BETA = 0.4
"""How far the bias of prioritised replay is undone at first; wholly at the end (Schaul et al. 2016)."""


def double_target(rewards: Tensor, dones: Tensor, online: Tensor, target: Tensor) -> Tensor:
    """What a cut should have been worth [N, 1]: its reward and, unless the episode ends, what comes after.

    From rewards and ends [N, 1] and the Q values [N, K] of the next situation. The network that learns picks the next
    cut, its slower copy says what that is worth (double DQN, arXiv 1509.06461, equation 4), undiscounted.
    """
    return rewards + (1 - dones) * target.gather(1, online.argmax(dim=1, keepdim=True))


class CutScorer(BaseFeaturesExtractor):  # type: ignore[misc]
    """From situations to the Q value of each offered cut [N, K]: one head for all of them.

    A value is the believed change of the metric by the cut itself, which is known, plus what is learned: what the cut
    makes of all that follows. Graph and patterns belong to the problem, not to the weights.
    """

    def __init__(self, observation_space: spaces.Dict, cuts: Cuts) -> None:
        super().__init__(observation_space, int(observation_space["cuts"].shape[0]))
        problem = cuts.problem
        edges, kinds = typed_edges(problem.graph)
        table = pattern_table(problem)
        static = {
            "nodes": torch.from_numpy(problem.graph.features).float(),
            "edges": edges,
            "kinds": kinds,
            "table": table,
            "patterns": table[cuts.sites, cuts.options],
            "node_of": torch.tensor([problem.decisions[site].node for site in cuts.sites]),
        }
        for name, value in static.items():
            self.register_buffer(name, value, persistent=False)
        self.encoder = GraphEncoder(self.nodes.shape[1])
        self.pattern = nn.Linear(PATTERN_FEATURES, WIDTH)
        self.place = nn.Linear(WIDTH, WIDTH)
        self.effect = nn.Linear(CUT_FEATURES, WIDTH)
        self.context = nn.Linear(WIDTH + PATTERN_FEATURES + SITUATION_FEATURES, WIDTH)
        inner, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        nn.init.zeros_(last.weight)  # begin with what is known
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.ReLU(), inner, nn.ReLU(), last)
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, situations: dict[str, Tensor]) -> Tensor:
        """Score the cuts of each situation."""
        pooled, known = self._embed() if self._kept is None else self._kept
        decided, cuts = situations["decided"].long(), situations["cuts"].long()
        taken = self.table[torch.arange(decided.shape[1]), decided] * (decided > 0)[:, :, None]
        context = self.context(
            torch.cat([pooled.expand(len(decided), WIDTH), taken.mean(dim=1), situations["situation"]], dim=1)
        )
        learned: Tensor = self.head(known[cuts] + self.effect(situations["values"]) + context[:, None, :])[:, :, 0]
        return learned - situations["values"][:, :, 0]

    def _embed(self) -> tuple[Tensor, Tensor]:
        """What does not depend on the situation: embeddings of the graph [WIDTH] and of every cut [P, WIDTH]."""
        nodes = self.encoder(self.nodes, self.edges, self.kinds)
        return nodes.mean(dim=0), self.pattern(self.patterns) + self.place(nodes)[self.node_of]

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Where nothing is trained, the graph is encoded once."""
        with torch.no_grad():
            self._kept = self._embed()
            try:
                yield
            finally:
                self._kept = None


class CutPolicy(DQNPolicy):  # type: ignore[misc]
    """Stable-Baselines3's pair of Q networks, each a `CutScorer` with nothing behind it."""

    def __init__(self, *args: Any, cuts: Cuts, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=CutScorer, features_extractor_kwargs={"cuts": cuts}, **kwargs)

    def make_q_net(self) -> QNetwork:
        """One of the two networks."""
        network = super().make_q_net()
        network.q_net = nn.Identity()
        return network


class DoubleDQN(DQN):  # type: ignore[misc]
    """Stable-Baselines3's DQN with the target of double DQN and prioritised replay."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Learn from transitions drawn by priority, each weighted against the bias of the draw."""
        beta = BETA + (1 - BETA) * (1 - self._current_progress_remaining)
        for _ in range(gradient_steps):
            batch = self.replay_buffer.draw(batch_size, beta)
            with torch.no_grad():
                following = self.q_net(batch.next_observations), self.q_net_target(batch.next_observations)
                target = double_target(batch.rewards, batch.dones, *following)
            values = self.q_net(batch.observations).gather(1, batch.actions.long())
            loss = (batch.weights * nn.functional.smooth_l1_loss(values, target, reduction="none")).mean()
            self.policy.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            self.replay_buffer.reprioritise(batch.indices, (target - values.detach()).numpy()[:, 0])
        self._n_updates += gradient_steps


def learner(episodes: Cutting, rng: np.random.Generator) -> DoubleDQN:
    """A new learner for some episodes, undiscounted. Draws from the global generators, as Stable-Baselines3 does."""
    dqn = DoubleDQN(
        CutPolicy,
        episodes,
        learning_rate=1e-3,
        buffer_size=MEMORY,
        learning_starts=128,
        batch_size=64,
        tau=0.05,
        gamma=1.0,
        train_freq=1,
        gradient_steps=2,
        replay_buffer_class=PrioritisedReplay,
        replay_buffer_kwargs={"rng": rng},
        target_update_interval=episodes.num_envs,
        exploration_fraction=0.5,
        exploration_final_eps=0.1,
        policy_kwargs={"cuts": episodes.observers[0].cuts},
        seed=int(rng.integers(2**31)),
        device="cpu",
    )
    dqn.set_logger(Logger(None, []))
    return dqn


def score(network: QNetwork, seen: Situations) -> Floats:
    """The Q values of the cuts that are offered in some situations: [N, K]."""
    with torch.no_grad():
        values: Floats = network({name: torch.from_numpy(array) for name, array in seen.items()}).numpy()
    return values
