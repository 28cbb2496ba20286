"""The command line: parses the options of a verb, runs it, prints its answer, and turns errors into exit codes.

0: done. 1: a step failed. 2: the input cannot be used. 130: stopped with Ctrl-C. An error is one line on standard
error; the traceback comes with --debug only.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from inspect import Signature, signature
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

import graphprune
from graphprune.commands.base import Answer, Verb
from graphprune.commands.demo import Demo
from graphprune.commands.deploy import Bench, Export
from graphprune.commands.history import Report, Runs
from graphprune.commands.prune import Finetune, Prune
from graphprune.commands.trace import Profile, Trace
from graphprune.errors import InputError, StepError

VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "trace": Trace,
    "prune": Prune,
    "finetune": Finetune,
    "export": Export,
    "bench": Bench,
    "profile": Profile,
    "report": Report,
    "runs": Runs,
}


COMMON = {field.name for field in fields(Verb)}


def execute(verb: Verb) -> None:
    """Run a verb and print its answer. Leaves with the exit code of the error if there is one."""
    try:
        with _quiet(verb.debug):
            answer = verb.run()
    except KeyboardInterrupt:
        _fail(130, verb.stopped)
    except Exception as error:  # the one place where any error ends: as a line and an exit code
        if verb.debug:
            Console(stderr=True).print_exception()
        _fail(2 if isinstance(error, InputError) else 1, _line(error))
    _show(answer, verb.json)


def _show(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer.facts, indent=1, sort_keys=True, allow_nan=False))
        return
    console = Console()
    for number, part in enumerate(answer.view):
        if number:
            console.print()
        # Lines are laid out already: a pipe must not break them at 80 columns.
        console.print(part, soft_wrap=isinstance(part, str | Text), markup=False, highlight=False)


def _line(error: Exception) -> str:
    if isinstance(error, InputError | StepError):
        return str(error)
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {first} (--debug prints the traceback)"


def _fail(code: int, message: str) -> NoReturn:
    print(f"graphprune: {message}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Standard output belongs to the answer alone, and of all warnings only graphprune's own are shown, as a line."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"graphprune: {message}", file=sys.stderr)

    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"graphprune\.")
            warnings.showwarning = show
        yield


def _print_version(asked: bool) -> None:
    if asked:
        print(f"graphprune {graphprune.__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Prune a trained network so that it really runs faster in ONNX Runtime.

    Start with `graphprune demo`. `graphprune VERB --help` explains a verb.
    """


def _build() -> typer.Typer:
    built = typer.Typer(
        result_callback=lambda verb, **_: execute(verb),
        callback=_common,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    for name, verb in VERBS.items():
        # Fields of the base class come first in a dataclass; in a help text they belong at the end.
        options = sorted(signature(verb).parameters.values(), key=lambda option: option.name in COMMON)
        verb.__signature__ = Signature(options)  # type: ignore[attr-defined]
        built.command(name)(verb)  # the class is called with the parsed options; `execute` gets the instance
    return built


app = _build()


def main() -> None:
    """Entry point of the `graphprune` command."""
    app()
