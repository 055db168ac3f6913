"""The sweep: trials are claimed, trained in processes of their own, judged, and their results kept.

    claim -> draw a point -> start its process -> reports: note, judge -> result: note
                 ^                                                          |
                 +--------------- failed: wait and be tried again ----------+

All state is in the store, so the same command continues a killed sweep, and other machines may run it too.
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

POLL = 0.5  # seconds between looks at the clock; whatever trials say is heard at once


class Sweep:
    """The loop of one process. Others, here or elsewhere, may share the store."""

    def __init__(self, plan: Plan, store: Store, pool: Pool, table: Table) -> None:
        self.plan, self.store, self.pool, self.table = plan, store, pool, table
        self.running: dict[int, Running] = {}  # by slot
        self.selector = selectors.DefaultSelector()
        self.begun = time.monotonic()
        self.beaten = -math.inf
        self.signal: int | None = None
        self.stopping = False  # no more trials are begun
        self.gpus = gpus() if plan.base.values["trainer"]["device"] != "cpu" else []

    def run(self) -> None:
        """Until no trial is left, or a signal asks to stop: StopSignal, when all have saved."""
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS if not sighup_is_ignored(number)}
        try:
            while self._continue():
                self._listen()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal is not None:
            raise StopSignal(128 + self.signal)

    def _continue(self) -> bool:
        """Keep in touch with the store and fill the free slots; False when there is nothing left to do here."""
        now = time.monotonic()
        minutes = self.plan.options["minutes"]
        if minutes is not None and now - self.begun > minutes * 60 and not self.stopping:
            self.table.say(f"{minutes:g} minutes are over: no further trial is started")
            self.stopping = True
        if now - self.beaten > self.plan.options["stale_after"] / 5:
            self.beaten = now
            self._keep_in_touch()
        while not self.stopping and len(self.running) < self.plan.options["parallel"]:
            if not self._begin():
                break
        self.table.show(self.running)
        if self.running:
            return True
        # Trials that run on another machine may be left to us when it dies.
        return not self.stopping and any(not trial.state.is_finished() for trial in self.store.trials())

    def _keep_in_touch(self) -> None:
        lost = self.store.beat([running.trial._trial_id for running in self.running.values()])
        for running in self.running.values():
            if running.trial._trial_id in lost:
                self.table.say(f"trial {running.trial.number} was taken over by another sweep: no heartbeat in time")
                running.process.stop()
        for number in self.store.requeue(stale_after=self.plan.options["stale_after"]):
            self.table.say(f"trial {number} is queued again: its process is gone")

    def _begin(self) -> bool:
        """Claim a trial and start it; False when none waits."""
        claimed = self.store.claim()
        if claimed is None:
            return False
        trial_id, number = claimed
        slot = next(slot for slot in range(len(self.running) + 1) if slot not in self.running)
        study = self.store.study
        # As `ask` does, which is not used here: the sampler must see the newest trials.
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
            "told": [metric for _, metric in self.plan.objectives],
            "latency": self.plan.measures_latency,
            "environment": {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {},
        }
        self.running[slot] = Running(trial, point, self.pool.start(job), time.monotonic())
        self.selector.register(self.running[slot].process.line.connection, selectors.EVENT_READ, slot)
        if self.stopping:  # a signal came meanwhile
            self.running[slot].process.stop()
        return True

    # What trials say

    def _listen(self) -> None:
        for key, _ in self.selector.select(POLL):
            running = self.running[key.data]
            try:
                messages = running.process.line.receive()
            except (EOFError, ConnectionResetError):
                messages = [{"ended": None}]  # with the server that would have told
            for message in messages:
                if "started" in message:
                    running.process.started(message["started"])
                elif "report" in message:
                    running.keep_report(message)
                    running.process.line.send(prune=self._judge(running, message))
                elif "ended" in message:
                    self.selector.unregister(running.process.line.connection)
                    running.process.line.connection.close()
                    del self.running[key.data]
                    self._conclude(running, message["ended"])
                    break
                else:
                    running.keep_outcome(message)

    def _judge(self, running: Running, message: Mapping[str, Any]) -> bool:
        """Return whether to prune the trial. Its first seed decides. A resumed run reports some evaluations again."""
        if message["index"] > 0 or not self.plan.prunes:
            return False
        if not self.store.is_mine(running.trial._trial_id):
            running.process.stop()
            return False
        trial, number = running.trial, message["evaluation"]
        value = message["report"].get(self.plan.objectives[0][1])
        if number not in self.store.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(math.nan if value is None else value, number)
        return trial.should_prune()

    def _conclude(self, running: Running, exit_code: int | None) -> None:
        """Note how a trial's process ended."""
        if not self.store.is_mine(running.trial._trial_id):
            return
        outcome = running.outcome or {}
        seconds = round(time.monotonic() - running.begun, 3)
        if "result" in outcome:
            self._keep(running, outcome["result"], seconds)
        elif outcome.get("in_use"):
            # By a sweep that was held up: it may go on, or end. Silence makes the trial wait again.
            self.table.say(f"trial {running.trial.number}: {outcome['error']}; retried later")
        elif "error" in outcome and outcome["diverged"]:
            # A point that diverges is a bad point, not a failed trial: the same bits would diverge again.
            self._finish(running, TrialState.PRUNED, None, outcome="diverged", error=outcome["error"], wall=seconds)
        elif "error" in outcome:
            self._fail(running, outcome["error"], outcome["exit_code"], seconds)
        elif "stopped" in outcome or running.process.asked_to_stop:
            self.store.release(running.trial._trial_id)
        else:
            self._fail(running, f"error[trial] its process {describe_exit(exit_code)}", 1, seconds)

    def _keep(self, running: Running, results: list[dict[str, Any]], seconds: float) -> None:
        """Mean and standard deviation over the seeds, and how far each constraint is from being met."""
        columns = {name: [result["metrics"].get(name) for result in results] for name in results[0]["metrics"]}
        columns = {name: values for name, values in columns.items() if None not in values}  # None: it was not finite
        mean = {name: statistics.fmean(values) for name, values in columns.items()}
        spread = {name: statistics.stdev(values) for name, values in columns.items() if len(values) > 1}
        is_pruned = results[-1]["pruned"]
        values = [mean.get(metric) for _, metric in self.plan.objectives]
        for constraint in self.plan.constraints:
            measured = constraint.metric in mean
            violation = constraint.violation(mean[constraint.metric]) if measured else math.inf
            running.trial.set_constraint(str(constraint), min(violation, 1e300))
        attributes = {"metrics": mean, "spread": spread, "wall": seconds, "seeds": len(results)}
        if is_pruned:
            self._finish(running, TrialState.PRUNED, None, outcome="pruned", **attributes)
        elif any(value is None or not math.isfinite(value) for value in values):
            self._finish(running, TrialState.PRUNED, None, outcome="diverged", **attributes)
        else:
            self._finish(running, TrialState.COMPLETE, values, outcome="complete", **attributes)

    def _finish(self, running: Running, state: TrialState, values: list[Any] | None, **attributes: Any) -> None:
        if self.store.finish(running.trial, state, values, **attributes):
            self.table.concluded(running, attributes)

    def _fail(self, running: Running, error: str, exit_code: int, seconds: float) -> None:
        """Retry the trial up to sweep.retries times; progress since the last failure resets the count."""
        step = running.last_report.get("step", 0)
        before = self.store.storage.get_trial(running.trial._trial_id).user_attrs.get(
            "failures", {"step": -1, "count": 0}
        )
        count = before["count"] + 1 if step <= before["step"] else 1
        retries = self.plan.options["retries"]
        # To fail the same way again.
        is_certain = exit_code in (ConfigError.exit_code, CheckpointError.exit_code, SecurityError.exit_code)
        if self.signal is not None:  # what fails while everything is being stopped is tried by the relaunch
            self.store.release(running.trial._trial_id)
            return
        if count <= retries and not is_certain:
            running.trial.set_user_attr("failures", {"step": step, "count": count})
            self.store.release(running.trial._trial_id)
            when = "to be tried again by the next sweep" if self.stopping else "tried again"
            self.table.say(f"trial {running.trial.number}: {error}; {when} ({count} of {retries})")
            return
        self.table.say(f"trial {running.trial.number}: {error}")
        self._finish(running, TrialState.FAIL, None, outcome="failed", error=error, exit_code=exit_code, wall=seconds)
        if self.plan.options["on_error"] == "stop" and not self.stopping:
            self.table.say("sweep.on_error=stop: the trials that run are asked to save")
            self._stop()

    # Signals

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # at once: the trials go on from their last checkpoints
        self.signal = number
        self.table.say(f"{signal.Signals(number).name}: the trials are asked to save")
        self._stop()

    def _stop(self) -> None:
        self.stopping = True
        for running in self.running.values():
            running.process.stop()
