"""Surgery: the user's own module comes back, whole; where that cannot be, the exported graph does."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.operators import Attention as AttentionProduct
from graphprune.coupling.operators import Convolution
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts, resolve
from graphprune.cutting.surgery import apply, operate, perform, remember
from graphprune.cutting.window import WindowConv2d
from graphprune.errors import InputError, StepError
from graphprune.plan import Choice, Plan
from tests.graphprune import networks
from tests.graphprune.oracle import (
    check_masked_equivalence,
    cuts_of,
    masked_outputs,
    outputs_of,
    random_plan,
    relative_error,
    scramble,
)

OWN = ["squeeze_excite", "channel_shuffle", "attention_fused", "group_norm", "standardised", "tied", "transposed"]


def traced(name: str, seed: int = 0) -> tuple[nn.Module, ModelGraph, list[torch.Tensor], Plan]:
    """A scrambled network, its graph, its inputs, and a plan that cuts every site."""
    build, inputs = networks.NETWORKS[name]
    doubles = [x.double() for x in inputs]
    model = scramble(build(), seed)
    graph = trace(model, doubles)
    plan = random_plan(graph, np.random.default_rng(seed), groups=1.0, kernels=1.0)
    return model, graph, doubles, plan


def plan_of(graph: ModelGraph, **kept: tuple[int, ...]) -> Plan:
    """A plan by site names, `__` for a dot."""
    names = {name.replace("__", ".").replace("_at_", "/"): keep for name, keep in kept.items()}
    patterns = {"channels": "filter"}
    choices = (Choice(name, patterns.get(name.split("/")[1], name.split("/")[1]), "", k) for name, k in names.items())
    return Plan(graph.signature, tuple(choices), graph.inputs)


# --- the user's own class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_own_class_names_and_an_untouched_input(name: str) -> None:
    model, graph, _, plan = traced(name)
    before, hooks = copy.deepcopy(model.state_dict()), len(model._forward_hooks)
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    result = perform(model, graph, cuts_of(graph, plan))
    assert result.own_class
    assert type(result.model) is type(model)
    assert list(result.model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(model._forward_hooks) == hooks
    for path, module in model.named_modules():
        assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == {
            k: v for k, v in attributes[path].items() if not k.startswith("_")
        }
    shared = {value.data_ptr() for value in model.parameters()} & {v.data_ptr() for v in result.model.parameters()}
    assert not shared, "the pruned model must not share memory with the input"


@pytest.mark.parametrize("name", ["squeeze_excite", "attention_fused", "tied", "literal", "split_concat"])
def test_pruned_models_train(name: str) -> None:
    """Both routes: gradients for every parameter that the dense model has gradients for, and steps that change it."""
    model, graph, inputs, plan = traced(name)
    pruned = perform(model.train(), graph, cuts_of(graph, plan)).model
    assert pruned.training
    for module in (model, pruned):
        sum(output.square().mean() for output in torch.utils._pytree.tree_leaves(module(*inputs))).backward()
    learning = {key for key, value in model.named_parameters() if value.grad is not None}
    assert {key for key, value in pruned.named_parameters() if value.grad is not None} == learning
    assert any(value.grad.abs().sum() > 0 for value in pruned.parameters() if value.grad is not None)


def test_attributes_follow() -> None:
    model = scramble(networks.SqueezeExcite())
    graph = trace(model, networks.images()[0].double())
    plan = plan_of(graph, expand__0_at_channels=(0, 2, 5, 7, 11), reduce_at_channels=(1, 4))
    pruned = operate(model, graph, plan).model
    depthwise = pruned.depthwise[0]
    assert (pruned.expand[0].out_channels, pruned.expand[1].num_features) == (5, 5)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (5, 5, 5)
    assert (pruned.reduce.in_channels, pruned.reduce.out_channels) == (5, 2)
    assert (pruned.gate.in_channels, pruned.gate.out_channels, pruned.project.in_channels) == (2, 5, 5)


def test_attributes_of_norms_and_attention_follow() -> None:
    model, graph, _, plan = traced("attention_fused")
    sizes = {graph.site[choice.site].kind: len(choice.keep) for choice in plan.choices}
    pruned = perform(model, graph, cuts_of(graph, plan)).model
    assert (pruned.num_heads, pruned.head_dim) == (sizes["heads"], sizes["head-width"])
    assert pruned.norm.normalized_shape == (sizes["width"],)
    assert (
        pruned.weights["qkv"].out_features
        == pruned.weights["qkv"].weight.shape[0]
        == 3 * pruned.head_dim * pruned.num_heads
    )
    model, graph, _, plan = traced("group_norm")
    kept = {choice.site: len(choice.keep) for choice in plan.choices}
    pruned = perform(model, graph, cuts_of(graph, plan)).model
    assert pruned[1].num_groups == kept["0#1/channels"]
    assert pruned[1].num_channels == kept["0#1/channels"] * kept["0#2/channels"] == pruned[0].out_channels
    assert (pruned[7].num_groups, pruned[7].num_channels) == (kept["6/channels"],) * 2


def test_transposed_convolutions_follow() -> None:
    model, graph, _, plan = traced("transposed")
    pruned = perform(model, graph, cuts_of(graph, plan)).model
    assert (pruned.up.in_channels, pruned.up.out_channels) == tuple(pruned.up.weight.shape[:2])
    assert pruned.grouped.in_channels == pruned.grouped.weight.shape[0]
    assert pruned.grouped.out_channels == 2 * pruned.grouped.weight.shape[1] == pruned.last.in_channels < 8


def test_tied_weights_stay_tied() -> None:
    model, graph, _, plan = traced("tied")
    result = perform(model, graph, cuts_of(graph, plan))
    assert result.model.one.weight is result.model.two.weight
    assert result.model.one.weight.shape[0] < 10


def test_modes_and_frozen_parameters_are_kept() -> None:
    """A part in eval mode stays there, and so does `requires_grad`, also through a kernel rewrite."""
    model, graph, _, plan = traced("squeeze_excite")
    model.train()
    model.expand.eval()
    model.expand[0].weight.requires_grad_(False)
    model.reduce.weight.requires_grad_(False)
    pruned = perform(model, graph, cuts_of(graph, plan)).model
    assert isinstance(pruned.expand[0], WindowConv2d)
    flags = {path: module.training for path, module in pruned.named_modules()}
    assert flags == {path: module.training for path, module in model.named_modules()}
    grads = {key: value.requires_grad for key, value in pruned.named_parameters()}
    assert grads == {key: value.requires_grad for key, value in model.named_parameters()}


def test_a_cache_filled_by_an_earlier_forward_does_not_freeze_its_parameter() -> None:
    model = scramble(networks.BiasedAttention())
    inputs = [x.double() for x in networks.tokens()]
    model(*inputs)
    graph = trace(model, inputs)
    heads = next(site for site in graph.all_sites if any(m.parameter == "biases" for m in _group(graph, site.atom)))
    plan = Plan(graph.signature, (Choice(heads.name, heads.kind, "", (1, 3)),), graph.inputs)
    result = check_masked_equivalence(model, graph, plan, inputs)
    assert result.own_class
    assert result.model.biases.shape == (2, 9)


def _group(graph: ModelGraph, atom: int) -> tuple:
    return next(group.members for group in graph.all_groups if group.atom == atom)


@pytest.mark.parametrize("name", ["squeeze_excite", "channel_shuffle", "attention_fused", "swiglu_packed"])
def test_predicted_layers_are_those_of_the_pruned_model(name: str) -> None:
    """`Cuts.operator` against a new trace of the pruned model: sizes, FLOPs and parameters of every layer."""
    model, graph, inputs, plan = traced(name)
    cuts = cuts_of(graph, plan)
    again = trace(perform(model, graph, cuts).model, inputs)
    assert [_facts(cuts.operator(layer)) for layer in graph.layers] == [_facts(x.operator) for x in again.layers]


def _facts(operator: object) -> tuple:
    if isinstance(operator, Convolution):
        return operator.inputs, operator.outputs, operator.groups, operator.kernel, operator.output_size, operator.flops
    if isinstance(operator, AttentionProduct):
        return operator.heads, operator.width, operator.flops
    return operator.inputs, operator.outputs, operator.flops


# --- the exported graph ---------------------------------------------------------------------------------------------


def test_a_literal_in_the_code_falls_back_to_the_exported_graph() -> None:
    model, graph, inputs, plan = traced("literal")
    result = check_masked_equivalence(model, graph, plan, inputs)
    assert not result.own_class
    assert set(result.model.state_dict()) == set(model.state_dict())
    for batch in (1, 3):
        x = [torch.randn(batch, 3, 8, 8, dtype=torch.float64)]
        assert relative_error(outputs_of(result.model, x), masked_outputs(graph, plan, model, x)) < 1e-10


class Gate(nn.Module):
    """A size in the code, a batch norm, and an input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        first, second = (self.conv(self.norm(x)) * scale).split(6, dim=1)
        return first.sigmoid() * second


