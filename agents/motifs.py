"""The policy network of GNN-RL: motifs of units inside sites, and the graph of layers whose edges they describe.

First level: under each option a site is a motif, a star of the units that are left around the layer they belong to.
Its embedding describes the edges of the second level, the model graph, along the tensors that the layer makes. A
pattern that thins all units alike, as those of kernels do, is shown by the share of them that weighs as much. No
parameter depends on the number of units, nodes, sites or options, so weights move between models and pattern libraries.
SAGE: Hamilton, Ying, Leskovec, NeurIPS 2017 (arXiv 1706.02216). GINE: Hu et al., ICLR 2020 (arXiv 1905.12265).
"""

import math
import warnings
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from graphprune.agents.encoder import EDGE_TYPES, Split, typed_edges
from graphprune.searching.problem import Decision, Floats, Problem

with warnings.catch_warnings():  # torch-geometric scripts a class while it is imported, which torch 2.15 deprecates
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=Warning)
    from torch_geometric.nn import GINEConv, SAGEConv, global_mean_pool

WIDTH = 32
LAYERS = 2
"""Rounds of messages in each level."""
UNITS = 32
"""A motif shows at most this many units: of more, quantiles of their importance."""
UNIT_FEATURES = 2
SITE_FEATURES = 6
STATE_FEATURES = 2
"""What an observation says of the whole network: how far it misses the target, and which step is next."""


def left(importance: tuple[float, ...], share: float) -> Floats:
    """The importances of the units that are left when a share of them stays, the most important first: [<= UNITS]."""
    ranked = np.sort(np.array(importance, dtype=np.float64))[::-1]
    kept = ranked[: math.ceil(share * len(ranked) - 1e-9)]
    return kept if len(kept) <= UNITS else np.quantile(kept, np.linspace(1, 0, UNITS))


def unit_features(decision: Decision, share: float) -> NDArray[np.float32]:
    """Importance of each unit left, in units of the site's mean and as a logarithm: [units, UNIT_FEATURES]."""
    values = left(decision.importance, share)
    mean = max(float(np.mean(decision.importance)), 1e-12) if decision.importance else 1.0
    return np.stack([values / mean, np.log(np.maximum(values, 0) + 1e-6) / 4], axis=1).astype(np.float32)


def site_features(problem: Problem) -> list[NDArray[np.float32]]:
    """What is left of each site under each of its options, the others dense: [options, SITE_FEATURES] per site.

    The kept share, the number of units (log2 / 8), the cost saved and the error caused (as multiples of what a site's
    cheapest plan saves and errs on average), and the largest saving and error of the site's options.
    """
    count = len(problem.decisions)
    error = max(abs(problem.error(problem.cheapest) - problem.error(problem.dense)), 1e-9) / count
    cost = max(problem.overrun(problem.dense) - problem.overrun(problem.cheapest), 1e-9) / count
    tables = []
    for site, decision in enumerate(problem.decisions):
        costs, errors = problem.alone(site)
        costs = np.where(np.isfinite(costs), costs, costs[0])
        share = np.array([option.kept_share for option in decision.options])
        units = np.log2(np.maximum(share * len(decision.importance), 1)) / 8
        saved, caused = (costs[0] - costs) / cost, (errors - errors[0]) / error
        most = np.full_like(saved, saved.max()), np.full_like(caused, caused.max())
        tables.append(np.clip(np.stack([share, units, saved, caused, *most], axis=1), -10, 10).astype(np.float32))
    return tables


