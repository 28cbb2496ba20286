"""Fine-tuning a result: it learns from the dense network, keeps every shape, and never looks at the test set."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.errors import InputError
from graphprune.plan import Choice, Plan
from graphprune.record import Record
from graphprune.result import Result
from graphprune.target import Target
from graphprune.tasks.task import Task
from graphprune.training.finetune import finetune, train
from graphprune.training.recipe import Recipe

SMALL = Recipe(epochs=4, precision="float32", seed=1)


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )


def untested() -> None:
    pytest.fail("the test set was read")


@pytest.fixture(scope="module")
def task() -> Task:
    loaded = Task.load("digits", image_size=8, batch_size=64, validation=500, calibration=64)
    return replace(loaded, test=untested)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dense(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return train(network(16), task, replace(SMALL, epochs=10)).model


@pytest.fixture(scope="module")
def pruned(task: Task, dense: nn.Module) -> Result:
    """Every second channel cut, by hand."""
    small, keep = network(8).eval(), torch.arange(0, 16, 2)
    with torch.no_grad():
        state = dense.state_dict()
        cut = {name: tensor[keep] for name, tensor in state.items() if name[0] in "01" and tensor.ndim}
        cut["5.weight"] = state["5.weight"].view(10, 16, 16)[:, keep].flatten(1)
        cut["5.bias"] = state["5.bias"]
        small.load_state_dict(cut, strict=False)
    plan = Plan("digits", (Choice("0", "filter", "8", tuple(keep.tolist())),))
    record = Record(plan, accuracy=task.accuracy(small), feasible=True, flops=7, params=9, agent="uniform")
    return Result(
        small,
        dense,
        cast(ModelGraph, SimpleNamespace()),
        plan,
        record,
        Record(Plan("digits"), accuracy=task.accuracy(dense)),
        Target(latency=0.5),
        notes=("a note",),
    )


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())


def test_accuracy_comes_back(task: Task, pruned: Result) -> None:
    before = pruned.record.accuracy
    reports = []
    tuned = finetune(pruned, task, epochs=10, recipe=SMALL, progress=lambda *report: reports.append(report))
    assert before is not None
    assert tuned.record.accuracy is not None
    assert tuned.record.accuracy > max(0.93, before + 0.02)
    assert tuned.record.accuracy == task.accuracy(tuned.model)
    assert tuned.history == tuple(reports)
    assert len(reports) == 10


def test_only_weights_change(task: Task, pruned: Result) -> None:
    dense, model = ({n: t.clone() for n, t in m.state_dict().items()} for m in (pruned.dense, pruned.model))
    tuned = finetune(pruned, task, recipe=replace(SMALL, epochs=1))
    assert {n: t.shape for n, t in tuned.model.state_dict().items()} == {n: t.shape for n, t in model.items()}
    assert not states_equal(tuned.model, pruned.model)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in pruned.dense.state_dict().items())
    assert all(torch.equal(tensor, model[name]) for name, tensor in pruned.model.state_dict().items())
    changed = {f.name for f in fields(Result) if getattr(tuned, f.name) is not getattr(pruned, f.name)}
    assert changed == {"model", "record", "history", "notes"}
    assert tuned.record == replace(pruned.record, accuracy=tuned.record.accuracy)
    assert tuned.notes[0] == "a note"


def test_the_dense_network_alone_teaches_without_labels(dense: nn.Module, pruned: Result, task: Task) -> None:
    images = torch.cat([*task.calibration, *(inputs for inputs, _ in task.validation)])
    unlabelled = Task.unlabelled(images, batch_size=32)
    before = unlabelled.with_reference(dense).accuracy(pruned.model)
    tuned = finetune(pruned, unlabelled, epochs=10, recipe=SMALL)
    assert tuned.record.accuracy is not None
    assert tuned.record.accuracy > before
    assert tuned.record.accuracy == unlabelled.with_reference(dense).accuracy(tuned.model)


def test_the_teacher_is_heard(task: Task, pruned: Result) -> None:
    """With alpha 1 labels count for nothing: a dense network that confuses 3 and 5 teaches to confuse them."""
    wrong = network(16)
    wrong.load_state_dict(pruned.dense.state_dict())
    swap = torch.tensor([0, 1, 2, 5, 4, 3, 6, 7, 8, 9])
    with torch.no_grad():
        for tensor in (wrong[5].weight, wrong[5].bias):
            tensor.copy_(tensor[swap])
    tuned = finetune(replace(pruned, dense=wrong), task, epochs=10, recipe=replace(SMALL, alpha=1.0))
    swapped = replace(task, validation=tuple((x, swap[y]) for x, y in task.validation if y is not None))
    assert swapped.accuracy(tuned.model) > 0.9
    assert task.accuracy(tuned.model) < 0.85


def test_a_loss_of_accuracy_is_noted(task: Task, pruned: Result) -> None:
    perfect = replace(pruned, record=replace(pruned.record, accuracy=1.0))
    tuned = finetune(perfect, task, epochs=1, recipe=SMALL)
    assert "lowered the validation accuracy from 1.0000" in tuned.notes[-1]


def test_resume_belongs_to_one_plan(task: Task, pruned: Result, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    checkpoint = tmp_path / "tuning.safetensors"
    with pytest.raises(Killed):
        finetune(pruned, task, recipe=SMALL, checkpoint=checkpoint, progress=kill)
    resumed = finetune(pruned, task, recipe=SMALL, checkpoint=checkpoint)
    assert states_equal(resumed.model, finetune(pruned, task, recipe=SMALL).model)
    other = replace(pruned, plan=Plan("digits"))
    with pytest.raises(InputError, match="another run"):
        finetune(other, task, recipe=SMALL, checkpoint=checkpoint)


def test_an_onnx_model_is_refused(task: Task, pruned: Result) -> None:
    with pytest.raises(InputError, match="ONNX"):
        finetune(replace(pruned, model=cast(nn.Module, object())), task)
