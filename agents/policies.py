"""Policies as files: weights that fit every problem, whatever its size, kept as safetensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from graphprune.errors import InputError
from graphprune.randomness import seeded

Weights = dict[str, Tensor]


@contextmanager
def reproducible(rng: np.random.Generator) -> Iterator[None]:
    """Make what is computed here depend on `rng` alone, and put everything back afterwards.

    SB3 and torch draw from the global generators. Several threads would add up gradients in the order in which they
    come, and a search that rounds differently soon takes another way; networks this small are no slower on one.
    """
    threads = torch.get_num_threads()
    with seeded(int(rng.integers(2**31))):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class Learner:
    """An agent with a policy. `load_policy` before `run` starts from the weights of an earlier run, on any model."""

    def __init__(self) -> None:
        self._weights: Weights | None = None

    def save_policy(self, path: str | Path) -> None:
        """Write the weights as safetensors. Raises InputError before the first run."""
        if self._weights is None:
            raise InputError("the agent has no policy yet: run it, or load one")
        Path(path).write_bytes(save(self._weights))

    def load_policy(self, path: str | Path) -> None:
        """Read weights that `save_policy` wrote. Raises InputError if the file is not such a policy."""
        self._weights = read_policy(path)


def read_policy(path: str | Path) -> Weights:
    """Weights from a file. Raises InputError if it is no safetensors file."""
    try:
        weights: Weights = load(Path(path).read_bytes())  # not mapped: the file may change under a run
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read a policy from {path}: {error}") from None
    return weights


def weights_of(policy: nn.Module) -> Weights:
    """A copy of a policy's parameters."""
    return {name: value.detach().clone().contiguous() for name, value in policy.state_dict().items()}


def adopt(policy: nn.Module, weights: Weights) -> None:
    """Give a policy the weights of another. Raises InputError if it has other parameters."""
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the policy does not fit this version: {str(error).splitlines()[-1].strip()}") from None
