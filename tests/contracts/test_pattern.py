"""What every pattern must do. A new pattern joins by its name in the registry; some network must have its sites."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph, Site
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import resolve
from graphprune.cutting.surgery import example_inputs, operate
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.onnx_files.surgery import OnnxSurgeon
from graphprune.pattern import Level, Pattern, Scores
from graphprune.plan import Choice, Plan
from graphprune.registry import pattern as pattern_called
from graphprune.registry import patterns
from graphprune.timing.profile import Profile
from tests.graphprune.networks import NETWORKS, Tensors
from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble
from tests.graphprune.tiny import Weighted

EVERY = sorted(patterns())
NAMES = (
    "vgg",
    "chain",
    "squeeze_excite",
    "swiglu_packed",
    "swiglu_apart",
    "attention_fused",
    "attention_apart",
    "vit_tiny",
)
EXCLUSIVE = ("n-of-m",)
"""Patterns whose units exclude each other, so that nobody can keep them all."""
BLOCK = 4
"""The small networks have few channels: blocks of 4 leave them several levels."""


@dataclass(frozen=True)
class Network:
    """A scrambled network with its graph; double precision unless it is to be exported."""

    model: nn.Module
    graph: ModelGraph
    inputs: Tensors
    name: str

    def plan(self, site: Site, pattern: Pattern, level: Level, keep: tuple[int, ...]) -> Plan:
        """One choice at one site."""
        return Plan(self.graph.signature, (Choice(site.name, pattern.name, level.name, keep),), self.graph.inputs)


@cache
def network(name: str, dtype: torch.dtype = torch.float64) -> Network:
    """A network of the tests, traced once."""
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, typed = scramble(build(), dtype=dtype), tuple(x.to(dtype) for x in inputs)
    return Network(model, trace(model, typed), typed, name)


def places(pattern: Pattern, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Network, Site]]:
    """Up to two sites of each small network at which the pattern may be used and has a level."""
    for name in NAMES:
        net = network(name, dtype)
        fitting = (site for site in net.graph.all_sites if site.kind in pattern.kinds and pattern.levels(site, BLOCK))
        yield from ((net, site) for site, _ in zip(fitting, range(2), strict=False))


def kept(pattern: Pattern, site: Site, level: Level) -> tuple[int, ...]:
    """What the pattern keeps with scores that differ and have no order."""
    return pattern.choose(site, level, random_scores(pattern, site, site.size))


def random_scores(pattern: Pattern, site: Site, seed: int) -> Scores:
    """Distinct scores, of units, of the patches of each filter or of the weights."""
    shape = pattern.scored(site)
    scores = np.random.default_rng(seed).permutation(np.prod(shape))
    return scores.reshape(shape).astype(np.float64)


def cases(pattern: Pattern) -> Iterator[tuple[Network, Site, Level, tuple[int, ...]]]:
    """Every level at every place."""
    for net, site in places(pattern):
        for level in pattern.levels(site, BLOCK):
            yield net, site, level, kept(pattern, site, level)


@pytest.fixture(params=EVERY)
def pattern(request: pytest.FixtureRequest) -> Pattern:
    return patterns()[request.param]


def test_name_is_the_key_and_some_network_has_its_sites(pattern: Pattern) -> None:
    assert pattern_called(pattern.name) is pattern
    assert list(places(pattern)), "add a network that has this pattern's sites to NAMES"


def test_levels_keep_something_and_cut_something(pattern: Pattern) -> None:
    for _, site in places(pattern):
        levels = pattern.levels(site, BLOCK)
        assert len({level.name for level in levels}) == len(levels)
        for level in levels:
            assert 0 <= level.count < pattern.units(site)
            assert level.count or site.branch, "only a branch can be cut to nothing"
            assert level.keep in ((), tuple(sorted(set(level.keep))))
            assert not level.keep or len(level.keep) == level.count


def test_choose_takes_the_highest_scores_or_the_fixed_units(pattern: Pattern) -> None:
    for _, site in places(pattern):
        scores = random_scores(pattern, site, 1)
        for level in pattern.levels(site, BLOCK):
            chosen = pattern.choose(site, level, scores)
            assert len(chosen) == level.count
            if scores.ndim > 1:
                continue  # a pattern that scores patches or weights has a test of its own for what it chooses
            highest = {unit for unit in range(site.size) if (scores > scores[unit]).sum() < level.count}
            assert list(chosen) == sorted(set(chosen))
            assert set(chosen) == (set(level.keep) if level.keep else highest)


def test_equal_scores_are_broken_in_order(pattern: Pattern) -> None:
    for _, site in places(pattern):
        for level in pattern.levels(site, BLOCK):
            first = pattern.sample(site, level) if len(pattern.scored(site)) > 1 else tuple(range(level.count))
            assert pattern.choose(site, level, 0 * random_scores(pattern, site, 0)) == (level.keep or first)


def test_the_pruned_network_is_the_masked_one(pattern: Pattern) -> None:
    effects = []
    for net, site, level, keep in cases(pattern):
        plan = net.plan(site, pattern, level, keep)
        operation = operate(net.model, net.graph, plan)
        expected = masked_outputs(net.graph, plan, net.model, net.inputs)
        assert relative_error(outputs_of(operation.model, net.inputs), expected) < 1e-10, plan
        effects.append(relative_error(expected, outputs_of(net.model, net.inputs)))
    assert np.median(effects) > 1e-3, "most masks change nothing: these cases prove nothing"


def test_the_layers_become_the_operators_that_were_timed(pattern: Pattern) -> None:
    for net, site, level, keep in cases(pattern):
        plan = net.plan(site, pattern, level, keep)
        cuts = resolve(net.graph, plan)
        pruned = trace(operate(net.model, net.graph, plan).model, net.inputs)
        operators = [cuts.operator(layer) for layer in net.graph.layers]
        assert sum(operator.flops for operator in operators) == pruned.flops <= net.graph.flops
        assert (pruned.flops == net.graph.flops) == bool(pattern.refusal(None)), "a mask cuts no FLOPs, all others do"
        assert sum(operator.parameters for operator in operators) == pruned.parameter_count
        changed = {layer.node for layer in net.graph.layers if cuts.operator(layer) != layer.operator}
        assert changed == set(site.layers)
        break  # a trace takes long; the first case of each pattern


def test_the_exported_network_agrees(pattern: Pattern) -> None:
    net, site = next(places(pattern, torch.float32))
    for level in pattern.levels(site, BLOCK)[:2]:
        plan = net.plan(site, pattern, level, kept(pattern, site, level))
        pruned = operate(net.model, net.graph, plan).model
        exported = onnx_bytes(pruned, net.inputs)
        name = onnx.load_from_string(exported).graph.input[0].name
        (found,) = OnnxRuntimeEngine().run(exported, {name: net.inputs[0].numpy()})
        assert relative_error([torch.from_numpy(found)], masked_outputs(net.graph, plan, net.model, net.inputs)) < 1e-4


@cache
def surgeon(name: str) -> OnnxSurgeon:
    """What cuts the ONNX graph of a network, in single precision."""
    return OnnxSurgeon(network(name, torch.float32).graph)


def test_surgery_on_the_dense_onnx_graph_agrees(pattern: Pattern) -> None:
    """With the dense weights and with others, at batch 1 and 3; no cut of a pattern is refused."""
    for net, site in places(pattern, torch.float32):
        for level in pattern.levels(site, BLOCK)[:3]:
            plan = net.plan(site, pattern, level, kept(pattern, site, level))
            pruned = operate(net.model, net.graph, plan).model
            files = [(copy.deepcopy(pruned), surgeon(net.name).cut(resolve(net.graph, plan)))]
            state = scramble(pruned, 1, torch.float32).state_dict()
            files.append((pruned, surgeon(net.name).cut(resolve(net.graph, plan), state)))
            for (expected, data), batch in product(files, (1, 3)):
                (inputs,) = example_inputs(net.graph.inputs, batch)
                name = onnx.load_from_string(data).graph.input[0].name
                (found,) = OnnxRuntimeEngine().run(data, {name: inputs.numpy()})
                assert relative_error([torch.from_numpy(found)], outputs_of(expected, [inputs])) < 1e-4, plan


def test_keeping_all_units_changes_nothing(pattern: Pattern) -> None:
    for net, site in places(pattern):
        if pattern.name in EXCLUSIVE:
            continue
        everything = tuple(range(pattern.units(site)))
        plan = net.plan(site, pattern, Level("all", len(everything)), everything)
        cuts = resolve(net.graph, plan)
        assert all(cuts.operator(layer) == layer.operator for layer in net.graph.layers)
        model = operate(net.model, net.graph, plan).model
        before, after = net.model.state_dict(), model.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert relative_error(outputs_of(model, net.inputs), outputs_of(net.model, net.inputs)) < 1e-14


def profile(factor: int, cache: Path) -> Profile:
    """A profile of that engine; its block is `BLOCK`."""
    made = Profile(Weighted(block=1, factor=factor, sparse_kernels=True), cache)
    made.__dict__["block"] = BLOCK
    return made


def test_legal_where_the_engine_gains_and_nowhere_else(pattern: Pattern, tmp_path: Path) -> None:
    net, site = next(places(pattern))
    anywhere = tuple(level for level in pattern.levels(site, BLOCK) if not level.count)  # what is gone takes no time
    assert pattern.legal(net.graph, site, profile(0, tmp_path / "cache")) == anywhere
    assert pattern.legal(net.graph, site, profile(1_000_000, tmp_path / "cache")) == pattern.levels(site, BLOCK)


def test_illegal_and_refused_at_sites_of_another_kind(pattern: Pattern, tmp_path: Path) -> None:
    fine = profile(1_000_000, tmp_path / "cache")
    others = [
        (net, site)
        for net in map(network, ("vgg", "vit_tiny"))
        for site in net.graph.all_sites
        if site.kind not in pattern.kinds
    ]
    assert len({site.kind for _, site in others}) >= 2
    for net, site in others:
        assert pattern.legal(net.graph, site, fine) == ()
        with pytest.raises(InputError, match=f"pattern '{pattern.name}' does not apply"):
            resolve(net.graph, net.plan(site, pattern, Level("some", 1), (0,)))


def test_units_that_are_not_there_are_refused(pattern: Pattern) -> None:
    net, site = next(places(pattern))
    units = pattern.units(site)
    with pytest.raises(InputError, match=f"has {units} units, the plan keeps number {units}"):
        resolve(net.graph, net.plan(site, pattern, Level("some", 1), (units,)))
    with pytest.raises(InputError, match="has no site"):
        resolve(net.graph, net.plan(replace(site, name="nowhere"), pattern, Level("some", 1), (0,)))


def test_unknown_pattern() -> None:
    known = "block, filter, groups, heads, hidden, kernel, kernel-mix, n-of-m, width"
    with pytest.raises(InputError, match=f"unknown pattern 'magic'; known are {known}"):
        pattern_called("magic")
