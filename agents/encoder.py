"""The policy network of AutoSculpt: GATv2 over the model graph, and a score for each (site, option) pair.

No parameter depends on the number of nodes, sites or options, so weights move between models and pattern libraries.
GATv2: Brody, Alon, Yahav, ICLR 2022 (arXiv 2105.14491).
"""

import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn
from torch.nn import functional

from graphprune.searching.environment import OPTION_FEATURES, STATE_FEATURES
from graphprune.searching.problem import GraphView, Option, Problem
from graphprune.searching.views import CURVE, VIEW_FEATURES

with warnings.catch_warnings():  # torch-geometric scripts a class while it is imported, which torch 2.15 deprecates
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=Warning)
    from torch_geometric.nn import GATv2Conv

WIDTH = 32
HEADS = 8
LAYERS = 2
KINDS = 8
"""Kinds of sites are open-ended names: they are hashed into this many buckets."""
EDGE_TYPES = 3
"""Data flow, the same edge backwards, coupling (which has no direction)."""
PATTERN_FEATURES = 9 + 4 + KINDS
PATTERN_ERROR = 9 + 2
OPTION_ERRORS = (0, 1, 4, 5)
STATE_ERRORS = (3, 5)
"""The columns that speak of errors: of the pattern features, and of an observation's `options` and `state`."""


@dataclass(frozen=True)
class Sight:
    """What a policy sees of a problem; each False takes one thing away, to measure what it is worth.

    `nodes`: the features of the graph's nodes; else random numbers in their place, as in AutoSculpt's published code.
    `patterns`: the embedding of the options; else they differ by what they would add and save here alone. `graph`: the
    other nodes; else only the current site's own, through an MLP of the same depth. `errors`: the error curves of the
    nodes and all else that the error table says of options and plans (what an episode is worth, it still says).
    """

    nodes: bool = True
    patterns: bool = True
    graph: bool = True
    errors: bool = True


ALL = Sight()


def pattern_features(kind: str, option: Option) -> list[float]:
    """What an option is, whatever the model: geometry bits, kept share, error and gain (logarithms), kind (one-hot)."""
    bits = [float(bit) for bit in option.geometry] or [0.0] * 9
    shape = [
        float(bool(option.geometry)),
        option.kept_share,
        np.log(max(option.error, 0) + 1e-4) / 4,
        np.log(option.gain),
    ]
    bucket = [0.0] * KINDS
    bucket[zlib.crc32(kind.encode()) % KINDS] = 1.0
    return [*bits, *(float(value) for value in shape), *bucket]


def pattern_table(problem: Problem) -> Tensor:
    """Pattern features of every option of every site, padded with zeros: [sites, options, PATTERN_FEATURES]."""
    widest = max(len(decision.options) for decision in problem.decisions)
    table = np.zeros((len(problem.decisions), widest, PATTERN_FEATURES), dtype=np.float32)
    for site, decision in enumerate(problem.decisions):
        for index, option in enumerate(decision.options):
            table[site, index] = pattern_features(decision.kind, option)
    return torch.from_numpy(table)


def typed_edges(graph: GraphView) -> tuple[Tensor, Tensor]:
    """Edges in both directions [2, E'] with their one-hot types [E', EDGE_TYPES]."""
    edges = torch.from_numpy(graph.edges)
    coupling = torch.from_numpy(graph.edge_types) == 1
    both = torch.cat([edges, edges.flip(0)], dim=1)
    kinds = torch.cat([torch.where(coupling, 2, 0), torch.where(coupling, 2, 1)])
    return both, functional.one_hot(kinds, EDGE_TYPES).float()


def node_table(problem: Problem, sight: Sight) -> Tensor:
    """Features of the graph's nodes as far as they are seen: [nodes, F]."""
    features = torch.from_numpy(problem.graph.features).float()
    if not sight.nodes:
        return torch.randn(features.shape)
    if not sight.errors and features.shape[1] == len(VIEW_FEATURES):
        features = features.clone()
        features[:, -CURVE:] = 0
    return features


