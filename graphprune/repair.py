"""Repair of a cut model without training: closed-form weights, and batch-norm statistics from calibration data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.calibration import Moments, Statistics
from graphprune.candidates import kept_features
from graphprune.compensation import solve
from graphprune.cuts import Cuts
from graphprune.graph import Layer, ModelGraph


@torch.no_grad()
def compensate(pruned: nn.Module, graph: ModelGraph, cuts: Cuts, statistics: Statistics) -> None:
    """Give every layer whose inputs or kernel were cut its least-squares weights, in place."""
    for layer in graph.layers:
        moments = statistics.get(layer.node)
        if moments is None or layer.groups is not None and layer.groups.atoms() & cuts.keep.keys():
            continue
        kept = kept_features(layer, cuts)
        if len(kept) < moments.second.shape[-1]:
            _replace_weight(pruned, layer, cuts, moments, kept)


def _replace_weight(pruned: nn.Module, layer: Layer, cuts: Cuts, moments: Moments, kept: Tensor) -> None:
    outputs = torch.from_numpy(layer.outputs.kept(cuts.keep)) if len(moments.second) == 1 else None
    best, _ = solve(moments, kept, outputs)
    path, _, name = layer.weight.rpartition(".")
    owner = pruned.get_submodule(path)
    weight: nn.Parameter = getattr(owner, name)
    weight.copy_(best.reshape(weight.shape))
    bias = getattr(owner, "bias", None)
    if moments.free_mean and isinstance(bias, nn.Parameter):
        dense = moments.weight if outputs is None else moments.weight[:, outputs]
        before = torch.einsum("gof,gf->go", dense, moments.mean)
        after = torch.einsum("gof,gf->go", best, moments.mean[:, kept])
        bias.add_((before - after).reshape(-1).to(bias.dtype))


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Replace running statistics by the averages over the batches; momentum and modes are as before afterwards."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    with _averaging(model, norms):
        for batch in batches:
            model(batch)


@contextmanager
def _averaging(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
