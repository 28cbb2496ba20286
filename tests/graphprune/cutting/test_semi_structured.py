"""Masked linear layers for a CUDA device: which ones, what is refused, and, where there is one, that they agree."""

import pytest
import torch
from torch import nn

from graphprune.cutting.semi_structured import CAPABILITY, accelerate, is_two_to_four, suitable
from graphprune.errors import InputError

SPARSE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY


def halved(layer: nn.Linear) -> nn.Linear:
    """The layer without its first two inputs of each four."""
    with torch.no_grad():
        layer.weight.reshape(-1, 4)[:, :2] = 0
    return layer


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [halved(nn.Linear(128, 64)), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), halved(nn.Linear(96, 32))]
    return nn.Sequential(*layers, halved(nn.Linear(32, 16)), nn.Conv2d(4, 4, 1))


def test_at_most_two_of_four() -> None:
    assert is_two_to_four(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]]))
    assert not is_two_to_four(torch.tensor([[1.0, 0, 3, 2]]))
    assert not is_two_to_four(torch.tensor([[0.0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]]).roll(-1))
    assert not is_two_to_four(torch.zeros(2, 6))


def test_suitable_are_masked_layers_of_a_shape_that_the_kernels_take() -> None:
    assert list(suitable(network())) == ["0"]


def test_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"need float16 or bfloat16, not torch\.float32"):
        accelerate(network(), torch.float32)
    with pytest.raises(InputError, match="no linear layer has 2:4 zeros"):
        accelerate(nn.Linear(128, 64))


@pytest.mark.skipif(SPARSE, reason="there is a device with 2:4 kernels")
def test_without_a_device_it_is_refused() -> None:
    with pytest.raises(InputError, match="need a CUDA device"):
        accelerate(network())


def test_suitable_layers_are_converted_in_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the kernels: the conversion notes what it gets, and the device is the CPU."""
    converted = []
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, device, dtype: to(self, "cpu", dtype))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: CAPABILITY)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda x: converted.append(x.shape) or x.clone())
    model = network().train()
    fast = accelerate(model, torch.bfloat16)
    assert converted == [(64, 128)]
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.skipif(not SPARSE, reason="no CUDA device with 2:4 kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_device_it_computes_what_the_dense_weights_do(dtype: torch.dtype) -> None:
    model = network()[:3]
    fast = accelerate(model, dtype)
    assert isinstance(fast[0].weight, torch.sparse.SparseSemiStructuredTensor)
    x = torch.randn(24, 128)
    with torch.no_grad():
        found, expected = fast(x.to("cuda", dtype)).float().cpu(), model(x)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
