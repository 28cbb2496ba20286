"""The command line as a user meets it: what it prints, what it writes, and how it fails."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
import torch
import typer
from PIL import Image
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graphprune as gp
from graphprune import checkpoint, cli, delivery, models
from graphprune.commands import base
from graphprune.commands.base import Answer, Verb
from graphprune.counting import count
from graphprune.engines import fake
from graphprune.engines.fake import FakeEngine
from graphprune.errors import InputError, StepError
from graphprune.files import atomic
from graphprune.reporting import grid
from graphprune.timing.profile import Profile

VIT = "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=3&num_classes=2"
OTHER_VIT = VIT.replace("embed_dim=48", "embed_dim=96")
REAL_ENGINE = base.engine
QUICK = ("--agent", "random", "--trials", "3")


def fake_engine(name: str, threads: int = 1, batch: int = 1) -> FakeEngine:
    """Stands for an engine: OpenVINO has another vector block than ONNX Runtime."""
    return FakeEngine(block=4 if name == "openvino" else 16, threads=threads, batch=batch)


@pytest.fixture(autouse=True, scope="module")
def fake_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Computed timings instead of measured ones, and a cache of timings of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "engine", fake_engine)
        patch.setattr(fake, "SECONDS_PER_NODE", 1e-9)  # a tiny model would take its time for its nodes alone
        patch.setenv("GRAPHPRUNE_CACHE", str(tmp_path_factory.mktemp("timings")))
        yield


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """Standard output as JSON: fails where anything else is printed there."""
        facts: dict[str, Any] = json.loads(self.out)
        return facts


def call(*arguments: str | Path) -> Outcome:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return Outcome(result.exit_code, result.stdout, result.stderr)


def good(*arguments: str | Path) -> Outcome:
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def one_line(outcome: Outcome, code: int = 2) -> str:
    """The single line that a failure prints, and nothing else."""
    assert outcome.code == code, (outcome.out, outcome.err)
    assert outcome.out == ""
    lines = [line for line in outcome.err.splitlines() if line.startswith("graphprune: ")]
    assert len(lines) == 1
    assert outcome.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in outcome.err
    return lines[0].removeprefix("graphprune: ")


def save_image(path: Path, colour: int, seed: int) -> None:
    """A noisy 40x40 image that is red (0) or blue (2)."""
    pixels = np.random.default_rng(seed).integers(0, 100, (40, 40, 3), dtype=np.uint8)
    pixels[..., colour] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 labelled images of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        name, colour = (("blue", 2), ("red", 0))[number % 2]
        save_image(folder / name / f"{number}.png", colour, number)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the small ViT, as a user would bring them."""
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(models.create(VIT).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run on the labelled images: its folder and what it printed."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    target = ("--latency", "0.8", "--rivals", "uniform", "--epochs", "1")
    data = ("--data", f"imagefolder:{photos}", "--weights", weights)
    return out, good("prune", VIT, *data, *target, *QUICK, "--out", out, "--json").facts


# --- the whole job ----------------------------------------------------------------------------------------------------


def test_prune_writes_the_folder_that_the_help_promises(pruned):
    out, facts = pruned
    promised = {"dense.onnx", "pruned.onnx", "plan.json", "model.safetensors", "result.json", "report.html"}
    assert promised <= set(facts["files"])
    assert set(facts["files"]) == {path.name for path in out.iterdir()}
    assert "finetune.checkpoint" not in facts["files"]


def test_prune_tells_what_the_files_hold(pruned):
    """Counted again from the saved model, timed again by the fake engine, which is exact."""
    out, facts = pruned
    model = gp.load(out)
    counts = count(model, torch.zeros(2, 3, 32, 32))
    assert (facts["flops"]["pruned"], facts["params"]["pruned"]) == (counts.flops, counts.params)
    dense, cut = (FakeEngine().seconds(out / name) for name in ("dense.onnx", "pruned.onnx"))
    assert facts["latency"] == pytest.approx({"dense": dense, "pruned": cut})
    assert facts["speedup"]["value"] == pytest.approx(dense / cut)
    assert facts["met"]
    assert cut / dense <= 0.8
    assert facts["accuracy"].keys() == {"validation accuracy"}
    assert facts["before_finetuning"].keys() == {"random", "uniform"}
    assert facts["spec"] == VIT


def test_the_exported_model_is_the_saved_one_at_any_batch(pruned):
    out, _ = pruned
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(out / "pruned.onnx")
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, gp.load(out)(images).numpy(), rtol=1e-4, atol=1e-4)


