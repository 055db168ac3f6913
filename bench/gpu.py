"""Benchmark `cuda`: large models in bf16 on a GPU."""

import argparse
import itertools
import tempfile
from collections.abc import Sequence

from commands import bench_recipe
from contenders import DATA, assembled, bare, preceptor, whole_run
from tables import Line
from turns import race

LARGE = ("resnet18", "resnet50", "vgg16")


def bench_cuda(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    if not torch.cuda.is_available():
        return {}
    overrides = ("trainer.device=cuda", "trainer.precision=bf16", "trainer.compile=true", "optimizer.lr=0.001")
    lines = bench_large(options, LARGE, size=224, batch=128, overrides=overrides)
    return lines | (bench_recipe("cifar10_gpu") if (DATA / "cifar-10-batches-py").exists() else {})


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
