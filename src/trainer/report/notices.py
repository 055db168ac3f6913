"""Forward warnings logged by Preceptor's packages to the run's log, including those logged before the run starts."""

import logging
from collections.abc import Callable
from contextlib import suppress


class Notices(logging.Handler):
    """Handler of the logger `preceptor`: it keeps warnings until a listener is set, then forwards them.

    A context manager: the handler is attached inside the `with` block only.
    """

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
        """Forward all previous and future warnings to `listener`."""
        self._listener = listener
        for text in self._early:
            listener(text)
