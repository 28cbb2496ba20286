"""Export: ONNX Runtime computes what torch computes, or no file is written."""

import copy
import errno
import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError, StepError
from graphprune.onnx_files import export, exporters
from graphprune.onnx_files.export import export_onnx, onnx_bytes


class Windowed(nn.Module):
    """Convolutions as pruning leaves them: unequal, partly negative padding, then batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 1), bias=False)
        self.second = nn.Conv2d(8, 8, (2, 2))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.relu(self.first(functional.pad(image, (1, -1, 1, 1))))
        x = functional.relu(self.norm(self.second(functional.pad(x, (1, 0, 0, 1)))))
        return self.head(x.mean((2, 3)))


class Several(nn.Module):
    """Two inputs, one of them indices; three outputs, one of them without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, values: Tensor, index: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        mixed = self.mix(values + self.table(index))
        return {"mixed": mixed, "rest": (mixed.sum(1), self.table.weight.sum(0))}


class Fixed(nn.Module):
    """Reads its batch size as a number, so that the batch axis cannot be dynamic."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if int(x.shape[0]) == 3 else x * 3


class PooledLast(nn.Module):
    """Global pooling of a channels-last tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(self.stem(x).permute(0, 2, 3, 1), (8,))
        one = functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1)
        return self.head(
            (one.flatten(2) + functional.adaptive_avg_pool1d(x.flatten(1, 2).transpose(1, 2), 1)).flatten(1)
        )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def attention() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)


def assert_agrees(model: nn.Module, source: Path | bytes, inputs: dict[str, Tensor]) -> None:
    """torch and ONNX Runtime, compared here without the code under test."""
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(copy.deepcopy(model).eval()(*inputs.values()))
    found = OnnxRuntimeEngine().run(source, {name: value.numpy() for name, value in inputs.items()})
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-5)


def batches(source: Path | bytes) -> list[object]:
    model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    values = [*model.graph.input, *model.graph.output]
    first = [value.type.tensor_type.shape.dim for value in values]
    return [dims[0].dim_param or dims[0].dim_value for dims in first if dims]


def operators(source: Path | bytes) -> Counter[str]:
    model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    return Counter(node.op_type for node in model.graph.node)


def test_windowed_convolutions_leave_no_pad_and_no_batch_norm(tmp_path: Path) -> None:
    model = Windowed()
    path = export_onnx(model, tmp_path / "new" / "model.onnx", torch.randn(1, 3, 9, 8))
    assert path == tmp_path / "new" / "model.onnx"
    assert os.listdir(path.parent) == ["model.onnx"]
    assert batches(path) == ["batch", "batch"]
    found = operators(path)
    assert (found["Conv"], found["Slice"], found["Pad"], found["BatchNormalization"]) == (2, 1, 0, 0)
    for batch in (1, 2, 5):
        assert_agrees(model, path, {"image": torch.randn(batch, 3, 9, 8)})


def test_the_fast_route_gives_the_same_graph() -> None:
    model = Windowed()
    data = onnx_bytes(model, torch.randn(2, 3, 9, 8))
    assert batches(data) == ["batch", "batch"]
    found = operators(data)
    assert (found["Conv"], found["Slice"], found["Pad"], found["BatchNormalization"]) == (2, 1, 0, 0)
    for batch in (1, 4):
        assert_agrees(model, data, {"image": torch.randn(batch, 3, 9, 8)})


def test_fused_attention(tmp_path: Path) -> None:
    model = attention()
    assert model.blocks[0].attn.fused_attn
    path = export_onnx(model, tmp_path / "vit.onnx", torch.randn(2, 3, 32, 32))
    for source in (path, onnx_bytes(model, torch.randn(2, 3, 32, 32))):
        assert_agrees(model, source, {"x": torch.randn(3, 3, 32, 32)})


def test_pooling_of_a_channels_last_tensor_gathers_nothing(tmp_path: Path) -> None:
    model = PooledLast()
    path = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 9, 8))
    assert operators(path)["Gather"] == 0
    assert_agrees(model, path, {"x": torch.randn(3, 3, 9, 8)})


