"""On a CUDA device: comparison with a plain loop, exact resume, gradient scaler, steps skipped on the device.

Without a GPU, the tests run on a simulated device (simulated_cuda.py), except for those marked `cuda`.
"""

import contextlib
import importlib
import inspect
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from conftest import built, composed, last_state, reopened, run_to_end, stop_after, trained
from simulated_cuda import kernels, simulated_cuda, synchronisations
from torch import Tensor, nn
from torch.nn import functional

from core.errors import ConfigError, NumericalError, StopSignal
from trainer.build.training import build
from trainer.interfaces import Batch, StepResult
from trainer.run import Run
from trainer.steps import ClassificationStep
from trainer.storage.checkpoint import CheckpointFolder
from trainer.training import Training

IS_REAL = torch.cuda.is_available()
only_simulated = pytest.mark.skipif(IS_REAL, reason="counts the operations of the simulated device")


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test for `make test-cuda`; it is skipped without a GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not IS_REAL, reason="needs a GPU")(test))


CUDA = ("trainer.device=cuda", "trainer.deterministic=true")
RESNET = ("model=resnet20", "model.depths=[1,1]", "model.widths=[8,16]", "augment=[crop_flip,affine]")
PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with contextlib.nullcontext() if IS_REAL else simulated_cuda():
        yield


def training(*overrides: str) -> Training:
    """Return a training without a run folder."""
    return build(composed(*overrides))[0]


@contextlib.contextmanager
def without_synchronisation() -> Iterator[None]:
    """Fail if the CPU waits for the device."""
    synchronisations.clear()
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not synchronisations


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
def test_random_values_do_not_depend_on_the_device(augment):
    """Same samples, order and augmentation on both devices, up to rounding of the interpolation."""
    overrides = (f"augment={augment}", "data.channels=3")
    device, host = (training(*overrides, f"trainer.device={name}") for name in ("cuda", "cpu"))
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
    with without_synchronisation():
        next(steps)


@pytest.mark.parametrize(
    "more_overrides", [(), ("augment=[crop_flip,affine]",), ("augment=rand_augment", "data.num_workers=2")]
)
def test_prefetched_batches_are_complete_whenever_they_are_used(more_overrides):
    """With a slow model and fast batches, no batch is read before it is complete or after its memory is freed."""
    overrides = ("data.channels=3", "data.image_size=32", "data.train_samples=600", *more_overrides)
    device, host = (training(*overrides, f"trainer.device={name}") for name in ("cuda", "cpu"))
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


@needs_gpu
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
    # The scaler halves it in the first steps until no gradient overflows.
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 2.0**24})
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


@needs_gpu
@pytest.mark.parametrize("option", ["trainer.compile=true", "trainer.cuda_graphs=true"])
def test_compiled_and_recorded_models_train_like_the_model_itself(tmp_path, option):
    """With an odd last batch, batch norm, dropout and bf16; resumed at each of some steps, bit-identical."""
    overrides = (*CUDA, *RESNET, "data.channels=3", "trainer.precision=bf16", "trainer.clip_norm=1")
    plain = trained(tmp_path / "plain", *overrides)
    uninterrupted = trained(tmp_path / "uninterrupted", *overrides, option)
    for name, tensor in plain.state.model.state_dict().items():
        torch.testing.assert_close(uninterrupted.state.model.state_dict()[name], tensor, rtol=0.1, atol=0.05, msg=name)
    state = last_state(uninterrupted.folder.path)
    for step in (1, 6, 11):
        run = built(tmp_path / str(step), *overrides, option)
        stop_after(run, step)
        with pytest.raises(StopSignal):
            run_to_end(run)
        torch.compiler.reset()
        resumed = reopened(tmp_path / str(step))
        assert resumed is not None
        run_to_end(resumed)
        assert last_state(tmp_path / str(step)) == state, step


@needs_gpu
def test_cuda_graph_computes_the_same_bits_as_the_model(tmp_path):
    """Without dropout, whose random values a graph draws in another order."""
    overrides = (*CUDA, "model=lenet5", "data.image_size=32", "data.channels=1")
    runs = [trained(tmp_path / name, *overrides, f"trainer.cuda_graphs={name}") for name in ("false", "true")]
    plain, recorded = (run.state.model.state_dict() for run in runs)
    assert all(torch.equal(recorded[name], plain[name]) for name in plain)


@needs_gpu
def test_full_batches_use_one_compiled_graph(tmp_path):
    """An odd last batch gets a graph of its own; the other batches keep theirs."""
    torch._dynamo.utils.counters.clear()
    trained(tmp_path / "run", *CUDA, "trainer.compile=true", "trainer.max_epochs=3")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@needs_gpu
