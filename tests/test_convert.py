"""Foreign weights: conversion of pickle files in a separate process, prefixes of names, Git LFS pointers."""

import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import built, trained

from analysis.convert import convert_weights
from core.config import Config
from core.errors import CheckpointError, DataError, SecurityError


def convert(source: Path, output: Path) -> None:
    values = {"input": str(source), "output": str(output), "traceback": False}
    convert_weights(Config(values=values, record=values, job=None))


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_converted_weights_are_bit_identical_and_can_start_a_run(tmp_path, capsys, key):
    run = trained(tmp_path / "run")
    weights = run.state.model.state_dict()
    content = weights if key is None else {key: weights, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    convert(tmp_path / "weights.pth", tmp_path / "weights.safetensors")
    converted = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert converted.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in converted.items())
    assert f"{len(weights)} tensors" in capsys.readouterr().out
    started = built(tmp_path / "started", f"init_from={tmp_path / 'weights.safetensors'}", "seed=1")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in started.state.model.state_dict().items())


def test_file_with_code_is_refused_and_its_code_does_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"weight": Harmful()}))
    with pytest.raises(CheckpointError, match="cannot be converted: "):
        convert(tmp_path / "weights.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"no pickle", "cannot be converted"),
        ("[1]", "list, not a mapping"),
        ("{'epoch': 3}", "no tensors"),
    ],
)
def test_file_without_weights_is_refused(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(eval(content), path)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "out.safetensors")
    with pytest.raises(DataError, match="no such file"):
        convert(tmp_path / "missing.pth", tmp_path / "out.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.net.", "module._orig_mod."])
def test_prefixes_of_other_trainers_are_removed_and_reported(tmp_path, capsys, prefix):
    weights = trained(tmp_path / "run").state.model.state_dict()
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({f"{prefix}{name}": tensor for name, tensor in weights.items()}, path)
    started = built(tmp_path / "started", f"init_from={path}", "seed=1")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in started.state.model.state_dict().items())
    reported = prefix.removeprefix("model.")  # a checkpoint's names start with `model.`, which is always removed
    assert f"the prefix '{reported}' of its names was removed" in capsys.readouterr().out


def test_weights_of_another_model_are_refused_with_names_of_both(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"module.encoder.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"first names: module.encoder.weight; the model's: features"):
        built(tmp_path / "run", f"init_from={path}")


def test_run_of_another_model_is_refused_with_the_option_to_add(tmp_path):
    trained(tmp_path / "run", "trainer.max_steps=1")
    other = ("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]")
    with pytest.raises(CheckpointError, match="none of its weights fits this model.*it is a run of model=mlp"):
        built(tmp_path / "other", f"init_from={tmp_path / 'run'}", *other)


def test_pickle_file_names_the_command_that_converts_it(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    command = rf"python scripts/convert.py input={tmp_path}/weights.pth output={tmp_path}/weights.safetensors"
    with pytest.raises(SecurityError, match=command):
        built(tmp_path / "run", f"init_from={tmp_path / 'weights.pth'}")


def test_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the file itself; get it with: git lfs pull"):
        built(tmp_path / "run", f"init_from={path}")