class FoldedAttention(nn.Module):
    """Attention with other numbers of axes than four: none for heads, or one more for windows."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.qkv, self.masked = nn.Linear(6, 18), masked
        self.mask = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        short = functional.scaled_dot_product_attention(q, k, v, self.mask[:1].repeat(1, 2, 2) if self.masked else None)
        q, k, v = (y.view(-1, 2, 3, 2, 3).transpose(2, 3) for y in (q, k, v))
        windows = functional.scaled_dot_product_attention(q, k, v, self.mask if self.masked else None, scale=0.3)
        return short + windows.transpose(2, 3).reshape(x.shape)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_any_number_of_axes(masked: bool) -> None:
    model = FoldedAttention(masked)
    request = exporters.prepare(model, torch.randn(2, 6, 6), True, None)
    data = ir.to_proto(exporters.convert(request, (exporters.by_dynamo,))).SerializeToString()
    assert_agrees(model, data, {"x": torch.randn(3, 6, 6)})


def test_modules_that_are_graphs_keep_the_batch_free(tmp_path: Path) -> None:
    """torch's older exporter would write the sizes of the example into them."""
    model = attention().eval()
    x = torch.randn(2, 3, 32, 32)
    model.blocks[0] = torch.export.export(
        model.blocks[0], (torch.randn(2, 5, 192),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    ).module()
    agree_after = {"x": torch.randn(3, 3, 32, 32)}
    for source in (onnx_bytes(model, x), export_onnx(model, tmp_path / "model.onnx", x)):
        found = OnnxRuntimeEngine().run(source, {name: value.numpy() for name, value in agree_after.items()})
        with torch.no_grad():
            np.testing.assert_allclose(found[0], model(agree_after["x"]).numpy(), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    model = Several()
    example = (torch.randn(2, 4), torch.tensor([6, 1]))
    path = export_onnx(model, tmp_path / "model.onnx", example)
    proto = onnx.load(path)
    assert [value.name for value in proto.graph.input] == ["values", "index"]
    assert [value.name for value in proto.graph.output] == ["output_0", "output_1", "output_2"]
    for source in (path, onnx_bytes(model, example)):
        assert_agrees(model, source, {"values": torch.randn(4, 4), "index": torch.tensor([0, 6, 3, 3])})


def test_a_fixed_batch(tmp_path: Path) -> None:
    model = Windowed()
    path = export_onnx(model, tmp_path / "model.onnx", torch.randn(3, 3, 9, 8), dynamic_batch=False, opset=18)
    assert batches(path) == [3, 3]
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 18
    assert_agrees(model, path, {"image": torch.randn(3, 3, 9, 8)})


def test_a_batch_axis_that_cannot_be_dynamic_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(StepError) as caught:
        export_onnx(Fixed(), path, torch.randn(3, 4))
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())
    export_onnx(Fixed(), path, torch.randn(3, 4), dynamic_batch=False)
    assert_agrees(Fixed(), path, {"x": torch.randn(3, 4)})


def test_the_second_exporter_serves_where_the_first_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: exporters.Request) -> None:
        raise RuntimeError("no rule for aten::fancy\nand pages of advice")

    monkeypatch.setattr(exporters, "by_torchscript", broken)
    path = export_onnx(Windowed(), tmp_path / "model.onnx", torch.randn(2, 3, 9, 8))
    assert path.exists()
    monkeypatch.setattr(exporters, "by_dynamo", broken)
    with pytest.raises(StepError, match=r"cannot be exported to ONNX: no rule for aten::fancy; .*dynamic_batch=False"):
        export_onnx(Windowed(), path, torch.randn(2, 3, 9, 8))


