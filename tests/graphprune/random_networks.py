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


class Windows(nn.Module):
    """Attention within shifted windows of the image, with a bias table for relative positions."""

    def __init__(self, channels: int, heads: int, window: tuple[int, int], shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(channels, 6 * heads), nn.Linear(2 * heads, channels)
        place = torch.arange(window[0] * window[1])
        rows, columns = place // window[1], place % window[1]
        down, right = rows[:, None] - rows + window[0] - 1, columns[:, None] - columns + window[1] - 1
        self.register_buffer("index", (down * (2 * window[1] - 1) + right).flatten())
        self.table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (batch, channels, height, width), (high, wide) = x.shape, self.window
        x = torch.roll(x.permute(0, 2, 3, 1), (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, height // high, high, width // wide, wide, channels).transpose(2, 3)
        tokens = x.reshape(-1, high * wide, channels)
        q, k, v = self.qkv(tokens).reshape(-1, high * wide, 3, self.heads, 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].view(high * wide, high * wide, -1).permute(2, 0, 1)
        z = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        z = self.proj(z.transpose(1, 2).reshape(-1, high * wide, 2 * self.heads))
        z = z.view(batch, height // high, width // wide, high, wide, channels).transpose(2, 3)
        z = torch.roll(z.reshape(batch, height, width, channels), (self.shift, self.shift), (1, 2))
        return z.permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """Attention of channels to channels, with normalised queries and keys and a temperature for each head."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(channels, 9 * heads), nn.Linear(3 * heads, channels)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, 3).permute(2, 0, 3, 4, 1)
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        z = (scores * self.temperature).softmax(-1) @ v
        return self.proj(z.permute(0, 3, 1, 2).reshape(batch, count, 3 * self.heads))


class TalkingHeads(nn.Module):
    """Separate layers for queries, keys and values, einsum, and a linear layer over the heads of the scores."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(channels, 2 * heads) for _ in range(3))
        self.talk, self.proj = nn.Linear(heads, heads), nn.Linear(2 * heads, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, 2)) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bqkh", q, k)
        return self.proj(torch.einsum("bqkh,bkhd->bqhd", self.talk(scores).softmax(2), v).flatten(2))


class GroupedQueries(nn.Module):
    """Two query heads for each head of keys and values."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(channels, 4 * heads), nn.Linear(channels, 4 * heads)
        self.proj = nn.Linear(4 * heads, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        q = self.q(x).view(batch, count, 2 * self.heads, 2).transpose(1, 2)
        k, v = self.kv(x).view(batch, count, self.heads, 4).transpose(1, 2).chunk(2, -1)
        z = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(z.transpose(1, 2).reshape(batch, count, -1))


class Multihead(nn.Module):
    """torch's own attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class ClassToken(nn.Module):
    """A body that also sees a learned token, which is cut off again."""

    def __init__(self, channels: int, body: nn.Module) -> None:
        super().__init__()
        self.token, self.body = nn.Parameter(torch.zeros(1, 1, channels)), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))[:, 1:]


class AcrossTokens(nn.Module):
    """A linear layer over the positions."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.mix = nn.Linear(count, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class SplitAttention(nn.Module):
    """Two groups of channels (one where they are odd), weighed against each other by a softmax between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2 - channels % 2)
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        x = self.conv(x).reshape(batch, 2, channels, height, width)
        gate = self.expand(functional.relu(self.reduce(x.sum(1).mean((2, 3), keepdim=True))))
        gate = functional.softmax(gate.view(batch, 2, channels), 1)
        return (x * gate[..., None, None]).sum(1)


class Stacked(nn.Module):
    """Two bodies, stacked on an axis of their own and summed over it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.first(x), self.second(x)], 1).sum(1)


class Twice(nn.Module):
    """One body used twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.body(x))


