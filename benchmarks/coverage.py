"""Which models go all the way from trace to a pruned model that ONNX Runtime runs with the right numbers.

    python benchmarks/coverage.py [--sample N] [--models SPEC,...] [--jobs 2]

One small representative of every timm module, common names, torchvision's classification families, segmentation
networks and detection backbones; random weights. Each model has a process of its own, one thread and 120 seconds of
processor time, which is what a stage's seconds are too: so other work on the machine changes little.
Resumable: what is known of a model is kept in `--work`, to begin with what the results file knows, and only models that
are not done are run (`--again` those that failed as well, `--afresh` all); no more are started after `--minutes`.
Speed-ups are measured when all models are through, one after another. Writes `results/coverage.json`, each row with the
commit that it is of; with `--torch-pruning` the same of Torch-Pruning to `results/coverage_torch_pruning.json`.
`--choose` writes the list of timm representatives anew.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
REPRESENTATIVES = RESULTS / "coverage_models.json"
LARGEST = 60e6
PATIENCE = 5
"""A process that makes no use of its processor is ended after that many times the limit."""
KEEP, ALIGN = 0.5, 8
ROUNDS = 12
COMMON = """
    resnet18 resnet50 vgg11_bn mobilenetv2_100 mobilenetv3_small_100 efficientnet_b0 vit_tiny_patch16_224
    deit_tiny_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 convnext_atto densenet121 regnetx_002
    mobilevit_xxs levit_128s mixer_s16_224 poolformer_s12 xcit_nano_12_p16_224 cait_xxs24_224 repvgg_a0 inception_v3
    ghostnet_100 fastvit_t8 tiny_vit_5m_224 eva02_tiny_patch14_224 maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224
    hrnet_w18_small dla34
""".split()  # noqa: SIM905
TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t
    swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2
""".split()  # noqa: SIM905
FUNCTIONS = (
    "torchvision.models.segmentation:fcn_resnet50?weights_backbone=none",
    "torchvision.models.segmentation:deeplabv3_mobilenet_v3_large?weights_backbone=none",
    "torchvision.models.segmentation:lraspp_mobilenet_v3_large?weights_backbone=none",
    "torchvision.models.detection.backbone_utils:resnet_fpn_backbone?backbone_name=resnet18&weights=none",
    "torchvision.models.detection.backbone_utils:mobilenet_backbone?backbone_name=mobilenet_v3_large&fpn=true&weights=none",
)


# --- which models ---------------------------------------------------------------------------------------------------


def all_specs() -> list[str]:
    """Every model of the table."""
    families = json.loads(REPRESENTATIVES.read_text())["models"].values()
    timm = [f"timm:{name}" for name in dict.fromkeys([*families, *COMMON])]
    return [*timm, *(f"torchvision:{name}" for name in TORCHVISION), *FUNCTIONS]


def choose_representatives() -> None:
    """The smallest model of each timm module, counted on the meta device."""
    import timm

    sizes: dict[str, dict[str, int]] = {}
    for module in timm.list_modules():
        counts = {name: parameter_count(name) for name in timm.list_models(module=module)}
        sizes[module] = {name: count for name, count in counts.items() if count is not None}
        print(module, len(sizes[module]), flush=True)
    smallest = {module: min(known, key=lambda name: known[name]) for module, known in sizes.items() if known}
    too_large = {module: name for module, name in smallest.items() if sizes[module][name] > LARGEST}
    chosen = {module: name for module, name in smallest.items() if module not in too_large}
    body = {"timm": timm.__version__, "models": chosen, "without one below 60 M parameters": too_large}
    REPRESENTATIVES.write_text(json.dumps(body, indent=1) + "\n")


