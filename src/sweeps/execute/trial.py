"""What a trial does in its process: train, report each evaluation to the sweep, and send the result.

    sweep  --socket: JSON lines-->  trial (forked by the sweep's fork server, core/fork_server.py)
           <-- reports, result --

The server has imported torch; a forked trial has it at once. A trial dies with the server, and the server with the
sweep.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config import Config, leaves
from core.errors import (
    STOP_SIGNALS,
    CheckpointError,
    InUse,
    NumericalError,
    PreceptorError,
    StopSignal,
    as_preceptor_error,
    spell,
)
from core.options.declarations import TrainConfig
from core.options.schema import is_compared, names_of
from core.resume import resumed_config
from core.run_config import read_run_config
from sweeps.define.compose import compose_trial, written

Job = Mapping[str, Any]
WARM_UP, TIMED = 5, 30  # images whose time is not taken, and is


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


def serve(payload: bytes, descriptors: Sequence[int]) -> int:
    """Run one job. `payload`: the job as JSON; `descriptors`: the trial's end of its line."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the sweep asks a trial to save by SIGTERM
    return run(json.loads(payload), Line(socket.socket(fileno=descriptors[0])))


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
        error = as_preceptor_error(exception)
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
    """Start or resume one training in this process; after each evaluation the sweep decides whether it continues."""
    config = config_of(job, folder, index)
    fit_and_report(config, job, index, line)
    summary = json.loads((folder / "summary.json").read_text())
    best = summary["best"] or {"metrics": {}}
    metrics = {**best["metrics"], "parameters": summary["parameters"], "seconds": summary["seconds"]}
    if job["latency"]:
        metrics["latency_ms"] = latency_ms(folder, config)
    return {
        "metrics": metrics,
        "pruned": summary["stop_reason"] == "pruned",
    }


def fit_and_report(config: Config[TrainConfig], job: Job, index: int, line: Line) -> None:
    """Run or resume the training of a config; nothing if it has finished."""
    from trainer.run import execute

    def judge(evaluation: Mapping[str, Any], settings: Any) -> bool:
        number = -(-evaluation["step"] // settings.evaluate_every)
        report = {name: value for name, value in evaluation.items() if name in ("epoch", *job["told"])}
        line.send(report=report, evaluation=number, step=evaluation["step"], index=index)
        return any(answer["prune"] for answer in line.receive())

    execute(config, judge=judge)


def config_of(job: Job, folder: Path, index: int) -> Config[TrainConfig]:
    """Return the config of a trial's training: that of its folder if it was started before.

    Then only options that are free on resume may have changed. Raises CheckpointError if the folder holds another run.
    """
    composed = compose_trial(
        [*job["arguments"], f"seed={job['seed'] + index}", f"run_dir={written(str(folder))}"], job["config_dirs"]
    )
    # Classes that the sweep's own command names are trusted on a resume too.
    targets = {str(value) for name, value in leaves(composed.values) if name.rpartition(".")[2] == "_target_"}
    trust = sorted({target.partition(".")[0] for target in targets} | set(composed.values["trust"]))
    if not (folder / "config.yaml").exists():
        return replace(composed, values={**composed.values, "trust": trust})
    before = dict(leaves(read_run_config(folder)))
    changes, free = {}, names_of(TrainConfig, free_on_resume=True)
    for name, value in leaves(composed.record):
        is_counted = name.endswith("num_classes") and value is None
        if isinstance(value, dict) or is_counted or before.get(name) == value:
            continue
        if is_compared(name):
            explanation = f"holds another run ({name}: {spell(before.get(name))} -> {spell(value)})"
            raise CheckpointError(str(folder), f"{explanation}; move it away, or choose another sweep.dir")
        if name in free and name != "trainer.threads":  # with another number of threads the last bits would differ
            changes[name] = value
    own = {"resume": str(folder), "trust": trust, **changes}
    return resumed_config(folder, [f"{name}={written(value)}" for name, value in own.items()])


def latency_ms(folder: Path, config: Config[TrainConfig]) -> float:
    """The median time of one image through the trained network, on the device of the run, in milliseconds."""
    import torch

    from trainer.inference.load_run import load_run

    restored = load_run(folder, device=config.values["trainer"]["device"], trust=config.values["trust"])
    data = config.values["data"]
    image = torch.rand(1, data["channels"], data["image_size"], data["image_size"], device=restored.device)
    times = []
    with torch.no_grad():
        for _ in range(WARM_UP + TIMED):
            begun = time.perf_counter()
            restored.model(image)
            if restored.device.type == "cuda":
                torch.cuda.synchronize(restored.device)
            times.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(times[WARM_UP:]), 4)
