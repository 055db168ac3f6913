"""Stop signals: after the first one, the loop stops at its next commit point; a second SIGINT stops immediately."""

import signal
from types import FrameType

from core.errors import STOP_SIGNALS, sighup_is_ignored


class Interrupts:
    """Handles the stop signals inside a `with` block; `received` is the last stop signal, or None."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False

    def __enter__(self) -> "Interrupts":
        handled = [number for number in STOP_SIGNALS if not sighup_is_ignored(number)]
        self._previous = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # After a second SIGINT, a script ignores further ones while it ends. A notebook needs its handler again.
            if number != signal.SIGINT or not self._at_once or handler is signal.default_int_handler:
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Return whether a stop signal was received."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            self._at_once = True
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third SIGINT would interrupt the closing of files
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """Return 128 + the number of the received signal, as shells do: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + int(self.received or 0)
