"""The package's own templates: the report and the picture of the coupled graph."""

from collections.abc import Mapping
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render(name: str, context: Mapping[str, object]) -> str:
    """A template of the package, filled in; values are escaped."""
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(context)


def _source(name: str) -> str:
    return resources.files("graphprune.reporting").joinpath(name).read_text(encoding="utf-8")
