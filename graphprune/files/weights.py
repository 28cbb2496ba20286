"""Trained weights from a safetensors file, checked before the model is touched."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphprune.errors import InputError


def load_weights(model: nn.Module, path: Path) -> None:
    """Load every tensor of the file into the model of the same names and shapes.

    Raises InputError when the file is missing, truncated or no safetensors file, when names are missing or unexpected,
    when a shape differs, or when a value is NaN; the model is then unchanged. Batch norm's counters may be missing.
    """
    tensors = read_tensors(path)
    own = model.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    if missing:
        raise InputError(f"{path} lacks weights of the model: {_first(missing)}")
    if unexpected := [name for name in tensors if name not in own]:
        raise InputError(f"{path} holds weights the model does not have: {_first(unexpected)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise InputError(f"{path}: {name} has shape {list(tensor.shape)}, the model {list(own[name].shape)}")
    require_numbers(tensors, str(path))
    model.load_state_dict(tensors, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises InputError when it is missing, truncated or something else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no weights file {path}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {error}") from None
    return tensors


def require_numbers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError if a tensor holds NaN; `source` says in the message where the tensors are from."""
    broken = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and bool(torch.isnan(tensor).any())
    ]
    if broken:
        raise InputError(f"{source} has NaN in {_first(broken)}")


def _first(names: Iterable[str], count: int = 3) -> str:
    listed = list(names)
    rest = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + rest