def parameter_count(name: str) -> int | None:
    """Parameters of a timm model; None where it cannot be built on the meta device, so that another stands for it."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:  # a model's constructor may raise anything
        print(f"{name}: {type(error).__name__}: {error}")
        return None
    return sum(parameter.numel() for parameter in model.parameters())


# --- one model, in a process of its own -----------------------------------------------------------------------------


class Log:
    """What is known of one model, on disk after every stage, so that a model that hangs still tells how far it came."""

    def __init__(self, spec: str, file: Path) -> None:
        self.file = file
        self.facts: dict[str, Any] = {"model": spec, "commit": commit(), "stage": "build", "seconds": {}}

    def note(self, **facts: Any) -> None:
        """Add facts."""
        self.facts |= facts
        self.file.write_text(json.dumps(self.facts))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        self.note(stage=name)
        start = time.process_time()
        yield
        self.facts["seconds"][name] = round(time.process_time() - start, 3)


def built(spec: str) -> tuple[Any, Any]:
    """The model with random weights in eval mode, and an example input of batch 2."""
    import torch

    from graphprune import models
    from graphprune.errors import InputError

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.create(spec).eval()
    try:
        size = models.default_input_size(spec, model)
    except InputError:
        size = (3, 224, 224)
    return model, torch.randn(2, *size)


def export(model: Any, pruned: Any, example: Any, log: Log) -> None:
    """The last stage: a file that ONNX Runtime runs with the right numbers, and the dense one to time beside it."""
    import graphprune as gp
    from graphprune.onnx_files.export import onnx_bytes

    folder = log.file.with_suffix("")
    with log.stage("export"):
        gp.export_onnx(pruned.eval(), folder / "pruned.onnx", example)
    with log.stage("export dense"):
        (folder / "dense.onnx").write_bytes(onnx_bytes(model, example))


def examine(spec: str, log: Log) -> None:
    """Take a model through all stages; raises what fails."""
    import torch

    sys.path.insert(0, str(ROOT))
    import graphprune as gp
    from graphprune.cutting.surgery import operate

    model, example = built(spec)
    with log.stage("trace"):
        graph = gp.trace(model, example)
    params = sum(value.numel() for value in model.parameters())
    log.note(size=tuple(example.shape[1:]), params=params, **graph_facts(graph))
    with log.stage("plan"):
        plan = gp.uniform_plan(graph, KEEP, align=ALIGN)
    log.note(choices=len(plan.choices))
    if not plan.choices:
        raise RuntimeError("nothing can be cut")
    with log.stage("apply"):
        operation = operate(model, graph, plan)
    pruned = operation.model
    log.note(own_class=operation.own_class, parts=len(operation.route.parts))
    log.note(kept_params=sum(value.numel() for value in pruned.parameters()))
    with log.stage("equivalence"):
        log.note(difference=difference_to_masked(model, example))
    if not log.facts["difference"] <= 1e-8:
        raise RuntimeError(f"the pruned model is not the masked one: relative difference {log.facts['difference']:.2g}")
    with log.stage("train"):
        check_training(pruned, torch.cat([example, example])[:3])
    with log.stage("save"):
        check_saved(spec, model, graph, plan, pruned, log.file.with_suffix(""), example)
    export(model, pruned, example, log)


def examine_torch_pruning(spec: str, log: Log) -> None:
    """The same stages with Torch-Pruning, as far as it has them; raises what fails."""
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks.torch_pruning_adapter import halve

    model, example = built(spec)
    before = sum(value.numel() for value in model.parameters())
    with log.stage("apply"):
        pruned = halve(model, example, 1 - KEEP, ALIGN)
    after = sum(value.numel() for value in pruned.parameters())
    log.note(size=tuple(example.shape[1:]), params=before, kept_params=after)
    if after == before:
        raise RuntimeError("nothing was cut")
    with log.stage("train"):
        check_training(pruned, torch.cat([example, example])[:3])
    export(model, pruned, example, log)


def graph_facts(graph: Any) -> dict[str, Any]:
    """Groups, and the shares of the layers' FLOPs and parameters that a cut of some group would change."""
    free = {group.atom for group in graph.all_groups if not group.frozen}
    layers = [(layer, bool((layer.inputs.atoms() | layer.outputs.atoms()) & free)) for layer in graph.layers]
    frozen = Counter(reason for group in graph.all_groups for reason in group.frozen)
    return {
        "groups": len(graph.all_groups),
        "free_groups": len(free),
        "sites": dict(Counter(site.kind for site in graph.all_sites)),
        "cuttable_flops": sum(layer.operator.flops for layer, cut in layers if cut) / max(graph.flops, 1),
        "cuttable_params": sum(layer.operator.parameters for layer, cut in layers if cut)
        / max(graph.parameter_count, 1),
        "frozen": dict(frozen.most_common(12)),
    }


def difference_to_masked(model: Any, example: Any) -> float:
    """The pruned model against the dense one with everything zero that the plan cuts, in float64, weights random."""
    import copy

    import torch

    import graphprune as gp
    from graphprune.cutting.surgery import operate
    from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble

    double = scramble(copy.deepcopy(model), dtype=torch.float64)
    graph = gp.trace(double, example.double())
    plan = gp.uniform_plan(graph, KEEP, align=ALIGN)
    expected = masked_outputs(graph, plan, double, [example.double()])
    floats = [x.is_floating_point() for x in expected]
    got = outputs_of(operate(double, graph, plan).model, [example.double()])
    return relative_error(*([x for x, real in zip(xs, floats, strict=True) if real] for xs in (got, expected)))


