"""What is particular to each engine; what they share is in tests/contracts/test_engine.py."""

import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune import engines
from graphprune.engines import onnxruntime as module
from graphprune.engines import sampling
from graphprune.engines.fake import SECONDS_PER_NODE, SECONDS_PER_PRODUCT, FakeEngine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError


def one_node(
    operation: str,
    shape: Sequence[int | str],
    weight: Sequence[int] | None = None,
    element: int = TensorProto.FLOAT,
    **attributes: Any,
) -> bytes:
    initialisers = [] if weight is None else [numpy_helper.from_array(np.ones(weight, dtype=np.float32), "w")]
    node = helper.make_node(operation, ["x", "w"] if initialisers else ["x"], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", element, shape)
    graph = helper.make_graph([node], "g", [x], [helper.make_tensor_value_info("y", element, None)], initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("model", "products"),
    [
        (one_node("Conv", ["n", 6, 10, 12], [20, 6, 3, 3], pads=[1, 1, 1, 1]), 32 * 6 * 9 * 10 * 12),
        (one_node("Conv", [2, 6, 10, 12], [16, 6, 3, 1], strides=[2, 2]), 2 * 16 * 6 * 3 * 4 * 6),
        (one_node("Conv", [1, 16, 8, 8], [16, 1, 3, 3], group=16, pads=[1, 1, 1, 1]), 16 * 9 * 64),
        (one_node("MatMul", ["batch", 5, 7], [7, 3]), 5 * 7 * 3),
        (one_node("Gemm", [4, 7], [7, 3]), 4 * 7 * 3),
        (one_node("Gemm", [7, 4], [3, 7], transA=1, transB=1), 4 * 7 * 3),
        (one_node("Relu", [1, 1000]), 0),
    ],
)
def test_the_fake_engine_counts_multiply_adds(model: bytes, products: int) -> None:
    expected = products * SECONDS_PER_PRODUCT + SECONDS_PER_NODE
    (timing,) = FakeEngine(block=16).measure([model], rounds=3)
    assert timing.samples == (expected,) * 3


def test_a_fake_engine_with_sparse_kernels_halves_what_is_zero() -> None:
    for operation, weight, axis, given in (
        ("MatMul", (8, 3), 0, {}), ("Gemm", (8, 3), 0, {}), ("Gemm", (3, 8), 1, {"transB": 1}),
        ("Conv", (3, 8, 1, 1), 1, {}),
    ):  # fmt: skip
        shape = [1, 8, 2, 2] if operation == "Conv" else [2, 8]
        dense = one_node(operation, shape, weight, **given)
        model = onnx.load_from_string(dense)
        value = np.ones(weight, dtype=np.float32)
        np.moveaxis(value, axis, -1)[..., [0, 3, 5, 6]] = 0
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(value, "w"))
        masked = model.SerializeToString()
        plain, sparse = FakeEngine(), FakeEngine(sparse_kernels=True)
        assert plain.seconds(masked) == plain.seconds(dense) == sparse.seconds(dense)
        work = plain.seconds(dense) - SECONDS_PER_NODE
        assert sparse.seconds(masked) == pytest.approx(work / 2 + SECONDS_PER_NODE)
    assert plain.identity != sparse.identity


def test_the_batch_stands_for_a_dynamic_first_axis_in_the_fake_engine_and_threads_share_the_work() -> None:
    model = one_node("MatMul", ["n", "m", 7], [7, 3])
    assert FakeEngine().seconds(model) == pytest.approx(21e-11 + 1e-6)
    assert FakeEngine(batch=8).seconds(model) == pytest.approx(8 * 21e-11 + 1e-6)
    assert FakeEngine(batch=8, threads=2).seconds(model) == pytest.approx(4 * 21e-11 + 1e-6)


@pytest.mark.parametrize(("block", "padded"), [(4, 20), (8, 24), (16, 32), (32, 32)])
def test_the_fake_engine_rounds_channels_up_to_its_block(block: int, padded: int) -> None:
    seconds = FakeEngine(block=block).seconds(one_node("Conv", [1, 8, 4, 4], [18, 8, 1, 1]))
    assert seconds == pytest.approx(padded * 8 * 16 * SECONDS_PER_PRODUCT + SECONDS_PER_NODE, rel=1e-12)


def test_noise_is_repeatable_and_has_the_deviation_that_was_asked_for() -> None:
    model = one_node("Relu", [1, 3])
    first, again = (FakeEngine(noise=0.1, seed=3).measure([model], rounds=2000)[0] for _ in range(2))
    assert first == again
    assert first != FakeEngine(noise=0.1, seed=4).measure([model], rounds=2000)[0]
    logarithms = np.log(np.array(first.samples) / SECONDS_PER_NODE)
    assert logarithms.std() == pytest.approx(0.1, rel=0.1)
    assert logarithms.mean() == pytest.approx(0.0, abs=0.01)