class Motifs(nn.Module):
    """The first level: SAGE layers on the stars, then the mean over each star's nodes.

    The motifs of all options of all sites belong to the problem, not to the weights. They are one graph of many parts,
    in which each part has a node for its layer and one for each unit that is left.
    """

    first: Tensor
    hubs: Tensor
    units: Tensor
    star: Tensor
    part: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        tables = site_features(problem)
        counts = np.array([len(table) for table in tables])
        units = [unit_features(own, option.kept_share) for own in problem.decisions for option in own.options]
        total = len(units)
        part = torch.from_numpy(np.repeat(np.arange(total), [len(own) for own in units]))
        spokes = torch.stack([total + torch.arange(len(part)), part])
        static = {
            "first": torch.from_numpy(np.cumsum(counts) - counts),
            "hubs": torch.from_numpy(np.concatenate(tables)),
            "units": torch.from_numpy(np.concatenate(units)),
            "star": torch.cat([spokes, spokes.flip(0)], dim=1),
            "part": torch.cat([torch.arange(total), part]),
        }
        for name, value in static.items():
            self.register_buffer(name, value, persistent=False)
        self.hub = nn.Linear(SITE_FEATURES, WIDTH)
        self.unit = nn.Linear(UNIT_FEATURES, WIDTH)
        self.layers = nn.ModuleList(SAGEConv(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self) -> Tensor:
        """Embed every motif: [options of all sites, WIDTH]; the options of site s start at `first[s]`."""
        nodes = torch.cat([self.hub(self.hubs), self.unit(self.units)])
        for layer in self.layers:
            nodes = nodes + torch.relu(layer(nodes, self.star))
        pooled: Tensor = global_mean_pool(nodes, self.part, len(self.hubs))
        return pooled


class LayerGraph(nn.Module):
    """The second level: GINE layers with residuals and norms over the model graph, edges described by motifs."""

    features: Tensor
    edges: Tensor
    kinds: Tensor
    node_of: Tensor
    carries: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        edges, kinds = typed_edges(problem.graph)
        features = torch.from_numpy(problem.graph.features).float()
        node_of = torch.tensor([decision.node for decision in problem.decisions])
        made_by = torch.from_numpy(problem.graph.edges[0]).repeat(2)  # an edge and its reverse are the same tensor
        carries = (made_by[:, None] == node_of[None, :]).float()
        static = {
            "features": features.sign() * features.abs().log1p(),  # sizes span decades
            "edges": edges,
            "kinds": kinds,
            "node_of": node_of,
            "carries": carries / carries.sum(dim=1, keepdim=True).clamp(min=1),
        }
        for name, value in static.items():
            self.register_buffer(name, value, persistent=False)
        self.embed = nn.Linear(self.features.shape[1], WIDTH)
        self.layers = nn.ModuleList(
            GINEConv(nn.Linear(WIDTH, WIDTH), edge_dim=EDGE_TYPES + WIDTH, aggr="mean") for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))

    def edge_features(self, motifs: Tensor) -> Tensor:
        """Type, and the mean motif of the sites whose layer makes the tensor: [N, E, EDGE_TYPES + WIDTH].

        `motifs` [N, sites, WIDTH]: one for each site of N states.
        """
        described = torch.einsum("es,nsw->new", self.carries, motifs)
        return torch.cat([self.kinds.expand(len(motifs), -1, -1), described], dim=2)

    def forward(self, motifs: Tensor) -> Tensor:
        """Embed the nodes under the motifs [N, sites, WIDTH] of N states: [N, nodes, WIDTH]."""
        count, size = len(motifs), len(self.features)
        nodes: Tensor = self.embed(self.features).repeat(count, 1)
        edges = torch.cat([self.edges + size * copy for copy in range(count)], dim=1)
        described = self.edge_features(motifs).flatten(0, 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            nodes = norm(nodes + torch.relu(layer(nodes, edges, described)))
        return nodes.view(count, size, WIDTH)


class RatioHead(BaseFeaturesExtractor):  # type: ignore[misc]
    """From observations to [N, sites + 1]: the mean ratio of each site, then the value of the state."""

    def __init__(self, observation_space: spaces.Dict, problem: Problem, start: float) -> None:
        super().__init__(observation_space, len(problem.decisions) + 1)
        self.motifs = Motifs(problem)
        self.graph = LayerGraph(problem)
        around = 3 * WIDTH + SITE_FEATURES + STATE_FEATURES + 1
        self.site = nn.Sequential(nn.Linear(around, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.ratio = nn.Linear(WIDTH, 1)
        self.value = nn.Linear(WIDTH, 1)
        nn.init.normal_(self.ratio.weight, std=0.01)  # begin alike everywhere
        nn.init.constant_(self.ratio.bias, math.log(start / (1 - start)))

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Embed the shrunken network of each observation, and read the sites."""
        chosen = self.motifs.first + observations["asked"].long()
        motifs = self.motifs()[chosen]
        nodes = self.graph(motifs)
        every = nodes.mean(dim=1, keepdim=True).expand(-1, chosen.shape[1], -1)
        state = observations["state"][:, None, :].expand(-1, chosen.shape[1], -1)
        own = [nodes[:, self.graph.node_of], motifs, every, self.motifs.hubs[chosen], state]
        sites = self.site(torch.cat([*own, observations["kept"][:, :, None]], dim=2))
        return torch.cat([torch.sigmoid(self.ratio(sites))[:, :, 0], self.value(sites.mean(dim=1))], dim=1)


class RatioPolicy(ActorCriticPolicy):  # type: ignore[misc]
    """An actor-critic with a ratio per site, normally distributed with one deviation that all sites share.

    `start` is the mean ratio and `log_std_init` the logarithm of the deviation before anything is learnt.
    """

    def __init__(self, *args: Any, problem: Problem, start: float, **kwargs: Any) -> None:
        extra = {"problem": problem, "start": start}
        super().__init__(*args, features_extractor_class=RatioHead, features_extractor_kwargs=extra, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.mlp_extractor = Split()
        self.action_net = nn.Identity()
        self.value_net = nn.Identity()
        self.log_std = nn.Parameter(torch.full((1,), float(self.log_std_init)))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
