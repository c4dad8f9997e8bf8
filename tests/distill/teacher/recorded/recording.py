"""For the tests of recorded answers

A small data set, a teacher that counts what it is asked, and a callback that distils"""
import random
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import SkipItemException
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage, set_seed
from torch import nn

N,BS = 48,8
PROBE = 16  # samples that the teacher is asked about once at each `attach`, to know it again

class Blobs:
    "`(x, i)`: sample i of n, `jitter`ed by Python's, NumPy's and PyTorch's generators"
    split_idx = 0
    def __init__(self, n=N, jitter=0., skip=(), seed=0):
        self.x = torch.randn(n, 3, 6, 6, generator=torch.manual_seed(seed))
        self.jitter = jitter
        self.skip = skip
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if i in self.skip: raise SkipItemException()
        x = self.x[i]+self.jitter*(random.random()+np.random.rand()+torch.rand(1)) if self.jitter else self.x[i]
        return TensorImage(x),torch.tensor(i%4)

def loaders(train=None, cls=TfmdDL, valid=True, **kw):
    kw = dict(bs=BS, shuffle=True, num_workers=0, device='cpu', **kw) if 'bs' not in kw else dict(device='cpu', **kw)
    return DataLoaders(cls(Blobs() if train is None else train, **kw),
                       TfmdDL(Blobs(16, seed=9), bs=BS, num_workers=0, device='cpu'), device='cpu')

class Teacher:
    def __init__(self, seed=5, scale=1., classes=4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.models = [nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                         nn.Linear(20, classes)).eval()]
        self.seen,self.scale = [],scale
    @torch.no_grad()
    def __call__(self, *xb, layers=(), logits=True):
        self.seen.append(len(xb[0]))
        x,fm = xb[0].as_subclass(torch.Tensor),{}
        for name,m in self.models[0].named_children():
            x = m(x)
            if name in layers: fm[name] = x
        return x*self.scale if logits else None,fm

class Distil(Callback):
    order = 2
    def __init__(self, teacher, cache=None, layers=(), at=None):
        self.teacher,self.cache,self.layers,self.at = teacher,cache,layers,at
    def before_train(self):
        if self.cache and self.epoch==0: self.cache.attach(self.learn, self.teacher, layers=self.layers)
    def after_loss(self):
        if not self.training: return
        if self.at is not None and self.train_iter==self.at: raise KeyboardInterrupt('now')
        pred,fm = self.cache.ask(*self.xb) if self.cache else self.teacher(*self.xb, layers=self.layers)
        loss = F.mse_loss(self.pred.as_subclass(torch.Tensor),
                          pred) + sum(m.mean()*self.pred.mean() for m in fm.values())
        self.learn.loss_grad = self.learn.loss_grad+loss
        self.learn.loss = self.learn.loss_grad.detach().clone()
    def after_fit(self): self.cache and self.cache.detach()

def learner(dls, teacher, cache=None, cbs=(), **kw):
    set_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                        nn.Linear(64, 4))
    dls.train.rng.seed(1)
    learn = Learner(dls, net, CrossEntropyLossFlat(), cbs=[Distil(teacher, cache, **kw), *cbs])
    learn.logger = lambda *_: None
    return learn

def train(dls, teacher, cache=None, n=2, cbs=(), **kw):
    learn = learner(dls, teacher, cache, cbs, **kw)
    learn.fit(n, 0.01)
    return torch.cat([o.detach().flatten() for o in learn.model.parameters()])

def state(dl):
    return {k:v for k,v in dl.__dict__.items() if k not in ('rng', '_DataLoader__idxs', 'it', '_n_inp', '_types')}

def alone(f, *args):
    torch.set_num_threads(1) # OpenMP's threads do not survive a fork
    f(*args)

def in_process(f, *args):
    p = get_context('fork').Process(target=alone, args=(f, *args))
    p.start()
    return p