class GraphEncoder(nn.Module):
    """GATv2 layers with residuals and norms: node features [nodes, F] to embeddings [nodes, WIDTH]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, WIDTH)
        self.layers = nn.ModuleList(
            GATv2Conv(WIDTH, WIDTH // HEADS, heads=HEADS, edge_dim=EDGE_TYPES) for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))

    def forward(self, features: Tensor, edges: Tensor, kinds: Tensor) -> Tensor:
        """Encode one graph. Features are compressed as sign(x) log(1 + |x|), since sizes span decades."""
        nodes: Tensor = self.embed(features.sign() * features.abs().log1p())
        for layer, norm in zip(self.layers, self.norms, strict=True):
            nodes = norm(nodes + torch.relu(layer(nodes, edges, kinds)))
        return nodes


class PairScorer(BaseFeaturesExtractor):  # type: ignore[misc]
    """From observations to [N, options + 1]: the logit of each option, then the value of the state.

    The graph and the pattern table belong to the problem, not to the weights. They are encoded once per call, not
    once per observation.
    """

    def __init__(self, observation_space: spaces.Dict, problem: Problem, sight: Sight = ALL) -> None:
        self.options = int(observation_space["options"].shape[0])
        super().__init__(observation_space, self.options + 1)
        edges, kinds = typed_edges(problem.graph)
        patterns = pattern_table(problem)
        if not sight.errors:
            patterns[:, :, PATTERN_ERROR] = 0
        static = {
            "nodes": node_table(problem, sight),
            "edges": edges if sight.graph else edges[:, :0],
            "kinds": kinds if sight.graph else kinds[:0],
            "patterns": patterns if sight.patterns else torch.zeros_like(patterns),
            "seen_options": _seen(OPTION_FEATURES, OPTION_ERRORS, sight),
            "seen_state": _seen(STATE_FEATURES, STATE_ERRORS, sight),
            "pooling": torch.tensor(float(sight.graph)),
            "node_of": torch.tensor([decision.node for decision in problem.decisions]),
        }
        for name, value in static.items():
            self.register_buffer(name, value, persistent=False)
        self._kept: tuple[int, tuple[Tensor, Tensor]] | None = None
        self.encoder = GraphEncoder(self.nodes.shape[1])
        self.pattern = nn.Sequential(nn.Linear(PATTERN_FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.situation = nn.Linear(OPTION_FEATURES, WIDTH)
        self.context = nn.Sequential(nn.Linear(3 * WIDTH + STATE_FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.score = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.logit = nn.Linear(WIDTH, 1)
        self.value = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, 1))
        nn.init.normal_(self.logit.weight, std=0.01)  # begin near the uniform policy
        nn.init.zeros_(self.logit.bias)
        self._trained = tuple(self.parameters())

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Score every option of the current site of each observation."""
        nodes, patterns = self._static()
        site = observations["site"][:, 0].long().clamp(max=len(self.node_of) - 1)
        decided = observations["decided"].long()
        numbers = decided.clamp(min=0) + self.options * torch.arange(decided.shape[1])
        taken = (decided >= 0).to(patterns.dtype) / decided.shape[1]
        summary = functional.embedding_bag(numbers, patterns.flatten(0, 1), mode="sum", per_sample_weights=taken)
        pooled = (self.pooling * nodes.mean(dim=0)).expand(len(site), WIDTH)
        state = observations["state"] * self.seen_state
        context = self.context(torch.cat([nodes[self.node_of[site]], pooled, summary, state], dim=1))
        pairs = patterns[site] + self.situation(observations["options"] * self.seen_options) + context[:, None, :]
        return torch.cat([self.logit(self.score(pairs))[:, :, 0], self.value(context)], dim=1)

    def _static(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the nodes and of all options. Between two updates the rollouts reuse them."""
        if torch.is_grad_enabled():
            self._kept = None  # an update follows; not every optimiser counts up the version of what it changes
            return self._embed()
        version = sum(parameter._version for parameter in self._trained)
        if self._kept is None or self._kept[0] != version:
            self._kept = version, self._embed()
        return self._kept[1]

    def _embed(self) -> tuple[Tensor, Tensor]:
        return self.encoder(self.nodes, self.edges, self.kinds), self.pattern(self.patterns)


def _seen(size: int, errors: tuple[int, ...], sight: Sight) -> Tensor:
    """1 for each of the columns that are seen, else 0: [size]."""
    mask = torch.ones(size)
    if not sight.errors:
        mask[list(errors)] = 0
    return mask


class Split(nn.Module):
    """Takes the extractor's output apart: logits for the actor, the last column for the critic."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts, [N, options] and [N, 1]."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """The logits [N, options]."""
        return features[:, :-1]

    def forward_critic(self, features: Tensor) -> Tensor:
        """The value [N, 1]."""
        return features[:, -1:]


class PairPolicy(MaskableActorCriticPolicy):  # type: ignore[misc]
    """A maskable actor-critic whose logits and value all come from a `PairScorer`; nothing is added behind it."""

    def __init__(self, *args: Any, problem: Problem, sight: Sight = ALL, **kwargs: Any) -> None:
        super().__init__(
            *args,
            features_extractor_class=PairScorer,
            features_extractor_kwargs={"problem": problem, "sight": sight},
            **kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        self.mlp_extractor = Split()
        self.action_net = nn.Identity()
        self.value_net = nn.Identity()
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
