"""What every engine must do. A new engine joins with one line in ENGINES."""

from collections.abc import Callable
from functools import partial
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune import engines
from graphprune.engines.base import Engine
from graphprune.engines.fake import FakeEngine
from graphprune.errors import InputError, StepError

ENGINES: dict[str, Callable[..., Engine]] = {
    "fake": FakeEngine, **{name: partial(engines.create, name) for name in engines.ENGINES},
}  # fmt: skip

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def product(copies: int = 1, operation: str = "MatMul", batch: str | int = "any") -> bytes:
    """y = x W + ... + x W with x of shape [batch, 3]."""
    nodes = [helper.make_node(operation, ["x", "w"], [f"p{i}"]) for i in range(copies)]
    nodes.append(helper.make_node("Sum", [f"p{i}" for i in range(copies)], ["y"]))
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def chain(length: int) -> bytes:
    """Products with a matrix [64, 64] one after the other, so that an engine cannot merge them."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["any", 64]) for name in ("p0", f"p{length}")]
    nodes = [helper.make_node("MatMul", [f"p{i}", "w"], [f"p{i + 1}"]) for i in range(length)]
    weight = numpy_helper.from_array(np.full((64, 64), 1 / 64, np.float32), "w")
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]()


@pytest.fixture(params=ENGINES)
def made(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Makes an engine with settings."""
    return ENGINES[request.param]


@pytest.fixture
def no_model(tmp_path: Path) -> Path:
    path = tmp_path / "notes.onnx"
    path.write_text("this is not a model")
    return path


def test_the_identity_is_stable_and_not_empty(engine: Engine) -> None:
    assert engine.identity
    assert "\n" not in engine.identity
    assert engine.identity == type(engine)().identity
    others = {made().identity for made in ENGINES.values()}
    assert len(others) == len(ENGINES)


def test_run_agrees_with_numpy(engine: Engine) -> None:
    x = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=np.float32)
    (y,) = engine.run(product(copies=2), {"x": x})
    np.testing.assert_allclose(y, 2 * x @ WEIGHT, rtol=1e-6)


def test_a_file_and_its_bytes_are_the_same_model(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(product())
    x = np.ones((1, 3), dtype=np.float32)
    for model in (path, str(path)):
        np.testing.assert_array_equal(engine.run(model, {"x": x})[0], engine.run(product(), {"x": x})[0])


def test_what_is_no_model_is_refused_in_one_line_that_names_the_file(engine: Engine, no_model: Path) -> None:
    with pytest.raises(InputError, match=r"^.*notes\.onnx is not an ONNX model: [^\n]+$"):
        engine.run(no_model, {})


def test_a_missing_file_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^.*absent\.onnx"):
        engine.run(tmp_path / "absent.onnx", {})


def test_wrong_inputs_are_a_failed_step(engine: Engine) -> None:
    with pytest.raises(StepError, match=r"^[^\n]+$"):
        engine.run(product(), {"x": np.ones((1, 5), dtype=np.float32)})


def test_each_model_has_one_positive_sample_per_round(engine: Engine) -> None:
    timings = engine.measure([product(), product(copies=3)], rounds=4)
    assert [len(timing.samples) for timing in timings] == [4, 4]
    assert all(sample > 0 for timing in timings for sample in timing.samples)
    assert [timing.error for timing in timings] == [None, None]


def test_no_models_take_no_time(engine: Engine) -> None:
    assert engine.measure([], rounds=3) == []


def test_failure_is_a_value_and_spares_the_other_models(engine: Engine, no_model: Path, tmp_path: Path) -> None:
    good, bad, absent = engine.measure([product(), no_model, tmp_path / "absent.onnx"], rounds=2)
    assert len(good.samples) == 2
    assert good.error is None
    for timing in (bad, absent):
        assert timing.samples == ()
        assert timing.error
        assert "\n" not in timing.error
        assert isnan(timing.median)


def test_more_work_takes_longer(engine: Engine) -> None:
    few, many = engine.measure([chain(1), chain(100)], rounds=5)
    assert min(many.samples) > min(few.samples)


def test_threads_and_batch_are_settings_that_the_identity_tells(made: Callable[..., Engine]) -> None:
    settings = [(1, 1), (2, 1), (1, 8), (2, 8)]
    found = [made(threads=threads, batch=batch) for threads, batch in settings]
    assert [engine.batch for engine in found] == [1, 1, 8, 8]
    assert len({engine.identity for engine in found}) == 4
    for engine in found:
        assert engine.measure([product()], rounds=2)[0].error is None


def test_a_fixed_batch_is_not_timed_as_another(made: Callable[..., Engine]) -> None:
    one, eight, free = made(batch=8).measure([product(batch=1), product(batch=8), product()], rounds=2)
    assert one.error is not None
    assert "batch 8" in one.error
    assert (eight.error, free.error) == (None, None)
    assert made(batch=1).measure([product(batch=8)], rounds=2)[0].error is None


def test_a_larger_batch_is_more_work(made: Callable[..., Engine]) -> None:
    (one,), (many,) = (made(batch=batch).measure([chain(100)], rounds=5) for batch in (1, 512))
    assert min(many.samples) > min(one.samples)
