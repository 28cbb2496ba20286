"""The training loop: exact resume, the better weights, and what it must leave alone."""

import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import InputError, StepError
from graphprune.tasks.task import Task
from graphprune.training import setting as settings
from graphprune.training.recipe import Recipe
from graphprune.training.setting import Runner, Setting, fastest
from graphprune.training.snapshot import Snapshot
from graphprune.training.training import Checkpoint, fit

SMALL = Recipe(epochs=3, precision="float32", seed=5)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.load("digits", image_size=8, batch_size=64, validation=900, calibration=64)


def network(seed: int = 0) -> nn.Module:
    """Batch norm and dropout: running statistics and random masks have to survive a resume too."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


class Killed(Exception):
    pass


def killed_after(epoch: int, model: nn.Module, task: Task, recipe: Recipe, checkpoint: Checkpoint) -> None:
    def kill(number: int, loss: float, accuracy: float) -> None:
        if number == epoch:
            raise Killed

    with pytest.raises(Killed):
        fit(model, task, recipe, checkpoint=checkpoint, progress=kill)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_is_bit_identical(task: Task, tmp_path: Path, optimizer: str, epoch: int) -> None:
    recipe = replace(SMALL, optimizer=optimizer, lr=0.01)
    uninterrupted = Checkpoint(tmp_path / "whole.safetensors", "x")
    whole = fit(network(), task, recipe, checkpoint=uninterrupted)
    checkpoint = Checkpoint(tmp_path / "run.safetensors", "x")
    killed_after(epoch, network(), task, recipe, checkpoint)
    torch.manual_seed(99)
    torch.rand(7)  # the caller's random state is another one by now
    resumed = fit(network(), task, recipe, checkpoint=checkpoint)
    assert same(resumed.model, whole.model)
    assert resumed.history == whole.history
    assert checkpoint.path.read_bytes() == uninterrupted.path.read_bytes()  # averages and optimiser state too
    assert not same(fit(network(), task, replace(recipe, seed=6)).model, whole.model)


def test_resumed_is_bit_identical_in_the_fastest_setting(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting is stored: a clock that tells another story after the restart changes nothing."""
    recipe = replace(SMALL, precision="fastest")
    monkeypatch.setattr(
        "graphprune.training.training.fastest", lambda *_: Setting("cpu", channels_last=True, bfloat16=True)
    )
    whole = fit(network(), task, recipe)
    checkpoint = Checkpoint(tmp_path / "run.safetensors", "")
    killed_after(1, network(), task, recipe, checkpoint)
    monkeypatch.setattr("graphprune.training.training.fastest", lambda *_: Setting("cpu"))
    resumed = fit(network(), task, recipe, checkpoint=checkpoint)
    assert resumed.setting == whole.setting == Setting("cpu", channels_last=True, bfloat16=True)
    assert same(resumed.model, whole.model)
    assert all(parameter.is_contiguous() for parameter in resumed.model.parameters())


