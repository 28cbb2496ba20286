"""Candidates are asked in ONNX Runtime: the same answers as torch's, in any setting, and the fastest of them."""

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import InputError, StepError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.searching.judging import PATIENCE, Asking
from graphprune.tasks.task import predict


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


IMAGES = torch.randn(21, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("piece", [1, 8, 21, 50])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_answers_are_those_of_torch(piece: int, threads: int) -> None:
    model = network()
    ask = Asking("input", piece, threads).answers(onnx_bytes(model, IMAGES[:2]))
    for images in (IMAGES, IMAGES[:3]):
        torch.testing.assert_close(ask(images), predict(model, images), rtol=0, atol=1e-5)


def test_the_first_of_several_outputs_is_asked_for() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean((2, 3)), x.sum((2, 3))

    ask = Asking("x", 4, 1).answers(onnx_bytes(Two(), IMAGES[:2]))
    torch.testing.assert_close(ask(IMAGES), IMAGES.mean((2, 3)))


def test_a_file_that_cannot_be_loaded_or_run_says_so() -> None:
    with pytest.raises(InputError, match="not an ONNX model"):
        Asking("input", 4, 1).answers(b"nonsense")
    ask = Asking("input", 4, 1).answers(onnx_bytes(network(), IMAGES[:2]))
    with pytest.raises(StepError, match="cannot run"):
        ask(IMAGES[:, :, :5])


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        (lambda piece, threads: 1e-6 * (abs(piece - 20) + 3 * threads), (21, 1), {(8, 1), (21, 1), (8, 2), (21, 2)}),
        (lambda piece, threads: PATIENCE / threads, (8, 2), {(8, 1), (8, 2)}),
    ],
)
def test_the_fastest_setting_is_taken_and_slow_models_see_small_pieces(
    seconds: object, best: tuple[int, int], tried: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()

    def measured(self: Asking, dense: bytes, images: Tensor) -> float:
        asked.add((self.piece, self.threads))
        return float(seconds(self.piece, self.threads))  # type: ignore[operator]

    monkeypatch.setattr(Asking, "seconds", measured)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = Asking.fastest(b"", "input", IMAGES)
    assert (found.piece, found.threads) == best
    assert asked == tried


def test_seconds_are_the_least_of_some_runs_and_those_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 40.0, 100.0, 116.0, 200.0, 280.0])
    monkeypatch.setattr("graphprune.searching.judging.time.perf_counter", lambda: next(clock))
    assert Asking("input", 8, 1).seconds(onnx_bytes(network(), IMAGES[:2]), IMAGES) == 2.0