class Resampled(nn.Module):
    """Channels become positions and come back; then twice the size and back again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.pixel_unshuffle(functional.gelu(functional.pixel_shuffle(self.wide(x), 2)), 2)
        return functional.avg_pool2d(functional.interpolate(self.narrow(x), scale_factor=2.0), 2)


class Scaled(nn.Module):
    """A learned image added, a learned factor for each channel, and the response of all channels together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.image, self.factor = nn.Parameter(torch.zeros(1, channels, 5, 4)), nn.Parameter(torch.ones(channels, 1, 1))
        self.gain = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.image) * self.factor
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + x * self.gain * response / (response.mean(1, keepdim=True) + 1e-6)


class StandardConv(nn.Conv2d):
    """A convolution whose weights are standardised for each filter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-6)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class GatedConv(nn.Module):
    """Half of a convolution's channels gate the other half."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.glu(self.conv(x), 1)


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
    heads = pick(draw, 1, 2, 3)
    bodies = {
        "attention": lambda: Heads(channels, heads, pick(draw, 2, 4), pick(draw, True, False)),
        "channels": lambda: ChannelAttention(channels, heads),
        "encoder": lambda: nn.TransformerEncoderLayer(channels, 1, 8, 0.0, batch_first=True),
        "gated": lambda: Gated(channels, 6),
        "grouped": lambda: GroupedQueries(channels, heads),
        "mixer": lambda: AcrossTokens(20),
        "mlp": lambda: nn.Sequential(nn.Linear(channels, 10), nn.GELU(), nn.Linear(10, channels)),
        "multihead": lambda: Multihead(channels, pick(draw, *divisors(channels))),
        "talking": lambda: TalkingHeads(channels, heads),
        "token": lambda: ClassToken(channels, Heads(channels, heads, 2, True)),
    }
    body, first = bodies[pick(draw, *bodies)](), pick(draw, nn.LayerNorm, nn.RMSNorm)(channels)
    return Tokens(Residual(nn.Sequential(first, body))), channels


def windows(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    window = (pick(draw, 1, 5), pick(draw, 2, 4))
    return Residual(Windows(channels, pick(draw, 1, 2, 3), window, pick(draw, 0, 1))), channels


def stacked(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    first, outputs = convolution(draw, channels)
    return Stacked(first, convolution(draw, channels, outputs)[0]), outputs


def gated(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    outputs = pick(draw, 4, 6)
    return GatedConv(channels, outputs), outputs


BLOCKS: dict[str, Callable[[Draw, int], tuple[nn.Module, int]]] = {
    "convolution": convolution, "residual": residual, "depthwise": depthwise, "branches": branches, "halves": halves,
    "tokens": tokens,
    "windows": windows, "stacked": stacked, "gated": gated,
    "twice": lambda draw, channels: (Twice(convolution(draw, channels, channels)[0]), channels),
    "split": lambda draw, channels: (SplitAttention(channels, 4), channels),
    "resampled": lambda draw, channels: (Resampled(channels), channels),
    "scaled": lambda draw, channels: (Scaled(channels), channels),
    "standard": lambda draw, channels: (StandardConv(channels, 6, 3, padding=1), 6),
    "gate": lambda draw, channels: (Gate(channels, 4), channels),
    "shuffle": lambda draw, channels: (nn.ChannelShuffle(pick(draw, *divisors(channels))), channels),
    "pad": lambda draw, channels: (PadChannels(1, 2), channels + 3),
    "pool": lambda draw, channels: (nn.AvgPool2d(3, 1, 1), channels),
    "maximum": lambda draw, channels: (nn.MaxPool2d(3, 1, 1), channels),
    "transposed": lambda draw, channels: (nn.ConvTranspose2d(channels, 6, 3, padding=1), 6),
}  # fmt: skip


@st.composite
def networks(draw: Draw, block: str) -> nn.Module:
    """A stem, this block among up to four others, and a head: pooled or flattened. Input [N, 3, 5, 4]."""
    stem, channels = convolution(draw, 3)
    layers = [stem]
    before, after = (draw(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=2)) for _ in range(2))
    for name in (*before, block, *after):
        if channels <= 24 or name == block:
            layer, channels = BLOCKS[name](draw, channels)
            layers.append(layer)
    if pick(draw, True, False):
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20 * channels, 3))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
