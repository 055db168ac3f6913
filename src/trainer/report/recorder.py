"""Recorder of a run: it distributes each report to files, TensorBoard and the terminal.

    evaluation   -> metrics.jsonl, TensorBoard, terminal (and train.log)
    step         -> TensorBoard, terminal
    warn, event  -> events.jsonl, terminal

If metrics.jsonl or events.jsonl cannot be written, the run ends with an error. If TensorBoard or the terminal fails,
the run continues without it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.report.tensorboard_writer import TensorBoard
from trainer.report.terminal import Display
from trainer.storage.run_folder import RunFolder


class Recorder:
    """Recorder of one run. If it is resumed at step `resumed_at`, TensorBoard discards later events."""

    def __init__(self, folder: RunFolder, *, total_steps: int, resumed_at: int | None = None) -> None:
        self.folder = folder
        self.display = Display(folder.path / "train.log", total_steps=total_steps)
        self.tensorboard = TensorBoard(folder.path, resumed_at=resumed_at)

    # During training

    def progress(self, step: int, epoch: float) -> None:
        """Update the progress bar, at most every 0.2 seconds."""
        if self.display.is_due:
            self.display.move(step, epoch)

    def step(self, step: int, epoch: float, measurements: Mapping[str, float]) -> None:
        """Record the measurements of the steps since the last log line."""
        self.tensorboard.scalars(measurements, step)
        self.display.measurements(step, epoch, measurements)

    def evaluation(self, line: Mapping[str, Any], metrics: Mapping[str, float], *, best: bool) -> None:
        """Record a line of metrics.jsonl; `metrics` are its values with names such as val/accuracy."""
        self.folder.append_metrics(line)
        self.tensorboard.scalars(metrics, line["step"])
        self.display.evaluation(line, best=best)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Record a histogram of every parameter and its gradient."""
        self.tensorboard.histograms(model, step)

    # At any time

    def say(self, text: str) -> None:
        """Print a line to the terminal and train.log."""
        self.display.say(text)

    def warn(self, text: str, *, step: int) -> None:
        """Record a warning."""
        self.display.warn(text)
        self.event("warning", step=step, text=text)

    def event(self, kind: str, **details: Any) -> None:
        """Record a warning, a start, a resume or a change."""
        self.folder.append_event(kind, **details)

    # At the start and the end

    def start(self, record: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Record the config and the provenance of a new run."""
        self.event("start", provenance=dict(provenance))
        self.tensorboard.config(record)

    def images(self, tag: str, images: Tensor) -> None:
        """Write a batch (B, C, H, W) of floats in [0, 1] to TensorBoard."""
        self.tensorboard.images(tag, images, 0)

    def figure(self, tag: str, figure: Any, *, step: int) -> None:
        """Write a matplotlib figure to TensorBoard."""
        self.tensorboard.figure(tag, figure, step)

    def graph(self, model: nn.Module, images: Tensor) -> None:
        """Write the model's graph, traced on images (B, C, H, W), to TensorBoard."""
        if self.tensorboard.broken:
            return
        try:
            self.tensorboard.graph(model, images)
        except Exception as exception:  # the tracer can raise any exception; a missing graph must not end the run
            text = f"no graph in TensorBoard: the model cannot be traced ({type(exception).__name__})"
            self.warn(text, step=0)

    def changes(self, changes: Sequence[str], record: Mapping[str, Any], *, step: int) -> None:
        """Show the config values that a resume has changed; `record` is the new config."""
        for text in changes:
            self.say(f"  {text}")
        if changes:
            self.tensorboard.changes(changes, record, step)

    def finish(self, record: Mapping[str, Any], test: Mapping[str, float], step: int) -> None:
        """Record the test metrics."""
        self.tensorboard.finish(record, {f"test/{name}": value for name, value in test.items()}, step)

    def summary(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Print the summary as a table."""
        self.display.summary(summary, folder)

    def flush(self) -> None:
        """Write buffered events, so that every step counted in a checkpoint is in the event file."""
        self.tensorboard.flush()

    def close(self) -> None:
        """Close the event file."""
        self.tensorboard.close()
