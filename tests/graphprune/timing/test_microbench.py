import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional

from graphprune.coupling.operators import Attention, Convolution, Linear, Masked, Operator
from graphprune.engines.fake import SECONDS_PER_NODE, SECONDS_PER_PRODUCT, FakeEngine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.timing.microbench import PATTERN, microbench

CENTRED = Convolution(1, 4, 6, 9, 8, (3, 3), padding=(1, 1, 1, 1))
CONVOLUTIONS = [
    CENTRED,
    CENTRED.window((0, 3), (0, 1)),
    CENTRED.window((2, 3), (0, 3)),
    CENTRED.window((0, 2), (1, 3)),
    CENTRED.window((0, 1), (0, 1)),
    Convolution(2, 4, 6, 9, 8, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    Convolution(1, 4, 8, 9, 8, (3, 3), dilation=(2, 2), padding=(2, 2, 2, 2)),
    Convolution(1, 4, 4, 9, 8, (5, 5), padding=(2, 2, 2, 2), groups=4),
    Convolution(1, 3, 5, 9, 8, (1, 1)),
]
LINEARS = [Linear(5, 7, 3), Linear(5, 7, 3, "relu"), Linear(5, 7, 3, "gelu"), Linear(5, 8, 12, "gelu", groups=4)]
ATTENTIONS = [Attention(1, 3, 5, 5, 4, 4), Attention(2, 2, 5, 7, 4, 6)]
DEEP = [Convolution(1, 48, 20, 9, 8, (3, 3), padding=(1, 1, 1, 1)), Convolution(1, 48, 48, 9, 8, (3, 3), groups=48)]


def weight(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.resize(PATTERN, shape))


def expected(operator: Operator, inputs: list[torch.Tensor]) -> torch.Tensor:
    """One execution by torch."""
    if isinstance(operator, Convolution):
        top, left, bottom, right = operator.padding
        kernel = weight(operator.outputs, operator.inputs // operator.groups, *operator.kernel)
        padded = functional.pad(inputs[0], (left, right, top, bottom))
        return functional.conv2d(
            padded, kernel, weight(operator.outputs), operator.stride, 0, operator.dilation, operator.groups
        )
    if isinstance(operator, Linear):
        shape = (operator.inputs // operator.groups, operator.outputs // operator.groups)
        products = [part @ weight(*shape) for part in inputs[0].chunk(operator.groups, -1)]
        result = torch.cat(products, -1) + weight(operator.outputs)
        return {"": lambda x: x, "relu": functional.relu, "gelu": functional.gelu}[operator.activation](result)
    heads = [x.unflatten(2, (operator.heads, -1)).transpose(1, 2) for x in inputs]
    return functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("operator", [*CONVOLUTIONS, *LINEARS, *ATTENTIONS], ids=str)
def test_both_models_compute_copies_of_the_operator_as_torch_does(operator: Operator, batch: int) -> None:
    bench = microbench(operator, batch)
    declared = onnx.load_from_string(bench.model).graph.input
    shapes = [[axis.dim_value for axis in entry.type.tensor_type.shape.dim] for entry in declared]
    generator = np.random.default_rng(0)
    feed = {f"input{i}": generator.random(shape, dtype=np.float32) for i, shape in enumerate(shapes)}  # not negative
    one = expected(operator, [torch.from_numpy(value) for value in feed.values()]).numpy()
    (model,) = OnnxRuntimeEngine().run(bench.model, feed)
    (baseline,) = OnnxRuntimeEngine().run(bench.baseline, feed)
    np.testing.assert_allclose(model, (bench.copies + 1) * one, rtol=1e-4, atol=1e-4)
    # The baseline of a convolution adds nothing, the others add the same result as often as the model adds.
    added = 1 if isinstance(operator, Convolution) else bench.copies + 1
    np.testing.assert_allclose(baseline, added * one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("operator", [*CONVOLUTIONS, *LINEARS, *ATTENTIONS, *DEEP], ids=str)
def test_the_difference_is_the_operators_own_work(operator: Operator, batch: int) -> None:
    bench = microbench(operator, batch)
    engine = FakeEngine(block=1, batch=batch)
    products = (engine.seconds(bench.model) - engine.seconds(bench.baseline)) / bench.copies
    counts = [len(onnx.load_from_string(model).graph.node) for model in (bench.model, bench.baseline)]
    products -= (counts[0] - counts[1]) / bench.copies * SECONDS_PER_NODE
    assert 2 * products / SECONDS_PER_PRODUCT == pytest.approx(batch * operator.flops, rel=1e-6)


def test_the_nodes_of_the_difference_are_those_of_the_operator() -> None:
    def extra(operator: Operator) -> dict[str, int]:
        bench = microbench(operator)
        kinds = [[n.op_type for n in onnx.load_from_string(m).graph.node] for m in (bench.model, bench.baseline)]
        return {k: n for k in set(kinds[0]) if (n := (kinds[0].count(k) - kinds[1].count(k)) // bench.copies)}

    assert extra(CENTRED) == {"Conv": 1, "Add": 1}
    assert extra(CENTRED.window((0, 3), (0, 1))) == {"Conv": 1, "Add": 1, "Slice": 1}
    assert extra(Linear(5, 7, 3)) == {"MatMul": 1, "Add": 1}
    assert extra(Linear(5, 8, 4, groups=2)) == {"Split": 1, "MatMul": 2, "Concat": 1, "Add": 1}
    assert extra(Attention(1, 3, 5, 5, 4, 4)) == {"Transpose": 4, "Reshape": 4, "Mul": 2, "MatMul": 2, "Softmax": 1}


def test_large_operators_have_fewer_copies_and_at_least_one() -> None:
    small, middle, large = (microbench(Convolution(1, c, c, 28, 28, (3, 3))) for c in (16, 96, 512))
    assert small.copies > middle.copies > large.copies == 1


def test_models_stay_small_where_weights_are_large() -> None:
    weights = 2048 * 2048  # its FLOPs would allow more copies
    bench = microbench(Linear(1, 2048, 2048))
    assert bench.copies == 3
    assert len(bench.model) == pytest.approx(4 * 4 * weights, rel=0.01)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(InputError, match="unknown activation 'swish'; known: relu, gelu"):
        microbench(Linear(1, 2, 3, "swish"))


@pytest.mark.parametrize(
    ("dense", "axis"), [(Linear(5, 8, 3), 0), (Convolution(1, 8, 6, 9, 8, (1, 1)), 1)], ids=["linear", "convolution"]
)
def test_a_masked_operator_is_the_dense_one_with_two_zeros_in_four(dense: Linear | Convolution, axis: int) -> None:
    benches = [microbench(operator) for operator in (dense, Masked(dense))]
    assert benches[0].copies == benches[1].copies
    graphs = [onnx.load_from_string(bench.model).graph for bench in benches]
    assert graphs[0].node == graphs[1].node
    operation = "MatMul" if isinstance(dense, Linear) else "Conv"
    names = {node.input[1] for node in graphs[0].node if node.op_type == operation}
    whole, halved = ({entry.name: numpy_helper.to_array(entry) for entry in graph.initializer} for graph in graphs)
    masked = {name for name in names if whole[name].shape[axis] == 8}
    assert masked
    for name in whole:
        kept = halved[name] != 0
        assert (halved[name] == whole[name] * kept).all()
        if name in masked:
            assert (np.moveaxis(kept, axis, -1).reshape(-1, 4).sum(1) == 2).all()
        else:
            assert kept.all()
