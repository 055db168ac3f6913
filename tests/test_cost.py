"""Cost of reliability (docs/reliability.md: 13) as ratios; each pair is measured alternately, several times."""

import hashlib
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import built, packed
from torch import nn

from core.seeding import fold
from trainer.device import keep_freed_memory
from trainer.loop import reseed
from trainer.snapshot import Snapshot
from trainer.storage.background_saver import BackgroundSaver
from trainer.storage.checkpoint import CheckpointFolder

pytestmark = pytest.mark.timing


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plain_write(folder: Path, content: bytes, number: int) -> None:
    """Do the minimum of a save: write a new file, fsync it, hash the bytes, and delete the previous file."""
    path = folder / f"plain-{number}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    remaining = memoryview(content)
    while len(remaining) > 0:
        remaining = remaining[os.write(descriptor, remaining) :]
    os.fsync(descriptor)
    os.close(descriptor)
    hashlib.sha256(content).hexdigest()
    (folder / f"plain-{number - 1}").unlink(missing_ok=True)


def test_save_takes_at_most_1_5_times_a_plain_write(tmp_path, full, promise):
    mebibytes = 400 if full else 60
    tensors = {f"model.{index}": torch.rand(mebibytes, 2**16) for index in range(4)}  # float32
    content = packed(Snapshot(tensors, {"step": 0}))
    folder = CheckpointFolder(tmp_path)
    saves, writes = [], []
    for step in range(7):
        snapshot = Snapshot(tensors, {"step": step})
        writes.append(seconds(lambda: plain_write(tmp_path, content, step)))  # noqa: B023
        saves.append(seconds(lambda: folder.save(["best", "last"], snapshot, keep={"last": 1, "best": 1})))  # noqa: B023
    ratio = median(save / write for save, write in zip(saves, writes, strict=True))
    promise(13, f"a save of {len(content) / 2**20:.0f} MiB / write, fsync and hash", f"{ratio:.2f} (promised 1.5)")
    assert ratio < 1.5


def test_training_continues_while_a_checkpoint_is_written(tmp_path, promise):
    """The loop waits only for the copy of its state. Writing it takes longer and happens in the background."""
    tensors = {f"model.{index}": torch.rand(25, 2**16) for index in range(4)}
    saver = BackgroundSaver(CheckpointFolder(tmp_path), saved=0)
    waited, written = [], []
    for step in range(5):
        started = time.perf_counter()
        snapshot = Snapshot({name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, {"step": step})
        saver.save(["last"], snapshot, keep={"last": 1})
        waited.append(time.perf_counter() - started)
        assert not saver._running.done()  # type: ignore[union-attr]
        written.append(seconds(saver.wait))
    saver.close()
    share = median(waited) / (median(waited) + median(written))
    promise(13, "share of a save that blocks training", f"{share:.0%}")
    assert share < 0.5


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("LeNet on 28 x 28, batch 128", ("model=lenet", "data.image_size=28")),
        ("ResNet-20 on 32 x 32, batch 128", ("model=resnet20", "data.image_size=32", "data.channels=3")),
    ],
)
def test_reliability_takes_less_than_1_percent_of_a_step(tmp_path, promise, name, overrides):
    """Compares the time of seeding, NaN check, commit point and signals with that of a plain step."""
    sizes = ("data=synthetic", "data.train_samples=300", "data.test_samples=16", "data.num_classes=10")
    run = built(tmp_path / "run", *sizes, *overrides, "data.batch_size=128", "trainer.log_every=1000 steps")
    (images, targets, indices), *_ = next(iter(run.training.train_loader.steps(0)))
    loss_function, loss = nn.CrossEntropyLoss(), torch.ones(())

    def step() -> None:
        run.state.optimizer.zero_grad(set_to_none=True)
        loss_function(run.state.model(images), targets).backward()
        run.state.optimizer.step()

    def reliability() -> None:
        run.state.guard.remember()
        reseed(fold(0, "dropout", 7), run.training.device)
        norm = run.training.step._clip_gradients()
        run.state.guard.allows(loss, norm, [indices], step=run.state.step + 1)
        run.loop.conclude()

    run.state.advance(0)
    run.state.model.train()
    bare = median(seconds(step) for _ in range(12))
    extra = median(seconds(lambda: [reliability() for _ in range(50)]) / 50 for _ in range(12))
    run._closing.close()
    promise(13, f"reliability in a step of {name}", f"{extra / bare:.2%} (promised 1%)")
    assert extra / bare < 0.01


def test_freed_memory_is_reused(tmp_path):
    """Filling 16 MiB of new memory from the system would take 4,096 page faults each time."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs glibc")
    keep_freed_memory()

    def fault_count(rounds: int) -> int:
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            torch.ones(2**22)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before

    fault_count(1)
    assert fault_count(20) < 4096


def test_schedule_uses_functools_partial_instead_of_hydras(tmp_path):
    """Hydra's partial resolves its target at each call, which takes longer than a small model's forward pass."""
    run = built(tmp_path / "run", "schedule=cosine")
    assert type(run.state.schedule.factor) is partial
