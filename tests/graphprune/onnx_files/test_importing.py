"""ONNX in: a file gives the same groups, and cut by the same plan the same network, as the module it came from."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import graphprune as gp
from graphprune import models
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.onnx_files import exporters
from graphprune.onnx_files.importing import import_onnx
from graphprune.onnx_files.operators import OPERATORS, OnnxCall, onnx_operator
from tests.graphprune import networks
from tests.graphprune.onnx_route import difference
from tests.graphprune.oracle import outputs_of, relative_error, scramble


def exported(model: nn.Module, inputs: list[torch.Tensor], folder: Path, newer: bool) -> Path:
    """The file of torch's newer exporter alone, or of the one that users get: the older where it can."""
    file = folder / "model.onnx"
    request = exporters.prepare(model, inputs, True, None)
    ir.save(exporters.convert(request, (exporters.by_dynamo,) if newer else exporters.routes(request)), file)
    return file


NEWER = sorted(networks.NETWORKS.keys() - {"standardised", "regnetx", "densenet", "convnext"})
OLDER = sorted(networks.NETWORKS.keys() - {"standardised", "tied", "vit_tiny", "mobilenetv2", "resnet18"})
"""By exporter, large networks once. Both standardise weights for good; the older one writes a shared matrix twice."""


@pytest.mark.parametrize(("name", "newer"), [*((name, True) for name in NEWER), *((name, False) for name in OLDER)])
def test_a_file_is_cut_like_the_module_it_came_from(name: str, newer: bool, tmp_path: Path) -> None:
    build, inputs = networks.NETWORKS[name]
    torch.manual_seed(0)
    model = scramble(build(), dtype=torch.float32)
    file = exported(model, list(inputs), tmp_path, newer)
    imported = import_onnx(file)
    assert relative_error(outputs_of(imported, inputs), outputs_of(model, inputs)) < 1e-4
    graph = gp.trace(model, inputs)
    plan = gp.uniform_plan(graph, 0.5, align=1)
    assert difference(model, graph, plan, file) < 1e-4


