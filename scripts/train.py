"""Train an image classifier as a config says, or go on with a run.

scripts/train.py                                    LeNet-5 on handwritten digits
scripts/train.py model=mlp data=mnist optimizer.lr=0.1
scripts/train.py -m model=mlp,lenet5 seed=0,1       every combination, a run each
scripts/train.py resume=outputs/RUN                 goes on with a run
"""

from core.command_line import launch
from core.config import Config
from core.schema import TRAIN


def train(config: Config) -> float | None:
    """Build and fit; returns the best value of the monitored metric, for sweeps."""
    from trainer.build.training import build  # torch is imported here, when the config is known to be good

    trainer = build(config)
    return trainer.run() if trainer else None


if __name__ == "__main__":
    launch(train, config_name="train", rules=TRAIN)
