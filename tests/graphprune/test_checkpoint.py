"""Saved results: the model comes back bit for bit, and a folder of unknown origin runs nothing."""

import copy
import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune import models
from graphprune.checkpoint import load, read_result, save
from graphprune.coupling.tracing import trace
from graphprune.cutting import surgery
from graphprune.errors import InputError
from graphprune.files import tensors
from graphprune.plan import Choice, Plan
from graphprune.record import Record, Share
from graphprune.result import Result
from graphprune.target import Target

SPEC = "cifar:resnet20?num_classes=4"
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    """Two layers with one weight, a second name for a bias, and buffers that a state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.offset = self.first.bias
        self.register_buffer("scale", torch.full((6,), 2.0), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * self.scale * self.frozen + self.offset + self.steps


class Gated(nn.Module):
    """Attention whose number of heads equals another number in the module, behind a gain that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = self.shift = 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        return (self.proj(y) + self.shift) * self.gain


class Table(nn.Module):
    """A buffer that is made when the model is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[1] != x.shape[1]:
            self.table = torch.arange(x.shape[1])[None] / 10
        return self.second(torch.relu(self.first(x + self.table)))


def result_of(model: nn.Module, inputs: Tensor, choices: tuple[Choice, ...] = (), spec: str = "") -> Result:
    graph = trace(model, inputs)
    plan = Plan(graph.signature, choices, graph.inputs)
    pruned = surgery.apply(model, plan).eval()
    with torch.no_grad():  # values that no rebuilding can guess
        for tensor in {id(t): t for t in tensors.named_tensors(pruned).values()}.values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand(tensor.shape).to(tensor.dtype))
    share = Share(0.5, 0.4, 0.6, (0.2, 0.3), (0.1, 0.15), "engine")
    record = Record(plan, 0.9, True, {"latency": 0.4}, share, 10, 20, agent="dp", environment={"torch": "2"})
    dense = Record(Plan(graph.signature, (), graph.inputs), 0.92, flops=20, params=40)
    return Result(
        pruned, model, graph, plan, record, dense, Target(latency=0.5), spec=spec,
        notes=("a note",), history=((1, 0.5, 0.8),), rivals={"uniform": record},
        searched=replace(record, accuracy=0.85),
    )  # fmt: skip


@pytest.fixture(scope="module")
def resnet() -> Result:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    choices = (
        Choice("layer1.0.conv1/channels", "filter", "1/2", tuple(range(0, 16, 2))),
        Choice("layer2.1.conv1/kernel", "kernel", "left", (0, 3, 6)),
    )
    return result_of(models.create(SPEC), IMAGE, choices, SPEC)


@pytest.fixture
def folder(resnet: Result, tmp_path: Path) -> Path:
    return save(resnet, tmp_path / "out")


def edit(folder: Path, **fields: object) -> None:
    """Change fields of result.json."""
    body = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(body | fields))


def sign(folder: Path) -> None:
    """Make the digests in result.json right again, as someone who forges a folder would."""
    names = ("plan.json", "model.safetensors")
    edit(folder, files={name: sha256((folder / name).read_bytes()).hexdigest() for name in names})


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    expected, found = tensors.named_tensors(ours), tensors.named_tensors(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        bits, wanted = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(bits, wanted), name


def refused(folder: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, model)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_pruned_network_comes_back_bit_for_bit(resnet: Result, folder: Path) -> None:
    assert sorted(os.listdir(folder)) == ["model.safetensors", "plan.json", "result.json"]
    loaded = load(folder)
    assert type(loaded) is type(resnet.model)
    assert not any(module.training for module in loaded.modules())
    assert_same(resnet.model, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGE), resnet.model(IMAGE))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in resnet.dense.parameters())


def test_saving_what_was_loaded_gives_the_same_bytes(resnet: Result, folder: Path) -> None:
    again = save(replace(resnet, model=load(folder)), folder.parent / "again")
    for name in ("plan.json", "model.safetensors", "result.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_facts_come_back(resnet: Result, folder: Path) -> None:
    facts = read_result(folder)
    assert facts["record"] == resnet.record
    assert facts["dense_record"] == resnet.dense_record
    assert facts["rivals"] == resnet.rivals
    assert facts["searched"] == resnet.searched
    assert facts["target"] == {"latency": 0.5}
    assert facts["spec"] == SPEC
    assert (facts["notes"], facts["history"], facts["met"]) == (["a note"], [[1, 0.5, 0.8]], True)
    assert facts["environment"]["torch"] == version("torch")
    assert Plan.from_json((folder / "plan.json").read_text()) == resnet.plan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    spec = "cifar:resnet20?num_classes=3"
    torch.manual_seed(0)
    result = result_of(
        models.create(spec).to(dtype), IMAGE.to(dtype),
        (Choice("layer1.0.conv1/channels", "filter", "1/2", tuple(range(8))),), spec,
    )  # fmt: skip
    assert_same(result.model, load(save(result, tmp_path)))


def test_shared_tensors_and_hidden_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = result_of(Tied(), torch.randn(2, 6))
    save(result, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert len(stored) == 6  # of eight names, two are aliases
    fresh = Tied()
    before = copy.deepcopy(fresh.state_dict())
    loaded = load(tmp_path, fresh)
    assert_same(result.model, loaded)
    assert loaded.second.weight is loaded.first.weight
    assert loaded.offset is loaded.first.bias
    assert not loaded.frozen.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_a_buffer_that_the_first_call_makes(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    result = result_of(Table(), x, (Choice("first/hidden", "hidden", "4/8", (0, 1, 5, 6)),))
    result.model(x)
    assert result.model.table.shape == (1, 6)
    loaded = load(save(result, tmp_path), Table())
    assert_same(result.model, loaded)
    assert torch.equal(loaded(x), result.model(x))


def test_sharing_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    result = result_of(Tied(), torch.randn(2, 6))
    result.model.second.weight = nn.Parameter(torch.randn(6, 6))
    save(result, tmp_path)
    assert "shares its values" in refused(tmp_path, Tied())


def test_a_transformer_without_heads(tmp_path: Path) -> None:
    spec = "timm:vit_tiny_patch16_224?img_size=32&depth=1&num_classes=3"
    torch.manual_seed(0)
    model = models.create(spec)
    site = next(site for site in trace(model, IMAGE).all_sites if site.kind == "heads")
    result = result_of(model, IMAGE, (Choice(site.name, "heads", "2/3", (0, 2)),), spec)
    loaded = load(save(result, tmp_path))
    assert_same(result.model, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGE), result.model(IMAGE))


def test_a_gain_that_starts_at_zero_hides_no_wrong_cut(tmp_path: Path) -> None:
    """Surgery finds by comparing outputs that `heads` follows the cut and `shift` does not: zeros tell nothing."""
    torch.manual_seed(0)
    trained = Gated()
    nn.init.ones_(trained.gain)
    tokens = torch.randn(2, 5, 8)
    site = next(site for site in trace(trained, tokens).all_sites if site.kind == "heads")
    result = result_of(trained, tokens, (Choice(site.name, "heads", "1/2", (0, 2)),))
    loaded = load(save(result, tmp_path), Gated())
    assert (loaded.heads, loaded.shift) == (2, 4)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), result.model(tokens))


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(folder)
    assert torch.equal(torch.rand(3), expected)


def test_state_that_is_no_tensor_is_refused(tmp_path: Path, resnet: Result) -> None:
    class Stateful(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 3}

    with pytest.raises(InputError, match="state that is no tensor"):
        save(replace(resnet, model=nn.Sequential(Stateful())), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- folders of unknown origin


def test_published_weights_are_not_fetched(resnet: Result, tmp_path: Path, folder: Path) -> None:
    save(replace(resnet, spec="timm:resnet18?pretrained=True&num_classes=4"), tmp_path / "named")
    assert read_result(tmp_path / "named")["spec"] == "timm:resnet18?num_classes=4"
    for spec in (
        "timm:resnet18?pretrained=True",
        "timm:hf_hub:someone/model",
        "timm:hf-hub:someone/model",
        "timm:local-dir:/tmp/x",
        "timm:resnet18?checkpoint_path=/tmp/x.pth",
        "torchvision:resnet18?weights=DEFAULT",
        "file.onnx",
        "../../x",
        "",
    ):
        edit(folder, spec=spec)
        refused(folder)


def test_a_python_function_is_never_imported_from_a_folder(resnet: Result, tmp_path: Path) -> None:
    marker = tmp_path / "was_imported"
    (tmp_path / "evil_module.py").write_text(
        f"open({str(marker)!r}, 'w').close()\ndef build():\n    raise SystemExit\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        folder = save(replace(resnet, spec="evil_module:build"), tmp_path / "out")
        assert "pass that model yourself" in refused(folder)
        loaded = load(folder, models.create(SPEC))
    finally:
        sys.path.remove(str(tmp_path))
    assert not marker.exists()
    assert "evil_module" not in sys.modules
    assert_same(resnet.model, loaded)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "result.json"])
def test_nothing_is_unpickled(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_bytes(f"cos\nmkdir\n(V{tmp_path / 'exploded'}\ntR.".encode())  # a pickle, written by hand
    refused(folder)
    if name != "result.json":
        sign(folder)
        refused(folder)
    torch.save({"x": Bomb(tmp_path / "exploded")}, folder / name)
    refused(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "result.json"])
def test_missing_files(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert name in refused(folder)
    assert "result.json" in refused(folder / "nowhere")


@pytest.mark.parametrize("kept", [0, 4, 100, 50_000, -1])
def test_truncated_tensors(kept: int, folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:kept])
    assert "safetensors" in refused(folder)
    sign(folder)
    assert "not a complete safetensors file" in refused(folder)


def test_files_of_two_saves(resnet: Result, folder: Path, tmp_path: Path) -> None:
    other = copy.deepcopy(resnet.model)
    nn.init.ones_(other.get_parameter("layer3.0.conv1.weight"))
    second = save(replace(resnet, model=other), tmp_path / "second")
    (second / "model.safetensors").replace(folder / "model.safetensors")
    assert "of another save" in refused(folder)


def test_tensors_of_another_network(resnet: Result, folder: Path) -> None:
    good = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(iter(good))
    for bad in (
        {key: value for key, value in good.items() if key != name},
        good | {"one.more": torch.ones(1)},
        good | {name: torch.ones(1)},
    ):
        safetensors.torch.save_file(bad, folder / "model.safetensors")
        sign(folder)
        assert name in (text := refused(folder)) or "one.more" in text


def test_another_model_is_refused(folder: Path) -> None:
    assert "another model" in refused(folder, models.create("cifar:resnet20?num_classes=5"))
    assert "does not accept" in refused(folder, nn.Linear(3, 2))


def test_a_plan_of_another_model_is_refused(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    place = "layer1.0.conv1/channels"
    for change, message in (
        ({"model": "0" * 16}, "another model"),
        ({"inputs": [["float32", [3, 16, 16]]]}, "another model"),
        ({"inputs": [["nn", [3, 32, 32]]]}, "unknown type 'nn'"),
        ({"inputs": []}, "example_inputs"),
        ({"choices": [{"site": "nowhere", "pattern": "filter", "level": "1/2", "keep": [0]}]}, "no site 'nowhere'"),
        ({"choices": [{"site": place, "pattern": "filter", "level": "1/2", "keep": [99]}]}, "has 16 units"),
    ):
        (folder / "plan.json").write_text(json.dumps(plan | change))
        sign(folder)
        assert message in refused(folder)


def test_unknown_formats_name_both_versions(folder: Path) -> None:
    edit(folder, format=7)
    assert "has format 7, this version reads 1" in refused(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_json_is_refused_in_one_line(data: st.DataObject, folder: Path) -> None:
    original = (folder / "result.json").read_bytes()
    junk = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.just({})
    field = data.draw(st.sampled_from(["format", "spec", "record", "dense_record", "rivals", "files"]))
    body = json.loads(original)
    if isinstance(body[field], dict) and body[field] and data.draw(st.booleans()):
        body[field][data.draw(st.sampled_from(sorted(body[field])))] = data.draw(junk)
    else:
        body[field] = data.draw(junk)
    (folder / "result.json").write_text(json.dumps(body))
    message = ""
    try:
        read_result(folder)
    except InputError as error:  # any other exception fails the test
        message = str(error)
    finally:
        (folder / "result.json").write_bytes(original)
    assert len(message.splitlines()) <= 1


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": 1}', "[" * 100_000, "\xff"])
def test_what_is_no_result(text: str, folder: Path) -> None:
    (folder / "result.json").write_text(text, encoding="latin-1")
    assert "result.json is not a saved result" in refused(folder)


def test_a_full_disk_leaves_the_older_save(resnet: Result, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = copy.deepcopy(resnet.model)
    nn.init.ones_(other.get_parameter("layer3.0.conv1.weight"))
    write = Path.write_text

    def full(path: Path, *arguments: object, **options: object) -> int:
        write(path, "half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)  # result.json is the last of the three
    with pytest.raises(InputError, match="No space left on device"):
        save(replace(resnet, model=other), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
