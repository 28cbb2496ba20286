"""Groups against brute force: perturb one output channel of one layer, and see which layers' inputs move.

All other layers' outputs are held at their old values, so that only direct paths are seen. Channels of producers and
consumers that touch each other form components; each component must be one unit of one group.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from graphprune.coupling.axes import Form
from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from tests.graphprune import networks
from tests.graphprune.oracle import axis_mask, scramble

Element = tuple[str, str, int]
"""(`out` or `in`, module path, channel)."""

LAYERS = (nn.Conv2d, nn.Linear)


def channel_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


class Probe:
    """Runs a model with chosen layers' outputs held or perturbed, and records all layers' inputs."""

    def __init__(self, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.model, self.inputs = model, inputs
        self.layers = {path: module for path, module in model.named_modules() if isinstance(module, LAYERS)}
        self.held: dict[str, torch.Tensor] = {}
        self.seen: dict[str, torch.Tensor] = {}
        self.moved = ("", -1)
        for path, module in self.layers.items():
            module.register_forward_hook(self._hook(path, module))
        self.dense = self.run("", -1)

    def _hook(self, path: str, module: nn.Module) -> Callable[..., torch.Tensor]:
        passes = isinstance(module, nn.Conv2d) and module.groups > 1

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            self.seen[path] = inputs[0].clone()
            if path not in self.held:
                self.held[path] = output.clone()
            if path == self.moved[0]:
                output = self.held[path].clone()
                channel = output.movedim(channel_axis(module), 0)[self.moved[1]]
                channel += 10 + torch.rand(channel.shape)  # so much that no ReLU and no maximum hides it
                return output
            return output if passes else self.held[path]

        return hook

    def run(self, path: str, channel: int) -> dict[str, torch.Tensor]:
        self.moved, self.seen = (path, channel), {}
        with torch.no_grad():
            self.model(*self.inputs)
        return self.seen

    def touched(self, path: str, channel: int) -> Iterator[Element]:
        """The input channels of layers that move when one output channel of a layer does."""
        after = self.run(path, channel)
        for other, module in self.layers.items():
            moved = (after[other] - self.dense[other]).abs().movedim(channel_axis(module), 0).flatten(1).amax(1) > 1e-9
            yield from (("in", other, int(index)) for index in moved.nonzero())


def components(probe: Probe) -> dict[Element, frozenset[Element]]:
    """Elements that touch each other, transitively; grouped convolutions pass channels on."""
    parent: dict[Element, Element] = {}

    def root(element: Element) -> Element:
        while parent.setdefault(element, element) != element:
            element = parent[element]
        return element

    for path, module in probe.layers.items():
        for channel in range(module.weight.shape[0]):
            for element in probe.touched(path, channel):
                parent[root(("out", path, channel))] = root(element)
    found: dict[Element, set[Element]] = {}
    for element in list(parent):
        found.setdefault(root(element), set()).add(element)
    return {element: frozenset(group) for group in found.values() for element in group}


def predicted(graph: ModelGraph) -> dict[tuple[int, int], frozenset[Element]]:
    """(atom, unit) -> the elements that the graph says are cut with it."""
    found = {}
    for group in (group for group in graph.all_groups if not group.frozen):
        for unit in range(group.size):
            keep = {group.atom: tuple(index for index in range(group.size) if index != unit)}
            found[group.atom, unit] = frozenset(
                (side, layer.module, int(index))
                for layer in graph.layers
                for side, form in (("out", layer.outputs), ("in", layer.inputs))
                for index in (~axis_mask(form, keep)).nonzero()[0]
            )
    return found


BRUTE = ["vgg", "squeeze_excite", "split_concat", "option_a", "two_in_two_out", "resnet18"]


@pytest.mark.parametrize("name", BRUTE)
def test_units_are_the_components_of_brute_force(name: str) -> None:
    if name == "resnet18":
        build, inputs = networks.timm_model("resnet18", layers=(1, 1, 1, 1), channels=(4, 5, 6, 8), stem_width=2), None
        inputs = networks.images(32, 1)
    else:
        build, inputs = networks.NETWORKS[name]
    torch.manual_seed(0)
    model = scramble(build())
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):  # a channel that is zero everywhere would hide what multiplies it
            model.set_submodule(path, nn.Softplus())
    doubles = tuple(x.double() for x in inputs)
    graph = trace(model, doubles)
    brute = components(Probe(model, doubles))
    units = predicted(graph)
    assert units
    for elements in units.values():
        assert {brute[element] for element in elements if element in brute} == {elements}
    covered = set().union(*units.values())
    frozen = {element for element in brute if element not in covered}
    for element in frozen:
        assert not _layer_form(graph, element).atoms() <= {group.atom for group in graph.all_groups if not group.frozen}


def _layer_form(graph: ModelGraph, element: Element) -> Form:
    side, path, _ = element
    layer = next(layer for layer in graph.layers if layer.module == path)
    return layer.outputs if side == "out" else layer.inputs


def test_members_count_the_rows_that_one_unit_takes() -> None:
    graph = trace(networks.Attention(fused_weights=True, fused_product=True), networks.tokens())
    heads = next(group for group in graph.all_groups if group.kind == "heads")
    rows = {(member.parameter, member.axis): member.rows for member in heads.members}
    assert rows == {("weights.qkv.weight", 0): 12, ("weights.qkv.bias", 0): 12, ("proj.weight", 1): 4}
    assert (heads.size, heads.unit) == (3, 4)
    graph = trace(networks.SplitConcat(), networks.images())
    assert {m.rows for group in graph.all_groups for m in group.members if m.parameter == "last.weight"} == {1}
    graph = trace(networks.vgg(), networks.images())
    flat = next(group for group in graph.all_groups if group.name == "2.0" and not group.frozen)
    assert {member.rows for member in flat.members if member.parameter == "5.weight"} == {4}


def test_sites_of_a_vision_transformer() -> None:
    graph = trace(*_network("vit_tiny"))
    sites = {site.name: (site.size, site.unit) for site in graph.all_sites}
    blocks = {
        f"blocks.{i}.{name}": value
        for i in (0, 1)
        for name, value in (("attn.qkv/head-width", (64, 3)), ("attn/heads", (3, 64)), ("mlp.fc1/hidden", (768, 1)))
    }
    linear = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    weights = {f"{name}/kernel": (1, 1) for name in (*linear, "head")}
    dropped = {f"blocks.{i}.{name}/block": (1, 1) for i in (0, 1) for name in ("attn", "mlp")}
    patches = {"patch_embed.proj/kernel": (256, 1), "patch_embed.proj/width": (192, 1)}
    assert sites == dropped | patches | blocks | weights
    fc1 = graph.site["blocks.0.mlp.fc1/kernel"]
    assert (fc1.kernel, fc1.filters, fc1.channels) == ((1, 1), 768, 192)
    assert [site.name for site in graph.all_sites][-10:] == [
        "blocks.1.attn/block", "blocks.1.attn.qkv/head-width", "blocks.1.attn/heads",
        "blocks.1.attn.qkv/kernel", "blocks.1.attn.proj/kernel",
        "blocks.1.mlp/block", "blocks.1.mlp.fc1/hidden", "blocks.1.mlp.fc1/kernel",
        "blocks.1.mlp.fc2/kernel", "head/kernel",
    ]  # fmt: skip
    free = {site.name for site in graph.all_sites if site.order >= 0}
    assert free == {"blocks.0.mlp.fc1/kernel", "blocks.1.mlp.fc1/kernel"}


class GatedConvolution(nn.Module):
    """A gate over units of which some pass a depthwise convolution first, as MambaOut has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(12, 16), "down": nn.Linear(8, 12)})
        self.conv = nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, passed, convolved = self.inner["up"](x).split((8, 5, 3), -1)
        convolved = self.conv(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.inner["down"](gate * torch.cat([passed, convolved], -1))


def test_units_behind_a_depthwise_convolution_are_hidden_ones() -> None:
    graph = trace(GatedConvolution(), torch.randn(2, 5, 5, 12))
    free = [(group.kind, group.size) for group in graph.all_groups if not group.frozen]
    assert free == [("hidden", 5), ("hidden", 3)]


def test_the_width_of_attention_without_heads_stays() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(12, 12), nn.Linear(4, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))

    graph = trace(Single(), networks.tokens())
    reasons = {group.frozen[0].partition(" (")[0] for group in graph.all_groups if group.size == 4}
    assert reasons == {"its attention has no head axis"}


