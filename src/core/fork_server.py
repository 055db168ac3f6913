"""Fork child processes from a small server process that has one thread and no CUDA: the only place that forks.

    this process  --control socket: jobs-->  fork server (modules imported once)  --fork-->  one child per job
         ^                                         |
         +---- report socket per job: pid, exit code

Why a server. Importing torch takes seconds; a forked child has it at once. But a fork copies only the calling thread:
a lock that another thread held is never released in the child, and CUDA does not survive a fork. A process that trains
has threads, and often CUDA. So it never forks children itself. The server does, and before each fork it checks that it
has one thread and no initialised CUDA. Data workers (data/loading/workers.py) and the trials of a sweep
(sweeps/execute/pool.py) both come from such a server.

How a server starts. If this process has one thread and no initialised CUDA, it forks the server: that is instant, and
the modules are already imported. Otherwise a new Python is executed. It gets this process's `sys.path`, so that user
classes can be unpickled, but never imports from the working directory. OPENBLAS_NUM_THREADS=1 keeps NumPy from
starting threads at import. `warm_up` starts the server early: before this process imports torch it is forked, and
imports torch meanwhile. (What this process holds in memory at that moment stays allocated as long as the server runs.)

How processes end. A child is killed if its `Child` object is ended, if the server dies, or (through the server) if
this process dies, even by SIGKILL. SIGINT, SIGTERM and SIGHUP are blocked in the server and in its children: a signal
to the whole process group asks this process to save and stop, and the children serve it until then; a trial of a sweep
unblocks them, as it has a session of its own. A server belongs to the process that started it; a forked copy of that
process starts its own.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from core.processes import (
    Fork,
    can_fork,
    exit_now,
    exit_with_parent,
    flush_output,
    release_inherited_descriptors,
    reopen_output,
    reset_signal_handlers,
    signals_blocked,
)
from core.server_process import LENGTH, NUMBER, send_message, serve

START_TIMEOUT_S = 300.0  # for the server's imports: a network drive can be slow
ATTEMPTS = 3  # servers that are started for one job before it is an error
BOOT = "import json, sys; settings = json.loads(sys.argv[1]); sys.path[:] = settings['path']; \
from core.server_process import main; main(settings)"


class ForkServer:
    """Starts children through a server process, which starts with the first of them.

    preload:    modules that the server imports before its first fork
    pass_fds:   descriptors that the server and all children inherit
    errors:     if given, the server is executed as a daemon: in its own session, stdout discarded, stderr to this file
    """

    def __init__(self, preload: Sequence[str], *, pass_fds: Sequence[int] = (), errors: Path | None = None) -> None:
        self.preload, self.pass_fds, self.errors = tuple(preload), tuple(pass_fds), errors
        self._running: Running | None = None
        self._end: Callable[[], Any] = lambda: None
        self._lock = threading.Lock()

    def start(
        self, target: str, payload: bytes, descriptors: Sequence[int] = (), *, preload: Sequence[str] = ()
    ) -> "Child":
        """Run `target(payload, descriptors)` in a new child; `target` is a function as `package.module.name`.

        The child owns its descriptors, and exits with the integer that the function returns (None is 0). The server
        first imports the modules in `preload` that it lacks. OSError if no server stays alive.
        """
        ours, theirs = socket.socketpair()
        job = json.dumps({"target": target, "preload": list(preload), "payload": len(payload)}).encode()
        with theirs, self._lock:
            for attempt in range(1, ATTEMPTS + 1):
                running = self._alive()
                try:
                    send_message(
                        running.control, LENGTH.pack(len(job)) + job + payload, [theirs.fileno(), *descriptors]
                    )
                    return Child(ours)
                except OSError:  # the server was killed
                    self._end()
                    if attempt == ATTEMPTS:
                        ours.close()
                        raise
        raise AssertionError

    def warm_up(self) -> None:
        """Start the server now, so that its imports run while this process does something else."""
        with self._lock:
            self._alive()

    @property
    def pid(self) -> int | None:
        """The server's process number; None if none was started by this process."""
        started_here = self._running is not None and self._running.owner == os.getpid()
        return self._running.process.pid if self._running is not None and started_here else None

    def is_alive(self) -> bool:
        """Whether a server of this process runs."""
        return self.pid is not None and self._running is not None and self._running.process.poll() is None

    def finish(self) -> None:
        """Accept no further jobs: the server ends with its last child."""
        if self._running is not None:
            self._running.control.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Kill the server and with it all children."""
        self._end()
        self._running = None

    def _alive(self) -> "Running":
        if self._running is None or not self.is_alive():
            self._end()
            ours, theirs = socket.socketpair()
            with theirs, signals_blocked():
                # Elsewhere the system does not list the threads that native libraries start.
                may_fork = self.errors is None and sys.platform == "linux" and can_fork()
                process = self._fork(theirs) if may_fork else self._execute(theirs)
            self._running = Running(process, ours, os.getpid())
            self._end = weakref.finalize(self, self._running.end)  # at the latest when this process exits
        return self._running

    def _execute(self, control: socket.socket) -> "subprocess.Popen[bytes] | Fork":
        """A new Python as server."""
        settings = {
            "path": [folder for folder in sys.path if folder],
            "control": control.fileno(),
            "parent": os.getpid(),
            "preload": self.preload,
        }
        with contextlib.ExitStack() as stack:
            streams: dict[str, Any] = {}
            if self.errors is not None:
                output = stack.enter_context(self.errors.open("ab"))
                streams = {"stdout": subprocess.DEVNULL, "stderr": output, "start_new_session": True}
            return subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, json.dumps(settings)],
                pass_fds=(control.fileno(), *self.pass_fds),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                **streams,
            )

    def _fork(self, control: socket.socket) -> "subprocess.Popen[bytes] | Fork":
        """A fork of this process as server."""
        parent = os.getpid()
        flush_output()  # or the child would write what waits in the buffers a second time
        pid = os.fork()
        if pid == 0:
            self._serve(control, parent)
        return Fork(pid)

    def _serve(self, control: socket.socket, parent: int) -> NoReturn:
        """What the fork does."""
        code = 1
        try:
            exit_with_parent(parent)
            os.environ["OPENBLAS_NUM_THREADS"] = "1"
            sys.path[:] = [folder for folder in sys.path if folder]
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the terminal belongs to the parent
            reset_signal_handlers()
            reopen_output()
            release_inherited_descriptors(keep={0, 1, 2, control.fileno(), *self.pass_fds})
            serve(control, self.preload)
            code = 0
        except BaseException:
            traceback.print_exc()
        exit_now(code)


@dataclass
class Running:
    """A server process, the socket for its jobs, and the process that started it."""

    process: "subprocess.Popen[bytes] | Fork"
    control: socket.socket
    owner: int

    def end(self) -> None:
        """Kill the server, unless it belongs to the process that this one was forked from."""
        self.control.close()
        if os.getpid() == self.owner:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)


class Child:
    """A child of the server, seen from the process that asked for it."""

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self._owner = os.getpid()
        self._pid: int | None = None
        self._exit_code: int | None = None

    @property
    def pid(self) -> int | None:
        """Its process number, as soon as the server has forked it; None if the server ended before."""
        if self._pid is None:
            self._pid = self._receive(START_TIMEOUT_S)
        return self._pid

    def exit_code(self, timeout: float) -> int | None:
        """Return its exit code, or minus the signal that killed it; None if it runs, or died with the server."""
        if self._pid is None:
            self._pid = self._receive(timeout)
        if self._exit_code is None and self._pid is not None:
            self._exit_code = self._receive(timeout)
        return self._exit_code

    def kill(self) -> None:
        """Have the server kill it. Only the server can tell whether the pid is still its child's."""
        if self._owner == os.getpid():
            with contextlib.suppress(OSError):
                self._report.shutdown(socket.SHUT_WR)

    def end(self, timeout: float = 5) -> None:
        """Kill it and wait for its end; not for ever: a process that waits for a dead network drive does not die."""
        self.kill()
        if self._owner == os.getpid():
            self.exit_code(timeout)
        self._report.close()

    def _receive(self, timeout: float) -> int | None:
        with contextlib.suppress(OSError):  # the server is gone, or the timeout is over
            self._report.settimeout(timeout)
            content = self._report.recv(NUMBER.size)
            return NUMBER.unpack(content)[0] if content else None
        return None
