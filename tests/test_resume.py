"""A run that was stopped, killed or moved ends as one that was not: to the bit, and each step told once."""

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import built, composed, last_state, reopened, stop_after, trained
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from core.config import resumed
from core.errors import CheckpointError, ConfigError, DataError, StopSignal
from core.schema import TRAIN
from trainer import checkpoint
from trainer.build import build
from trainer.checkpoint import CheckpointFolder
from trainer.run_folder import read_lines
from trainer.trainer import Trainer

HEADS = "model._target_=test_losses.WithHeads"  # two auxiliary heads

# Each feature at least once, most of them twice, in different company.
COMBINATIONS = {
    "sgd step crop_flip dropout": [
        *("optimizer=sgd", "schedule=step", "augment=crop_flip", "model.dropout=0.3", "trainer.clip_norm=1"),
        *("trainer.checkpoint.every_steps=2", "trainer.evaluate_every=4 steps", "schedule.warmup_epochs=0.5"),
        "trainer.log_every=3 steps",
    ],
    "nesterov cosine affine batch_norm ema accumulate": [
        *("optimizer=nesterov", "schedule=cosine", "augment=affine", "model.batch_norm=true"),
        *("trainer.ema_decay=0.9", "trainer.accumulate=2", "trainer.max_epochs=4", "trainer.weight_decay_on=weights"),
    ],
    "adam one_cycle both dropout bf16 smoothing": [
        *("optimizer=adam", "schedule=one_cycle", "augment=[crop_flip,affine]", "model.dropout=0.5"),
        *("trainer.precision=bf16", "loss.label_smoothing=0.1", "trainer.evaluate_every=5 steps"),
    ],
    "adamw plateau ema accumulate every_steps": [
        *("optimizer=adamw", "schedule=plateau", "schedule.patience=0", "schedule.factor=0.5", "optimizer.lr=0.1"),
        *("trainer.evaluate_every=1 steps", "trainer.ema_decay=0.5", "trainer.accumulate=3", "trainer.max_epochs=6"),
        *("trainer.checkpoint.every_steps=1", "schedule.min_delta=0.01"),
    ],
    "sgd torch smoothing early stopping": [
        *("schedule=torch", "schedule._target_=torch.optim.lr_scheduler.MultiStepLR", "~schedule.gamma"),
        *("+schedule.milestones=[1,2]", "trainer.early_stopping.patience=1", "trainer.evaluate_every=3 steps"),
        *("optimizer.lr=1", "loss.label_smoothing=0.2", "trainer.max_epochs=9", "augment=affine"),
    ],
    "adam torch momentum plateau early stopping bf16": [
        *("optimizer=adam", "schedule=torch", "schedule._target_=torch.optim.lr_scheduler.OneCycleLR"),
        *("~schedule.gamma", "+schedule.max_lr=0.3", "+schedule.total_steps=9", "model.batch_norm=true"),
        *("trainer.early_stopping.patience=1", "trainer.early_stopping.geometric=1.2", "trainer.max_epochs=9"),
        *(
            "trainer.early_stopping.monitor=train/loss",
            "trainer.early_stopping.min_delta=0.4",
            "trainer.precision=bf16",
        ),
    ],
    "nesterov constant resnet ema": [
        *("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]", "optimizer=nesterov"),
        *("schedule=constant", "augment=crop_flip", "trainer.ema_decay=0.99", "loss.class_weights=balanced"),
        "trainer.log_every=5 steps",
    ],
    "muon cosine_restarts resnet l1 accumulate": [
        *("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]", "optimizer=muon"),
        *("schedule=cosine_restarts", "trainer.l1=0.001", "trainer.accumulate=2", "trainer.max_epochs=4"),
        *("trainer.weight_decay_on=weights", "trainer.ema_decay=0.9", "trainer.clip_norm=1"),
    ],
    "rmsprop multistep heads l1": [
        *(HEADS, "optimizer=rmsprop", "optimizer.momentum=0.9", "optimizer.centered=true", "optimizer.lr=0.001"),
        *("schedule=multistep", "trainer.l1=0.01", "schedule.warmup_epochs=0.5", "loss=binary_cross_entropy"),
    ],
    "adagrad exponential heads": [
        *(HEADS, "optimizer=adagrad", "optimizer.initial_accumulator_value=0.1", "optimizer.lr_decay=0.01"),
        *("schedule=exponential", "loss=huber", "loss.auxiliary_weight=0.5", "trainer.evaluate_every=4 steps"),
    ],
    "sgd rand_augment mixup dropout": [
        *(
            "augment=[crop_flip,rand_augment,mixup]",
            "model.dropout=0.2",
            "trainer.accumulate=2",
            "trainer.max_epochs=4",
        ),
    ],
    "adamw plateau resnet erasing cutmix elastic mixup": [
        *("augment=[erasing,cutmix,elastic,color_shift,mixup]", "loss.class_weights=balanced"),
        *("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]", "optimizer=adamw"),
        *("schedule=plateau", "schedule.patience=0", "trainer.channels_last=true", "trainer.evaluate_every=2 steps"),
    ],
}


