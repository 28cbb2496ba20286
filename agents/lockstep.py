"""What Stable-Baselines3 asks of many environments that are one object."""

from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.vec_env import VecEnv


class LockStep(VecEnv):  # type: ignore[misc]
    """Many episodes of one problem, taken forward together; `reset`, `step_async` and `step_wait` are left to say."""

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environments have an attribute."""
        return hasattr(self, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute, once per environment; Stable-Baselines3 asks for the render mode, and there is none."""
        value = None if attr_name == "render_mode" else getattr(self, attr_name)
        return [value] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not offered: the environments are one object."""
        raise NotImplementedError(attr_name)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> Sequence[Any]:
        """Call a method that answers for all environments at once."""
        answers: Sequence[Any] = getattr(self, method_name)(*method_args, **method_kwargs)
        return answers

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """No environment is wrapped."""
        return [False] * self.num_envs

    def close(self) -> None:
        """Nothing is held open."""