class Gated(nn.Module):
    """Modules with a size in their code, called once each, or one of them `times` times."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.stem, self.last, self.times = networks.conv_bn(3, 8), nn.Conv2d(6, 4, 1), times
        self.gate, self.back, self.other = Gate(), nn.Conv2d(6, 8, 1), Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.back(self.gate(x, scale=x.mean((1, 2, 3), keepdim=True)))
        return self.last(self.other(x, scale=torch.ones((), dtype=x.dtype)))


def test_modules_with_a_literal_become_graphs_and_the_rest_stays() -> None:
    model = scramble(Gated())
    inputs = [x.double() for x in networks.images()]
    graph = trace(model, inputs)
    plan = random_plan(graph, np.random.default_rng(3), groups=1.0, kernels=1.0)
    result = check_masked_equivalence(model, graph, plan, inputs)
    assert type(result.model) is Gated
    assert type(result.model.stem) is nn.Sequential
    assert [part.path for part in result.route.parts] == ["gate", "other"]
    assert set(result.model.state_dict()) == set(model.state_dict())
    for batch in (1, 3):
        x = [torch.randn(batch, 3, 8, 8, dtype=torch.float64)]
        assert relative_error(outputs_of(result.model, x), masked_outputs(graph, plan, model, x)) < 1e-10
    before = result.model.gate.norm.running_mean.clone()
    result.model.train()(inputs[0]).sum().backward()
    assert not torch.equal(result.model.gate.norm.running_mean, before)
    assert all(parameter.grad is not None for parameter in result.model.parameters())
    again = copy.deepcopy(result.model).eval()
    torch.testing.assert_close(again(inputs[0]), result.model.eval()(inputs[0]))


class Auxiliary(nn.Module):
    """A second classifier that only training uses, and a layer that nothing ever reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = networks.conv_bn(3, 8), networks.conv_bn(8, 6), nn.Linear(6, 4)
        self.side = nn.Sequential(nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
        self.unused = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        logits = self.head(self.last(x).mean((2, 3)))
        return (logits, self.side(x)) if self.training else logits


def test_what_only_training_reads_is_cut_too() -> None:
    model = scramble(Auxiliary())
    inputs = [x.double() for x in networks.images()]
    graph = trace(model, inputs)
    plan = random_plan(graph, np.random.default_rng(3), groups=1.0, kernels=1.0)
    pruned = check_masked_equivalence(model, graph, plan, inputs).model
    assert type(pruned) is Auxiliary
    kept = len(next(choice.keep for choice in plan.choices if choice.site == "stem.0/channels"))
    assert pruned.side[0].weight.shape == (5, kept, 1, 1)
    assert pruned.unused.weight.shape == (2, 8)
    logits, other = pruned.train()(inputs[0])
    (logits.sum() + other.sum()).backward()
    assert pruned.side[0].weight.grad is not None
    frozen = {(group.name.partition(".")[0], group.size): group.frozen for group in graph.all_groups}
    assert frozen["unused", 2] == ("no operator reads it",)
    assert frozen["side", 5] == ("only training reads it",)


class Half(nn.Module):
    """A size in the code, and things that tell two of a kind apart."""

    def __init__(self, slope: float = 0.1, unused: bool = False, shift: float = 0.0, pair: bool = False) -> None:
        super().__init__()
        self.conv, self.slope, self.shift, self.pair = nn.Conv2d(8, 12, 1), slope, shift, pair
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, mask: None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        first, second = self.conv(x).split(6, dim=1)
        x = functional.leaky_relu(first, self.slope) * second
        x = x + torch.tensor(self.shift, dtype=x.dtype) if self.shift else x
        return (x, second) if self.pair else x


class TwoHalves(nn.Module):
    """Two of them, one after the other."""

    def __init__(self, one: Half, other: Half, masked: bool = False) -> None:
        super().__init__()
        self.stem, self.back, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 4, 1)
        self.one, self.other, self.masked = one, other, masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(self.stem(x))
        y = self.other(self.back(x), None) if self.masked else self.other(self.back(x))
        return self.last(sum(y) if isinstance(y, tuple) else y)


