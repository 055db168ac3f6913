"""Building a training from a config has no side effects: it only returns objects."""

import importlib
import logging
import random
import signal
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from torch import nn

from core.errors import ConfigError
from trainer.build.instantiate import construct, resolve
from trainer.build.training import build


def process_state(folder: Path) -> dict[str, Any]:
    """Return the process state that a build could change: generators, settings, handlers, threads, files."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "settings": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "hooks": (threading.excepthook, sys.excepthook),
        "handlers": list(logging.getLogger("preceptor").handlers),
        "filters": len(warnings.filters),
        "files": sorted(folder.rglob("*")),
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dropout=0.5", "trainer.ema_decay=0.9"),
        ("augment=[crop_flip,mixup,trivial_augment]", "data.channels=3", "optimizer=muon", "model.hidden=[8,8]"),
        ("model.batch_norm=true", "data.batch_size=7", "data.drop_last=false", "schedule=plateau"),
    ],
)
def test_build_has_no_side_effects(tmp_path, monkeypatch, capfd, overrides):
    config = composed(*overrides, "trainer.deterministic=true", "trainer.threads=1")
    monkeypatch.chdir(tmp_path)
    build(config)  # do torch's late imports, and what they set, beforehand
    capfd.readouterr()
    before = process_state(tmp_path)
    training, splits = build(config)
    assert process_state(tmp_path) == before
    assert capfd.readouterr() == ("", "")
    assert training.state.step == 0 and len(splits.train) == 44


def test_two_builds_of_a_config_are_equal_and_share_no_tensor():
    first, second = (build(composed("trainer.ema_decay=0.9"))[0] for _ in range(2))
    for name, model in first.state.models.items():
        other_model = second.state.models[name]
        for tensor, other_tensor in zip(model.state_dict().values(), other_model.state_dict().values(), strict=True):
            assert torch.equal(tensor, other_tensor) and tensor.data_ptr() != other_tensor.data_ptr()


# Config nodes, as Hydra's documentation defines them


class Box:
    """A class that stores its arguments."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        self.positional, self.named = positional, named


BOX = f"{__name__}.Box"


def test_node_is_instantiated_as_by_hydra():
    from hydra.utils import instantiate

    node = {
        "_target_": BOX,
        "_args_": [1, {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 3}],
        "plain": {"a": [1, None, "x"], "b": {}},
        "nested": {"_target_": "fractions.Fraction", "numerator": 2},
        "listed": [{"_target_": "fractions.Fraction", "numerator": 3}, {"c": {"_target_": "builtins.list"}}],
        "unbuilt": {"_target_": BOX, "_recursive_": False, "inner": {"_target_": "no.such.Thing"}},
    }
    actual = construct(node, "section", extra=7)
    expected = instantiate(node, _convert_="all", extra=7)
    assert actual.positional == expected.positional and actual.named.keys() == expected.named.keys()
    for name in ("plain", "nested", "listed", "extra"):
        assert actual.named[name] == expected.named[name]
    assert actual.named["unbuilt"].named == expected.named["unbuilt"].named == {"inner": {"_target_": "no.such.Thing"}}
    partial_sgd = construct({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}, "optimizer")
    assert type(partial_sgd) is partial and partial_sgd.func is torch.optim.SGD and partial_sgd.keywords == {"lr": 0.5}


class Refuses(nn.Module):
    def __init__(self, *, size: int) -> None:
        super().__init__()
        raise ConfigError("size", "must be 3", value=size)


def test_constructor_error_is_reported_under_its_section():
    with pytest.raises(ConfigError, match=r"model.size = 4: must be 3"):
        construct({"_target_": f"{__name__}.Refuses", "size": 4}, "model")
    with pytest.raises(ConfigError, match=r"model.size = 4: must be 3"):  # nested, too
        construct({"_target_": BOX, "inner": {"_target_": f"{__name__}.Refuses", "size": 4}}, "model")
    with pytest.raises(ConfigError, match=r"augment.x = builtins.int: invalid literal"):
        construct({"_target_": "builtins.int", "_args_": ["a"]}, "augment.x")
    with pytest.raises(ConfigError, match=r"model.inner._target_ = no.such.Thing: cannot be imported"):
        construct({"_target_": BOX, "inner": {"_target_": "no.such.Thing"}}, "model")


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.run", "builtins.eval", "shutil.rmtree", "pickle.loads", "logging.os.remove"]
)
def test_config_cannot_build_functions_that_run_commands(tmp_path, monkeypatch, target):
    """Also refused in a user's own config. The module of the object decides, not the name that leads to it."""
    monkeypatch.chdir(tmp_path)
    node = {"_target_": target, "_args_": ["touch here"]}
    for config in (node, {"_target_": BOX, "inner": node}, {"_target_": BOX, "inner": [node]}):
        with pytest.raises(ConfigError, match=rf"_target_ = {target}: is refused: it runs commands"):
            construct(config, "augment.x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"_args_": None}, r"x._args_ = null: must be a list"),
        ({"_args_": {"a": 1}}, r"x._args_ = .*: must be a list"),
        ({"_partial_": "false"}, r"x._partial_ = false: must be true or false"),
        ({"_recursive_": 0}, r"x._recursive_ = 0: must be true or false"),
    ],
)
def test_special_keys_of_hydra_are_type_checked(keys, message):
    with pytest.raises(ConfigError, match=message):
        construct({"_target_": BOX, **keys}, "x")


class RandomLoss(nn.CrossEntropyLoss):
    """A loss that draws random class weights in its constructor."""

    def __init__(self) -> None:
        super().__init__(weight=torch.rand(4) + 0.5)


def test_random_values_drawn_by_a_users_class_depend_on_the_seed_only():
    def weights(seed: int) -> torch.Tensor:
        torch.rand(7)  # random values that the caller draws have no effect
        return build(composed(f"loss._target_={__name__}.RandomLoss", f"seed={seed}"))[0].loss_function.weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_function_is_found_beside_a_module_of_the_same_name(monkeypatch):
    """torchvision/models/alexnet.py defines `alexnet`; pydoc of Python 3.12 and later finds the module."""
    from torchvision.models import alexnet

    monkeypatch.setattr("pydoc.safeimport", lambda path, forceload=0, cache=None: importlib.import_module(path))
    assert resolve("model", "torchvision.models.alexnet") is alexnet
    with pytest.raises(ConfigError, match="leads to a module"):
        resolve("model", "torchvision.models")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data=digits", "augment=flip"), ["augment.flip"]),
        (("data=digits", "augment=[crop_flip,affine]"), ["augment.flip"]),
        (("data=digits", "augment=affine", "augment.affine.mirror=0.5"), ["augment.affine"]),
        (("data=digits", "augment=affine"), []),
        (("data=digits", "+augment.own._target_=torchvision.transforms.v2.RandomHorizontalFlip"), ["augment.own"]),
        (("data=digits", "trainer.tta=mirror_shift"), ["trainer.tta=mirror_shift"]),
        (("augment=flip", "trainer.tta=mirror"), []),
    ],
)
def test_mirroring_of_characters_is_reported(caplog, overrides, expected):
    build(composed(*overrides))
    reported = [record.getMessage().partition(" mirrors images")[0] for record in caplog.records]
    assert reported == expected
