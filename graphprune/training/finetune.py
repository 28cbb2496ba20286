"""Training with a word on where it starts: a pruned network learns from its dense one, a new one from labels alone."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from graphprune.errors import InputError
from graphprune.result import Result
from graphprune.tasks.task import Task
from graphprune.training.recipe import Recipe
from graphprune.training.training import Checkpoint, Progress, Trained, fit


def finetune(
    result: Result,
    task: Task,
    epochs: int | None = None,
    recipe: Recipe | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Fine-tune the pruned network by distillation from the dense one; a new Result comes back.

    What was cut stays cut: the network's shapes are not touched. On an unlabelled task the dense network alone teaches.
    `epochs` overrides the recipe's. With `checkpoint`, a file, a killed run goes on after its last complete epoch.
    The record's accuracy becomes that of the new weights; everything that depends on shapes alone is kept.
    Raises InputError for a task without training data, for a checkpoint of another plan and for an ONNX model,
    StepError when training diverges.
    """
    if not isinstance(result.model, nn.Module):
        raise InputError("only a torch model can be fine-tuned, this result holds an ONNX model")
    task = task.with_reference(result.dense)
    trained = fit(
        result.model,
        task,
        _with_epochs(recipe, epochs),
        teacher=result.dense,
        checkpoint=Checkpoint(Path(checkpoint), result.plan.to_json()) if checkpoint is not None else None,
        progress=progress,
    )
    notes = (*result.notes, f"fine-tuned for {len(trained.history)} epochs ({trained.setting})")
    before = result.record.accuracy
    if before is not None and trained.accuracy < before:
        notes += (f"fine-tuning lowered the validation accuracy from {before:.4f} to {trained.accuracy:.4f}",)
    record = replace(result.record, accuracy=trained.accuracy)
    return replace(result, model=trained.model, record=record, history=trained.history, notes=notes)


def train(
    model: nn.Module,
    task: Task,
    recipe: Recipe | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a new network on labels, with the same loop and no teacher; `model` itself is unchanged.

    Raises as `finetune` does.
    """
    return fit(
        model,
        task,
        recipe or Recipe(),
        checkpoint=Checkpoint(Path(checkpoint), "") if checkpoint is not None else None,
        progress=progress,
    )


def _with_epochs(recipe: Recipe | None, epochs: int | None) -> Recipe:
    recipe = recipe or Recipe()
    return recipe if epochs is None else replace(recipe, epochs=epochs)
