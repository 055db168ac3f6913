"""On a CUDA device: comparison with a plain loop, exact resume, gradient scaler, steps skipped on the device."""

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
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = ("trainer.device=cuda", "trainer.deterministic=true")
RESNET = ("model=resnet20", "model.depths=[1,1]", "model.widths=[8,16]", "augment=[crop_flip,affine]")
PRECISIONS = ("fp32", "bf16", "fp16")


def batches(run: Run, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader, order = run.training.train_loader, run.training.train_loader.order(epoch).cuda()
    for rows in order.split(loader.batch_size):
        yield loader.normalisation(loader.source.pixels[rows]), loader.source.labels[rows]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fit_equals_a_plain_loop_on_cuda(tmp_path, precision):
    """A fused update rounds differently from a plain one, so the results are almost equal."""
    overrides = (*CUDA, f"trainer.precision={precision}", "trainer.clip_norm=0.7", "trainer.checkpoint.monitor=null")
    run, reference = trained(tmp_path / "run", *overrides), built(tmp_path / "other", *overrides)
    model = reference.state.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.0001)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    step = 0
    for epoch in range(2):
        for images, labels in batches(reference, epoch):
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
    for (name, tensor), expected in zip(run.state.model.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance, msg=name)


def test_data_and_batches_are_on_the_device(tmp_path):
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
    """Same samples, order and augmentation on both devices, up to rounding of the interpolation."""
    overrides = (f"augment={augment}", "data.channels=3")
    device, host = (built(tmp_path / name, *overrides, f"trainer.device={name}") for name in ("cuda", "cpu"))
    for (on_device,), (on_host,) in zip(device.train_loader.steps(1), host.train_loader.steps(1), strict=True):
        assert torch.equal(on_device.indices.cpu(), on_host.indices)
        torch.testing.assert_close(on_device.labels.cpu(), on_host.labels)
        torch.testing.assert_close(on_device.images.cpu(), on_host.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("augment", AUGMENTATIONS[:3])
def test_augmentation_does_not_wait_for_the_device(tmp_path, augment):
    run = built(tmp_path / "run", *CUDA, f"augment={augment}", "data.channels=3")
    run.training.train_loader.batches_at_once = 1  # otherwise the first batch creates all of them
    steps = iter(run.training.train_loader.steps(0))
    next(steps)  # copies tables and the epoch's order to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "more_overrides", [(), ("augment=[crop_flip,affine]",), ("augment=rand_augment", "data.num_workers=2")]
)
def test_prefetched_batches_are_complete_whenever_they_are_used(tmp_path, more_overrides):
    """With a slow model and fast batches, no batch is read before it is complete or after its memory is freed."""
    overrides = ("data.channels=3", "data.image_size=32", "data.train_samples=600", *more_overrides)
    device, host = (built(tmp_path / name, *overrides, f"trainer.device={name}") for name in ("cuda", "cpu"))
    device.train_loader.batches_at_once = 1
    for device_batches, host_batches in (
        (device.train_loader.steps(1), host.train_loader.steps(1)),
        (device.val_loader, host.val_loader),
    ):
        copies = []
        for batch in device_batches:
            [single] = batch if isinstance(batch, list) else [batch]
            torch.cuda._sleep(5_000_000)  # cycles: some milliseconds, in which the next batches can be prepared
            copies.append((single.images * 1, single.labels * 1))
            del batch, single
        for (images, labels), batch in zip(copies, host_batches, strict=True):
            [single] = batch if isinstance(batch, list) else [batch]
            torch.testing.assert_close(labels.cpu(), single.labels)
            torch.testing.assert_close(images.cpu(), single.images, rtol=1e-3, atol=1e-3)


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
    for actual, exact, is_rounded in pairs:
        error = (actual.cpu().double() - exact).abs().max() / exact.abs().max()
        assert (error > 1e-5) == is_rounded, float(error)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_is_exact_on_cuda(tmp_path, precision, optimizer):
    extra = ("trainer.ema_decay=0.9", "trainer.clip_norm=1", "schedule=one_cycle", "trainer.evaluate_every=4 steps")
    overrides = (*CUDA, *RESNET, *extra, f"trainer.precision={precision}", f"optimizer={optimizer}")
    state = last_state(trained(tmp_path / "uninterrupted", *overrides).folder.path)
    for step in (1, 5, 6, 11):
        folder = tmp_path / str(step)
        run = built(folder, *overrides)
        stop_after(run, step)
        with pytest.raises(StopSignal):
            run_to_end(run)
        resumed = reopened(folder)
        assert resumed is not None
        run_to_end(resumed)
        assert last_state(folder) == state, step


