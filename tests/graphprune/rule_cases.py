"""One tiny network around each operator of the rule table: what is produced goes through it and is consumed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

A = torch.ops.aten
Body = Callable[[Any, torch.Tensor], Any]

LAYERS: dict[int, tuple[Callable[[int, int], nn.Module], tuple[int, ...], int]] = {
    2: (nn.Linear, (2, 3), 1),
    3: (nn.Linear, (2, 5, 3), 2),
    4: (lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1), (2, 3, 6, 4), 1),
    5: (lambda inputs, outputs: nn.Conv3d(inputs, outputs, 1), (2, 3, 4, 4, 4), 1),
    1: (lambda inputs, outputs: nn.Conv1d(inputs, outputs, 1), (2, 3, 6), 1),
}
"""By the rank of the tensor (1 stands for [N, C, L]): a layer, the shape of its input, its channel dimension."""


class Around(nn.Module):
    """`before` (3 -> 8 channels), the operator, and a layer that consumes each of its outputs."""

    def __init__(self, body: Body, kind: int, layers: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.body, self.before = body, LAYERS[kind][0](3, 8)
        for name, layer in (layers or {}).items():
            setattr(self, name, layer)
        with torch.no_grad():
            results = self.results(torch.randn(LAYERS[kind][1]))
        self.after = nn.ModuleList(self.reader(result, kind) for result in results)

    @staticmethod
    def reader(result: torch.Tensor, kind: int) -> nn.Module:
        """A layer that reads a tensor of this rank."""
        layer, _, channels = LAYERS[kind if result.dim() == 3 and kind == 1 else result.dim()]
        return layer(result.shape[channels], 2)

    def results(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What the operator returns, as a list."""
        found = self.body(self, self.before(x))
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(after(result) for after, result in zip(self.after, self.results(x), strict=True))


def _lookup(m: Any, y: torch.Tensor) -> torch.Tensor:
    return y + m.table(torch.arange(5))


def _attend(m: Any, y: torch.Tensor) -> torch.Tensor:
    heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, m.value(y).unflatten(-1, (2, 4)).transpose(1, 2)).mT


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