def test_a_finished_run_is_not_trained_again(task: Task, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run.safetensors", "")
    first = fit(network(), task, SMALL, checkpoint=checkpoint)
    untrainable = replace(task, train=lambda seed: pytest.fail("trained again"))
    again = fit(network(), untrainable, SMALL, checkpoint=checkpoint)
    assert same(first.model, again.model)
    assert first.accuracy == again.accuracy


def test_checkpoints_of_other_runs_are_refused(task: Task, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run.safetensors", "plan A")
    fit(network(), task, replace(SMALL, epochs=1), checkpoint=checkpoint)
    with pytest.raises(InputError, match="belongs to another run"):
        fit(network(), task, replace(SMALL, epochs=2), checkpoint=checkpoint)
    with pytest.raises(InputError, match="belongs to another run"):
        fit(network(), task, replace(SMALL, epochs=1), checkpoint=Checkpoint(checkpoint.path, "plan B"))
    with pytest.raises(InputError, match="another network"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), task, replace(SMALL, epochs=1), checkpoint=checkpoint)


def test_damaged_checkpoints(task: Task, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run.safetensors", "")
    fit(network(), task, replace(SMALL, epochs=1), checkpoint=checkpoint)
    whole = checkpoint.path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"something else entirely"):
        checkpoint.path.write_bytes(damaged)
        with pytest.raises(InputError, match="not a complete training snapshot"):
            fit(network(), task, replace(SMALL, epochs=1), checkpoint=checkpoint)


def test_a_full_disk_leaves_the_last_checkpoint(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "run.safetensors", "")
    killed_after(1, network(), task, SMALL, checkpoint)
    before = checkpoint.path.read_bytes()

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        fit(network(), task, SMALL, checkpoint=checkpoint)
    assert checkpoint.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_training_learns_and_reports_what_it_kept(task: Task) -> None:
    model, reports = network(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = fit(model, task, replace(SMALL, epochs=8), progress=lambda *report: reports.append(report))
    assert trained.accuracy > 0.9
    assert trained.accuracy == task.accuracy(trained.model)
    assert tuple(reports) == trained.history
    assert [number for number, _, _ in reports] == list(range(1, 9))
    assert not trained.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("favoured", "expected"), [("average", 0.75), ("weights", 0.75)])
def test_the_better_weights_are_kept(task: Task, favoured: str, expected: float) -> None:
    """The metric is made to favour one of the two: validation judges the weights first, then their average."""
    calls: list[Tensor] = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        calls.append(outputs)
        averaged = len(calls) == 2
        return expected if averaged == (favoured == "average") else 0.25

    trained = fit(network(), replace(task, metric=metric), replace(SMALL, epochs=1))
    assert trained.accuracy == expected
    outputs = torch.cat([trained.model(inputs) for inputs, _ in task.validation]).detach()
    torch.testing.assert_close(outputs, calls[1 if favoured == "average" else 0])
    assert not torch.allclose(calls[0], calls[1])


def test_the_average_lags_behind_the_weights(task: Task) -> None:
    """With a decay of 0 the average is the last weights, so both must score the same."""
    scores: list[float] = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        scores.append(float(outputs.sum()))
        return 0.0

    fit(network(), replace(task, metric=metric), replace(SMALL, epochs=1, ema_decay=0.0))
    assert scores[0] == scores[1]


def test_cumulative_batch_norm_does_not_ruin_training(task: Task) -> None:
    """Momentum None after many batches freezes the running statistics; trained weights then meet stale ones."""
    model = network()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.fill_(100_000)
    norm.running_mean = torch.full((8,), 30.0)
    trained = fit(model, task, replace(SMALL, epochs=8))
    assert trained.accuracy > 0.9


def test_the_callers_random_state_is_untouched(task: Task) -> None:
    model = network()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fit(model, task, replace(SMALL, epochs=1))
    assert torch.equal(torch.rand(2), expected)


def test_impossible_training(task: Task) -> None:
    with pytest.raises(InputError, match="no training data"):
        fit(network(), replace(task, train=None), SMALL)
    with pytest.raises(InputError, match="no training data"):
        fit(network(), replace(task, train=lambda seed: []), SMALL)
    with pytest.raises(StepError, match="no trainable parameters"):
        fit(network().requires_grad_(False), task, SMALL)
    with pytest.raises(StepError, match="diverged"):
        fit(network(), task, replace(SMALL, lr=1e30))


def test_snapshot_is_plain_tensors_and_json(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(network(), task, replace(SMALL, epochs=1), checkpoint=Checkpoint(path, "plan"))
    stored = Snapshot.read(path)
    assert stored.facts["identity"] == "plan"
    assert stored.part("model").keys() == network().state_dict().keys() == stored.part("average").keys()
    assert b"pickle" not in path.read_bytes()
    assert len(stored.part("optimizer")) == 5  # one momentum for each parameter


class NeedsOrdinaryLayout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4 * 36, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.linear(self.conv(images).view(len(images), -1))
        return hidden


def test_a_setting_that_the_model_cannot_run_in_is_passed_over() -> None:
    model, inputs = NeedsOrdinaryLayout(), torch.randn(4, 3, 8, 8)
    assert settings._step_seconds(Setting("cpu", channels_last=True), model, inputs) == float("inf")
    assert not fastest(model, inputs).channels_last


def test_the_fastest_setting_is_chosen_beyond_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Setting.plain()
    seconds = {plain: 1.0, replace(plain, channels_last=True): 0.95, replace(plain, bfloat16=True): 0.95}
    monkeypatch.setattr(settings, "_step_seconds", lambda setting, *_: seconds.get(setting, 2.0))
    assert fastest(nn.Identity(), torch.zeros(1)) == plain
    seconds[replace(plain, bfloat16=True)] = 0.5
    assert fastest(nn.Identity(), torch.zeros(1)) == replace(plain, bfloat16=True)


def test_timing_a_step_leaves_the_model_alone() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastest(model, torch.randn(4, 3, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.is_contiguous() for parameter in model.parameters())


def test_settings_compute_the_same_function(task: Task) -> None:
    model, inputs = network().eval(), torch.randn(4, 3, 8, 8)
    plain, other = Setting("cpu"), Setting("cpu", channels_last=True, bfloat16=True)
    expected = model(inputs)
    with other.autocast():
        got = other.place(network().eval())(other.inputs(inputs))
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)
    assert got.dtype == torch.bfloat16
    assert str(plain) == "cpu, float32"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_compute_what_launched_ones_do(task: Task) -> None:
    model = network().cuda()
    model[5].p = 0.0  # masks are drawn anew
    other = copy.deepcopy(model)
    captured, launched = Runner(model, Setting("cuda", captured=True)), Runner(other, Setting("cuda"))
    batches = [inputs.cuda() for inputs, _ in islice(task.train(0), 4)]  # type: ignore[misc]
    for inputs in [*batches[:3], batches[3][:7]]:  # the last one has another shape than what was captured
        for run, own in ((captured, model), (launched, other)):
            own.zero_grad()
            torch.autograd.backward(run(inputs).square().mean())
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)
        with torch.no_grad():
            for own in (model, other):
                for value in own.parameters():
                    value.sub_(0.1 * value.grad)  # type: ignore[operator]
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_that_cannot_be_captured_trains_all_the_same(task: Task) -> None:
    class Branching(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = super().forward(inputs)
            return outputs if float(outputs.detach().sum()) < 1e9 else -outputs

    assert not fastest(Branching(network()), next(iter(task.train(0)))[0]).captured  # type: ignore[misc]
    fit(Branching(network()), task, replace(SMALL, epochs=1, precision="fastest"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_training_learns(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.training.training.fastest", lambda *_: Setting("cuda", captured=True))
    trained = fit(network(), task, replace(SMALL, epochs=8, precision="fastest"), teacher=network(1).eval())
    assert trained.setting.captured
    trained = fit(trained.model, task, replace(SMALL, epochs=8, precision="fastest", lr=0.05))
    assert trained.accuracy > 0.7
