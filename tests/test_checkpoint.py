"""Checkpoints and run folders: whole or not there, damage always noticed, foreign formats never opened."""

import errno
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import built, composed, packed

from core.errors import CheckpointError, SecurityError, StorageError
from core.json_lines import read_lines
from trainer.build.training import build
from trainer.storage.checkpoint import (
    FORMAT,
    CheckpointFolder,
    Snapshot,
    digest,
    load_weights_file,
    unpack,
)
from trainer.storage.run_folder import RunFolder, default_path
from trainer.storage.safetensors_file import read_header

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
KEEP = {"last": 2, "best": 2, "step": None}


def snapshot(step: int = 0) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {f"model.{name}": torch.randn(7, 5, generator=generator) for name in ("weight", "bias", "scale")}
    return Snapshot(tensors, {"step": step, "best": {}, "text": "ünï"})


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)))


def assert_same(one: Snapshot, other: Snapshot) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    assert all(same_bits(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert other.values == {"format": FORMAT, **one.values}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".new"))]


# Bytes


def test_equal_snapshots_give_equal_bytes():
    first = snapshot(3)
    turned = Snapshot(dict(reversed(first.tensors.items())), dict(reversed(first.values.items())))
    assert packed(first) == packed(turned) == packed(snapshot(3)) != packed(snapshot(4))


def test_every_dtype_is_restored_bit_identically():
    numbers = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-3, 7.0, 100.0])
    tensors = {str(dtype): numbers.to(dtype) for dtype in DTYPES}
    tensors |= {"nan": torch.tensor([torch.nan, torch.inf, -torch.inf]), "scalar": torch.tensor(3)}
    tensors |= {"empty": torch.empty(0, 4)}
    made = Snapshot(tensors, {"step": 1, "float": 0.1 + 0.2, "none": None})
    assert_same(made, unpack(packed(made), source=Path("x")))


def test_every_memory_layout_is_restored():
    weight = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)
    whole = torch.randn(40)
    tensors = {"channels_last": weight, "turned": torch.randn(4, 6).T, "part": whole[3:9], "strided": whole[::3]}
    tensors |= {"tied.a": whole, "tied.b": whole, "expanded": torch.ones(1).expand(5), "overlap": whole[5:20]}
    made = Snapshot(tensors, {"step": 1})
    assert_same(made, unpack(packed(made), source=Path("x")))


def test_snapshot_returns_parts_and_evaluation_weights():
    one = torch.ones(1)
    made = Snapshot({"model.a.b": one, "model.c": one, "ema.a.b": 2 * one, "emax": one}, {"step": 5})
    assert made.step == 5 and set(made.part("model")) == {"a.b", "c"}
    assert made.weights == {"a.b": 2 * one}
    assert set(Snapshot({"model.c": one}, {}).weights) == {"c"}


def test_checkpoint_of_another_format_is_refused_by_unpack():
    content = safetensors.torch.save({"a": torch.ones(1)}, metadata={"preceptor": json.dumps({"format": 5, "step": 1})})
    with pytest.raises(CheckpointError, match="format 5; this version reads format 4"):
        unpack(content, source=Path("x"))
    with pytest.raises(CheckpointError, match="not a checkpoint of Preceptor"):
        unpack(safetensors.torch.save({"a": torch.ones(1)}), source=Path("x"))


# Generations