def test_the_dense_weights_are_the_users(pruned, weights):
    own, kept = load_file(weights), load_file(pruned[0] / "dense.safetensors")
    assert own.keys() == kept.keys()
    assert all(torch.equal(own[name], kept[name]) for name in own)


def test_prune_without_labels_is_judged_by_agreement(tmp_path: Path, weights: Path):
    for number in range(12):
        save_image(tmp_path / "images" / f"{number}.png", 2 * (number % 2), number)
    data = ("--data", f"imagefolder:{tmp_path / 'images'}", "--weights", weights)
    facts = good(
        "prune", VIT, *data, "--flops", "0.8", *QUICK, "--epochs", "1", "--out", tmp_path / "out", "--json"
    ).facts
    assert facts["accuracy"]["agreement with dense"]["dense"] == 1.0
    assert facts["flops"]["pruned"] <= 0.8 * facts["flops"]["dense"]
    assert facts["met"]


def test_a_bare_onnx_file_is_pruned_on_images_alone(tmp_path: Path):
    """No Python source, no labels: what comes out computes about the same as the file, with fewer FLOPs."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1)]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4))
    images = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    file = gp.export_onnx(model.eval(), tmp_path / "dense.onnx", images[:2])
    np.save(tmp_path / "images.npy", images.numpy())
    given = ("--calibration", tmp_path / "images.npy", "--flops", "0.7", *QUICK, "--epochs", "0")
    facts = good("prune", file, *given, "--out", tmp_path / "out", "--json").facts
    assert facts["met"]
    assert facts["accuracy"]["agreement with dense"]["dense"] == 1.0
    dense, pruned = (
        onnxruntime.InferenceSession(path).run(None, {"input": images.numpy()})[0]
        for path in (file, tmp_path / "out" / "pruned.onnx")
    )
    assert facts["accuracy"]["agreement with dense"]["pruned"] == pytest.approx(
        np.mean(dense.argmax(1) == pruned.argmax(1)), abs=0.2
    )
    assert np.abs(pruned - dense).mean() < np.abs(dense - dense.mean(0)).mean()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "give either --data, or --calibration"),
        (("--data", "digits", "--calibration", "images.npy"), "give either --data, or --calibration"),
        (("--calibration", "gone.npy"), "cannot read images from gone.npy"),
        (("--calibration", "text.npy"), "cannot read images from text.npy"),
        (("--calibration", "flat.npy"), "images must be floats"),
        (("--calibration", "whole.npy"), "images must be floats"),
        (("--calibration", "one.npy"), "holds no images"),
    ],
)
def test_images_that_cannot_be_used(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("no array")
    np.save("flat.npy", np.zeros((8, 3), np.float32))
    np.save("whole.npy", np.zeros((8, 3, 4, 4), np.uint8))
    np.save("one.npy", np.zeros((1, 3, 4, 4), np.float32))
    assert message in one_line(call("prune", VIT, *given, "--latency", "0.5"))


def test_a_second_run_takes_every_trial_from_the_study(pruned, photos, weights, monkeypatch):
    out, facts = pruned
    before = good("runs", out, "--json").facts["studies"]
    arguments = ("prune", VIT, "--data", f"imagefolder:{photos}", "--weights", weights, "--latency", "0.8", *QUICK)
    again = good(
        *arguments, "--epochs", "0", "--out", out.parent / "again", "--study", out / "study.db", "--json"
    ).facts
    assert good("runs", out, "--json").facts["studies"] == before
    assert again["flops"] == facts["flops"]


def test_finetune_goes_on_from_a_folder(pruned, photos, tmp_path):
    out = copied(pruned[0], tmp_path)
    before = checkpoint.read_result(out)
    weights = (out / "model.safetensors").read_bytes()
    facts = good("finetune", out, "--data", f"imagefolder:{photos}", "--epochs", "2", "--json").facts
    assert (out / "model.safetensors").read_bytes() != weights
    after = checkpoint.read_result(out)
    assert after["record"].plan == before["record"].plan
    assert len(after["history"]) == 2
    assert facts["flops"] == pruned[1]["flops"]


def test_export_of_a_folder_and_of_a_spec(pruned, weights, tmp_path):
    folder = good("export", pruned[0], "--out", tmp_path / "a.onnx", "--json").facts
    dense = good("export", VIT, "--weights", weights, "--out", tmp_path / "b.onnx", "--json").facts
    assert folder["inputs"] == dense["inputs"] == [[3, 32, 32]]
    assert FakeEngine().seconds(tmp_path / "a.onnx") == pytest.approx(pruned[1]["latency"]["pruned"])
    assert FakeEngine().seconds(tmp_path / "b.onnx") == pytest.approx(pruned[1]["latency"]["dense"])


def test_report_is_rebuilt_from_what_is_saved(pruned, tmp_path):
    out = copied(pruned[0], tmp_path)
    first = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").unlink()
    facts = good("report", out, "--json").facts
    rebuilt = (out / "report.html").read_text(encoding="utf-8")
    assert facts["trials"] == len(delivery.restore(out).records) > 0
    speedup = f"{pruned[1]['speedup']['value']:.2f}"
    assert speedup in first
    assert speedup in rebuilt


MATRIX = ("--engine", "onnxruntime", "--engine", "openvino", "--threads", "1", "--threads", "2", "--batch", "1",
          "--batch", "8")  # fmt: skip


def unmeasured(name: str, threads: int = 1, batch: int = 1) -> FakeEngine:
    """An engine that must not be asked for a time."""
    engine = fake_engine(name, threads, batch)
    engine.measure = lambda *_: pytest.fail("measured again")  # type: ignore[method-assign, assignment]
    return engine


def test_report_measures_every_engine_with_every_thread_and_batch_once(pruned, tmp_path, monkeypatch):
    out = copied(pruned[0], tmp_path)
    assert "Other engines" not in (out / "report.html").read_text(encoding="utf-8")
    facts = good("report", out, *MATRIX, "--json").facts
    engines = [FakeEngine(block=block, threads=t, batch=b) for block in (16, 4) for t in (1, 2) for b in (1, 8)]
    assert {one["engine"] for one in facts["engines"]} == {engine.identity for engine in engines}
    found = {one["engine"]: one for one in facts["engines"]}
    for engine in engines:
        dense, cut = (engine.seconds(out / name) for name in ("dense.onnx", "pruned.onnx"))
        assert found[engine.identity]["seconds"] == pytest.approx({"dense": dense, "pruned": cut})
        assert found[engine.identity]["share"] == pytest.approx(cut / dense)
    report = (out / "report.html").read_bytes()
    assert b"Other engines, threads and batches" in report
    monkeypatch.setattr(base, "engine", unmeasured)
    (out / "report.html").unlink()
    for file in ("dense.onnx", "pruned.onnx"):
        (out / file).unlink()
    table = good("report", out).out
    assert (out / "report.html").read_bytes() == report, "nothing that was measured is lost, and nothing needed again"
    assert table.count("faster") == 8
    assert good("report", out, *MATRIX, "--json").facts == facts


def test_report_compares_what_engines_let_a_search_cut(pruned, tmp_path, monkeypatch):
    out = copied(pruned[0], tmp_path)
    strict = {"onnxruntime": FakeEngine(), "openvino": FakeEngine(noise=0.5)}
    monkeypatch.setattr(base, "engine", lambda name, **_: strict[name])
    facts = good("report", out, "--engine", "openvino", "--gains", "--json").facts
    assert [one["engine"] for one in facts["engines"]] == [engine.identity for engine in strict.values()]
    graph = gp.trace(models.create(VIT), torch.zeros(2, 3, 32, 32))
    tables = [graph.sites(Profile(engine)) for engine in strict.values()]
    levels = [{(s.name, x.pattern, x.level) for s in table for x in s.levels} for table in tables]
    assert levels[0] != levels[1], "a noisy engine shows fewer gains"
    page = (out / "report.html").read_text(encoding="utf-8")
    for pattern in {pattern for _, pattern, _ in levels[0]}:
        counts = [sum(one == pattern for _, one, _ in offered) for offered in levels]
        cells = "".join(rf'<td class="number">{count} of \d+</td>' for count in counts)
        assert re.search(rf'<th scope="row">{pattern}</th>{cells}', page)
    monkeypatch.setattr(base, "engine", lambda name, **_: pytest.fail("an engine was asked for"))
    assert good("report", out, "--json").facts == facts
    assert (out / "report.html").read_text(encoding="utf-8") == page


def test_measurements_of_an_earlier_model_are_not_shown(pruned, photos, tmp_path):
    out = copied(pruned[0], tmp_path)
    assert len(good("report", out, "--engine", "openvino", "--json").facts["engines"]) == 2
    good("finetune", out, "--data", f"imagefolder:{photos}", "--epochs", "2")
    assert len(good("report", out, "--json").facts["engines"]) == 1
    (out / "engines.json").write_text("[]")
    assert "engines.json does not hold measurements" in one_line(call("report", out))


def test_report_of_a_folder_whose_files_are_gone_or_do_not_run(pruned, tmp_path):
    out = copied(pruned[0], tmp_path)
    (out / "pruned.onnx").write_text("not a model")
    assert "cannot run the pruned model" in one_line(call("report", out, "--engine", "openvino"), 1)
    (out / "dense.onnx").unlink()
    assert "dense.onnx" in one_line(call("report", out, "--engine", "openvino"))


def test_report_without_the_second_engine_is_one_line(pruned, tmp_path, monkeypatch):
    out = copied(pruned[0], tmp_path)
    monkeypatch.setattr(base, "engine", REAL_ENGINE)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "graphprune.engines.openvino", raising=False)
    line = one_line(call("report", out, "--engine", "onnxruntime", "--engine", "openvino"))
    assert "'openvino' is not installed" in line
    assert "pip install graphprune[openvino]" in line
    assert not (out / "engines.json").exists(), "nothing is measured before all engines are there"


def test_runs_lists_studies_and_trials(pruned):
    facts = good("runs", pruned[0], "--trials", "--json").facts
    (study,) = facts["studies"]
    trials = facts["trials"][study["name"]]
    assert study["trials"] == len(trials)
    assert {trial["agent"] for trial in trials} <= {"probe", "random", "uniform"}
    best = max(trial["accuracy"] for trial in trials if trial["feasible"])
    assert study["accuracy"] == best
    text = good("runs", pruned[0], "--trials").out
    assert text.count("random") >= sum(trial["agent"] == "random" for trial in trials)


def test_bench_compares_with_the_first_file(pruned):
    files = (pruned[0] / "dense.onnx", pruned[0] / "pruned.onnx")
    facts = good("bench", *files, "--rounds", "5", "--json").facts
    assert [len(model["samples"]) for model in facts["models"]] == [5, 5]
    assert facts["models"][1]["share"] == pytest.approx(1 / pruned[1]["speedup"]["value"])
    table = good("bench", *files).out
    assert f"{pruned[1]['speedup']['value']:.2f}x" in table
    assert "faster" in table


def test_bench_takes_engine_threads_and_batch(pruned):
    files = (pruned[0] / "dense.onnx", pruned[0] / "pruned.onnx")
    settings = ("--engine", "openvino", "--threads", "2", "--batch", "8")
    facts = good("bench", *files, *settings, "--rounds", "2", "--json").facts
    engine = FakeEngine(block=4, threads=2, batch=8)
    assert facts["engine"] == engine.identity
    assert [model["median"] for model in facts["models"]] == pytest.approx([engine.seconds(file) for file in files])


def test_a_run_and_its_finetuning_take_threads_and_batch(photos, weights, tmp_path):
    settings = ("--engine", "openvino", "--threads", "2", "--batch", "8")
    outcome = prune(photos, tmp_path, "--weights", weights, "--epochs", "0", *QUICK, *settings, "--json")
    engine = FakeEngine(block=4, threads=2, batch=8)
    assert outcome.facts["engine"] == engine.identity
    dense = engine.seconds(tmp_path / "dense.onnx")
    assert outcome.facts["latency"]["dense"] == pytest.approx(dense)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "latency, batch 8, 2 threads, median" in text
    tune = ("finetune", tmp_path, "--data", f"imagefolder:{photos}", "--epochs", "1", "--json")
    # The fake engine's name is not known, so that what stands for ONNX Runtime goes on.
    assert good(*tune).facts["engine"] == FakeEngine(threads=2, batch=8).identity
    assert good(*tune, "--threads", "1", "--batch", "4").facts["engine"] == FakeEngine(batch=4).identity


def copied(folder: Path, place: Path) -> Path:
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


# --- looking at a model -----------------------------------------------------------------------------------------------


def test_trace_lists_groups_and_sites(weights):
    facts = good("trace", VIT, "--weights", weights, "--json").facts
    graph = gp.trace(models.create(VIT), torch.zeros(2, 3, 32, 32))
    assert facts["signature"] == graph.signature
    assert [group["name"] for group in facts["groups"]] == [group.name for group in graph.all_groups]
    assert [site["name"] for site in facts["sites"]] == [site.name for site in graph.all_sites]
    text = good("trace", VIT).out
    frozen = next(group for group in graph.all_groups if "output of the model" in " ".join(group.frozen))
    assert any(frozen.name in line and "no: " in line for line in text.splitlines())
    masks = [site for site in graph.all_sites if site.kernel == (1, 1)]
    for site in graph.all_sites:
        assert (site.name[-30:] in text) is (site not in masks)
    assert f"not shown: {len(masks)} layers for n-of-m" in text


def test_trace_shows_gains_that_the_engine_would_measure(weights):
    facts = good("trace", VIT, "--gains", "--batch", "8", "--json").facts
    assert facts["engine"] == FakeEngine(batch=8).identity
    gains = [level["gain"] for site in facts["sites"] for level in site["levels"]]
    assert gains
    assert all(gain > 1 for gain in gains)


def test_profile_of_a_model():
    facts = good("profile", VIT, "--json").facts
    assert all(seconds > 0 for seconds in facts["layers"].values())
    offered = [cell for cell in facts["cells"] if not cell["reason"]]
    assert all(cell["speedup"] > 1 for cell in offered if cell["flops_share"])
    assert {cell["speedup"] for cell in offered if not cell["flops_share"]} == {None}, "a dropped branch is gone"
    larger = good("profile", VIT, "--threads", "2", "--batch", "8", "--json").facts
    assert larger["engine"] == FakeEngine(threads=2, batch=8).identity
    assert sum(larger["layers"].values()) > 3 * sum(facts["layers"].values())
    text = good("profile", VIT).out
    assert "100.0 %" not in text
    assert "hidden   linear 48→192 on 17 rows +1" in text
    assert "blocks.1.mlp.fc1" in text


def test_profile_of_typical_layers(monkeypatch, tmp_path):
    typical = list(grid._typical())[1:2]
    monkeypatch.setattr(grid, "_typical", lambda: iter(typical))
    facts = good("profile", "--json").facts
    assert facts["block"] == FakeEngine().block == 16
    assert {cell["shape"] for cell in facts["cells"]} == {"conv 3x3 32 on 16x16"}
    assert {"filter", "kernel"} <= {cell["pattern"] for cell in facts["cells"]}
    outcome = good("profile", "--picture", tmp_path / "gains.svg")
    assert f"picture: {tmp_path / 'gains.svg'}" in outcome.out.replace("\n", "")
    assert ">typical layers, fake" in (tmp_path / "gains.svg").read_text()


def test_a_picture_of_another_format_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "engine", lambda *_, **__: pytest.fail("an engine was asked for"))
    assert "a picture ends in .png" in one_line(call("profile", VIT, "--picture", tmp_path / "gains.gif"))


# --- bad input: one line, exit code 2 -------------------------------------------------------------------------------


def test_unknown_models():
    assert "did you mean" in one_line(call("trace", "timm:resnt18"))
    assert "unknown model" in one_line(call("trace", "nothing"))


def test_a_model_that_does_not_accept_its_input():
    assert "does not accept an input of shape (2, 3, 20, 20)" in one_line(call("trace", VIT, "--input-size", "20"))


def test_an_unknown_agent(photos, tmp_path):
    line = one_line(prune(photos, tmp_path, "--agent", "nobody"))
    assert "nobody" in line
    assert "autosculpt" in line


@pytest.mark.parametrize("names", ["filter,fliter", ","])
def test_patterns_that_are_unknown_or_none(photos, tmp_path, names):
    line = one_line(prune(photos, tmp_path, "--patterns", names))
    assert "known are" in line
    assert "filter" in line


def test_a_mask_by_name_where_zeros_are_multiplied(photos, tmp_path):
    line = one_line(prune(photos, tmp_path, "--patterns", "filter,n-of-m"))
    assert line.startswith("the pattern 'n-of-m' cannot be used on fake")
    assert line.endswith("masks gain nothing but on engines with 2:4 kernels")


def prune(photos: Path, out: Path, *options: str | Path, spec: str = VIT, target: tuple[str, ...] = ()) -> Outcome:
    target = target or ("--latency", "0.8")
    return call("prune", spec, "--data", f"imagefolder:{photos}", *target, "--trials", "2", "--out", out, *options)


def test_no_target_and_targets_out_of_range(photos, tmp_path):
    assert "--latency 0.5" in one_line(call("prune", VIT, "--data", f"imagefolder:{photos}", "--out", tmp_path))
    assert "at most 1" in one_line(prune(photos, tmp_path, target=("--latency", "1.5")))
    assert "positive" in one_line(prune(photos, tmp_path, target=("--latency-ms", "0")))


def test_an_impossible_target_tells_the_best_that_can_be_reached(photos, tmp_path):
    line = one_line(prune(photos, tmp_path, target=("--flops", "0.01")))
    assert "the best that can be reached is flops 0." in line


def test_a_file_that_is_no_onnx_model(pruned, tmp_path):
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    assert "text.onnx is not an ONNX model" in one_line(call("bench", text, pruned[0] / "dense.onnx"))
    assert "text.onnx is not an ONNX model" in one_line(call("bench", pruned[0] / "dense.onnx", text))
    assert "missing.onnx" in one_line(call("bench", tmp_path / "missing.onnx"))


def test_weights_that_are_nan_or_of_another_model_or_truncated(photos, weights, tmp_path):
    tensors = load_file(weights)
    broken = tmp_path / "nan.safetensors"
    save_file(tensors | {"head.weight": torch.full_like(tensors["head.weight"], float("nan"))}, broken)
    assert "NaN in head.weight" in one_line(prune(photos, tmp_path, "--weights", broken))
    assert "shape" in one_line(prune(photos, tmp_path, "--weights", weights, spec=OTHER_VIT))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    assert "not a complete safetensors file" in one_line(prune(photos, tmp_path, "--weights", cut))
    assert "no weights file" in one_line(prune(photos, tmp_path, "--weights", tmp_path / "gone"))


def test_empty_and_missing_data(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "0 images" in one_line(prune(tmp_path / "empty", tmp_path / "out"))
    assert "no folder" in one_line(prune(tmp_path / "gone", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_no_result_and_a_plan_of_another_model(pruned, tmp_path):
    assert "cannot read" in one_line(call("report", tmp_path))
    out = copied(pruned[0], tmp_path)
    foreign = (out / "plan.json").read_text().replace(checkpoint.read_result(out)["record"].plan.model, "0" * 16)
    (out / "plan.json").write_text(foreign)
    assert "plan.json was changed" in one_line(call("export", out, "--out", tmp_path / "x.onnx"))
    assert not (tmp_path / "x.onnx").exists()


def test_a_full_disk_leaves_the_old_file(pruned, tmp_path, monkeypatch):
    out = tmp_path / "model.onnx"
    out.write_text("old")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "_sync", full)
    assert "No space left on device" in one_line(call("export", pruned[0], "--out", out))
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_store_that_is_none(tmp_path):
    assert "no study store" in one_line(call("runs", tmp_path / "none.db"))
    assert "no study store" in one_line(call("runs", tmp_path))


def test_usage_errors_of_the_parser():
    assert call("prune").code == 2
    assert call("no-such-verb").code == 2
    assert call("bench", "--rounds", "many", "a.onnx").code == 2


# --- the frame around the verbs -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Saying(Verb):
    """A verb that does what a test wants."""

    stopped: ClassVar[str] = "stopped; do it again"
    error: ClassVar[BaseException | None] = None

    def run(self) -> Answer:
        print("chatter of a library")
        if self.error is not None:
            raise self.error
        return Answer({"answer": 42}, (Text("forty-two [of] all"),))


def executed(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *options: str) -> Outcome:
    monkeypatch.setattr(Saying, "error", error)
    app = typer.Typer(result_callback=lambda verb, **_: cli.execute(verb), callback=lambda: None)
    app.command("say")(Saying)
    result = CliRunner().invoke(app, ["say", *options])
    return Outcome(result.exit_code, result.stdout, result.stderr)


def test_standard_output_holds_the_answer_alone(monkeypatch):
    assert executed(monkeypatch, None, "--json").facts == {"answer": 42}
    said = executed(monkeypatch, None)
    assert said.out == "forty-two [of] all\n"
    assert said.err == "chatter of a library\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("the input is wrong"), 2, "the input is wrong"),
        (StepError("the step failed"), 1, "the step failed"),
        (KeyError("lost"), 1, "unexpected KeyError: 'lost' (--debug prints the traceback)"),
        (KeyboardInterrupt(), 130, "stopped; do it again"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(monkeypatch, error, code, line):
    assert one_line(executed(monkeypatch, error), code) == line


def test_debug_prints_the_traceback(monkeypatch):
    outcome = executed(monkeypatch, KeyError("lost"), "--debug")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "raise self.error" in outcome.err


def test_every_verb_explains_itself():
    listed = good("--help").out
    for name, verb in cli.VERBS.items():
        assert name in listed
        explained = good(name, "--help").out
        assert " ".join((verb.__doc__ or "").split()[:4]) in " ".join(explained.split())
        assert "--json" in explained
    assert good("--version").out == f"graphprune {gp.__version__}\n"


def test_help_needs_no_torch():
    code = "import sys, graphprune.cli; print('torch' in sys.modules, 'optuna' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", "False"]
