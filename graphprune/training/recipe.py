"""How a network is trained: the recipe, and the optimiser and loss that follow from it."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The batch size is the task's.

    The learning rate warms up over the share `warmup` of all epochs, then falls along a cosine. `optimizer` is a name
    that timm knows; where it, `lr` or `weight_decay` is None, networks with batch norm get SGD with Nesterov momentum,
    others AdamW. `temperature` and `alpha` are those of `distillation`. `precision` "fastest" times a step in each
    number format and memory layout first; "float32" leaves nothing to a clock.
    """

    epochs: int = 30
    lr: float | None = None
    weight_decay: float | None = None
    optimizer: str | None = None
    warmup: float = 0.05
    temperature: float = 4.0
    alpha: float = 0.9
    label_smoothing: float = 0.0
    ema_decay: float = 0.999
    precision: Literal["fastest", "float32"] = "fastest"
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "epochs": (1, 1e6),
            "warmup": (0, 0.9),
            "alpha": (0, 1),
            "ema_decay": (0, 1),
            "label_smoothing": (0, 1),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"recipe {name} must be between {low} and {high:g}, not {getattr(self, name)}")
        if self.temperature <= 0 or (self.lr is not None and self.lr <= 0):
            raise InputError("recipe temperature and lr must be positive")
        if self.precision not in ("fastest", "float32"):
            raise InputError(f"recipe precision must be fastest or float32, not {self.precision!r}")

    def optimizer_options(self, model: nn.Module, from_scratch: bool) -> dict[str, Any]:
        """Arguments of timm's `create_optimizer_v2`; a trained network gets half the learning rate of a new one."""
        convolutional = any(isinstance(module, _BatchNorm) for module in model.modules())
        name, lr, decay = ("sgd", 0.1, 5e-4) if convolutional else ("adamw", 1e-3, 0.05)
        return {
            "opt": self.optimizer or name,
            "lr": self.lr or (lr if from_scratch else lr / 2),
            "weight_decay": decay if self.weight_decay is None else self.weight_decay,
        }

    def loss(self, logits: Tensor, targets: Tensor | None, taught: Tensor | None) -> Tensor:
        """The training loss of logits [N, classes] with integer targets [N], the teacher's logits, or both."""
        logits = logits.float()
        if targets is None and taught is None:
            raise InputError("training without a teacher needs labels")
        if targets is None:
            return distillation(logits, taught.float(), self.temperature)  # type: ignore[union-attr]
        labels = functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if taught is None:
            return labels
        return self.alpha * distillation(logits, taught.float(), self.temperature) + (1 - self.alpha) * labels


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student), both softened by the temperature (Hinton et al., arXiv 1503.02531)."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(taught / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


def repair_batch_norm(model: nn.Module, momentum: float = 0.1) -> None:
    """Give batch norms that average over all batches ever seen (momentum None) an ordinary momentum, in place.

    Re-estimation of statistics sets None; trained that way, the statistics lag behind the weights and accuracy is lost.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum is None:
            module.momentum = momentum
