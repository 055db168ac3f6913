"""A run that is stopped, killed or moved ends bit-identical to an uninterrupted one, and each step is logged once.

test_matrix.py tests this for every feature.
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import MLP, built, composed, last_state, packed, reopened, run_to_end, stop_after, trained
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from core.errors import CheckpointError, ConfigError, DataError, StopSignal, StorageError, as_preceptor_error
from core.json_lines import read_lines
from core.options.declarations import TrainConfig
from core.resume import resumed_config
from models import mlp
from trainer.monitor import nonfinite
from trainer.report import tensorboard_writer
from trainer.run import Run
from trainer.snapshot import Snapshot
from trainer.storage import checkpoint
from trainer.storage.checkpoint import CheckpointFolder

pytestmark = pytest.mark.thorough


def stopped(run: Run, step: int) -> None:
    stop_after(run, step)
    with pytest.raises(StopSignal) as caught:
        run_to_end(run)
    assert caught.value.exit_code == 143 and run.state.step == step


def resume_to_end(folder: Path, *overrides: str) -> Run:
    run = reopened(folder, *overrides)
    assert run is not None
    run_to_end(run)
    return run


@pytest.fixture
def uninterrupted(tmp_path_factory) -> Any:
    """Return a function that trains an uninterrupted run and returns its folder."""

    def make(*overrides: str) -> Path:
        return trained(tmp_path_factory.mktemp("uninterrupted") / "run", *overrides).folder.path

    return make


def test_last_state_differs_between_seeds_and_steps(tmp_path, uninterrupted):
    """The compared state is not the same for all runs."""
    states = {last_state(uninterrupted(*extra))[0] for extra in ((), ("seed=1",), ("trainer.max_steps=11",))}
    assert len(states) == 3


def test_run_stopped_before_the_first_step_and_five_times_ends_bit_identically(tmp_path, uninterrupted):
    overrides = (
        *("optimizer=nesterov", "augment=affine", "model.batch_norm=true", "trainer.ema_decay=0.9"),
        *("trainer.accumulate=2", "trainer.max_epochs=4", "trainer.weight_decay_on=weights"),
    )
    folder = tmp_path / "run"
    run = built(folder, *overrides)  # killed before the first step: the folder was created with the state of step 0
    run.recorder.tensorboard.close()
    run.folder.close()
    for step in (1, 3, 4, 8, 11):
        resumed = reopened(folder)
        assert resumed is not None
        stopped(resumed, step)
    resume_to_end(folder)
    assert last_state(folder) == last_state(uninterrupted(*overrides))
    events = read_lines(folder / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "resume"] == [0, 1, 3, 4, 8, 11]


# Kills: the logs on the disk may be ahead of the checkpoint


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of each tag, read by TensorBoard's reader; throughput values are replaced by 0."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, 0.0 if tag.startswith("throughput") else event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


@pytest.fixture
def _distinct_event_file_times(monkeypatch) -> None:
    """Give each event file another second: TensorBoard orders the files by the second in their names."""
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: float(next(seconds))))


def copy_killed_at(source: Path, folder: Path, step: int) -> Path:
    """Copy a run as a kill may leave it: checkpoints up to a step, logs ahead of them, incomplete lines."""
    shutil.copytree(source, folder)
    (folder / "summary.json").unlink()
    for file in CheckpointFolder(folder / "checkpoints").files("last", "best", "step"):
        if file.step > step:
            file.path.unlink()
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 1, "tr')
    return folder


@pytest.mark.usefixtures("_distinct_event_file_times")
def test_each_step_is_logged_once_after_a_kill_and_a_resume(tmp_path, uninterrupted):
    overrides = ("trainer.evaluate_every=2 steps", "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    reference = uninterrupted(*overrides)
    expected = scalars(reference)
    assert [step for step, _ in expected["step/loss"]] == list(range(1, 13))
    assert [step for step, _ in expected["val/loss"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in expected["test/accuracy"]] == [12]
    for line, (step, value) in zip(read_lines(reference / "metrics.jsonl"), expected["val/loss"]):
        assert line["step"] == step and line["val/loss"] == pytest.approx(value)
    state = last_state(reference)
    for step in range(1, 12):  # the checkpoint of step 0 has been deleted
        folder = copy_killed_at(reference, tmp_path / str(step), step)
        resume_to_end(folder)
        assert last_state(folder) == state, step
        assert scalars(folder) == expected, step
        assert [event["event"] for event in read_lines(folder / "events.jsonl")] == ["start", "resume"]


def test_steps_are_logged_in_order_if_the_clock_is_behind_on_resume(tmp_path, monkeypatch):
    """TensorBoard reads event files in the order of the times in their names."""
    clock = [1_800_000_000.0]
    for module in (event_file_writer, tensorboard_writer):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock[0]))
    reference = trained(tmp_path / "run", "trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    expected = scalars(reference.folder.path)
    folder = reference.folder.path
    for step, seconds in ((3, -3600), (7, -60), (9, 0), (11, 1)):
        clock[0] += seconds
        folder = copy_killed_at(folder, tmp_path / f"killed-{step}", step)
        resume_to_end(folder)
        assert scalars(folder) == expected, step


@pytest.mark.usefixtures("_distinct_event_file_times")
def test_truncated_event_file_does_not_prevent_a_resume(tmp_path, uninterrupted):
    overrides = ("trainer.checkpoint.every_steps=1", "trainer.checkpoint.keep=null")
    reference = uninterrupted(*overrides)
    folder = copy_killed_at(reference, tmp_path / "run", 7)
    (events,) = folder.glob("events.out.tfevents.*")
    events.write_bytes(events.read_bytes()[:-9])
    resume_to_end(folder)
    assert scalars(folder) == scalars(reference)


class Killed(BaseException):
    """A kill; as a BaseException it is not caught by the code under test."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_run_killed_at_any_checkpoint_write_ends_bit_identically(tmp_path, monkeypatch, uninterrupted, moment):
    overrides = ("trainer.evaluate_every=3 steps", "trainer.checkpoint.every_steps=6", "optimizer.lr=0.5")
    reference = uninterrupted(*overrides)
    state, write = last_state(reference), checkpoint.write_durably
    for number in itertools.count():
        folder, calls = tmp_path / str(number), itertools.count()
        run = built(folder, *overrides)

        def write_or_kill(path: Path, *content: Any, calls: Any = calls, number: int = number) -> None:
            call = next(calls)
            if call == number and moment == "before":
                raise Killed
            write(path, *content)
            if call == number:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "write_durably", write_or_kill)
            try:
                run_to_end(run)
            except Killed:
                assert not (folder / "summary.json").exists()
            else:
                break
        resume_to_end(folder)
        assert last_state(folder) == state, number
    assert number == 4 and last_state(folder) == state  # four evaluations: one write each, the other kinds are links


