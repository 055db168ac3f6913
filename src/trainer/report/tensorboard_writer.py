"""Write TensorBoard event files into the run folder, so that TensorBoard shows them as one run.

    train/loss val/accuracy ...   at each evaluation, named as in metrics.jsonl
    step/loss step/gradient_norm lr/* momentum/* throughput/*   during training
    images, graph, histograms, the config as text, and HPARAMS with the final metrics

`SummaryWriter.add_hparams` would create a second run in a sub-folder. This module writes the same summaries directly.
"""

import functools
import io
import json
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader, RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from core.config import leaves
from core.durable import write_durably

LOGGER = logging.getLogger("preceptor.tracking")
EVENT_FILES = "events.out.tfevents.*"
HPARAMS_TAGS = {"_hparams_/experiment", "_hparams_/session_start_info"}
EVENT_TIME = re.compile(r"tfevents\.(\d+)\.")
MAIN_HYPERPARAMETERS = ("data", "data.batch_size", "model", "optimizer.lr", "seed")
FINAL_METRICS = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "train/accuracy", "train/loss")
# The charts of the tab "Custom scalars". The tab "Time series" sorts its charts by their tags.
OVERVIEW = {
    "Overview": {name: ["Multiline", [rf"^(train|val|test)/{name}$"]] for name in ("loss", "accuracy")}
    | {"learning rate": ["Multiline", ["^lr/"]]}
}

Method = TypeVar("Method", bound=Callable[..., None])


def disable_on_error(method: Method) -> Method:
    """Return a method that never raises: if it fails, one warning is logged and TensorBoard is disabled."""

    @functools.wraps(method)
    def guarded(self: "TensorBoard", *arguments: Any, **named: Any) -> None:
        if self.broken:
            return
        try:
            method(self, *arguments, **named)
        except Exception as exception:
            self.broken = True
            LOGGER.warning("TensorBoard fails and is disabled: %s: %s", type(exception).__name__, exception)

    return cast(Method, guarded)


class WriterErrors:
    """Exception hook that silences the threads that write events, while any event file is open.

    The next call of the writer raises such a thread's exception again, and `disable_on_error` reports it.
    The previous `threading.excepthook` handles all other threads. It is restored when the last event file is closed.
    """

    def __init__(self) -> None:
        self._open = 0
        self._previous_hook = threading.excepthook

    def silence(self) -> None:
        """Register an opened event file."""
        if self._open == 0:
            self._previous_hook, threading.excepthook = threading.excepthook, self._excepthook
        self._open += 1

    def restore(self) -> None:
        """Register a closed event file."""
        self._open -= 1
        if self._open == 0:
            threading.excepthook = self._previous_hook

    def _excepthook(self, details: Any) -> None:
        if type(details.thread).__module__ != event_file_writer.__name__:
            self._previous_hook(details)


WRITER_ERRORS = WriterErrors()


def sort_before(files: Iterable[Path], now: int) -> None:
    """Rename event files so that their names sort before a file started at the time `now`, in seconds.

    TensorBoard reads event files in the order of their names, which start with the time. If this computer's clock is
    slow, TensorBoard would read a resumed run before the run that it continues.
    """
    for file in sorted(files, reverse=True):
        match = EVENT_TIME.search(file.name)
        if match is None:
            continue
        now = min(int(match[1]), now - 1)
        if now != int(match[1]):
            file.rename(file.with_name(file.name.replace(match[0], f"tfevents.{now:010d}.", 1)))


