"""A seeded stretch of code that leaves the caller's random state as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators (augmentations and dropout draw from them) for a while."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - other people's transforms use it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def derive(seed: int, index: int) -> int:
    """An independent seed for part `index` of a run (an epoch, a batch)."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
