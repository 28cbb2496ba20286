"""An exported graph trains as the network does from which it came: the same batch statistics, the same dropout."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphprune.coupling.tracing import trace
from graphprune.cutting.exported import plain_module
from graphprune.cutting.switches import with_switches
from tests.graphprune import networks
from tests.graphprune.oracle import scramble


class Functional(nn.Module):
    """A batch norm by its function, a batch norm called twice, one without weights, dropout by its function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.bare = nn.BatchNorm2d(4, momentum=None), nn.BatchNorm1d(4, eps=0.1, momentum=0.3, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        x = nn.functional.batch_norm(
            self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.2
        )
        x = self.twice(self.twice(x).relu())
        return nn.functional.dropout(self.bare(x.mean((2, 3))), 0.3, self.training)


class Norms(nn.Module):
    """Batch norms over one, two and three dimensions, and dropout of whole channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)
        self.drop = nn.Dropout2d(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.two(x))
        return self.three(x[..., None])[..., 0].flatten(2) + self.one(x.flatten(2))


@pytest.mark.parametrize("build", [networks.vgg, Functional, Norms], ids=["vgg", "functional", "norms"])
def test_training_mode_comes_back(build: Callable[[], nn.Module]) -> None:
    model = scramble(build())
    exported = with_switches(plain_module(trace(model, networks.images()[0].double()).exported))
    exported.load_state_dict(model.state_dict())
    own = copy.deepcopy(model)
    batch = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for training in (True, False, True):
        outputs = []
        for module in (own.train(training), exported.train(training)):
            torch.manual_seed(0)
            module.zero_grad()
            outputs.append(module(batch))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs)
        gradients = [dict(module.named_parameters()) for module in (own, exported)]
        for name, parameter in gradients[0].items():
            torch.testing.assert_close(gradients[1][name].grad, parameter.grad)
    assert not torch.equal(own.state_dict()[moving(own)], model.state_dict()[moving(own)])
    assert set(exported.state_dict()) == set(own.state_dict())
    for name, value in own.state_dict().items():
        if name != "norm.num_batches_tracked":  # a batch norm by its function alone counts nothing
            torch.testing.assert_close(exported.state_dict()[name], value)


def moving(model: nn.Module) -> str:
    """The name of some running statistics."""
    return next(name for name in model.state_dict() if name.endswith("running_mean"))


def test_a_graph_without_switches_has_none() -> None:
    """Without the modules the statistics stay: what the test above would miss if networks had no batch norm."""
    model = scramble(networks.vgg())
    exported = plain_module(trace(model, networks.images()[0].double()).exported)
    before = exported.state_dict()[moving(model)].clone()
    exported.train()(torch.randn(5, 3, 8, 8, dtype=torch.float64))
    assert torch.equal(exported.state_dict()[moving(model)], before)
