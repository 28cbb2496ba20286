"""Where studies are kept: an SQLite file, another database that Optuna knows, or memory."""

import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from graphprune.errors import InputError, StepError

LOCK_SECONDS = 60
"""How long a writer waits for another process that is writing to the same SQLite file."""

_SQLITE = "sqlite:///"


def storage_url(storage: str | Path) -> str:
    """An Optuna storage URL: one that is given passes through, a path becomes an SQLite file there."""
    return str(storage) if "://" in str(storage) else f"{_SQLITE}{Path(storage).absolute()}"


def sqlite_file(url: str) -> Path | None:
    """The file behind a storage URL, or None where there is none (another database, memory)."""
    path = url.removeprefix(_SQLITE)
    return None if path in (url, "", ":memory:") else Path(path)


def connect(storage: str | Path | None) -> optuna.storages.BaseStorage:
    """Open a storage, or make it; None is memory. Raises InputError, one line, when that cannot be done."""
    if storage is None:
        return optuna.storages.InMemoryStorage()
    url = storage_url(storage)
    file = sqlite_file(url)
    with one_line(f"cannot open the study store {file or url.partition(':')[0]}", InputError):
        if file is None:
            return _open(url, {})
        file.parent.mkdir(parents=True, exist_ok=True)
        _require_store(file)
        # No pool: a connection that is kept open would only be closed, with a warning, by the garbage collector.
        return _open(url, {"connect_args": {"timeout": LOCK_SECONDS}, "poolclass": NullPool})


@contextmanager
def one_line(action: str, kind: type[InputError] | type[StepError]) -> Iterator[None]:
    """Turn what Optuna and the database raise into one of our errors, with one line; keep both from logging."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    except (OptunaError, SQLAlchemyError, sqlite3.Error, ImportError, OSError, RuntimeError) as error:
        cause = getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error
        raise kind(f"{action}: {str(cause).splitlines()[0]}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def _open(url: str, options: dict[str, Any], attempts: int = 5) -> optuna.storages.BaseStorage:
    """Open a database; where another process makes its tables at the same moment, try again a little later."""
    for _ in range(attempts - 1):
        try:
            return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=options))
        except (OperationalError, IntegrityError):
            time.sleep(0.2)
    return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=options))


def _require_store(file: Path) -> None:
    """Refuse a file that is not a study store, before Optuna makes its tables in it."""
    if not file.exists():
        return
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=LOCK_SECONDS)) as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
    if tables and "studies" not in tables:
        raise InputError(f"{file} is a database of another program, not a study store")