def stopped(trainer: Trainer, step: int) -> None:
    stop_after(trainer, step)
    with pytest.raises(StopSignal) as caught:
        trainer.run()
    assert caught.value.exit_code == 143 and trainer.step == step


def go_on(folder: Path, *overrides: str) -> Trainer:
    trainer = reopened(folder, *overrides)
    assert trainer is not None
    trainer.run()
    return trainer


@pytest.fixture
def whole(tmp_path_factory) -> Any:
    """Uninterrupted runs: their folder."""

    def make(*overrides: str) -> Path:
        return trained(tmp_path_factory.mktemp("whole") / "run", *overrides).folder.path

    return make


@pytest.mark.parametrize("name", COMBINATIONS)
def test_stopped_at_every_step(tmp_path, whole, name):
    overrides = tuple(COMBINATIONS[name])
    reference = whole(*overrides)
    state, values, lines = last_state(reference)
    steps = values["step"]
    trust = ("trust=[test_losses]",) if HEADS in overrides else ()
    assert (values["summary"]["status"] == "stopped_early") == ("early" in name)
    assert 9 <= steps < 54 and len(lines) >= 2
    if "plateau" in COMBINATIONS[name] or "torch" in name:
        assert len({line["lr"] for line in lines}) > 1
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        stopped(built(folder, *overrides), step)
        assert go_on(folder, *trust).step == steps
        again = last_state(folder)
        assert again[1:] == (values, lines), step
        assert again[0] == state, step


def test_other_seeds_and_steps_give_other_states(tmp_path, whole):
    """The comparison is no tautology."""
    states = {last_state(whole(*extra))[0] for extra in ((), ("seed=1",), ("trainer.max_steps=11",))}
    assert len(states) == 3


def test_stopped_before_the_first_step_and_five_times_in_a_row(tmp_path, whole):
    overrides = tuple(COMBINATIONS["nesterov cosine affine batch_norm ema accumulate"])
    folder = tmp_path / "run"
    trainer = built(folder, *overrides)  # killed before a step: the folder was born with the state of step 0
    trainer.tracker.close()
    trainer.folder.close()
    for step in (1, 3, 4, 8, 11):
        again = reopened(folder)
        assert again is not None
        stopped(again, step)
    go_on(folder)
    assert last_state(folder) == last_state(whole(*overrides))
    events = read_lines(folder / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "resume"] == [0, 1, 3, 4, 8, 11]


# Kills: what is on the disk may be ahead of the checkpoint


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard's own reader shows them; throughput, which is the clock's, without its values."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, 0.0 if tag.startswith("throughput") else event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


@pytest.fixture
def _event_files_in_order(monkeypatch) -> None:
    """TensorBoard orders event files by the second in their names; runs made in one process would share it."""
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: float(next(seconds))))


