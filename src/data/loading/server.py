"""The fork server of all loaders of this process; it starts with the first worker. No torch is imported here."""

from functools import cache

from core.config import Config
from core.fork_server import ForkServer
from core.options.declarations import TrainConfig

PRELOAD = ("data.loading.worker_process",)


def warm_up(config: Config[TrainConfig]) -> None:
    """Start the server if the config asks for workers: called before torch is imported, it imports torch meanwhile."""
    if config.values["data"]["num_workers"]:
        worker_server().warm_up()


@cache
def worker_server() -> ForkServer:
    """Return the server; its first child, or `warm_up`, starts it."""
    return ForkServer(PRELOAD)
