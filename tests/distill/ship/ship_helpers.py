"Pictures on the disk and small learners, for the tests of files"
import numpy as np
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn


def save_digits(folder, n=60, size=None):
    "Digits as pictures in folders of their class, of several sizes and depths"
    d = load_digits()
    for i in range(n):
        to = folder/str(d.target[i])
        to.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray((d.images[i]*255/16).round().astype(np.uint8))
        im = im.resize(size or (20+i%7, 18+i%5), Image.Resampling.BILINEAR)
        if i%4==0: im = im.convert('RGB')
        if i%4==1 and size is None: im = Image.fromarray(np.asarray(im).astype(np.uint16)*257)
        im.save(to/f'{i}.png')
    return folder


def small_net(channels=3, c=10, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                            nn.Flatten(), nn.Linear(32, c))
        with torch.no_grad(): net[-1].weight.mul_(20)  # far from undecided
        return net


def quiet_learner(dls, model, loss_func=None, metrics=accuracy, **kwargs):
    from fastai.callback.progress import ProgressCallback
    learn = Learner(dls, model, loss_func=loss_func or CrossEntropyLossFlat(), metrics=metrics, **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn
