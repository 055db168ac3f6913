"""The recorder: takes each report of a run once, and passes it to every place that shows it.

    evaluation   -> metrics.jsonl, TensorBoard, terminal (and train.log)
    step         -> TensorBoard, terminal
    warn, event  -> events.jsonl, terminal

metrics.jsonl and events.jsonl belong to the run: if they cannot be written, the run ends. TensorBoard and the terminal
only show it: if they fail, the run continues without them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.report.tensorboard_writer import TensorBoard
from trainer.report.terminal import Display
from trainer.storage.run_folder import RunFolder


class Recorder:
    """Records one run. `resumed_at`: the step that the run is resumed at; later events in TensorBoard are discarded."""

    def __init__(self, folder: RunFolder, *, total_steps: int, resumed_at: int | None = None) -> None:
        self.folder = folder
        self.display = Display(folder.path / "train.log", total_steps=total_steps)
        self.tensorboard = TensorBoard(folder.path, resumed_at=resumed_at)

    # During training

    def progress(self, step: int, epoch: float) -> None:
        """Move the progress bar, a few times per second at most."""
        if self.display.is_moved:
            self.display.move(step, epoch)

    def step(self, step: int, epoch: float, measurements: Mapping[str, float]) -> None:
        """Record the measurements of the steps since the last log line."""
        self.tensorboard.scalars(measurements, step)
        self.display.figures(step, epoch, measurements)

    def evaluation(self, line: Mapping[str, Any], metrics: Mapping[str, float], *, best: bool) -> None:
        """Record a line of metrics.jsonl; `metrics` are those of its values that are named split/metric."""
        self.folder.append_metrics(line)
        self.tensorboard.scalars(metrics, line["step"])
        self.display.evaluation(line, best=best)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Record every parameter and its gradient."""
        self.tensorboard.histograms(model, step)

    # At any time

    def say(self, text: str) -> None:
        """Show a line."""
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
        """Show a batch (B, C, H, W) of floats in [0, 1]."""
        self.tensorboard.images(tag, images, 0)

    def graph(self, model: nn.Module, images: Tensor) -> None:
        """Show the graph of the model, traced on images (B, C, H, W)."""
        if self.tensorboard.broken:
            return
        try:
            self.tensorboard.graph(model, images)
        except Exception as exception:  # the tracer raises anything; a run does not end for a drawing
            text = f"no graph in TensorBoard, as the network cannot be traced: {type(exception).__name__}"
            self.warn(text, step=0)

    def changes(self, changes: Sequence[str], *, step: int) -> None:
        """Show what a resume has changed in the config."""
        for text in changes:
            self.say(f"  {text}")
        if changes:
            self.tensorboard.changes(changes, step)

    def finish(self, record: Mapping[str, Any], test: Mapping[str, float], step: int) -> None:
        """Record the test metrics."""
        self.tensorboard.finish(record, {f"test/{name}": value for name, value in test.items()}, step)

    def summary(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Show the summary as a table."""
        self.display.summary(summary, folder)

    def flush(self) -> None:
        """Write what is buffered: a checkpoint must never count a step that TensorBoard does not show."""
        self.tensorboard.flush()

    def close(self) -> None:
        """Close TensorBoard."""
        self.tensorboard.close()