def network(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], sizes: list[object]) -> onnx.ModelProto:
    """A file with the input x and the output y."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in (("x", sizes), ("y", None)))
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("tests", 1)]
    return helper.make_model(helper.make_graph(nodes, "network", [x], [y], tensors), opset_imports=opsets)


def two_layers(**sizes: object) -> onnx.ModelProto:
    """Layers with one bias vector between them, and a matrix that is read twice."""
    rng = np.random.default_rng(0)
    constants = {
        "a.weight": rng.normal(size=(8, 6)).astype(np.float32), "b.weight": rng.normal(size=(6, 6)).astype(np.float32),
        "c.weight": rng.normal(size=(6, 5)).astype(np.float32), "bias": rng.normal(size=6).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["p"], "first"),
        helper.make_node("Add", ["p", "bias"], ["q"], "first_bias"),
        helper.make_node("Relu", ["q"], ["r"]),
        helper.make_node("MatMul", ["r", "b.weight"], ["s"], "second"),
        helper.make_node("Add", ["s", "bias"], ["t"], "second_bias"),
        helper.make_node("MatMul", ["t", "b.weight"], ["u"], "third"),
        helper.make_node("MatMul", ["u", "c.weight"], ["y"], "last"),
    ]
    return network(nodes, constants, sizes.get("x", ["batch", 8]))  # type: ignore[arg-type]


def test_equal_vectors_are_apart_and_a_shared_matrix_stays_shared() -> None:
    model = import_onnx(two_layers())
    assert isinstance(model.get_submodule("a"), nn.Linear)
    assert {name for name, _ in model.named_parameters()} == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}
    graph = gp.trace(two_layers())
    assert {site.size for site in graph.all_sites if site.kind != "kernel"} == {6}


def test_names_and_a_fixed_batch_stay() -> None:
    for sizes, batches in ((["batch", 8], (1, 5)), ([3, 8], (3,))):
        model = two_layers(x=sizes)
        graph = gp.trace(model)
        cut = gp.apply(model, gp.uniform_plan(graph, 0.5, align=1), graph)
        assert [value.name for value in cut.graph.input] == ["x"]
        assert [value.name for value in cut.graph.output] == ["y"]
        for batch in batches:
            (y,) = OnnxRuntimeEngine().run(cut.SerializeToString(), {"x": np.ones((batch, 8), np.float32)})
            assert y.shape == (batch, 5)


def test_the_batch_stays_free_where_constants_are_spread_over_it() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in ("a.weight", "b.weight")}
    scalars = {"zero": np.array(0), "four": np.array([4]), "half": np.array([[0.5]], np.float32), "once": np.array([1])}
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "zero"], ["batches"]),
        helper.make_node("Concat", ["batches", "four"], ["wide"], axis=0),
        helper.make_node("Expand", ["half", "wide"], ["offset"]),
        helper.make_node("Concat", ["batches", "once"], ["times"], axis=0),
        helper.make_node("Tile", ["half", "times"], ["column"]),
        helper.make_node("Add", ["x", "offset"], ["moved"]),
        helper.make_node("Add", ["moved", "column"], ["again"]),
        helper.make_node("MatMul", ["again", "a.weight"], ["p"]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "b.weight"], ["y"]),
    ]
    model = network(nodes, weights | scalars, ["batch", 4])
    graph = gp.trace(model)
    cut = gp.apply(model, gp.uniform_plan(graph, 0.5, align=1), graph)
    assert import_onnx(cut).get_submodule("a").out_features == 2
    for batch in (1, 5):
        x = rng.normal(size=(batch, 4)).astype(np.float32)
        (y,) = OnnxRuntimeEngine().run(cut.SerializeToString(), {"x": x})
        torch.testing.assert_close(torch.from_numpy(y), import_onnx(cut)(torch.from_numpy(x)))
        assert y.shape == (batch, 4)


def test_factors_of_a_resize_are_no_weights() -> None:
    scales = np.array([1, 1, 2, 3], dtype=np.float32)
    resize = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest", nearest_mode="floor",
                              coordinate_transformation_mode="asymmetric")  # fmt: skip
    imported = import_onnx(network([resize], {"scales": scales}, ["batch", 3, 4, 5]))
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(imported(x), x.repeat_interleave(2, 2).repeat_interleave(3, 3))
    assert not list(imported.parameters())
    assert gp.trace(imported, x).nodes[-1].shape == (1, 3, 8, 15)


def test_weights_that_are_standardised_as_they_are_used() -> None:
    """As batch norm in training mode over a weight, which is no batch norm layer."""
    rng = np.random.default_rng(0)
    weight, ones = rng.normal(size=(1, 6, 8)).astype(np.float32), np.ones(6, np.float32)
    nodes = [
        helper.make_node("BatchNormalization", ["w", "ones", "zeros", "zeros", "ones"], ["s"], training_mode=1),
        helper.make_node("Reshape", ["s", "shape"], ["m"]),
        helper.make_node("Gemm", ["x", "m"], ["y"], transB=1),
    ]
    constants = {"w": weight, "ones": ones, "zeros": 0 * ones, "shape": np.array([6, 8])}
    imported = import_onnx(network(nodes, constants, ["batch", 8]))
    x = rng.normal(size=(5, 8)).astype(np.float32)
    standard = (weight[0] - weight[0].mean(1, keepdims=True)) / weight[0].std(1, keepdims=True)
    np.testing.assert_allclose(imported(torch.from_numpy(x)).detach().numpy(), x @ standard.T, atol=1e-4)


def test_bounds_of_what_is_known_stay_known() -> None:
    clip = OPERATORS["Clip"](OnnxCall("Clip", (np.array([-3, 5]), np.array(0), None), {}, opset=13))
    assert isinstance(clip, np.ndarray)
    assert clip.tolist() == [0, 5]


def test_an_operator_of_ones_own_takes_one_function() -> None:
    model = network([helper.make_node("Twice", ["x"], ["y"], domain="tests")], {}, ["batch", 4])
    with pytest.raises(InputError, match="no torch equivalent for the ONNX operators tests::Twice"):
        import_onnx(model)

    @onnx_operator("tests::Twice")
    def twice(call: OnnxCall) -> torch.Tensor:
        return 2 * call.tensor(0)

    try:
        x = torch.randn(3, 4)
        torch.testing.assert_close(import_onnx(model)(x), 2 * x)
    finally:
        del OPERATORS["tests::Twice"]


def test_what_is_no_model(tmp_path: Path) -> None:
    good = two_layers().SerializeToString()
    for name, data in {"text": b"hello", "cut": good[: len(good) // 2], "empty": b""}.items():
        (tmp_path / f"{name}.onnx").write_bytes(data)
        with pytest.raises(InputError) as caught:
            gp.trace(tmp_path / f"{name}.onnx")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError, match="cannot read"):
        gp.trace(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="free sizes"):
        gp.trace(two_layers(x=["batch", "tokens", 8]))
    assert gp.trace(two_layers(x=["batch", "tokens", 8]), torch.randn(2, 5, 8)).inputs == (("float32", (5, 8)),)
    with pytest.raises(InputError, match="example_inputs are needed"):
        gp.trace(nn.Linear(3, 4))


def test_a_path_is_a_spec(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    image = torch.randn(2, 3, 32, 32)
    gp.export_onnx(models.create("cifar:resnet20").eval(), file, image)
    model = models.create(str(file))
    assert models.default_input_size(str(file), model) == (3, 32, 32)
    with pytest.raises(InputError, match="takes no options"):
        models.create(f"{file}?num_classes=3")
