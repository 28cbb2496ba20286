import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, median

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.coupling.operators import Absent, Convolution, Linear, Operator, key
from graphprune.engines.base import Model, Timing
from graphprune.engines.fake import SECONDS_PER_NODE, SECONDS_PER_PRODUCT, FakeEngine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.timing.passes import LOT_OPERATORS, MOST_PASSES, PASSES, REFERENCES, SHORTEST, lots, measure_lot
from graphprune.timing.profile import BLOCK_OPERATORS, LEAST_NOISE, MOST_GAIN, Profile

DENSE = Convolution(1, 32, 32, 16, 16, (3, 3), padding=(1, 1, 1, 1), stride=(2, 2))
HALF = Convolution(1, 32, 16, 16, 16, (3, 3), padding=(1, 1, 1, 1), stride=(2, 2))
ROW = DENSE.window((1, 2), (0, 3))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "timings.jsonl"


def widths(count: int) -> list[Operator]:
    return [Linear(3, 5 + index, 7) for index in range(count)]


def exact(operator: Convolution) -> float:
    """What the fake engine takes for it, with the addition that follows it: blocks of 16, two nodes."""
    return operator.flops / 2 * SECONDS_PER_PRODUCT + 2 * SECONDS_PER_NODE


@dataclass
class Machine(FakeEngine):
    """A fake engine with bad moments: `speed[i]` is by how much everything is slower in call i."""

    slowness: dict[int, float] = field(default_factory=dict)
    stop_at: int = -1

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        factor = self.slowness.get(self.calls, 1.0)
        return [Timing(tuple(factor * s for s in t.samples), t.error) for t in super().measure(models, rounds)]


def test_times_and_gains_are_exact(cache: Path) -> None:
    profile = Profile(FakeEngine(), cache)
    for operator in (DENSE, HALF, ROW):
        assert profile.seconds(operator) == pytest.approx(exact(operator), rel=1e-9)
    assert profile.gain([DENSE, DENSE], [HALF, ROW]) == pytest.approx(2 * exact(DENSE) / (exact(HALF) + exact(ROW)))
    assert profile.gain([DENSE], []) == MOST_GAIN
    assert profile.gain([DENSE], [Absent()]) == MOST_GAIN
    assert (profile.timing(Absent()).samples, profile.seconds(Absent())) == ((0.0,), 0.0)
    assert profile.timing(DENSE).samples == pytest.approx((exact(DENSE),) * PASSES)


def test_a_gain_must_exceed_the_noise(cache: Path, tmp_path: Path) -> None:
    quiet = Profile(FakeEngine(), cache)
    wasted = Convolution(1, 32, 31, 16, 16, (3, 3), padding=(1, 1, 1, 1), stride=(2, 2))
    assert quiet.beyond_noise([DENSE], [HALF])
    assert not quiet.beyond_noise([HALF], [DENSE])
    assert quiet.gain([DENSE], [wasted]) == pytest.approx(1.0)
    assert not quiet.beyond_noise([DENSE], [wasted])
    # With a deviation of 0.005 for each time, 1.645 * sqrt(2) * 0.005 is 1.2 %; these gain 1.0 and 2.0 %.
    product, barely, clearly = Linear(64, 192, 192), Linear(64, 192, 190), Linear(64, 192, 188)
    assert not quiet.beyond_noise([product], [barely])
    assert quiet.beyond_noise([product], [clearly])
    noisy = Profile(FakeEngine(noise=0.2), tmp_path / "noisy.jsonl")
    noisy.fill(widths(40))
    assert not noisy.beyond_noise([product], [clearly])


def test_the_noise_is_that_of_pooled_passes(cache: Path) -> None:
    assert Profile(FakeEngine(), cache).noise == pytest.approx(0.005)
    profile = Profile(FakeEngine(), cache)
    deviation, operators = 0.05, [*REFERENCES, *BLOCK_OPERATORS]
    profile.fill(operators)
    # Quantiles of the difference of two passes, each with this deviation.
    gaps = [math.sqrt(2) * deviation * NormalDist().inv_cdf((i + 0.5) / len(operators)) for i in range(len(operators))]
    profile._samples.update({key(o): (1.0, math.exp(gap)) for o, gap in zip(operators, gaps, strict=True)})
    assert profile.noise == pytest.approx(deviation / math.sqrt(2), rel=0.1)


def test_the_noise_does_not_depend_on_what_else_was_measured(cache: Path) -> None:
    engine = FakeEngine(noise=0.1)
    first = Profile(engine, cache)
    before = first.noise
    first.fill(widths(60))
    assert Profile(engine, cache).noise == before == first.noise > LEAST_NOISE


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_block_is_found(block: int, noise: float, cache: Path) -> None:
    assert Profile(FakeEngine(block=block, noise=noise), cache).block == block


