"""The process that trials are forked from, and what a trial does.

    sweep  --socket: jobs-->  this process (torch imported, no thread started)  --fork-->  a trial
      ^                                                                                       |
      +---------------------- a socket of its own: reports, verdicts, the result -------------+

Importing torch takes seconds; a fork has it at once. A fork of a process with threads could wait for ever for a lock
that one of them held, and CUDA does not survive it: so before each fork it looks that there is neither. Nobody is left
behind: a trial dies with this process, and this one with the sweep, by the system's hand.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import statistics
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config import Config, read_run_config, resumed
from core.errors import CheckpointError, InUse, NumericalError, PreceptorError, StopSignal, as_ours, spell
from core.processes import die_with
from core.schema import FREE_ON_RESUME, TRAIN, leaves
from sweeps.define.compose import COMPARED, NOT_COMPARED, compose_trial, written

Job = Mapping[str, Any]
LENGTH = struct.Struct("!I")
WARM_UP, TIMED = 5, 30  # pictures whose time is not taken, and is


class Line:
    """JSON objects over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def send(self, **message: Any) -> None:
        """One object; who is not there any more does not hear it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The objects that have come, at least one after a wait; EOFError behind the last."""
        while True:
            content = self.connection.recv(65536)
            if not content:
                raise EOFError
            *lines, self._rest = (self._rest + content).split(b"\n")
            if lines:
                return [json.loads(line) for line in lines]


def send_job(control: socket.socket, job: Job, channel: socket.socket) -> None:
    """A job and the trial's end of its socket."""
    content = json.dumps(job).encode()
    socket.send_fds(control, [LENGTH.pack(len(content))], [channel.fileno()])
    control.sendall(content)


def receive_job(control: socket.socket) -> tuple[dict[str, Any], socket.socket] | None:
    """What `send_job` has sent; None when the sweep is gone or wants nothing more."""
    length, descriptors, _, _ = socket.recv_fds(control, LENGTH.size, 1)
    if not length:
        return None
    content = b""
    while len(content) < LENGTH.unpack(length)[0]:
        content += control.recv(LENGTH.unpack(length)[0] - len(content))
    return json.loads(content), socket.socket(fileno=descriptors[0])


# The server


