"""The part `cuda`: large models in bf16 on a GPU."""

import argparse
import itertools
import tempfile
from collections.abc import Sequence

from commands import bench_recipe
from contenders import DATA, assembled, bare, ours, whole_run
from tables import Line
from turns import race

LARGE = ("resnet18", "resnet50", "vgg16")


def bench_cuda(options: argparse.Namespace) -> dict[str, Line]:
    import torch

    if not torch.cuda.is_available():
        return {}
    given = ("trainer.device=cuda", "trainer.precision=bf16", "trainer.compile=true", "optimizer.lr=0.001")
    lines = bench_large(options, LARGE, size=224, batch=128, given=given)
    return lines | (bench_recipe("cifar10_gpu") if (DATA / "cifar-10-batches-py").exists() else {})


def bench_large(
    options: argparse.Namespace, networks: Sequence[str], *, size: int, batch: int, given: tuple[str, ...]
) -> dict[str, Line]:
    """Each network on images that lie on the device, and on photographs that workers read while it computes."""
    import torch

    # With drop_last they are compiled for one size.
    sizes = [f"data.image_size={size}", f"data.batch_size={batch}", "data.drop_last=true"]
    sizes += ["data.channels=3", "data.num_classes=10"]
    sources = {"resident": ["data=synthetic", "data.train_samples=4000", *sizes]}
    lines: dict[str, Line] = {}
    with tempfile.TemporaryDirectory() as cache:
        if (root := DATA / "imagenette-mini").exists():
            place = [f"data.root={root}", f"data.cache_dir={cache}", "data.memory_budget=0"]
            sources["streamed"] = ["data=image_folder", *place, *sizes]
        for network, (kind, data) in itertools.product(networks, sources.items()):
            config = (*data, f"model={network}", *given)
            torch.compiler.reset()  # or what one network has taught it would hold for the next
            with whole_run(*config) as run:
                trainings = {
                    "limit": bare(assembled(*config), one_batch=True),
                    "ours": ours(run),
                    "bare loop": bare(assembled(*config), one_batch=False),
                }
                line = race(trainings, of="ours", rounds=options.rounds, seconds=options.seconds)
            lines[f"{network}, {kind}"] = line
    return lines
