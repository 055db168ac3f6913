"""What TensorBoard shows of a run, written into the run's own folder so that it is one run there.

    train/loss val/accuracy ...   at each evaluation, named as in metrics.jsonl
    step/loss step/gradient_norm lr/* momentum/* throughput/*   along the way
    images, graph, histograms, the config as text, and HPARAMS with the final metrics

`SummaryWriter.add_hparams` would open a second run in a sub-folder; the same summaries are written here by hand.
"""

import functools
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
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from core.config import leaves

LOGGER = logging.getLogger("preceptor.tracking")
EVENT_FILES = "events.out.tfevents.*"
EVENT_TIME = re.compile(r"tfevents\.(\d+)\.")
MAIN_HYPERPARAMETERS = ("data", "data.batch_size", "model", "optimizer.lr", "seed")
FINAL_METRICS = ("test/accuracy", "test/loss", "val/accuracy", "val/loss", "train/accuracy", "train/loss")


Method = TypeVar("Method", bound=Callable[..., None])


def watching(method: Method) -> Method:
    """Wrap a method that only shows the run: if it fails, one warning is logged and TensorBoard is disabled."""

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
    """Silences the threads that write events, while any event file is open.

    What such a thread raises is raised again by the next call of the writer, where `watching` reports it. The caller's
    `threading.excepthook` handles all other threads, and is restored when the last event file is closed.
    """

    def __init__(self) -> None:
        self._open = 0
        self._before = threading.excepthook

    def silence(self) -> None:
        """Count an event file that is opened."""
        if self._open == 0:
            self._before, threading.excepthook = threading.excepthook, self._excepthook
        self._open += 1

    def restore(self) -> None:
        """Count an event file that is closed."""
        self._open -= 1
        if self._open == 0:
            threading.excepthook = self._before

    def _excepthook(self, details: Any) -> None:
        if type(details.thread).__module__ != event_file_writer.__name__:
            self._before(details)


WRITER_ERRORS = WriterErrors()


def sort_before(files: Iterable[Path], now: int) -> None:
    """Rename event files so that their names sort before that of a file that is started at `now`, in seconds.

    TensorBoard reads event files in the order of their names, which start with the time. On a machine whose clock is
    behind, a resumed run would be read before the process that it continues.
    """
    for file in sorted(files, reverse=True):
        match = EVENT_TIME.search(file.name)
        if match is None:
            continue
        now = min(int(match[1]), now - 1)
        if now != int(match[1]):
            file.rename(file.with_name(file.name.replace(match[0], f"tfevents.{now:010d}.", 1)))


class TensorBoard:
    """The event file of a run. `resumed_at`: what an earlier process wrote behind that step is taken back."""

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        self.folder = folder
        self.resumed_at = resumed_at
        self.broken = False
        WRITER_ERRORS.silence()
        self.open()

    @watching
    def open(self) -> None:
        """Start an event file."""
        purge = None if self.resumed_at is None else self.resumed_at + 1
        sort_before(self.folder.glob(EVENT_FILES), int(time.time()))
        self.writer = SummaryWriter(str(self.folder), purge_step=purge, max_queue=1000, flush_secs=60)
        self.events: Any = self.writer.file_writer  # takes summaries that have no method of their own

    @watching
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag. A killed process may have written some at the step that the run is resumed from."""
        told = told_at(self.folder, step) if step == self.resumed_at else set()
        # One event with all of them: `add_scalar` would write one each, in three times the time.
        new = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if tag not in told]
        self.events.add_summary(Summary(value=new), step)

    @watching
    def config(self, record: Mapping[str, Any]) -> None:
        """The config as text, and its values as the HPARAMS of this run."""
        text = yaml.safe_dump(dict(record), sort_keys=False)
        self.writer.add_text("config", "```yaml\n" + text + "```", 0)
        experiment, start, _ = hparams(hyperparameters(record), dict.fromkeys(FINAL_METRICS, 0.0))
        for summary in (_main_columns_first(experiment), start):
            self.events.add_summary(summary)

    @watching
    def changes(self, told: Sequence[str], step: int) -> None:
        """What a resume has changed in the config, as text at its step; `lr/*` and `momentum/*` follow it there."""
        self.writer.add_text("changes", "\n\n".join(told), step)

    @watching
    def finish(self, record: Mapping[str, Any], final: Mapping[str, float], step: int) -> None:
        """The test metrics, and the end of the HPARAMS session."""
        self.scalars(final, step)
        _, _, end = hparams(hyperparameters(record), {})
        self.events.add_summary(end)

    @watching
    def images(self, tag: str, images: Tensor, step: int) -> None:
        """A batch (B, C, H, W) of floats in [0, 1], up to 64 of them as a grid."""
        self.writer.add_image(tag, grid(images[:64]), step)

    def graph(self, model: nn.Module, images: Tensor) -> None:
        """The network's graph, traced in evaluation mode on two images (B, C, H, W)."""
        was_training = model.training
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer is deprecated, but TensorBoard's graph has no other source
            self.writer.add_graph(model.eval(), images[:2])
        model.train(was_training)

    @watching
    def histograms(self, model: nn.Module, step: int) -> None:
        """Write every parameter, and its gradient if it has one."""
        for name, parameter in model.named_parameters():
            self._histogram(f"weights/{name}", parameter.detach(), step)
            if parameter.grad is not None:
                self._histogram(f"gradients/{name}", parameter.grad, step)

    def _histogram(self, tag: str, values: Tensor, step: int) -> None:
        if torch.isfinite(values).all():  # a scaled fp16 gradient may overflow now and then
            self.writer.add_histogram(tag, values.float(), step)

    @watching
    def flush(self) -> None:
        """To the file, so that a checkpoint never counts a step that TensorBoard has not seen."""
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._close_writer()
        WRITER_ERRORS.restore()

    @watching
    def _close_writer(self) -> None:
        self.writer.close()


def told_at(folder: Path, step: int) -> set[str]:
    """The tags that the event files of a folder show at a step; what is torn ends a file."""
    tags: set[str] = set()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START and event.step <= step:
                tags.clear()  # a run that went on from an earlier step has taken them back
            elif event.step == step:
                tags |= {value.tag for value in event.summary.value}
    return tags


def grid(images: Tensor, *, columns: int = 8, border: int = 2) -> Tensor:
    """Images (B, C, H, W) -> one image (C, rows (H + border) + border, columns (W + border) + border) on grey."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cell_height, cell_width = height + border, width + border
    original = images.new_full((channels, rows * cell_height + border, columns * cell_width + border), 0.5)
    for index, image in enumerate(images):
        top, left = index // columns * cell_height + border, index % columns * cell_width + border
        original[:, top : top + height, left : left + width] = image
    return original


def _main_columns_first(experiment: Any) -> Any:
    """HPARAMS shows five columns at first: those said to differ between runs, then by the alphabet. Say it of these."""
    holder = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(holder.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in MAIN_HYPERPARAMETERS
    holder.content = content.SerializeToString()
    return experiment


def hyperparameters(record: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """The config's values that distinguish runs, flat: a group by the option chosen, lists as text."""
    shown = ("seed", "model", "data", "augment", "optimizer", "schedule", "loss", "trainer")
    hidden = ("root", "log_", "download", "_partial_", "_target_", "_every", "memory_budget")
    flat: dict[str, bool | float | str] = {}
    for name, value in leaves({key: record[key] for key in shown if key in record}):
        last = name.rpartition(".")[2]
        if isinstance(value, dict) or any(part in last for part in hidden):
            continue
        flat[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat | dict(record.get("choices", {}))
