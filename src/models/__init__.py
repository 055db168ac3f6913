"""Built-in models: normalised images (B, C, H, W) to logits (B, K). One file per family; a config names a class.

`forward` is `head(features(x))`. In training mode, a model with auxiliary heads returns a tuple of logits. Every key of
a `configs/model` file is an argument of the class that its `_target_` names.

    blocks.py            shared by the models: layers by name, initial weights, argument checks
    adapter.py           adapts a model from another package (torchvision or the user's) to the channels and classes
    mlp.py               multilayer perceptron
    lenet.py             LeNet and LeNet-5
    alexnet.py           AlexNet
    maxout.py            maxout network
    nin.py               Network in Network
    vgg.py               VGG
    googlenet.py         GoogLeNet
    inception_v3.py      Inception v3
    inception_small.py   Inception for images of about 32 pixels
    resnet.py            residual networks and their plain counterparts
    airbench.py          a small model that learns CIFAR-10 in few steps
"""
