"""Sources: from a data set's files to the splits that a run trains, validates and tests on.

decode.py          the rule that makes uint8 pixels of any image file
cache.py           decoded images on the disk, in one mapped file
images.py          Images (pixels and labels) and Files (decoded on demand, or read from their cache)
collection.py      Collection: what a data set function returns
datasets.py        the embedded digits and torchvision's official data sets
image_folder.py    the user's own images, one folder per class
synthetic.py       images drawn by a formula, for tests and demonstrations
stratification.py  stratified shares of labels
pixels.py          pixels in memory: check, recolour, resize
splits.py          Splits: checked, split, converted, and with a fitted normalisation

datasets | image_folder (decode -> cache -> Files) | synthetic -> Collection -> splits.prepare -> Splits
"""
