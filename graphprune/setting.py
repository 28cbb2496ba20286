"""Where and in which number format a network trains fastest here: found by timing a step, not from belief."""

import copy
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from graphprune.task import first_output

TIMED_IMAGES = 16
"""On a CPU. A GPU is timed on a whole batch: a step of a few images would only time how fast kernels are launched."""
TIMED_STEPS = 3
ENOUGH_SECONDS = 4.0
"""Where steps take long, a warm-up and one timed step of a setting have to do."""
MARGIN = 1.1
"""A setting replaces the plain one only when its step is faster by this factor: timings are noisy."""


@dataclass(frozen=True)
class Setting:
    """Device, memory layout, and whether forward passes run under bfloat16 autocast (weights stay float32)."""

    device: str = "cpu"
    channels_last: bool = False
    bfloat16: bool = False

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
        layout = ", channels last" if self.channels_last else ""
        return f"{self.device}, {'bfloat16 autocast' if self.bfloat16 else 'float32'}{layout}"

    @classmethod
    def plain(cls) -> Self:
        """float32 in the ordinary layout, on CUDA where there is one."""
        return cls("cuda" if torch.cuda.is_available() else "cpu")


def fastest(model: nn.Module, inputs: Tensor) -> Setting:
    """The setting in which a training step on `inputs`, or some of them, is fastest here; the model is untouched.

    A setting that the model cannot run in (a `view` that needs the ordinary layout, for example) is passed over.
    """
    plain = Setting.plain()
    others = [Setting(plain.device, layout, low) for layout, low in ((True, False), (False, True), (True, True))]
    batch = inputs[:TIMED_IMAGES] if plain.device == "cpu" else inputs
    seconds = {setting: _step_seconds(setting, model, batch) for setting in (plain, *others)}
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * MARGIN < seconds[plain] else plain


def _step_seconds(setting: Setting, model: nn.Module, inputs: Tensor) -> float:
    """The shortest of some training steps, in seconds; infinite when the model cannot run so."""
    seconds = []
    try:
        trial = setting.place(copy.deepcopy(model)).train()
        batch = setting.inputs(inputs)
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            with setting.autocast():
                outputs = first_output(trial(batch))
            torch.autograd.backward(outputs.float().square().mean())
            if batch.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if len(seconds) > 1 and sum(seconds) > ENOUGH_SECONDS:
                break
    except RuntimeError:
        return float("inf")
    return min(seconds[1:])