def test_gpu_memory_that_cannot_hold_the_data_is_a_config_error(tmp_path):
    free = torch.cuda.mem_get_info()[0]
    held = torch.empty(free - 2**28, dtype=torch.uint8, device="cuda")  # leaves 256 MiB
    try:
        with pytest.raises(ConfigError, match="data.memory_budget.*free"):
            built(tmp_path / "run", *CUDA, "data.channels=3", "data.image_size=128", "data.train_samples=8000")
    finally:
        del held
        torch.cuda.empty_cache()


@needs_gpu
def test_out_of_memory_is_a_numerical_error(tmp_path):
    overrides = (*CUDA, "model=resnet20", "model.widths=[4096,8192,8192]", "data.channels=3", "data.image_size=64")
    with pytest.raises(NumericalError, match="out of memory; try a smaller data.batch_size"):
        trained(tmp_path / "run", *overrides, "data.batch_size=40", "data.train_samples=4000")


@needs_gpu
def test_device_without_a_deterministic_kernel_is_a_config_error(tmp_path):
    """Adaptive average pooling has no deterministic backward pass on CUDA."""
    overrides = ("model=torchvision", "model.network._target_=torchvision.models.alexnet", "data.image_size=127")
    with pytest.raises(ConfigError, match="trainer.deterministic = true: adaptive_avg_pool2d"):
        built(tmp_path / "run", *CUDA, *overrides, "data.channels=3")


@needs_gpu
def test_device_can_be_named_by_its_number(tmp_path):
    run = trained(tmp_path / "run", "trainer.device=cuda:0")
    assert run.state.model.head.weight.device == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="trainer.device = cuda:99: torch finds no such device here; available: cpu"):
        built(tmp_path / "other", "trainer.device=cuda:99")


EXTRAS = {
    "plain": (),
    "averages": ("trainer.ema_decay=0.9", "trainer.lookahead.every=2", "trainer.clip_norm=1", "trainer.l1=0.1"),
    "skip": ("trainer.on_nonfinite=skip", "trainer.ema_decay=0.9"),
    "accumulate": ("trainer.accumulate=2", "augment=[crop_flip,mixup]"),
}
NOT_FUSED = ("rmsprop", "adagrad")  # Adagrad in some versions of torch