def test_the_fake_engine_fails_on_demand_and_counts() -> None:
    engine = FakeEngine(failing={1, 2})
    model = one_node("Relu", [1, 3])
    failed = [timing.error is not None for timing in engine.measure([model, model]) + engine.measure([model, model])]
    assert failed == [False, True, True, False]
    assert (engine.calls, engine.models) == (2, 4)


def test_the_identity_of_onnxruntime_names_what_timings_depend_on() -> None:
    identity = OnnxRuntimeEngine(threads=2).identity
    for part in (
        f"onnxruntime {module.onnxruntime.__version__}",
        "CPUExecutionProvider",
        "2 threads",
        sampling.processor(),
    ):
        assert part in identity
    others = [OnnxRuntimeEngine(), OnnxRuntimeEngine(2, optimisation="basic"), OnnxRuntimeEngine(2, batch=4)]
    assert len({identity, *(other.identity for other in others)}) == 4


def test_an_unknown_provider_is_refused_with_those_available() -> None:
    with pytest.raises(InputError, match=r"unknown provider 'Cpu'.*CPUExecutionProvider"):
        OnnxRuntimeEngine(provider="Cpu")


@pytest.mark.parametrize("settings", [{"threads": 0}, {"batch": 0}, {"optimisation": "most"}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        OnnxRuntimeEngine(**settings)


def test_an_operator_unknown_to_onnxruntime_is_not_called_a_broken_file() -> None:
    with pytest.raises(InputError, match=r"^ONNX Runtime cannot load the model: .*Nonsense"):
        OnnxRuntimeEngine().run(one_node("Nonsense", [1, 3]), {})


@pytest.mark.parametrize("name", engines.ENGINES)
@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL])
@pytest.mark.parametrize("shape", [["n", 3], []])
def test_inputs_of_every_common_type_can_be_made(element: int, name: str, shape: list[int | str]) -> None:
    (timing,) = engines.create(name).measure([one_node("Identity", shape, element=element)], rounds=2)
    assert timing.error is None


@pytest.mark.parametrize("name", engines.ENGINES)
def test_an_input_of_another_type_is_an_error_value(name: str) -> None:
    (timing,) = engines.create(name).measure([one_node("Identity", ["n", 3], element=TensorProto.STRING)], rounds=2)
    assert "string" in (timing.error or "")


def test_dynamic_axes_are_one_but_the_first_is_the_batch() -> None:
    # The weight fits only an input [5, 1]; any other size would be an error.
    model = one_node("Gemm", ["n", "m"], [1, 2])
    assert OnnxRuntimeEngine(batch=5)._shape(["n", "m", 7]) == (5, 1, 7)
    assert OnnxRuntimeEngine(batch=5).measure([model], rounds=1)[0].error is None


