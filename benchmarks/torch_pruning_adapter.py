"""Torch-Pruning 1.6 as its documentation uses it, for comparison at equal latency (extra `bench`).

The classifier is ignored, the model is traced with example inputs, and importance is that of the groups; Taylor
importance reads the gradients of the training loss over a few batches.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from graphprune.task import Batch, Task

GRADIENT_BATCHES = 10


@dataclass(frozen=True)
class Setting:
    """One way to use it."""

    importance: str
    global_pruning: bool
    round_to: int | None

    @property
    def name(self) -> str:
        """How a row of results calls it."""
        scope = "global" if self.global_pruning else "uniform"
        return f"torch-pruning {self.importance} {scope} round_to {self.round_to or 'none'}"


def settings() -> Iterator[Setting]:
    """Both importances, uniform and global, with channels in whole engine blocks and without."""
    for importance, scope, round_to in product(("magnitude", "taylor"), (False, True), (16, None)):
        yield Setting(importance, scope, round_to)


@dataclass(frozen=True)
class TorchPruning:
    """A dense model, and the gradients [as its parameters] that Taylor importance reads."""

    dense: nn.Module
    example: Tensor
    gradients: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, dense: nn.Module, task: Task) -> "TorchPruning":
        """Take the gradients over the first training batches; the dense model is untouched."""
        assert task.train is not None, "Taylor importance needs labelled training data"
        batches = list(islice(task.train(0), GRADIENT_BATCHES))
        return cls(dense, task.example_inputs[0], _gradients(dense, batches))

    def prune(self, setting: Setting, ratio: float) -> nn.Module:
        """A pruned copy in evaluation mode, with the weights that are left."""
        model = copy.deepcopy(self.dense).eval()
        for parameter, gradient in zip(model.parameters(), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        importances = {
            "magnitude": torch_pruning.importance.MagnitudeImportance(p=2),
            "taylor": torch_pruning.importance.TaylorImportance(),
        }
        pruner = torch_pruning.pruner.BasePruner(
            model,
            self.example,
            importance=importances[setting.importance],
            global_pruning=setting.global_pruning,
            pruning_ratio=ratio,
            ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)],
            round_to=setting.round_to,
        )
        pruner.step()
        model.zero_grad(set_to_none=True)
        return model.eval()


def halve(model: nn.Module, example: Tensor, ratio: float, round_to: int) -> nn.Module:
    """A copy with a share of the channels of every group gone, by magnitude; the output layers are ignored.

    Heads of fused attention are followed as the examples for timm's transformers do.
    """
    pruned = copy.deepcopy(model).eval()
    pruner = halving_pruner(pruned, example, ratio, round_to)
    pruner.step()
    for module in _fused_attention(pruned):
        module.num_heads = pruner.num_heads[module.qkv]
        module.attn_dim = module.qkv.out_features // 3  # timm has had this attribute since those examples
        module.head_dim = module.attn_dim // module.num_heads
    return pruned


def halving_pruner(model: nn.Module, example: Tensor, ratio: float, round_to: int) -> torch_pruning.pruner.BasePruner:
    """A pruner of the model itself, its dependency graph built; heads of fused attention are given to it."""
    outputs = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1:]
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=outputs,
        round_to=round_to,
        num_heads={module.qkv: module.num_heads for module in _fused_attention(model)},
        prune_num_heads=False,
        prune_head_dims=True,
    )


def _fused_attention(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Linear) and hasattr(m, "num_heads")]


def _gradients(dense: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor | None, ...]:
    model = copy.deepcopy(dense).eval()
    for inputs, targets in batches:
        assert targets is not None
        torch.autograd.backward(functional.cross_entropy(model(inputs), targets) / len(batches))
    return tuple(parameter.grad for parameter in model.parameters())
