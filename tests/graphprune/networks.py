"""Small networks, one for each way in which axes hang together. All take [N, 3, H, W] unless they say otherwise."""

from collections.abc import Callable

import timm
import torch
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional

Tensors = tuple[torch.Tensor, ...]


def images(size: int = 8, batch: int = 2) -> Tensors:
    """Random images."""
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def tokens(width: int = 12, batch: int = 2) -> Tensors:
    """Random token sequences [N, 5, width]."""
    return (torch.randn(batch, 5, width, generator=torch.Generator().manual_seed(1)),)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU in place."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def vgg() -> nn.Module:
    """Flatten couples each channel with a block of a linear layer's inputs."""
    features = [conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 12), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(12 * 4, 10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 5))


def group_norm() -> nn.Module:
    """Norms with 4 groups, 1 group and as many groups as channels."""
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 12, 3), nn.GroupNorm(1, 12), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 6, 1), nn.GroupNorm(6, 6), nn.Conv2d(6, 4, 1))


class Chain(nn.Module):
    """Three convolutions inside a residual block; the filters of the first two may be put in any order."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.one = nn.Sequential(nn.Conv2d(16, 24, (5, 3), padding=(2, 1), bias=bias), nn.BatchNorm2d(24), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(24, 16, 3, padding=2, dilation=2, bias=bias), nn.BatchNorm2d(16), nn.ReLU())
        self.three = nn.Conv2d(16, 16, 3, padding=1, bias=bias)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.three(self.two(self.one(x)))).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate that is computed from their means; depthwise in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = conv_bn(3, 12), conv_bn(12, 12, groups=12), nn.Conv2d(12, 4, 1)
        self.reduce, self.gate = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.gate(functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.project(x * gate)


class ChannelShuffle(nn.Module):
    """Grouped convolutions with a shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.first, self.second, self.last = conv_bn(3, 12), conv_bn(12, 12, groups=2), nn.Conv2d(12, 5, 1)
        self.grouped = nn.Conv2d(12, 12, 1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        return self.last(self.grouped(x.reshape(batch, channels, height, width)))


class SwiGlu(nn.Module):
    """A gated MLP on tokens; `packed` makes gate and value with one linear layer and `chunk`."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed, self.stem, self.norm = packed, nn.Linear(12, 12), nn.RMSNorm(12)
        self.up = nn.Linear(12, 32 if packed else 16)
        self.gate = nn.Identity() if packed else nn.Linear(12, 16)
        self.down, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(x)
        value, gate = self.up(y).chunk(2, dim=-1) if self.packed else (self.up(y), self.gate(y))
        return self.head(x + self.down(value * functional.silu(gate)))


class SplitConcat(nn.Module):
    """Half of the channels pass by, the other half is worked on; an inception-like concatenation follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.worker, self.last = conv_bn(3, 12), conv_bn(6, 6), nn.Conv2d(24, 5, 1)
        self.narrow, self.wide = conv_bn(12, 4, 1), conv_bn(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        kept, worked = torch.split(x, [6, 6], dim=1)
        x = torch.cat([kept, self.worker(worked)], 1)
        return self.last(torch.cat([self.narrow(x), x, self.wide(x)], 1))


class OptionA(nn.Module):
    """A CIFAR residual net whose shortcuts stride and pad channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv_bn(3, 8), conv_bn(8, 8), nn.Sequential(*conv_bn(8, 8)[:2])
        self.three, self.four = conv_bn(8, 16, stride=2), nn.Sequential(*conv_bn(16, 16)[:2])
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = functional.relu(x + self.two(self.one(x)))
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = functional.relu(shortcut + self.four(self.three(x)))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class TwoInTwoOut(nn.Module):
    """Image and vector in, class scores and a reconstruction out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.mix = conv_bn(3, 8), nn.Linear(6, 8), conv_bn(8, 10)
        self.scores, self.picture = nn.Linear(10, 4), nn.Conv2d(10, 3, 1)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.mix(self.image(image) * self.vector(vector)[:, :, None, None])
        return {"scores": self.scores(x.mean((-2, -1))), "picture": self.picture(x)}


class Transposed(nn.Module):
    """A little U-Net: down, up by (grouped) transposed convolutions, concatenated skip."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.down = conv_bn(3, 8), conv_bn(8, 12, stride=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.grouped, self.last = nn.ConvTranspose2d(14, 8, 3, padding=1, groups=2), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = self.top(x)
        return self.last(functional.gelu(self.grouped(torch.cat([top, self.up(self.down(top))], 1))))


class Tied(nn.Module):
    """Two linear layers share one weight; an embedding-like matrix is used forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.two.weight = self.one.weight
        self.table = nn.Parameter(torch.zeros(7, 10))
        self.bias, self.head = nn.Parameter(torch.zeros(10)), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.two(functional.relu(self.one(self.stem(x)))))
        x = functional.relu(functional.linear(x, self.table))
        return self.head(functional.linear(functional.linear(x, self.table.t(), self.bias), self.table))


class Attention(nn.Module):
    """Multi-head attention, pre-norm, with a residual: fused or separate projections, fused or explicit product."""

    def __init__(self, fused_weights: bool, fused_product: bool, heads: int = 3, width: int = 4) -> None:
        super().__init__()
        total = heads * width
        self.num_heads, self.head_dim, self.scale = heads, width, width**-0.5
        self.fused_weights, self.fused_product = fused_weights, fused_product
        self.stem, self.norm, self.proj = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(total, 12)
        self.head = nn.Linear(12, 5)
        names = ("qkv",) if fused_weights else ("q", "k", "v")
        self.weights = nn.ModuleDict({name: nn.Linear(12, total * (3 if fused_weights else 1)) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        x = self.stem(x)
        y = self.norm(x)
        if self.fused_weights:
            packed = self.weights["qkv"](y).reshape(batch, count, 3, self.num_heads, self.head_dim)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            shape = (batch, count, self.num_heads, -1)
            q, k, v = (self.weights[name](y).view(shape).transpose(1, 2) for name in "qkv")
        if self.fused_product:
            z = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            z = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(x + self.proj(z.transpose(1, 2).reshape(batch, count, -1)))


class BiasedAttention(nn.Module):
    """Attention with a learnt bias for each head that is cached in eval mode, as LeViT and EfficientFormer do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(12, 48), nn.Linear(16, 5)
        self.biases = nn.Parameter(torch.zeros(4, 9))
        self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4, persistent=False)
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        """Drop the cache when training starts."""
        if mode:
            self.cache = {}
        return super().train(mode)

    def bias(self) -> torch.Tensor:
        """The bias [heads, queries, keys]."""
        if self.training:
            return self.biases[:, self.index]
        if "bias" not in self.cache:
            self.cache["bias"] = self.biases[:, self.index]
        return self.cache["bias"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        z = (q @ k.transpose(-2, -1) + self.bias()).softmax(-1) @ v
        return self.proj(z.transpose(1, 2).reshape(batch, count, -1))


class FlatHeads(nn.Module):
    """Attention that merges batch and heads into one axis, as fairseq and old BERTs do."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v, self.proj = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape

        def merged(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, count, self.heads, 4).transpose(1, 2).reshape(batch * self.heads, count, 4)

        z = torch.bmm((torch.bmm(merged(self.q(x)), merged(self.k(x)).mT) / 2).softmax(-1), merged(self.v(x)))
        return self.proj(z.view(batch, self.heads, count, 4).transpose(1, 2).reshape(batch, count, self.heads * 4))


class Mixer(nn.Module):
    """An MLP-Mixer block: one MLP over tokens, one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(12), nn.LayerNorm(12)
        self.token = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5))
        self.channel = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))
        self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.token(self.one(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channel(self.two(x))).mean(1))


def standardised() -> nn.Module:
    """Convolutions whose weights are normalised over their own inputs each time they are used."""
    layers = [StdConv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), StdConv2d(8, 10, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(10, 4, 1))


class Literal(nn.Module):
    """Sizes written into the code, which no attribute reaches: only the exported graph can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = conv_bn(3, 64), nn.Conv2d(64, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        y = self.stem(x).view(batch, 4, 16, height, width)
        return self.last((y * y.mean(2, keepdim=True).sigmoid()).view(batch, 64, height, width))


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    """A builder of a small timm model with 7 classes."""
    return lambda: timm.create_model(name, num_classes=7, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensors]] = {
    "resnet18": (timm_model("resnet18", channels=(16, 24, 32, 40)), images(32)),
    "vit_tiny": (timm_model("vit_tiny_patch16_224", img_size=32, depth=2), images(32)),
    "mobilenetv2": (timm_model("mobilenetv2_035"), images(32)),
    "regnetx": (timm_model("regnetx_002"), images(32)),
    "convnext": (timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), images(32)),
    "densenet": (timm_model("densenet121", block_config=(2, 2, 2), growth_rate=8), images(32)),
    "vgg": (vgg, images()),
    "chain": (Chain, images()),
    "group_norm": (group_norm, images()),
    "squeeze_excite": (SqueezeExcite, images()),
    "channel_shuffle": (ChannelShuffle, images()),
    "swiglu_packed": (lambda: SwiGlu(packed=True), tokens()),
    "swiglu_apart": (lambda: SwiGlu(packed=False), tokens()),
    "split_concat": (SplitConcat, images()),
    "option_a": (OptionA, images()),
    "two_in_two_out": (TwoInTwoOut, (*images(), torch.linspace(-1, 1, 12).reshape(2, 6))),
    "transposed": (Transposed, images()),
    "tied": (Tied, tokens()),
    "attention_fused": (lambda: Attention(True, True), tokens()),
    "attention_apart": (lambda: Attention(False, True), tokens()),
    "attention_explicit": (lambda: Attention(True, False), tokens()),
    "attention_biased": (BiasedAttention, tokens()),
    "attention_flat": (FlatHeads, tokens()),
    "mixer": (Mixer, tokens()),
    "standardised": (standardised, images()),
    "literal": (Literal, images()),
}
