"""Classify a folder of images with a run's model.

    scripts/predict.py run=outputs/RUN input=FOLDER output=FILE.csv

Writes one line per image: file, class, probability, and the probability of each class.
"""

from core.command_line import launch
from core.options.declarations import PredictConfig

if __name__ == "__main__":
    launch("analysis.predict.predict_images", config_name="predict", schema=PredictConfig)