def killed_at(source: Path, folder: Path, step: int) -> Path:
    """A copy of a run as a kill might leave it: checkpoints up to a step, logs that are ahead of them, torn lines."""
    shutil.copytree(source, folder)
    (folder / "summary.json").unlink()
    for file in CheckpointFolder(folder / "checkpoints").files("last", "best", "step"):
        if file.step > step:
            file.path.unlink()
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 1, "tr')
    return folder


@pytest.mark.usefixtures("_event_files_in_order")
def test_each_step_is_told_once(tmp_path, whole):
    overrides = ("trainer.evaluate_every=2 steps", "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    reference = whole(*overrides)
    expected = scalars(reference)
    assert [step for step, _ in expected["step/loss"]] == list(range(1, 13))
    assert [step for step, _ in expected["val/loss"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in expected["test/accuracy"]] == [12]
    for line, (step, value) in zip(read_lines(reference / "metrics.jsonl"), expected["val/loss"]):
        assert line["step"] == step and line["val/loss"] == pytest.approx(value)
    state = last_state(reference)
    for step in range(1, 12):  # the state of step 0 is gone by then
        folder = killed_at(reference, tmp_path / str(step), step)
        go_on(folder)
        assert last_state(folder) == state, step
        assert scalars(folder) == expected, step
        assert [event["event"] for event in read_lines(folder / "events.jsonl")] == ["start", "resume"]


@pytest.mark.usefixtures("_event_files_in_order")
def test_a_torn_event_file_is_no_obstacle(tmp_path, whole):
    overrides = ("trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    reference = whole(*overrides)
    folder = killed_at(reference, tmp_path / "run", 7)
    (events,) = folder.glob("events.out.tfevents.*")
    events.write_bytes(events.read_bytes()[:-9])
    go_on(folder)
    assert scalars(folder) == scalars(reference)


class Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_write_of_a_checkpoint(tmp_path, monkeypatch, whole, moment):
    overrides = ("trainer.evaluate_every=3 steps", "trainer.checkpoint.every_steps=6", "optimizer.lr=0.5")
    reference = whole(*overrides)
    state, write = last_state(reference), checkpoint.write_durably
    for number in itertools.count():
        folder, calls = tmp_path / str(number), itertools.count()
        trainer = built(folder, *overrides)

        def write_or_die(path: Path, content: bytes, calls: Any = calls, number: int = number) -> None:
            call = next(calls)
            if call == number and moment == "before":
                raise Killed
            write(path, content)
            if call == number:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "write_durably", write_or_die)
            try:
                trainer.run()
            except Killed:
                assert not (folder / "summary.json").exists()
            else:
                break
        go_on(folder)
        assert last_state(folder) == state, number
    assert number >= 8 and last_state(folder) == state  # four evaluations, two of them steps to keep, and bests


@pytest.mark.usefixtures("_event_files_in_order")
def test_a_signal_during_the_test(tmp_path, whole):
    trainer = built(tmp_path / "run")
    trainer.evaluated_model.register_forward_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if trainer.stop_reason else None
    )
    with pytest.raises(StopSignal):
        trainer.run()
    go_on(tmp_path / "run")
    reference = whole()
    assert last_state(tmp_path / "run") == last_state(reference)
    assert scalars(tmp_path / "run") == scalars(reference)


def test_a_damaged_newest_checkpoint(tmp_path, whole):
    folder = tmp_path / "run"
    overrides = ("trainer.evaluate_every=3 steps",)
    stopped(built(folder, *overrides), 8)
    newest = CheckpointFolder(folder / "checkpoints").files("last")[0]
    newest.path.write_bytes(newest.path.read_bytes()[:-1])
    go_on(folder)
    assert last_state(folder) == last_state(whole(*overrides))
    _, warning, event = read_lines(folder / "events.jsonl")
    assert newest.path.name in warning["text"] and event["step"] == 6


def test_all_checkpoints_damaged(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder), 8)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"x")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"last-00000008.*last-00000006"):
        reopened(folder)
    assert contents(folder) == before


