"""Measures, side by side: what a step could do, what training does, and what others do.

    python bench/bench.py                        everything, as a table, outputs/bench.json and outputs/bench.png
    python bench/bench.py step loader            some of its parts, below
    python bench/bench.py step --rounds 40       more rounds: on a busy machine the medians need them
    python bench/bench.py step --only lenet      only the networks with this in their name

    step        samples a second in training steps. `limit` repeats one batch that lies ready, with the same network,
                layout and optimizer; `ours` is the trainer itself, with its logs; `plain` is a loop over torchvision's
                transforms and a DataLoader; Lightning and fastai (the extra `bench`) get the same DataLoader. These
                three have torch's defaults: SGD not fused, images not channels_last
    own         microseconds a step that are the trainer's own: less a bare loop over the same batches
    loader      samples a second from uint8 to augmented, normalised batches, no network; against a DataLoader
    folder      an epoch of a folder of photographs: decoded each time, and read from its cache
    evaluation  samples a second in evaluation, against the forward pass of one batch that lies ready
    logs        what logging at every step and saving at every fifth cost, against neither
    growth      microseconds a sample in training, as data, batches and networks grow
    memory      peak memory of a process that trains; the others hold as many images, as an array
    start       seconds from the command to the end of a first step, and of `import torch, torchvision`
    cuda        images a second of large networks in bf16 on a GPU, against a bare compiled loop: images on the
                device, and photographs that workers read from their cache; then `experiment=cifar10_gpu`

All contenders of a line take short turns in one process, and ratios are medians over rounds: machines are noisy. MNIST,
CIFAR-10 and the folder `imagenette-mini` are read from PRECEPTOR_DATA; if the first two are missing, synthetic
images of that size stand in, and what needs the folder is left out.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from commands import bench_memory, bench_start
from gpu import bench_cuda
from reading import bench_evaluation, bench_folder, bench_loader
from tables import plot, table_of
from training import bench_growth, bench_logs, bench_own, bench_step

PARTS = {
    "step": bench_step,
    "own": bench_own,
    "loader": bench_loader,
    "folder": bench_folder,
    "evaluation": bench_evaluation,
    "logs": bench_logs,
    "growth": bench_growth,
    "memory": bench_memory,
    "start": bench_start,
    "cuda": bench_cuda,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures training, loading and starting, side by side.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--only", default="", help="of step and evaluation: the lines with this in their name")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn, which ends with a step")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"), help="the figures; a plot beside it")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as core.command_line

    import torch
    from rich.console import Console

    from trainer.device import keep_freed_memory

    keep_freed_memory()  # for all of them alike
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": options.rounds}
    console = Console(width=120)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        report[part] = PARTS[part](options)
        console.print(table_of(part, report[part]))
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    told = str(options.output)
    if report.get("step") and options.rounds > 1:
        plot(report["step"], options.output.with_suffix(".png"))
        told += f", {options.output.with_suffix('.png')}"
    console.print(f"figures of each round: {told}")


if __name__ == "__main__":
    main()
