"""What the README shows is run: its Python example, its operator rule, and the commands that CI takes from it."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from graphprune.coupling.rules import RULES
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.surgery import perform

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALLER = {
    '"resnet20.safetensors"': "None",
    "cifar:resnet20": "cifar:resnet20?num_classes=10",
    "cifar10:data/cifar10": "digits",
    "latency=0.5": "latency=0.8",
    "trials=200": "trials=2",
    "epochs=30": "epochs=1",
}
"""The example on data that is at hand, and short."""


def block(mark: str) -> str:
    """The code block that follows a marker comment."""
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {mark!r}"
    return found.group(1)


@pytest.mark.timeout(600)
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("example")
    for long, short in SMALLER.items():
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"plan.json", "model.safetensors", "result.json"}
    assert "pruned.onnx" in capsys.readouterr().out
    result = names["result"]
    assert type(result.model) is type(names["model"])  # type: ignore[attr-defined]
    assert result.record.params < result.dense_record.params or result.plan.choices  # type: ignore[attr-defined]


def test_the_commands_are_those_of_ci() -> None:
    assert block("demo").startswith("python3 -m venv .venv && .venv/bin/pip install -q -e . && ")
    assert block("tests").startswith("python3 -m venv .venv && .venv/bin/pip install -q -e ")
    assert "pytest" in block("tests")
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


@torch.library.custom_op("my_library::scale_channels", mutates_args=())
def scale_channels(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiplies each channel of x [N, C, H, W] by scale [C]."""
    return x * scale[None, :, None, None]


@scale_channels.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Scaled(torch.nn.Module):
    """Two convolutions with the user's own operator between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.scale = torch.nn.Parameter(torch.rand(8))
        self.second = torch.nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, 4, H - 4, W - 4]."""
        y: torch.Tensor = self.second(scale_channels(self.first(x), self.scale))
        return y


def test_the_operator_rule_opens_a_group() -> None:
    rule = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@operator" in code)
    model, example = Scaled().eval(), torch.rand(2, 3, 8, 8)
    frozen = trace(model, example)
    assert any("scale_channels" in why for group in frozen.all_groups for why in group.frozen)
    try:
        exec(compile(textwrap.dedent(rule), "README.md", "exec"), {})
        graph = trace(model, example)
        (site,) = [site for site in graph.all_sites if site.kind == "channels"]
        pruned = perform(model, graph, Cuts(keep={site.atom: torch.tensor([0, 2, 5]).numpy()})).model
    finally:
        RULES.pop("my_library::scale_channels", None)
    assert pruned.scale.shape == (3,)
    assert pruned(example).shape == (2, 4, 4, 4)
