"""Models from specs: `timm:resnet18?num_classes=10`, `torchvision:resnet18`, `cifar:resnet20`, `module:function`, or
the path of an ONNX file."""

import ast
import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import nn

from graphprune.errors import InputError
from graphprune.files.weights import load_weights
from graphprune.models.cifar import NETWORKS

LIBRARIES = ("timm", "torchvision", "cifar")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Value = bool | int | float | str | None | tuple[Any, ...]

_FORBIDDEN = {"checkpoint_path", "cache_dir", "weights", "weights_backbone"}
"""Options that would make a library read or fetch a file, unless they are None; so would `pretrained_*`."""


@dataclass(frozen=True)
class Spec:
    """A parsed spec: `library` is one of LIBRARIES, "onnx" for a file with `name` as its path, or empty for a Python
    function with `name` = `module:function`.
    """

    library: str
    name: str
    options: tuple[tuple[str, Value], ...] = ()

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as keyword arguments, without `pretrained`."""
        return {key: value for key, value in self.options if key != "pretrained"}

    @property
    def pretrained(self) -> bool:
        """Whether the spec asks the library for its published weights."""
        return bool(dict(self.options).get("pretrained", False))


def parse(spec: str) -> Spec:
    """Read a spec string. Values are plain literals or one word. Raises InputError for anything else."""
    target, _, query = spec.partition("?")
    if target.endswith(".onnx"):
        if query:
            raise InputError(f"the ONNX file {target} takes no options")
        return Spec("onnx", target)
    library, _, name = target.partition(":")
    options = tuple(_option(text, spec) for text in query.split("&")) if query else ()
    names = [key for key, _ in options]
    if len(set(names)) < len(names):
        raise InputError(f"model {spec!r} gives an option twice")
    if library in LIBRARIES and re.fullmatch(r"\w[\w.-]*", name):
        return Spec(library, name, options)
    if library not in LIBRARIES and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        return Spec("", target, options)
    raise InputError(f"unknown model {spec!r}: expected timm:NAME, torchvision:NAME, cifar:NAME or pkg.module:function")


def _option(text: str, spec: str) -> tuple[str, Value]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise InputError(f"model {spec!r}: {text!r} is not an option of the form name=value")
    read = _value(value, spec)
    if read is not None and (key in _FORBIDDEN or key.startswith("pretrained_")):
        raise InputError(f"model {spec!r}: option {key!r} is not allowed; give trained weights as a safetensors file")
    return key, read


def _value(text: str, spec: str) -> Value:
    words: dict[str, Value] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"[A-Za-z_]\w*", text):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(number, int | float) for number in numbers):
        raise InputError(f"model {spec!r}: {text!r} is not a number, a tuple of numbers or a word")
    return value  # type: ignore[no-any-return]


def create(spec: str, weights: Path | None = None) -> nn.Module:
    """Build the model that `spec` names, in train mode, with random weights or those of a safetensors file.

    Nothing is fetched unless the spec says `pretrained=True`. Raises InputError for an unknown model, an option the
    model does not take, or weights that do not fit it.
    """
    parsed = parse(spec)
    builders = {"timm": _timm, "torchvision": _torchvision, "cifar": _cifar, "onnx": _file, "": _function}
    builder = builders[parsed.library](parsed)
    try:
        model = builder()
    except InputError:
        raise
    except Exception as error:  # a model's constructor may raise anything; the caller's spec is the cause
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"model {spec!r} cannot be built: {reason}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec!r} is a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights)
    return model


def _timm(spec: Spec) -> Callable[[], Any]:
    if not timm.is_model(spec.name):
        raise _unknown("timm", spec.name, timm.list_models())
    return lambda: timm.create_model(spec.name, pretrained=spec.pretrained, **spec.keywords)


def _torchvision(spec: Spec) -> Callable[[], Any]:
    names = torchvision.models.list_models(module=torchvision.models)
    if spec.name not in names:
        raise _unknown("torchvision", spec.name, names)
    weights = "DEFAULT" if spec.pretrained else None
    return lambda: torchvision.models.get_model(spec.name, weights=weights, **spec.keywords)


def _cifar(spec: Spec) -> Callable[[], Any]:
    if spec.name not in NETWORKS:
        raise _unknown("cifar", spec.name, list(NETWORKS))
    if spec.pretrained:
        raise InputError(f"there are no published weights for cifar:{spec.name}; give a safetensors file")
    return lambda: NETWORKS[spec.name](**spec.keywords)


def _file(spec: Spec) -> Callable[[], Any]:
    from graphprune.onnx_files.importing import import_onnx

    return lambda: import_onnx(spec.name).train()


def _function(spec: Spec) -> Callable[[], Any]:
    module, _, name = spec.name.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(f"cannot import {module!r} for model {spec.name!r}: {error}") from error
    except AttributeError:
        raise InputError(f"module {module!r} has no function {name!r}") from None
    return lambda: function(**dict(spec.options))


def _unknown(library: str, name: str, known: Sequence[str]) -> InputError:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [n for n in known if name in n][:3]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return InputError(f"{library} has no model {name!r}{hint}")


def refuse_remote(spec: str) -> None:
    """Raise InputError unless building `spec` neither fetches anything nor imports code that the spec names.

    For specs that come out of a file: a Python function, published weights, a hub name or a checkpoint path is refused.
    """
    parsed = parse(spec)
    if not parsed.library:
        raise InputError(f"the saved model comes from the Python function {parsed.name!r}: pass that model yourself")
    if parsed.pretrained:
        raise InputError(
            f"the saved model's spec {spec!r} would fetch weights; graphprune only rebuilds the architecture"
        )


def architecture(spec: str) -> str:
    """The spec without `pretrained`: what has to be saved so that the model can be rebuilt from its own tensors."""
    target, _, query = spec.partition("?")
    kept = "&".join(text for text in query.split("&") if text and text.partition("=")[0] != "pretrained")
    return f"{target}?{kept}" if kept else target


def default_input_size(spec: str, model: nn.Module) -> tuple[int, int, int]:
    """The (channels, height, width) that the model expects. Raises InputError where nothing tells."""
    parsed = parse(spec)
    if parsed.library == "onnx":
        return _declared(spec, model)
    options = parsed.keywords
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, *_native_size(parsed))
    size = options.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return int(options.get("in_chans") or options.get("in_channels") or channels), int(height), int(width)


def _declared(path: str, model: nn.Module) -> tuple[int, int, int]:
    """The size of an ONNX file's image input."""
    sizes = [sizes for _, sizes in getattr(model, "inputs", [])]
    if len(sizes) != 1 or len(sizes[0]) != 4 or None in sizes[0][1:]:
        raise InputError(f"the input size of {path!r} is not known: give it")
    return sizes[0][1:]  # type: ignore[no-any-return]


def _native_size(spec: Spec) -> tuple[int, int]:
    if spec.library == "cifar":
        return 32, 32
    if spec.library == "torchvision":
        published = torchvision.models.get_model_weights(spec.name).DEFAULT
        crop = getattr(published.transforms(), "crop_size", [224])
        return crop[0], crop[-1]
    if "img_size" in spec.keywords:
        return 0, 0  # replaced by the option
    raise InputError(f"the input size of {spec.name!r} is not known: give it")


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation per channel, for pixels in [0, 1], that the model is trained with."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean") or IMAGENET_MEAN), tuple(config.get("std") or IMAGENET_STD)
