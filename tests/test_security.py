"""Files from others cannot run code: checkpoints and configs of a run folder are data.

Each attack uses the entry points of users: resume, load_run (evaluate, predict) and init_from. An audit hook detects
forbidden events during the attacks.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import marshal
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import MLP, SYNTHETIC, composed, last_state, packed, reopened, run_to_end, trained
from omegaconf import OmegaConf

import data.sources.datasets  # noqa: F401  (imported before the audit hook watches imports)
from core.durable import write_durably
from core.errors import CheckpointError, ConfigError, PreceptorError, SecurityError
from core.run_config import read_run_config
from trainer.build.training import build
from trainer.build.weights import init_from
from trainer.inference.load_run import load_run
from trainer.run import Run
from trainer.storage.checkpoint import CheckpointFolder, digest, load_weights_file, unpack
from trainer.storage.safetensors_file import LARGEST_HEADER

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec")
SUSPICIOUS = {"import": ("pickle", "shelve", "joblib", "h5py", "numpy.lib.npyio", "attack")}

forbidden_events: list[str] = []
is_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if is_watching and (event in FORBIDDEN or str(arguments[:1]).strip("(',)") in SUSPICIOUS.get(event, ())):
        forbidden_events.append(f"{event} {arguments!r}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def no_code_execution() -> Iterator[None]:
    """Raise AssertionError if code is looked up, compiled or run in the `with` block."""
    global is_watching
    forbidden_events.clear()
    is_watching = True
    try:
        yield
    finally:
        is_watching = False
    assert not forbidden_events


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a finished run of one epoch; the attacks use only copies of it."""
    import torchvision.models  # noqa: F401  import it before the audit hook watches

    folder = tmp_path_factory.mktemp("security") / "run"
    trained(folder, "trainer.max_epochs=1")
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a run's config as an attacker would."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def set_key(config: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        config = config[section]
    config[key] = value


# Payloads in place of checkpoints


