"""From a traced, profiled and calibrated model to the tables that agents decide on.

Every site gets its options: dense, and each legal level of each pattern with the units it keeps. What a whole plan
costs and how much error it makes are sums of small tables, one for each layer, over the options of the sites that
touch the layer; so a plan is judged in microseconds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from math import isfinite, prod

import numpy as np
import torch

from graphprune.coupling.axes import Indices
from graphprune.coupling.graph import Layer, ModelGraph, Patch, Site
from graphprune.coupling.operators import Operator, Weighted
from graphprune.cutting.cuts import Cuts, checked, join
from graphprune.pattern import Level, Pattern, Scores
from graphprune.repairing.calibration import CHANNELS, KERNEL, Statistics
from graphprune.repairing.compensation import Consumer, Loss, ScoreProduct, rank_units, score_error, weight_scores
from graphprune.searching.problem import Decision, Factor, Floats, Option, Sum
from graphprune.timing.cases import operators
from graphprune.timing.profile import Profile
from graphprune.uniform import magnitudes, unit_rows

LARGEST_TABLE = 1024
"""Entries of one layer's table, those with the layer dropped not counted; beyond that its sites are independent."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Draft:
    """An option before its error and gain are known."""

    pattern: str
    level: str
    keep: tuple[int, ...]
    share: float
    cuts: Cuts
    error: float | None = None
    """The pattern's own, None where that of the layers counts."""


