"""The operators whose time an engine is asked for: their shapes, after any cut. Frozen, so they are cache keys."""

import json
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Self


@dataclass(frozen=True)
class Convolution:
    """A 2-D convolution on [batch, inputs, height, width].

    `padding` is (top, left, bottom, right); a negative entry crops the input on that side, which is how a kernel
    window away from the centre reads its input.
    """

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        top, left, bottom, right = self.padding
        rows = (self.height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        columns = (self.width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return rows, columns

    @property
    def flops(self) -> int:
        """Multiply-adds x 2."""
        rows, columns = self.output_size
        taps = self.kernel[0] * self.kernel[1] * self.inputs // self.groups
        return 2 * self.batch * self.outputs * rows * columns * taps

    @property
    def parameters(self) -> int:
        """Number of weights, without a bias."""
        return self.outputs * (self.inputs // self.groups) * self.kernel[0] * self.kernel[1]

    def window(self, rows: tuple[int, int], columns: tuple[int, int]) -> Self:
        """The same convolution with only the kernel's rows [start, stop) and columns [start, stop)."""
        top, left, bottom, right = self.padding
        (first, last), (near, far) = rows, columns
        padding = (
            top - first * self.dilation[0],
            left - near * self.dilation[1],
            bottom - (self.kernel[0] - last) * self.dilation[0],
            right - (self.kernel[1] - far) * self.dilation[1],
        )
        return replace(self, kernel=(last - first, far - near), padding=padding)


@dataclass(frozen=True)
class Mixture:
    """Convolutions of one input side by side, their outputs one after the other: a kernel geometry for each part."""

    parts: tuple[Convolution, ...]

    @property
    def flops(self) -> int:
        """Multiply-adds x 2."""
        return sum(part.flops for part in self.parts)

    @property
    def parameters(self) -> int:
        """Number of weights, without biases."""
        return sum(part.parameters for part in self.parts)


@dataclass(frozen=True)
class Linear:
    """A matrix product of `rows` vectors with a weight [outputs, inputs / groups], and the activation that follows it.

    In several groups each share of the outputs reads its own share of the inputs, as in a convolution.
    """

    rows: int
    inputs: int
    outputs: int
    activation: str = ""
    groups: int = 1
    kernel: ClassVar[tuple[int, int]] = (1, 1)
    """What it has in common with a convolution of one pixel."""

    @property
    def flops(self) -> int:
        """Multiply-adds x 2."""
        return 2 * self.rows * self.parameters

    @property
    def parameters(self) -> int:
        """Number of weights, without a bias."""
        return self.outputs * (self.inputs // self.groups)


Weighted = Convolution | Linear
"""What has one weight: an output reads features, one for each of its inputs and positions of its kernel."""


@dataclass(frozen=True)
class Masked:
    """A dense operator whose weight keeps 2 of each 4 consecutive inputs of every output; the others are zeros.

    Its costs are those of the dense one: who saves them is an engine with kernels for such weights.
    """

    dense: Weighted

    @property
    def flops(self) -> int:
        """Multiply-adds x 2, those with zeros too."""
        return self.dense.flops

    @property
    def parameters(self) -> int:
        """Number of weights, the zeros too."""
        return self.dense.parameters


@dataclass(frozen=True)
class Attention:
    """softmax(Q K^T) V on [batch, heads, queries, width] and [batch, heads, keys, width or value_width]."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int

    @property
    def flops(self) -> int:
        """Multiply-adds x 2 of the two matrix products."""
        return 2 * self.batch * self.heads * self.queries * self.keys * (self.width + self.value_width)

    @property
    def parameters(self) -> int:
        """An attention product has none of its own."""
        return 0


@dataclass(frozen=True)
class Absent:
    """A layer that is not there any more, because the branch it was in is dropped: it costs nothing."""

    flops: int = 0
    parameters: int = 0


Operator = Convolution | Mixture | Linear | Masked | Attention | Absent


def key(operator: Operator) -> str:
    """A stable text for caches: the kind and every size."""
    return f"{type(operator).__name__} {json.dumps(asdict(operator), sort_keys=True)}"