class Clock:
    """Stands for `time` and for every session: a run of session s takes exactly `seconds[s]`."""

    def __init__(self, seconds: dict[bytes, float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.runs: list[bytes] = []
        self.taken_away: set[int] = set()
        """Runs (by number) during which another process gets the processor for a second."""
        self.preemptions = 0
        self.waited = 0.0

    def perf_counter(self) -> float:
        return self.now

    def session(self, model: bytes, *_: Any, **__: Any) -> Any:
        def run(_outputs: None, _inputs: object) -> list[Any]:
            if len(self.runs) in self.taken_away:
                self.now += 1
                self.waited += 1
                self.preemptions += 1
            self.now += self.seconds[model]
            self.runs.append(model)
            return []

        return SimpleNamespace(run=run, get_inputs=list)


def test_samples_are_long_enough_interleaved_and_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {b"short": 2.0**-13, b"middle": 2.0**-11, b"long": 2.0**-9}  # exact in binary, so that the clock is too
    clock = Clock(seconds)
    monkeypatch.setattr(module.onnxruntime, "InferenceSession", clock.session)
    monkeypatch.setattr(sampling, "time", clock)
    monkeypatch.setattr(sampling, "_preemptions", lambda: 0)
    timings = OnnxRuntimeEngine().measure(list(seconds), rounds=40)
    assert [timing.samples for timing in timings] == [(value,) * 40 for value in seconds.values()]
    # One untimed run, then as many as take at least a millisecond.
    block = {model: 1 + math.ceil(1e-3 / value) for model, value in seconds.items()}
    warm_up = 4 * len(seconds)
    length = sum(block.values())
    rounds = [clock.runs[i : i + length] for i in range(warm_up, len(clock.runs), length)]
    orders = [tuple(dict.fromkeys(runs)) for runs in rounds]
    assert len(rounds) == 40
    assert rounds == [[model for model in order for _ in range(block[model])] for order in orders]
    assert set(orders) == set(itertools.permutations(seconds))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("disturbed", [1, sampling.ATTEMPTS - 1, sampling.ATTEMPTS])
def test_a_sample_during_which_the_processor_was_taken_away_is_taken_again(
    disturbed: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, warm_up = 2.0**-9, 4
    clock = Clock({b"model": seconds})
    clock.taken_away = {warm_up + 1 + 2 * take for take in range(disturbed)}  # a take is an untimed run and a timed one
    monkeypatch.setattr(module.onnxruntime, "InferenceSession", clock.session)
    monkeypatch.setattr(sampling, "time", clock)
    monkeypatch.setattr(sampling, "_preemptions", lambda: clock.preemptions)
    monkeypatch.setattr(sampling, "_waited", lambda: clock.waited if told else 0.0)
    (timing,) = OnnxRuntimeEngine().measure([b"model"], rounds=3)
    counted = 1.0 if disturbed == sampling.ATTEMPTS and not told else 0.0
    assert timing.samples == (counted + seconds, seconds, seconds)


def test_waiting_is_not_counted_where_every_take_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {b"dense": 2.0**-7, b"pruned": 2.0**-9}
    clock = Clock(seconds)
    clock.taken_away = set(range(1000))
    monkeypatch.setattr(module.onnxruntime, "InferenceSession", clock.session)
    monkeypatch.setattr(sampling, "time", clock)
    monkeypatch.setattr(sampling, "_preemptions", lambda: len(clock.runs))
    monkeypatch.setattr(sampling, "_waited", lambda: clock.waited)
    dense, pruned = OnnxRuntimeEngine().measure(list(seconds), rounds=20)
    assert (dense.median, pruned.median) == (seconds[b"dense"], seconds[b"pruned"])


def test_giving_way_to_others_is_counted() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    assert before <= sampling._preemptions() <= resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@pytest.mark.skipif(not sampling.SCHEDULED.exists(), reason="Linux tells how long a thread waits")
def test_waiting_for_the_processor_is_told_in_seconds() -> None:
    """Two threads of work on one processor: each waits while the other works."""
    found: list[float] = []

    def work() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        start, before = time.perf_counter(), sampling._waited()
        np.sort(np.random.default_rng(0).normal(size=2_000_000))  # without the lock of the interpreter
        found.extend([sampling._waited() - before, time.perf_counter() - start])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited, elapsed = found[0] + found[2], found[1] + found[3]
    assert 0 < waited < elapsed


def test_the_time_of_waiting_is_unknown_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SCHEDULED", tmp_path / "missing")
    assert sampling._waited() == 0.0


def test_the_processor_is_named() -> None:
    assert sampling.processor().strip()


def test_engines_by_name() -> None:
    made = engines.create("onnxruntime", threads=2, optimisation="basic")
    assert made == OnnxRuntimeEngine(2, optimisation="basic")
    assert engines.create(**(engines.settings_of(made) or {})) == made
    assert engines.settings_of(FakeEngine()) is None
    with pytest.raises(InputError, match="unknown engine 'tensorrt'; known are onnxruntime, openvino"):
        engines.create("tensorrt")
    with pytest.raises(InputError, match=r"'openvino' has no setting provider$"):
        engines.create("openvino", threads=2, provider="CPUExecutionProvider")


@pytest.mark.parametrize("name", engines.ENGINES)
def test_an_identity_tells_engine_threads_and_batch(name: str) -> None:
    identities = set()
    for threads, batch in itertools.product((1, 2), (1, 8)):
        made = engines.create(name, threads=threads, batch=batch)
        assert engines.create(**engines.settings_in(made.identity)) == made
        identities.add(made.identity)
    assert len(identities) == 4
    fake = engines.settings_in(FakeEngine(threads=2, batch=8).identity)
    assert fake == {"name": "onnxruntime", "threads": 2, "batch": 8}
    assert engines.settings_in("") == {"name": "onnxruntime", "threads": 1, "batch": 1}


def test_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "graphprune.engines.openvino", raising=False)
    with pytest.raises(InputError, match=r"pip install graphprune\[openvino\]"):
        engines.create("openvino")


def test_openvino_fixes_dynamic_axes_and_refuses_what_it_cannot_load() -> None:
    engine = engines.create("openvino", batch=5)
    assert "batch 5" in engine.identity
    # The weight fits only an input [5, 1]; any other size would be an error.
    assert engine.measure([one_node("Gemm", ["n", "m"], [1, 2])], rounds=1)[0].error is None
    with pytest.raises(InputError, match=r"^OpenVINO cannot load the model: [^\n]*Nonsense[^\n]*$"):
        engine.run(one_node("Nonsense", [1, 3]), {})
    with pytest.raises(InputError, match="threads must be at least 1"):
        engines.create("openvino", threads=0)
