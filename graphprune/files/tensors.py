"""All tensors of a module as safetensors bytes and back, bit for bit; shared ones are stored once."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from graphprune.errors import InputError
from graphprune.files.weights import read_tensors


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names, buffers that a state dict leaves out too."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def to_bytes(model: nn.Module) -> bytes:
    """The module's tensors in the safetensors format.

    A tensor with several names is stored under the first; the file's metadata maps the others to it, as
    `safetensors.torch.save_model` does. Raises InputError where a module has state that is no tensor.
    """
    if extra := [name for name in model.state_dict() if name.endswith("_extra_state")]:
        raise InputError(f"{extra[0].removesuffix('_extra_state') or 'the model'} keeps state that is no tensor")
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if (owner := first.setdefault(id(tensor), name)) != name:
            aliases[name] = owner
        else:  # a clone, because the format refuses tensors that are views of one memory
            stored[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        data: bytes = save(stored, metadata=aliases or None)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"the model's tensors cannot be saved: {str(error).splitlines()[0]}") from error
    return data


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `to_bytes` made, under each of their names. Raises InputError, one line."""
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        aliases = file.metadata() or {}
    return tensors | {alias: tensors[name] for alias, name in aliases.items() if name in tensors}


def convert_types(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model's floating-point tensors the types of those of the same name."""
    for name, own in named_tensors(model).items():
        if name in tensors and own.is_floating_point():
            own.data = own.data.to(tensors[name].dtype)


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model, bit for bit. Raises InputError unless names, shapes and sharing agree exactly."""
    own = named_tensors(model)
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise InputError(f"the saved tensors are not those of the rebuilt model: {odd[0]!r} is only in one of them")
    filled: dict[int, Tensor] = {}
    for name, target in own.items():
        source = tensors[name]
        if target.shape != source.shape:
            raise InputError(f"{name!r} has shape {list(source.shape)} in the file, {list(target.shape)} in the model")
        if filled.setdefault(id(target), source) is not source and not torch.equal(filled[id(target)], source):
            raise InputError(f"{name!r} shares its values with another tensor in the model, but not in the file")
    for name, target in own.items():
        target.data = tensors[name].clone()
