"""Special files (FIFOs, sockets, devices, links) in place of regular files, and hostile YAML.

Each is refused at once, with one line. The program does not read endlessly, wait for, follow or replace any of them.
"""

import csv
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import built, composed, fork_script, packed, reopened, trained, wait_for_exit
from PIL import Image

from analysis.evaluate import evaluate_run
from analysis.predict import image_paths
from analysis.runs_table import read_row
from core.config import Config
from core.durable import write_output
from core.errors import CheckpointError, ConfigError, DataError, PreceptorError, SecurityError, StorageError, printable
from core.json_lines import read_lines
from core.options.declarations import TrainConfig
from core.options.files import _expanded_size
from core.regular_files import IrregularFile, append_regular, open_regular, read_regular
from core.resume import resumed_config
from core.run_config import read_run_config
from data.sources.decode import BadImage, decode
from sweeps.execute.database import _without_password, sqlite_url
from trainer.inference.load_run import load_run
from trainer.run import Run
from trainer.snapshot import Snapshot
from trainer.state import load_optimizer_state
from trainer.storage.checkpoint import CheckpointFolder, digest, load_weights_file, unpack
from trainer.storage.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _limit_test_time() -> Iterator[None]:
    """Abort a test that blocks on a FIFO or a device."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("the test blocks")))
    signal.alarm(20)
    yield
    signal.alarm(0)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    working_directory = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    server.bind(path.name)
    os.chdir(working_directory)
    server.close()


def zero_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


KINDS = {"a FIFO": fifo, "a socket": unix_socket, "a device": zero_device, "a folder": folder}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "file"
    KINDS[kind](path)
    with pytest.raises(IrregularFile, match=f"is {kind}: must be a regular file"):
        open_regular(path)
    if kind != "a device":
        with pytest.raises(OSError, match="must be a regular file|Is a directory"):
            append_regular(path, "text")


def test_links_are_followed_only_if_requested(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"content"
    with pytest.raises(IrregularFile, match="is a link"):
        read_regular(tmp_path / "link", follow=False)
    with pytest.raises(IrregularFile, match="is a link"):
        append_regular(tmp_path / "link", "more")
    with pytest.raises(OSError, match="has 7 bytes: must be at most 6") as caught:
        read_regular(tmp_path / "file", limit=6)
    assert caught.value.errno == errno.EFBIG and (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("kind", KINDS)
def test_special_file_in_place_of_a_checkpoint_or_config_is_refused(tmp_path, kind):
    """For a checkpoint the previous generation is used; for any other required file a CheckpointError is raised."""
    trained(tmp_path / "run", "trainer.max_epochs=2")
    checkpoints = CheckpointFolder(tmp_path / "run/checkpoints")
    newest, *_ = checkpoints.files("last", "best")
    older = checkpoints.load("best")[0].step
    newest.path.unlink()
    KINDS[kind](newest.path)
    snapshot, _, damaged = checkpoints.load("last", "best")
    assert older <= snapshot.step <= newest.step and "must be a regular file" in damaged[newest.path]
    config = tmp_path / "run/config.yaml"
    config.unlink()
    KINDS[kind](config)
    with pytest.raises(CheckpointError, match=r"config\.yaml: cannot be read: is a .*: must be a regular file"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_special_file_in_place_of_weights_or_an_image_is_refused(tmp_path, kind):
    path = tmp_path / "file.png"
    KINDS[kind](path)
    with pytest.raises(CheckpointError, match=f"cannot be read: is {kind}"):
        load_weights_file(path)
    with pytest.raises(BadImage, match=f"is {kind}"):
        decode(path, image_size=8, channels=1)


def test_predict_refuses_a_special_file_and_skips_them_in_folders(tmp_path):
    fifo(tmp_path / "input")
    with pytest.raises(DataError, match="neither a folder nor a regular file"):
        image_paths(tmp_path / "input")
    for name in ("a.png", "b.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    fifo(tmp_path / "c.png")
    assert [path.name for path in image_paths(tmp_path)] == ["a.png", "b.png"]


# Links in a run folder


def test_checkpoints_of_another_run_are_not_deleted_through_a_link(tmp_path):
    trained(tmp_path / "victim", "trainer.max_epochs=1")
    trained(tmp_path / "run", "trainer.max_epochs=1")
    before = sorted((tmp_path / "victim/checkpoints").iterdir())
    for file in (tmp_path / "run/checkpoints").iterdir():
        file.unlink()
    (tmp_path / "run/checkpoints").rmdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "victim/checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints: is a link: must be a real folder"):
        reopened(tmp_path / "run", "trainer.max_epochs=2")
    assert sorted((tmp_path / "victim/checkpoints").iterdir()) == before


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl"])
def test_logs_are_not_written_through_a_link(tmp_path, name):
    (tmp_path / "bashrc").write_text("precious\n")
    trained(tmp_path / "run", "trainer.max_epochs=1")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to(tmp_path / "bashrc")
    folder = RunFolder.open(tmp_path / "run")
    if name == "metrics.jsonl":
        with pytest.raises(OSError, match="is a link"):
            folder.append_metrics({"step": 1})
    folder.close()
    run = reopened(tmp_path / "run", "trainer.max_epochs=2")
    assert run is not None
    run.recorder.say("a line")
    run._closing.close()
    assert (tmp_path / "bashrc").read_text() == "precious\n"


# Output


def test_output_to_a_device_or_fifo_does_not_replace_it(tmp_path):
    write_output(Path("/dev/null"), b"text")
    assert Path("/dev/null").is_char_device()
    fifo(tmp_path / "pipe")
    content: list[bytes] = []
    reader = threading.Thread(target=lambda: content.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_output(tmp_path / "pipe", b"text")
    reader.join()
    assert content == [b"text"] and (tmp_path / "pipe").is_fifo()


def test_output_is_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    with pytest.raises(StorageError, match="cannot be written: Is a directory"):
        write_output(tmp_path, b"new")


# Text for terminals


def test_control_characters_are_escaped_in_messages():
    assert printable("a\x1b]0;title\x07b\u202ec\u2028d é 漢\n") == "a\\x1b]0;title\\x07b\\u202ec\\u2028d é 漢\n"
    assert str(ConfigError("run_dir", "exists", value="r\x1b[2J")) == "error[config] run_dir = r\\x1b[2J: exists"


def test_run_folder_named_like_markup_is_tested_and_summarised(tmp_path, capsys):
    run = trained(tmp_path / "r[/x][red]", "trainer.max_epochs=1")
    assert json.loads((run.folder.path / "summary.json").read_text())["status"] == "finished"
    assert "r[/x][red]" in capsys.readouterr().out.replace("\n", "")


# YAML


def test_merge_keys_in_a_run_config_are_refused_unread(tmp_path):
    (tmp_path / "run").mkdir()
    lines = ["q0: &q0 {a: 1}", *(f"q{n}: &q{n} {{<<: [{', '.join([f'*q{n - 1}'] * 9)}]}}" for n in range(1, 40))]
    (tmp_path / "run/config.yaml").write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match="contains a YAML alias"):
        read_run_config(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("#" * 2**21)
    with pytest.raises(CheckpointError, match="must be at most 1,048,576"):
        read_run_config(tmp_path / "run")


def test_config_written_by_a_run_has_no_yaml_aliases(tmp_path):
    run = built(tmp_path / "run", "optimizer=adamw", "schedule=one_cycle")
    assert "&id" not in (tmp_path / "run/config.yaml").read_text()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == run.training.record


# Checkpoints


def safetensors_bytes(header: str, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (
            safetensors_bytes(
                '{"a":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}'
            ),
            "has a shape that is too large",
        ),
        (
            safetensors_bytes(
                "{" + ",".join(f'"{n}":{{"dtype":"F32","shape":[],"data_offsets":[0,0]}}' for n in range(60000)) + "}"
            ),
            "too many entries",
        ),
    ],
)
def test_hostile_header_is_a_checkpoint_error(tmp_path, content, message):
    path = tmp_path / f"last-00000001-{digest(content)}.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        unpack(content, source=path)
    with pytest.raises(CheckpointError, match=message):
        load_weights_file(path)


def forge_checkpoint(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> None:
    """Replace the newest checkpoint by one with a correct hash and changed tensors or values."""
    checkpoints = CheckpointFolder(folder / "checkpoints")
    snapshot = checkpoints.load("last")[0]
    tensors, values = dict(snapshot.tensors), dict(snapshot.values)
    change(tensors, values)
    for file in checkpoints.files("last", "best", "step"):
        file.path.unlink()
    content = packed(Snapshot(tensors, values))
    name = f"last-{snapshot.step:08d}-{digest(content)}.safetensors"
    (folder / "checkpoints" / name).write_bytes(content)


CHANGES: dict[str, Callable[[dict[str, torch.Tensor], dict[str, object]], object]] = {
    "no clock": lambda tensors, values: values.pop("clock"),
    "a guard of another kind": lambda tensors, values: values.update(guard=[1]),
    "a best of another kind": lambda tensors, values: values.update(best=3),
    "sums of another kind": lambda tensors, values: values.update(sums={"window": "x"}),
    "no data": lambda tensors, values: values.pop("data"),
    "a fingerprint missing": lambda tensors, values: values.update(data={}),
    "no steps per epoch": lambda tensors, values: values.pop("steps_per_epoch"),
    "no config": lambda tensors, values: values.pop("config"),
    "momentum of another shape": lambda tensors, values: tensors.update(
        {name: torch.ones(3, 5) for name in tensors if name.endswith("weight.momentum_buffer")}
    ),
    "complex momentum": lambda tensors, values: tensors.update(
        {name: tensors[name].to(torch.complex64) for name in tensors if name.endswith("momentum_buffer")}
    ),
    "integer weights": lambda tensors, values: tensors.update(
        {name: tensors[name].to(torch.int32) for name in tensors if name.startswith("model.")}
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_checkpoint_with_other_values_shapes_or_dtypes_is_refused(tmp_path, case):
    trained(tmp_path / "run", "trainer.max_epochs=1")
    forge_checkpoint(tmp_path / "run", CHANGES[case])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as caught:
        reopened(tmp_path / "run", "trainer.max_epochs=2")
    assert caught.value.exit_code == 6


def test_factored_optimizer_states_are_loaded():
    model = {"model": torch.nn.Linear(4, 3)}
    optimizer = torch.optim.Adafactor(model["model"].parameters())
    states = {"model.weight.row_var": torch.ones(3, 1), "model.weight.col_var": torch.ones(1, 4)}
    load_optimizer_state(model, optimizer, states | {"model.weight.step": torch.tensor(1.0)}, {})
    assert optimizer.state[model["model"].weight]["row_var"].shape == (3, 1)


def test_load_lists_the_folder_again_if_a_listed_checkpoint_was_replaced(tmp_path, monkeypatch):
    run = built(tmp_path / "run")
    checkpoints = run.folder.checkpoints
    files, stale = checkpoints.files, [checkpoints.files("last")]
    snapshot = checkpoints.load("last")[0]
    with run:
        pass
    snapshot.values["step"] = 3
    checkpoints.save(["last"], snapshot, keep={"last": 1})
    listings = iter([*stale, files("last"), files("last")])
    monkeypatch.setattr(CheckpointFolder, "files", lambda *_: next(listings))
    assert checkpoints.load("last")[0].step == 3


# Configs of run folders


def test_run_config_creates_no_cache_unless_the_user_sets_cache_dir(tmp_path, caplog):
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("L", (9, 9), 20 * number + index).save(tmp_path / "images" / name / f"{number}.png")
    overrides = ("data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=8", "data.batch_size=4")
    overrides += ("data.num_workers=0", "data.channels=1", "data.cache_dir=null")
    trained(tmp_path / "run", *overrides, "trainer.max_epochs=1")
    config = read_run_config(tmp_path / "run")
    config["data"]["cache_dir"] = str(tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".precious.tmp").write_text("mine")
    os.utime(tmp_path / "home" / ".precious.tmp", (0, 0))
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    run = reopened(tmp_path / "run", "trainer.max_epochs=2")
    assert run is not None
    run._closing.close()
    assert [path.name for path in (tmp_path / "home").iterdir()] == [".precious.tmp"]
    assert "a run's config creates none" in caplog.text
    run = reopened(tmp_path / "run", "trainer.max_epochs=2", f"data.cache_dir={tmp_path / 'mine'}")
    assert run is not None and list((tmp_path / "mine").glob("*.npy"))  # set by the user
    run._closing.close()


def test_run_config_downloads_neither_data_nor_default_weights():
    from trainer.build.trust import restricted

    config = composed("model=torchvision", "model.network._target_=torchvision.models.segmentation.fcn_resnet50").values
    network = restricted(config, trust=[])["model"]["network"]  # type: ignore[typeddict-item]
    assert network["weights_backbone"] is None
    assert restricted(composed().values, trust=[]) == composed().values | {"data": composed().values["data"]}
    forbidden = {**config, "data": {**config["data"], "download": True}}
    assert restricted(forbidden, trust=[])["data"]["download"] is False  # type: ignore[arg-type]
    assert restricted(forbidden, trust=[], given={"data.download"})["data"]["download"] is True  # type: ignore[arg-type]
    with pytest.raises(SecurityError):
        restricted({**config, "loss": {"_target_": "os.system"}}, trust=[])  # type: ignore[arg-type, typeddict-item]


# Tables and databases


def test_damaged_run_does_not_end_the_runs_table(tmp_path):
    run = trained(tmp_path / "run", "trainer.max_epochs=1").folder.path
    intact_row = read_row(run, tmp_path)
    assert intact_row is not None and intact_row["metrics"]["test/accuracy"] >= 0
    for content in ("[]", "{", '{"best": 3, "test": {"accuracy": "high"}}', '{"best": {"metrics": [1]}}'):
        (run / "summary.json").write_text(content)
        row = read_row(run, tmp_path)
        assert row is not None and row["metrics"] == {} and row["model"] == "mlp"
    (run / "config.yaml").write_text("choices: []\nseed: 1\n")
    assert read_row(run, tmp_path) is None
    assert list(csv.reader(["a"])) == [["a"]] and read_lines(run / "metrics.jsonl")


def test_passwords_in_the_query_of_a_database_url_are_hidden():
    assert "hunter2" not in _without_password("postgresql://me@host/base?password=hunter2&sslpassword=hunter2")
    assert "sslmode=require" in _without_password("postgresql://me:hunter2@host/base?sslmode=require")


def test_sweep_folder_that_does_not_fit_into_a_database_url_is_refused(tmp_path):
    assert sqlite_url(tmp_path / "a % # b" / "sweep.db").startswith("sqlite:///")
    with pytest.raises(ConfigError, match=r"sweep\.dir = .*: contains a character"):
        sqlite_url(tmp_path / "a?b" / "sweep.db")
    assert issubclass(ConfigError, PreceptorError)


# Names, umask, full standard output, YAML of the user


@pytest.mark.parametrize("length", [230, 242, 255])
def test_run_folder_may_have_every_name_that_the_file_system_allows(tmp_path, length):
    name = "ä" * 100 + "x" * (length - 200)  # in UTF-8
    assert len(os.fsencode(name)) == length
    trained(tmp_path / name, "trainer.max_epochs=1")
    assert Run.resume(resumed_config(tmp_path / name, [], TrainConfig)) is None  # finished
    write_output(tmp_path / ("y" * length), b"content")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "y" * length])


def test_folder_named_like_a_temporary_file_does_not_block_a_resume(tmp_path):
    run = trained(tmp_path / "run", "trainer.max_epochs=1")
    for parent in (run.folder.path, run.folder.path / "checkpoints"):
        (parent / ".metrics.jsonl.01234567.tmp").mkdir()
        (parent / ".train.log.01234567.tmp").write_text("left by a kill")
        (parent / ".link.01234567.tmp").symlink_to(tmp_path)
    resumed = reopened(tmp_path / "run", "trainer.max_epochs=2")
    assert resumed is not None
    resumed.folder.close()
    for parent in (run.folder.path, run.folder.path / "checkpoints"):
        assert [path.name for path in parent.glob(".*.tmp")] == [".metrics.jsonl.01234567.tmp"]
    assert tmp_path.exists()


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SMALL_RUN = ("model=mlp", "model.hidden=[8]", "trainer.max_epochs=1", "trainer.threads=1", "trainer.device=cpu")


def run_script(name: str, *arguments: str, output: Path, umask: int = 0o022) -> int:
    """Run a script in a forked process and return its exit code. Its standard streams go to `output`."""

    def prepare(_: pytest.MonkeyPatch) -> None:
        os.chdir(output.parent)
        os.umask(umask)

    return wait_for_exit(fork_script(SCRIPTS / f"{name}.py", *arguments, output=output, patch=prepare), within=60)


def test_umask_without_rights_for_the_owner_does_not_end_a_run(tmp_path):
    """A user other than root could not enter the new folder, and a temporary folder would remain."""
    output = tmp_path / "out"
    output.touch()
    assert run_script("train", *SMALL_RUN, "run_dir=run", output=output, umask=0o777) == 0, output.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").glob("*.*")} == {0o600}
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("arguments", [["train.py", "--help"], ["sweep.py", "--help"], ["runs.py", "folder=."]])
def test_full_standard_output_is_a_storage_error(tmp_path, arguments):
    trained(tmp_path / "run", "trainer.max_epochs=1")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, SCRIPTS / arguments[0], *arguments[1:]]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1


MERGES = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 6)}]" for n in range(1, 40))]
LISTS = ["l0: &l0 [x]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 6)}]" for n in range(1, 40))]


@pytest.mark.parametrize("lines", [MERGES, LISTS], ids=["merge keys", "lists"])
def test_aliases_that_expand_without_bound_are_refused_in_the_users_configs(tmp_path, lines):
    path = tmp_path / "configs/model/bomb.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")
    assert path.stat().st_size < 3000
    output = tmp_path / "out"
    output.touch()
    assert run_script("train", "--config-dir", "configs", "model=mlp", output=output) == 2
    assert "bomb.yaml: its aliases (*name) expand to more than 100,000 values" in output.read_text()


def test_expanded_size_counts_each_alias_as_what_it_refers_to():
    assert _expanded_size(b"a: 1\nb: [x, y]") == 7  # the mapping, two keys, a number, the list and its items
    assert _expanded_size(b"a: &a [x, y]\nb: *a\nc: {<<: {d: *a}}") == 1 + (1 + 3) + (1 + 3) + (1 + 1 + 1 + 1 + 1 + 3)
    for text in (b"", b"- 1\n- &x {a: b}\n- *x", b"a: &r [1, *r]"):  # the last one refers to itself
        assert _expanded_size(text) < 20


def test_second_signal_ends_a_process_that_still_explains_an_error(tmp_path):
    """While an error is explained, which may take long, the process must not ignore signals."""
    output = tmp_path / "out"
    output.touch()

    def slow(patched: pytest.MonkeyPatch) -> None:
        def explain(_: BaseException) -> PreceptorError:
            print("explaining", flush=True)
            time.sleep(60)
            raise AssertionError

        patched.setattr("core.command_line.error_to_report", explain)

    child = fork_script(SCRIPTS / "train.py", "model=nothing", output=output, patch=slow)
    while "explaining" not in output.read_text():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert wait_for_exit(child, within=10) == 1


def test_finished_run_on_a_read_only_disk_can_be_evaluated_but_not_continued(tmp_path, monkeypatch, capsys):
    folder = trained(tmp_path / "run", "trainer.max_epochs=1").folder.path
    (folder / ".train.log.01234567.tmp").touch()  # left by a kill
    real_open, real_unlink = os.open, os.unlink

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_file(path: Path, flags: int, *arguments: int, **options: int) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and folder in Path(os.fspath(path)).parents:
            refuse(path)
        return real_open(path, flags, *arguments, **options)

    def unlink(path: Path, **options: int) -> None:
        refuse(path) if folder in Path(path).parents else real_unlink(path, **options)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "unlink", unlink)
    assert Run.resume(resumed_config(folder, [], TrainConfig)) is None
    values = {"run": str(folder), "checkpoint": "best", "device": "cpu", "trust": [], "split": "test", "root": None}
    capsys.readouterr()
    evaluate_run(Config(values=values | {"tta": None, "output": None}, record={}, job=None))
    out, err = capsys.readouterr()
    assert "accuracy" in out and "evaluation-test.json was not written" in err and "Read-only file system" in err
    with pytest.raises((StorageError, OSError), match="Read-only file system"):
        reopened(folder, "trainer.max_epochs=2")