def test_dropout_is_unchanged_by_a_resume_on_cuda(tmp_path):
    overrides = (*CUDA, "model.dropout=0.5")
    state = last_state(trained(tmp_path / "uninterrupted", *overrides).folder.path)
    run = built(tmp_path / "run", *overrides)
    stop_after(run, 5)
    with pytest.raises(StopSignal):
        run_to_end(run)
    torch.rand(3, device="cuda")  # other random draws do not matter
    resumed = reopened(tmp_path / "run")
    assert resumed is not None
    run_to_end(resumed)
    assert last_state(tmp_path / "run") == state


def test_scaler_state_is_restored_by_a_resume(tmp_path):
    overrides = (*CUDA, "trainer.precision=fp16")
    run = built(tmp_path / "run", *overrides)
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 512.0, "_growth_tracker": 5})
    stop_after(run, 3)
    with pytest.raises(StopSignal):
        run_to_end(run)
    saved = CheckpointFolder(tmp_path / "run" / "checkpoints").load("last")[0].values["scaler"]
    resumed = reopened(tmp_path / "run")
    assert resumed is not None
    assert saved["scale"] == 512.0 and saved["_growth_tracker"] == 8
    assert resumed.state.scaler.state_dict() == saved
    run_to_end(resumed)


def test_overflow_of_the_scaled_gradient_is_handled_by_the_scaler(tmp_path):
    run = built(tmp_path / "run", *CUDA, "trainer.precision=fp16")
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 2.0**40})
    initial = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    skipped: list[bool] = []
    run.loop.log_step = lambda result, log=run.loop.log_step: (  # type: ignore[method-assign,misc]
        skipped.append(
            all(torch.equal(tensor, initial[name]) for name, tensor in run.state.model.state_dict().items())
        ),
        log(result),
    )
    run_to_end(run)
    assert skipped[0] and not skipped[-1]
    assert all(tensor.isfinite().all() for tensor in run.state.model.state_dict().values())


@pytest.mark.parametrize("source", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_cuda_skips_nonfinite_steps_and_reports_them_at_the_next_log(tmp_path, optimizer, source):
    run = built(tmp_path / "run", *CUDA, f"optimizer={optimizer}", "trainer.log_every=5 steps")
    states: list[dict[str, Tensor]] = []

    def record_state() -> None:
        states.append({name: tensor.clone() for name, tensor in run.state.model.state_dict().items()})

    run.state.optimizer.register_step_pre_hook(lambda *_: record_state())
    if source == "loss":
        run.training.loss_function.register_forward_hook(
            lambda _, __, loss: loss * math.nan if run.state.step == 2 else None
        )
    else:
        run.state.model.head.weight.register_hook(lambda gradient: gradient / 0 if run.state.step == 2 else gradient)
    with pytest.raises(NumericalError, match="not finite"):
        run_to_end(run)
    record_state()
    assert run.state.step == 5 and len(states) == 6
    same = [all(torch.equal(before[name], after[name]) for name in before) for before, after in pairwise(states)]
    assert same == [False, False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in states[-1].values())
    assert [file.step for file in run.folder.checkpoints.files("last", "best")] == [0]