def test_a_norm_over_a_width_does_not_change_its_unit() -> None:
    """LayerNorm over the width of each head, as with normalised queries and keys."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.norm = nn.Linear(12, 24), nn.Linear(8, 12), nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            z = functional.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
            return self.proj(z.transpose(1, 2).flatten(2))

    graph = trace(Normalised(), networks.tokens())
    (width,) = (group for group in graph.all_groups if group.kind == "head-width")
    assert (width.size, width.unit, width.frozen) == (4, 2, ())


def test_queries_and_values_of_convolutions_are_channels() -> None:
    """What filters make is cut like other filters, also where attention reads it."""

    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v, self.proj = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = self.qk(x).flatten(2).transpose(1, 2).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            v = self.v(x).flatten(2).transpose(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)
            z = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.proj(z.transpose(1, 2).unflatten(-1, x.shape[2:]))

    kinds = {(group.name, group.kind) for group in trace(Convolved(), networks.images()).all_groups if not group.frozen}
    assert {("qk#2", "channels"), ("v", "channels")} <= kinds


def _network(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    build, inputs = networks.NETWORKS[name]
    return build(), inputs


@pytest.mark.parametrize("name", ["vit_tiny", "channel_shuffle", "squeeze_excite", "standardised", "option_a"])
def test_a_site_names_exactly_the_layers_that_it_makes_smaller(name: str) -> None:
    graph = trace(*_network(name))
    for site in (site for site in graph.all_sites if site.branch is None):
        if site.kernel == (1, 1):  # whose window cannot be smaller, but which may be divided into groups
            assert site.layers == (site.node,)
            continue
        sizes = {} if site.kind == "kernel" else {site.atom: site.size - 1}
        window = ((0, 1), (0, 1)) if site.kind == "kernel" else None
        smaller = [
            layer.node
            for layer in graph.layers
            if layer.after(sizes, window if layer.node == site.node else None) != layer.operator
        ]
        assert smaller == list(site.layers)
        assert site.node in {node.name for node in graph.nodes}
    assert len({site.name for site in graph.all_sites}) == len(graph.all_sites)