# A name may go on behind a comma, where an operator has several cases.
STRUCTURAL: dict[str, tuple[Body, int, dict[str, Any]]] = {
    "conv1d": (lambda m, y: m.a(y), 1, {"a": nn.Conv1d(8, 6, 3, groups=2)}),
    "conv2d": (lambda m, y: m.a(y), 4, {"a": nn.Conv2d(8, 6, 3, 2, (1, 2), dilation=(1, 2), groups=2)}),
    "conv3d": (lambda m, y: m.a(y), 5, {"a": nn.Conv3d(8, 6, 3)}),
    "conv_transpose1d": (lambda m, y: m.a(y), 1, {"a": nn.ConvTranspose1d(8, 6, 3)}),
    "conv_transpose2d": (lambda m, y: m.a(y), 4, {"a": nn.ConvTranspose2d(8, 6, 3, 2, groups=2)}),
    "conv_transpose3d": (lambda m, y: m.a(y), 5, {"a": nn.ConvTranspose3d(8, 6, 2, groups=2)}),
    "linear": (lambda m, y: m.a(y), 3, {"a": nn.Linear(8, 6)}),
    "embedding": (_lookup, 3, {"table": nn.Embedding(5, 8)}),
    "einsum": (lambda m, y: torch.einsum("bnc,oc,bmc->bmo", y, m.a, y), 3, {"a": _parameter(6, 8)}),
    "matmul": (lambda m, y: y @ (y.transpose(1, 2) @ y) @ m.a, 3, {"a": _parameter(8, 6)}),
    "bmm": (lambda m, y: torch.bmm(y, m.a.expand(2, 8, 6)), 3, {"a": _parameter(1, 8, 6)}),
    "scaled_dot_product_attention": (_attend, 3, {"value": nn.Linear(8, 8)}),
    "batch_norm": (lambda m, y: m.a(y), 4, {"a": nn.BatchNorm2d(8)}),
    "instance_norm": (lambda m, y: m.a(y), 4, {"a": nn.InstanceNorm2d(8, affine=True)}),
    "layer_norm": (lambda m, y: m.a(y), 3, {"a": nn.LayerNorm(8)}),
    "rms_norm": (lambda m, y: m.a(y), 3, {"a": nn.RMSNorm(8)}),
    "group_norm": (lambda m, y: m.a(y), 4, {"a": nn.GroupNorm(2, 8)}),
    "softmax": (lambda m, y: y.softmax(1), 4, {}),
    "log_softmax": (lambda m, y: y.log_softmax(1), 4, {}),
    "prelu": (lambda m, y: m.a(y), 4, {"a": nn.PReLU(8)}),
    "view": (lambda m, y: y.view(-1, 5, 2, 4).flatten(2), 3, {}),
    "_unsafe_view": (lambda m, y: A._unsafe_view(y, [y.shape[0], 5, 2, 4]).transpose(1, 3).flatten(2), 3, {}),
    "reshape": (lambda m, y: y.transpose(1, 2).reshape(-1, 4, 10), 3, {}),
    "unflatten": (lambda m, y: y.unflatten(1, (4, 2)).mean(2), 4, {}),
    "flatten": (lambda m, y: y.flatten(1), 4, {}),
    "squeeze": (lambda m, y: y.mean((2, 3), keepdim=True).squeeze((2, 3)), 4, {}),
    "squeeze_": (lambda m, y: A.squeeze_(y.mean((2, 3), keepdim=True).squeeze(3), 2), 4, {}),
    "unsqueeze": (lambda m, y: y.unsqueeze(1).squeeze(1), 3, {}),
    "unsqueeze_": (lambda m, y: A.unsqueeze_(y * 2, 1).expand(-1, 3, -1), 2, {}),
    "view_as": (lambda m, y: y.view_as(y.flatten(2)[:, :, :, None]).squeeze(3), 1, {}),
    "reshape_as": (lambda m, y: y.reshape_as(y.unflatten(2, (2, 4)).unsqueeze(1)).flatten(3).squeeze(1), 3, {}),
    "permute": (lambda m, y: y.permute(0, 3, 2, 1).exp().permute(0, 3, 2, 1), 4, {}),
    "transpose": (lambda m, y: y.transpose(-1, 1).exp().transpose(1, 2), 3, {}),
    "transpose_": (lambda m, y: A.transpose_(A.transpose_(y * 2, 1, 2).exp(), 1, 2), 3, {}),
    "swapaxes": (lambda m, y: y.swapaxes(1, 2).exp().swapaxes(-1, 1), 3, {}),
    "swapdims": (lambda m, y: y.swapdims(1, -1).exp().swapdims(1, 2), 3, {}),
    "t": (lambda m, y: y @ m.a.t(), 3, {"a": _parameter(6, 8)}),
    "numpy_T": (lambda m, y: y @ m.a.T, 3, {"a": _parameter(6, 8)}),
    "mT": (lambda m, y: y.mT.exp().mT, 3, {}),
    "movedim": (lambda m, y: y.movedim((1, 2), (-1, 1)).exp().movedim((3, 1), (1, 2)), 4, {}),
    "moveaxis": (lambda m, y: y.moveaxis(1, -1).exp().moveaxis(-1, 1), 4, {}),
    "expand": (lambda m, y: y + m.a.expand(2, 8, 6, 4), 4, {"a": _parameter(1, 8, 1, 1)}),
    "broadcast_to": (lambda m, y: y + torch.broadcast_to(m.a, (8, 6, 4)), 4, {"a": _parameter(8, 1, 1)}),
    "expand_as": (lambda m, y: y / y.norm(dim=1, keepdim=True).expand_as(y), 4, {}),
    "repeat": (lambda m, y: y.repeat(1, 2, 1, 1), 4, {}),
    "tile": (lambda m, y: y.tile(3, 1, 1), 4, {}),
    "repeat_interleave": (lambda m, y: y.repeat_interleave(2, 1), 4, {}),
    "pixel_shuffle": (lambda m, y: functional.pixel_shuffle(y, 2), 4, {}),
    "pixel_unshuffle": (lambda m, y: functional.pixel_unshuffle(y, 2), 4, {}),
    "channel_shuffle": (lambda m, y: functional.channel_shuffle(y, 2), 4, {}),
    "roll": (lambda m, y: torch.roll(y, (1, 2), (2, 3)), 4, {}),
    "flip": (lambda m, y: y.flip(2), 4, {}),
    "cat": (lambda m, y: torch.cat([y, m.a(y), y[:, :0]], 1), 4, {"a": nn.Conv2d(8, 3, 1)}),
    "concat": (lambda m, y: torch.concat([m.a(y), y], -1), 3, {"a": nn.Linear(8, 3)}),
    "concatenate": (lambda m, y: torch.concatenate([y, y * 2], 1), 4, {}),
    "stack": (lambda m, y: torch.stack([y, m.a(y)], 2).mean(2), 4, {"a": nn.Conv2d(8, 8, 1)}),
    "split": (lambda m, y: y.split(3, 1), 4, {}),
    "chunk": (lambda m, y: y.chunk(3, -1), 3, {}),
    "split_with_sizes": (lambda m, y: A.split_with_sizes(y, [2, 6], 1), 4, {}),
    "unsafe_chunk": (lambda m, y: torch.unsafe_chunk(y, 2, 1), 4, {}),
    "tensor_split": (lambda m, y: y.tensor_split((2, 5), 1), 4, {}),
    "glu": (lambda m, y: functional.glu(y, 1), 4, {}),
    "unbind": (lambda m, y: y.unbind(2), 1, {}),
    "select": (lambda m, y: y.select(1, 2), 3, {}),
    "slice": (lambda m, y: (y[:, 1:5], y[:, -3:], y[:, :, ::2]), 4, {}),
    "slice, in front of it": (lambda m, y: (y[:, :4], y[:, 4:]), 4, {}),
    "narrow": (lambda m, y: y.narrow(1, 2, 4), 4, {}),
    "pad": (lambda m, y: functional.pad(y, (1, 0, 2, 1, 1, 3), value=0.5), 4, {}),
    "constant_pad_nd": (lambda m, y: A.constant_pad_nd(y, [0, 2], 1.0), 3, {}),
    "max_pool1d": (lambda m, y: functional.max_pool1d(y, 2), 1, {}),
    "max_pool2d": (lambda m, y: functional.max_pool2d(y, 2), 4, {}),
    "max_pool3d": (lambda m, y: functional.max_pool3d(y, 2), 5, {}),
    "max_pool2d_with_indices": (lambda m, y: A.max_pool2d_with_indices(y, [2, 2])[0], 4, {}),
    "avg_pool1d": (lambda m, y: functional.avg_pool1d(y, 2), 1, {}),
    "avg_pool2d": (lambda m, y: functional.avg_pool2d(y, 2), 4, {}),
    "avg_pool3d": (lambda m, y: functional.avg_pool3d(y, 2), 5, {}),
    "adaptive_avg_pool1d": (lambda m, y: functional.adaptive_avg_pool1d(y, 2), 1, {}),
    "adaptive_avg_pool2d": (lambda m, y: functional.adaptive_avg_pool2d(y, 1), 4, {}),
    "adaptive_avg_pool3d": (lambda m, y: functional.adaptive_avg_pool3d(y, 2), 5, {}),
    "adaptive_max_pool2d": (lambda m, y: functional.adaptive_max_pool2d(y, 2), 4, {}),
    "upsample_nearest1d": (lambda m, y: functional.interpolate(y, scale_factor=2), 1, {}),
    "upsample_linear1d": (lambda m, y: functional.interpolate(y, scale_factor=2, mode="linear"), 1, {}),
    "upsample_nearest2d": (lambda m, y: functional.interpolate(y, scale_factor=2), 4, {}),
    "_upsample_nearest_exact2d": (lambda m, y: functional.interpolate(y, (5, 7), mode="nearest-exact"), 4, {}),
    "upsample_bilinear2d": (lambda m, y: functional.interpolate(y, (5, 7), mode="bilinear"), 4, {}),
    "upsample_bicubic2d": (lambda m, y: functional.interpolate(y, (5, 7), mode="bicubic"), 4, {}),
    "_upsample_bilinear2d_aa": (lambda m, y: functional.interpolate(y, (5, 7), mode="bilinear", antialias=True), 4, {}),
    "_upsample_bicubic2d_aa": (lambda m, y: functional.interpolate(y, (5, 7), mode="bicubic", antialias=True), 4, {}),
    "upsample_nearest3d": (lambda m, y: functional.interpolate(y, scale_factor=2), 5, {}),
    "upsample_trilinear3d": (lambda m, y: functional.interpolate(y, scale_factor=2, mode="trilinear"), 5, {}),
    "mean": (lambda m, y: (y.mean((2, 3)), y * y.mean(1, keepdim=True), y * y.mean()), 4, {}),
    "sum": (lambda m, y: (y.sum(1), y * y.sum()), 4, {}),
    "amax": (lambda m, y: (y.amax((2, 3)), y * y.amax(1, keepdim=True), y * y.amax()), 4, {}),
    "amin": (lambda m, y: y * y.amin(1, keepdim=True), 4, {}),
    "var": (lambda m, y: (y.var((1, 3)), y * torch.var(y, 1, correction=0, keepdim=True)), 4, {}),
    "std": (lambda m, y: y * y.std(1, keepdim=True), 4, {}),
    "var_mean": (lambda m, y: [y * x for x in torch.var_mean(y, 1, keepdim=True)], 4, {}),
    "std_mean": (lambda m, y: [y * x for x in torch.std_mean(y, 1, correction=0, keepdim=True)], 4, {}),
    "logsumexp": (lambda m, y: y * y.logsumexp(1, keepdim=True), 4, {}),
    "linalg_vector_norm": (lambda m, y: y * torch.linalg.vector_norm(y, dim=(1,), keepdim=True), 4, {}),
    "any": (lambda m, y: y * (y > 1.5).any(1, keepdim=True), 4, {}),
    "prod": (lambda m, y: y * y.prod(1, keepdim=True), 4, {}),
    "max": (lambda m, y: (y.max(2, keepdim=True)[0], torch.max(y, -y)), 4, {}),
    "min": (lambda m, y: y.min(-1, keepdim=True)[0], 4, {}),
    "argmax": (lambda m, y: y.argmax(2, keepdim=True).to(y.dtype), 4, {}),
    "argmin": (lambda m, y: y.argmin(2, keepdim=True).to(y.dtype), 4, {}),
    "topk": (lambda m, y: y.topk(2, 2)[0], 4, {}),
    "sort": (lambda m, y: y.sort(2)[0], 4, {}),
    "argsort": (lambda m, y: y.argsort(2).to(y.dtype), 4, {}),
    "index": (lambda m, y: y[:, :, torch.tensor([0, 2, 1])], 4, {}),
    "index_select": (lambda m, y: y.index_select(2, torch.tensor([0, 2, 1])), 4, {}),
    "unfold": (lambda m, y: y.unfold(2, 2, 1).mean(-1), 4, {}),
    "new_zeros": (lambda m, y: torch.cat([y, y.new_zeros(2, 1, 6, 4)], 1), 4, {}),
    "new_ones": (lambda m, y: torch.cat([y, y.new_ones(2, 1, 6, 4)], 1), 4, {}),
    "new_full": (lambda m, y: torch.cat([y, y.new_full((2, 1, 6, 4), 0.5)], 1), 4, {}),
    "new_empty": (lambda m, y: torch.cat([y, y.new_empty(2, 1, 6, 4).fill_(0.5)], 1), 4, {}),
    "zeros": (lambda m, y: y + torch.zeros(4, dtype=y.dtype), 4, {}),
    "ones": (lambda m, y: y + torch.ones(4, dtype=y.dtype), 4, {}),
    "full": (lambda m, y: y + torch.full((4,), 2.0, dtype=y.dtype), 4, {}),
    "empty": (lambda m, y: y + torch.empty(4, dtype=y.dtype).fill_(0.5), 4, {}),
    "arange": (lambda m, y: y * torch.arange(4, dtype=y.dtype), 4, {}),
    "eye": (lambda m, y: y @ torch.eye(4, dtype=y.dtype), 4, {}),
    "linspace": (lambda m, y: y * torch.linspace(0, 1, 4, dtype=y.dtype), 4, {}),
}  # fmt: skip

