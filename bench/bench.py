"""Measure training, loading, memory and start; compare with a limit, a plain loop, Lightning and fastai.

    python bench/bench.py                        all benchmarks; writes outputs/bench.json and bench.png
    python bench/bench.py step loader            some benchmarks of the list below
    python bench/bench.py step --rounds 40       more rounds, for stable medians on a busy machine
    python bench/bench.py step --only lenet      only models with this text in their name

    step        samples per second in training. `limit` trains on one prepared batch again and again, with the same
                model, memory layout and optimizer. `ours` (Preceptor in tables and plots) is the trainer with its
                logs. `plain` is a loop over torchvision's transforms and a DataLoader. Lightning and fastai (the
                extra `bench`) use the same DataLoader. These three have torch's defaults: SGD is not fused, images
                are not channels_last
    own         the trainer's overhead in microseconds per step, compared with a bare loop over the same batches
    loader      samples per second from uint8 to augmented, normalised batches, without a model; against a DataLoader
    folder      samples per second of an epoch of an image folder: decoded each time, or read from its cache
    evaluation  samples per second in evaluation, against the forward pass of one prepared batch
    logs        cost of logging at every step, and of a checkpoint at every fifth step, against neither
    growth      microseconds per sample in training with larger data, batches and models
    memory      peak memory of a training process; the other frameworks hold the same number of images in an array
    start       seconds from the command to the end of the first step, and of `import torch, torchvision`
    listing     seconds and memory until a folder of images is listed, against torchvision's ImageFolder
    cuda        on a GPU: samples per second of small models, also compiled and as a CUDA graph, against a plain
                compiled loop and Lightning with 8 workers; of large models in bf16, against a bare compiled loop:
                images on the device, and photographs that workers read from their cache; then
                `experiment=cifar10_gpu` with five seeds

All contenders of a table section alternate in short turns in one process, and ratios are medians over rounds, because
timings are noisy. MNIST, CIFAR-10 and the folder `imagenette-mini` are read from PRECEPTOR_DATA. If MNIST or CIFAR-10
is missing, synthetic images of the same size are used; without the folder, the measurements that need it are skipped.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from commands import bench_listing, bench_memory, bench_start
from gpu import bench_cuda
from reading import bench_evaluation, bench_folder, bench_loader
from tables import plot, table_of
from training import bench_growth, bench_logs, bench_own, bench_step

BENCHMARKS = {
    "step": bench_step,
    "own": bench_own,
    "loader": bench_loader,
    "folder": bench_folder,
    "evaluation": bench_evaluation,
    "logs": bench_logs,
    "growth": bench_growth,
    "memory": bench_memory,
    "start": bench_start,
    "listing": bench_listing,
    "cuda": bench_cuda,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the speed of training, loading and starting.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--only", default="", help="for step and evaluation: only models with this text in their name")
    parser.add_argument("--rounds", type=int, default=20, help="number of turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn; it ends after a step")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/bench.json"), help="JSON file; the plot is beside it"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}; allowed: {', '.join(BENCHMARKS)}")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in core.command_line

    import torch
    from rich.console import Console

    from trainer.device import keep_freed_memory

    keep_freed_memory()  # for all contenders
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": options.rounds}
    console = Console(width=120)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.names or BENCHMARKS:
        report[name] = BENCHMARKS[name](options)
        console.print(table_of(name, report[name]))
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    files = [str(options.output)]
    if report.get("step") and options.rounds > 1:
        plot(report["step"], options.output.with_suffix(".png"))
        files.append(str(options.output.with_suffix(".png")))
    console.print(f"measurements of each round: {', '.join(files)}")


if __name__ == "__main__":
    main()