# Finished, extended, changed


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize(
    "extra", [(), ("optimizer.lr=2", "trainer.early_stopping.patience=1", "trainer.max_epochs=20")]
)
def test_a_finished_run_is_left_alone(tmp_path, capfd, extra):
    folder = trained(tmp_path / "run", *extra).folder.path
    before, places = contents(folder), folder.stat().st_mtime_ns
    for _ in range(2):
        assert reopened(folder) is None
    assert contents(folder) == before and folder.stat().st_mtime_ns == places
    told = capfd.readouterr().out
    assert "nothing to do" in told and ("a larger trainer.max_epochs" in told) == (not extra)
    assert ("stopped_early" in before["summary.json"][1].decode()) == bool(extra)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_epochs(tmp_path, whole, schedule):
    """Under a constant rate it is the longer run; a cosine spans the whole run, and goes on where the longer one is."""
    folder = trained(tmp_path / "run", f"schedule={schedule}", "trainer.max_epochs=1").folder.path
    assert reopened(folder) is None
    go_on(folder, "trainer.max_epochs=2")
    reference = whole(f"schedule={schedule}")
    assert (last_state(folder) == last_state(reference)) == (schedule == "constant")
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [6, 12]
    assert lines[1]["lr"] == read_lines(reference / "metrics.jsonl")[1]["lr"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert reopened(folder) is None


REFUSED = {
    "seed=1": ("seed", "0 -> 1"),
    "model.hidden=[8]": ("model.hidden", "[16] -> [8]"),
    "model=lenet": ("model", "models.mlp.MLP -> lenet"),
    "optimizer.momentum=0.5": ("optimizer.momentum", "0.9 -> 0.5"),
    "data.batch_size=4": ("data.batch_size", "8 -> 4"),
    "trainer.precision=bf16": ("trainer.precision", "fp32 -> bf16"),
    "trainer.accumulate=2": ("trainer.accumulate", "1 -> 2"),
    "trainer.early_stopping.patience=3": ("trainer.early_stopping.patience", "10 -> 3"),
    "schedule._target_=os.system": ("schedule._target_", "trainer.schedules.cosine -> os.system"),
}


def test_what_may_not_change(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder), 4)
    before = contents(folder)
    for override, (key, diff) in REFUSED.items():
        with pytest.raises(CheckpointError) as caught:
            reopened(folder, override, "optimizer.lr=0.01")
        message = str(caught.value)
        assert caught.value.exit_code == 6 and f"{key}: {diff}. Free to change: " in message and "init_from" in message
    for override in ("trainer.max_epoch=3", "+trainer.max_epoch=3"):
        with pytest.raises(ConfigError, match=r"did you mean trainer.max_epochs"):
            reopened(folder, override)
    with pytest.raises(ConfigError, match=r"optimizer.lr = -1: must be a number > 0"):
        reopened(folder, "optimizer.lr=-1")
    assert contents(folder) == before
    go_on(folder, "seed=0", "model.hidden=[16]")  # the same values are no change


def test_what_may_change(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder, "schedule=constant"), 4)
    changes = ["optimizer.lr=0.01", "trainer.max_epochs=3", "trainer.log_every=2 steps", "data.num_workers=1"]
    go_on(folder, *changes, "trainer.checkpoint.keep=null", "traceback=true")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 0.01 and config["trainer"]["max_epochs"] == 3
    assert config["trainer"]["log_every"] == "2 steps" and config["data"]["num_workers"] == 1
    assert config["trainer"]["checkpoint"]["keep"] is None and config["resume"] is None and config["traceback"] is False
    _, event = read_lines(folder / "events.jsonl")
    assert event["changes"] == {
        "optimizer.lr": [0.05, 0.01],
        "trainer.max_epochs": [2, 3],
        "trainer.log_every": ["1 steps", "2 steps"],
        "data.num_workers": [0, 1],
        "trainer.checkpoint.keep": [2, None],
    }
    assert [(line["step"], line["lr"]) for line in read_lines(folder / "metrics.jsonl")] == [
        (6, 0.01),
        (12, 0.01),
        (18, 0.01),
    ]


