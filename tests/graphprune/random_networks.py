"""Random small networks: hypothesis draws blocks that keep [N, C, H, W] and may change C."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

Draw = Callable[[st.SearchStrategy[Any]], Any]
ACTIVATIONS: list[Callable[[], nn.Module]] = [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, lambda: nn.PReLU(1), nn.Sigmoid]


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Branches(nn.Module):
    """Several bodies side by side, concatenated."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([body(x) for body in self.bodies], dim=1)


class Halves(nn.Module):
    """The channels after `at` are worked on, those before it pass by; `swapped` changes their order."""

    def __init__(self, at: int, body: nn.Module, swapped: bool) -> None:
        super().__init__()
        self.at, self.body, self.swapped = at, body, swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, worked = x[:, : self.at], self.body(x[:, self.at :])
        return torch.cat([worked, kept] if self.swapped else [kept, worked], 1)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.expand(functional.silu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class PadChannels(nn.Module):
    """Zero channels before and after."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.ends = (0, 0, 0, 0, low, high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x, self.ends)


class Tokens(nn.Module):
    """A body over the positions as tokens [N, H x W, C]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Heads(nn.Module):
    """Attention with heads; `fused` uses the one operator, else scores and softmax are written out."""

    def __init__(self, channels: int, heads: int, width: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.width, self.fused, self.scale = heads, width, fused, width**-0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * heads * width), nn.Linear(heads * width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            z = functional.scaled_dot_product_attention(q, k, v)
        else:
            z = (q * self.scale @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(z.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A gated MLP whose two halves come from one linear layer."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, 2 * hidden), nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(x).chunk(2, -1)
        return self.down(value * functional.gelu(gate))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def pick(draw: Draw, *items: Any) -> Any:
    return draw(st.sampled_from(items))


def convolution(draw: Draw, channels: int, outputs: int | None = None) -> tuple[nn.Module, int]:
    """A convolution that keeps the image size, with a norm and an activation."""
    kernel = pick(draw, (1, 1), (3, 3), (1, 3), (5, 3))
    outputs = outputs or pick(draw, 4, 6, 8, 12)
    groups = pick(draw, 1, 1, *[n for n in divisors(channels) if outputs % n == 0])
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(channels, outputs, kernel, padding=padding, groups=groups, bias=pick(draw, True, False))
    return nn.Sequential(conv, norm(draw, outputs), pick(draw, *ACTIVATIONS)()), outputs


def norm(draw: Draw, channels: int) -> nn.Module:
    kinds = {
        "batch": lambda: nn.BatchNorm2d(channels),
        "group": lambda: nn.GroupNorm(pick(draw, *divisors(channels)), channels),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
        "layer": lambda: Tokens(nn.LayerNorm(channels)),
        "none": nn.Identity,
    }
    return kinds[pick(draw, *kinds)]()


def residual(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    first, middle = convolution(draw, channels)
    return Residual(nn.Sequential(first, convolution(draw, middle, channels)[0])), channels


def depthwise(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    times = pick(draw, 1, 2)
    conv = nn.Conv2d(channels, times * channels, 3, padding=1, groups=channels)
    return nn.Sequential(conv, norm(draw, times * channels)), times * channels


def branches(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    bodies = [convolution(draw, channels) for _ in range(pick(draw, 2, 3))] + [(nn.Identity(), channels)]
    return Branches(*(body for body, _ in bodies)), sum(outputs for _, outputs in bodies)


def halves(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    at = draw(st.integers(1, channels - 1))
    body, outputs = convolution(draw, channels - at)
    return Halves(at, body, pick(draw, True, False)), at + outputs


def tokens(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    bodies = {
        "attention": lambda: Heads(channels, pick(draw, 1, 2, 3), pick(draw, 2, 4), pick(draw, True, False)),
        "gated": lambda: Gated(channels, 6),
        "mlp": lambda: nn.Sequential(nn.Linear(channels, 10), nn.GELU(), nn.Linear(10, channels)),
    }
    body, first = bodies[pick(draw, *bodies)](), pick(draw, nn.LayerNorm, nn.RMSNorm)(channels)
    return Tokens(Residual(nn.Sequential(first, body))), channels


BLOCKS: dict[str, Callable[[Draw, int], tuple[nn.Module, int]]] = {
    "convolution": convolution, "residual": residual, "depthwise": depthwise, "branches": branches, "halves": halves,
    "tokens": tokens,
    "gate": lambda draw, channels: (Gate(channels, 4), channels),
    "shuffle": lambda draw, channels: (nn.ChannelShuffle(pick(draw, *divisors(channels))), channels),
    "pad": lambda draw, channels: (PadChannels(1, 2), channels + 3),
    "pool": lambda draw, channels: (nn.AvgPool2d(3, 1, 1), channels),
    "maximum": lambda draw, channels: (nn.MaxPool2d(3, 1, 1), channels),
    "transposed": lambda draw, channels: (nn.ConvTranspose2d(channels, 6, 3, padding=1), 6),
}  # fmt: skip


@st.composite
def networks(draw: Draw) -> nn.Module:
    """A stem, up to five blocks, and a head: pooled or flattened. Input [N, 3, 5, 4]."""
    stem, channels = convolution(draw, 3)
    layers = [stem]
    for name in draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5)):
        if channels <= 24:
            layer, channels = BLOCKS[name](draw, channels)
            layers.append(layer)
    if pick(draw, True, False):
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20 * channels, 3))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
