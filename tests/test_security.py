"""Files from others cannot run code: checkpoints and configs that come with a run folder are data.

Each attack is made through what users call: resume, load_run (evaluate, predict) and init_from. An audit hook watches
meanwhile for what none of them may do.
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

import data.sources.datasets  # noqa: F401  (the tests watch for code that is imported; this module may be)
from core.durable import write_durably
from core.errors import CheckpointError, ConfigError, PreceptorError, SecurityError
from core.run_config import read_run_config
from trainer.build.training import build
from trainer.build.weights import init_from
from trainer.inference.load_run import load_run
from trainer.run import Run
from trainer.storage.checkpoint import CheckpointFolder, digest, load_weights_file, unpack
from trainer.storage.safetensors_file import LARGEST_HEADER

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec")
SUSPICIOUS = {"import": ("pickle", "shelve", "joblib", "h5py", "numpy.lib.npyio", "attack")}

seen: list[str] = []
watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and (event in FORBIDDEN or str(arguments[:1]).strip("(',)") in SUSPICIOUS.get(event, ())):
        seen.append(f"{event} {arguments!r}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """AssertionError where code was looked up, made or run meanwhile."""
    global watching
    seen.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    assert not seen


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run, one epoch long; only its copies are attacked."""
    import torchvision.models  # noqa: F401  once here, so that its import is no surprise to the hook

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


def put(config: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        config = config[section]
    config[key] = value


# payloads in the place of checkpoints


class Payload:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def payloads(target: Path) -> dict[str, bytes]:
    """Fifty files that would write `target` if what they hold were loaded as what they are."""
    bare = {f"pickle-{protocol}": pickle.dumps(Payload(target), protocol) for protocol in range(6)}
    for name, is_zip in (("torch-zip", True), ("torch-legacy", False)):
        file = io.BytesIO()
        torch.save(Payload(target), file, _use_new_zipfile_serialization=is_zip)
        bare[name] = file.getvalue()
    numpy = io.BytesIO()
    np.save(numpy, np.array([Payload(target)], dtype=object), allow_pickle=True)
    bare["npy"] = numpy.getvalue()
    numpy = io.BytesIO()
    np.savez(numpy, weights=np.array([Payload(target)], dtype=object))
    bare["npz"] = numpy.getvalue()
    bare["marshal"] = marshal.dumps(compile(f"open({str(target)!r}, 'w')", "weights", "exec"))
    bare["python"] = f"open({str(target)!r}, 'w')\n".encode()
    bare["h5"] = b"\x89HDF\r\n\x1a\n" + bare["pickle-4"]
    # The ninth byte is the brace that safetensors has there: a string of seven bytes is pushed and popped first.
    bare["brace"] = b"\x80\x02U\x05abcd{0" + bare["pickle-2"][2:]

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
        "zlib": zlib.compress,  # what joblib writes with compress=1
        "length": lambda content: len(content).to_bytes(8, "little") + content,
        "header": lambda content: (2).to_bytes(8, "little") + b"{}" + content,
        "zeros": lambda content: bytes(8) + content,
    }
    wrapped = {
        f"{name}-{outer}": wrap(bare[name])
        for outer, wrap in wrappers.items()
        for name in ("pickle-0", "pickle-5", "torch-zip", "npy")
    }
    return bare | wrapped


