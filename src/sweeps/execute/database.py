"""The database of a sweep: Optuna's storage at a URL, how SQLite takes its transactions, and how its errors read.

Everything here is about databases in general; `store` has the trials.
"""

import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from core.errors import ConfigError, StorageError

PATIENCE = 60.0  # seconds that SQLite waits for another's transaction
RETRIES = 3  # of a transaction whose connection was lost
Result = TypeVar("Result")
Method = TypeVar("Method", bound=Callable[..., Any])
optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def experimental() -> Iterator[None]:
    """Use what Optuna calls experimental, some of it for years, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_storage(url: str) -> RDBStorage:
    """Return Optuna's storage at a URL. SQLite takes its transactions one by one."""
    is_sqlite = url.startswith("sqlite")
    # Without an isolation level Python's sqlite3 leaves it to us when a transaction begins.
    connecting = (
        {"connect_args": {"timeout": PATIENCE, "isolation_level": None}} if is_sqlite else {"pool_pre_ping": True}
    )
    try:
        storage = RDBStorage(url, engine_kwargs=connecting)
    except ImportError:
        hint = "pip install 'preceptor[postgresql]' for postgresql+psycopg://..., 'preceptor[mysql]' for mysql+pymysql://..."
        raise ConfigError("sweep.storage", f"the driver of this database is not installed; {hint}") from None
    except (sqlalchemy.exc.ArgumentError, ValueError) as exception:  # ValueError: a port that is no number
        raise ConfigError("sweep.storage", _brief(exception), value=_without_password(url)) from None
    if is_sqlite:
        event.listen(storage.engine, "connect", _use_write_ahead_log)
        event.listen(storage.engine, "begin", _begin_at_once)
        storage.engine.dispose()
    return storage


def sqlite_url(file: Path) -> str:
    """Return the URL of an SQLite file; ConfigError for a path that a URL cannot hold, such as one with `?`."""
    url = f"sqlite:///{file}"
    if sqlalchemy.engine.make_url(url).database != str(file):
        explanation = "holds a character that a database URL cannot: rename it, or set sweep.storage"
        raise ConfigError("sweep.dir", explanation, value=str(file.parent))
    return url


def patiently(action: Callable[[], Result]) -> Result:
    """Run an action that creates tables. Of machines that start together all but one are refused, and try again."""
    for attempt in range(5):
        try:
            return action()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            if attempt == 4:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError


def wait_for_restarts(engine: sqlalchemy.Engine, seconds: float) -> None:
    """Let new connections of an engine wait for a server that restarts, for this time at most."""

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, _: object, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.Error:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def retried(method: Method) -> Method:
    """Wrap a method that may run twice: it runs again if the connection to the database was lost meanwhile.

    A new connection waits for the server (`wait_for_restarts`).
    """

    @functools.wraps(method)
    def retry(*arguments: Any, **options: Any) -> Any:
        for _ in range(RETRIES):
            try:
                return method(*arguments, **options)
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as exception:
                if not _is_lost_connection(exception):
                    raise
        return method(*arguments, **options)

    return cast(Method, retry)


def _is_lost_connection(exception: BaseException) -> bool:
    """Return whether an error, or the error that caused it, means a lost connection."""
    errors: list[BaseException | None] = [exception, exception.__cause__, exception.__context__]
    return any(isinstance(error, DBAPIError) and error.connection_invalidated for error in errors)


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Raise a StorageError in place of the errors of the database at a URL. What was written before is kept."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as exception:
        cause = exception.__cause__ or exception
        raise StorageError(_without_password(url), f"cannot be used: {_brief(cause)}") from exception


def _use_write_ahead_log(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_at_once(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _brief(exception: BaseException) -> str:
    return str(exception).partition("\n")[0]


def _without_password(url: str) -> str:
    try:
        parsed = sqlalchemy.engine.make_url(url)
        hidden = {key: "***" for key in parsed.query if "pass" in key.lower() or "secret" in key.lower()}
        return parsed.update_query_dict(hidden).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return "(cannot be parsed)"
