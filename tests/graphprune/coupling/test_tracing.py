"""Tracing: what it refuses, what it leaves alone, what it finds, and what it does with unknown operators."""

import copy
import signal
import threading
import time
from unittest import mock

import pytest
import torch
from torch import nn

from graphprune.coupling import tracing
from graphprune.coupling.axes import unify
from graphprune.coupling.operators import Attention, Convolution, Linear
from graphprune.coupling.rules import RULES, Axes, Call, operator
from graphprune.coupling.tracing import trace
from graphprune.errors import InputError, StepError
from graphprune.plan import Choice, Plan
from tests.graphprune import networks
from tests.graphprune.oracle import check_masked_equivalence, scramble

IMAGE = networks.images()[0]


@torch.library.custom_op("graphprune_tests::scale_channels", mutates_args=())
def scale_channels(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An operator that graphprune has never heard of: [N, C, H, W] times [C]."""
    return x * scale[:, None, None]


@scale_channels.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    """The unknown operator in the middle, a known part behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.scale, self.after = nn.Conv2d(3, 6, 1), nn.Parameter(torch.ones(6)), nn.Conv2d(6, 5, 1)
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.after(scale_channels(self.before(x), self.scale)))


class Fourier(nn.Module):
    """A Fourier transform over space: no rule, several outputs' worth of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.after(torch.fft.fft2(self.before(x)).real))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 4, 8, 8), "does not accept an input of shape"),
        ((), "tensor or a tuple of tensors"),
        ("image.png", "tensor or a tuple of tensors"),
        ((IMAGE, IMAGE), "does not accept an input of shape"),
        (torch.randn(0, 3, 8, 8), "must not be empty"),
    ],
)
def test_bad_inputs(inputs: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        trace(networks.vgg(), inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.0.weight", "0.1.running_var"])
def test_weights_that_are_no_numbers(name: str, value: float) -> None:
    model = networks.vgg()
    model.state_dict()[name].view(-1)[1] = value
    with pytest.raises(InputError, match=f"NaN or infinity in '{name}'"):
        trace(model, IMAGE)


class Branching(nn.Module):
    """Control flow on data: torch.export cannot trace it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Slow(nn.Module):
    """Takes its time whenever it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            time.sleep(20)
        return x + 1


def test_a_model_that_cannot_be_exported_is_a_step_error() -> None:
    with pytest.raises(StepError, match=r"torch\.export cannot trace this model") as caught:
        trace(Branching(), IMAGE)
    assert "\n" not in str(caught.value)


def test_time_limit() -> None:
    start = time.monotonic()
    with pytest.raises(StepError, match="time limit"):
        trace(Slow(), IMAGE, time_limit=0.5)
    assert time.monotonic() - start < 15


def test_an_alarm_of_the_caller_goes_on() -> None:
    before = signal.getsignal(signal.SIGALRM)
    remaining = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        trace(nn.Linear(3, 2), torch.randn(2, 3))
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, *remaining)


def test_other_threads_can_trace() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(trace(nn.Linear(3, 2), torch.randn(2, 3))))
    thread.start()
    thread.join()
    assert [layer.operator for layer in found[0].layers] == [Linear(1, 3, 2)]


# --- what is left alone ---------------------------------------------------------------------------------------------


def test_the_model_is_untouched() -> None:
    model = networks.SqueezeExcite().train()
    model.depthwise.eval()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    x = IMAGE.clone()
    graph = trace(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(model._forward_hooks) == 1
    assert torch.equal(x, IMAGE)
    assert all(value.grad is None for value in model.parameters())
    assert graph.all_sites


def test_signatures() -> None:
    """Equal for equal architectures whatever the weights and the batch; different for other shapes and inputs."""
    one, again = networks.vgg(), scramble(networks.vgg(), dtype=torch.float32)
    signature = trace(one, IMAGE).signature
    assert signature == trace(one, IMAGE).signature == trace(again, torch.cat([IMAGE] * 3)[:5]).signature
    assert signature == trace(one, IMAGE[:1]).signature
    fully = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    others = {trace(model, IMAGE).signature for model in (networks.group_norm(), networks.OptionA(), fully)}
    others.add(trace(fully, torch.randn(2, 3, 9, 9)).signature)
    assert len(others | {signature}) == 5


def test_graphs_are_values() -> None:
    model = networks.vgg()
    assert trace(model, IMAGE) == trace(model, IMAGE)
    assert trace(model, IMAGE) != trace(networks.group_norm(), IMAGE)


# --- what is found --------------------------------------------------------------------------------------------------


def test_layers_operators_and_flops() -> None:
    """The layers of a network whose shapes and FLOPs are counted by hand."""
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 6, (1, 3), padding="same", groups=2)]
    graph = trace(nn.Sequential(*layers, nn.Flatten(2), nn.Linear(16, 5), nn.GELU()), IMAGE)
    first = Convolution(1, 3, 8, 8, 8, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1))
    second = Convolution(1, 8, 6, 4, 4, (1, 3), padding=(0, 1, 0, 1), groups=2)
    assert [layer.operator for layer in graph.layers] == [first, second, Linear(6, 16, 5, "gelu")]
    assert graph.flops == 2 * (8 * 16 * 27 + 6 * 16 * 12 + 6 * 16 * 5)
    assert graph.parameter_count == 8 * 27 + 6 * 4 * 3 + 80
    assert [layer.module for layer in graph.layers] == ["0", "2", "4"]
    assert graph.inputs == (("float32", (3, 8, 8)),)


def test_attention_products_are_layers() -> None:
    graph = trace(networks.Attention(fused_weights=True, fused_product=True), networks.tokens())
    products = [layer.operator for layer in graph.layers if isinstance(layer.operator, Attention)]
    assert products == [Attention(1, 3, 5, 5, 4, 4)]
    assert products[0].flops == 2 * 3 * 5 * 5 * 8


def test_nodes_name_their_module_inputs_and_shape() -> None:
    graph = trace(networks.TwoInTwoOut(), networks.NETWORKS["two_in_two_out"][1])
    node = next(node for node in graph.nodes if node.module == "vector")
    assert (node.op, node.inputs, node.shape) == ("linear", ("vector", "vector.weight", "vector.bias"), (1, 8))
    assert [shape for _, shape in graph.inputs] == [(3, 8, 8), (6,)]


def test_a_model_with_variadic_inputs() -> None:
    class Variadic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(inputs[0]) + self.a(inputs[1]))

    graph = trace(Variadic(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert {site.name: site.size for site in graph.all_sites} == {"a/width": 4, "b/kernel": 1}, "a is called twice"


# --- unknown operators ----------------------------------------------------------------------------------------------


def test_an_unknown_operator_freezes_and_names_itself() -> None:
    model = scramble(Custom())
    inputs = [IMAGE.double()]
    graph = trace(model, inputs)
    leading = [(group, member) for group in graph.all_groups for member in group.members if member.axis == 0]
    reasons = {member.parameter: group.frozen for group, member in leading}
    assert "no rule for graphprune_tests.scale_channels.default" in " ".join(reasons["before.weight"])
    assert "in the model" in " ".join(reasons["scale"])
    assert [site.name for site in graph.all_sites if site.kind == "channels"] == ["after/channels"]
    check_masked_equivalence(model, graph, _half(graph), inputs)


def test_a_rule_of_the_users_own_thaws_it() -> None:
    with mock.patch.dict(RULES):

        @operator("graphprune_tests::scale_channels")
        def _scale_channels(call: Call) -> Axes:
            unify(call.axes("x")[1], call.axes("scale")[0], call.reason)
            return call.axes("x")

        model = scramble(Custom())
        inputs = [IMAGE.double()]
        graph = trace(model, inputs)
        assert [site.name for site in graph.all_sites if site.kind == "channels"] == [
            "before/channels",
            "after/channels",
        ]
        assert check_masked_equivalence(model, graph, _half(graph), inputs).model.scale.shape == (3,)


def test_a_rule_that_returns_wrong_sizes_counts_as_none() -> None:
    with mock.patch.dict(RULES):

        @operator("graphprune_tests::scale_channels")
        def _wrong(call: Call) -> Axes:
            return call.axes("x")[:2]

        graph = trace(Custom(), IMAGE)
        assert [site.name for site in graph.all_sites if site.kind == "channels"] == ["after/channels"]


def _half(graph: object) -> Plan:
    choices = (Choice(site.name, site.kind, "half", tuple(range(0, site.size, 2))) for site in graph.all_sites)
    return Plan(graph.signature, tuple(choices), graph.inputs)


def test_a_fourier_transform_freezes_what_runs_through_it() -> None:
    model = scramble(Fourier())
    inputs = [IMAGE.double()]
    graph = trace(model, inputs)
    assert [site.name for site in graph.all_sites if site.kind == "channels"] == ["after/channels"]
    frozen = next(group for group in graph.all_groups if group.producers and group.name.startswith("before"))
    assert any("fft" in reason for reason in frozen.frozen)
    check_masked_equivalence(model, graph, _half(graph), inputs)


def test_parameters_that_nothing_reads_are_no_sites() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(7, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    graph = trace(Unused(), torch.randn(2, 3))
    assert [site.name for site in graph.all_sites] == ["used/kernel"]
    frozen = {group.frozen for group in graph.all_groups if group.name.startswith("unused")}
    assert frozen == {("no operator reads it",)}


class Twice(nn.Module):
    """One convolution under two names; with `side`, another that is only called in train mode."""

    def __init__(self, side: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.other = self.one
        self.side = nn.Conv2d(3, 3, 1) if side else None
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.other(self.one(x))
        return (y, self.side(y)) if self.training and self.side is not None else (y,)


@pytest.mark.parametrize("side", [False, True])
def test_train_mode_is_exported_only_where_it_reads_more_than_eval_mode(side: bool) -> None:
    model, state = Twice(side), torch.get_rng_state()
    with mock.patch("graphprune.coupling.tracing.export", wraps=tracing.export) as exported:
        trace(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert exported.call_count == 1 + side
    assert torch.equal(torch.get_rng_state(), state)
