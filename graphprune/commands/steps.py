"""Steps that several verbs of the command line share: a model's task, resumable training, the last judgement."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from graphprune import models
from graphprune.errors import InputError
from graphprune.files.layout import TUNING
from graphprune.result import Result
from graphprune.tasks.task import Task
from graphprune.training.finetune import finetune
from graphprune.training.recipe import Recipe

Scores = Mapping[str, tuple[float, float]]
"""What was judged ("test accuracy") -> the value of the dense and of the pruned model, in [0, 1]."""


def load_task(data: str, spec: str, model: nn.Module, size: int | None = None, seed: int = 0) -> Task:
    """The task `data` at the input size that the model declares, or at `size`.

    Images of folders get the model's own normalisation, the other tasks keep theirs. Raises InputError as `Task.load`.
    """
    options: dict[str, object] = {"seed": seed}
    if (pixels := size or _declared_size(spec, model)) is not None:
        options["image_size"] = pixels
    if data.startswith("imagefolder:"):
        options["mean"], options["std"] = models.normalisation(model)
    return Task.load(data, **options)


def _declared_size(spec: str, model: nn.Module) -> int | None:
    """The height that the model declares, None where nothing tells. Raises InputError for oblong inputs."""
    try:
        _, height, width = models.default_input_size(spec, model)
    except InputError:
        return None
    if height != width:
        raise InputError(f"{spec} takes {height}x{width} images; the built-in tasks give square ones")
    return height


def tune(
    result: Result, task: Task, recipe: Recipe, folder: Path, progress: Callable[[int, float, float], None]
) -> Result:
    """Fine-tune with a checkpoint in the folder, which is removed once all epochs are done."""
    file = folder / TUNING
    tuned = finetune(result, task, recipe=recipe, checkpoint=file, progress=progress)
    file.unlink(missing_ok=True)
    return tuned


def accuracies(result: Result, task: Task, test: bool) -> Scores:
    """Dense and pruned model on the validation slice and, if asked for, once on the test set."""
    judged = task.with_reference(result.dense)
    name = "validation accuracy" if task.labelled else "agreement with dense"
    scores = {name: (judged.accuracy(result.dense), judged.accuracy(result.model))}
    if test:
        scores["test accuracy"] = (task.test_accuracy(result.dense), task.test_accuracy(result.model))
    return scores