@pytest.mark.parametrize(
    ("one", "other", "masked", "shared"),
    [
        ({}, {}, False, True),
        ({}, {"slope": 0.2}, False, False),
        ({}, {"unused": True}, False, False),
        ({"unused": True}, {}, False, False),
        ({"shift": 1.0}, {"shift": 2.0}, False, False),
        ({}, {"pair": True}, False, False),
        ({}, {}, True, False),
    ],
    ids=["same", "number", "unused", "unused first", "constant", "outputs", "arguments"],
)
def test_equal_modules_share_a_graph(one: dict[str, Any], other: dict[str, Any], masked: bool, shared: bool) -> None:
    model = scramble(TwoHalves(Half(**one), Half(**other), masked))
    inputs = [x.double() for x in networks.images()]
    graph = trace(model, inputs)
    plan = random_plan(graph, np.random.default_rng(3), groups=1.0, kernels=1.0)
    result = check_masked_equivalence(model, graph, plan, inputs)
    first, second = result.route.parts
    assert (first.path, second.path) == ("one", "other")
    assert (first.program is second.program) is shared
    assert set(result.model.state_dict()) == set(model.state_dict())
    if "unused" in one:
        assert torch.equal(result.model.state_dict()["one.unused.weight"], model.one.unused.weight)


