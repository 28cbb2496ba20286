"""Masked equivalence for random networks and random plans."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.coupling.tracing import trace
from tests.graphprune.oracle import check_masked_equivalence, random_plan, scramble
from tests.graphprune.random_networks import BLOCKS, networks

INPUTS = [torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
EACH = max(1, settings().max_examples // 5)
"""Networks for every one of the 20 blocks: 100 in all in CI, 2,000 at night."""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=EACH)
@given(data=st.data())
def test_masked_equivalence(block: str, data: st.DataObject) -> None:
    seed, share = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from([0.4, 1.0]))
    model = scramble(data.draw(networks(block)), seed)
    graph = trace(model, INPUTS)
    plan = random_plan(graph, np.random.default_rng(seed), groups=share, kernels=share)
    check_masked_equivalence(model, graph, plan, INPUTS)