@pytest.mark.usefixtures("_distinct_event_file_times")
def test_signal_during_the_test_evaluation_is_resumed_bit_identically(tmp_path, uninterrupted):
    run = built(tmp_path / "run")
    run.state.evaluated_model.register_forward_hook(
        lambda *_: None if run.state.model.training or run.state.settled else os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(StopSignal):
        run_to_end(run)
    resume_to_end(tmp_path / "run")
    reference = uninterrupted()
    assert last_state(tmp_path / "run") == last_state(reference)
    assert scalars(tmp_path / "run") == scalars(reference)


def test_resume_uses_the_older_checkpoint_if_the_newest_is_damaged(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    overrides = ("trainer.evaluate_every=3 steps",)
    stopped(built(folder, *overrides), 8)
    newest = CheckpointFolder(folder / "checkpoints").files("last")[0]
    newest.path.write_bytes(newest.path.read_bytes()[:-1])
    resume_to_end(folder)
    assert last_state(folder) == last_state(uninterrupted(*overrides))
    _, warning, event = read_lines(folder / "events.jsonl")
    assert newest.path.name in warning["text"] and event["step"] == 6


def test_resume_is_refused_if_all_checkpoints_are_damaged(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder), 8)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"x")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"last-00000008.*last-00000006"):
        reopened(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("number", [3, 5])
def test_checkpoint_of_another_format_is_refused_by_resume(tmp_path, number):
    folder = trained(tmp_path / "run", "trainer.max_epochs=1").folder
    snapshot = folder.checkpoints.load("last")[0]
    content = packed(Snapshot(snapshot.tensors, {**snapshot.values, "format": number, "step": 7}))
    name = f"last-00000007-{checkpoint.digest(content)}.safetensors"
    (folder.checkpoints.path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"format {number}; this version reads format 4"):
        reopened(folder.path)


# Deferred evaluations: interrupted or failed


@pytest.mark.usefixtures("_distinct_event_file_times")
def test_deferred_evaluation_is_logged_once(tmp_path, uninterrupted):
    """The run is stopped during an evaluation, then killed after it but before its checkpoint, then resumed."""
    overrides = ("trainer.evaluate_every=3 steps", "data.eval_batch_size=4")
    folder = tmp_path / "run"
    run = built(folder, *overrides)

    def stop(*_: object) -> None:
        if run.state.step == 6 and not run.state.model.training:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.evaluated_model.register_forward_hook(stop)
    with pytest.raises(StopSignal):
        run_to_end(run)
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [3]
    assert CheckpointFolder(folder / "checkpoints").load("last")[0].values["evaluated"] == 3
    resumed = reopened(folder)
    assert resumed is not None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resumed.loop, "commit", raise_killed)
        with pytest.raises(Killed):
            run_to_end(resumed)
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [3, 6]
    assert scalars(folder)["val/loss"][-1][0] == 6
    resume_to_end(folder)
    reference = uninterrupted(*overrides)
    assert last_state(folder) == last_state(reference) and scalars(folder) == scalars(reference)