def serve(control: socket.socket, *, warm: bool) -> None:
    """Fork a process for each job, and tell how it ended, until the sweep is gone and its trials with it."""
    import torch

    import trainer.build.training  # noqa: F401  with all that a training imports

    if warm:
        import torch._inductor  # which the first step of an optimizer would import, each time anew

    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, Line] = {}
    asked = True
    gc.collect()
    gc.freeze()  # pages that no trial's collector touches are shared for good
    while asked or children:
        heard: list[Any] = [woken, control] if asked else [woken]
        ready, _, _ = select.select(heard, [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(children):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    line = children.pop(pid)
                    line.send(ended=os.waitstatus_to_exitcode(status))
                    line.connection.close()
        if control in ready:
            received = receive_job(control)
            if received is None:
                asked = False
                continue
            job, channel = received
            threads = Path("/proc/self/task")
            if torch.cuda.is_initialized() or (threads.exists() and len(list(threads.iterdir())) > 1):
                raise RuntimeError("a process with threads or CUDA cannot be forked safely")
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                die_with(parent)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                for other in children.values():
                    other.connection.close()
                os._exit(run(job, Line(channel)))
            children[pid] = Line(channel)


# A trial


def run(job: Job, line: Line) -> int:
    """Train, report, and tell the result: the process's exit code."""
    try:
        line.send(started=os.getpid())
        os.environ.update(job["environment"])
        results = []
        for index, folder in enumerate(job["folders"]):
            results.append(train(job, Path(folder), index, line))
            if results[-1]["pruned"]:
                break
        line.send(result=results)
    except StopSignal as stop:
        line.send(stopped=stop.exit_code)
        return stop.exit_code
    except Exception as exception:
        error = as_ours(exception)
        if not isinstance(error, PreceptorError):
            error = PreceptorError("internal", f"{type(exception).__name__}: {exception}")
        diverged = isinstance(error, NumericalError) and "out of memory" not in error.explanation
        in_use = isinstance(error, InUse)
        line.send(error=str(error), exit_code=error.exit_code, diverged=diverged, in_use=in_use)
        return error.exit_code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def train(job: Job, folder: Path, index: int, line: Line) -> dict[str, Any]:
    """One training, begun or gone on with, in this process; each evaluation asks the sweep whether to go on."""
    from trainer.build.training import build

    config = config_of(job, folder, index)
    trainer = build(config)
    if trainer is not None:

        def judge(evaluation: Mapping[str, Any]) -> bool:
            number = -(-trainer.step // trainer.settings.evaluate_every)
            told = {name: value for name, value in evaluation.items() if name in ("epoch", *job["told"])}
            line.send(report=told, evaluation=number, of=trainer.settings.total_steps, step=trainer.step, index=index)
            return any(answer["prune"] for answer in line.receive())

        trainer.judge = judge
        trainer.run()
    summary = json.loads((folder / "summary.json").read_text())
    best = summary["best"] or {"metrics": {}}
    metrics = {**best["metrics"], "parameters": summary["parameters"], "seconds": summary["seconds"]}
    if job["latency"]:
        metrics["latency_ms"] = latency_ms(folder, config)
    return {
        "metrics": metrics,
        "test": summary["test"],
        "pruned": summary["stop_reason"] == "pruned",
        "step": summary["step"],
    }


def config_of(job: Job, folder: Path, index: int) -> Config:
    """The config of a trial's training: its own folder's where it was begun before, in which case only what a resumed
    run may change can have changed. CheckpointError where the folder holds another run."""
    composed = compose_trial(
        [*job["arguments"], f"seed={job['seed'] + index}", f"run_dir={written(str(folder))}"], job["config_dirs"]
    )
    # What the sweep's own command names is trusted when a run is gone on with, as it was when the run began.
    targets = {str(value) for name, value in leaves(composed.values) if name.rpartition(".")[2] == "_target_"}
    trust = sorted({target.partition(".")[0] for target in targets} | set(composed.values["trust"]))
    if not (folder / "config.yaml").exists():
        return replace(composed, values=composed.values | {"trust": trust})
    before = dict(leaves(read_run_config(folder)))
    changes = {}
    for name, value in leaves(composed.record):
        is_counted = name.endswith("num_classes") and value is None
        if isinstance(value, dict) or is_counted or name in NOT_COMPARED or before.get(name) == value:
            continue
        if name not in FREE_ON_RESUME or name in COMPARED:
            explanation = f"holds another run ({name}: {spell(before.get(name))} -> {spell(value)})"
            raise CheckpointError(str(folder), f"{explanation}; move it away, or choose another sweep.dir")
        if name != "trainer.threads":  # with another number its last bits would differ
            changes[name] = value
    own = {"resume": str(folder), "trust": trust, **changes}
    return resumed(folder, [f"{name}={written(value)}" for name, value in own.items()], TRAIN)


def latency_ms(folder: Path, config: Config) -> float:
    """The median time of one picture through the trained network, on the device of the run, in milliseconds."""
    import torch

    from trainer.inference.load_run import load_run

    restored = load_run(folder, device=config.values["trainer"]["device"], trust=config.values["trust"])
    data = config.values["data"]
    picture = torch.rand(1, data["channels"], data["image_size"], data["image_size"], device=restored.device)
    times = []
    with torch.no_grad():
        for _ in range(WARM_UP + TIMED):
            begun = time.perf_counter()
            restored.model(picture)
            if restored.device.type == "cuda":
                torch.cuda.synchronize(restored.device)
            times.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(times[WARM_UP:]), 4)


def main() -> None:
    """python -m sweeps.execute.worker DESCRIPTOR PARENT WARM"""
    descriptor, parent, warm = map(int, sys.argv[1:])
    die_with(parent)
    serve(socket.socket(fileno=descriptor), warm=bool(warm))


if __name__ == "__main__":
    main()
