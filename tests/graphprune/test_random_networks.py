"""Masked equivalence for random networks and random plans."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphprune.tracing import trace
from tests.graphprune.oracle import check_masked_equivalence, random_plan, scramble
from tests.graphprune.random_networks import networks

INPUTS = [torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]


@given(networks(), st.integers(0, 2**16), st.sampled_from([0.4, 1.0]))
def test_masked_equivalence(model: nn.Module, seed: int, share: float) -> None:
    model = scramble(model, seed)
    graph = trace(model, INPUTS)
    plan = random_plan(graph, np.random.default_rng(seed), groups=share, kernels=share)
    check_masked_equivalence(model, graph, plan, INPUTS)
