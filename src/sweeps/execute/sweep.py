"""The loop of a sweep: claim trials, train each in its own process, prune poor ones, store results.

    claim -> sample a point -> start a process -> reports: prune or not -> result: store
      ^                                                                |
      +-------------- failure: release, then retry --------------------+

The store contains all state. So the same command continues a killed sweep, and several machines can share one sweep.
"""

import math
import selectors
import signal
import statistics
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from optuna.trial import Trial, TrialState

from core.errors import STOP_SIGNALS, CheckpointError, ConfigError, SecurityError, StopSignal, sighup_is_ignored
from core.processes import describe_exit
from sweeps.define.plan import Plan
from sweeps.define.space import draw
from sweeps.execute.pool import Pool, gpus
from sweeps.execute.running import Running
from sweeps.execute.store import Store
from sweeps.results.table import Table

POLL_S = 0.5  # maximum time in seconds that the loop waits for messages; a message ends the wait


class Sweep:
    """Runs the trials of a plan. Other sweep processes, on this or another machine, may share the store."""

    def __init__(self, plan: Plan, store: Store, pool: Pool, table: Table) -> None:
        self.plan, self.store, self.pool, self.table = plan, store, pool, table
        self.running: dict[int, Running] = {}  # by slot, an index from 0; the slot of a trial selects its GPU
        self.selector = selectors.DefaultSelector()
        self.started = time.monotonic()
        self.last_heartbeat = -math.inf
        self.signal: int | None = None  # the signal that stops the sweep
        self.stopping = False  # if True, no more trials are started
        self.gpus = gpus() if plan.base.values["trainer"]["device"] != "cpu" else []

    def run(self) -> None:
        """Run trials until all have finished, sweep.minutes is over, or a signal stops the sweep.

        After a stop signal, the running trials save and end; then StopSignal is raised. SIGINT after another stop
        signal raises KeyboardInterrupt at once.
        """
        previous = {
            number: signal.signal(number, self._handle_signal)
            for number in STOP_SIGNALS
            if not sighup_is_ignored(number)
        }
        try:
            while self._update():
                self._handle_messages()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.signal is not None:
            raise StopSignal(128 + self.signal)

    def _update(self) -> bool:
        """Write heartbeats, start trials in free slots, and update the table. Return whether the sweep continues."""
        now = time.monotonic()
        minutes = self.plan.options["minutes"]
        if minutes is not None and now - self.started > minutes * 60 and not self.stopping:
            self.table.say(f"sweep.minutes={minutes:g} is reached: no more trials are started")
            self.stopping = True
        if now - self.last_heartbeat > self.plan.options["stale_after"] / 5:
            self.last_heartbeat = now
            self._write_heartbeats()
        while not self.stopping and len(self.running) < self.plan.options["parallel"]:
            if not self._start_trial():
                break
        self.table.show(self.running)
        if self.running:
            return True
        # Wait for the trials of other sweeps: if one of these sweeps dies, this sweep requeues and runs its trials.
        return not self.stopping and any(not trial.state.is_finished() for trial in self.store.trials())

    def _write_heartbeats(self) -> None:
        """Write heartbeats, stop trials that this sweep no longer owns, and requeue trials of dead sweeps."""
        lost = self.store.beat([running.trial._trial_id for running in self.running.values()])
        for running in self.running.values():
            if running.trial._trial_id in lost:
                self.table.say(
                    f"trial {running.trial.number} is stopped: its heartbeat was late, so another sweep has requeued it"
                )
                running.process.stop()
        for number in self.store.requeue(stale_after=self.plan.options["stale_after"]):
            self.table.say(f"trial {number} is queued again: its sweep has ended or writes no heartbeat")

    def _start_trial(self) -> bool:
        """Claim a trial, sample its point and start its process. Return False if no trial is waiting."""
        claimed = self.store.claim()
        if claimed is None:
            return False
        trial_id, number = claimed
        slot = next(slot for slot in range(len(self.running) + 1) if slot not in self.running)
        study = self.store.study
        # Clear Optuna's cache, as `Study.ask` does, so that the sampler reads the newest trials.
        study._thread_local.cached_all_trials = None
        study.sampler = self.plan.sampler(number)
        if self.plan.points:
            study._storage.set_trial_system_attr(trial_id, "fixed_params", self.plan.points[number])
        trial = Trial(study, trial_id)
        point = draw(self.plan.space, trial)
        folders = [self.plan.run_folder(number, index) for index in range(self.plan.options["seeds"])]
        job = {
            "arguments": self.plan.arguments(point),
            "config_dirs": self.plan.config_dirs,
            "folders": [str(folder.resolve()) for folder in folders],
            "seed": self.plan.base.values["seed"],
            "reported_metrics": [metric for _, metric in self.plan.objectives],
            "latency": self.plan.measures_latency,
            "environment": {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {},
        }
        self.running[slot] = Running(trial, point, self.pool.start(job), time.monotonic())
        self.selector.register(self.running[slot].process.line.connection, selectors.EVENT_READ, slot)
        if self.stopping:  # a signal arrived while the trial was started
            self.running[slot].process.stop()
        return True

    # Messages of trials

    def _handle_messages(self) -> None:
        """Wait up to POLL_S seconds for messages of trials, and handle all that have arrived."""
        for key, _ in self.selector.select(POLL_S):
            running = self.running[key.data]
            try:
                messages = running.process.line.receive()
            except (EOFError, ConnectionResetError):
                messages = [{"ended": None}]  # the exit code is unknown
            for message in messages:
                if "started" in message:
                    running.process.started(message["started"])
                elif "report" in message:
                    running.keep_report(message)
                    running.process.line.send(prune=self._is_pruned(running, message))
                elif "ended" in message:
                    self.selector.unregister(running.process.line.connection)
                    running.process.line.connection.close()
                    del self.running[key.data]
                    self._handle_end(running, message["ended"])
                    break
                else:
                    running.keep_outcome(message)

    def _is_pruned(self, running: Running, message: Mapping[str, Any]) -> bool:
        """Store the report of an evaluation, and return whether the pruner ends the trial.

        Only reports of the first seed are used. A trial that this sweep no longer owns is stopped instead.
        """
        if message["index"] > 0 or not self.plan.prunes:
            return False
        if not self.store.is_mine(running.trial._trial_id):
            running.process.stop()
            return False
        trial, evaluation = running.trial, message["evaluation"]
        value = message["report"].get(self.plan.objectives[0][1])
        # A resumed run repeats the evaluations after its checkpoint. Optuna stores each evaluation once.
        if evaluation not in self.store.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(math.nan if value is None else value, evaluation)
        return trial.should_prune()

    def _handle_end(self, running: Running, exit_code: int | None) -> None:
        """Store the outcome of a trial whose process has ended, or release the trial for another try.

        A trial that this sweep no longer owns is ignored.
        """
        if not self.store.is_mine(running.trial._trial_id):
            return
        outcome = running.outcome or {}
        seconds = round(time.monotonic() - running.begun, 3)
        if "result" in outcome:
            self._store_result(running, outcome["result"], seconds)
        elif outcome.get("in_use"):
            # A process of a delayed sweep still uses the run folder. This sweep leaves the trial RUNNING but writes no
            # more heartbeats, so `requeue` returns it to the queue after `stale_after` seconds.
            delay = f"{self.plan.options['stale_after']} s (sweep.stale_after)"
            self.table.say(f"trial {running.trial.number}: {outcome['error']}; it is queued again after {delay}")
        elif "error" in outcome and outcome["diverged"]:
            # The point caused the divergence, so a retry would diverge again. TPE learns from PRUNED, not from FAIL.
            self._finish(running, TrialState.PRUNED, None, outcome="diverged", error=outcome["error"], wall=seconds)
        elif "error" in outcome:
            self._fail(running, outcome["error"], outcome["exit_code"], seconds)
        elif "stopped" in outcome or running.process.asked_to_stop:
            self.store.release(running.trial._trial_id)
        else:
            self._fail(running, f"error[trial] the trial's process {describe_exit(exit_code)}", 1, seconds)

    def _store_result(self, running: Running, results: list[dict[str, Any]], seconds: float) -> None:
        """Store the mean and standard deviation of each metric over the seeds, and the violation of each constraint.

        `results` has one item per seed (see sweeps.execute.trial.train), and `seconds` is the wall time.
        """
        columns = {name: [result["metrics"].get(name) for result in results] for name in results[0]["metrics"]}
        # None is a value that was not finite. Such a metric has no mean.
        columns = {name: values for name, values in columns.items() if None not in values}
        mean = {name: statistics.fmean(values) for name, values in columns.items()}
        spread = {name: statistics.stdev(values) for name, values in columns.items() if len(values) > 1}
        is_pruned = results[-1]["pruned"]
        values = [mean.get(metric) for _, metric in self.plan.objectives]
        for constraint in self.plan.constraints:
            measured = constraint.metric in mean
            violation = constraint.violation(mean[constraint.metric]) if measured else math.inf
            running.trial.set_constraint(str(constraint), min(violation, 1e300))  # stored as JSON, which has no inf
        attributes = {"metrics": mean, "spread": spread, "wall": seconds, "seeds": len(results)}
        if is_pruned:
            self._finish(running, TrialState.PRUNED, None, outcome="pruned", **attributes)
        elif any(value is None or not math.isfinite(value) for value in values):
            self._finish(running, TrialState.PRUNED, None, outcome="diverged", **attributes)
        else:
            self._finish(running, TrialState.COMPLETE, values, outcome="complete", **attributes)

    def _finish(self, running: Running, state: TrialState, values: list[Any] | None, **attributes: Any) -> None:
        """Store the final state of a trial and print its line, if this sweep still owns the trial."""
        if self.store.finish(running.trial, state, values, **attributes):
            self.table.print_outcome(running, attributes)

    def _fail(self, running: Running, error: str, exit_code: int, seconds: float) -> None:
        """Release the trial for a retry, or store its failure after sweep.retries retries.

        If the trial has made progress since its last failure, the count of retries restarts. Errors of the config, of a
        checkpoint and of security are not retried.
        """
        step = running.last_report.get("step", 0)
        attributes = self.store.storage.get_trial(running.trial._trial_id).user_attrs
        previous = attributes.get("failures", {"step": -1, "count": 0})
        count = previous["count"] + 1 if step <= previous["step"] else 1
        retries = self.plan.options["retries"]
        would_fail_again = exit_code in (ConfigError.exit_code, CheckpointError.exit_code, SecurityError.exit_code)
        if self.signal is not None:  # the signal may have caused the failure, so it does not count
            self.store.release(running.trial._trial_id)
            return
        if count <= retries and not would_fail_again:
            running.trial.set_user_attr("failures", {"step": step, "count": count})
            self.store.release(running.trial._trial_id)
            action = "deferred to the next launch" if self.stopping else "queued again"
            self.table.say(f"trial {running.trial.number}: {error}; {action} (retry {count} of {retries})")
            return
        self.table.say(f"trial {running.trial.number}: {error}")
        self._finish(running, TrialState.FAIL, None, outcome="failed", error=error, exit_code=exit_code, wall=seconds)
        if self.plan.options["on_error"] == "stop" and not self.stopping:
            self.table.say("sweep.on_error=stop: the running trials save and stop")
            self._stop_trials()

    # Signals

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop all trials. On SIGINT after another stop signal, raise KeyboardInterrupt instead."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the same command resumes the trials from their last checkpoints
        self.signal = number
        self.table.say(f"{signal.Signals(number).name}: the running trials save and stop")
        self._stop_trials()

    def _stop_trials(self) -> None:
        """Start no more trials, and ask all running ones to save and stop."""
        self.stopping = True
        for running in self.running.values():
            running.process.stop()
