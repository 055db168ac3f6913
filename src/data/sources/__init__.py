"""Sources: from the files of a data set to the splits that a run trains, validates and tests on.

listing.py         image files below a folder, and PackedPaths
decode.py          decoding of any image file to uint8 pixels
cache.py           cache of decoded images: reading
cache_index.py     its index: what each file was like when it was cached
cache_creation.py  its creation and repair
images.py          Images (pixels and labels) and Files (decoded on demand, or read from their cache)
collection.py      Collection: what a data set function returns
datasets.py        the embedded digits and torchvision's official data sets
image_folder.py    image files with one folder per class
synthetic.py       synthetic images, for tests and demonstrations
stratification.py  stratified subsets
pixels.py          pixels in memory: check, recolour, resize
splits.py          Splits: checked, split, converted, and with a fitted normalisation

datasets | image_folder (listing -> cache -> Files) | synthetic -> Collection -> splits.prepare -> Splits
"""
