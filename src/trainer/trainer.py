"""The loop.

    fit:  schedule -> forward, loss, backward -> L1, clip -> check -> update -> average -> log, evaluate -> commit

Everything that changes the weights or ends the run stands in `fit`, in the order in which it happens. The step is the
only counter, all randomness is a function of it, and a run goes on from any commit point to the same bits.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from core.errors import NumericalError, StopSignal, StorageError, is_out_of_memory
from core.seeding import fold
from trainer.clock import Clock
from trainer.display import Display
from trainer.durations import due
from trainer.early_stopping import EarlyStopping
from trainer.ema import ExponentialMovingAverage
from trainer.finite import FiniteGuard
from trainer.interrupts import Interrupts
from trainer.losses import Objective
from trainer.metrics import RunningSums, evaluate, improves
from trainer.run_folder import RunFolder
from trainer.schedules import Schedule, momentum_of
from trainer.settings import Settings
from trainer.state import snapshot
from trainer.tracking import TensorBoard

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # images (B, C, H, W), labels (B,), sample indices (B,)


class StepLoader(Protocol):
    """The training data as the loop sees it."""

    steps_per_epoch: int
    samples_per_epoch: int

    def steps(self, epoch: int, start: int = 0) -> Iterable[Sequence[tuple[Tensor, Tensor, Tensor]]]:
        """The batches of each step of an epoch, from its step `start` on; their labels may be probabilities (B, K)."""

    def pictures(self, epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """The batches of an epoch, augmented, but with pixels of 0 to 255 still."""


class Normalisation(Protocol):
    """What turns pixels into the network's input."""

    tensors: dict[str, Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of 0 to 255 to float32."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Become the one with these tensors."""


@dataclass(kw_only=True)
class Trainer:
    """One run: what `trainer.build` put together, the state of the loop, and where it leaves its traces."""

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
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    device: torch.device
    data_values: Mapping[str, Any]  # class names, fingerprint, sizes: what a checkpoint must tell of its data
    normalisation: Normalisation  # the one that all loaders use
    record: Mapping[str, Any]  # the config, as it may be written down
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.step = 0
        self.stop_reason: str | None = None
        self.best: dict[str, Any] = {}  # step, epoch and metrics of the best evaluation
        self.sums = RunningSums(self.device)
        self.clock = Clock()
        self.objective = Objective(self.loss_function, auxiliary_weight=self.auxiliary_weight)
        self.guard = FiniteGuard(self.optimizer, scaler=self.scaler, device=self.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def attach(self, folder: RunFolder, tracker: TensorBoard, display: Display) -> None:
        """Where the run leaves its traces."""
        self.folder, self.tracker, self.display = folder, tracker, display

    @property
    def epoch(self) -> float:
        """Epochs done: 3 after the third, 2.5 in its middle."""
        epochs = self.step / self.train_loader.steps_per_epoch
        return int(epochs) if epochs.is_integer() else round(epochs, 4)

    @property
    def next_step(self) -> str:
        """The step that is being made, as errors name it."""
        return f"step {self.step + 1} (epoch {self.epoch})"

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average where there is one."""
        return self.ema.average if self.ema else self.model

    def run(self) -> float | None:
        """Fit, keep a record of a failure, and close what is open; returns the best monitored value."""
        try:
            with self.display:
                self.fit()
        except Exception as exception:
            error = self.as_told(exception)
            self.stop_reason = str(error)
            with suppress(StorageError):
                self.summarise("failed")
            if error is exception:
                raise
            raise error from exception
        finally:
            with suppress(OSError):  # on a full disk the first error is the one to tell
                self.tracker.close()
            self.folder.close()
        return self.best.get("metrics", {}).get(self.settings.monitor)

    def as_told(self, exception: Exception) -> Exception:
        """What the system or torch raised, as one of our errors where the user can mend it."""
        if isinstance(exception, OSError):
            place = exception.filename or str(self.folder.path)
            return StorageError(place, f"{self.next_step}: {exception.strerror or exception}")
        if is_out_of_memory(exception):
            return NumericalError(
                self.next_step, "out of memory; try a smaller data.batch_size with a larger trainer.accumulate"
            )
        return exception

    def is_finished(self, folder: RunFolder) -> bool:
        """Was this run trained to its end, and tested, before?"""
        self.stop_reason = self.reason_to_stop(Interrupts())
        summary = folder.read_summary()
        ended = summary.get("status") in ("finished", "stopped_early")
        return self.stop_reason is not None and ended and summary.get("step") == self.step

    # The loop

    def fit(self) -> dict[str, Any]:
        """Train to the end from wherever the state is, test the best weights, and return summary.json's content."""
        settings, optimizer = self.settings, self.optimizer
        with Interrupts() as interrupts:
            self.stop_reason = self.reason_to_stop(interrupts)
            while not self.stop_reason:
                self.model.train()
                self.clock.start()
                epoch, done = divmod(self.step, self.train_loader.steps_per_epoch)
                for batches in self.train_loader.steps(epoch, start=done):
                    self.schedule.apply(optimizer, self.step)
                    reseed(fold(settings.seed, "dropout", self.step), self.device)
                    samples = sum(len(targets) for _, targets, _ in batches)
                    step_loss = torch.zeros((), device=self.device)
                    for images, targets, _ in batches:
                        with self.autocast:
                            minimised, loss, logits = self.objective(self.forward(images), targets)
                        share = minimised * (len(targets) / samples)
                        self.scaler.scale(share).backward()
                        step_loss += share.detach()
                        self.sums.add(loss, logits, targets)
                    self.scaler.unscale_(optimizer)
                    self.add_l1()
                    norm = self.clip_gradients()
                    self.guard.check(step_loss, norm, (indices for _, _, indices in batches), step=self.next_step)
                    self.scaler.step(optimizer)
                    self.scaler.update()
                    self.step += 1
                    if self.ema:
                        self.ema.update(self.model, self.step)
                    self.clock.samples += samples

                    self.log_step(norm)
                    evaluated = due(self.step, settings.evaluate_every, total_steps=settings.total_steps)
                    improved = self.evaluate() if evaluated else False
                    optimizer.zero_grad(set_to_none=True)
                    self.stop_reason = self.reason_to_stop(interrupts)
                    self.commit(evaluated=evaluated, improved=improved)
                    if self.stop_reason:
                        break
                self.clock.stop()
            return self.finish(interrupts)

    @torch.no_grad()
    def add_l1(self) -> None:
        """The gradient of l1 * sum |w|, which is l1 * sign(w) and 0 at 0: once a step, however many batches it has."""
        for weight in self.penalised if self.settings.l1 else ():
            if weight.grad is not None:
                weight.grad.add_(weight.sign(), alpha=self.settings.l1)

    def clip_gradients(self) -> Tensor:
        """The L2 norm of all gradients, a scalar on the device; they are cut down to `clip_norm` where it is set."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.settings.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        return norm

    def reason_to_stop(self, interrupts: Interrupts) -> str | None:
        """Why training ends at this step, or None."""
        if interrupts.received is not None:
            return interrupts.received.name
        if self.early_stopping.stopped:
            return "early_stopping"
        if self.step >= self.settings.total_steps:
            return self.settings.budget
        minutes = self.settings.max_minutes
        return "max_minutes" if minutes is not None and self.clock.seconds >= minutes * 60 else None

    # Logs and evaluation

    def log_step(self, norm: Tensor) -> None:
        """Figures of the steps since the last log line, where one is due."""
        self.display.tick(self.step, self.epoch)
        if due(self.step, self.settings.histograms_every):
            self.tracker.histograms(self.model, self.step)
        if not due(self.step, self.settings.log_every, total_steps=self.settings.total_steps):
            return
        figures = {f"step/{name}": value for name, value in self.sums.read().items()}  # waits for the device
        self.guard.refuse_skipped(step=self.next_step)
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

    def evaluate(self) -> bool:
        """Measure, write it down, and tell those who decide by it; True when it is the best so far."""
        metrics = {f"train/{name}": value for name, value in self.sums.read_total().items()}  # waits for the device
        self.guard.refuse_skipped(step=self.next_step)
        self.clock.stop()
        if self.val_loader is not None:
            measured = evaluate(self.evaluated_model, self.loss_function, self.val_loader, autocast=self.autocast)
            metrics |= {f"val/{name}": value for name, value in measured.items()}
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
            "samples_per_second": round(self.clock.lap(), 1),
        }
        self.folder.append_metrics(line)
        self.tracker.scalars(metrics, self.step)
        self.display.evaluation(line, best=improved)
        for name, value in metrics.items():
            if not math.isfinite(value):
                self.warn(f"{name} is {value} at step {self.step}; it counts as no improvement")
        self.clock.start()
        return improved

    def warn(self, text: str) -> None:
        """To the terminal, train.log and events.jsonl."""
        self.display.warn(text)
        self.folder.append_event("warning", step=self.step, text=text)

    def commit(self, *, evaluated: bool, improved: bool) -> None:
        """The one commit point of a step: whatever a checkpoint holds is settled now."""
        wanted = {  # the best first: a crash in between must not leave a `last` that names a best which is not there
            "best": improved,
            "last": evaluated or self.stop_reason is not None,
            "step": due(self.step, self.settings.checkpoint_every),
        }
        kinds = [kind for kind, is_wanted in wanted.items() if is_wanted]
        if not kinds:
            return
        self.guard.refuse_skipped(step=self.next_step)
        self.clock.stop()
        self.tracker.flush()  # never count a step that TensorBoard has not seen
        keep = {"last": 2, "best": 2, "step": self.settings.checkpoint_keep}
        self.folder.checkpoints.save(kinds, snapshot(self), keep=keep)
        self.clock.start()

    # The end

    def finish(self, interrupts: Interrupts) -> dict[str, Any]:
        """Test the best weights and write summary.json; a run stopped by a signal is not tested but saved."""
        test: dict[str, float] = {}
        if interrupts.received is None:
            if self.best:
                best, _, damaged = self.folder.checkpoints.load("best")
                for text in damaged:
                    self.warn(text)
                self.evaluated_model.load_state_dict(best.weights)
            if self.test_loader is not None:
                test = evaluate(self.evaluated_model, self.loss_function, self.test_loader, autocast=self.autocast)
        if interrupts.received is None:  # not during the test either: the resumed run will write it
            self.tracker.finish(self.record, {f"test/{name}": value for name, value in test.items()}, self.step)
        status = "finished" if self.stop_reason == self.settings.budget else "stopped_early"
        summary = self.summarise("interrupted" if interrupts.received else status, test=test)
        self.display.summary(summary, self.folder.path)
        if interrupts.received is not None:
            self.display.say(f"saved; go on with resume={self.folder.path}")
            raise StopSignal(interrupts.exit_code)
        return summary

    def summarise(self, status: str, *, test: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Write summary.json."""
        summary = {
            "status": status,
            "stop_reason": self.stop_reason,
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best,
            "test": dict(test or {}),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "seconds": round(self.clock.seconds, 3),
            "samples_per_second": round(self.clock.samples_per_second, 1),
            "seed": self.settings.seed,
            "provenance": dict(self.provenance),
        }
        self.folder.write_summary(summary)
        return summary


def reseed(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from, generator by generator (2 us); torch.manual_seed visits every backend (150 us)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
