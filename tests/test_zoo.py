"""Every model of configs/model overfits a batch at its input size, with the optimizer of its recipe.

Each model runs through the trainer, from the composed config to the checkpoint, in a separate process, so that its peak
memory is measured. Models that take more than seconds are marked slow and print their measurements.
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

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[1]
GOLDENS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "goldens.json").read_text())

# Recipe of a model that no recipe names: that of the most similar model.
RECIPES_OF_SIMILAR_MODELS = {
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
    """Return {model: recipe}: one that names it, preferably one that was run here, else that of a similar model."""
    recipe_of: dict[str, str] = {}
    cards = (ROOT / "configs" / "experiment").glob("*.yaml")
    for path in sorted(cards, key=lambda path: (path.stem.startswith("imagenet_"), path)):
        for default in yaml.safe_load(path.read_text()).get("defaults", []):
            if "override /model" in default:
                recipe_of.setdefault(default["override /model"], path.stem)
    for name in set(GOLDENS) - set(recipe_of):
        recipe_of[name] = next(card for start, card in RECIPES_OF_SIMILAR_MODELS.items() if name.startswith(start))
    return recipe_of


RECIPES = recipes()
CLASSES = 10
# 110 layers without shortcuts do not train with SGD, which they are meant to demonstrate; they train with Adam. The
# deepest VGGs do not train from the paper's initial weights. Their authors started from the weights of VGG-11 and
# later found that other initial weights make this unnecessary (section 3.1).
OPTIMIZERS = {"plain110": ("optimizer=adam", "optimizer.lr=0.001")}
WEIGHTS = {"vgg16": ("model.init=he_normal",), "vgg19": ("model.init=he_normal",)}
QUICK = {name for name, golden in GOLDENS.items() if golden["multiply_adds"] < 50e6}


def learning_rate_of(card: str) -> float:
    """Return the learning rate of a recipe: the one it sets, or the default of its optimizer."""
    content = yaml.safe_load((ROOT / "configs" / "experiment" / f"{card}.yaml").read_text())
    chosen = [default["override /optimizer"] for default in content["defaults"] if "override /optimizer" in default]
    default = ROOT / "configs" / "optimizer" / f"{chosen[0] if chosen else 'sgd'}.yaml"
    lr = content.get("optimizer", {}).get("lr", yaml.safe_load(default.read_text())["lr"])
    return 0.1 if isinstance(lr, str) else lr  # SGD's default refers to the model


def overfit_a_batch(name: str, folder: Path) -> dict[str, Any]:
    """Train on two images until the loss is a tenth of the chance level; return the measurements.

    Augmentation, dropout and label smoothing are off, as they hinder overfitting. The gradient is clipped, because the
    learning rate of a recipe is too large for such a small batch at the first step.
    """
    golden = GOLDENS[name]
    channels, size, _ = golden["input"]
    lr = f"optimizer.lr={min(learning_rate_of(RECIPES[name]), 0.05)}"  # 0.1 is meant for batches of 128
    config = composed(
        *(
            lr,
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


def send_result(name: str, folder: Path, pipe: Any) -> None:
    """Send the measurements, or the traceback of an error, through the pipe."""
    try:
        pipe.send(overfit_a_batch(name, folder))
    except BaseException:
        pipe.send({"reason": traceback.format_exc()})
        raise


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(GOLDENS)]
)
def test_model_of_each_config_overfits_a_batch(name, tmp_path, capsys):
    receiver, sender = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=send_result, args=(name, tmp_path / "run", sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    finally:
        process.join()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # gigabytes of checkpoints
    assert result["reason"] == "learnt", result
    if name not in QUICK:
        with capsys.disabled():
            memory = f"{result['GiB']:5.1f} GiB"
            summary = f"{result['step']:4} steps  {result['seconds']:6.1f} s  {memory}  loss {result['loss']:.3f}"
            print(f"\n{name:16} {RECIPES[name]:22} {summary}", end="", flush=True)
