"""Checkpoints and run folders: atomic creation, detection of damage, refusal of foreign formats."""

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


def bit_identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    has_same_type = first.dtype == second.dtype and first.shape == second.shape
    return has_same_type and torch.equal(
        *(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (first, second))
    )


def assert_same(expected: Snapshot, actual: Snapshot) -> None:
    assert expected.tensors.keys() == actual.tensors.keys()
    assert all(bit_identical(tensor, actual.tensors[name]) for name, tensor in expected.tensors.items())
    assert actual.values == {"format": FORMAT, **expected.values}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".new"))]


# Bytes


def test_equal_snapshots_give_equal_bytes():
    first = snapshot(3)
    reordered = Snapshot(dict(reversed(first.tensors.items())), dict(reversed(first.values.items())))
    assert packed(first) == packed(reordered) == packed(snapshot(3)) != packed(snapshot(4))


def test_every_dtype_is_restored_bit_identically():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-3, 7.0, 100.0])
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    tensors |= {"nan": torch.tensor([torch.nan, torch.inf, -torch.inf]), "scalar": torch.tensor(3)}
    tensors |= {"empty": torch.empty(0, 4)}
    original = Snapshot(tensors, {"step": 1, "float": 0.1 + 0.2, "none": None})
    assert_same(original, unpack(packed(original), source=Path("x")))


def test_every_memory_layout_is_restored():
    weight = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)
    base = torch.randn(40)
    tensors = {"channels_last": weight, "transposed": torch.randn(4, 6).T, "slice": base[3:9], "strided": base[::3]}
    tensors |= {"tied.a": base, "tied.b": base, "expanded": torch.ones(1).expand(5), "overlap": base[5:20]}
    original = Snapshot(tensors, {"step": 1})
    assert_same(original, unpack(packed(original), source=Path("x")))


def test_snapshot_returns_tensors_by_prefix_and_evaluation_weights():
    tensor = torch.ones(1)
    combined = Snapshot({"model.a.b": tensor, "model.c": tensor, "ema.a.b": 2 * tensor, "emax": tensor}, {"step": 5})
    assert combined.step == 5 and set(combined.part("model")) == {"a.b", "c"}
    assert combined.weights == {"a.b": 2 * tensor}
    assert set(Snapshot({"model.c": tensor}, {}).weights) == {"c"}


def test_checkpoint_of_another_format_is_refused_by_unpack():
    content = safetensors.torch.save({"a": torch.ones(1)}, metadata={"preceptor": json.dumps({"format": 5, "step": 1})})
    with pytest.raises(CheckpointError, match="format 5; this version reads format 4"):
        unpack(content, source=Path("x"))
    with pytest.raises(CheckpointError, match="not a checkpoint of Preceptor"):
        unpack(safetensors.torch.save({"a": torch.ones(1)}), source=Path("x"))


# Generations


def test_checkpoint_names_contain_step_and_digest_and_old_generations_are_removed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in range(1, 6):
        folder.save(["last", "step"] if step != 3 else ["best"], snapshot(step), keep={**KEEP, "step": 3})
    assert [file.step for file in folder.files("last")] == [5, 4]
    assert [file.step for file in folder.files("step")] == [5, 4, 2]
    assert [file.step for file in folder.files("best")] == [3]
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 6
    assert f"last-00000005-{digest(packed(snapshot(5)))}.safetensors" in names
    loaded, path, damaged = folder.load("last", "best")
    assert_same(snapshot(5), loaded)
    assert path.name in names and damaged == {}


