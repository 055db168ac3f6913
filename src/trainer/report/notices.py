"""Warnings that our packages log reach the run's own log, also those logged before there is a run folder."""

import logging
from collections.abc import Callable
from contextlib import suppress


class Notices(logging.Handler):
    """While entered, collects what is logged under `preceptor`, and passes it on once a listener is known."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._early: list[str] = []
        self._listener: Callable[[str], None] = self._early.append

    def __enter__(self) -> "Notices":
        logging.getLogger("preceptor").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("preceptor").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk
            self._listener(record.getMessage())

    def pass_to(self, listener: Callable[[str], None]) -> None:
        """Pass on what was logged so far, and all that will be."""
        self._listener = listener
        for text in self._early:
            listener(text)