def check_training(pruned: Any, example: Any) -> None:
    """A forward and a backward pass in train mode, at another batch size than the one that was traced."""
    import torch

    pruned.train().requires_grad_(True)
    outputs = torch.utils._pytree.tree_leaves(pruned(example))
    sum(x.float().square().mean() for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad).backward()
    gradients = [parameter.grad for parameter in pruned.parameters() if parameter.grad is not None]
    if not gradients or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise RuntimeError(f"{len(gradients)} gradients, not all finite")
    pruned.zero_grad(set_to_none=True)


def check_saved(spec: str, model: Any, graph: Any, plan: Any, pruned: Any, folder: Path, example: Any) -> None:
    """What is loaded from a saved folder has the same tensors, bit for bit, and computes the same."""
    import torch

    import graphprune as gp
    from graphprune.record import Record
    from graphprune.result import Result
    from tests.graphprune.oracle import outputs_of

    facts = Record(plan), Record(gp.Plan(graph.signature, (), graph.inputs))
    own = spec.startswith(("timm:", "torchvision:"))
    result = Result(pruned, model, graph, plan, *facts, gp.Target(latency=0.5), spec=spec if own else "")
    loaded = gp.load(gp.save(result, folder), None if own else model)
    before, after = pruned.state_dict(), loaded.state_dict()
    if list(before) != list(after) or not all(torch.equal(value, after[name]) for name, value in before.items()):
        raise RuntimeError("the loaded tensors are not the saved ones")
    pairs = zip(outputs_of(pruned, [example]), outputs_of(loaded, [example]), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError("the loaded model computes something else")


def one(spec: str, file: Path, limit: int, torch_pruning: bool) -> None:
    """Examine a model and note how it ended; past the limit in seconds of processor time the process is killed."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    log = Log(spec, file)
    log.note()
    try:
        (examine_torch_pruning if torch_pruning else examine)(spec, log)
        log.note(stage="done")
    except Exception as error:  # whatever it is, it belongs in the table
        log.note(error=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")


# --- all of them ----------------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit that is checked out."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip()


def results_file(options: argparse.Namespace) -> Path:
    """Where the table goes."""
    return RESULTS / ("coverage_torch_pruning.json" if options.torch_pruning else "coverage.json")


def recall(options: argparse.Namespace) -> None:
    """Put what the results file knows into the work folder, where nothing newer is."""
    table = results_file(options)
    for facts in json.loads(table.read_text())["models"] if table.exists() else ():
        file = file_of(facts["model"], options)
        if not file.exists():
            file.write_text(json.dumps(facts))


def file_of(spec: str, options: argparse.Namespace) -> Path:
    """Where the facts of a model stand."""
    folder: Path = options.work
    return folder / f"{file_name(spec)}.json"


def file_name(spec: str) -> str:
    """A spec as the name of a file or a folder."""
    return spec.replace(":", "-").replace("?", "-").replace("&", "-")


def run(spec: str, options: argparse.Namespace, until: float) -> dict[str, Any] | None:
    """The facts of one model: those that are known, or those of a new process; None where it is too late for one."""
    file = file_of(spec, options)
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        if known["stage"] == "done" or ("error" in known and (not options.again or time.monotonic() > until)):
            return known
    if time.monotonic() > until:
        return None
    command = [sys.executable, __file__, "--one", spec, "--file", str(file), "--limit", str(options.limit)]
    command += ["--torch-pruning"] if options.torch_pruning else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, timeout=PATIENCE * options.limit, capture_output=True, text=True, check=False, env=environment
        )
        ended = f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
        late = done.returncode == -signal.SIGXCPU
    except subprocess.TimeoutExpired:
        ended, late = "", True
    facts = json.loads(file.read_text()) if file.exists() else {"model": spec, "stage": "build", "seconds": {}}
    if facts["stage"] != "done" and "error" not in facts:
        facts["error"] = f"not done in {options.limit} s" if late else ended
    file.write_text(json.dumps(facts))
    print(line(facts), flush=True)
    return facts


def time_files(facts: dict[str, Any], file: Path) -> dict[str, Any]:
    """The facts of a model with its speed-up, or with the reason why it cannot be timed; its files are deleted."""
    from graphprune.engines.onnxruntime import OnnxRuntimeEngine

    folder = file.with_suffix("")
    untimed = facts["stage"] == "done" and "speedup" not in facts
    if not untimed or not (folder / "pruned.onnx").exists():  # a row of an earlier run has no files any more
        shutil.rmtree(folder, ignore_errors=True)
        return facts
    try:
        models = [(folder / name).read_bytes() for name in ("dense.onnx", "pruned.onnx")]
        dense, pruned = OnnxRuntimeEngine().measure(models, ROUNDS)
        if dense.error or pruned.error:
            raise RuntimeError(dense.error or pruned.error)
        facts["samples"] = {"dense": dense.samples, "pruned": pruned.samples}
        facts["speedup"] = median(dense.samples) / median(pruned.samples)
    except Exception as error:  # whatever it is, it belongs in the table
        facts |= {"stage": "speed", "error": f"{type(error).__name__}: {error}"}
    file.write_text(json.dumps(facts))
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{facts['model']:45} {facts['speedup']:5.2f}x" if "speedup" in facts else line(facts), flush=True)
    return facts


def line(facts: dict[str, Any]) -> str:
    """One model in one line."""
    seconds = sum(facts["seconds"].values())
    end = facts.get("error", "")
    share = f"{facts['cuttable_flops']:4.0%}" if "cuttable_flops" in facts else "    "
    kept = {True: "own class", False: "exported", None: ""}[facts.get("own_class")]
    kept += f", {facts['parts']} graphs" if facts.get("parts") else ""
    return f"{facts['model']:45} {facts['stage']:12} {share} {kept:20} {seconds:5.0f} s {end}"


def summary(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the table is judged by."""
    done = [facts for facts in table if facts["stage"] == "done"]
    applied = [facts["own_class"] for facts in table if "own_class" in facts]
    shares = [facts["cuttable_flops"] for facts in table if "cuttable_flops" in facts]
    return {
        "models": len(table),
        "through every stage": len(done),
        "failed at": dict(Counter(facts["stage"] for facts in table if facts["stage"] != "done")),
        "own class kept": sum(applied) / max(len(applied), 1),
        "of these, with some modules as graphs": sum(facts.get("parts", 0) > 0 for facts in table),
        "median share of FLOPs in cuttable groups": median(shares or [0]),
        "models with less than half of their FLOPs in cuttable groups": sum(share < 0.5 for share in shares),
        "median speed-up": median([facts["speedup"] for facts in done if "speedup" in facts] or [0]),
        "median seconds of trace": median([facts["seconds"].get("trace", 0) for facts in done] or [0]),
    }


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="specs, separated by commas; all of the table by default")
    parser.add_argument("--sample", type=int, default=0, help="that many of them, drawn with seed 0")
    parser.add_argument("--limit", type=int, default=120, help="seconds of processor time per model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time; speed-ups are measured after them")
    parser.add_argument("--again", action="store_true", help="also run models again that failed")
    parser.add_argument("--afresh", action="store_true", help="take nothing over from the results file")
    parser.add_argument(
        "--minutes", type=float, default=inf, help="start no more models after that; write what is known"
    )
    parser.add_argument("--untimed", action="store_true", help="leave the speed-ups for another call")
    parser.add_argument("--work", type=Path, default=Path("coverage_work"))
    parser.add_argument("--choose", action="store_true", help="write the list of timm's representatives anew")
    parser.add_argument("--torch-pruning", action="store_true", help="the same with Torch-Pruning (extra bench)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.choose:
        return choose_representatives()
    if options.one:
        return one(options.one, options.file, options.limit, options.torch_pruning)
    options.work.mkdir(parents=True, exist_ok=True)
    specs = options.models.split(",") if options.models else all_specs()
    if options.sample:
        specs = random.Random(0).sample(specs, min(options.sample, len(specs)))
    if not options.afresh:
        recall(options)
    until = time.monotonic() + 60 * options.minutes
    with ThreadPoolExecutor(options.jobs) as pool:
        table = [facts for facts in pool.map(lambda spec: run(spec, options, until), specs) if facts is not None]
    if not options.untimed:
        table = [time_files(facts, file_of(facts["model"], options)) for facts in table]
    for name, value in summary(table).items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
    if not options.models and not options.sample:
        from graphprune.machine import environment

        body = {"summary": summary(table), "models": table, "keep": KEEP, "align": ALIGN, "environment": environment()}
        results_file(options).write_text(json.dumps(body, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