def test_a_scale_of_none_in_an_attribute_is_no_literal() -> None:
    """`scale=None` lets the product compute it from the width: no attribute of that value can follow."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.qkv, self.proj = None, nn.Linear(12, 24), nn.Linear(8, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            z = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
            return self.proj(z.transpose(1, 2).flatten(2))

    model = scramble(nn.Sequential(nn.Linear(12, 12), Product()))
    inputs = [x.double() for x in networks.tokens()]
    graph = trace(model, inputs)
    site = next(site for site in graph.all_sites if site.kind == "head-width")
    result = perform(model, graph, Cuts(keep={site.atom: np.array([0, 2, 3])}))
    assert [part.path for part in result.route.parts] == ["1"]


def test_a_module_with_a_literal_that_is_called_twice_falls_back_on_the_whole() -> None:
    model = scramble(Gated(times=2))
    inputs = [x.double() for x in networks.images()]
    graph = trace(model, inputs)
    plan = random_plan(graph, np.random.default_rng(3), groups=1.0, kernels=1.0)
    assert not check_masked_equivalence(model, graph, plan, inputs).own_class


def test_zero_weights_do_not_hide_a_literal() -> None:
    """A network that is zero at first (zero-initialised last layer) must not pass for correctly cut."""
    model, graph, _, plan = traced("attention_explicit")
    nn.init.zeros_(model.proj.weight)
    nn.init.zeros_(model.proj.bias)
    attributes = perform(model, graph, cuts_of(graph, plan)).route.attributes
    assert {name for _, name in attributes} >= {"num_heads", "head_dim"}


class Squeezed(nn.Module):
    """`squeeze()` drops the channel axis too when one channel is left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((2, 3), keepdim=True).squeeze())


