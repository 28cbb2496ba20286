"""How a candidate is asked: in ONNX Runtime, in pieces of the size and with the threads that are fastest here.

On a CPU ONNX Runtime answers two to three times as fast as torch, and small pieces stay in the cache. Only how long it
takes depends on the setting, the answers do not, up to rounding.
"""

import time
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.tasks.task import Answers

PIECES = (8, 32, 128)
"""Numbers of images at a time."""
PATIENCE = 1.0
"""Seconds for one piece from which on larger ones are not tried."""
REPEATS = 3


@dataclass(frozen=True)
class Asking:
    """`piece` images at a time, `threads` within an operator; `name` is the input of the files."""

    name: str
    piece: int
    threads: int

    @classmethod
    def fastest(cls, dense: bytes, name: str, images: Tensor) -> Self:
        """The fastest setting for the dense model on images [N, ...], with one thread or as many as torch may use."""
        found: dict[Self, float] = {}
        for threads in sorted({1, torch.get_num_threads()}):
            for piece in sorted({min(piece, len(images)) for piece in PIECES}):
                setting = cls(name, piece, threads)
                found[setting] = setting.seconds(dense, images)
                if found[setting] * piece > PATIENCE:
                    break
        return min(found, key=lambda setting: found[setting])

    def answers(self, file: bytes) -> Answers:
        """What asks a file. Raises as the engine does."""
        run = OnnxRuntimeEngine(threads=self.threads).loaded(file)

        def ask(inputs: Tensor) -> Tensor:
            found: list[NDArray[np.generic]] = [
                run({self.name: x.numpy()})[0] for x in torch.split(inputs.cpu(), self.piece)
            ]
            return torch.from_numpy(np.concatenate(found)).float()

        return ask

    def seconds(self, dense: bytes, images: Tensor) -> float:
        """Seconds per image that the dense model takes."""
        ask, piece = self.answers(dense), images[: self.piece]
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            ask(piece)
            times.append((time.perf_counter() - start) / len(piece))
        return min(times)
