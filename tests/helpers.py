"Tiny models and data, and ways to look into them, for the tests of the training loop"
import copy, random

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastcore.basics import noop
from torch import nn
from torch.utils.data import TensorDataset


def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def net(width=4, c=3, seed=0, head=()):
    "A small network with BatchNorm, the same one for a seed"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(block(3, width), block(width, 2*width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head,
                             nn.Linear(2*width, c))


def data(n=32, bs=8, c=3, y=None, seed=0, **kwargs):
    "Noise with labels, in an order that the seed fixes"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=g)
    y = torch.randint(c, (n,), generator=g) if y is None else y
    dls = DataLoaders(*[TfmdDL(TensorDataset(x, y), bs=bs, shuffle=s, num_workers=0, **kwargs) for s in (True,False)],
                      device='cpu')
    dls.c = c
    return dls


def learner(model=None, dls=None, cbs=None, loss_func=None, **kwargs):
    "A learner that prints nothing and whose batches come in the same order each time"
    learn = Learner(data() if dls is None else dls, net() if model is None else model,
                    loss_func=loss_func or CrossEntropyLossFlat(),
                    cbs=cbs, **{'opt_func': SGD, 'lr': 0.05, **kwargs})
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    for dl in learn.dls.loaders: dl.rng = random.Random(0)
    return learn


def n_hooks(*models):
    return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for model in models for m in model.modules())
def state(model): return copy.deepcopy(model.state_dict())
def flags(model): return [m.training for m in model.modules()],[p.requires_grad for p in model.parameters()]
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class CPUMixedPrecision(MixedPrecision):
    "fastai's own is for CUDA; autocast works on the CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.amp.autocast('cpu', dtype=torch.bfloat16)


class Boom(Callback):
    "Raises `exc` at an event of the `at`th training batch, past fastai's own wrapping of errors"
    def __init__(self, event, exc, at=1, order=0): self.event,self.exc,self.at,self.order,self.n = event,exc,at,order,0
    def __call__(self, name):
        if name!=self.event: return
        self.n += 1
        if self.n>self.at: raise self.exc


class GradsAt(Callback):
    "Keeps the student's gradients of each step"
    order = 99
    def before_fit(self): self.grads = []
    def before_step(self): self.grads.append([p.grad.clone() for p in self.learn.model.parameters()])
