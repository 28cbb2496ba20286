"""An actor for bounded actions whose gradients do not vanish at the bounds.

Stable-Baselines3 squashes an actor's answer with tanh. Where most of what it hears at first is "less", it soon answers
the least everywhere, and as the slope of tanh is 0 there, never learns otherwise. Hausknecht and Stone, ICLR 2016
(arXiv 1511.04143), met this with DDPG and *invert gradients* instead: one that would raise an answer p is scaled by the
room above it, one that would lower it by the room below, so that it fades at the bound and turns round beyond it.
"""

from typing import Any

import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class InvertedGradients(torch.autograd.Function):
    """Clips to [-1, 1]; backwards, scales gradients by the room that is left in their direction."""

    @staticmethod
    def forward(ctx: FunctionCtx, answers: Tensor) -> Tensor:
        """Answers of any size, clipped."""
        ctx.save_for_backward(answers)
        return answers.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """A descent step against a negative gradient raises the answer."""
        (answers,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * torch.where(gradient < 0, 1 - answers, 1 + answers) / 2


class Bounded(nn.Module):
    """In the place of tanh."""

    def forward(self, answers: Tensor) -> Tensor:
        """[N, actions], clipped to [-1, 1]."""
        clipped: Tensor = InvertedGradients.apply(answers)
        return clipped


class BoundedActor(Actor):  # type: ignore[misc]
    """Stable-Baselines3's actor with inverted gradients."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.mu[-1] = Bounded()


class BoundedPolicy(TD3Policy):  # type: ignore[misc]
    """Stable-Baselines3's policy for DDPG, with that actor."""

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> BoundedActor:
        """A new actor, or the target's."""
        actor = BoundedActor(**self._update_features_extractor(self.actor_kwargs, features_extractor))
        moved: BoundedActor = actor.to(self.device)
        return moved