def framed(header: str | bytes, body: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


def routes(folder: Path, file: Path) -> dict[str, Callable[[], object]]:
    """How a checkpoint in a run folder, or a file of weights, is opened."""
    model = torch.nn.Linear(2, 2)
    return {
        "resume": lambda: reopened(folder),
        "load_run": lambda: load_run(folder),
        "init_from a run": lambda: init_from(folder, model, shown=""),
        "init_from a file": lambda: init_from(file, model, shown=""),
    }


def test_payloads_are_refused_before_they_are_parsed(copy, tmp_path, monkeypatch, promise):
    target = tmp_path / "written"
    made = payloads(target)
    for name in ("pickle-0", "pickle-5", "brace"):
        pickle.loads(made[name])  # noqa: S301  the payloads work
        assert target.exists()
        target.unlink()
    for call in routes(copy, next((copy / "checkpoints").glob("last-*"))).values():
        with contextlib.suppress(PreceptorError):
            call()  # whatever is imported late is imported now

    def parse(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(safetensors.torch, "load", parse)
    refused = 0
    for number, (name, content) in enumerate(made.items()):
        shutil.rmtree(copy / "checkpoints")
        (copy / "checkpoints").mkdir()
        for kind in ("last", "best"):  # under its right hash, so that it is no damaged one
            (copy / "checkpoints" / f"{kind}-00000006-{digest(content)}.safetensors").write_bytes(content)
        suffixes = ("safetensors", "pt", "pth", "ckpt", "pkl", "joblib", "npy", "h5", "zip", "bin")
        file = tmp_path / f"weights.{suffixes[number % len(suffixes)]}"
        file.write_bytes(content)
        for route, call in routes(copy, file).items():
            with watched(), pytest.raises((SecurityError, CheckpointError)) as caught:
                call()
            assert "weights" in str(caught.value) or "checkpoints" in str(caught.value), (name, route)
            refused += 1
        assert not target.exists(), name
        file.unlink()
    assert len(made) == 50
    promise(11, "Files from others cannot run code", f"50 payloads, {refused} openings: all refused, none parsed")


def test_audit_hook_detects_code_execution(tmp_path):
    """A loader that opens a pickle, runs a program or makes code is noticed."""
    content = pickle.dumps(Payload(tmp_path / "x"))
    attacks: list[Callable[[], object]] = [
        lambda: pickle.loads(content),  # noqa: S301
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=True),
        lambda: exec("1"),
    ]
    for attack in attacks:
        with pytest.raises(AssertionError), watched():
            attack()


# safetensors that lie


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(body: bytes = bytes(4), **given: Any) -> bytes:
    return framed(json.dumps({"a": entry(**given)}), body)


ENTRY = json.dumps(entry())
MANY = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HOSTILE: dict[str, Callable[[], bytes]] = {
    "8 EiB of header": lambda: (2**63).to_bytes(8, "little") + b"{}",
    "all ones": lambda: b"\xff" * 8 + b"{}",
    "longer than the file": lambda: (10**6).to_bytes(8, "little") + b"{}",
    "a header of 17 MiB": lambda: framed(b"{" + b" " * LARGEST_HEADER + b"}"),
    "a million entries": lambda: framed(b"{" + b",".join(MANY % number for number in range(10**6)) + b"}"),
    "a million lists": lambda: framed(b'{"a":[' + b",".join([b"[]"] * 10**6) + b"]}"),
    "deep": lambda: framed(b'{"a":' + b"[" * 400_000),
    "overlapping": lambda: framed(json.dumps({"a": entry((2,), (0, 8)), "b": entry((2,), (4, 12))}), bytes(12)),
    "twice the same bytes": lambda: framed(json.dumps({"a": entry(), "b": entry()}), bytes(4)),
    "gap": lambda: framed(json.dumps({"a": entry(), "b": entry((1,), (8, 12))}), bytes(12)),
    "bytes left over": lambda: one(bytes(400)),
    "beyond the file": lambda: one(shape=(1000,), offsets=(0, 4000)),
    "backwards": lambda: one(shape=(1,), offsets=(4, 0)),
    "negative offset": lambda: one(offsets=(-4, 0)),
    "negative shape": lambda: one(shape=(-1,)),
    "two negative sides": lambda: one(shape=(-1, -1)),
    "shape of text": lambda: one(shape=("1",)),
    "shape of a fraction": lambda: one(shape=(1.0,)),
    "shape of true": lambda: one(shape=(True,)),
    "overflowing shape": lambda: one(shape=(2**32, 2**32, 2**62)),
    "long shape": lambda: one(shape=(1,) * 10**6),
    "large number": lambda: framed(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "not as long as its shape": lambda: one(shape=(3,)),
    "unknown type": lambda: one(dtype="O"),
    "type that is no text": lambda: one(dtype=["F32"]),
    "no type": lambda: framed('{"a":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "more keys": lambda: framed(json.dumps({"a": {**entry(), "code": "x"}}), bytes(4)),
    "three offsets": lambda: one(offsets=(0, 2, 4)),
    "entry that is a list": lambda: framed('{"a":[]}'),
    "duplicate keys": lambda: framed(f'{{"a":{ENTRY},"a":{ENTRY}}}', bytes(4)),
    "duplicate metadata": lambda: framed('{"__metadata__":{},"__metadata__":{}}'),
    "metadata of numbers": lambda: framed('{"__metadata__":{"preceptor":1}}'),
    "metadata in a list": lambda: framed('{"__metadata__":["preceptor"]}'),
    "not JSON": lambda: framed("{'a': 1}"),
    "not UTF-8": lambda: framed(b'{"\xff":1}'),
    "half": lambda: framed('{"a":'),
    "two objects": lambda: framed("{}{}"),
}
NO_CHECKPOINT: dict[str, Callable[[], bytes]] = {  # weights from elsewhere perhaps, but no checkpoint
    "no metadata": lambda: one(),
    "other metadata": lambda: framed('{"__metadata__":{"format":"pt"}}'),
    "metadata that is no JSON": lambda: framed('{"__metadata__":{"preceptor":"x"}}'),
    "metadata of a list": lambda: framed('{"__metadata__":{"preceptor":"[]"}}'),
    "deep metadata": lambda: framed(json.dumps({"__metadata__": {"preceptor": "[" * 10**5}})),
    "no format": lambda: framed('{"__metadata__":{"preceptor":"{}"}}'),
    "no step": lambda: framed('{"__metadata__":{"preceptor":"{\\"format\\":1}"}}'),
}


def opened_in_a_fork(path: Path, how: Callable[[Path], object]) -> tuple[str, int]:
    """Open a file in a fork; returns the class of the error, and the bytes by which the peak of memory grew.

    A file that takes a minute ends the fork: then the error is "killed".
    """
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        signal.alarm(60)
        before = peak()
        try:
            how(path)
            said = "nothing"
        except PreceptorError as error:
            said = type(error).__name__ if str(path) in str(error) and len(str(error)) < 1000 else f"{error!s:.300}"
        except BaseException as error:
            said = f"{error!r:.300}"
        os.write(writer, json.dumps([said, peak() - before]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said, grown = json.loads(answer.read() or '["killed", 0]')
    os.waitpid(child, 0)
    return said, grown


def peak() -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


@pytest.mark.parametrize("name", [*HOSTILE, *NO_CHECKPOINT])
def test_hostile_safetensors_are_refused(tmp_path, name):
    content = (HOSTILE | NO_CHECKPOINT)[name]()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    ways: list[Callable[[Path], object]] = [lambda path: unpack(path.read_bytes(), source=path)]
    if name in HOSTILE:
        ways.append(load_weights_file)
    for how in ways:
        said, grown = opened_in_a_fork(path, how)
        assert said == "CheckpointError", said
        assert grown < 200 * 2**20 + len(content), grown


# what a run's config may name

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
PLACES = ("model._target_", "data._target_", "optimizer._target_", "schedule._target_", "loss._target_")


@pytest.mark.parametrize("target", TARGETS)
def test_untrusted_targets_in_a_run_config_are_refused(copy, target):
    for place in PLACES:
        config = yaml.safe_load((copy / "config.yaml").read_text())
        edit(copy, lambda config, place=place: put(config, place, target))
        with watched(), pytest.raises(SecurityError, match=re.escape(place)):
            reopened(copy, "trainer.max_epochs=2")
        if place in ("model._target_", "loss._target_"):
            with watched(), pytest.raises(SecurityError):
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
    "weights from the network": ("optimizer.weights", "DEFAULT"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_targets_in_a_run_config_are_refused(copy, case):
    name, value = HIDDEN[case]
    edit(copy, lambda config: put(config, name, value))
    calls: list[Callable[[], object]] = [lambda: reopened(copy, "trainer.max_epochs=2"), lambda: load_run(copy)]
    for call in calls:
        with watched(), pytest.raises((SecurityError, CheckpointError)) as caught:
            call()
        assert caught.value.exit_code == 7 or name == "model._target_", caught.value


@pytest.fixture
def others_package(tmp_path, monkeypatch) -> str:
    """A package of another author; a file shows that it was imported."""
    (tmp_path / "their_losses.py").write_text(
        f"from pathlib import Path\nfrom torch import nn\nPath({str(tmp_path / 'imported')!r}).touch()\n"
        "class Theirs(nn.CrossEntropyLoss): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_losses", raising=False)
    return "their_losses"


def test_only_the_caller_trusts_a_package(copy, tmp_path, others_package, monkeypatch):
    def attack(config: dict[str, Any]) -> None:
        config["loss"] = {"_target_": "their_losses.Theirs", "auxiliary_weight": None}
        config["trust"] = ["their_losses"]

    edit(copy, attack)
    newest = CheckpointFolder(copy / "checkpoints").files("last")[0].path
    found = unpack(newest.read_bytes(), source=newest)
    config = read_run_config(copy)  # the checkpoint's own copy is forged too
    content = packed(replace(found, values={**found.values, "trust": ["their_losses"], "config": config}))
    newest.unlink()
    (newest.parent / f"last-{found.step:08d}-{digest(content)}.safetensors").write_bytes(content)
    for name in ("TRUST", "PRECEPTOR_TRUST", "HYDRA_TRUST"):
        monkeypatch.setenv(name, "their_losses")
    for call in (lambda: reopened(copy, "trainer.max_epochs=2"), lambda: load_run(copy)):
        with watched(), pytest.raises(SecurityError, match=r"trust=\[their_losses\] allows it"):
            call()
    assert not (tmp_path / "imported").exists()

    assert (
        type(reopened(copy, "trainer.max_epochs=2", "trust=[their_losses]").training.loss_function).__name__ == "Theirs"
    )
    load_run(copy, trust=["their_losses"])
    assert (tmp_path / "imported").exists()


def test_config_of_the_user_builds_any_class(others_package):
    config = composed("loss._target_=their_losses.Theirs", "loss.auxiliary_weight=null")
    assert type(build(config)[0].loss_function).__name__ == "Theirs"


# values from the environment, and interpolation


def test_environment_values_are_written_nowhere(tmp_path, run, monkeypatch, capfd):
    weights = shutil.copytree(run, tmp_path / "hunter2-weights")
    monkeypatch.setenv("SECRET", str(weights))
    folder = tmp_path / "run"
    values = {"init_from": "${oc.env:SECRET}", "loss.label_smoothing": "'${oc.decode:${oc.env:RATE}}'"}
    monkeypatch.setenv("RATE", "0.0123456789")
    config = composed(*(f"{name}={value}" for name, value in values.items()), "trainer.max_epochs=1")
    place = {"run_dir": str(folder)}
    run = Run.create(replace(config, values=config.values | place, record=config.record | place))
    run_to_end(run)
    said = capfd.readouterr()
    for path in folder.rglob("*"):
        for secret in (b"hunter2", b"0.0123456789"):
            assert path.is_dir() or secret not in path.read_bytes(), path.name
    assert "hunter2" not in said.out + said.err
    assert "environment:SECRET" in (folder / "config.yaml").read_text()
    last_state(folder)
    with pytest.raises(ConfigError, match=r"came from the environment variable \w+; give it again"):
        reopened(folder, "trainer.max_epochs=2")


SPIED = {
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


@pytest.mark.parametrize("case", SPIED)
def test_no_resolver_runs_for_a_run_config(copy, case):
    calls: list[int] = []
    OmegaConf.register_new_resolver("spy", calls.append, replace=True)
    name, value = SPIED[case]
    edit(copy, lambda config: put(config, name, value))
    for call in (lambda: reopened(copy), lambda: load_run(copy)):
        with watched(), pytest.raises(CheckpointError, match="values only"):
            call()
    assert not calls


# What else a config file may do


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
        with watched(), pytest.raises(CheckpointError, match="config.yaml"):
            call()


@pytest.mark.parametrize("name", ["model", "loss", "data", "data.fit", "data.image_size", "model._target_"])
def test_run_config_without_a_key_is_refused(copy, name):
    def drop(config: dict[str, Any]) -> None:
        *sections, key = name.split(".")
        for section in sections:
            config = config[section]
        del config[key]

    edit(copy, drop)
    with pytest.raises(CheckpointError, match="lacks"):
        load_run(copy)
    with pytest.raises(PreceptorError) as caught:
        reopened(copy)
    assert caught.value.exit_code in (2, 6, 7) and name in str(caught.value)


# Hydra's own powers


@pytest.mark.parametrize(
    "given",
    [
        {"searchpath": ["file:///tmp"]},
        {"launcher": {"_target_": "os.system", "command": "true"}},
        {"sweeper": {"_target_": "os.system"}},
        {"callbacks": {"steal": {"_target_": "os.system"}}},
        {"job_logging": {"version": 1, "handlers": {"a": {"()": "os.system"}}}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_hydra_settings_in_a_run_config_are_refused(copy, given):
    edit(copy, lambda config: put(config, "hydra", given))
    with watched(), pytest.raises(PreceptorError) as caught:
        reopened(copy, "trainer.max_epochs=2")
    assert caught.value.exit_code == 6 and "hydra" in str(caught.value)


# Sockets and files


def tree(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def listening(process: int) -> set[str]:
    """Addresses at which a process and its children listen, as the kernel writes them."""
    sockets = set()
    for one_of_them in tree(process):
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{one_of_them}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(local)
    return found


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> tuple[Path, int, set[str]]:
    """A training with two workers under umask 000: its folder, its most processes, and where they listened."""
    place = tmp_path_factory.mktemp("observed")
    given = (*SYNTHETIC, *MLP, "augment=rand_augment", "data.num_workers=2", "trainer.max_epochs=2", "run_dir=a/run")
    command = [sys.executable, str(ROOT / "scripts/train.py"), *given, "trainer.device=cpu", "trainer.threads=1"]
    process = subprocess.Popen(command, cwd=place, umask=0, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    most, found = 0, set()
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        most, found = max(most, len(tree(process.pid))), found | listening(process.pid)
        time.sleep(0.02)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == 0, error
    return place / "a", most, found


def test_training_opens_no_listening_socket(observed):
    _, most, found = observed
    assert most >= 3  # it was seen together with its workers
    assert not found


def test_run_folder_is_writable_by_its_user_only(observed):
    for path in observed[0].rglob("*"):
        assert not path.stat().st_mode & stat.S_IWOTH, path


def test_listening_socket_is_detected():
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        assert listening(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_documents_do_not_expose_tensorboard_to_other_hosts():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile", *ROOT.glob("scripts/*.py")):
        assert "--bind_all" not in path.read_text() and "0.0.0.0" not in path.read_text(), path


def test_temporary_names_are_unpredictable_and_links_not_followed(tmp_path, monkeypatch):
    opened: list[tuple[str, int]] = []
    real = os.open

    def spy(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        opened.append((str(path), flags))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", spy)
    for _ in range(20):
        write_durably(tmp_path / "file", b"ours")
    temporary = [(name, flags) for name, flags in opened if name.endswith(".tmp")]
    assert len({name for name, _ in temporary}) == 20
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in temporary)

    monkeypatch.setattr("secrets.token_hex", lambda *_: "guessed")
    (tmp_path / "theirs").write_bytes(b"untouched")
    (tmp_path / ".file.guessed.tmp").symlink_to(tmp_path / "theirs")
    with pytest.raises(PreceptorError):
        write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "theirs").read_bytes() == b"untouched" and (tmp_path / "file").read_bytes() == b"ours"


def test_link_in_the_place_of_a_result_is_replaced(tmp_path):
    """evaluate.py and predict.py write by write_durably: a link in a run folder from elsewhere leads nowhere."""
    (tmp_path / "theirs").write_bytes(b"untouched")
    (tmp_path / "evaluation-test.json").symlink_to(tmp_path / "theirs")
    write_durably(tmp_path / "evaluation-test.json", b"{}")
    assert (tmp_path / "theirs").read_bytes() == b"untouched"
    assert not (tmp_path / "evaluation-test.json").is_symlink()
