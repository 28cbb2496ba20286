"""Masked linear layers on a CUDA device: 2:4 weights in torch's compressed form, for the sparse tensor cores.

Not measured yet: no result in `benchmarks/results/` is from a GPU. Time your model dense and sparse before you rely on
it; small layers may well become slower.
"""

import warnings

import torch
from torch import Tensor, nn

from graphprune.coupling.tracing import copied
from graphprune.errors import InputError

ROWS, COLUMNS = 32, 64
"""Outputs and inputs must be multiples of these for CUTLASS's kernels in half precision; cuSPARSELt asks for less."""
CAPABILITY = (8, 0)
"""The first devices with sparse tensor cores (Ampere)."""


def is_two_to_four(weight: Tensor) -> bool:
    """Whether a weight [outputs, inputs] has at most 2 that are not zero in each 4 consecutive inputs."""
    return weight.shape[1] % 4 == 0 and bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def suitable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers, by path, whose weights are 2:4 and of a shape that the kernels take."""
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        path: module for path, module in linear.items()
        if module.out_features % ROWS == module.in_features % COLUMNS == 0 and is_two_to_four(module.weight)
    }  # fmt: skip


def accelerate(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A copy on the CUDA device, in half precision and for inference, whose masked linear layers run on sparse kernels.

    `dtype` is float16 or bfloat16; inputs must be of it. The weights of `suitable` layers become semi-structured sparse
    tensors; everything else, masked 1x1 convolutions too, is computed dense. Raises InputError where no layer is
    suitable, for another type, and where there is no CUDA device with sparse tensor cores.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"sparse kernels need float16 or bfloat16, not {dtype}")
    if not suitable(model):
        raise InputError(f"no linear layer has 2:4 zeros, outputs in multiples of {ROWS} and inputs of {COLUMNS}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        raise InputError("2:4 kernels need a CUDA device of compute capability 8.0 or more")
    fast = copied(model).eval().requires_grad_(False).to("cuda", dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning)
        for module in suitable(fast).values():
            sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(sparse, requires_grad=False)
    return fast