def test_flags_and_other_places(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder), 4)
    with pytest.raises(ConfigError, match="not together with resume="):
        reopened(folder, "-m")
    with pytest.raises(CheckpointError, match="no such run folder"):
        resumed(tmp_path / "nowhere", [], TRAIN)
    moved = tmp_path / "elsewhere" / "run, again=[1]"
    moved.parent.mkdir()
    folder.rename(moved)
    trainer = build(resumed(moved, [], TRAIN))
    assert trainer is not None
    trainer.run()
    assert trainer.step == 12


# Picture files


@pytest.fixture
def pictures(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    for index in range(36):
        path = tmp_path / "pictures" / f"class {index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 8), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


FILES = (
    *("data=image_folder", "data.image_size=8", "data.channels=1", "data.batch_size=4", "data.val_fraction=0.2"),
    *("augment=[crop_flip,affine]", "model.dropout=0.2"),
)


@pytest.mark.parametrize(
    ("first", "second", "augment"), [(0, 2, "[crop_flip,affine]"), (2, 0, "[crop_flip,rand_augment,mixup]")]
)
def test_files_read_by_another_number_of_workers(tmp_path, whole, pictures, first, second, augment):
    overrides = (*FILES, f"augment={augment}", f"data.root={pictures}")
    reference = whole(*overrides, "data.num_workers=0")  # whole in memory
    for step in (2, 7):
        folder = tmp_path / str(step)
        stopped(built(folder, *overrides, "data.memory_budget=0", f"data.num_workers={first}"), step)
        go_on(folder, f"data.num_workers={second}")
        assert last_state(folder) == last_state(reference)


def test_a_root_from_the_environment(tmp_path, monkeypatch, whole, pictures):
    monkeypatch.setenv("PRECEPTOR_DATA", str(pictures))
    folder = tmp_path / "run"
    stopped(built(folder, *FILES, "data.root=${oc.env:PRECEPTOR_DATA}"), 4)
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"] == "environment:PRECEPTOR_DATA"
    for path in folder.rglob("*"):
        assert path.is_dir() or str(pictures).encode() not in path.read_bytes(), path
    moved = pictures.rename(tmp_path / "moved")
    before = contents(folder)
    with pytest.raises(DataError, match="pictures"):
        reopened(folder)
    assert contents(folder) == before
    monkeypatch.setenv("PRECEPTOR_DATA", str(moved))
    go_on(folder)
    assert last_state(folder) == last_state(whole(*FILES, f"data.root={moved}"))


def test_other_data_is_refused(tmp_path, pictures):
    folder = tmp_path / "run"
    stopped(built(folder, *FILES, f"data.root={pictures}"), 4)
    shutil.copy(pictures / "class 0" / "0.png", pictures / "class 0" / "99.png")
    with pytest.raises(CheckpointError, match="fingerprint"):
        reopened(folder)
    (pictures / "class 0" / "99.png").unlink()
    go_on(folder)


def test_a_config_that_does_not_fit_its_checkpoint(tmp_path):
    for number, (old, new) in enumerate([("- 16", "- 8"), ("ema_decay: null", "ema_decay: 0.9")]):
        folder = tmp_path / str(number)
        stopped(built(folder), 4)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match="not the one that this run trained"):
            reopened(folder)


def test_a_lock_is_given_back(tmp_path):
    """Whatever a failed resume raises, this process can try again."""
    folder = tmp_path / "run"
    stopped(built(folder), 4)
    for path in (folder / "checkpoints").iterdir():
        path.rename(path.with_suffix(".away"))
    with pytest.raises(CheckpointError, match="there is none"):
        reopened(folder)
    for path in (folder / "checkpoints").iterdir():
        path.rename(path.with_suffix(".safetensors"))
    go_on(folder)


def test_the_clock_goes_on(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder), 4)
    before = json.loads((folder / "summary.json").read_text())
    trainer = go_on(folder)
    after = json.loads((folder / "summary.json").read_text())
    assert after["seconds"] > before["seconds"] > 0 and math.isfinite(after["samples_per_second"])
    assert trainer.clock.samples == 88  # each sample once
    assert composed().record["run_dir"] is None  # what tests share is not changed by them
