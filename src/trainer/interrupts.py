"""SIGINT and SIGTERM become a request that the loop grants at its next commit point; a second SIGINT stops at once."""

import signal
from types import FrameType


class Interrupts:
    """While entered, `received` is the signal that asks the run to stop, or None."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "Interrupts":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + int(self.received or 0)
