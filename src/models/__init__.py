"""The built-in models: images (B, C, H, W), normalised, to logits (B, K). One file per family; a config names a class.

`forward` is `head(features(x))`. During training a model with auxiliary heads returns a tuple of logits. Every key of
a `configs/model` file is an argument of the class that its `_target_` names.

    blocks.py            what the models share: layers by name, initial weights, checks of arguments
    adapter.py           fits a model from elsewhere (torchvision's, the user's own) to the data's channels and classes
    mlp.py               multilayer perceptron
    lenet.py             LeNet and LeNet-5
    alexnet.py           AlexNet
    maxout.py            maxout network
    nin.py               network in network
    vgg.py               VGG
    googlenet.py         GoogLeNet
    inception_v3.py      Inception v3
    inception_small.py   Inception for images of about 32 pixels
    resnet.py            residual networks and their plain counterparts
    airbench.py          a small network that learns CIFAR-10 in few steps
"""
