"""Benchmark `cuda`: small and large models on a GPU, and the recipe `cifar10_gpu`."""

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from commands import bench_recipe
from contenders import DATA, assembled, bare, data_loader, lightning, plain, preceptor, whole_run
from tables import Line
from turns import BATCH, CASES, CPU, race

LARGE = ("resnet18", "resnet50", "vgg16")
GPU = ("trainer.device=cuda", f"data.batch_size={BATCH}", "data.drop_last=true")
VARIANTS = {"compiled": "trainer.compile=true", "CUDA graph": "trainer.cuda_graphs=true"}


def bench_cuda(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    if not torch.cuda.is_available():
        return {}
    small = {name: (*(each for each in case if each not in CPU), *GPU) for name, case in CASES.items()}
    lines = bench_small(options, small, variants=VARIANTS, workers=8)
    overrides = ("trainer.device=cuda", "trainer.precision=bf16", "trainer.compile=true", "optimizer.lr=0.001")
    lines |= bench_large(options, LARGE, size=224, batch=128, overrides=overrides)
    return lines | (bench_recipe("cifar10_gpu", seeds=5) if (DATA / "cifar-10-batches-py").exists() else {})


def bench_small(
    options: argparse.Namespace, cases: Mapping[str, tuple[str, ...]], *, variants: Mapping[str, str], workers: int
) -> dict[str, Line]:
    """Return one line per case: variants of Preceptor, a plain compiled loop, and Lightning."""
    import torch

    lines: dict[str, Line] = {}
    for name, overrides in cases.items():
        if options.only.lower() not in name.lower():
            continue
        torch.compiler.reset()  # otherwise the compiler's state after one model would affect the next
        with ExitStack() as stack:
            trainings = {
                "limit": bare(assembled(*overrides), one_batch=True),
                "ours": preceptor(stack.enter_context(whole_run(*overrides))),
            }
            for variant, override in variants.items():
                run = stack.enter_context(whole_run(*overrides, override))
                trainings[f"ours, {variant}"] = preceptor(run)
            for peer, make in (("plain, compiled", partial(plain, compiled=True)), ("Lightning", lightning)):
                other = assembled(*overrides, "trainer.channels_last=false")
                with suppress(ImportError):
                    batches = data_loader(other, augment="augment=crop_flip" in overrides, workers=workers)
                    trainings[f"{peer}, {workers} workers"] = make(other.state.model, batches)
            lines[f"{name}, GPU"] = race(trainings, of="ours", rounds=options.rounds, seconds=options.seconds)
    return lines


def bench_large(
    options: argparse.Namespace, models: Sequence[str], *, size: int, batch: int, overrides: tuple[str, ...]
) -> dict[str, Line]:
    """Return one line per model and source: images on the device, and photographs that workers read during training."""
    import torch

    # drop_last: the models are compiled for a single batch size.
    sizes = [f"data.image_size={size}", f"data.batch_size={batch}", "data.drop_last=true"]
    sizes += ["data.channels=3", "data.num_classes=10"]
    sources = {"resident": ["data=synthetic", "data.train_samples=4000", *sizes]}
    lines: dict[str, Line] = {}
    with tempfile.TemporaryDirectory() as cache:
        if (root := DATA / "imagenette-mini").exists():
            folders = [f"data.root={root}", f"data.cache_dir={cache}", "data.memory_budget=0"]
            sources["streamed"] = ["data=image_folder", *folders, *sizes]
        for model, (kind, data) in itertools.product(models, sources.items()):
            config = (*data, f"model={model}", *overrides)
            torch.compiler.reset()  # otherwise the compiler's state after one model would affect the next
            with whole_run(*config) as run:
                trainings = {
                    "limit": bare(assembled(*config), one_batch=True),
                    "ours": preceptor(run),
                    "bare loop": bare(assembled(*config), one_batch=False),
                }
                line = race(trainings, of="ours", rounds=options.rounds, seconds=options.seconds)
            lines[f"{model}, {kind}"] = line
    return lines
