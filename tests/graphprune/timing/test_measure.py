import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from graphprune.engines.base import Timing
from graphprune.engines.fake import SECONDS_PER_NODE, FakeEngine
from graphprune.errors import InputError, StepError
from graphprune.record import Share
from graphprune.timing.measure import Measurement, measure, share, verdict


def chain(length: int) -> bytes:
    """`length` nodes one after the other: the fake engine takes `length` times SECONDS_PER_NODE."""
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(length)]
    first = helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["n", 256, 256])
    last = helper.make_tensor_value_info(f"t{length}", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "chain", [first], [last])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def simulate(ratio: float, generator: np.random.Generator, rounds: int = 50) -> tuple[Timing, Timing]:
    """A pair whose true ratio of medians is known: lognormal noise, part of it common to both samples of a round."""
    common = generator.normal(0, 0.05, rounds)
    dense, candidate = (np.exp(common + generator.normal(0, 0.05, rounds)) for _ in range(2))
    return Timing(tuple(dense)), Timing(tuple(ratio * candidate))


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    ratio, trials = 0.7, 300
    shares = [share(*simulate(ratio, generator), "e") for _ in range(trials)]
    covered = np.mean([found.low <= ratio <= found.high for found in shares])
    # 3 binomial deviations of 95 %; one more above, as the percentile interval of a median errs to the wide side.
    deviation = (0.95 * 0.05 / trials) ** 0.5
    assert 0.95 - 3 * deviation <= covered <= 0.95 + 4 * deviation
    widths = np.array([found.high - found.low for found in shares])
    errors = np.array([found.value for found in shares]) - ratio
    assert np.median(widths) < 2 * 1.96 * errors.std() * 1.2  # no wider than it needs to be


def test_the_same_model_twice_is_no_difference_and_a_real_one_is_seen() -> None:
    generator = np.random.default_rng(2)
    same = [verdict(share(*simulate(1.0, generator), "e")) for _ in range(100)]
    assert same.count("no difference beyond noise") >= 94
    assert verdict(share(*simulate(0.8, generator), "e")) == "faster"
    assert verdict(share(*simulate(1.25, generator), "e")) == "slower"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.95, 0.98, "faster"),
        (0.97, 0.995, "no difference beyond noise"),
        (0.9, 1.1, "no difference beyond noise"),
        (1.005, 1.02, "no difference beyond noise"),
        (1.02, 1.3, "slower"),
    ],
)
def test_a_verdict_needs_a_clear_interval(low: float, high: float, word: str) -> None:
    assert verdict(Share((low + high) / 2, low, high, (1.0,), (1.0,), "e")) == word


def test_rounds_are_resampled_in_pairs() -> None:
    # Both models are disturbed alike: the ratio is the same in every round, so nothing is uncertain.
    dense = tuple(np.random.default_rng(0).lognormal(0, 1, 30))
    found = share(Timing(dense), Timing(tuple(0.5 * sample for sample in dense)), "e")
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(StepError, match="broken"):
        share(Timing((1.0, 1.0)), Timing(error="broken"), "e")
    with pytest.raises(StepError, match="2 and 3 rounds"):
        share(Timing((1.0, 1.0)), Timing((1.0, 1.0, 1.0)), "e")
    with pytest.raises(StepError, match="0 and 0 rounds"):
        share(Timing(), Timing(), "e")


def test_exact_times_give_exact_ratios() -> None:
    found = measure([chain(10), chain(30), chain(5)], rounds=7, engine=FakeEngine())
    assert [timing.median for timing in found.timings] == pytest.approx([n * SECONDS_PER_NODE for n in (10, 30, 5)])
    assert [entry.value for entry in found.shares if entry] == pytest.approx([1.0, 3.0, 0.5])
    assert found.speedup == pytest.approx(2.0)
    assert found.verdict == "faster"


def test_a_failed_candidate_is_kept_as_a_failure() -> None:
    found = measure([chain(10), chain(5)], rounds=3, engine=FakeEngine(failing={1}))
    assert found.shares[1] is None
    assert found.verdict == "failed"
    assert np.isnan(found.speedup)
    assert "failed: model 1 fails on demand" in str(found)


def test_a_failed_baseline_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("no model")
    with pytest.raises(InputError, match=r"x\.onnx is not an ONNX model"):
        measure([tmp_path / "x.onnx", chain(2)], rounds=3)


@pytest.mark.parametrize(("models", "rounds"), [([], 10), ([chain(1)], 1)])
def test_a_request_without_sense_is_refused(models: list[bytes], rounds: int) -> None:
    with pytest.raises(InputError, match="at least one model and two rounds"):
        measure(models, rounds=rounds, engine=FakeEngine())


def test_json_keeps_all_samples() -> None:
    found = measure([chain(10), chain(5), b"?"], rounds=4, engine=FakeEngine(noise=0.1))
    assert Measurement.from_json(found.to_json()) == found
    models = json.loads(found.to_json())["models"]
    assert [model["verdict"] for model in models] == ["no difference beyond noise", "faster", "failed"]
    assert models[1]["median"] == found.timings[1].median


def test_the_table_says_what_the_measurement_says(tmp_path: Path) -> None:
    paths = [tmp_path / "dense.onnx", tmp_path / "cut.onnx"]
    for path, length in zip(paths, (10, 5), strict=True):
        path.write_bytes(chain(length))
    text = str(measure(paths, rounds=4, engine=FakeEngine()))
    assert text.splitlines()[0] == FakeEngine().identity
    row = next(line for line in text.splitlines() if "cut.onnx" in line)
    assert "2.000x  2.000 to 2.000  faster" in row


def test_onnxruntime_needs_longer_for_twenty_times_the_work() -> None:
    # The fastest samples are compared, as tests may run on a machine that is busy.
    found = measure([chain(2), chain(40)], rounds=15)
    fastest = [min(timing.samples) for timing in found.timings]
    assert fastest[1] > 3 * fastest[0]
    assert "onnxruntime" in found.engine


def test_a_new_process_measures_files_and_bytes_alike(tmp_path: Path) -> None:
    path = tmp_path / "long.onnx"
    path.write_bytes(chain(40))
    found = measure([chain(2), path, b"no model"], rounds=5, fresh=True)
    assert found.names == ("model 0", str(path), "model 2")
    assert [len(timing.samples) for timing in found.timings] == [5, 5, 0]
    assert min(found.timings[0].samples) < min(found.timings[1].samples)
    assert found.timings[2].error is not None
    assert found.timings[2].error.startswith("model 2 is not an ONNX model")


def test_only_onnxruntime_can_measure_in_a_new_process() -> None:
    with pytest.raises(InputError, match="FakeEngine"):
        measure([chain(1)], engine=FakeEngine(), fresh=True)


def test_a_process_that_dies_is_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess.run
    dying = [sys.executable, "-c", "import sys; sys.exit('out of memory')"]
    monkeypatch.setattr(subprocess, "run", lambda _, **options: original(dying, **options))
    with pytest.raises(StepError, match="ended with code 1: out of memory"):
        measure([chain(1)], fresh=True)


def test_measuring_does_not_import_torch() -> None:
    code = "import sys, graphprune.timing.measure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
