"""How a run begins: a new folder with TensorBoard's static parts in it, or an old one that is gone on with."""

import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from core.config import Config
from core.errors import StorageError
from core.schema import SPLITS
from data.sources.splits import Splits
from trainer.loop import Trainer
from trainer.report.tensorboard_writer import TensorBoard
from trainer.report.terminal import Display
from trainer.state import load, snapshot
from trainer.storage.run_folder import RunFolder, chosen_path


class Notices(logging.Handler):
    """While entered, what our packages log goes to the run, as soon as there is one: they know nothing of it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._early: list[str] = []
        self._tell: Callable[[str], None] = self._early.append

    def __enter__(self) -> "Notices":
        logging.getLogger("preceptor").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("preceptor").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk
            self._tell(record.getMessage())

    def tell(self, listener: Callable[[str], None]) -> None:
        """Pass on what was said so far, and all that will be."""
        self._tell = listener
        for text in self._early:
            listener(text)


def begin(trainer: Trainer, config: Config, splits: Splits, weights_report: list[str], stack: ExitStack) -> None:
    """The run folder, TensorBoard's static parts, and a first word; `stack` holds what must be closed."""
    values = config.values
    model_name, data_name = values["choices"]["model"], values["choices"]["data"]
    folder = make_folder(trainer, config)
    stack.callback(folder.close)
    display = Display(folder.path / "train.log", total_steps=trainer.settings.total_steps)
    tracker = TensorBoard(folder.path)
    trainer.attach(folder, tracker, display, stack)
    parts = [f"{name} {len(part):,}" for name in SPLITS if (part := getattr(splits, name)) is not None]
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    display.say(
        f"{model_name} ({count:,} parameters) on {data_name} ({', '.join(parts)}), "
        f"{trainer.provenance['device']}, {trainer.settings.total_steps:,} steps -> {folder.path}"
    )
    display.say(f"  automatic: {', '.join(chosen(trainer))}")
    left_out = len(splits.train) - trainer.train_loader.samples_per_epoch
    if left_out:
        display.say(f"{left_out} of {len(splits.train):,} training samples are left out of each epoch (data.drop_last)")
    for text in weights_report:
        display.say(text)
        folder.append_event("init_from", text=text)
    folder.append_event("start", provenance=dict(trainer.provenance))
    tracker.config(trainer.record)
    if values["trainer"]["log_images"] or values["trainer"]["log_graph"]:
        show_first_batch(trainer, images=values["trainer"]["log_images"], graph=values["trainer"]["log_graph"])


def chosen(trainer: Trainer) -> list[str]:
    """What a config may leave to us, as it was decided."""
    fused = "fused" if trainer.optimizer.defaults.get("fused") else "not fused"
    layout = any(parameter.ndim == 4 and not parameter.is_contiguous() for parameter in trainer.model.parameters())
    waits = trainer.device.type == "cuda" and not trainer.guard.on_device
    in_products = torch.get_float32_matmul_precision() == "high"
    has_tf32 = trainer.device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return [
        f"threads {torch.get_num_threads()}",
        *([f"TF32 in convolutions{' and products' * in_products}"] if has_tf32 else []),
        *(["the host looks at each step's loss (no fused update)"] if waits else []),
        "channels_last" if layout else "channels first",
        f"{type(trainer.optimizer).__name__} {fused}",
        trainer.train_loader.reading,
    ]


def make_folder(trainer: Trainer, config: Config) -> RunFolder:
    """Where the config says, or the default, whose name another run may have taken in this second."""
    values, first = config.values, snapshot(trainer)
    names = (values["choices"]["model"], values["choices"]["data"])
    while True:
        path = chosen_path(values["run_dir"], job=config.job, names=names)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return RunFolder.create(path, record=trainer.record, first=first)
        except OSError as exception:
            raise StorageError(str(path), f"cannot be made: {exception.strerror}") from None
        except StorageError:
            if values["run_dir"] is not None or not path.exists():
                raise


def show_first_batch(trainer: Trainer, *, images: bool, graph: bool) -> None:
    """The first batch as it is trained on, and the network's graph, in TensorBoard."""
    first = next(iter(trainer.train_loader.pictures(0)))[0]  # (B, C, H, W), 0 to 255
    if images:
        trainer.tracker.images("train/augmented", (first[:64] / 255).clamp(0, 1).cpu(), 0)
    if graph:
        try:
            trainer.tracker.graph(trainer.model, trainer.normalisation(first))
        except Exception as exception:  # the tracer raises anything; a run does not end for a picture
            trainer.warn(f"no graph in TensorBoard, as the network cannot be traced: {type(exception).__name__}")


def go_on(trainer: Trainer, config: Config, stack: ExitStack) -> bool:
    """Go on with a run: its newest good checkpoint, its logs cut back to that step. False: it is finished already."""
    folder = RunFolder.open(Path(config.values["resume"]))
    stack.callback(folder.close)
    found, path, damaged = folder.checkpoints.load("last", "best", "step")
    load(trainer, found)
    display = Display(folder.path / "train.log", total_steps=trainer.settings.total_steps)
    if trainer.is_finished(folder):  # then nothing is written, not even to train.log
        text = f"nothing to do: {folder.path} is finished ({trainer.stop_reason})"
        if trainer.stop_reason != "early_stopping":
            text += f"; a larger trainer.{trainer.stop_reason} makes it go on"
        display.console.print(text, markup=False)
        return False
    folder.rewind(trainer.evaluated)
    trainer.attach(folder, TensorBoard(folder.path, resumed_at=trainer.step), display, stack)
    for file, text in damaged.items():
        file.rename(file.with_suffix(".damaged"))  # or it would count as one of the newest, which are kept
        trainer.warn(f"{text}; set aside as {file.stem}.damaged")
    if config.changes:
        folder.write_config(trainer.record)
    facts = {"checkpoint": path.name, "changes": config.changes, "provenance": dict(trainer.provenance)}
    folder.append_event("resume", step=trainer.step, **facts)
    display.say(f"resumed {folder.path} at step {trainer.step:,} of {trainer.settings.total_steps:,} from {path.name}")
    told = [f"{name}: {before} -> {now}" for name, (before, now) in config.changes.items()]
    for text in told:
        display.say(f"  {text}")
    if told:
        trainer.tracker.changes(told, trainer.step)
    return True