def raise_killed(**_: object) -> None:
    raise Killed


@pytest.mark.parametrize("phase", ["training", "validation", "test"])
def test_failing_data_loses_no_step(tmp_path, uninterrupted, phase):
    """The data root disappears during a run: the last step is saved, and the run resumes when the data is back."""
    run = built(tmp_path / "run", "trainer.evaluate_every=4 steps")
    run.training.train_loader.batches_at_once = 1  # read one step at a time
    loader = {
        "training": run.training.train_loader,
        "validation": run.training.val_loader,
        "test": run.training.test_loader,
    }[phase]
    assert loader is not None
    read, reason = loader.source.read, DataError("a.png", "cannot be read")

    def fail(batches: Any, *, augment: Any) -> Any:
        for batch in read(batches, augment=augment):
            if run.state.step == {"training": 3, "validation": 8, "test": 12}[phase]:
                raise reason
            yield batch

    loader.source.read = fail
    with pytest.raises(DataError):
        run_to_end(run)
    step = {"training": 2, "validation": 8, "test": 12}[phase]
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").load("last")[0].step in (step, step + 1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    resume_to_end(tmp_path / "run")
    assert last_state(tmp_path / "run") == last_state(uninterrupted("trainer.evaluate_every=4 steps"))


@pytest.mark.parametrize("method", ["add_event", "flush"])
def test_tensorboard_that_fails_does_not_stop_training(tmp_path, uninterrupted, monkeypatch, capfd, method):
    """One warning names TensorBoard; the training is unchanged."""
    run = built(tmp_path / "run")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.recorder.tensorboard.events.event_writer, method, fail)
    run_to_end(run)
    assert last_state(tmp_path / "run") == last_state(uninterrupted())
    (warning,) = [line["text"] for line in read_lines(tmp_path / "run" / "events.jsonl") if line["event"] == "warning"]
    assert warning.startswith("TensorBoard fails and is disabled: OSError") and "No space left" in warning
    assert "Traceback" not in "".join(capfd.readouterr())


