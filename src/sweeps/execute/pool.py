"""The processes of a sweep, seen from the sweep: one fork server for all trials, or (cold) one for each.

core/fork_server.py describes the server, sweeps/execute/trial.py what a trial does.
"""

import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from core.errors import StorageError
from core.fork_server import Child, ForkServer
from sweeps.execute.trial import Job, Line

COLD = ("sweeps.execute.trial", "trainer.run")  # with all that a training imports
WARM = (*COLD, "torch._inductor")  # which the first step of an optimizer would import, in each trial again


class TrialLine(Line):
    """The sweep's end of a trial's line. Its last message is `ended`, with the exit code of the process."""

    def __init__(self, connection: socket.socket, child: Child) -> None:
        super().__init__(connection)
        self.child = child

    def receive(self) -> list[dict[str, Any]]:
        """The objects that have come, at least one after a wait."""
        try:
            return super().receive()
        except (EOFError, ConnectionResetError):
            code = self.child.exit_code(5)  # None: it died with the server that would have reported it
            self.child.end()
            return [{"ended": code}]


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
        self.servers: list[ForkServer] = []

    def start(self, job: Job) -> Process:
        """Start a trial in a process of its own."""
        ours, theirs = socket.socketpair()
        server = self._server()
        with theirs:
            try:
                child = server.start("sweeps.execute.trial.serve", json.dumps(job).encode(), [theirs.fileno()])
            except OSError:
                explanation = f"the process that forks trials does not stay alive; see {self.output}"
                raise StorageError("sweep", explanation) from None
        if not self.warm:
            server.finish()
        return Process(TrialLine(ours, child))

    def _server(self) -> ForkServer:
        if self.warm and self.servers:
            return self.servers[0]
        for server in self.servers:
            if not server.is_alive():
                server.close()
        self.servers = [server for server in self.servers if server.is_alive()]
        preload = WARM if self.warm else COLD
        self.servers.append(ForkServer(preload, pass_fds=[self.lock], errors=self.output))
        return self.servers[-1]

    def close(self) -> None:
        """End every process that is left."""
        for server in self.servers:
            server.close()
        self.servers.clear()


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without CUDA."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
