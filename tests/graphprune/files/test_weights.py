"""Weights files: what fits is loaded bit for bit, what does not leaves the model as it was."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphprune import models
from graphprune.errors import InputError
from graphprune.files.weights import load_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def stored(tmp_path: Path, **changes: Tensor | None) -> Path:
    """The weights of a new network as a file, with tensors replaced, added or (None) left out."""
    tensors = network().state_dict() | {name.replace("_", ".", 1): tensor for name, tensor in changes.items()}
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_created_with_weights_equals_the_source(tmp_path: Path) -> None:
    source = models.create("cifar:resnet20?num_classes=4")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = models.create("cifar:resnet20?num_classes=4", weights=tmp_path / "w.safetensors")
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_batch_norm_counters_may_be_missing(tmp_path: Path) -> None:
    model = network()
    path = stored(tmp_path, **{"1_num_batches_tracked": None})
    load_weights(model, path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in load_file(path).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0_weight": None, "2_bias": None}, "lacks weights of the model: 0.weight, 2.bias"),
        ({"9_weight": torch.zeros(1)}, "the model does not have: 9.weight"),
        ({"0_weight": torch.zeros(4, 2)}, r"0.weight has shape \[4, 2\], the model \[4, 3\]"),
        ({"0_weight": torch.full((4, 3), torch.nan)}, "NaN in 0.weight"),
    ],
)
def test_wrong_weights(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_weights(model, stored(tmp_path, **changes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = stored(tmp_path).read_bytes()
    short = tmp_path / "short.safetensors"
    for length in [0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        short.write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a complete safetensors file"):
            load_weights(network(), short)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no weights file"):
        load_weights(network(), tmp_path / "none.safetensors")
    torch.save(network().state_dict(), tmp_path / "model.pth")
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_weights(network(), tmp_path / "model.pth")