def test_failed_save_is_retried_before_the_next_save(tmp_path, monkeypatch, uninterrupted):
    """A `last` checkpoint must not refer to a best checkpoint that was only in the failed save."""
    folder, real, calls = tmp_path / "run", checkpoint.CheckpointFolder.save, itertools.count()
    overrides = ("optimizer.lr=1e-9", "trainer.max_epochs=3")  # the first evaluation stays the best

    def fail_once(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:  # the save after that of step 0
            raise StorageError("disk", "is full for a moment")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.CheckpointFolder, "save", fail_once)
        with pytest.raises(StorageError, match="for a moment"):
            trained(folder, *overrides)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    assert (
        [file.step for file in checkpoints.files("best")] == [6] == [checkpoints.load("last")[0].values["best"]["step"]]
    )
    resume_to_end(folder)
    assert last_state(folder) == last_state(uninterrupted(*overrides))


def test_second_failure_does_not_hide_the_first(tmp_path, monkeypatch):
    run = built(tmp_path / "run")
    monkeypatch.setattr(run.saver, "retry", lambda: 1 // 0)
    run.state.model.register_forward_pre_hook(broken)
    with pytest.raises(DataError, match="the first"):
        run_to_end(run)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def broken(*_: object) -> None:
    raise DataError("data", "the first")


def test_damaged_log_lines_are_reported_and_others_kept(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder, "trainer.evaluate_every=2 steps"), 9)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    (folder / "metrics.jsonl").write_bytes(lines[0] + b'{"step": 4, \xff\n' + b"".join(lines[2:]) + b'{"st')
    (folder / "summary.json").write_text("{")
    resume_to_end(folder)
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [2, 6, 8, 10, 12]
    (warning,) = [line["text"] for line in read_lines(folder / "events.jsonl") if line["event"] == "warning"]
    assert "metrics.jsonl: line 2 is not a JSON object" in warning


def test_buffer_with_infinities_is_not_a_divergence(tmp_path):
    run = built(tmp_path / "run", "model._target_=test_resume.Masked")
    run_to_end(run)
    assert run.state.step == 12


class Masked(mlp.MLP):
    """An MLP with a buffer that is not finite."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("mask", torch.full((3,), -torch.inf))


def test_closed_terminal_does_not_end_the_run(tmp_path):
    """With `train.py ... | head -1` the output is lost, but the run is trained and saved."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
    command = [
        sys.executable,
        str(script),
        *MLP,
        "trainer.max_epochs=3",
        "trainer.threads=1",
        f"run_dir={tmp_path}/run",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0 and process.stderr.read() == b""
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert "test accuracy" in (tmp_path / "run" / "train.log").read_text().replace(":", "")
    process.stderr.close()


@pytest.mark.parametrize("name", ["Adafactor", "ASGD", "Adam", "NAdam", "RAdam", "Adadelta", "Adamax", "Rprop"])
def test_every_torch_optimizer_resumes_bit_identically(tmp_path, uninterrupted, name):
    """The optimizer states differ in shape: factored rows and columns, counters, learning rates."""
    keys = ("optimizer=adam", f"optimizer._target_=torch.optim.{name}", "schedule=constant")
    removed_keys = {"Adam": [], "NAdam": [], "RAdam": [], "Adamax": []}.get(
        name, ["~optimizer.betas", "~optimizer.eps"]
    )
    overrides = (*keys, *removed_keys, *(["~optimizer.weight_decay"] if name == "Rprop" else []))
    folder = tmp_path / "run"
    stopped(built(folder, *overrides), 7)
    resume_to_end(folder)
    assert last_state(folder) == last_state(uninterrupted(*overrides))


# Finished, extended and changed runs


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize(
    "extra", [(), ("optimizer.lr=2", "trainer.early_stopping.patience=1", "trainer.max_epochs=20")]
)
def test_resume_of_a_finished_run_changes_no_file(tmp_path, capfd, extra):
    folder = trained(tmp_path / "run", *extra).folder.path
    before, folder_mtime = contents(folder), folder.stat().st_mtime_ns
    for _ in range(2):
        assert reopened(folder) is None
    assert contents(folder) == before and folder.stat().st_mtime_ns == folder_mtime
    output = capfd.readouterr().out
    assert "nothing to do" in output and ("a larger trainer.max_epochs" in output) == (not extra)
    change = "trainer.early_stopping.patience=null" if extra else "trainer.max_epochs=3"
    assert not extra or f"python scripts/train.py resume={folder} {change}" in output.replace("\n", "")
    resumed = reopened(folder, change)  # what the message names continues the run
    assert resumed is not None
    run_to_end(resumed)
    assert resumed.state.step == (120 if extra else 18)
    assert ("stopped_early" in before["summary.json"][1].decode()) == bool(extra)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resume_with_more_epochs_continues_the_schedule_of_the_longer_run(tmp_path, uninterrupted, schedule):
    """A constant learning rate gives the longer run; a cosine continues at the same step of the longer cosine."""
    folder = trained(tmp_path / "run", f"schedule={schedule}", "trainer.max_epochs=1").folder.path
    assert reopened(folder) is None
    resume_to_end(folder, "trainer.max_epochs=2")
    reference = uninterrupted(f"schedule={schedule}")
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
    "data.batch_size=4": ("data.batch_size", "8 -> 4"),
    "trainer.precision=bf16": ("trainer.precision", "fp32 -> bf16"),
    "trainer.accumulate=2": ("trainer.accumulate", "1 -> 2"),
    "trainer.checkpoint.monitor=train/loss": ("trainer.checkpoint.monitor", "val/accuracy -> train/loss"),
    "schedule._target_=os.system": ("schedule._target_", "trainer.optim.schedules.cosine -> os.system"),
}


