"""Spec strings: what they build, what they refuse."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphprune import models
from graphprune.errors import InputError


def test_timm_with_options() -> None:
    model = models.create("timm:vit_tiny_patch16_224?num_classes=10&img_size=32&depth=2")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert len(model.blocks) == 2  # type: ignore[arg-type]


def test_torchvision_and_cifar() -> None:
    assert models.create("torchvision:resnet18?num_classes=5").eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert models.create("cifar:resnet20?in_channels=1").eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def line(width=3): return nn.Linear(width, 2)\n"
        "def wrong(): return 5\n"
        "def broken(): raise OSError('no such thing')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_networks"


def test_python_function(own_module: str) -> None:
    model = models.create(f"{own_module}:line?width=4")
    assert isinstance(model, nn.Linear)
    assert model.in_features == 4


@pytest.mark.parametrize(
    ("function", "message"),
    [("missing", "no function 'missing'"), ("wrong", "is a int"), ("broken", "cannot be built: no such thing")],
)
def test_python_function_errors(own_module: str, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.create(f"{own_module}:{function}")


def test_unknown_models_come_with_close_matches() -> None:
    with pytest.raises(InputError, match=r"did you mean .*vit_tiny_patch16_224"):
        models.create("timm:vit_tiny_patch16_223")
    with pytest.raises(InputError, match=r"did you mean .*resnet20"):
        models.create("cifar:resnet21")
    with pytest.raises(InputError, match=r"did you mean .*resnet18"):
        models.create("torchvision:resnet19")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "resnet18",
        "timm:",
        "no.such.package.anywhere:net",
        "net.onnx",
        "timm:hf-hub:timm/resnet18",
        "timm:hf_hub:timm/resnet18",
        "timm:local-dir:/tmp",
        "timm:/tmp/resnet18",
        "hf-hub:timm/resnet18",
        "https://example.org:model",
        "timm:resnet18?checkpoint_path=x",
        "timm:resnet18?pretrained_cfg=x",
        "timm:resnet18?cache_dir=x",
        "torchvision:resnet18?weights=DEFAULT",
        "timm:resnet18?num_classes",
        "timm:resnet18?num_classes=3&num_classes=4",
        "timm:resnet18?num_classes=__import__('os').getpid()",
        "timm:resnet18?num_classes=[1]",
        "timm:resnet18?num_classes=/etc/passwd",
        "timm:resnet18?no_such_option=1",
        "cifar:resnet20?pretrained=True",
    ],
)
def test_refused(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        models.create(spec)
    assert "\n" not in str(caught.value)


numbers = st.integers(-1000, 1000) | st.floats(-1e6, 1e6) | st.booleans()
values = numbers | st.none() | st.tuples(numbers, numbers) | st.from_regex(r"[a-z_]\w{0,8}", fullmatch=True)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), values, max_size=4))
def test_options_round_trip(options: dict[str, object]) -> None:
    words = {"true": True, "false": False, "none": None}
    query = "&".join(f"{key}={value}".replace(" ", "") for key, value in options.items() if key != "weights")
    expected = {
        key: words.get(value.lower(), value) if isinstance(value, str) else value
        for key, value in options.items()
        if key not in ("weights", "pretrained")
    }
    assert models.parse(f"timm:x?{query}" if query else "timm:x").keywords == expected


@pytest.mark.parametrize("spec", ["timm:resnet18?num_classes=3", "torchvision:resnet18", "cifar:resnet20"])
def test_local_specs_pass(spec: str) -> None:
    models.refuse_remote(spec)
    assert models.parse(spec).library == spec.partition(":")[0]


@pytest.mark.parametrize(
    "spec",
    [
        "timm:resnet18?pretrained=True",
        "timm:resnet18?pretrained=1",
        "torchvision:resnet18?num_classes=3&pretrained=true",
        "timm:resnet18?checkpoint_path=x",
        "timm:hf-hub:timm/resnet18",
        "hf_hub:timm/resnet18",
        "os:getcwd",
        "os.path:exists?path=x",
        "",
    ],
)
def test_remote_specs_are_refused_before_anything_is_built(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(InputError):
        models.refuse_remote(spec)


def test_an_option_that_says_no_weights_is_taken() -> None:
    spec = "torchvision.models.segmentation:lraspp_mobilenet_v3_large?weights_backbone=none&num_classes=5"
    assert models.parse(spec).keywords == {"weights_backbone": None, "num_classes": 5}


def test_architecture_drops_only_the_published_weights() -> None:
    assert models.architecture("timm:resnet18?num_classes=3&pretrained=True&in_chans=1") == (
        "timm:resnet18?num_classes=3&in_chans=1"
    )
    assert models.architecture("timm:resnet18?pretrained=True") == "timm:resnet18"
    assert models.architecture("") == ""
    models.refuse_remote(models.architecture("timm:resnet18?pretrained=True"))


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("timm:vit_tiny_patch16_224?img_size=32&depth=1", (3, 32, 32)),
        ("timm:vit_tiny_patch16_224?img_size=(32,64)&depth=1", (3, 32, 64)),
        ("timm:resnet18?in_chans=1", (1, 224, 224)),
        ("timm:inception_v3", (3, 299, 299)),
        ("torchvision:resnet18", (3, 224, 224)),
        ("torchvision:inception_v3?init_weights=False", (3, 299, 299)),
        ("cifar:resnet20", (3, 32, 32)),
        ("cifar:resnet20?in_channels=1", (1, 32, 32)),
    ],
)
def test_input_sizes(spec: str, size: tuple[int, int, int]) -> None:
    model = models.create(spec).eval()
    assert models.default_input_size(spec, model) == size
    assert model(torch.zeros(1, *size)).shape[0] == 1


def test_input_size_of_a_function_has_to_be_given() -> None:
    with pytest.raises(InputError, match="give it"):
        models.default_input_size("pkg:net", nn.Linear(1, 1))


def test_normalisation_is_the_models_own() -> None:
    assert models.normalisation(models.create("timm:vit_tiny_patch16_224?depth=1")) == ((0.5,) * 3, (0.5,) * 3)
    assert models.normalisation(nn.Linear(1, 1)) == (models.IMAGENET_MEAN, models.IMAGENET_STD)
