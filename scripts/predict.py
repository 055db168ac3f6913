"""Classify an image file or a folder of images with a run's model.

    python scripts/predict.py run=outputs/RUN input=FOLDER output=FILE.csv

The command writes one line per image: file, predicted class, its probability, and the probability of each class.
"""

import own_packages  # noqa: F401  exits if another folder hides one of our packages

# isort: split
from core.command_line import launch
from core.options.commands import PredictConfig

if __name__ == "__main__":
    launch("analysis.predict.predict_images", config_name="predict", schema=PredictConfig)
