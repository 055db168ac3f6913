"""`load_run` in a notebook: importing and calling it does not change the state of the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import trained

# Process-wide state that a library may change, recorded before and after.
STATE = """
import atexit, hashlib, json, logging, random, signal, sys, threading, warnings
import numpy, torch
from PIL import Image

def state():
    generators = (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist())
    return {
        "generators": hashlib.sha256(repr(generators).encode()).hexdigest(),
        "threads": torch.get_num_threads(),
        "tf32": (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "grad": torch.is_grad_enabled(),
        "hooks": (id(threading.excepthook), id(sys.excepthook)),
        "atexit": atexit._ncallbacks(),
        "pixels": Image.MAX_IMAGE_PIXELS,
        "signals": [str(signal.getsignal(number)) for number in (2, 15, 1, 17)],  # INT, TERM, HUP, CHLD
        "handlers": str(logging.getLogger().handlers),
        "warnings": len(warnings.filters),
        "alive": threading.active_count(),
    }
"""
CALLER = (
    STATE
    + """
import torch.utils.checkpoint  # torch's own late imports are not counted
torch.set_num_threads(3)
torch.manual_seed(5); random.seed(6); numpy.random.seed(7)
before = state()
from trainer.inference.load_run import load_run
imported = state()
run = load_run({folder!r})
Image.new("L", (9, 11), 7).save({folder!r} + "/image.png")
for image in (torch.zeros(1, 8, 8, dtype=torch.uint8), {folder!r} + "/image.png"):
    logits = run.model(run.transform(image).unsqueeze(0))
loaded = state()
print(json.dumps({{"before": before, "imported": imported, "loaded": loaded, "modules": sorted(sys.modules)}}))
"""
)


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("load_run") / "run"
    trained(folder, "model.dropout=0.5", "trainer.max_epochs=1", "trainer.threads=1")
    code = CALLER.replace("{{", "{").replace("}}", "}").replace("{folder!r}", repr(str(folder)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("moment", ["imported", "loaded"])
def test_load_run_does_not_change_the_process_state(states, moment):
    assert states[moment] == states["before"]


def test_load_run_imports_neither_hydra_nor_rich_nor_tensorboard(states):
    roots = {name.partition(".")[0] for name in states["modules"]}
    assert "trainer" in roots and "torch" in roots
    assert not roots & {"hydra", "omegaconf", "rich", "tensorboard", "optuna", "matplotlib", "sklearn", "torchvision"}
