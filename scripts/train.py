"""Train an image classifier from a config, or resume a run.

python scripts/train.py                                 LeNet-5 on handwritten digits
python scripts/train.py model=mlp data=mnist optimizer.lr=0.1
python scripts/train.py -m model=mlp,lenet5 seed=0,1    one run for each combination
python scripts/train.py resume=outputs/RUN              resumes a run
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.declarations import TrainConfig

if __name__ == "__main__":
    launch("trainer.run.execute", config_name="train", schema=TrainConfig, before_import="data.loading.server.warm_up")