def test_resume_refuses_options_that_are_not_free(tmp_path):
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
    resume_to_end(folder, "seed=0", "model.hidden=[16]")  # equal values are not a change


def test_resume_records_changed_options(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder, "schedule=constant"), 4)
    changes = ["optimizer.lr=0.01", "trainer.max_epochs=3", "trainer.log_every=2 steps", "data.num_workers=1"]
    resume_to_end(folder, *changes, "trainer.checkpoint.keep=null", "traceback=true")
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


def test_resume_applies_lr_weight_decay_and_momentum_from_the_next_step(tmp_path):
    """From the next step, a new base learning rate scales the schedule, and new weight decay and momentum apply.

    The changes are logged in TensorBoard and in the run's history. The reference is the update rule of torch's SGD.
    """
    folder = tmp_path / "run"
    overrides = (
        "schedule=constant",
        "schedule.warmup_epochs=1",
        "trainer.max_epochs=2",
        "trainer.checkpoint.monitor=null",
    )
    stopped(built(folder, *overrides), 4)
    run = reopened(folder, "optimizer.lr=0.01", "optimizer.weight_decay=0.1", "optimizer.momentum=0.5")
    assert run is not None
    weight = next(run.state.model.parameters())
    updates: list[tuple[float, torch.Tensor]] = []

    def record_update(optimizer: torch.optim.Optimizer, *_: object) -> None:
        assert weight.grad is not None
        updates.append((optimizer.param_groups[0]["lr"], weight.grad.clone()))

    expected, velocity = weight.detach().clone(), run.state.optimizer.state[weight]["momentum_buffer"].clone()
    run.state.optimizer.register_step_pre_hook(record_update)
    run_to_end(run)
    assert [lr for lr, _ in updates] == pytest.approx([0.01 * share for share in (5 / 7, 6 / 7, *[1] * 6)])
    for lr, gradient in updates:
        velocity = 0.5 * velocity + gradient + 0.1 * expected
        expected = expected - lr * velocity
    torch.testing.assert_close(weight.detach(), expected)
    assert read_lines(folder / "events.jsonl")[1]["changes"] == {
        "optimizer.lr": [0.05, 0.01],
        "optimizer.weight_decay": [0.0001, 0.1],
        "optimizer.momentum": [0.9, 0.5],
    }
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    text = events.Tensors("changes/text_summary")[0]
    assert text.step == 4 and b"optimizer.lr: 0.05 -> 0.01" in text.tensor_proto.string_val[0]
    logged_lrs = {event.step: event.value for event in events.Scalars("lr/all")}
    assert logged_lrs[4] == pytest.approx(0.05 * 4 / 7) and logged_lrs[5] == pytest.approx(0.01 * 5 / 7)


