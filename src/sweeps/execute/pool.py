"""Start the processes of trials from a fork server: one server for all trials (warm), or one per trial (cold).

core/fork_server.py documents the server. sweeps/execute/trial.py is the code that runs in the process of a trial.
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

# Modules that a server imports before it forks. trainer.run imports all modules that a training needs.
COLD_MODULES = ("sweeps.execute.trial", "trainer.run")
# The first optimizer step imports torch._inductor. A warm server imports it once for all trials.
WARM_MODULES = (*COLD_MODULES, "torch._inductor")


class TrialLine(Line):
    """The sweep's end of the connection to a trial.

    `receive` adds a last message, {"ended": exit code of the process}.
    """

    def __init__(self, connection: socket.socket, child: Child) -> None:
        super().__init__(connection)
        self.child = child

    def receive(self) -> list[dict[str, Any]]:
        """Wait for at least one message, and return all messages that have arrived.

        When the trial has closed the connection, return [{"ended": exit code}]. The exit code is minus the number of
        the signal that killed the process, or None if it is unknown.
        """
        try:
            return super().receive()
        except (EOFError, ConnectionResetError):
            code = self.child.exit_code(5)  # None: the server has ended too, or reports no exit code within 5 s
            self.child.end()
            return [{"ended": code}]


class Process:
    """The process of a trial. The sweep receives its messages from `line`; `pid` is None until the first message."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.pid: int | None = None
        self.asked_to_stop = False

    def stop(self) -> None:
        """Send SIGTERM: the process saves a checkpoint and ends. If the pid is unknown, `started` sends it later."""
        self.asked_to_stop = True
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def started(self, pid: int) -> None:
        """Store the pid that the process has reported. If `stop` was called before, send SIGTERM now."""
        self.pid = pid
        if self.asked_to_stop:
            self.stop()


class Pool:
    """Starts the processes of trials.

    warm:    whether one fork server, which imports torch once, starts all trials; otherwise each trial has its own
             server
    lock:    descriptor of this sweep's lock (owners.py). Every process inherits it, so the lock is free when the last
             process has ended
    output:  file to which servers and trials write their stderr
    """

    def __init__(self, *, warm: bool, lock: int, output: Path) -> None:
        self.warm = warm
        self.lock = lock
        self.output = output
        self.servers: list[ForkServer] = []

    def start(self, job: Job) -> Process:
        """Start a job in a new process, and return the process. Raises StorageError if the fork server ends at once."""
        sweep_end, trial_end = socket.socketpair()
        server = self._server()
        with trial_end:
            try:
                child = server.start("sweeps.execute.trial.serve", json.dumps(job).encode(), [trial_end.fileno()])
            except OSError:
                explanation = f"the fork server of the trials ends immediately; see its error in {self.output}"
                raise StorageError("sweep", explanation) from None
        if not self.warm:
            server.finish()  # a cold server forks one trial only, and ends when that trial ends
        return Process(TrialLine(sweep_end, child))

    def _server(self) -> ForkServer:
        """Return the shared server (warm), or start a new one (cold). Servers that have ended are closed."""
        if self.warm and self.servers:
            return self.servers[0]
        for server in self.servers:
            if not server.is_alive():
                server.close()
        self.servers = [server for server in self.servers if server.is_alive()]
        preload = WARM_MODULES if self.warm else COLD_MODULES
        self.servers.append(ForkServer(preload, pass_fds=[self.lock], errors=self.output))
        return self.servers[-1]

    def close(self) -> None:
        """Kill all servers, and thereby all trials that still run."""
        for server in self.servers:
            server.close()
        self.servers.clear()


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as values of CUDA_VISIBLE_DEVICES, for example ["0", "1"].

    If CUDA_VISIBLE_DEVICES is not set, the GPUs are counted in /proc, because torch would initialise CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
