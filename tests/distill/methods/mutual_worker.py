"""One process of a distributed training on the CPU; `test_mutual_distributed.py` starts two. Saves all networks"""
import os, sys
from pathlib import Path

import torch
from accelerate import Accelerator  # noqa: F401, before fastai.distributed, which needs it
from fastai.callback.training import GradientClip
from fastai.distributed import DistributedDL, DistributedTrainer  # noqa: F401
from fastai.metrics import accuracy
from torch import nn

from fasterai.distill.methods.mutual import MutualLearning
from helpers import data, learner, state

DistributedDL._broadcast = lambda self, t, rank: t  # fastai sends it through a GPU; the data here is not shuffled


def model(w, seed):
    "Without BatchNorm, whose statistics are each process's own"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(w, 3))


def run(bs, distributed):
    dls = data(n=16, bs=bs)
    dls.train.shuffle = False
    learn = learner(model(4, 0), dls, wd=0., lr=.5, metrics=accuracy)
    ml = MutualLearning([model(4+i, 1+10*int(os.environ.get('RANK', 0))+i) for i in range(2)]) # else in each process
    cbs = [ml, GradientClip(.1)]
    if distributed:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(3, cbs=cbs)
    else: learn.fit(3, cbs=cbs)
    return [state(learn.model), *map(state, ml.peers)],list(learn.recorder.values[-1])


if __name__=='__main__':
    rank = int(os.environ['RANK'])
    torch.save(run(8, True), Path(sys.argv[1])/f'{rank}.pth')