def test_resume_refuses_momentum_that_the_schedule_sets(tmp_path):
    stopped(built(tmp_path / "run", "schedule=one_cycle"), 4)
    with pytest.raises(ConfigError, match=r"optimizer.momentum: cannot be changed: schedule.momentum sets"):
        reopened(tmp_path / "run", "optimizer.momentum=0.5")


def test_resume_refuses_flags_and_accepts_a_moved_folder(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder), 4)
    with pytest.raises(ConfigError, match="cannot be combined with resume="):
        reopened(folder, "-m")
    with pytest.raises(CheckpointError, match="no such run folder"):
        resumed_config(tmp_path / "nowhere", [], TrainConfig)
    moved = tmp_path / "elsewhere" / "run, again=[1]"
    moved.parent.mkdir()
    folder.rename(moved)
    run = Run.resume(resumed_config(moved, [], TrainConfig))
    assert run is not None
    run_to_end(run)
    assert run.state.step == 12


# Image files


@pytest.fixture
def image_root(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(36):
        path = tmp_path / "images" / f"class {index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 8), dtype=np.uint8)).save(path)
    return tmp_path / "images"


FILES = (
    *("data=image_folder", "data.image_size=8", "data.channels=1", "data.batch_size=4", "data.val_fraction=0.2"),
    *("augment=[crop_flip,affine]", "model.dropout=0.2"),
)


def test_resume_reads_the_data_root_from_the_environment(tmp_path, monkeypatch, uninterrupted, image_root):
    monkeypatch.setenv("PRECEPTOR_DATA", str(image_root))
    folder = tmp_path / "run"
    stopped(built(folder, *FILES, "data.root=${oc.env:PRECEPTOR_DATA}"), 4)
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"] == "environment:PRECEPTOR_DATA"
    for path in folder.rglob("*"):
        assert path.is_dir() or str(image_root).encode() not in path.read_bytes(), path
    moved = image_root.rename(tmp_path / "moved")
    before = contents(folder)
    with pytest.raises(DataError, match="images"):
        reopened(folder)
    assert contents(folder) == before
    monkeypatch.setenv("PRECEPTOR_DATA", str(moved))
    resume_to_end(folder)
    assert last_state(folder) == last_state(uninterrupted(*FILES, f"data.root={moved}"))


def test_resume_refuses_an_added_image_file(tmp_path, image_root):
    folder = tmp_path / "run"
    stopped(built(folder, *FILES, f"data.root={image_root}"), 4)
    shutil.copy(image_root / "class 0" / "0.png", image_root / "class 0" / "99.png")
    with pytest.raises(CheckpointError, match="fingerprint"):
        reopened(folder)
    (image_root / "class 0" / "99.png").unlink()
    resume_to_end(folder)


def test_failed_resume_releases_the_lock(tmp_path):
    """After any error during a resume, the same process can resume again."""
    folder = tmp_path / "run"
    stopped(built(folder), 4)
    for path in (folder / "checkpoints").iterdir():
        path.rename(path.with_suffix(".away"))
    with pytest.raises(CheckpointError, match="there is none"):
        reopened(folder)
    for path in (folder / "checkpoints").iterdir():
        path.rename(path.with_suffix(".safetensors"))
    resume_to_end(folder)


def test_resume_continues_the_clock(tmp_path):
    folder = tmp_path / "run"
    stopped(built(folder), 4)
    before = json.loads((folder / "summary.json").read_text())
    run = resume_to_end(folder)
    after = json.loads((folder / "summary.json").read_text())
    assert after["seconds"] > before["seconds"] > 0 and math.isfinite(after["samples_per_second"])
    assert run.state.clock.samples == 88  # each sample once
    assert composed().record["run_dir"] is None  # the shared cached config is unchanged


# Advice in error messages can be followed


@pytest.mark.parametrize("change", ["optimizer.lr=0.01", "trainer.clip_norm=1.0", "trainer.on_nonfinite=skip"])
def test_advice_after_a_nonfinite_step_is_free_on_resume(tmp_path, change):
    assert change.partition("=")[0] in str(nonfinite.stopped("step 1", "x"))
    stopped(built(tmp_path / "run"), 4)
    resumed = reopened(tmp_path / "run", change)
    assert resumed is not None
    run_to_end(resumed)
    assert read_lines(tmp_path / "run/events.jsonl")[-1]["changes"].keys() == {change.partition("=")[0]}


def test_advice_after_out_of_memory_is_free_on_resume(tmp_path):
    """Smaller batches with the same number of samples per step: the weights differ only by rounding."""
    assert "smaller data.batch_size with a larger trainer.accumulate" in str(as_preceptor_error(MemoryError()))
    overrides = ("trainer.max_epochs=3", "model.batch_norm=false")
    reference = trained(tmp_path / "uninterrupted", *overrides)
    stopped(built(tmp_path / "run", *overrides), 8)
    resumed = reopened(tmp_path / "run", "data.batch_size=4", "trainer.accumulate=2")
    assert resumed is not None
    assert [len(batch.labels) for batch in next(iter(resumed.training.train_loader.steps(0)))] == [4, 4]
    run_to_end(resumed)
    for parameter, expected in zip(resumed.state.model.parameters(), reference.state.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["data.batch_size=4"],
            "may not change data.batch_size: 8 -> 4.*x trainer.accumulate stays equal",
        ),
        (["data.batch_size=4", "trainer.accumulate=3"], "may not change data.batch_size: 8 -> 4; trainer.accumulate"),
    ],
)
def test_resume_refuses_another_number_of_samples_per_step(tmp_path, changes, message):
    stopped(built(tmp_path / "run"), 4)
    with pytest.raises(CheckpointError, match=message):
        reopened(tmp_path / "run", *changes)


