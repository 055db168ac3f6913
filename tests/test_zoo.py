"""Every model of configs/model overfits a batch, at its own input size, with the optimizer of its recipe.

Through the trainer, from the command line's config to the checkpoint; in a process of its own each, so that the peak of
memory is its own. Those that take more than seconds are marked slow and print it.
"""

import json
import math
import multiprocessing
import resource
import shutil
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import composed

from trainer.run import Run

ROOT = Path(__file__).resolve().parents[1]
GOLDENS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "goldens.json").read_text())

# Which card trains a network that none names: that of its nearest relative.
RELATIVES = {
    "vgg16_small": "cifar10_vgg",
    "vgg": "imagenet_vgg16",
    "resnet18": "imagenet_resnet50",
    "resnet34": "imagenet_resnet50",
    "resnet101": "imagenet_resnet50",
    "resnet152": "imagenet_resnet50",
    "plain18": "imagenet_resnet50",
    "plain34": "imagenet_resnet50",
    "resnet": "cifar10_resnet20",
    "plain": "cifar10_resnet20",
    "maxout": "mnist_lenet",
    "torchvision": "imagenet_resnet50",
}


def recipes() -> dict[str, str]:
    """The card of each network: one that names it, if possible one that was run here, or else its relative's."""
    found: dict[str, str] = {}
    cards = (ROOT / "configs" / "experiment").glob("*.yaml")
    for path in sorted(cards, key=lambda path: (path.stem.startswith("imagenet_"), path)):
        for default in yaml.safe_load(path.read_text()).get("defaults", []):
            if "override /model" in default:
                found.setdefault(default["override /model"], path.stem)
    for name in set(GOLDENS) - set(found):
        found[name] = next(card for start, card in RELATIVES.items() if name.startswith(start))
    return found


RECIPES = recipes()
CLASSES = 10
# 110 layers without shortcuts stand still under SGD, which is what they are there to show; Adam can move them. And
# from the paper's first weights the deepest VGGs stand still: their authors began with those of VGG-11, and found later
# that others do without (section 3.1).
OPTIMIZERS = {"plain110": ("optimizer=adam", "optimizer.lr=0.001")}
WEIGHTS = {"vgg16": ("model.init=he_normal",), "vgg19": ("model.init=he_normal",)}
QUICK = {name for name, golden in GOLDENS.items() if golden["multiply_adds"] < 50e6}


def rate_of(card: str) -> float:
    """The learning rate of a recipe: its own, or its optimizer's default."""
    content = yaml.safe_load((ROOT / "configs" / "experiment" / f"{card}.yaml").read_text())
    chosen = [default["override /optimizer"] for default in content["defaults"] if "override /optimizer" in default]
    default = ROOT / "configs" / "optimizer" / f"{chosen[0] if chosen else 'sgd'}.yaml"
    return content.get("optimizer", {}).get("lr", yaml.safe_load(default.read_text())["lr"])


def learn_a_batch(name: str, folder: Path) -> dict[str, Any]:
    """Train on two images until the loss is a tenth of what guessing costs; tells what it took.

    Without what hinders overfitting: augmentation, dropout, smoothed labels. The gradient is clipped, as a
    recipe's rate is not meant for so small a batch from the first step on.
    """
    golden = GOLDENS[name]
    channels, size, _ = golden["input"]
    rate = f"optimizer.lr={min(rate_of(RECIPES[name]), 0.05)}"  # 0.1 is for batches of 128
    config = composed(
        *(
            rate,
            f"experiment={RECIPES[name]}",
            f"model={name}",
            *golden["overrides"],
            "data=synthetic",
            "data.fit=resize",
        ),
        *(f"data.channels={channels}", f"data.image_size={size}", f"data.num_classes={CLASSES}"),
        *("data.train_samples=2", "data.test_samples=2", "data.val_fraction=0", "data.batch_size=2"),
        *("loss.label_smoothing=0", "trainer.ema_decay=null", "trainer.clip_norm=1.0", *OPTIMIZERS.get(name, ())),
        *WEIGHTS.get(name, ()),
        *("trainer.max_epochs=400", "trainer.evaluate_every=5 steps", "trainer.checkpoint.monitor=train/loss"),
        *("trainer.early_stopping.patience=null", "trainer.early_stopping.monitor=train/loss"),
    )
    constant = {"_target_": "trainer.optim.schedules.constant", "_partial_": True, "warmup_epochs": 0}
    changes = {"run_dir": str(folder), "augment": {}, "schedule": constant}
    changes["model"] = {key: 0.0 if key == "dropout" else value for key, value in config.values["model"].items()}
    run = Run.create(replace(config, values=config.values | changes, record=config.record | changes))
    started = time.monotonic()
    enough = 0.1 * math.log(CLASSES)
    run.loop.judge = lambda line, settings: run.state.best["metrics"]["train/loss"] < enough
    with run:
        reason = run.loop.fit()
        run.finish(reason)
    return {
        "reason": "learnt" if reason == "pruned" else reason,
        "step": run.state.step,
        "loss": run.state.best["metrics"]["train/loss"],
        "seconds": time.monotonic() - started,
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def tell(name: str, folder: Path, pipe: Any) -> None:
    """What it took, or what went wrong."""
    try:
        pipe.send(learn_a_batch(name, folder))
    except BaseException:
        pipe.send({"reason": traceback.format_exc()})
        raise


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(GOLDENS)]
)
def test_model_overfits_a_batch(name, tmp_path, capsys):
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=tell, args=(name, tmp_path / "run", theirs))
    process.start()
    theirs.close()
    try:
        told = ours.recv()
    finally:
        process.join()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # gigabytes of checkpoints
    assert told["reason"] == "learnt", told
    if name not in QUICK:
        with capsys.disabled():
            figures = (
                f"{told['step']:4} steps  {told['seconds']:6.1f} s  {told['GiB']:5.1f} GiB  loss {told['loss']:.3f}"
            )
            print(f"\n{name:16} {RECIPES[name]:22} {figures}", end="", flush=True)
