"""The fork server that starts the workers of all loaders of this process. This file must not import torch."""

from functools import cache

from core.config import Config
from core.fork_server import ForkServer
from core.options.declarations import TrainConfig

PRELOAD = ("data.loading.worker_process",)


def warm_up(config: Config[TrainConfig]) -> None:
    """Start the server if data.num_workers > 0.

    The command calls this before it imports torch. The server imports torch at the same time, in its own process.
    """
    if config.values["data"]["num_workers"]:
        worker_server().warm_up()


@cache
def worker_server() -> ForkServer:
    """Return the server. It is started by `warm_up`, or else with its first worker."""
    return ForkServer(PRELOAD)