def test_resume_refuses_batches_that_change_steps_per_epoch(tmp_path):
    """Of 44 samples, batches of 20 drop 4 and batches of 4 drop none."""
    stopped(built(tmp_path / "run", "data.batch_size=20", "data.drop_last=true"), 1)
    with pytest.raises(CheckpointError, match=r"data.batch_size.*an epoch would have 3 steps, not 2 as before"):
        reopened(tmp_path / "run", "data.batch_size=4", "trainer.accumulate=5")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_clusters_save_and_stop_the_run(tmp_path, uninterrupted, number):
    """SLURM's --signal=USR1@60 and submitit's SIGUSR2: the resumed run ends bit-identical to an uninterrupted one."""
    run = built(tmp_path / "run")
    stop_after(run, 4, number)
    with pytest.raises(StopSignal) as stop:
        run_to_end(run)
    assert stop.value.exit_code == 128 + number and run.state.step == 4
    resume_to_end(tmp_path / "run")
    assert last_state(tmp_path / "run") == last_state(uninterrupted())


def test_hparams_show_the_values_after_the_last_resume_and_scalars_stay(tmp_path):
    folder = tmp_path / "run"
    trained(folder, "trainer.max_epochs=1", "optimizer.lr=0.25")
    for epochs, learning_rate in ((2, 0.125), (3, 0.0625)):
        run_to_end(reopened(folder, f"trainer.max_epochs={epochs}", f"optimizer.lr={learning_rate}"))
        reader = EventAccumulator(str(folder)).Reload()  # as TensorBoard reads a run
        content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        shown = HParamsPluginData.FromString(content).session_start_info.hparams
        assert shown["optimizer.lr"].number_value == learning_rate
        assert shown["trainer.max_epochs"].number_value == epochs
        steps = [line["step"] for line in read_lines(folder / "metrics.jsonl")]
        assert [event.step for event in reader.Scalars("val/loss")] == steps and len(steps) == epochs