@dataclass
class Candidates:
    """Builds options and tables. `statistics` are the moments of the calibrated layers, by node."""

    graph: ModelGraph
    profile: Profile
    patterns: Sequence[Pattern]
    statistics: Statistics
    drafts: dict[str, list[_Draft]] = field(default_factory=dict)

    def collect(self, progress: Progress | None = None) -> None:
        """Measure what is not in the profile yet and choose the kept units of every legal level."""
        self.profile.fill(operators(self.graph, self.patterns, self.profile.block), progress)
        for site in self.graph.all_sites:
            scores: dict[tuple[Patch, ...], Scores] = {}
            drafts = [_Draft("dense", "dense", tuple(range(site.size)), 1.0, Cuts())]
            for pattern, level in self._legal(site):
                patches = pattern.patches(site)
                if level.count and not level.keep and patches not in scores:
                    scores[patches] = self._patch_scores(site, patches) if patches else self._scores(site)
                keep = level.keep or (pattern.choose(site, level, scores[patches]) if level.count else ())
                stay, units = pattern.kept(site, keep)
                cuts, error = pattern.rewrite(site, keep), pattern.error(site, keep, self.statistics)
                drafts.append(_Draft(pattern.name, level.name, keep, stay / units, cuts, error))
            if len(drafts) > 1:
                self.drafts[site.name] = drafts
        self.profile.fill(self._table_operators(), progress)

    def _legal(self, site: Site) -> Iterable[tuple[Pattern, Level]]:
        for pattern in self.patterns:
            for level in pattern.legal(self.graph, site, self.profile):
                yield pattern, level

    def _scores(self, site: Site) -> Scores:
        """How much each unit of a group, or each weight of a layer, matters: where calibrated, else by magnitude."""
        if site.atom < 0:
            return self._weight_scores(site)
        layers = [self.graph.layer[node] for node in site.layers]
        consumers = [x for layer in layers for x in (self._consumer(site, layer), self._product(site, layer)) if x]
        if consumers:
            return rank_units(consumers, site.size)
        return magnitudes(self.graph, site.atom)

    def _weight_scores(self, site: Site) -> Scores:
        """How much each weight [filters, channels] matters to the output of its layer."""
        weight = self.graph.exported.state_dict[self.graph.layer[site.node].weight]
        return weight_scores(weight, self.statistics.get(site.node))

    def _patch_scores(self, site: Site, patches: Sequence[Patch]) -> Scores:
        """Higher where a patch costs a filter less [filters, patches]; without calibration, by the weights alone."""
        layer = self.graph.layer[site.node]
        moments = self.statistics.get(layer.node)
        features = [patch_features(layer, patch, np.arange(site.channels)) for patch in patches]
        if moments is None:
            weight = self.graph.exported.state_dict[layer.weight].detach().double().square().flatten(1)
            return np.asarray(torch.stack([weight[:, kept].sum(1) for kept in features], 1).numpy())
        loss = self._loss(layer.node)
        return np.asarray(-torch.stack([loss.errors(kept).reshape(-1) for kept in features], 1).numpy())

    @cached_property
    def _loss(self) -> Callable[[str], Loss]:
        """The loss of a layer, by its node; only the last one is kept, since they are large."""
        return lru_cache(maxsize=1)(lambda node: Loss(self.statistics[node]))

    def _consumer(self, site: Site, layer: Layer) -> Consumer | None:
        moments = self.statistics.get(layer.node)
        if moments is None or len(moments.second) > 1 or site.atom not in layer.inputs.atoms():
            return None
        taps = moments.second.shape[-1] // layer.inputs.size
        channels = torch.from_numpy(unit_rows(layer.inputs, site.atom, site.size))
        features = channels[:, :, None] * taps + torch.arange(taps)
        return Consumer(moments, features.flatten(1), self.statistics.weight(layer.node))

    def _product(self, site: Site, layer: Layer) -> ScoreProduct | None:
        scores = self.statistics.scores.get(layer.node)
        if scores is None or not self._reads(site, layer):
            return None
        columns = torch.from_numpy(unit_rows(layer.widths[0], site.atom, site.size))  # type: ignore[index]
        return ScoreProduct(scores, columns, self.statistics.weight(layer.node))

    # --- tables --------------------------------------------------------------------------------------------------

    @cached_property
    def sites(self) -> list[Site]:
        """The sites with a choice, in the order of the graph; they are known once `collect` is done."""
        return [site for site in self.graph.all_sites if site.name in self.drafts]

    @cached_property
    def _touching(self) -> Mapping[str, list[int]]:
        """The numbers of the sites that touch a layer, by its node."""
        found: dict[str, list[int]] = {layer.node: [] for layer in self.graph.layers}
        for number, site in enumerate(self.sites):
            for node in site.layers:
                found[node].append(number)
        return found

    def cuts(self, choices: Sequence[int]) -> Cuts:
        """What a choice vector cuts. Raises InputError where one cut excludes another, which costs infinity."""
        chosen = (self.drafts[site.name][index].cuts for site, index in zip(self.sites, choices, strict=True))
        return checked(self.graph, join(*chosen))

    def _table_operators(self) -> list[Operator]:
        found: list[Operator] = []
        for layer in self.graph.layers:
            whole, parts = self._blocks(self._touching[layer.node])
            for block in (whole, *parts):
                cuts = (self._cut(block, options) for options in self._combinations(block))
                found += [cut.operator(layer) for cut in cuts if _offered(layer, cut)]
        return found

    def _blocks(self, sites: list[int]) -> tuple[list[int], list[list[int]]]:
        """The sites of one layer's table, and none apart from it; or, where that would be too large, the sites that may
        drop the layer, and each other one together with those: what is dropped has no other change.
        """
        drops = [site for site in sites if self.sites[site].branch is not None]
        others = [site for site in sites if site not in drops]
        entries = prod(len(self.drafts[self.sites[site].name]) for site in others)
        return (sites, []) if entries <= LARGEST_TABLE else (drops, [[site, *drops] for site in others])

    def _combinations(self, sites: Sequence[int]) -> Iterable[tuple[int, ...]]:
        return product(*(range(len(self.drafts[self.sites[site].name])) for site in sites))

    def _cut(self, sites: Sequence[int], options: Sequence[int]) -> Cuts:
        names = [self.sites[site].name for site in sites]
        return join(*(self.drafts[name][option].cuts for name, option in zip(names, options, strict=True)))

    def _factors(self, layer: Layer, sites: list[int], value: Callable[[Cuts], float]) -> list[Factor]:
        """Tables of `value(cuts)` for one layer; where sites are apart, each adds only what its cut changes."""
        together, apart = self._blocks(sites)
        whole = self._table(together, value)
        changes = [Factor(tuple(block), self._table(block, value) - whole) for block in apart]
        return [*changes, Factor(tuple(together), whole)]

    def _table(self, sites: Sequence[int], value: Callable[[Cuts], float]) -> Floats:
        shape = [len(self.drafts[self.sites[site].name]) for site in sites]
        entries = [value(self._cut(sites, options)) for options in self._combinations(sites)]
        return np.array(entries, dtype=np.float64).reshape(shape)

    def cost(self, value: Callable[[Operator], float], whole: float) -> Sum:
        """A cost of all layers as a share of `whole`; what the layers do not explain of it is a constant.

        A layer that the engine cannot time (`value` is NaN) counts nothing; a cut that it cannot time costs infinity.
        """
        dense = sum(cost for layer in self.graph.layers if isfinite(cost := value(layer.operator)))
        if not whole or not dense:
            return Sum(1.0, ())
        scale = min(1.0, whole / dense) / whole
        constant, factors = max(0.0, whole - dense) / whole, []
        for layer in self.graph.layers:
            sites = self._touching[layer.node]
            if not sites:
                constant += scale * np.nan_to_num(value(layer.operator))
                continue
            for factor in self._factors(layer, sites, lambda cuts, layer=layer: _cost(layer, cuts, value)):  # type: ignore[misc]
                factors.append(Factor(factor.sites, np.nan_to_num(factor.table * scale, nan=np.inf, posinf=np.inf)))
        return _sum(float(constant), factors + self._clashes())

    def _clashes(self) -> list[Factor]:
        """Infinite where one site cuts or moves what another, which has groups or a mask, needs whole."""
        found = []
        for number, site in enumerate(self.sites):
            rigid = [bool(draft.cuts.rigid) for draft in self.drafts[site.name]]
            layer = self.graph.layer[site.node]
            reached = layer.inputs.atoms() | layer.outputs.atoms() if any(rigid) else ()
            makers = sorted({maker for atom in reached for maker in self._changing.get(atom, ())} - {number})
            for maker in makers:
                disturbing = [draft.cuts.disturbs(layer) for draft in self.drafts[self.sites[maker].name]]
                if any(disturbing):
                    found.append(Factor((maker, number), np.where(np.outer(disturbing, rigid), np.inf, 0.0)))
        return found

    @cached_property
    def _changing(self) -> Mapping[int, set[int]]:
        """The numbers of the sites that may cut an atom, or put it in another order."""
        found: dict[int, set[int]] = {}
        for number, site in enumerate(self.sites):
            for draft in self.drafts[site.name]:
                for atom in draft.cuts.kept:
                    found.setdefault(atom, set()).add(number)
        return found

    def error(self) -> Sum:
        """The relative errors of all layers, exact for each, weighted by what they do to the output, and added up."""
        factors = self._own_errors()
        for layer in self.graph.layers:
            sites = [number for number in self._touching[layer.node] if self._matters(self.sites[number], layer)]
            known = layer.node in self.statistics or layer.node in self.statistics.scores
            if known and any(self.sites[number].branch is None for number in sites):
                factors += self._factors(layer, sites, lambda cuts, layer=layer: self._weighted_error(layer, cuts))  # type: ignore[misc]
        return _sum(0.0, factors + self._uncalibrated(factors))

    def _own_errors(self) -> list[Factor]:
        """The estimates of patterns that have their own, those of a branch weighted as errors of its sum."""
        errors = {n: [draft.error for draft in self.drafts[site.name]] for n, site in enumerate(self.sites)}
        nodes = [site.branch.node if site.branch else site.node for site in self.sites]
        return [
            Factor((n,), self.statistics.weight(nodes[n]) * np.array([error or 0.0 for error in own]))
            for n, own in errors.items()
            if any(error is not None for error in own)
        ]

    def _matters(self, site: Site, layer: Layer) -> bool:
        """Whether the layer's own error depends on the site: what it reads is cut, or it may be dropped."""
        return site.branch is not None or self._reads(site, layer)

    def _reads(self, site: Site, layer: Layer) -> bool:
        if layer.widths:
            return site.atom in layer.widths[0].atoms()
        dense = layer.groups is None
        return site.kind == "kernel" or (dense and site.atom in layer.inputs.atoms())

    def _weighted_error(self, layer: Layer, cuts: Cuts) -> float:
        """The layer's error, by the weight of what is cut of it; where that is both kinds, by the mean."""
        kinds = [KERNEL] if layer.node in {*cuts.windows, *cuts.mixes} else []
        if layer.node in cuts.groups or (layer.groups is None and layer.inputs.atoms() & cuts.keep.keys()):
            kinds.append(CHANNELS)
        weights = [self.statistics.weight(layer.node, kind) for kind in kinds or [CHANNELS]]
        return sum(weights) / len(weights) * self._layer_error(layer, cuts)

    def _layer_error(self, layer: Layer, cuts: Cuts) -> float:
        if cuts.drops(layer):  # what the branch was worth is the branch's own error
            return 0.0
        if layer.widths:
            gone = torch.ones(layer.widths[0].size, dtype=torch.bool)
            gone[torch.from_numpy(layer.widths[0].kept(cuts.keep))] = False
            return score_error(self.statistics.scores[layer.node], gone)
        moments = self.statistics[layer.node]
        if layer.node in cuts.masks and cuts.fits(layer):  # else it costs infinity
            return self._loss(layer.node).masked(cuts.masks[layer.node])
        if layer.node in {*cuts.mixes, *cuts.groups}:
            return self._patches_error(layer, cuts)
        kept = kept_features(layer, cuts)
        if len(kept) == moments.second.shape[-1]:
            return 0.0
        return self._loss(layer.node).error(kept)

    def _patches_error(self, layer: Layer, cuts: Cuts) -> float:
        """The errors of the filters, each under its own patch; those of cut filters count as if they were kept."""
        patches, error, loss = cuts.patches(layer), 0.0, self._loss(layer.node)
        for patch in dict.fromkeys(patches):
            kept = patch_features(layer, patch, layer.inputs.kept(cuts.keep))
            errors = loss.errors(kept).reshape(-1)
            error += float(errors[torch.tensor([own == patch for own in patches])].sum())
        return error

    def _uncalibrated(self, factors: Sequence[Factor]) -> list[Factor]:
        """Sites that no calibrated layer reads: the share of units that goes is their error."""
        known = {site for factor in factors for site in factor.sites}
        missing = [number for number in range(len(self.sites)) if number not in known]
        return [
            Factor((n,), np.array([1 - draft.share for draft in self.drafts[site.name]]))
            for n in missing
            if (site := self.sites[n])
        ]

    def decisions(self, error: Sum, nodes: Mapping[str, int]) -> tuple[Decision, ...]:
        """The sites as agents see them; `nodes` numbers the nodes of the graph view."""
        dense = np.zeros((1, len(self.sites)), dtype=np.int64)
        result = []
        for number, site in enumerate(self.sites):
            layers, drafts = [self.graph.layer[node] for node in site.layers], self.drafts[site.name]
            options = []
            for draft, alone in zip(drafts, error.sweep(dense, number, len(drafts))[0].tolist(), strict=True):
                gain = self.profile.gain((x.operator for x in layers), (draft.cuts.operator(x) for x in layers))
                geometry = _bits(layers[0], draft.cuts) if site.kind == "kernel" else ()
                options.append(Option(draft.pattern, draft.level, draft.keep, draft.share, alone, gain, geometry))
            gone_with, importance = self._gone_with(number), tuple(self._importance(site).tolist())
            result.append(Decision(site.name, site.kind, nodes[site.node], tuple(options), gone_with, importance))
        return tuple(result)

    def _importance(self, site: Site) -> Floats:
        """How large the weights of each unit are; of a kernel's input channels, the mean of |weight| over the rest."""
        if site.atom >= 0:
            return magnitudes(self.graph, site.atom)
        if site.branch is not None:
            return np.zeros(0)
        weight = self.graph.exported.state_dict[self.graph.layer[site.node].weight].detach().double()
        return np.asarray(weight.abs().transpose(0, 1).flatten(1).mean(1).numpy())

    def _gone_with(self, number: int) -> tuple[int, ...]:
        """The numbers of earlier sites whose branch holds all that is decided at a site."""
        layers = frozenset(self.sites[number].layers)
        branches = enumerate(site.branch for site in self.sites[:number])
        return tuple(earlier for earlier, branch in branches if branch and layers and layers <= branch.inside)