_UNARY_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "clamp": (0.4, 0.8), "clip": (0.4, 0.8), "clamp_max": (0.5,), "clamp_min": (0.5,), "cumsum": (1,),
    "dropout": (0.5, False), "feature_dropout": (0.5, False), "alpha_dropout": (0.5, False), "threshold": (0.5, 0.1),
    "full_like": (0.7,), "to": (torch.float32,),
}  # fmt: skip
_WHOLE = {"eq", "ne", "lt", "gt", "le", "ge", "greater", "greater_equal", "less", "less_equal", "not_equal"}
_BINARY = """add atan2 div divide floor_divide fmod maximum minimum mul multiply pow remainder rsub sub subtract
true_divide bitwise_and bitwise_or logical_and logical_or""".split()  # noqa: SIM905
_SPECIAL: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "lift_fresh_copy": lambda function, y, scale: y + function(torch.tensor(0.5, dtype=y.dtype)),
    "isnan": lambda function, y, scale: function((y - 0.6).log()),
    "type_as": lambda function, y, scale: function(y, scale),
    "where": lambda function, y, scale: function(y > 0.5, y, scale),
    "masked_fill": lambda function, y, scale: function(y, scale > 0, 0.5),
    "addcmul": lambda function, y, scale: function(y, scale, scale),
    "lerp": lambda function, y, scale: function(y, scale.expand(y.shape), 0.3),
    "pow_": lambda function, y, scale: function(y, 2),
}


def elementwise(name: str, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One elementwise operator on y (between 0.1 and 1.1, [N, C, H, W]), and scale ([C, 1, 1]) where it takes two."""
    function, plain = getattr(A, name), name.removesuffix("_")
    y = y.clone() if name != plain else y
    if special := _SPECIAL.get(name, _SPECIAL.get(plain)):
        return special(function, y, scale)
    if plain.startswith(("bitwise", "logical")):
        y, scale = y > 0.5, scale > 0
    if plain in _WHOLE:  # compared in place, they take a number
        y, scale = (4 * y).round(), (4 * scale).round() + 2
        return function(y, scale if name == plain else 2)
    return function(y, scale) if plain in _BINARY else function(y, *_UNARY_ARGUMENTS.get(plain, ()))


class Elementwise(nn.Module):
    """Many elementwise operators side by side, each with its own output."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.scale = names, nn.Parameter(torch.zeros(8, 1, 1))
        self.before, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.before(x).sigmoid() + 0.1
        results = (elementwise(name, y, self.scale) for name in self.names)
        return tuple(self.after(z if z.dtype == x.dtype else z.to(x.dtype)) for z in results)