@pytest.mark.parametrize("extra", EXTRAS)
def test_step_does_not_make_the_cpu_wait(tmp_path, monkeypatch, extra):
    run = built(tmp_path / "run", *CUDA, *RESNET, *EXTRAS[extra], "data.channels=3")
    check_that_steps_do_not_wait(run, monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adagrad", "muon"])
def test_no_optimizer_makes_the_cpu_wait(tmp_path, monkeypatch, optimizer, precision):
    if optimizer in NOT_FUSED and precision == "fp16":
        pytest.skip("torch's gradient scaler waits for its flag before an update that is not fused")
    overrides = (f"optimizer={optimizer}", f"trainer.precision={precision}", "model.hidden=[16,16]")
    check_that_steps_do_not_wait(built(tmp_path / "run", *CUDA, *overrides), monkeypatch)


def check_that_steps_do_not_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train; fail if the CPU waits between the start of a step and the point at which a log line may be due."""
    make_step, log_step, in_step, steps = ClassificationStep.__call__, run.loop.log_step, contextlib.ExitStack(), []

    def checked_step(step: ClassificationStep, batches: Sequence[Batch]) -> StepResult:
        in_step.enter_context(without_synchronisation())
        steps.append(run.state.step)
        return make_step(step, batches)

    def log_step_after_the_check(result: StepResult) -> None:
        in_step.close()
        log_step(result)

    monkeypatch.setattr(ClassificationStep, "__call__", checked_step)
    monkeypatch.setattr(run.loop, "log_step", log_step_after_the_check)
    with in_step:  # ends the check if a step fails
        run_to_end(run)
    assert steps == list(range(run.training.settings.total_steps))


@only_simulated
@pytest.mark.parametrize(
    ("overrides", "limit"),
    [((), 4), (("trainer.precision=fp16",), 4), (("trainer.on_nonfinite=skip", *RESNET, "data.channels=3"), 14)],
)
def test_nonfinite_guard_launches_few_kernels(tmp_path, monkeypatch, overrides, limit):
    """Without skipped steps at most 4 kernels; with them, a few for all statistics of batch norm together."""
    run = built(tmp_path / "run", *CUDA, *overrides)
    check, counts = run.state.guard.allows, []

    def counted(*args, **kwargs):
        before = len(kernels)
        allowed = check(*args, **kwargs)
        counts.append(len(kernels) - before)
        return allowed

    monkeypatch.setattr(run.state.guard, "allows", counted)
    run_to_end(run)
    assert len(counts) == 12 and 0 < max(counts) <= limit


@only_simulated
@pytest.mark.parametrize(
    ("key", "name"), [("trainer.ema_decay=0.9", "ema"), ("trainer.lookahead.every=1", "lookahead")]
)
def test_averages_launch_few_kernels(tmp_path, monkeypatch, key, name):
    run = built(tmp_path / "run", *CUDA, *RESNET, "data.channels=3", key)
    average, counts = getattr(run.state, name), []
    update = average.update

    def counted(*args, **kwargs):
        before = len(kernels)
        update(*args, **kwargs)
        counts.append(len(kernels) - before)

    monkeypatch.setattr(average, "update", counted)
    run_to_end(run)
    assert len(counts) == 12 and 0 < max(counts) <= 4


@pytest.mark.parametrize(
    "overrides",
    [
        (*RESNET, "trainer.tta=mirror", "trainer.accumulate=2", "trainer.on_nonfinite=skip"),
        (f"augment={AUGMENTATIONS[1]}", "model.dropout=0.5", "trainer.histograms_every=3 steps"),
        (f"augment={AUGMENTATIONS[2]}", "loss.class_weights=balanced", "data.normalise=zca"),
        (f"augment={AUGMENTATIONS[3]}", "data.num_workers=2", "loss=huber", "trainer.lookahead.every=5"),
        ("optimizer=adamw", "trainer.ema_decay=0.9", "trainer.tta=mirror_shift", "schedule=one_cycle"),
    ],
)
def test_training_on_the_device_equals_training_on_the_cpu(tmp_path, overrides):
    """Bit-identical on the simulated device, which has the CPU's rounding."""
    overrides = ("data.channels=3", *overrides)
    runs = [trained(tmp_path / name, *overrides, f"trainer.device={name}") for name in ("cpu", "cuda")]
    host, device = (run.folder.checkpoints.load("last")[0].tensors for run in runs)
    tolerance = 2e-2 if IS_REAL else 0
    for name in host:
        torch.testing.assert_close(device[name], host[name], rtol=tolerance, atol=tolerance, msg=name)


# Device errors that are planted in the code: the simulated device must find them

PLANTED = {
    "labels stay on the CPU": ("data.loading.pixel_sources.Resident", "labels.to(device)", "labels", ()),
    "sample indices stay on the CPU": (
        "data.loading.pixel_sources.Resident",
        "upload(torch.cat(list(batches)), self.device)",
        "torch.cat(list(batches))",
        (),
    ),
    "normalisation stays on the CPU": (
        *("data.loading.normalisation.Normalisation", ".float().to(self.device)[:, None, None]"),
        *(".float()[:, None, None]", ()),
    ),
    "table of a distribution stays on the CPU": (
        *("data.augment.distributions.SymmetricBeta", "self.quantiles = self.quantiles.to(uniform.device)", "pass"),
        ("augment=mixup",),
    ),
    "positions without a device": (
        *("data.augment.geometry._flipped", "device=images.device", "device=None", ("augment=flip",)),
    ),
    "average on the CPU": (
        *("trainer.optim.ema.ExponentialMovingAverage", "copy.deepcopy(model)", "copy.deepcopy(model).to('cpu')"),
        ("trainer.ema_decay=0.9",),
    ),
    "loss read at each step": ("trainer.steps.ClassificationStep", "return norm", "norm.item(); return norm", ()),
    "flag read at each step": (
        *("trainer.monitor.nonfinite.NonFiniteGuard", "self._flag(loss, norm, indices, step=step)"),
        *("self._flag(loss, norm, indices, step=step); self.unread[-1][1].item()", ()),
    ),
    "sums read at each step": (
        *("trainer.monitor.metrics.RunningSums", "self._pending.append("),
        *("loss.item(); self._pending.append(", ()),
    ),
}


@only_simulated
@pytest.mark.parametrize("fault", PLANTED)
def test_simulated_device_finds_a_planted_fault(tmp_path, monkeypatch, fault):
    target, old, new, overrides = PLANTED[fault]
    plant(monkeypatch, target, old, new)
    with pytest.raises((RuntimeError, AssertionError), match="same device|assert not"):
        check_that_steps_do_not_wait(built(tmp_path / "run", *CUDA, *overrides), monkeypatch)


def plant(monkeypatch: pytest.MonkeyPatch, target: str, old: str, new: str) -> None:
    """Replace a class or function by one whose source has `new` in place of `old`."""
    module_name, _, name = target.rpartition(".")
    module = importlib.import_module(module_name)
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert old in source, (target, old)
    scope = dict(vars(module))
    exec(compile(f"from __future__ import annotations\n{source.replace(old, new)}", module.__file__, "exec"), scope)
    original = getattr(module, name)
    if inspect.isclass(original):  # in place: other modules have imported the class
        for attribute, value in vars(scope[name]).items():
            if inspect.isfunction(value):
                monkeypatch.setattr(original, attribute, value)
    else:
        monkeypatch.setattr(module, name, scope[name])