def _sum(constant: float, factors: Sequence[Factor]) -> Sum:
    """A sum in which what depends on no site is in the constant."""
    fixed = sum(float(factor.table) for factor in factors if not factor.sites)
    return Sum(constant + fixed, tuple(factor for factor in factors if factor.sites))


def _offered(layer: Layer, cuts: Cuts) -> bool:
    """Not cuts that exclude another; nor a mix that loses filters too: its parts would be no whole blocks, and slow."""
    return cuts.fits(layer) and (layer.node not in cuts.mixes or not layer.outputs.atoms() & cuts.keep.keys())


def _cost(layer: Layer, cuts: Cuts, value: Callable[[Operator], float]) -> float:
    return value(cuts.operator(layer)) if _offered(layer, cuts) else np.inf


def kept_features(layer: Layer, cuts: Cuts) -> torch.Tensor:
    """The features (channel-major unfolded inputs, in each group) of a layer that stay."""
    assert isinstance(layer.operator, Weighted)
    height, width = layer.operator.kernel
    inputs = layer.operator.inputs // layer.operator.groups
    channels = layer.inputs.kept(cuts.keep) if layer.groups is None else np.arange(inputs)
    window = cuts.windows.get(layer.node, ((0, height), (0, width)))
    return patch_features(layer, (*window, (0, inputs)), channels)


