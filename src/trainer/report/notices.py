"""Forward what Preceptor's packages log to the run's log, including what they log before the run starts."""

import logging
from collections.abc import Callable
from contextlib import suppress

Listener = Callable[[str], None]


class Notices(logging.Handler):
    """Handler of the logger `preceptor`: it keeps records until there are listeners, then forwards their texts.

    A context manager: the handler is attached inside the `with` block only.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._early: list[logging.LogRecord] = []
        self._listeners: tuple[Listener, Listener] | None = None

    def __enter__(self) -> "Notices":
        logger = logging.getLogger("preceptor")
        self._previous_level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("preceptor")
        logger.removeHandler(self)
        logger.setLevel(self._previous_level)

    def emit(self, record: logging.LogRecord) -> None:
        if self._listeners is None:
            self._early.append(record)
            return
        say, warn = self._listeners
        with suppress(OSError):  # a full disk
            (warn if record.levelno >= logging.WARNING else say)(record.getMessage())

    def pass_to(self, *, say: Listener, warn: Listener) -> None:
        """Forward all previous and future records: warnings to `warn`, facts to `say`."""
        self._listeners = say, warn
        for record in self._early:
            self.emit(record)
