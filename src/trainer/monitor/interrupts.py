"""A signal is a request: the loop stops at its next commit point. A second SIGINT stops at once."""

import signal
from types import FrameType

from core.errors import STOP_SIGNALS, sighup_is_ignored


class Interrupts:
    """While entered, `received` is the signal that asks the run to stop, or None."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False

    def __enter__(self) -> "Interrupts":
        asked_by = [number for number in STOP_SIGNALS if not sighup_is_ignored(number)]
        self._previous = {number: signal.signal(number, self._note) for number in asked_by}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # A script that stops at once is ending; in a notebook the next Ctrl-C must be heard.
            if number != signal.SIGINT or not self._at_once or handler is signal.default_int_handler:
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Return whether a signal asks the run to stop."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            self._at_once = True
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one would only disturb what is being closed
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + int(self.received or 0)
