"""Trains a CIFAR-10 network from scratch, seeded; on a GPU where there is one.

    python benchmarks/train.py --data DIR --model vit [--out DIR] [--test]

DIR is torchvision's CIFAR-10 folder or a folder of WebP sheets. `zoo.py` has the networks and their recipes. Killed and
started again, it goes on after the last complete epoch. Writes `cifar10_<model>.safetensors` (half precision) and, line
by line, `cifar10_<model>.jsonl`: first the settings, then each epoch, with `--test` in the end the test accuracy of the
written weights; where the weights are there already, only that is done. 2,000 training images are held out to choose
between the last weights and their average.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import zoo
from device_data import on_device, prepare_device
from safetensors.torch import save
from torch import nn

from graphprune.files import atomic
from graphprune.machine import environment
from graphprune.randomness import seeded
from graphprune.tasks.task import Task
from graphprune.training.finetune import train
from graphprune.training.recipe import Recipe

BATCH = 256


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--model", required=True, choices=list(zoo.NETWORKS))
    parser.add_argument("--epochs", type=int, help="other than the recipe's")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--images", type=int, help="train on so many images only (to try the script)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="read the test set at the end")
    parser.add_argument("--out", type=Path, default=zoo.TRAINED, help="folder for weights and log")
    parser.add_argument("--work", type=Path, default=Path("train_work"), help="folder for the checkpoint")
    return parser.parse_args()


class Log:
    """A file of JSON lines, begun anew by a run that does not go on from a checkpoint."""

    def __init__(self, file: Path, keep: bool) -> None:
        self.file, self.start = file, time.perf_counter()
        if not keep:
            file.write_text("")

    def add(self, **facts: Any) -> None:
        """Write a line, and print it."""
        line = json.dumps(facts | {"seconds": round(time.perf_counter() - self.start, 1)})
        print(line, flush=True)
        with self.file.open("a") as file:
            file.write(line + "\n")


def run(options: argparse.Namespace, recipe: Recipe, task: Task, weights: Path) -> None:
    """Train, or go on, and write the weights."""
    network, name = zoo.NETWORKS[options.model], f"cifar10_{options.model}"
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.work / f"{name}.checkpoint.safetensors"
    log = Log(weights.with_suffix(".jsonl"), keep=checkpoint.exists())
    prepare_device()
    with seeded(options.seed):
        model = zoo.build(options.model)
    log.add(
        model=options.model, params=sum(value.numel() for value in model.parameters()), batch=options.batch,
        images=options.images, recipe=asdict(recipe), **zoo.settings(options.model), environment=environment(),
    )  # fmt: skip
    trained = train(
        model, on_device(task, options.images, network.randaugment, network.mixing), recipe, checkpoint=checkpoint,
        progress=lambda epoch, loss, accuracy: log.add(epoch=epoch, loss=loss, validation=accuracy),
    )  # fmt: skip
    log.add(done=True, validation=trained.accuracy, setting=str(trained.setting))
    save_halves(trained.model, weights)
    checkpoint.unlink()


def save_halves(model: nn.Module, file: Path) -> None:
    """Write the state of a model, floating-point numbers in half precision: the whole file or nothing."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    atomic.write_bytes(file, save({name: value.contiguous() for name, value in state.items()}))


def main() -> None:
    """Train what is not trained yet; read the test set when asked to."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = zoo.NETWORKS[options.model].recipe
    recipe = replace(recipe, epochs=options.epochs or recipe.epochs, seed=options.seed)
    task = Task.load(f"cifar10:{options.data}", batch_size=options.batch)
    weights = options.out / f"cifar10_{options.model}.safetensors"
    if not weights.exists():
        run(options, recipe, task, weights)
    if options.test:
        accuracy = task.test_accuracy(zoo.build(options.model, weights).eval())
        Log(weights.with_suffix(".jsonl"), keep=True).add(test=accuracy)


if __name__ == "__main__":
    main()
