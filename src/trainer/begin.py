"""How a run begins: a new folder with TensorBoard's static parts in it, or an old one that is gone on with."""

from pathlib import Path

from core.config import Config
from core.errors import PreceptorError, StorageError
from core.schema import SPLITS
from data.splits import Splits
from trainer.display import Display
from trainer.run_folder import RunFolder, chosen_path
from trainer.state import load, snapshot
from trainer.tracking import TensorBoard
from trainer.trainer import Trainer


def begin(trainer: Trainer, config: Config, splits: Splits, weights_report: list[str]) -> None:
    """The run folder, TensorBoard's static parts, and a first word."""
    values = config.values
    model_name, data_name = values["choices"]["model"], values["choices"]["data"]
    path = chosen_path(values["run_dir"], job=config.job, names=(model_name, data_name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exception:
        raise StorageError(str(path), f"cannot be made: {exception.strerror}") from None
    folder = RunFolder.create(path, record=trainer.record, first=snapshot(trainer))
    tracker = TensorBoard(folder.path)
    display = Display(folder.path / "train.log", total_steps=trainer.settings.total_steps)
    trainer.attach(folder, tracker, display)
    parts = [f"{name} {len(part):,}" for name in SPLITS if (part := getattr(splits, name)) is not None]
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    display.say(
        f"{model_name} ({count:,} parameters) on {data_name} ({', '.join(parts)}), "
        f"{trainer.provenance['device']}, {trainer.settings.total_steps:,} steps -> {path}"
    )
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


def go_on(trainer: Trainer, config: Config) -> bool:
    """Go on with a run: its newest good checkpoint, its logs cut back to that step. False: it is finished already."""
    folder = RunFolder.open(Path(config.values["resume"]))
    try:
        found, path, damaged = folder.checkpoints.load("last", "best", "step")
        load(trainer, found)
    except PreceptorError:
        folder.close()  # so that this process can try again
        raise
    display = Display(folder.path / "train.log", total_steps=trainer.settings.total_steps)
    if trainer.is_finished(folder):  # then nothing is written, not even to train.log
        text = f"nothing to do: {folder.path} is finished ({trainer.stop_reason})"
        if trainer.stop_reason != "early_stopping":
            text += f"; a larger trainer.{trainer.stop_reason} makes it go on"
        display.console.print(text, markup=False)
        folder.close()
        return False
    folder.rewind(trainer.step)
    trainer.attach(folder, TensorBoard(folder.path, resumed_at=trainer.step), display)
    for text in damaged:
        trainer.warn(text)
    if config.changes:
        folder.write_config(trainer.record)
    facts = {"checkpoint": path.name, "changes": config.changes, "provenance": dict(trainer.provenance)}
    folder.append_event("resume", step=trainer.step, **facts)
    display.say(f"resumed {folder.path} at step {trainer.step:,} of {trainer.settings.total_steps:,} from {path.name}")
    for name, (before, now) in config.changes.items():
        display.say(f"  {name}: {before} -> {now}")
    return True
