"""What all verbs share: common options, and the answer that a verb gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.console import RenderableType

from graphprune.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from graphprune.engines.base import Engine

MODELS = (
    "timm:NAME, torchvision:NAME, cifar:NAME (resnet20 ..., vgg16) or pkg.module:function, options after a '?'; "
    "or an ONNX file"
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"{MODELS}, e.g. 'timm:resnet18?num_classes=10'.", show_default=False)
]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="The model's trained weights, a safetensors file.")]
Data = Annotated[str | None, typer.Option(metavar="DATA", help="digits, cifar10:DIR or imagefolder:DIR.")]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Instead of --data: images without labels, as the model gets them (npy, NCHW)."),
]
InputSize = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="Height and width of the input. Default: what the model declares.")
]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="What latency means: onnxruntime, or openvino (an extra).")
]
Threads = Annotated[int, typer.Option(metavar="N", help="Threads of the engine while timing.")]
Batch = Annotated[int, typer.Option(metavar="N", help="Images in a timed run.")]
OwnModel = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="The dense model, where it is a pkg.module:function: saved ones are not imported."
    ),
]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that prune, finetune or demo wrote.", show_default=False)
]

_ALWAYS = "For every verb"


@dataclass(frozen=True)
class Answer:
    """What a verb found: `facts` are printed with --json, `view` without."""

    facts: Mapping[str, Any]
    view: tuple[RenderableType, ...]


@dataclass(frozen=True, kw_only=True)
class Verb(ABC):
    """A verb with its options parsed. Its docstring is its help text."""

    stopped: ClassVar[str] = "stopped"
    """What to say after Ctrl-C."""

    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=_ALWAYS)
    ] = False
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error.", rich_help_panel=_ALWAYS)
    ] = False

    @abstractmethod
    def run(self) -> Answer:
        """Do it. Progress goes to standard error. Raises InputError, StepError."""


def engine(name: str, **settings: Any) -> "Engine":
    """An engine with these settings. Raises InputError for an unknown one, and for settings that it does not have."""
    from graphprune import engines

    return engines.create(name, **settings)


def named_data(data: str | None, calibration: Path | None) -> str:
    """The task's name, which one of two options tells. Raises InputError for none and for both."""
    if (data is None) == (calibration is None):
        raise InputError("give either --data, or --calibration with a file of images")
    return data or f"images:{calibration}"


def input_shape(spec: str, model: "nn.Module", size: int | None) -> tuple[int, int, int]:
    """(channels, height, width): what the model declares, or square images of `size` with the declared channels."""
    from graphprune import models

    try:
        declared = models.default_input_size(spec, model)
    except InputError:
        if size is None:
            raise InputError(f"the input size of {spec} is not known: give --input-size") from None
        return 3, size, size
    return declared if size is None else (declared[0], size, size)
