"""On a CUDA device: the plain loop, exact resume, the scaler, and steps that the device skips by itself."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from conftest import built, last_state, reopened, run_to_end, stop_after, trained
from torch import Tensor, nn
from torch.nn import functional

from core.errors import NumericalError, StopSignal
from trainer.run import Run
from trainer.storage.checkpoint import CheckpointFolder

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

CUDA = ("trainer.device=cuda", "trainer.deterministic=true")
RESNET = ("model=resnet20", "model.depths=[1,1]", "model.widths=[8,16]", "augment=[crop_flip,affine]")
PRECISIONS = ("fp32", "bf16", "fp16")


def batches(run: Run, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader, order = run.training.train_loader, run.training.train_loader.order(epoch).cuda()
    for chosen in order.split(loader.batch_size):
        yield loader.normalisation(loader.source.pixels[chosen]), loader.source.labels[chosen]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fit_equals_a_plain_loop_on_cuda(tmp_path, precision):
    """A fused update rounds differently from a plain one, so the results are almost equal."""
    given = (*CUDA, f"trainer.precision={precision}", "trainer.clip_norm=0.7", "trainer.checkpoint.monitor=null")
    run, other = trained(tmp_path / "run", *given), built(tmp_path / "other", *given)
    model = other.state.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.0001)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    step = 0
    for epoch in range(2):
        for images, labels in batches(other, epoch):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 12)) / 2
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=dtype, enabled=precision != "fp32"):
                loss = functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.7)
            scaler.step(optimizer)
            scaler.update()
            step += 1
    assert step == 12 == run.state.step
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    for (name, ours), theirs in zip(run.state.model.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_data_is_on_the_device(tmp_path):
    run = built(tmp_path / "run", *CUDA)
    source = run.training.train_loader.source
    assert source.pixels.device.type == source.labels.device.type == "cuda" and source.pixels.dtype == torch.uint8
    ((images, labels, indices),) = next(iter(run.training.train_loader.steps(0)))
    assert images.device.type == labels.device.type == indices.device.type == "cuda"
    assert run.state.guard.on_device and run.state.optimizer.defaults["fused"]


AUGMENTATIONS = (
    *("[crop_flip,affine]", "[random_resized_crop,color_shift,pca_color,noise_blur,mixup]", "[elastic,erasing,cutmix]"),
    "[crop_flip,rand_augment,mixup]",
)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_random_values_do_not_depend_on_the_device(tmp_path, augment):
    """The same samples in the same order with the same augmentation, up to rounding of the interpolation."""
    given = (f"augment={augment}", "data.channels=3")
    device, host = (built(tmp_path / name, *given, f"trainer.device={name}") for name in ("cuda", "cpu"))
    for (ours,), (theirs,) in zip(device.train_loader.steps(1), host.train_loader.steps(1), strict=True):
        assert torch.equal(ours.indices.cpu(), theirs.indices)
        torch.testing.assert_close(ours.labels.cpu(), theirs.labels)
        torch.testing.assert_close(ours.images.cpu(), theirs.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("augment", AUGMENTATIONS[:3])
def test_augmentation_does_not_wait_for_the_device(tmp_path, augment):
    run = built(tmp_path / "run", *CUDA, f"augment={augment}", "data.channels=3")
    run.training.train_loader.batches_at_once = 1  # or the first one makes all
    steps = iter(run.training.train_loader.steps(0))
    next(steps)  # tables are brought to the device, and so is the epoch's order
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("more", [(), ("augment=[crop_flip,affine]",), ("augment=rand_augment", "data.num_workers=2")])
def test_prefetched_batches_are_complete_whenever_they_are_used(tmp_path, more):
    """The network is late, the next batch is not: neither reads what is not there yet, nor what was freed."""
    given = ("data.channels=3", "data.image_size=32", "data.train_samples=600", *more)
    device, host = (built(tmp_path / name, *given, f"trainer.device={name}") for name in ("cuda", "cpu"))
    device.train_loader.batches_at_once = 1
    for ours, theirs in (
        (device.train_loader.steps(1), host.train_loader.steps(1)),
        (device.val_loader, host.val_loader),
    ):
        late = []
        for batch in ours:
            [part] = batch if isinstance(batch, list) else [batch]
            torch.cuda._sleep(5_000_000)  # cycles: some milliseconds, in which the next batches could be made
            late.append((part.images * 1, part.labels * 1))
            del batch, part
        for (images, labels), batch in zip(late, theirs, strict=True):
            [part] = batch if isinstance(batch, list) else [batch]
            torch.testing.assert_close(labels.cpu(), part.labels)
            torch.testing.assert_close(images.cpu(), part.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tf32", "in_products", "in_convolutions"), [("auto", False, True), ("true", True, True), ("false", False, False)]
)
def test_tf32_follows_the_config(tmp_path, tf32, in_products, in_convolutions):
    built(tmp_path / "run", *CUDA, f"trainer.tf32={tf32}")
    generator = torch.Generator().manual_seed(0)
    matrix, maps, weight = (
        torch.randn(shape, generator=generator) for shape in ((512, 512), (4, 64, 32, 32), (64, 64, 3, 3))
    )
    pairs = [
        (matrix.cuda() @ matrix.cuda(), matrix.double() @ matrix.double(), in_products),
        (
            functional.conv2d(maps.cuda(), weight.cuda()),
            functional.conv2d(maps.double(), weight.double()),
            in_convolutions,
        ),
    ]
    for found, exact, is_rounded in pairs:
        error = (found.cpu().double() - exact).abs().max() / exact.abs().max()
        assert (error > 1e-5) == is_rounded, float(error)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_is_exact(tmp_path, precision, optimizer):
    extra = ("trainer.ema_decay=0.9", "trainer.clip_norm=1", "schedule=one_cycle", "trainer.evaluate_every=4 steps")
    given = (*CUDA, *RESNET, *extra, f"trainer.precision={precision}", f"optimizer={optimizer}")
    state = last_state(trained(tmp_path / "whole", *given).folder.path)
    for step in (1, 5, 6, 11):
        folder = tmp_path / str(step)
        run = built(folder, *given)
        stop_after(run, step)
        with pytest.raises(StopSignal):
            run_to_end(run)
        again = reopened(folder)
        assert again is not None
        run_to_end(again)
        assert last_state(folder) == state, step


def test_dropout_continues_after_a_resume(tmp_path):
    given = (*CUDA, "model.dropout=0.5")
    state = last_state(trained(tmp_path / "whole", *given).folder.path)
    run = built(tmp_path / "run", *given)
    stop_after(run, 5)
    with pytest.raises(StopSignal):
        run_to_end(run)
    torch.rand(3, device="cuda")  # other random draws do not matter
    again = reopened(tmp_path / "run")
    assert again is not None
    run_to_end(again)
    assert last_state(tmp_path / "run") == state


def test_scaler_state_is_restored(tmp_path):
    given = (*CUDA, "trainer.precision=fp16")
    run = built(tmp_path / "run", *given)
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 512.0, "_growth_tracker": 5})
    stop_after(run, 3)
    with pytest.raises(StopSignal):
        run_to_end(run)
    kept = CheckpointFolder(tmp_path / "run" / "checkpoints").load("last")[0].values["scaler"]
    again = reopened(tmp_path / "run")
    assert again is not None
    assert kept["scale"] == 512.0 and kept["_growth_tracker"] == 8
    assert again.state.scaler.state_dict() == kept
    run_to_end(again)


def test_overflow_of_the_scaled_gradient_is_handled_by_the_scaler(tmp_path):
    run = built(tmp_path / "run", *CUDA, "trainer.precision=fp16")
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 2.0**40})
    before = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    skipped: list[bool] = []
    run.loop.log_step = lambda result, log=run.loop.log_step: (  # type: ignore[method-assign,misc]
        skipped.append(all(torch.equal(tensor, before[name]) for name, tensor in run.state.model.state_dict().items())),
        log(result),
    )
    run_to_end(run)
    assert skipped[0] and not skipped[-1]
    assert all(tensor.isfinite().all() for tensor in run.state.model.state_dict().values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_cuda_skips_nonfinite_steps_and_reports_them_at_the_next_log(tmp_path, optimizer, what):
    run = built(tmp_path / "run", *CUDA, f"optimizer={optimizer}", "trainer.log_every=5 steps")
    states: list[dict[str, Tensor]] = []

    def note() -> None:
        states.append({name: tensor.clone() for name, tensor in run.state.model.state_dict().items()})

    run.state.optimizer.register_step_pre_hook(lambda *_: note())
    if what == "loss":
        run.training.loss_function.register_forward_hook(
            lambda _, __, loss: loss * math.nan if run.state.step == 2 else None
        )
    else:
        run.state.model.head.weight.register_hook(lambda gradient: gradient / 0 if run.state.step == 2 else gradient)
    with pytest.raises(NumericalError, match="not finite"):
        run_to_end(run)
    note()
    assert run.state.step == 5 and len(states) == 6
    same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(states)]
    assert same == [False, False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in states[-1].values())
    assert [file.step for file in run.folder.checkpoints.files("last", "best")] == [0]
