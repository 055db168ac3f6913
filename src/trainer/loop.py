"""The loop.

    fit:       schedule -> forward, loss, backward -> L1, clip -> check -> update -> average -> log -> conclude
    conclude:  evaluate, decide -> commit

Everything that changes the weights or ends the run stands there, in the order in which it happens. The step is the
only counter, all randomness is a function of it, and a run goes on from any commit point to the same bits. An
evaluation that there was no time for is put off: the run that goes on begins with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from core.errors import NumericalError, StopSignal, as_ours
from core.seeding import fold
from trainer.build.durations import due
from trainer.end import finish, summarise
from trainer.inference.tta import with_tta
from trainer.interfaces import Batches, Normalisation, StepLoader
from trainer.monitor.clock import Clock
from trainer.monitor.early_stopping import EarlyStopping
from trainer.monitor.interrupts import Interrupts
from trainer.monitor.metrics import NOTED, RunningSums, evaluate, improves
from trainer.monitor.nonfinite import FiniteGuard
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.losses import Objective
from trainer.optim.schedules import Schedule, momentum_of
from trainer.report.tensorboard_writer import TensorBoard
from trainer.report.terminal import Display
from trainer.settings import Settings
from trainer.state import snapshot
from trainer.storage.checkpoint import BackgroundSaver
from trainer.storage.run_folder import RunFolder


@dataclass(kw_only=True)
class Trainer:
    """One run: what `trainer.build.training` put together, the state of the loop, and where it leaves its traces."""

    settings: Settings
    model: nn.Module  # the network itself: its state is saved and evaluated
    forward: nn.Module  # the same network as the step calls it: compiled perhaps
    loss_function: nn.Module
    auxiliary_weight: float  # of each auxiliary head's loss in what is minimised
    penalised: Sequence[nn.Parameter]  # what L1 shrinks
    optimizer: Optimizer
    schedule: Schedule
    train_loader: StepLoader
    val_loader: Batches | None
    test_loader: Batches | None
    early_stopping: EarlyStopping
    ema: ExponentialMovingAverage | None
    autocast: AbstractContextManager[object]
    scaler: torch.amp.GradScaler
    device: torch.device
    data_values: Mapping[str, Any]  # class names, fingerprint, sizes: what a checkpoint must tell of its data
    normalisation: Normalisation  # the one that all loaders use
    record: Mapping[str, Any]  # the config, as it may be written down
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.step = 0
        self.evaluated = 0  # the step of the last evaluation
        self.settled = True  # is the state one that a checkpoint may hold? Not within a step, nor while deciding
        self.stop_reason: str | None = None
        # What a sweep says to each evaluation: is this run not worth going on with? It can be resumed all the same.
        self.judge: Callable[[Mapping[str, Any]], bool] = lambda line: False
        self.pruned = False
        self.best: dict[str, Any] = {}  # step, epoch and metrics of the best evaluation
        self.sums = RunningSums()
        self.clock = Clock()
        self.objective = Objective(self.loss_function, auxiliary_weight=self.auxiliary_weight)
        self.interrupts = Interrupts()
        self.guard = FiniteGuard(
            self.optimizer,
            scaler=self.scaler,
            device=self.device,
            skips=self.settings.skips,
            name_of=self.name_of,
            put_back=list(self.model.buffers()),
            take_back=self.sums.take_back,
        )
        # A network may hold infinities on purpose, as masks do: they are no sign of anything.
        self.constants = {name for name, buffer in self.model.named_buffers() if not torch.isfinite(buffer).all()}
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def attach(self, folder: RunFolder, tracker: TensorBoard, display: Display, closing: ExitStack) -> None:
        """Where the run leaves its traces; `closing` closes them, and what else is open, at the run's end."""
        self.folder, self.tracker, self.display, self.closing = folder, tracker, display, closing
        self.saver = BackgroundSaver(folder.checkpoints, saved=self.step)
        closing.callback(tracker.close)
        closing.callback(self.saver.close)

    @property
    def epoch(self) -> float:
        """Epochs done: 3 after the third, 2.5 in its middle."""
        return self.epochs_at(self.step)

    def epochs_at(self, step: int) -> float:
        epochs = step / self.train_loader.steps_per_epoch
        return int(epochs) if epochs.is_integer() else round(epochs, 4)

    def name_of(self, step: int) -> str:
        """A step as errors name it, with the epochs before it."""
        return f"step {step} (epoch {self.epochs_at(step - 1)})"

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average where there is one."""
        return self.ema.average if self.ema else self.model

    def measure(self, batches: Batches) -> dict[str, float] | None:
        """Loss and accuracy of the evaluated network; None when a signal asks the run to stop meanwhile."""
        return evaluate(
            *(with_tta(self.evaluated_model, self.settings.tta), self.loss_function, batches),
            autocast=self.autocast,
            abandon=self.interrupts.asked,
        )

    def run(self) -> float | None:
        """Fit, keep a record of a failure, and close what is open; returns the best monitored value."""
        with self.closing, self.display:
            try:
                self.fit()
            except Exception as exception:
                error = as_ours(exception, place=str(self.folder.path), step=self.name_of(self.step + 1))
                self.stop_reason = str(error)
                with suppress(Exception):  # the first error is the one to tell
                    self.keep_last_step(exception)
                with suppress(Exception):
                    summarise(self, "failed")
                if error is exception:
                    raise
                raise error from exception
        if self.interrupts.received is not None:  # in the last moment: a grid of runs is to end with it
            raise StopSignal(self.interrupts.exit_code)
        return self.best.get("metrics", {}).get(self.settings.monitor)

    def keep_last_step(self, exception: Exception) -> None:
        """What fails between steps, as reading data may, costs none of them; after NaN nothing is saved."""
        self.saver.retry()
        if self.settled and self.step > self.saver.saved and not isinstance(exception, NumericalError):
            self.save(["best", "last"] if self.best.get("step") == self.step else ["last"])
        self.saver.wait()

    def is_finished(self, folder: RunFolder) -> bool:
        """Was this run trained to its end, and tested, before?"""
        self.stop_reason = self.reason_to_stop()
        summary = folder.read_summary()
        ended = summary.get("status") in ("finished", "stopped_early")
        return self.stop_reason is not None and ended and summary.get("step") == self.step

    # The loop

    def fit(self) -> dict[str, Any]:
        """Train to the end from wherever the state is, test the best weights, and return summary.json's content."""
        settings, optimizer = self.settings, self.optimizer
        if self.evaluation_is_due():
            self.schedule.apply(optimizer, self.step - 1)  # it tells the rate of the step that it follows
            self.conclude()
        else:
            self.stop_reason = self.reason_to_stop()
        while not self.stop_reason:
            self.model.train()
            self.clock.start()
            per_epoch = self.train_loader.steps_per_epoch
            epoch, done = divmod(self.step, per_epoch)
            seeds = [fold(settings.seed, "dropout", step) for step in range(self.step, self.step - done + per_epoch)]
            for batches, seed in zip(self.train_loader.steps(epoch, start=done), seeds, strict=True):
                self.settled = False
                self.guard.remember()
                self.schedule.apply(optimizer, self.step)
                reseed(seed, self.device)
                samples = sum(targets.size(0) for _, targets, _ in batches)
                losses: list[Tensor] = []
                for images, targets, _ in batches:
                    with self.autocast:
                        minimised, loss, logits = self.objective(self.forward(images), targets)
                    if len(batches) > 1:
                        minimised = minimised * (len(targets) / samples)
                    self.scaler.scale(minimised).backward()
                    losses.append(minimised.detach())
                    self.sums.add(loss, logits, targets)
                self.scaler.unscale_(optimizer)
                if self.settings.l1:
                    self.add_l1()
                norm = self.clip_gradients()
                indices = [indices for _, _, indices in batches]
                if self.guard.allows(reduce(torch.add, losses), norm, indices, step=self.step + 1):
                    self.scaler.step(optimizer)
                self.scaler.update()
                self.step += 1
                if self.ema:
                    self.ema.update(self.model, self.step)
                self.clock.samples += samples
                self.log_step(norm)
                for parameter in self.parameters:
                    parameter.grad = None
                self.settled = True
                self.conclude()
                if self.stop_reason:
                    break
            self.clock.stop()
        return finish(self)

    def conclude(self) -> None:
        """What follows a step: evaluate where that is due, decide whether to stop, commit."""
        improved = self.evaluate() if self.evaluation_is_due() and not self.interrupts.received else None
        self.stop_reason = self.reason_to_stop()
        self.commit(evaluated=improved is not None, improved=bool(improved))

    def evaluation_is_due(self) -> bool:
        """At this step, and not made yet: a run may be stopped before it."""
        settings = self.settings
        return self.step > self.evaluated and due(self.step, settings.evaluate_every, total_steps=settings.total_steps)

    @torch.no_grad()
    def add_l1(self) -> None:
        """The gradient of l1 * sum |w|, which is l1 * sign(w) and 0 at 0: once a step, however many batches it has."""
        for weight in self.penalised:
            if weight.grad is not None:
                weight.grad.add_(weight.sign(), alpha=self.settings.l1)

    def clip_gradients(self) -> Tensor:
        """The L2 norm of all gradients, a scalar on the device; they are cut down to `clip_norm` where it is set."""
        gradients = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.settings.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        return norm

    def reason_to_stop(self) -> str | None:
        """Why training ends at this step, or None."""
        if self.interrupts.received is not None:
            return self.interrupts.received.name
        if self.early_stopping.stopped:
            return "early_stopping"
        if self.step >= self.settings.total_steps:
            return self.settings.budget
        if self.pruned:
            return "pruned"
        minutes = self.settings.max_minutes
        return "max_minutes" if minutes is not None and self.clock.seconds >= minutes * 60 else None

    # Logs and evaluation

    def log_step(self, norm: Tensor) -> None:
        """Figures of the steps since the last log line, where one is due."""
        if self.display.is_to_move:
            self.display.move(self.step, self.epoch)
        self.sums.sum_up(at_least=NOTED)
        if due(self.step, self.settings.histograms_every):
            self.tracker.histograms(self.model, self.step)
        if not due(self.step, self.settings.log_every, total_steps=self.settings.total_steps):
            return
        figures = {f"step/{name}": value for name, value in self.sums.read().items()}  # waits for the device
        self.tell_skipped()
        figures["step/gradient_norm"] = norm.item()
        for group in self.optimizer.param_groups:
            figures[f"rate/{group['name']}"] = group["lr"]
            if (momentum := momentum_of(group)) is not None:
                figures[f"momentum/{group['name']}"] = momentum
        self.clock.stop()
        figures["throughput/samples_per_second"] = self.clock.samples_per_second
        self.clock.start()
        self.tracker.scalars(figures, self.step)
        self.display.figures(self.step, self.epoch, figures)

    def evaluate(self) -> bool | None:
        """Measure, write it down, and tell those who decide by it; True when it is the best so far.

        None when a signal asks the run to stop meanwhile: then nothing has happened.
        """
        self.clock.stop()
        measured: dict[str, float] | None = {}
        if self.val_loader is not None:
            measured = self.measure(self.val_loader)
        if measured is None:
            return None
        self.settled = False
        metrics = {f"train/{name}": value for name, value in self.sums.read_total().items()}  # waits for the device
        metrics |= {f"val/{name}": value for name, value in measured.items()}
        self.tell_skipped()
        self.evaluated = self.step
        monitor = self.settings.monitor
        improved = monitor is not None and improves(
            metrics[monitor], self.best.get("metrics", {}).get(monitor), mode=self.settings.monitor_mode
        )
        if improved:
            self.best = {"step": self.step, "epoch": self.epoch, "metrics": metrics}
        self.schedule.observe(metrics)
        epochs = self.step / self.train_loader.steps_per_epoch  # not rounded: this decides
        self.early_stopping.observe(metrics.get(self.early_stopping.monitor, math.nan), epochs)
        line = {
            "step": self.step,
            "epoch": self.epoch,
            **metrics,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.clock.seconds, 3),
            "samples_per_second": round(self.clock.lap() or self.clock.samples_per_second, 1),
        }
        self.folder.append_metrics(line)
        self.tracker.scalars(metrics, self.step)
        self.display.evaluation(line, best=improved)
        for name, value in metrics.items():
            if not math.isfinite(value):
                self.warn(f"{name} is {value} at step {self.step}; it counts as no improvement")
        self.pruned = self.judge(line)
        self.clock.start()
        return improved

    def warn(self, text: str) -> None:
        """To the terminal, train.log and events.jsonl."""
        self.display.warn(text)
        self.folder.append_event("warning", step=self.step, text=text)

    def tell_skipped(self) -> None:
        """Steps that were skipped since the last look; NumericalError where none may be."""
        for text in self.guard.skipped(step=self.step + 1):
            self.warn(text)

    def commit(self, *, evaluated: bool, improved: bool) -> None:
        """The one commit point of a step: whatever a checkpoint holds is settled now."""
        self.settled = True
        self.saver.check()
        wanted = {  # the best first: a crash in between must not leave a `last` that names a best which is not there
            "best": improved,
            "last": evaluated or self.stop_reason is not None,
            "step": due(self.step, self.settings.checkpoint_every),
        }
        if kinds := [kind for kind, is_wanted in wanted.items() if is_wanted]:
            self.clock.stop()
            self.save(kinds)
            self.clock.start()

    def save(self, kinds: list[str]) -> None:
        """A checkpoint of this step, written behind the training's back."""
        self.tell_skipped()
        self.tracker.flush()  # never count a step that TensorBoard has not seen
        keep = {"last": 2, "best": 2, "step": self.settings.checkpoint_keep}
        self.saver.wait()  # so that no more than one copy of the state waits to be written
        self.saver.save(kinds, snapshot(self), keep=keep)


def reseed(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from, generator by generator (2 us); torch.manual_seed visits every backend (150 us)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
