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

from graphprune.errors import InputError
from graphprune.files import atomic

HEADER = "graphprune.training.training"


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
    """An optimiser's tensors, named `optimizer.<state or groups>.<index>.<name>`, and its other values for JSON."""
    whole = optimizer.state_dict()
    entries = {"state": whole["state"], "groups": dict(enumerate(whole["param_groups"]))}
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {part: {str(index): {} for index in values} for part, values in entries.items()}
    for part, values in entries.items():
        for index, entry in values.items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{part}.{index}.{name}"] = value
                else:
                    rest[part][str(index)][name] = value
    return tensors, rest


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """The inverse of `optimizer_state` (tensors without the prefix); the optimiser is a fresh one of the same kind."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {part: {int(index): dict(entry) for index, entry in values.items()} for part, values in rest.items()}
    for key, tensor in tensors.items():
        part, index, name = key.split(".", 2)
        entries[part][int(index)][name] = _laid_out(tensor, parameters[int(index)]) if part == "state" else tensor
    groups = [entries["groups"][index] for index in sorted(entries["groups"])]
    optimizer.load_state_dict({"state": entries["state"], "param_groups": groups})


def _laid_out(tensor: Tensor, owner: Tensor) -> Tensor:
    """A tensor of the owner's shape in the owner's memory layout too, so that sums over both round as they did."""
    return torch.empty_like(owner).copy_(tensor) if tensor.shape == owner.shape else tensor
