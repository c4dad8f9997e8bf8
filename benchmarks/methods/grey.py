"""A student that sees CIFAR-10 in grey, taught by a network that sees the colours.

    python benchmarks/families.py --names grey        # in a folder with data/cifar10_small

5,000 labelled pictures, 1,000 to judge by. The control is a teacher as large that sees the student's grey."""
from functools import partial
from pathlib import Path

from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn

from families import study, trained
from fasterai.distill.losses import SoftTarget
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from settings import folder_dls


def grey(x): return x.mean(1, keepdim=True)

def net(channels, width):
    "Three convolutions, each halving the picture"
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(block(channels, width), block(width, 2*width), block(2*width, 4*width),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4*width, 10))

def learner(dls, channels, width, cbs=None):
    return Learner(dls, net(channels, width), CrossEntropyLossFlat(), lr=5e-3, metrics=accuracy, cbs=cbs)

def run(data=Path('data')):
    dls = folder_dls(data/'cifar10_small', 'cpu', valid='test', size=32, bs=64, pad=4)
    colours = trained(partial(learner, dls, 3, 32), 12)
    greys = Teacher(trained(partial(learner, dls, 1, 32, StudentSees(grey)), 12), tfms=grey)
    soft = dict(loss=partial(SoftTarget, T=4), weight=0.9)
    arms = {'alone': None,
            'taught from colours': dict(teacher=colours, **soft),
            'taught from grey': dict(teacher=greys, **soft)}
    return study('grey', partial(learner, dls, 1, 16, StudentSees(grey)), arms).run(15, seeds=3)