def test_what_is_cached_is_never_measured_again(cache: Path) -> None:
    first = Profile(FakeEngine(), cache)
    first.fill([DENSE, HALF, *widths(60)])
    block = first.block
    engine = FakeEngine()
    again = Profile(engine, cache)
    again.fill([DENSE, HALF, *widths(60)], lambda *_: pytest.fail("nothing was left to measure"))
    assert again.gain([DENSE], [HALF]) == first.gain([DENSE], [HALF])
    assert again.block == block
    assert again.noise == first.noise
    assert engine.calls == 0


def test_an_operator_is_measured_once_however_often_it_is_asked_for(cache: Path) -> None:
    engine = FakeEngine()
    seen: list[tuple[int, int]] = []
    Profile(engine, cache).fill([DENSE] * 20, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]
    references = 2 * PASSES * len(REFERENCES)  # on their own first, then beside the operator
    assert engine.models == 2 * PASSES * 1 + 2 * references


def test_engines_do_not_share_timings(cache: Path) -> None:
    Profile(FakeEngine(block=16), cache).fill([DENSE])
    other = FakeEngine(block=64)
    assert Profile(other, cache).seconds(DENSE) > 1.5 * exact(DENSE)
    assert other.calls > 0


def test_operators_are_timed_at_the_batch_of_the_engine_and_each_batch_and_number_of_threads_has_its_own(
    cache: Path,
) -> None:
    work, nodes = DENSE.flops / 2 * SECONDS_PER_PRODUCT, 2 * SECONDS_PER_NODE
    for threads, batch in ((1, 1), (1, 8), (2, 1), (2, 8)):
        engine = FakeEngine(threads=threads, batch=batch)
        assert Profile(engine, cache).seconds(DENSE) == pytest.approx(work * batch / threads + nodes, rel=1e-9)
        assert engine.calls > 0, "nothing is taken from another batch or number of threads"
        again = FakeEngine(threads=threads, batch=batch)
        assert Profile(again, cache).seconds(DENSE) == pytest.approx(work * batch / threads + nodes, rel=1e-9)
        assert again.calls == 0


@dataclass
class Disturbed(FakeEngine):
    """In the calls `when`, every second model (the baselines) is slower by far, so that the difference vanishes."""

    when: Sequence[int] = ()

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        factors = (1.0, 100.0) if self.calls in self.when else (1.0, 1.0)
        timings = super().measure(models, rounds)
        return [Timing(tuple(factors[n % 2] * s for s in t.samples)) for n, t in enumerate(timings)]


@pytest.mark.parametrize("when", [(0, 1), (1, 2), (0, 2, 4)])
def test_a_time_that_vanished_is_measured_again(when: tuple[int, ...]) -> None:
    (bench,) = lots([DENSE], 1)
    found = measure_lot(Disturbed(when=when), bench, {})[DENSE]
    assert found == pytest.approx((exact(DENSE),) * len(found))
    assert len(found) == PASSES


def test_a_time_that_always_vanishes_is_the_shortest() -> None:
    (bench,) = lots([DENSE], 1)
    assert measure_lot(Disturbed(when=range(9)), bench, {})[DENSE] == (SHORTEST,) * MOST_PASSES


def test_progress_counts_up_to_what_was_missing(cache: Path) -> None:
    profile = Profile(FakeEngine(), cache)
    profile.fill(widths(5))
    seen: list[tuple[int, int]] = []
    profile.fill(widths(5 + 2 * LOT_OPERATORS), lambda done, total: seen.append((done, total)))
    assert seen == [(LOT_OPERATORS, 2 * LOT_OPERATORS), (2 * LOT_OPERATORS, 2 * LOT_OPERATORS)]


def test_a_killed_profile_resumes_and_loses_one_lot_at_most(cache: Path) -> None:
    wanted = widths(3 * LOT_OPERATORS)
    # Calls: PASSES for the references, then PASSES for each lot; killed in the second pass of the second lot.
    with pytest.raises(KeyboardInterrupt):
        Profile(Machine(stop_at=3 * PASSES - 1), cache).fill(wanted)
    engine = Machine()
    seen: list[tuple[int, int]] = []
    Profile(engine, cache).fill(wanted, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * LOT_OPERATORS, 2 * LOT_OPERATORS)
    assert engine.calls == 2 * PASSES


def test_damaged_lines_cost_only_themselves(cache: Path) -> None:
    Profile(FakeEngine(), cache).fill([DENSE, HALF])
    lines = cache.read_text().splitlines()
    kept = next(index for index, line in enumerate(lines) if '\\"outputs\\": 16' in line)
    torn = next(index for index, line in enumerate(lines) if '\\"stride\\": [2, 2]' in line and index != kept)
    lines[torn] = lines[torn][: len(lines[torn]) // 2]
    nonsense = ["\x00\x01", "[]", "null", '{"scope": 3}', lines[kept].replace('"samples": [', '"samples": ["x", ')]
    cache.write_text("\n".join([*lines, *nonsense, lines[kept].replace('"samples": [', '"samples": [-1.0, ')[:-1]]))
    engine = FakeEngine()
    profile = Profile(engine, cache)
    assert profile.seconds(HALF) == pytest.approx(exact(HALF))
    assert engine.calls == 0
    assert profile.seconds(DENSE) == pytest.approx(exact(DENSE))
    assert engine.calls == PASSES
    after = FakeEngine()
    assert Profile(after, cache).seconds(DENSE) == pytest.approx(exact(DENSE))
    assert after.calls == 0


def test_failure_is_a_value_and_is_not_kept(cache: Path) -> None:
    Profile(FakeEngine(), cache).fill(REFERENCES)
    profile = Profile(FakeEngine(failing={2}), cache)  # the first pass of the second operator
    profile.fill([DENSE, HALF, ROW])
    assert profile.timing(HALF).error == "model 2 fails on demand"
    assert math.isnan(profile.seconds(HALF))
    assert math.isnan(profile.gain([DENSE], [HALF]))
    assert not profile.beyond_noise([DENSE], [HALF])
    assert profile.seconds(DENSE) == pytest.approx(exact(DENSE))
    assert profile.seconds(ROW) == pytest.approx(exact(ROW))
    assert Profile(FakeEngine(), cache).seconds(HALF) == pytest.approx(exact(HALF))


def test_an_engine_that_runs_nothing_does_not_stop_the_profile(cache: Path) -> None:
    profile = Profile(FakeEngine(failing=range(10**6)), cache)
    profile.fill([DENSE])
    assert profile.timing(DENSE).error
    assert not cache.exists() or not cache.read_text().strip()


def test_an_operator_that_cannot_exist_is_a_failure(cache: Path) -> None:
    too_small = Convolution(1, 3, 8, 2, 2, (5, 5))
    assert Profile(OnnxRuntimeEngine(), cache).timing(too_small).error


def test_times_are_stated_for_the_speed_of_the_first_measurement(cache: Path) -> None:
    slow_later = Machine(slowness=dict.fromkeys(range(PASSES, 100), 1.3))
    profile = Profile(slow_later, cache)
    assert profile.seconds(DENSE) == pytest.approx(exact(DENSE))
    assert slow_later.calls == 2 * PASSES


def test_a_bad_moment_brings_a_third_pass_that_decides(cache: Path) -> None:
    # The references cannot tell: they were measured in the same bad moment and nothing else was.
    engine = Machine(slowness={0: 1.5})
    profile = Profile(engine, cache)
    profile.fill(REFERENCES)
    assert engine.calls == PASSES + 1
    conv = REFERENCES[0]
    assert isinstance(conv, Convolution)
    assert profile.seconds(conv) == pytest.approx(exact(conv))


def test_passes_end_even_if_they_never_agree(cache: Path) -> None:
    profile = Profile(FakeEngine(noise=1.0), cache)
    profile.fill(widths(20))
    counts = [len(profile.timing(operator).samples) for operator in widths(20)]
    assert max(counts) <= MOST_PASSES
    assert sum(counts) > PASSES * 20


def test_lots_are_small_enough_to_be_in_memory_together() -> None:
    large: list[Operator] = [Linear(1, 1500, 1500 + index) for index in range(3)]
    assert [len(lot) for lot in lots(large, 1)] == [1, 1, 1]
    assert [len(lot) for lot in lots(widths(LOT_OPERATORS + 1), 1)] == [LOT_OPERATORS, 1]
    assert list(lots([], 1)) == []


def test_the_sum_of_operators_is_about_the_time_of_the_network(cache: Path) -> None:
    """Loose, as test machines are busy: it catches a missing factor, not a per cent."""
    layers = [Convolution(1, 32, 32, 28, 28, kernel, padding=pad) for kernel, pad in WINDOWS]
    engine = OnnxRuntimeEngine()
    profile = Profile(engine, cache)
    ratios = []
    for _ in range(3):
        (whole,) = engine.measure([stack(layers)], rounds=10)
        ratios.append(sum(map(profile.seconds, layers)) / min(whole.samples))
    assert 1 / 3 < median(ratios) < 3


WINDOWS = [((3, 3), (1, 1, 1, 1)), ((1, 3), (0, 1, 0, 1)), ((3, 3), (1, 1, 1, 1)), ((2, 2), (1, 1, 0, 0))] * 3


def stack(layers: Sequence[Convolution]) -> bytes:
    """The convolutions one after the other, each followed by a ReLU."""
    nodes, weights, name = [], [], "x"
    generator = np.random.default_rng(0)
    for index, layer in enumerate(layers):
        values = generator.standard_normal((layer.outputs, layer.inputs, *layer.kernel)).astype(np.float32) / 20
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        pads, c = list(layer.padding), f"c{index}"
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [c], pads=pads, kernel_shape=layer.kernel))
        name = f"r{index}"
        nodes.append(helper.make_node("Relu", [c], [name]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, 28, 28])
    y = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "stack", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
