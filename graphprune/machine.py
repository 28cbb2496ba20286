"""What a result came from: the processor, the system and the versions that can change a figure."""

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from graphprune.engines.sampling import processor

PACKAGES = ("graphprune", "torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "onnxscript", "openvino")


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return found


def environment() -> dict[str, str]:
    """What a record stores as its `environment`: versions, processor, cores, system, and a GPU where there is one."""
    facts = {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return _versions() | facts