def test_all_checkpoints_are_kept_without_a_limit(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in range(5):
        folder.save(["step"], snapshot(step), keep=KEEP)
    assert [file.step for file in folder.files("step")] == [4, 3, 2, 1, 0]


def test_checkpoints_are_ordered_by_step_number(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (99_999_999, 100_000_001):  # eight and nine digits
        folder.save(["last"], snapshot(step), keep=KEEP)
    assert folder.load("last")[0].step == 100_000_001


def test_files_with_other_names_are_not_listed_as_checkpoints(tmp_path):
    for name in ("last-1-abc.safetensors", "last-00000001-0123456789abcdef.safetensors.tmp", "old-00000001-x.pt", "a"):
        (tmp_path / name).write_bytes(b"x")
    assert CheckpointFolder(tmp_path).files("last", "best", "step") == []
    with pytest.raises(CheckpointError, match="there is none"):
        CheckpointFolder(tmp_path / "nowhere").load("last")


# Damage


def test_every_flipped_bit_is_detected_and_the_older_checkpoint_is_used(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(["last"], snapshot(1), keep=KEEP)
    (newest,) = folder.save(["last"], snapshot(2), keep=KEEP)
    intact, generator = newest.path.read_bytes(), random.Random(0)
    for _ in range(400):
        bit = generator.randrange(8 * len(intact))
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        newest.path.write_bytes(flipped)
        loaded, _, damaged = folder.load("last")
        assert loaded.step == 1 and len(damaged) == 1 and list(damaged) == [newest.path], bit
    newest.path.write_bytes(intact)
    assert folder.load("last")[0].step == 2


def test_every_truncation_is_detected(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(["last"], snapshot(1), keep=KEEP)
    (newest,) = folder.save(["last"], snapshot(2), keep=KEEP)
    intact = newest.path.read_bytes()
    for length in (*range(0, len(intact), 7), len(intact) - 1):
        newest.path.write_bytes(intact[:length])
        assert folder.load("last")[0].step == 1
    newest.path.write_bytes(intact + b"\0")
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
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def payloads(target: Path, folder: Path) -> dict[str, bytes]:
    contents = {f"pickle {protocol}": pickle.dumps(Payload(target), protocol) for protocol in range(6)}
    for name, is_zip in (("torch zip", True), ("torch legacy", False)):
        torch.save(Payload(target), folder / "file", _use_new_zipfile_serialization=is_zip)
        contents[name] = (folder / "file").read_bytes()
    np.save(folder / "file.npy", np.array([Payload(target)], dtype=object), allow_pickle=True)
    contents["numpy"] = (folder / "file.npy").read_bytes()
    with zipfile.ZipFile(folder / "file.zip", "w") as archive:
        archive.writestr("data.pkl", contents["pickle 4"])
    contents["zip"] = (folder / "file.zip").read_bytes()
    contents |= {
        "gzip": b"\x1f\x8b\x08\x00" + b"\0" * 60,
        "zlib": b"\x78\x9c" + b"\0" * 60,
        "tar": b"name" + b"\0" * 600,
    }
    return contents


def test_pickles_and_archives_are_never_opened(tmp_path, monkeypatch):
    target = tmp_path / "written"
    contents = payloads(target, tmp_path)
    pickle.loads(contents["pickle 4"])  # noqa: S301  the payload runs if it is unpickled
    assert target.exists()
    target.unlink()

    def parse(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(safetensors.torch, "load", parse)
    for name, content in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(SecurityError) as caught:
            load_weights_file(path)
        assert caught.value.exit_code == 7 and str(path) in str(caught.value), name

        folder = CheckpointFolder(tmp_path / name)
        folder.path.mkdir()
        (folder.path / f"last-00000001-{digest(content)}.safetensors").write_bytes(content)  # with the correct hash
        with pytest.raises(SecurityError):
            folder.load("last")
    assert not target.exists()


def test_valid_safetensors_of_every_kind_are_read():
    for tensors in ({}, {"a": torch.ones(1)}, {"name" * 100: torch.ones(2), "b": torch.zeros(200_000)}):
        read_header(safetensors.torch.save(tensors), source=Path("x"))


def test_weights_are_loaded_from_any_safetensors_file(tmp_path):
    (tmp_path / "plain").write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    (tmp_path / "checkpoint").write_bytes(
        packed(Snapshot({"model.a": torch.ones(3), "sums.x": torch.ones(1)}, {"step": 1}))
    )
    assert set(load_weights_file(tmp_path / "plain")) == {"a"} == set(load_weights_file(tmp_path / "checkpoint"))
    for name, content in (("cut", (tmp_path / "plain").read_bytes()[:-1]), ("huge", b"\xff" * 7 + b"\x7f{" + b" " * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            load_weights_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights_file(tmp_path / "nowhere")


# Writes that fail

FULL = OSError(errno.ENOSPC, "No space left on device")


def failing_write(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Make one call of `os.<function>` raise ENOSPC: the one with index `call`, counted from 0."""
    real, calls = getattr(os, function), iter(range(10_000))

    def fail(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise FULL
        return real(*arguments, **options)

    monkeypatch.setattr(os, function, fail)


@pytest.mark.parametrize(("function", "call"), [("write", 0), ("fsync", 0), ("replace", 0), ("fsync", 1)])
def test_failed_write_keeps_the_older_generation(tmp_path, monkeypatch, function, call):
    folder = CheckpointFolder(tmp_path)
    folder.save(["last", "best"], snapshot(1), keep={"last": 1, "best": 1})
    before = {path.name for path in tmp_path.iterdir()}
    failing_write(monkeypatch, function, call)
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


def test_checkpoint_files_are_not_writable_by_other_users(tmp_path):
    umask_before = os.umask(0)
    try:
        CheckpointFolder(tmp_path).save(["last"], snapshot(1), keep=KEEP)
    finally:
        os.umask(umask_before)
    assert all(path.stat().st_mode & 0o022 == 0 for path in tmp_path.iterdir())


# The run folder


def test_run_folder_is_created_atomically(tmp_path, monkeypatch):
    listings: list[list[str]] = []
    rename = Path.rename

    def record_files(unfinished: Path, path: Path) -> Path:
        listings.append(sorted(str(file.relative_to(unfinished)) for file in unfinished.rglob("*") if file.is_file()))
        assert unfinished.name.startswith(".") and unfinished.parent == path.parent and not path.exists()
        return rename(unfinished, path)

    monkeypatch.setattr(Path, "rename", record_files)
    folder = RunFolder.create(tmp_path / "run", record={"seed": 1}, first=snapshot(0))
    monkeypatch.undo()
    name = f"checkpoints/last-00000000-{digest(packed(snapshot(0)))}.safetensors"
    assert listings == [[".lock", name, "config.yaml", "events.jsonl", "metrics.jsonl"]]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder.path / "config.yaml").read_text() == "seed: 1\n"
    folder.close()


@pytest.mark.parametrize(("function", "call"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)])
def test_failed_creation_of_a_run_folder_leaves_no_files(tmp_path, monkeypatch, function, call):
    failing_write(monkeypatch, function, call)
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
def test_existing_path_is_refused_and_unchanged(tmp_path, kind):
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
    """Another process creates the folder after the first check."""
    rename = Path.rename

    def create_first(unfinished: Path, path: Path) -> Path:
        monkeypatch.undo()
        RunFolder.create(path, record={"seed": 1}, first=snapshot(0)).close()
        return rename(unfinished, path)

    monkeypatch.setattr(Path, "rename", create_first)
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
        child.kill()  # the system releases the lock of a killed process
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
    complete_lines = (folder.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder.path / name).open("a") as file:
            file.write('{"step": 8, "val')
    assert [line["step"] for line in folder.metrics()] == [2, 4, 6]
    folder.rewind(4)
    assert (folder.path / "metrics.jsonl").read_text() == "".join(complete_lines[:2])
    folder.append_metrics({"step": 6})
    folder.append_event("resume", step=4)
    folder.close()
    assert [line["step"] for line in read_lines(folder.path / "metrics.jsonl")] == [2, 4, 6]
    events = read_lines(folder.path / "events.jsonl")  # events are never removed
    assert [(line["event"], line["step"]) for line in events] == [
        *[("warning", step) for step in (2, 4, 6)],
        ("resume", 4),
    ]


def test_default_run_names_are_unique_and_have_no_special_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = set()
    for _ in range(3):
        path = default_path("re,s=[net]-da ta")
        path.mkdir(parents=True)
        names.add(path.name)
        assert path.parent == Path("outputs") and not set(path.name) & set("=,[] ")
    assert len(names) == 3
