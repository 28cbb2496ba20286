"""What may be tried at the sites of a model, and the operators that have to be timed for it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.operators import Convolution, Linear
from graphprune.coupling.tracing import trace
from graphprune.engines.fake import FakeEngine
from graphprune.patterns.filter import Filter
from graphprune.patterns.kernel import Kernel
from graphprune.timing.cases import cases, legal_cases, operators
from graphprune.timing.profile import Profile
from tests.graphprune import tiny

BOTH = [Filter(), Kernel()]


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    """Two 3x3 convolutions of 32 channels and a classifier."""
    return trace(tiny.network(), torch.zeros(2, 3, 16, 16))


def test_every_level_of_every_pattern_is_a_case(graph: ModelGraph) -> None:
    found = [(case.site.name, case.level.name) for case in cases(graph, BOTH, 16)]
    kernels = [level.name for level in Kernel().levels(graph.site["0.0/kernel"], 16)]
    assert sorted(found) == sorted(
        [("0.0/channels", "16 of 32"), ("1.0/channels", "16 of 32")]
        + [(site, name) for site in ("0.0/kernel", "1.0/kernel") for name in kernels]
    )


def test_a_case_knows_what_becomes_of_its_layers(graph: ModelGraph) -> None:
    case = next(case for case in cases(graph, BOTH, 16) if case.site.name == "0.0/channels")
    first, second = case.dense
    assert isinstance(first, Convolution)
    assert isinstance(second, Convolution)
    assert case.cut == (replace(first, outputs=16), replace(second, inputs=16))


def test_all_operators_are_listed_once(graph: ModelGraph) -> None:
    twins = trace(nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))), torch.zeros(2, 32, 8, 8))
    assert len(operators(twins, [Kernel()], 16)) == 1 + len(Kernel().levels(twins.site["0/kernel"], 16))
    found = operators(graph, BOTH, 16)
    wanted = {o for case in cases(graph, BOTH, 16) for o in (*case.dense, *case.cut)}
    assert set(found) == wanted | {layer.operator for layer in graph.layers}
    assert Linear(1, 16, 4) in found


def test_legal_cases_are_those_of_the_patterns(graph: ModelGraph, tmp_path: Path) -> None:
    profile = Profile(FakeEngine(), tmp_path / "timings.jsonl")
    found = list(legal_cases(cases(graph, BOTH, 16), graph, profile))
    assert found
    for pattern in BOTH:
        for site in graph.all_sites:
            own = [case.level for case in found if case.site == site and case.pattern is pattern]
            assert tuple(own) == pattern.legal(graph, site, profile)
    idle = Profile(tiny.Weighted(factor=0), tmp_path / "idle.jsonl")
    assert list(legal_cases(cases(graph, BOTH, 16), graph, idle)) == []
