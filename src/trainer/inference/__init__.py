"""A trained model in use.

evaluation.py   loss and accuracy during training; scikit-learn's metrics of finished runs
tta.py          test-time augmentation
load_run.py     a run folder -> model, transform, class names; imports neither Hydra, Rich nor TensorBoard
"""
