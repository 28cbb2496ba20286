"""Where and in which number format a network trains fastest here: found by timing a step, not from belief."""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Self, cast

import torch
from torch import Tensor, nn

from graphprune.tasks.task import first_output

TIMED_IMAGES = 16
"""On a CPU. A GPU is timed on a whole batch: a step of a few images would only time how fast kernels are launched."""
TIMED_STEPS = 10
ENOUGH_SECONDS = 2.0
"""Where steps take long, fewer of them have to do: a warm-up and one timed step at least."""
MARGIN = 1.1
"""A setting replaces the plain one only when its step is faster by this factor: timings are noisy."""


@dataclass(frozen=True)
class Setting:
    """Device, memory layout, whether forward passes run under bfloat16 autocast (weights stay float32), and whether a
    GPU is given forward and backward pass as one CUDA graph each instead of kernel by kernel.
    """

    device: str = "cpu"
    channels_last: bool = False
    bfloat16: bool = False
    captured: bool = False

    def place(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and layout, in place."""
        model.to(torch.device(self.device))
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def inputs(self, inputs: Tensor) -> Tensor:
        """A batch on the device, [N, C, H, W] in the layout of the model."""
        inputs = inputs.to(self.device, non_blocking=True)
        if self.channels_last and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def autocast(self) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16)

    def __str__(self) -> str:
        layout, launched = ", channels last" * self.channels_last, ", CUDA graphs" * self.captured
        return f"{self.device}, {'bfloat16 autocast' if self.bfloat16 else 'float32'}{layout}{launched}"

    @classmethod
    def plain(cls) -> Self:
        """float32 in the ordinary layout, on CUDA where there is one."""
        return cls("cuda" if torch.cuda.is_available() else "cpu")


class Runner:
    """Calls a model, placed by a setting, on batches that are placed as well, and gives its first output.

    The first batch, in the mode that the model then has, is what a captured setting captures; batches of another shape
    run as usual. Small networks gain most: for them, launching a kernel takes longer than the kernel.
    """

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.model, self.setting = model, setting
        self._graph: Callable[[Tensor], Tensor] | None = None
        self._shape: torch.Size | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The first output for inputs [N, ...], with its gradient where gradients are wanted."""
        if self.setting.captured and self._graph is None:
            self._graph, self._shape = self._captured(inputs), inputs.shape
        if self._graph is not None and inputs.shape == self._shape:
            return self._graph(inputs)
        with self.setting.autocast():
            return first_output(self.model(inputs))

    def _captured(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """The model as CUDA graphs; the statistics that it gathers meanwhile are forgotten."""
        if silence := getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None):
            silence(False)  # gradients are accumulated on another stream than they were captured on, which is meant
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.autocast("cuda", torch.bfloat16, enabled=self.setting.bfloat16, cache_enabled=False):
            whole = _FirstOutput(self.model)
            whole.training = self.model.training
            own = inputs.clone(memory_format=torch.preserve_format)
            graph = torch.cuda.make_graphed_callables(whole, (own,), allow_unused_input=True)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])
        return cast(Callable[[Tensor], Tensor], graph)


class _FirstOutput(nn.Module):
    """A model's first output. Capturing replaces this module's `forward`, the model itself stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return first_output(self.model(inputs))


def fastest(model: nn.Module, inputs: Tensor) -> Setting:
    """The setting in which a training step on `inputs`, or some of them, is fastest here; the model is untouched.

    A setting that the model cannot run in (a `view` that needs the ordinary layout, for example, or a branch on values
    that cannot be captured) is passed over. On a GPU other layouts and formats are timed as CUDA graphs only: launched
    kernel by kernel, small networks take the same time in all of them.
    """
    plain = Setting.plain()
    captured = plain.device == "cuda"
    batch = inputs if captured else inputs[:TIMED_IMAGES]
    others = [Setting(plain.device, layout, low, captured) for layout, low in product((False, True), repeat=2)]
    seconds = {setting: _step_seconds(setting, model, batch) for setting in dict.fromkeys((plain, *others))}
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * MARGIN < seconds[plain] else plain


def _step_seconds(setting: Setting, model: nn.Module, inputs: Tensor) -> float:
    """The shortest of some training steps, in seconds; infinite when the model cannot run so."""
    seconds = []
    try:
        run = Runner(setting.place(copy.deepcopy(model)).train(), setting)
        batch = setting.inputs(inputs)
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            torch.autograd.backward(run(batch).float().square().mean())
            if batch.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if len(seconds) > 1 and sum(seconds) > ENOUGH_SECONDS:
                break
    except RuntimeError:
        return float("inf")
    return min(seconds[1:])