def patch_features(layer: Layer, patch: Patch, channels: Indices) -> torch.Tensor:
    """The features of a layer that a filter with this patch reads, of those on some channels."""
    assert isinstance(layer.operator, Weighted)
    height, width = layer.operator.kernel
    (top, bottom), (left, right), (first, last) = patch
    taps = np.arange(height * width).reshape(height, width)[top:bottom, left:right].reshape(-1)
    inside = channels[(channels >= first) & (channels < last)]
    return torch.from_numpy((inside[:, None] * (height * width) + taps[None, :]).reshape(-1))


def _bits(layer: Layer, cuts: Cuts) -> tuple[float, ...]:
    """What is kept of a kernel as 3x3 bits, each the share of weights kept; larger ones at their edges and middle."""
    operator = layer.operator
    assert isinstance(operator, Weighted)
    if layer.node in cuts.masks:
        return (round(float(cuts.masks[layer.node].mean()), 3),) * 9
    height, width = operator.kernel
    window = cuts.windows.get(layer.node, ((0, height), (0, width)))
    patches = cuts.patches(layer) or ((*window, (0, operator.inputs // operator.groups)),)
    kept = np.zeros((height, width))
    for (top, bottom), (left, right), (first, last) in patches:
        kept[top:bottom, left:right] += (last - first) * operator.groups / operator.inputs / len(patches)
    rows = (0, height // 2, height - 1)
    columns = (0, width // 2, width - 1)
    return tuple(round(float(kept[row, column]), 3) for row in rows for column in columns)