def test_a_cut_that_cannot_run_is_a_step_error() -> None:
    model, x = Squeezed(), torch.randn(2, 3, 4, 4)
    graph = trace(model, x)
    assert operate(model, graph, plan_of(graph, conv_at_channels=(0, 3))).own_class
    with pytest.raises(StepError, match="does not run after this cut"):
        operate(model, graph, plan_of(graph, conv_at_channels=(1,)))


# --- plans ----------------------------------------------------------------------------------------------------------


def test_apply_traces_a_model_that_it_does_not_know() -> None:
    model, graph, inputs, _ = traced("vgg")
    plan = plan_of(graph, **{"0__0_at_channels": (0, 3, 6), "2__0_at_kernel": (1, 4, 7), "5_at_hidden": (2, 3)})
    expected = masked_outputs(graph, plan, model, inputs)
    assert relative_error(outputs_of(apply(model, plan), inputs), expected) < 1e-10
    assert relative_error(outputs_of(apply(model, plan, graph), inputs), expected) < 1e-10
    remember(model, graph)
    assert relative_error(outputs_of(apply(model, plan), inputs), expected) < 1e-10


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((Choice("nowhere/channels", "filter", "", (0,)),), "no site 'nowhere/channels'"),
        ((Choice("0.0/channels", "filter", "", (0, 8)),), "has 8 units, the plan keeps number 8"),
        ((Choice("0.0/kernel", "kernel", "", (0, 4)),), "not a rectangle"),
        ((Choice("0.0/channels", "hidden", "", (0,)),), "does not apply"),
        ((Choice("0.0/channels", "filter", "", ()),), "must keep at least one unit"),
    ],
)
def test_plans_that_do_not_fit(choices: tuple[Choice, ...], message: str) -> None:
    graph = trace(networks.vgg(), networks.images()[0])
    with pytest.raises(InputError, match=message):
        resolve(graph, Plan(graph.signature, choices, graph.inputs))


def test_a_plan_of_another_model_is_refused() -> None:
    model, other = networks.vgg(), networks.group_norm()
    plan = Plan(trace(other, networks.images()[0]).signature)
    with pytest.raises(InputError, match="another model"):
        operate(model, trace(model, networks.images()[0]), plan)


@pytest.mark.parametrize("build", [networks.vgg, networks.OptionA])
def test_resolve_and_the_oracle_read_a_plan_alike(build: Callable[[], nn.Module]) -> None:
    graph = trace(build(), networks.images()[0])
    patterns = {"channels": "filter", "kernel": "kernel", "hidden": "hidden"}
    drawn = random_plan(graph, np.random.default_rng(1), groups=1.0, kernels=1.0).choices
    choices = [Choice(c.site, patterns[c.pattern], "", c.keep) for c in drawn if c.pattern in patterns]
    plan = Plan(graph.signature, tuple(choices), graph.inputs)
    found, expected = resolve(graph, plan), cuts_of(graph, plan)
    assert choices
    assert found.windows == expected.windows
    assert {a: k.tolist() for a, k in found.keep.items()} == {a: k.tolist() for a, k in expected.keep.items()}
