"""The process of a trial: train, report each evaluation to the sweep, send the result.

    trial  -- started; report of each evaluation; result, error or stopped -->  sweep
           <-- after each report: whether to prune the trial -----------------

Messages are JSON objects, one per line, on a socket. The sweep's fork server (core/fork_server.py) forks the process.
The server has already imported torch, so the trial does not import it again. If the sweep ends, its server is killed;
if the server ends, its trials are killed.
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

Job = Mapping[str, Any]  # what a trial needs to know; created by Sweep._start_trial
WARM_UP_CALLS, TIMED_CALLS = 5, 30  # calls of the model before the latency measurement, and in it


class Line:
    """Sends and receives messages over a socket. A message is a JSON object on one line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""  # received bytes of an incomplete line

    def send(self, **message: Any) -> None:
        """Send one message. If the other process has closed the socket, the message is lost without an error."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Wait for at least one message, and return all messages that have arrived.

        Raises EOFError if the other process has closed the socket and all messages have been returned.
        """
        while True:
            content = self.connection.recv(65536)
            if not content:
                raise EOFError
            *lines, self._rest = (self._rest + content).split(b"\n")
            if lines:
                return [json.loads(line) for line in lines]


def serve(payload: bytes, descriptors: Sequence[int]) -> int:
    """Run one job in a process that the fork server has forked, and return the exit code of the process.

    payload:      the job as JSON
    descriptors:  one descriptor, the trial's end of the socket to the sweep
    """
    # The fork server blocks these signals. A trial must receive SIGTERM, which asks it to save and end.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return run(json.loads(payload), Line(socket.socket(fileno=descriptors[0])))


def run(job: Job, line: Line) -> int:
    """Train once per seed, send the reports and the result, and return the exit code of the process.

    An exception is sent to the sweep as an error. If a training is pruned, the remaining seeds are not trained.
    """
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
    """Start or resume one training, and return {"metrics": metrics by name, "pruned": bool}.

    folder:  run folder of the training
    index:   index of its seed, from 0

    The metrics are those of the best checkpoint, the number of `parameters`, the `seconds` of the training, and
    `latency_ms` if the job asks for it. The sweep decides after each evaluation whether to prune.
    """
    config = config_of(job, folder, index)
    fit_and_report(config, job, index, line)
    summary = json.loads((folder / "summary.json").read_text())
    best = summary["best"] or {"metrics": {}}
    metrics = {**best["metrics"], "parameters": summary["parameters"], "seconds": summary["seconds"]}
    if job["latency"]:
        metrics["latency_ms"] = latency_ms(folder, config)
    return {"metrics": metrics, "pruned": summary["stop_reason"] == "pruned"}


def fit_and_report(config: Config[TrainConfig], job: Job, index: int, line: Line) -> None:
    """Start or resume the training of a config, and report each evaluation. A finished run is not changed."""
    from trainer.run import execute

    def judge(evaluation: Mapping[str, Any], settings: Any) -> bool:
        """Report an evaluation, wait for the decision of the sweep, and return whether to prune."""
        # Rounded up: the last evaluation can come after fewer than evaluate_every steps.
        number = -(-evaluation["step"] // settings.evaluate_every)
        report = {name: value for name, value in evaluation.items() if name in ("epoch", *job["reported_metrics"])}
        line.send(report=report, evaluation=number, step=evaluation["step"], index=index)
        return any(message["prune"] for message in line.receive())

    execute(config, judge=judge)


def config_of(job: Job, folder: Path, index: int) -> Config[TrainConfig]:
    """Return the config of a training: a new config, or, if `folder` contains a run, the config that resumes it.

    A resumed run gets the new values of options that are free on resume. Raises CheckpointError if an option that
    is compared between runs has another value in the run.
    """
    composed = compose_trial(
        [*job["arguments"], f"seed={job['seed'] + index}", f"run_dir={written(str(folder))}"], job["config_dirs"]
    )
    # The user named these classes on the sweep's command line or in its configs, so a resumed trial may build them.
    class_names = {str(value) for name, value in leaves(composed.values) if name.rpartition(".")[2] == "_target_"}
    trust = sorted({name.partition(".")[0] for name in class_names} | set(composed.values["trust"]))
    if not (folder / "config.yaml").exists():
        return replace(composed, values={**composed.values, "trust": trust})
    stored = dict(leaves(read_run_config(folder)))
    changes, free = {}, names_of(TrainConfig, free_on_resume=True)
    for name, value in leaves(composed.record):
        is_inferred = name.endswith("num_classes") and value is None  # inferred from the data by the stored run
        if isinstance(value, dict) or is_inferred or stored.get(name) == value:
            continue
        if is_compared(name):
            explanation = f"contains another run ({name}: {spell(stored.get(name))} -> {spell(value)})"
            raise CheckpointError(str(folder), f"{explanation}; move the folder, or set another sweep.dir")
        # Another number of threads would change rounding errors: the trial would not be bit-identical.
        if name in free and name != "trainer.threads":
            changes[name] = value
    overrides = {"resume": str(folder), "trust": trust, **changes}
    return resumed_config(folder, [f"{name}={written(value)}" for name, value in overrides.items()])


def latency_ms(folder: Path, config: Config[TrainConfig]) -> float:
    """Return the median time of a forward pass of one random image, in milliseconds, on the device of the training."""
    import torch

    from trainer.inference.load_run import load_run

    restored = load_run(folder, device=config.values["trainer"]["device"], trust=config.values["trust"])
    data = config.values["data"]
    image = torch.rand(1, data["channels"], data["image_size"], data["image_size"], device=restored.device)
    times = []
    with torch.no_grad():
        for _ in range(WARM_UP_CALLS + TIMED_CALLS):
            start = time.perf_counter()
            restored.model(image)
            if restored.device.type == "cuda":
                torch.cuda.synchronize(restored.device)
            times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[WARM_UP_CALLS:]), 4)
