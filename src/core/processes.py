"""Processes: how they fork, how they end with their parent, and how they ended."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from core.errors import STOP_SIGNALS

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def exit_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent is gone, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before that
        os._exit(1)


def describe_exit(exit_code: int | None) -> str:
    """Return how a process ended: `was killed by SIGTERM`, `exited with code 1`, `exited` if the code is unknown."""
    names = {-number: f"was killed by {number.name}" for number in signal.Signals}
    names[-signal.SIGKILL] += ", as the system does if memory is exhausted"
    return names.get(exit_code or 0, "exited" if exit_code is None else f"exited with code {exit_code}")


def can_fork() -> bool:
    """Return whether this process can be forked safely: it has one thread and no initialised CUDA.

    Where the system does not list threads, only those of Python are counted.
    """
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
    torch: Any = sys.modules.get("torch")
    return threads == 1 and not (torch is not None and torch.cuda.is_initialized())


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGHUP; a process that is started meanwhile keeps them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Fork:
    """A forked process, with the methods of a `subprocess.Popen` that a server needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):  # reaped by other code of this process
                found, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if found else None
                return self.returncode
            self.returncode = 1
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> None:
        """Wait for its end."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)


def reset_signal_handlers() -> None:
    """Give up the Python signal handlers that a fork has inherited, as a process that is executed does."""
    for number in signal.valid_signals():
        if callable(handler := signal.getsignal(number)) and handler is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)


def release_inherited_descriptors(*, keep: set[int]) -> None:
    """Give up what a fork has inherited: locks and sockets of its parent, which must not stay open in the server.

    Each number is kept, as /dev/null: an object that still holds it cannot close a file that is opened later.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    for descriptor in [int(path.name) for path in folder.iterdir()]:
        if descriptor not in keep and descriptor != null:
            with contextlib.suppress(OSError):
                os.fstat(descriptor)
                os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def reopen_output() -> None:
    """Give a fork the stdout and stderr that a process which is executed has, whatever its parent had put there."""
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def flush_output() -> None:
    """Write what waits in the buffers of stdout and stderr."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or closed
            stream.flush()


def exit_now(code: int) -> NoReturn:
    """End this process without what its parent has registered for its own exit."""
    flush_output()
    os._exit(code)
