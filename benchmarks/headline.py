"""The headline table: CIFAR-10 top-1 against measured ONNX Runtime latency, everyone fine-tuned alike.

    python benchmarks/headline.py plan  --data DIR --weights DIR    # searches, on the machine whose latency counts
    python benchmarks/headline.py tune  --data DIR                  # fine-tunes, on a GPU where there is one
    python benchmarks/headline.py table --data DIR                  # measures, reads the test set, prints, draws
    python benchmarks/headline.py check --data DIR --weights DIR    # measures and reads the shipped rows again
    python benchmarks/headline.py draw  --results FILE [FILE ...]   # one picture of several machines' results

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets; `tune` reads its training part alone. WEIGHTS are
folders with cifar10_<model>.safetensors; those that `train.py` has written are found by themselves. Each stage does
what is not done yet, so it can be killed and started again, and `tune` can be given another machine's WORK folder.

Methods: `dense` (tuned as long as the others); `torch-pruning`, the best of its importances, scopes and roundings, each
bisected on its ratio to the same latency (the six with the best validation accuracy before tuning get `--short` epochs
of it, the best after that is tuned whole); graphprune's `dp` (with a row without compensation) and `autosculpt`;
`sibling`, smaller networks at their own latency; `int8`, ONNX Runtime's static quantisation of the dense network and
of graphprune's. Tuning is the same for all: recipe, epochs, batch norms re-estimated before it, taught by the dense
network ("distilled") or from labels alone. The validation slice decides everything; the test set is read once for each
entry. Latency: one thread, batch 1, in fresh processes, interleaved with the dense network. Writes
`results/headline-<model>-<engine>-1t-<processor>.json` entry by entry, a picture, and our ONNX files at 2x.
"""

import argparse
from importlib import import_module
from pathlib import Path

import zoo

METHODS = ("dense", "torch-pruning", "dp", "autosculpt", "sibling", "int8")
BLOCKS = ("distilled", "labels")
STAGES = {
    "plan": ("headline_plan", "plan"),
    "tune": ("headline_tune", "tune"),
    "table": ("headline_table", "table"),
    "check": ("headline_table", "check"),
    "draw": ("headline_table", "picture"),
}
"""Stage -> the module that is imported for it, and its function."""
MODELS = "resnet56,vit,mobilenetv2,resnet20,vgg16_bn"


def _list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stage", choices=STAGES)
    made.add_argument("--data", help="folder with CIFAR-10")
    made.add_argument("--results", type=Path, nargs="+", default=[], help="files that `draw` shows, one for a network")
    made.add_argument("--weights", type=Path, action="append", default=[], help="folder with trained networks")
    made.add_argument("--models", type=_list, default=MODELS, help=f"some of {', '.join(zoo.NETWORKS)}")
    made.add_argument("--methods", type=_list, default=",".join(METHODS), help=f"some of {', '.join(METHODS)}")
    made.add_argument("--blocks", type=_list, default=",".join(BLOCKS), help="how to tune")
    made.add_argument("--speedups", type=lambda text: [float(word) for word in _list(text)], default="1.5,2,3")
    made.add_argument("--seeds", type=int, default=3, help="seeds of the tuning, from 0 on")
    made.add_argument("--epochs", type=int, default=30, help="of the tuning")
    made.add_argument("--rate", type=float, default=0.2, help="learning rate, as a share of that of a new network")
    made.add_argument("--short", type=int, default=1, help="epochs that choose among Torch-Pruning's settings")
    made.add_argument("--batch", type=int, default=128, help="images in a batch of the tuning")
    made.add_argument("--trials", type=int, default=200, help="of each search")
    made.add_argument("--variant", default="", help="only settings of Torch-Pruning whose name has this pattern in it")
    made.add_argument("--images", type=int, help="tune on so many images only (to try the script)")
    made.add_argument("--validation", type=int, help="validation images (to try the script)")
    made.add_argument("--test-images", type=int, help="read so many test images only (to try the script)")
    made.add_argument(
        "--unmeasured", action="store_true", help="leave latencies to a later `table`, on a quiet machine"
    )
    made.add_argument("--work", type=Path, default=Path("headline_work"), help="folder for what the stages share")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    options = made.parse_args()
    needed = "results" if options.stage == "draw" else "data"
    if not getattr(options, needed):
        made.error(f"{options.stage} needs --{needed}")
    _refuse(options.models, zoo.NETWORKS, "model")
    _refuse(options.methods, METHODS, "method")
    _refuse(options.blocks, BLOCKS, "block")
    options.weights.append(zoo.TRAINED)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    return options


def _refuse(names: list[str], known: object, kind: str) -> None:
    if unknown := [name for name in names if name not in known]:  # type: ignore[operator]
        raise SystemExit(f"unknown {kind} {unknown[0]!r}; known are {', '.join(known)}")  # type: ignore[call-overload]


def main() -> None:
    """One stage. What only another one needs is not imported."""
    options = arguments()
    module, function = STAGES[options.stage]
    getattr(import_module(module), function)(options)


if __name__ == "__main__":
    main()
