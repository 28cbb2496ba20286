"""FLOPs and parameters counted on a module itself, by running it: never by a formula over ratios."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graphprune.errors import InputError
from graphprune.tasks.task import evaluating


@dataclass(frozen=True)
class Counts:
    """`flops` are multiply-adds x 2 of one forward pass at batch 1; `params` elements of all distinct parameters."""

    flops: int
    params: int


def count(model: nn.Module, example_inputs: torch.Tensor | Sequence[torch.Tensor]) -> Counts:
    """Count a model: convolutions and matrix products, those inside attention included, as torch's own counter does.

    `example_inputs` is a tensor or a tuple of tensors with a leading batch axis of any size, of which the first
    example is run on the model's device. The model is left as it was. Raises InputError where it does not accept them.
    """
    params = sum(parameter.numel() for parameter in model.parameters())
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    first = [x[:1].to(device) if x.dim() else x.to(device) for x in inputs]
    counter = FlopCounterMode(display=False)
    try:
        with evaluating(model), _countable(), torch.no_grad(), counter:
            model(*first)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in first)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the model does not accept an input of shape {shapes}: {reason}") from error
    return Counts(int(counter.get_total_flops()), params)


@contextmanager
def _countable() -> Iterator[None]:
    """No fused attention: some fused operators, torch's own encoder layer among them, are unknown to the counter."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
