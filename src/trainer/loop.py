"""The loop.

    fit:       schedule -> step (forward, loss, backward, L1, clip, check, update) -> average -> log -> conclude
    conclude:  evaluate, decide -> commit

All code that changes the weights or ends the run is in `fit`, or in the step object that it calls, in the order of
execution. The step is the only counter, and all random values are a function of it. So a run that is resumed at any
commit point ends with the same bits. If a signal prevents an evaluation, the resumed run starts with it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from core.seeding import fold
from trainer.device import generator_of, synchronize
from trainer.durations import due
from trainer.interfaces import Recorder, Saver, StepResult
from trainer.monitor.interrupts import Interrupts
from trainer.monitor.metrics import MAX_PENDING_LOGITS
from trainer.optim.scheduling import momentum_of
from trainer.settings import Settings
from trainer.state import TrainState
from trainer.training import Training

Judge = Callable[[Mapping[str, Any], Settings], bool]  # a line of metrics.jsonl -> whether to prune the run


def never_prune(line: Mapping[str, Any], settings: Settings) -> bool:
    """Return false: the judge of a run that is not part of a sweep."""
    return False


class Loop:
    """The training loop of a run."""

    def __init__(
        self,
        training: Training,
        *,
        recorder: Recorder,
        saver: Saver,
        interrupts: Interrupts,
        judge: Judge,
    ) -> None:
        self.training, self.settings, self.state = training, training.settings, training.state
        self.recorder, self.saver, self.interrupts, self.judge = recorder, saver, interrupts, judge
        self.pruned = False

    def fit(self) -> str:
        """Train from the present step on, and return the reason to stop."""
        state, training, seed = self.state, self.training, self.settings.seed
        if self.evaluation_is_due():
            state.schedule.apply(state.optimizer, state.step - 1)  # the log shows the learning rate of that step
            reason = self.conclude()
        else:
            reason = reason_to_stop(self.settings, self.state, self.interrupts, pruned=self.pruned)
        while not reason:
            state.model.train()
            state.clock.start()
            epoch, done = divmod(state.step, state.steps_per_epoch)
            end_of_epoch = state.step - done + state.steps_per_epoch
            seeds = [fold(seed, "dropout", step) for step in range(state.step, end_of_epoch)]
            for batches, dropout_seed in zip(training.train_loader.steps(epoch, start=done), seeds, strict=True):
                state.unsettle()
                state.schedule.apply(state.optimizer, state.step)
                reseed(dropout_seed, training.device)
                result = training.step(batches)
                state.advance(result.samples)
                if state.lookahead:
                    state.lookahead.update(state.step, total_steps=self.settings.total_steps)
                if state.ema:
                    state.ema.update(state.step, skipped=state.guard.skipped)
                self.log_step(result)
                training.step.clear_gradients()
                state.settle()
                reason = self.conclude()
                if reason:
                    break
            state.clock.stop()
        return reason

    def conclude(self) -> str | None:
        """Evaluate if that is due, decide whether to stop, and commit the step."""
        improved = self.evaluate() if self.evaluation_is_due() and not self.interrupts.received else None
        reason = reason_to_stop(self.settings, self.state, self.interrupts, pruned=self.pruned)
        self.commit(evaluated=improved is not None, improved=bool(improved), ends=reason is not None)
        return reason

    def evaluation_is_due(self) -> bool:
        """Return whether this step is to be evaluated and was not: a signal can stop a run before its evaluation."""
        settings, step = self.settings, self.state.step
        return step > self.state.evaluated and due(step, settings.evaluate_every, total_steps=settings.total_steps)

    # Logs and evaluation

    def log_step(self, result: StepResult) -> None:
        """Record the measurements of the steps since the last log line, if one is due."""
        state, settings = self.state, self.settings
        self.recorder.progress(state.step, state.epoch)
        state.sums.sum_up(at_least=MAX_PENDING_LOGITS)
        if due(state.step, settings.histograms_every):
            self.recorder.histograms(state.model, state.step)
        if not due(state.step, settings.log_every, total_steps=settings.total_steps):
            return
        measurements = {f"step/{name}": value for name, value in state.sums.read().items()}  # waits for the device
        self.report_skipped()
        measurements |= {f"step/{name}": value.item() for name, value in result.metrics.items()}
        for group in state.optimizer.param_groups:
            measurements[f"lr/{group['name']}"] = group["lr"]
            if (momentum := momentum_of(group)) is not None:
                measurements[f"momentum/{group['name']}"] = momentum
        state.clock.stop()
        measurements["throughput/samples_per_second"] = state.clock.samples_per_second
        state.clock.start()
        self.recorder.step(state.step, state.epoch, measurements)

    def evaluate(self) -> bool | None:
        """Evaluate, record the metrics, and pass them to schedule and early stopping; return whether this is the best.

        Returns None if a signal asks the run to stop during the evaluation: then nothing is changed.
        """
        state, settings = self.state, self.settings
        self.stop_clock()
        measured: dict[str, float] | None = {}
        if self.training.val_loader is not None:
            measured = self.training.measure(self.training.val_loader, abandon=self.interrupts.asked)
        if measured is None:
            return None
        state.unsettle()
        metrics = {f"train/{name}": value for name, value in state.sums.read_total().items()}  # waits for the device
        metrics |= {f"val/{name}": value for name, value in measured.items()}
        self.report_skipped()
        improved = state.note_evaluation(metrics, monitor=settings.monitor, mode=settings.monitor_mode)
        state.schedule.observe(metrics)
        epochs = state.step / state.steps_per_epoch  # not rounded: early stopping depends on it
        state.early_stopping.observe(metrics.get(state.early_stopping.monitor, math.nan), epochs)
        line = {
            "step": state.step,
            "epoch": state.epoch,
            **metrics,
            "lr": state.optimizer.param_groups[0]["lr"],
            "seconds": round(state.clock.seconds, 3),
            "samples_per_second": round(state.clock.lap() or state.clock.samples_per_second, 1),
        }
        self.recorder.evaluation(line, metrics, best=improved)
        for name, value in metrics.items():
            if not math.isfinite(value):
                text = f"{name} is {value} at step {state.step}; it counts as no improvement"
                self.recorder.warn(text, step=state.step)
        self.pruned = self.judge(line, settings)
        state.clock.start()
        return improved

    def report_skipped(self) -> None:
        """Warn of steps skipped since the last call; raises NumericalError if no step may be skipped."""
        for text in self.state.guard.report():
            self.recorder.warn(text, step=self.state.step)

    def stop_clock(self) -> None:
        """Stop the clock once the device has computed the steps that were launched."""
        synchronize(self.training.device)
        self.state.clock.stop()

    # Checkpoints

    def commit(self, *, evaluated: bool, improved: bool, ends: bool) -> None:
        """End the step: from here on, a checkpoint may save the state."""
        self.state.settle()
        self.saver.check()
        wanted = {  # `best` first: a crash in between must not leave a `last` that refers to a missing best
            "best": improved,
            "last": evaluated or ends,
            "step": due(self.state.step, self.settings.checkpoint_every),
        }
        if kinds := [kind for kind, is_wanted in wanted.items() if is_wanted]:
            self.stop_clock()
            self.save(kinds)
            self.state.clock.start()

    def save(self, kinds: list[str]) -> None:
        """Start to write a checkpoint of this step in the background."""
        self.report_skipped()
        self.recorder.flush()
        keep = {"last": 2, "best": 2, "step": self.settings.checkpoint_keep}
        self.saver.wait()  # so at most one copy of the state waits to be written
        self.saver.save(kinds, self.state.state_dict(), keep=keep)


def reason_to_stop(
    settings: Settings, state: TrainState, interrupts: Interrupts, *, pruned: bool = False
) -> str | None:
    """Return why training ends at the present step, or None."""
    if interrupts.received is not None:
        return interrupts.received.name
    if state.early_stopping.stopped:
        return "early_stopping"
    if state.step >= settings.total_steps:
        return settings.budget
    if pruned:
        return "pruned"
    minutes = settings.max_minutes
    return "max_minutes" if minutes is not None and state.clock.seconds >= minutes * 60 else None


def reseed(seed: int, device: torch.device) -> None:
    """Seed the default generators of CPU and device, from which models draw random values such as those of dropout.

    This takes 2 us for each; `torch.manual_seed` seeds the generators of all devices, which takes 150 us.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        generator_of(device).manual_seed(seed)