class Payload:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def payloads(target: Path) -> dict[str, bytes]:
    """Return fifty files that would write `target` if they were loaded in their actual format."""
    contents = {f"pickle-{protocol}": pickle.dumps(Payload(target), protocol) for protocol in range(6)}
    for name, is_zip in (("torch-zip", True), ("torch-legacy", False)):
        file = io.BytesIO()
        torch.save(Payload(target), file, _use_new_zipfile_serialization=is_zip)
        contents[name] = file.getvalue()
    numpy = io.BytesIO()
    np.save(numpy, np.array([Payload(target)], dtype=object), allow_pickle=True)
    contents["npy"] = numpy.getvalue()
    numpy = io.BytesIO()
    np.savez(numpy, weights=np.array([Payload(target)], dtype=object))
    contents["npz"] = numpy.getvalue()
    contents["marshal"] = marshal.dumps(compile(f"open({str(target)!r}, 'w')", "weights", "exec"))
    contents["python"] = f"open({str(target)!r}, 'w')\n".encode()
    contents["h5"] = b"\x89HDF\r\n\x1a\n" + contents["pickle-4"]
    # The ninth byte is a brace, as in safetensors: the pickle first pushes and pops a string of seven bytes.
    contents["brace"] = b"\x80\x02U\x05abcd{0" + contents["pickle-2"][2:]

    def zipped(content: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", content)
        return file.getvalue()

    def tarred(content: bytes) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            entry = tarfile.TarInfo("../data.pkl")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        return file.getvalue()

    wrappers: dict[str, Callable[[bytes], bytes]] = {
        "zip": zipped,
        "tar": tarred,
        "gzip": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zlib": zlib.compress,  # as written by joblib with compress=1
        "length": lambda content: len(content).to_bytes(8, "little") + content,
        "header": lambda content: (2).to_bytes(8, "little") + b"{}" + content,
        "zeros": lambda content: bytes(8) + content,
    }
    wrapped = {
        f"{name}-{outer}": wrap(contents[name])
        for outer, wrap in wrappers.items()
        for name in ("pickle-0", "pickle-5", "torch-zip", "npy")
    }
    return contents | wrapped


def safetensors_bytes(header: str | bytes, body: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


def entry_points(folder: Path, file: Path) -> dict[str, Callable[[], object]]:
    """Return all calls that open a checkpoint in a run folder or a file of weights."""
    model = torch.nn.Linear(2, 2)
    return {
        "resume": lambda: reopened(folder),
        "load_run": lambda: load_run(folder),
        "init_from a run": lambda: init_from(folder, model, shown=""),
        "init_from a file": lambda: init_from(file, model, shown=""),
    }


def test_payloads_are_refused_before_they_are_parsed(copy, tmp_path, monkeypatch, promise):
    target = tmp_path / "written"
    contents = payloads(target)
    for name in ("pickle-0", "pickle-5", "brace"):
        pickle.loads(contents[name])  # noqa: S301  the payload runs if it is unpickled
        assert target.exists()
        target.unlink()
    for call in entry_points(copy, next((copy / "checkpoints").glob("last-*"))).values():
        with contextlib.suppress(PreceptorError):
            call()  # do late imports before the audit hook watches

    def parse(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(safetensors.torch, "load", parse)
    refused = 0
    for number, (name, content) in enumerate(contents.items()):
        shutil.rmtree(copy / "checkpoints")
        (copy / "checkpoints").mkdir()
        for kind in ("last", "best"):  # with the correct hash, so that it does not count as damaged
            (copy / "checkpoints" / f"{kind}-00000006-{digest(content)}.safetensors").write_bytes(content)
        suffixes = ("safetensors", "pt", "pth", "ckpt", "pkl", "joblib", "npy", "h5", "zip", "bin")
        file = tmp_path / f"weights.{suffixes[number % len(suffixes)]}"
        file.write_bytes(content)
        for entry_point, call in entry_points(copy, file).items():
            with no_code_execution(), pytest.raises((SecurityError, CheckpointError)) as caught:
                call()
            assert "weights" in str(caught.value) or "checkpoints" in str(caught.value), (name, entry_point)
            refused += 1
        assert not target.exists(), name
        file.unlink()
    assert len(contents) == 50
    promise(11, "Files from others cannot run code", f"50 payloads, {refused} openings: all refused, none parsed")


def test_audit_hook_detects_code_execution(tmp_path):
    """The audit hook detects loading a pickle, running a program and compiling code."""
    content = pickle.dumps(Payload(tmp_path / "x"))
    attacks: list[Callable[[], object]] = [
        lambda: pickle.loads(content),  # noqa: S301
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=True),
        lambda: exec("1"),
    ]
    for attack in attacks:
        with pytest.raises(AssertionError), no_code_execution():
            attack()


# Malformed safetensors files


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def single_tensor(body: bytes = bytes(4), **fields: Any) -> bytes:
    return safetensors_bytes(json.dumps({"a": entry(**fields)}), body)


ENTRY = json.dumps(entry())
MANY = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HOSTILE: dict[str, Callable[[], bytes]] = {
    "8 EiB of header": lambda: (2**63).to_bytes(8, "little") + b"{}",
    "all ones": lambda: b"\xff" * 8 + b"{}",
    "longer than the file": lambda: (10**6).to_bytes(8, "little") + b"{}",
    "a header of 17 MiB": lambda: safetensors_bytes(b"{" + b" " * LARGEST_HEADER + b"}"),
    "a million entries": lambda: safetensors_bytes(b"{" + b",".join(MANY % number for number in range(10**6)) + b"}"),
    "a million lists": lambda: safetensors_bytes(b'{"a":[' + b",".join([b"[]"] * 10**6) + b"]}"),
    "deep": lambda: safetensors_bytes(b'{"a":' + b"[" * 400_000),
    "overlapping": lambda: safetensors_bytes(
        json.dumps({"a": entry((2,), (0, 8)), "b": entry((2,), (4, 12))}), bytes(12)
    ),
    "twice the same bytes": lambda: safetensors_bytes(json.dumps({"a": entry(), "b": entry()}), bytes(4)),
    "gap": lambda: safetensors_bytes(json.dumps({"a": entry(), "b": entry((1,), (8, 12))}), bytes(12)),
    "bytes left over": lambda: single_tensor(bytes(400)),
    "beyond the file": lambda: single_tensor(shape=(1000,), offsets=(0, 4000)),
    "backwards": lambda: single_tensor(shape=(1,), offsets=(4, 0)),
    "negative offset": lambda: single_tensor(offsets=(-4, 0)),
    "negative shape": lambda: single_tensor(shape=(-1,)),
    "two negative sides": lambda: single_tensor(shape=(-1, -1)),
    "shape of text": lambda: single_tensor(shape=("1",)),
    "shape of a fraction": lambda: single_tensor(shape=(1.0,)),
    "shape of true": lambda: single_tensor(shape=(True,)),
    "overflowing shape": lambda: single_tensor(shape=(2**32, 2**32, 2**62)),
    "long shape": lambda: single_tensor(shape=(1,) * 10**6),
    "large number": lambda: safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "not as long as its shape": lambda: single_tensor(shape=(3,)),
    "unknown type": lambda: single_tensor(dtype="O"),
    "type that is no text": lambda: single_tensor(dtype=["F32"]),
    "no type": lambda: safetensors_bytes('{"a":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "more keys": lambda: safetensors_bytes(json.dumps({"a": {**entry(), "code": "x"}}), bytes(4)),
    "three offsets": lambda: single_tensor(offsets=(0, 2, 4)),
    "entry that is a list": lambda: safetensors_bytes('{"a":[]}'),
    "duplicate keys": lambda: safetensors_bytes(f'{{"a":{ENTRY},"a":{ENTRY}}}', bytes(4)),
    "duplicate metadata": lambda: safetensors_bytes('{"__metadata__":{},"__metadata__":{}}'),
    "metadata of numbers": lambda: safetensors_bytes('{"__metadata__":{"preceptor":1}}'),
    "metadata in a list": lambda: safetensors_bytes('{"__metadata__":["preceptor"]}'),
    "not JSON": lambda: safetensors_bytes("{'a': 1}"),
    "not UTF-8": lambda: safetensors_bytes(b'{"\xff":1}'),
    "half": lambda: safetensors_bytes('{"a":'),
    "two objects": lambda: safetensors_bytes("{}{}"),
}
NO_CHECKPOINT: dict[str, Callable[[], bytes]] = {  # possibly weights of another program, but not a checkpoint
    "no metadata": lambda: single_tensor(),
    "other metadata": lambda: safetensors_bytes('{"__metadata__":{"format":"pt"}}'),
    "metadata that is no JSON": lambda: safetensors_bytes('{"__metadata__":{"preceptor":"x"}}'),
    "metadata of a list": lambda: safetensors_bytes('{"__metadata__":{"preceptor":"[]"}}'),
    "deep metadata": lambda: safetensors_bytes(json.dumps({"__metadata__": {"preceptor": "[" * 10**5}})),
    "no format": lambda: safetensors_bytes('{"__metadata__":{"preceptor":"{}"}}'),
    "no step": lambda: safetensors_bytes('{"__metadata__":{"preceptor":"{\\"format\\":1}"}}'),
}


def open_in_a_fork(path: Path, open_file: Callable[[Path], object]) -> tuple[str, int]:
    """Open a file in a fork; return the class of the error and the growth of peak memory in bytes.

    The fork is killed after 60 s; then the error is "killed".
    """
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        signal.alarm(60)
        peak_before = peak_memory()
        try:
            open_file(path)
            error_name = "nothing"
        except PreceptorError as error:
            error_name = (
                type(error).__name__ if str(path) in str(error) and len(str(error)) < 1000 else f"{error!s:.300}"
            )
        except BaseException as error:
            error_name = f"{error!r:.300}"
        os.write(writer, json.dumps([error_name, peak_memory() - peak_before]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        error_name, growth = json.loads(result.read() or '["killed", 0]')
    os.waitpid(child, 0)
    return error_name, growth


def peak_memory() -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


@pytest.mark.parametrize("name", [*HOSTILE, *NO_CHECKPOINT])
def test_hostile_safetensors_are_refused(tmp_path, name):
    content = (HOSTILE | NO_CHECKPOINT)[name]()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    functions: list[Callable[[Path], object]] = [lambda path: unpack(path.read_bytes(), source=path)]
    if name in HOSTILE:
        functions.append(load_weights_file)
    for open_file in functions:
        error_name, growth = open_in_a_fork(path, open_file)
        assert error_name == "CheckpointError", error_name
        assert growth < 200 * 2**20 + len(content), growth


# Targets in a run's config

TARGETS = (
    *("os.system", "os.getcwd", "subprocess.run", "shutil.copyfile", "builtins.eval", "builtins.exec", "builtins.open"),
    *("eval", "pickle.loads", "marshal.loads", "torch.load", "torch.save", "torch.hub.load", "torch.jit.load"),
    *("torch.utils.cpp_extension.load", "torch.package.PackageImporter", "numpy.load", "numpy.save", "joblib.load"),
    *("importlib.import_module", "runpy.run_path", "ctypes.CDLL", "webbrowser.open", "urllib.request.urlopen"),
    *(
        "functools.partial",
        "operator.methodcaller",
        "hydra.utils.instantiate",
        "hydra.utils.call",
        "hydra.utils.get_method",
    ),
    *("torch.nn.modules.module.torch.load", "torch.nn.functional.torch.load", "torch.nn.init.warnings.sys.exit"),
    *("torch.nn.Module.__class__", "torch.nn.Module.__init__.__globals__", "torch.nn.Module.__subclasses__"),
    *("torch.nn.parallel.distributed.os.system", "torch.optim.optimizer.functools.partial", "models.mlp.torch.load"),
    *("models.mlp.nn.modules.module.os.system", "trainer.inference.load_run.load_run", "core.durable.write_durably"),
    *(
        "trainer.build.weights.init_from",
        "trainer.storage.run_folder.RunFolder.create",
        "trainer.build.training.build",
        "core.command_line.launch",
    ),
    *(
        "core.run_config.read_run_config",
        "data.sources.images.decode",
        "data.sources.decode.decode",
        "data.sources.image_folder.with_cache",
        "data.sources.datasets.shutil.rmtree",
        "data.loading.loaders.TrainLoader",
    ),
    *("torchvision.datasets.MNIST", "torchvision.datasets.utils.download_url", "torchvision.io.read_file"),
    *("torchvision.models.resnet.load_state_dict_from_url", "torchvision.transforms.functional.os.system"),
    *(
        "models",
        "models.mlp",
        "torch.nn",
        "modelsx.evil",
        "torch.nnx.evil",
        "models..mlp",
        ".models.mlp.MLP",
        " os.system",
    ),
)
TARGET_KEYS = ("model._target_", "data._target_", "optimizer._target_", "schedule._target_", "loss._target_")


@pytest.mark.parametrize("target", TARGETS)
def test_untrusted_targets_in_a_run_config_are_refused(copy, target):
    for key in TARGET_KEYS:
        config = yaml.safe_load((copy / "config.yaml").read_text())
        edit(copy, lambda config, key=key: set_key(config, key, target))
        with no_code_execution(), pytest.raises(SecurityError, match=re.escape(key)):
            reopened(copy, "trainer.max_epochs=2")
        if key in ("model._target_", "loss._target_"):
            with no_code_execution(), pytest.raises(SecurityError):
                load_run(copy)
        (copy / "config.yaml").write_text(yaml.safe_dump(config))


HIDDEN = {
    "in a list": ("model.hidden", [{"_target_": "os.getcwd"}]),
    "in lists": ("model.hidden", [[[{"_target_": "os.getcwd"}]]]),
    "in a mapping": ("model.init", {"a": {"b": {"_target_": "os.getcwd"}}}),
    "a chain": ("model.init", {"_target_": "functools.partial", "_args_": [{"_target_": "os.getcwd"}]}),
    "a new step": ("augment.steal", {"_target_": "os.getcwd"}),
    "a target that is no text": ("model._target_", ["os.getcwd"]),
    "a target of null": ("model._target_", None),
    "positional arguments": ("model._args_", [1]),
    "no recursion": ("model._recursive_", False),
    "conversion": ("model._convert_", "none"),
    "weights from the internet": ("optimizer.weights", "DEFAULT"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_targets_in_a_run_config_are_refused(copy, case):
    name, value = HIDDEN[case]
    edit(copy, lambda config: set_key(config, name, value))
    calls: list[Callable[[], object]] = [lambda: reopened(copy, "trainer.max_epochs=2"), lambda: load_run(copy)]
    for call in calls:
        with no_code_execution(), pytest.raises((SecurityError, CheckpointError)) as caught:
            call()
        assert caught.value.exit_code == 7 or name == "model._target_", caught.value


@pytest.fixture
def foreign_package(tmp_path, monkeypatch) -> str:
    """Create a package of another author that writes a file when it is imported; return its name."""
    (tmp_path / "foreign_losses.py").write_text(
        f"from pathlib import Path\nfrom torch import nn\nPath({str(tmp_path / 'imported')!r}).touch()\n"
        "class ForeignLoss(nn.CrossEntropyLoss): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_losses", raising=False)
    return "foreign_losses"


def test_packages_are_trusted_only_by_the_caller(copy, tmp_path, foreign_package, monkeypatch):
    def attack(config: dict[str, Any]) -> None:
        config["loss"] = {"_target_": "foreign_losses.ForeignLoss", "auxiliary_weight": None}
        config["trust"] = ["foreign_losses"]

    edit(copy, attack)
    newest = CheckpointFolder(copy / "checkpoints").files("last")[0].path
    snapshot = unpack(newest.read_bytes(), source=newest)
    config = read_run_config(copy)  # the copy of the config in the checkpoint is forged, too
    content = packed(replace(snapshot, values={**snapshot.values, "trust": ["foreign_losses"], "config": config}))
    newest.unlink()
    (newest.parent / f"last-{snapshot.step:08d}-{digest(content)}.safetensors").write_bytes(content)
    for name in ("TRUST", "PRECEPTOR_TRUST", "HYDRA_TRUST"):
        monkeypatch.setenv(name, "foreign_losses")
    for call in (lambda: reopened(copy, "trainer.max_epochs=2"), lambda: load_run(copy)):
        with no_code_execution(), pytest.raises(SecurityError, match=r"trust=\[foreign_losses\] allows it"):
            call()
    assert not (tmp_path / "imported").exists()

    assert (
        type(reopened(copy, "trainer.max_epochs=2", "trust=[foreign_losses]").training.loss_function).__name__
        == "ForeignLoss"
    )
    load_run(copy, trust=["foreign_losses"])
    assert (tmp_path / "imported").exists()


def test_users_own_config_builds_classes_of_any_package(foreign_package):
    config = composed("loss._target_=foreign_losses.ForeignLoss", "loss.auxiliary_weight=null")
    assert type(build(config)[0].loss_function).__name__ == "ForeignLoss"


# Environment values and interpolation


def test_environment_values_are_not_written_to_files_or_output(tmp_path, run, monkeypatch, capfd):
    weights = shutil.copytree(run, tmp_path / "hunter2-weights")
    monkeypatch.setenv("SECRET", str(weights))
    folder = tmp_path / "run"
    values = {"init_from": "${oc.env:SECRET}", "loss.label_smoothing": "'${oc.decode:${oc.env:RATE}}'"}
    monkeypatch.setenv("RATE", "0.0123456789")
    config = composed(*(f"{name}={value}" for name, value in values.items()), "trainer.max_epochs=1")
    run_dir = {"run_dir": str(folder)}
    run = Run.create(replace(config, values=config.values | run_dir, record=config.record | run_dir))
    run_to_end(run)
    output = capfd.readouterr()
    for path in folder.rglob("*"):
        for secret in (b"hunter2", b"0.0123456789"):
            assert path.is_dir() or secret not in path.read_bytes(), path.name
    assert "hunter2" not in output.out + output.err
    assert "environment:SECRET" in (folder / "config.yaml").read_text()
    last_state(folder)
    with pytest.raises(ConfigError, match=r"came from the environment variable \w+; type it again"):
        reopened(folder, "trainer.max_epochs=2")


INTERPOLATIONS = {
    "value": ("seed", "${spy:1}"),
    "part of a value": ("data.root", "a${spy:1}b"),
    "list": ("model.hidden", ["${spy:1}"]),
    "list of lists": ("model.hidden", [[["${spy:1}"]]]),
    "mapping in a list": ("model.hidden", [{"a": "${spy:1}"}]),
    "key": ("model.${spy:1}", 1),
    "nested": ("augment.step", {"_target_": "${spy:1}"}),
    "environment": ("model.init", ["${oc.env:HOME}"]),
    "decoded": ("model.init", "${oc.decode:'[1]'}"),
}


@pytest.mark.parametrize("case", INTERPOLATIONS)
def test_resolvers_do_not_run_for_a_run_config(copy, case):
    calls: list[int] = []
    OmegaConf.register_new_resolver("spy", calls.append, replace=True)
    name, value = INTERPOLATIONS[case]
    edit(copy, lambda config: set_key(config, name, value))
    for call in (lambda: reopened(copy), lambda: load_run(copy)):
        with no_code_execution(), pytest.raises(CheckpointError, match="values only"):
            call()
    assert not calls


# Hostile YAML


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [true]",
        "a: !!python/name:os.system",
        "a: !!python/module:os",
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a0: &a0 [x, x]\n" + "\n".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(200)),
        "[" * 1000,
        "a: 2026-99-99",
        "a: \x00",
        "a: b: c",
        "- a",
        "",
        "? [a]\n: b",
    ],
)
def test_hostile_yaml_is_refused(copy, text):
    (copy / "config.yaml").write_text(text)
    for call in (lambda: read_run_config(copy), lambda: reopened(copy), lambda: load_run(copy)):
        with no_code_execution(), pytest.raises(CheckpointError, match="config.yaml"):
            call()


@pytest.mark.parametrize("name", ["model", "loss", "data", "data.fit", "data.image_size", "model._target_"])
def test_run_config_without_a_key_is_refused(copy, name):
    def drop(config: dict[str, Any]) -> None:
        *sections, key = name.split(".")
        for section in sections:
            config = config[section]
        del config[key]

    edit(copy, drop)
    with pytest.raises(CheckpointError, match="missing"):
        load_run(copy)
    with pytest.raises(PreceptorError) as caught:
        reopened(copy)
    assert caught.value.exit_code in (2, 6, 7) and name in str(caught.value)


# Hydra settings


@pytest.mark.parametrize(
    "settings",
    [
        {"searchpath": ["file:///tmp"]},
        {"launcher": {"_target_": "os.system", "command": "true"}},
        {"sweeper": {"_target_": "os.system"}},
        {"callbacks": {"steal": {"_target_": "os.system"}}},
        {"job_logging": {"version": 1, "handlers": {"a": {"()": "os.system"}}}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_hydra_settings_in_a_run_config_are_refused(copy, settings):
    edit(copy, lambda config: set_key(config, "hydra", settings))
    with no_code_execution(), pytest.raises(PreceptorError) as caught:
        reopened(copy, "trainer.max_epochs=2")
    assert caught.value.exit_code == 6 and "hydra" in str(caught.value)


# Sockets and files


def process_tree(process: int) -> list[int]:
    """Return a process and all its descendants."""
    processes = [process]
    for parent in processes:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                processes += [int(child) for child in (task / "children").read_text().split()]
    return processes


def listening_addresses(process: int) -> set[str]:
    """Return the addresses at which a process and its descendants listen, in the kernel's format."""
    sockets = set()
    for member in process_tree(process):
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{member}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(str(descriptor.readlink()))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(local)
    return addresses


@pytest.fixture(scope="module")
def observed_training(tmp_path_factory) -> tuple[Path, int, set[str]]:
    """Train with two workers and umask 000; return folder, largest number of processes, addresses they listened at."""
    folder = tmp_path_factory.mktemp("observed")
    overrides = (
        *SYNTHETIC,
        *MLP,
        "augment=rand_augment",
        "data.num_workers=2",
        "trainer.max_epochs=2",
        "run_dir=a/run",
    )
    command = [sys.executable, str(ROOT / "scripts/train.py"), *overrides, "trainer.device=cpu", "trainer.threads=1"]
    process = subprocess.Popen(command, cwd=folder, umask=0, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    most_processes, addresses = 0, set()
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        most_processes, addresses = (
            max(most_processes, len(process_tree(process.pid))),
            addresses | listening_addresses(process.pid),
        )
        time.sleep(0.02)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == 0, error
    return folder / "a", most_processes, addresses


def test_training_opens_no_listening_socket(observed_training):
    _, most_processes, addresses = observed_training
    assert most_processes >= 3  # the training was observed together with its workers
    assert not addresses


def test_run_folder_is_not_writable_by_other_users(observed_training):
    for path in observed_training[0].rglob("*"):
        assert not path.stat().st_mode & stat.S_IWOTH, path


def test_listening_socket_is_detected():
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        assert listening_addresses(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_documents_do_not_expose_tensorboard_to_other_hosts():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile", *ROOT.glob("scripts/*.py")):
        assert "--bind_all" not in path.read_text() and "0.0.0.0" not in path.read_text(), path


def test_temporary_names_are_unpredictable_and_links_not_followed(tmp_path, monkeypatch):
    opened: list[tuple[str, int]] = []
    real = os.open

    def spy(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        opened.append((str(path), flags))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", spy)
    for _ in range(20):
        write_durably(tmp_path / "file", b"original")
    temporary = [(name, flags) for name, flags in opened if name.endswith(".tmp")]
    assert len({name for name, _ in temporary}) == 20
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in temporary)

    monkeypatch.setattr("secrets.token_hex", lambda *_: "guessed")
    (tmp_path / "target").write_bytes(b"untouched")
    (tmp_path / ".file.guessed.tmp").symlink_to(tmp_path / "target")
    with pytest.raises(PreceptorError):
        write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "target").read_bytes() == b"untouched" and (tmp_path / "file").read_bytes() == b"original"


def test_link_in_place_of_a_result_file_is_replaced(tmp_path):
    """evaluate.py and predict.py use write_durably, so that a link in a foreign run folder is not followed."""
    (tmp_path / "target").write_bytes(b"untouched")
    (tmp_path / "evaluation-test.json").symlink_to(tmp_path / "target")
    write_durably(tmp_path / "evaluation-test.json", b"{}")
    assert (tmp_path / "target").read_bytes() == b"untouched"
    assert not (tmp_path / "evaluation-test.json").is_symlink()