def test_a_large_graph_is_simplified_without_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    request = exporters.prepare(Windowed(), torch.randn(2, 3, 9, 8), True, None)
    kinds = []
    for limit in (exporters.TIDY_NODES, 0):
        monkeypatch.setattr(exporters, "TIDY_NODES", limit)
        kinds.append(Counter(node.op_type for node in exporters.convert(request, (exporters.by_dynamo,)).graph))
    assert not kinds[0]["BatchNormalization"]
    assert kinds[1]["BatchNormalization"] == 1
    assert kinds[0]["Conv"] == kinds[1]["Conv"] == 2
    assert not kinds[1]["Identity"]


def test_a_file_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)

    by_torchscript = exporters.by_torchscript

    def wrong(request: exporters.Request) -> ir.Model:
        request = copy.deepcopy(request)
        nn.init.constant_(request.model.weight, 1.01)
        return by_torchscript(request)

    monkeypatch.setattr(exporters, "by_torchscript", wrong)
    assert export_onnx(model, tmp_path / "other.onnx", torch.randn(2, 3)).exists()  # the second exporter is right
    (tmp_path / "other.onnx").unlink()
    monkeypatch.setattr(exporters, "by_dynamo", wrong)
    with pytest.raises(
        StepError, match=r"'output' at batch 2 is (\S+) in torch and (\S+) in .* of 0.01, more than 0.0001"
    ):
        export_onnx(model, path, torch.randn(2, 3))
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["model.onnx"]
    export_onnx(model, path, torch.randn(2, 3), tolerance=0.011)
    assert path.read_bytes() != b"older"


def test_not_a_number_never_passes_the_check(tmp_path: Path) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x)

    assert export_onnx(Root(), tmp_path / "model.onnx", torch.rand(2, 4)).exists()  # drawn from the example: positive
    with pytest.raises(StepError, match="nan in torch"):
        export_onnx(Root(), tmp_path / "other.onnx", -torch.rand(2, 4))
    assert not (tmp_path / "other.onnx").exists()


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = Windowed()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 9, 8))
    onnx_bytes(model, torch.randn(2, 3, 9, 8))
    assert (model.training, model.first.training, model.norm.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_exported_graph_is_a_model_too(tmp_path: Path) -> None:
    example = torch.randn(2, 3, 9, 8)
    program = torch.export.export(Windowed().eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = export_onnx(program.module(), tmp_path / "model.onnx", example)
    agree_input = torch.randn(4, 3, 9, 8)
    found = OnnxRuntimeEngine().run(path, {onnx.load(path).graph.input[0].name: agree_input.numpy()})
    np.testing.assert_allclose(found[0], program.module()(agree_input).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_half_precision(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).half()
    path = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 4).half(), tolerance=1e-2)
    assert onnx.load(path).graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    with pytest.raises(InputError, match="bfloat16"):
        export_onnx(model.bfloat16(), path, torch.randn(2, 4).bfloat16())


def test_large_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1000)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
    path = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 32))
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size >= 32 * 64 * 4
    assert path.stat().st_size < 32 * 64 * 4
    assert_agrees(model, path, {"input": torch.randn(5, 32)})


@pytest.mark.parametrize(
    "example", [torch.randn(2, 5, 9, 8), torch.randn(7), (torch.randn(2, 3, 9, 8),) * 2, (), ("x",)]
)
def test_inputs_that_do_not_fit(example: object, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_onnx(Windowed(), tmp_path / "model.onnx", example)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        export_onnx(nn.Linear(3, 1), path, torch.randn(2, 3))
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_the_exporters_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(Windowed(), tmp_path / "model.onnx", torch.randn(1, 3, 9, 8))
    onnx_bytes(Windowed(), torch.randn(1, 3, 9, 8))
    assert capfd.readouterr() == ("", "")


def test_nor_does_one_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(x)

    request = exporters.prepare(Inverse(), torch.eye(4).repeat(2, 1, 1), True, None)
    with pytest.raises(StepError, match="linalg_inv"):
        exporters.convert(request, (exporters.by_torchscript,))
    assert capfd.readouterr() == ("", "")


def test_no_folder_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    path = export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 3, 8, 8))
    for folder in (Path(__file__).parent, Path(torch.__file__).parent):
        assert str(folder).encode() not in path.read_bytes()
