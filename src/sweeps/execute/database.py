"""The database of a sweep: open Optuna's storage at a URL, retry after lost connections, convert errors.

Supports every database that Optuna supports. store.py reads and writes the trials.
"""

import functools
import logging
import os
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

from core.durable import write_durably
from core.errors import ConfigError, StorageError
from core.regular_files import read_regular

SQLITE_TIMEOUT_S = 60.0  # maximum time that SQLite waits for the transaction of another process
RETRIES = 3  # repetitions of a transaction that lost its connection
Result = TypeVar("Result")
Method = TypeVar("Method", bound=Callable[..., Any])
optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def experimental() -> Iterator[None]:
    """Suppress Optuna's ExperimentalWarning in this context.

    Optuna marks some features as experimental for years, so the warning does not help the user.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_storage(url: str) -> RDBStorage:
    """Return Optuna's storage at a database URL. With SQLite, transactions run one at a time.

    Raises ConfigError if the URL cannot be parsed, or if the driver of the database is not installed. Raises errors of
    SQLAlchemy and Optuna if the database cannot be opened.
    """
    is_sqlite = url.startswith("sqlite")
    # With isolation_level=None, Python's sqlite3 begins no transactions. `_begin_immediate` begins them instead.
    engine_options = (
        {"connect_args": {"timeout": SQLITE_TIMEOUT_S, "isolation_level": None}}
        if is_sqlite
        else {"pool_pre_ping": True}
    )
    try:
        storage = RDBStorage(url, engine_kwargs=engine_options)
    except ImportError:
        postgresql = "`pip install 'preceptor[postgresql]'` for a URL postgresql+psycopg://..."
        mysql = "`pip install 'preceptor[mysql]'` for a URL mysql+pymysql://..."
        explanation = f"the driver of this database is not installed; run {postgresql}, or {mysql}"
        raise ConfigError("sweep.storage", explanation) from None
    except (sqlalchemy.exc.ArgumentError, ValueError) as exception:  # ValueError: the port is not an integer
        raise ConfigError("sweep.storage", _first_line(exception), value=_without_password(url)) from None
    if is_sqlite:
        event.listen(storage.engine, "connect", _use_write_ahead_log)
        event.listen(storage.engine, "begin", _begin_immediate)
        storage.engine.dispose()  # RDBStorage has already connected, but only new connections call _use_write_ahead_log
    return storage


def sqlite_url(file: Path) -> str:
    """Return the database URL of an SQLite file.

    Raises ConfigError if the path contains a character that has another meaning in a URL, such as `?`.
    """
    url = f"sqlite:///{file}"
    if sqlalchemy.engine.make_url(url).database != str(file):
        explanation = (
            "contains a character that is not allowed in a database URL; rename the folder, or set sweep.storage"
        )
        raise ConfigError("sweep.dir", explanation, value=str(file.parent))
    return url


def retry_creation(action: Callable[[], Result]) -> Result:
    """Return the result of an action that creates tables or a study. Run it up to 5 times if the database fails.

    If several machines start at the same time, only one of them creates the tables. The others fail, and succeed when
    they retry, because then the tables exist. Raises the database error of the fifth attempt.
    """
    for attempt in range(5):
        try:
            return action()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            if attempt == 4:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError


def wait_for_restarts(engine: sqlalchemy.Engine, seconds: float) -> None:
    """Make each new connection of an engine retry for up to `seconds`, because the server may be restarting.

    If no attempt succeeds in this time, the connection raises the error of the database driver.
    """

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
    """Wrap a method: if it loses the database connection, it runs again, up to RETRIES times.

    The method must have the same effect if it runs twice, because the lost transaction may have been committed. A new
    connection waits for the server (`wait_for_restarts`). Other database errors are raised at once.
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
    """Return whether an error, its cause or its context reports a lost connection."""
    errors: list[BaseException | None] = [exception, exception.__cause__, exception.__context__]
    return any(isinstance(error, DBAPIError) and error.connection_invalidated for error in errors)


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Convert database errors in this context to StorageError, whose subject is the URL without its password."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as exception:
        cause = exception.__cause__ or exception
        raise StorageError(_without_password(url), f"cannot be used: {_first_line(cause)}") from exception


def _use_write_ahead_log(connection: Any, _: object) -> None:
    """Set the journal mode of a new SQLite connection: with WAL, readers and a writer do not block each other."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    """Begin an SQLite transaction with the write lock, so that no other process writes between its read and write."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _first_line(exception: BaseException) -> str:
    """Return the first line of an error's message. The other lines are SQLAlchemy's: SQL statement and parameters."""
    return str(exception).partition("\n")[0]


def _without_password(url: str) -> str:
    """Return a URL with `***` instead of its password and of query values whose key contains `pass` or `secret`."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
        hidden = {key: "***" for key in parsed.query if "pass" in key.lower() or "secret" in key.lower()}
        return parsed.update_query_dict(hidden).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return "(cannot be parsed)"


def study_name(folder: Path) -> str:
    """Return the name of a folder's study: the name of the folder when the sweep was started for the first time.

    The file FOLDER/.study stores the name, so a sweep in a renamed folder continues its study.
    """
    file = folder / ".study"
    if not file.exists():
        write_durably(file, os.fsencode(folder.resolve().name))
    return os.fsdecode(read_regular(file, follow=False))
