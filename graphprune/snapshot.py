"""The state of a training run on disk: one safetensors file, tensors beside a JSON header, replaced as a whole."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune import atomic
from graphprune.errors import InputError

HEADER = "graphprune.training"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything a run needs to go on after epoch `facts["epoch"]` as if it had never stopped.

    No random state is kept: each epoch seeds its generators from the run's seed and its own number.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def write(self, path: Path) -> None:
        """Replace the file. Raises InputError, and leaves the old file as it was, when the disk refuses."""
        stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        atomic.write_bytes(path, save(stored, {HEADER: json.dumps(self.facts, sort_keys=True)}))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InputError when the file is truncated or no snapshot."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[HEADER])
                return cls({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is not a complete training snapshot: {error}") from None

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix` and a dot, without both."""
        start = f"{prefix}."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a module, under `prefix`."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors back into a module. Raises InputError when they are those of another network."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in tensors.items()}:
        raise InputError("the training snapshot is of another network")
    module.load_state_dict(tensors)


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's tensors, named `optimizer.<parameter>.<name>`, and the rest of its state as JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"state": scalars, "groups": state["param_groups"]}


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """The inverse of `optimizer_state` (tensors without the prefix); the optimiser is a fresh one of the same kind."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        same = tensor.shape == parameter.shape  # then in the same memory layout too, so that sums round as they did
        state.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(tensor) if same else tensor
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