class TensorBoard:
    """Writer of a run's event file. After a resume at step `resumed_at`, old events of later steps are hidden."""

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        self.folder = folder
        self.resumed_at = resumed_at
        self.broken = False
        WRITER_ERRORS.silence()
        self.open()

    @disable_on_error
    def open(self) -> None:
        """Open a new event file."""
        purge = None if self.resumed_at is None else self.resumed_at + 1
        sort_before(self.folder.glob(EVENT_FILES), int(time.time()))
        self.writer = SummaryWriter(str(self.folder), purge_step=purge, max_queue=1000, flush_secs=60)
        self.events: Any = self.writer.file_writer  # for summaries that SummaryWriter has no method for

    @disable_on_error
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by tag. At the step of a resume, tags that a killed process has already written are skipped."""
        existing = tags_at(self.folder, step) if step == self.resumed_at else set()
        # One event for all values: `add_scalar` would write one event per value and take three times as long.
        new = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if tag not in existing]
        self.events.add_summary(Summary(value=new), step)

    @disable_on_error
    def config(self, record: Mapping[str, Any]) -> None:
        """Write the config as text, and its values as the HPARAMS of this run."""
        text = yaml.safe_dump(dict(record), sort_keys=False)
        self.writer.add_text("config", "```yaml\n" + text + "```", 0)
        self.writer.add_custom_scalars(OVERVIEW)
        self._hparams(record)

    def _hparams(self, record: Mapping[str, Any]) -> None:
        """Write the HPARAMS of the run; a debug run has none."""
        if "debug" in record.get("choices", {}):
            return
        experiment, start, _ = hparams(hyperparameters(record), dict.fromkeys(FINAL_METRICS, 0.0))
        for summary in (_main_columns_first(experiment), start):
            self.events.add_summary(summary)

    @disable_on_error
    def changes(self, changes: Sequence[str], record: Mapping[str, Any], step: int) -> None:
        """Write the config values that a resume has changed, as text, and replace the HPARAMS by the current ones.

        `lr/*` and `momentum/*` use the new values from `step`.
        """
        for file in sorted(self.folder.glob(EVENT_FILES)):
            remove_hparams(file)  # TensorBoard shows the first of a folder only
        self._hparams(record)
        self.writer.add_text("changes", "\n\n".join(changes), step)

    @disable_on_error
    def finish(self, record: Mapping[str, Any], final: Mapping[str, float], step: int) -> None:
        """Write the test metrics and the end of the HPARAMS session."""
        self.scalars(final, step)
        if "debug" not in record.get("choices", {}):
            _, _, end = hparams(hyperparameters(record), {})
            self.events.add_summary(end)

    @disable_on_error
    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Write at most 64 images of a batch (B, C, H, W) of floats in [0, 1] as a grid."""
        self.writer.add_image(tag, grid(images[:64]), step)

    @disable_on_error
    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure as an image."""
        self.writer.add_figure(tag, figure, step)

    def graph(self, model: nn.Module, images: Tensor) -> None:
        """Write the model's graph, traced in evaluation mode on the first two images of a batch (B, C, H, W)."""
        was_training = model.training
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer is deprecated, but TensorBoard needs it
            self.writer.add_graph(model.eval(), images[:2])
        model.train(was_training)

    @disable_on_error
    def histograms(self, model: nn.Module, step: int) -> None:
        """Write a histogram of every parameter, and of its gradient if it has one."""
        for name, parameter in model.named_parameters():
            self._histogram(f"weights/{name}", parameter.detach(), step)
            if parameter.grad is not None:
                self._histogram(f"gradients/{name}", parameter.grad, step)

    def _histogram(self, tag: str, values: Tensor, step: int) -> None:
        if torch.isfinite(values).all():  # a scaled fp16 gradient sometimes overflows
            self.writer.add_histogram(tag, values.float(), step)

    @disable_on_error
    def flush(self) -> None:
        """Write buffered events, so that every step counted in a checkpoint is in the event file."""
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._close_writer()
        WRITER_ERRORS.restore()

    @disable_on_error
    def _close_writer(self) -> None:
        self.writer.close()


def tags_at(folder: Path, step: int) -> set[str]:
    """Return the tags that a folder's event files have at a step; a truncated event ends its file."""
    tags: set[str] = set()
    for path in sorted(folder.glob(EVENT_FILES)):
        for event in EventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START and event.step <= step:
                tags.clear()  # a resume from this or an earlier step discards them
            elif event.step == step:
                tags |= {value.tag for value in event.summary.value}
    return tags


def remove_hparams(file: Path) -> None:
    """Remove the start of HPARAMS sessions from an event file; all other events keep their bytes."""
    content, removed = io.BytesIO(), 0
    writer = RecordWriter(content)
    for data in RawEventFileLoader(str(file)).Load():
        if {value.tag for value in Event.FromString(data).summary.value} & HPARAMS_TAGS:
            removed += 1
        else:
            writer.write(data)
    if removed:
        write_durably(file, content.getvalue())


def grid(images: Tensor, *, columns: int = 8, border: int = 2) -> Tensor:
    """Return images (B, C, H, W) as one image on grey.

    Its shape is (C, rows (H + border) + border, columns (W + border) + border).
    """
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cell_height, cell_width = height + border, width + border
    canvas = images.new_full((channels, rows * cell_height + border, columns * cell_width + border), 0.5)
    for index, image in enumerate(images):
        top, left = index // columns * cell_height + border, index % columns * cell_width + border
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def _main_columns_first(experiment: Any) -> Any:
    """Mark the main hyperparameters as different between runs in an HPARAMS experiment summary, and return it.

    HPARAMS initially shows five columns: first those marked as different, then the others in alphabetical order.
    """
    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in MAIN_HYPERPARAMETERS
    plugin_data.content = content.SerializeToString()
    return experiment


def hyperparameters(record: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return the config values that distinguish runs, by dotted name; lists as text, groups as the chosen option."""
    shown = ("seed", "model", "data", "augment", "optimizer", "schedule", "loss", "trainer")
    hidden = ("root", "log_", "download", "_partial_", "_target_", "_every", "memory_budget")
    flat: dict[str, bool | float | str] = {}
    for name, value in leaves({key: record[key] for key in shown if key in record}):
        last = name.rpartition(".")[2]
        if isinstance(value, dict) or any(word in last for word in hidden):
            continue
        flat[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat | dict(record.get("choices", {}))
