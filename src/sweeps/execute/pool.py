"""The processes of a sweep, seen from the sweep: one server that forks a trial for each job, or one a trial."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from core.errors import StorageError
from sweeps.execute.worker import Job, Line, send_job


class Process:
    """A trial's process: what it says comes through `line`."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.pid: int | None = None
        self.asked_to_stop = False

    def stop(self) -> None:
        """Ask it to save and end; one that has not told its number yet is asked when it has."""
        self.asked_to_stop = True
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def started(self, pid: int) -> None:
        """Its number is known."""
        self.pid = pid
        if self.asked_to_stop:
            self.stop()


class Pool:
    """Starts trials. `lock` is handed on to every process, so that it is free when the last one is gone."""

    def __init__(self, *, warm: bool, lock: int, output: Path) -> None:
        self.warm = warm
        self.lock = lock
        self.output = output
        self.servers: list[tuple[subprocess.Popen[bytes], socket.socket]] = []

    def start(self, job: Job) -> Process:
        """A trial in a process of its own."""
        ours, theirs = socket.socketpair()
        for _ in range(3):
            server, control = self._server()
            try:
                send_job(control, job, theirs)
                break
            except OSError:  # the server was killed
                self._forget(server, control)
        else:
            raise StorageError("sweep", f"the process that forks trials does not stay alive; see {self.output}")
        theirs.close()
        if not self.warm:
            control.shutdown(socket.SHUT_WR)  # no further jobs: it ends with its trial
        return Process(Line(ours))

    def _server(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        for server, control in list(self.servers):
            if server.poll() is not None:
                self._forget(server, control)
        if self.warm and self.servers:
            return self.servers[0]
        ours, theirs = socket.socketpair()
        with self.output.open("ab") as output:
            server = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sweeps.execute.worker",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    str(int(self.warm)),
                ],
                pass_fds=(theirs.fileno(), self.lock),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # each run has its train.log
                stderr=output,
                # NumPy's BLAS would start threads when it is imported, and they do not survive a fork.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the sweep, which asks each trial to save
            )
        theirs.close()
        self.servers.append((server, ours))
        return self.servers[-1]

    def _forget(self, server: subprocess.Popen[bytes], control: socket.socket) -> None:
        server.kill()
        server.wait()
        control.close()
        self.servers.remove((server, control))

    def close(self) -> None:
        """End every process that is left."""
        for server, control in list(self.servers):
            self._forget(server, control)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without CUDA."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