def test_checkpoint_names_and_number_of_generations(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in range(1, 6):
        folder.save(["last", "step"] if step != 3 else ["best"], snapshot(step), keep={**KEEP, "step": 3})
    assert [file.step for file in folder.files("last")] == [5, 4]
    assert [file.step for file in folder.files("step")] == [5, 4, 2]
    assert [file.step for file in folder.files("best")] == [3]
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 6
    assert f"last-00000005-{digest(packed(snapshot(5)))}.safetensors" in names
    found, path, damaged = folder.load("last", "best")
    assert_same(snapshot(5), found)
    assert path.name in names and damaged == {}


def test_all_checkpoints_are_kept_without_a_limit(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in range(5):
        folder.save(["step"], snapshot(step), keep=KEEP)
    assert [file.step for file in folder.files("step")] == [4, 3, 2, 1, 0]


def test_checkpoints_are_ordered_by_step_number(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (99_999_999, 100_000_001):  # eight digits, and nine
        folder.save(["last"], snapshot(step), keep=KEEP)
    assert folder.load("last")[0].step == 100_000_001


def test_other_files_are_no_checkpoints(tmp_path):
    for name in ("last-1-abc.safetensors", "last-00000001-0123456789abcdef.safetensors.tmp", "old-00000001-x.pt", "a"):
        (tmp_path / name).write_bytes(b"x")
    assert CheckpointFolder(tmp_path).files("last", "best", "step") == []
    with pytest.raises(CheckpointError, match="there is none"):
        CheckpointFolder(tmp_path / "nowhere").load("last")


# Damage


def test_every_flipped_bit_is_noticed_and_the_older_one_used(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(["last"], snapshot(1), keep=KEEP)
    (newest,) = folder.save(["last"], snapshot(2), keep=KEEP)
    good, draw = newest.path.read_bytes(), random.Random(0)
    for _ in range(400):
        place = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        newest.path.write_bytes(bad)
        found, _, damaged = folder.load("last")
        assert found.step == 1 and len(damaged) == 1 and list(damaged) == [newest.path], place
    newest.path.write_bytes(good)
    assert folder.load("last")[0].step == 2


def test_every_truncation_is_noticed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(["last"], snapshot(1), keep=KEEP)
    (newest,) = folder.save(["last"], snapshot(2), keep=KEEP)
    good = newest.path.read_bytes()
    for length in (*range(0, len(good), 7), len(good) - 1):
        newest.path.write_bytes(good[:length])
        assert folder.load("last")[0].step == 1
    newest.path.write_bytes(good + b"\0")
    assert folder.load("last")[0].step == 1


def test_error_lists_each_damaged_checkpoint_if_none_is_usable(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        for file in folder.save(["last", "best"], snapshot(step), keep=KEEP):
            file.path.write_bytes(b"x" * step)
    with pytest.raises(CheckpointError) as caught:
        folder.load("last", "best", "step")
    assert all(path.name in str(caught.value) for path in tmp_path.iterdir())
    assert "2 bytes" in str(caught.value) and caught.value.exit_code == 6


# Foreign formats


class Payload:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def payloads(target: Path, folder: Path) -> dict[str, bytes]:
    found = {f"pickle {protocol}": pickle.dumps(Payload(target), protocol) for protocol in range(6)}
    for name, is_zip in (("torch zip", True), ("torch legacy", False)):
        torch.save(Payload(target), folder / "file", _use_new_zipfile_serialization=is_zip)
        found[name] = (folder / "file").read_bytes()
    np.save(folder / "file.npy", np.array([Payload(target)], dtype=object), allow_pickle=True)
    found["numpy"] = (folder / "file.npy").read_bytes()
    with zipfile.ZipFile(folder / "file.zip", "w") as archive:
        archive.writestr("data.pkl", found["pickle 4"])
    found["zip"] = (folder / "file.zip").read_bytes()
    found |= {"gzip": b"\x1f\x8b\x08\x00" + b"\0" * 60, "zlib": b"\x78\x9c" + b"\0" * 60, "tar": b"name" + b"\0" * 600}
    return found


def test_pickles_and_archives_are_never_opened(tmp_path, monkeypatch):
    target = tmp_path / "written"
    made = payloads(target, tmp_path)
    pickle.loads(made["pickle 4"])  # noqa: S301  the payload works
    assert target.exists()
    target.unlink()

    def parse(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(safetensors.torch, "load", parse)
    for name, content in made.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(SecurityError) as caught:
            load_weights_file(path)
        assert caught.value.exit_code == 7 and str(path) in str(caught.value), name

        folder = CheckpointFolder(tmp_path / name)
        folder.path.mkdir()
        (folder.path / f"last-00000001-{digest(content)}.safetensors").write_bytes(content)  # its hash is right
        with pytest.raises(SecurityError):
            folder.load("last")
    assert not target.exists()


def test_valid_safetensors_of_every_kind_are_read():
    for tensors in ({}, {"a": torch.ones(1)}, {"name" * 100: torch.ones(2), "b": torch.zeros(200_000)}):
        read_header(safetensors.torch.save(tensors), source=Path("x"))


def test_weights_of_any_safetensors_file(tmp_path):
    (tmp_path / "plain").write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    (tmp_path / "ours").write_bytes(packed(Snapshot({"model.a": torch.ones(3), "sums.x": torch.ones(1)}, {"step": 1})))
    assert set(load_weights_file(tmp_path / "plain")) == {"a"} == set(load_weights_file(tmp_path / "ours"))
    for name, content in (("cut", (tmp_path / "plain").read_bytes()[:-1]), ("huge", b"\xff" * 7 + b"\x7f{" + b" " * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            load_weights_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights_file(tmp_path / "nowhere")


# Writes that fail

FULL = OSError(errno.ENOSPC, "No space left on device")


def failing_write(monkeypatch: pytest.MonkeyPatch, where: str, call: int) -> None:
    """The call-th write, fsync or rename of a process raises ENOSPC."""
    real, calls = getattr(os, where), iter(range(10_000))

    def fail(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise FULL
        return real(*arguments, **named)

    monkeypatch.setattr(os, where, fail)


@pytest.mark.parametrize(("where", "call"), [("write", 0), ("fsync", 0), ("replace", 0), ("fsync", 1)])
def test_a_failed_write_leaves_the_older_generation(tmp_path, monkeypatch, where, call):
    folder = CheckpointFolder(tmp_path)
    folder.save(["last", "best"], snapshot(1), keep={"last": 1, "best": 1})
    before = {path.name for path in tmp_path.iterdir()}
    failing_write(monkeypatch, where, call)
    with pytest.raises(StorageError) as caught:
        folder.save(["last", "best"], snapshot(2), keep={"last": 1, "best": 1})
    monkeypatch.undo()
    assert caught.value.exit_code == 5 and "No space left" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert before <= {path.name for path in tmp_path.iterdir()}
    assert leftovers(tmp_path) == []
    folder.load("last")
    assert folder.load("best")[0].step == 1


def test_two_kinds_of_one_step_share_a_file_if_links_are_possible(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for step in (1, 2):
        best, last = CheckpointFolder(tmp_path).save(["best", "last"], snapshot(step), keep=KEEP)
        assert best.path.read_bytes() == last.path.read_bytes() == packed(snapshot(step))
        assert (best.path.stat().st_ino == last.path.stat().st_ino) == (step == 1)
        CheckpointFolder(tmp_path).save(["best", "last"], snapshot(step), keep=KEEP)  # again, over existing files
        monkeypatch.setattr(os, "link", refuse)
    assert leftovers(tmp_path) == []


def test_files_cannot_be_written_by_others(tmp_path):
    before = os.umask(0)
    try:
        CheckpointFolder(tmp_path).save(["last"], snapshot(1), keep=KEEP)
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o022 == 0 for path in tmp_path.iterdir())


# The run folder


def test_run_folder_is_created_atomically(tmp_path, monkeypatch):
    seen: list[list[str]] = []
    rename = Path.rename

    def look(newborn: Path, path: Path) -> Path:
        seen.append(sorted(str(file.relative_to(newborn)) for file in newborn.rglob("*") if file.is_file()))
        assert newborn.name.startswith(".") and newborn.parent == path.parent and not path.exists()
        return rename(newborn, path)

    monkeypatch.setattr(Path, "rename", look)
    folder = RunFolder.create(tmp_path / "run", record={"seed": 1}, first=snapshot(0))
    monkeypatch.undo()
    name = f"checkpoints/last-00000000-{digest(packed(snapshot(0)))}.safetensors"
    assert seen == [[".lock", name, "config.yaml", "events.jsonl", "metrics.jsonl"]]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder.path / "config.yaml").read_text() == "seed: 1\n"
    folder.close()


@pytest.mark.parametrize(("where", "call"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)])
def test_failed_creation_of_a_run_folder_leaves_nothing(tmp_path, monkeypatch, where, call):
    failing_write(monkeypatch, where, call)
    with pytest.raises(StorageError):
        RunFolder.create(tmp_path / "run", record={}, first=snapshot(0))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_config_error_leaves_no_run_folder(tmp_path):
    config = composed("schedule.warmup_epochs=99")
    config.values["run_dir"] = str(tmp_path / "run")
    with pytest.raises(Exception, match="warm-up"):
        build(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_existing_path_is_not_touched(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("mine")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="exists already.*resume="):
        built(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_second_of_two_concurrent_creations_is_refused(tmp_path, monkeypatch):
    """Another process takes the name after the first check."""
    rename = Path.rename

    def be_faster(newborn: Path, path: Path) -> Path:
        monkeypatch.undo()
        RunFolder.create(path, record={"seed": 1}, first=snapshot(0)).close()
        return rename(newborn, path)

    monkeypatch.setattr(Path, "rename", be_faster)
    with pytest.raises(StorageError, match="exists already"):
        RunFolder.create(tmp_path / "run", record={"seed": 2}, first=snapshot(0))
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


HOLD = """
import sys
from pathlib import Path
from trainer.storage.run_folder import RunFolder
folder = RunFolder.open(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


def test_folder_in_use_is_refused_and_names_the_process(tmp_path):
    RunFolder.create(tmp_path / "run", record={}, first=snapshot(0)).close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **PATH})
    assert child.stdin is not None and child.stdout is not None
    with child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(StorageError) as caught:
            RunFolder.open(tmp_path / "run")
        assert f"in use by process {child.pid} on " in str(caught.value) and caught.value.exit_code == 5
        child.kill()  # the lock goes with its process, however that ends
        child.wait()
    RunFolder.open(tmp_path / "run").close()


PATH = {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}


def test_missing_run_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such run folder"):
        RunFolder.open(tmp_path / "nowhere")


def test_rewind_drops_an_incomplete_line_and_later_steps(tmp_path):
    folder = RunFolder.create(tmp_path / "run", record={}, first=snapshot(0))
    for step in (2, 4, 6):
        folder.append_metrics({"step": step, "value": 0.1 + 0.2})
        folder.append_event("warning", step=step)
    whole = (folder.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder.path / name).open("a") as file:
            file.write('{"step": 8, "val')
    assert [line["step"] for line in folder.metrics()] == [2, 4, 6]
    folder.rewind(4)
    assert (folder.path / "metrics.jsonl").read_text() == "".join(whole[:2])
    folder.append_metrics({"step": 6})
    folder.append_event("resume", step=4)
    folder.close()
    assert [line["step"] for line in read_lines(folder.path / "metrics.jsonl")] == [2, 4, 6]
    events = read_lines(folder.path / "events.jsonl")  # what happened is never taken back
    assert [(line["event"], line["step"]) for line in events] == [
        *[("warning", step) for step in (2, 4, 6)],
        ("resume", 4),
    ]


def test_default_names_are_unique_and_plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = set()
    for _ in range(3):
        path = default_path("re,s=[net]", "da ta")
        path.mkdir(parents=True)
        made.add(path.name)
        assert path.parent == Path("outputs") and not set(path.name) & set("=,[] ")
    assert len(made) == 3
