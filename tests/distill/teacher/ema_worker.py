"""One process of a distributed training on the CPU; `test_ema_distributed.py` starts two.

Saves the average and what it has seen"""
import os, sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator  # noqa: F401, before fastai.distributed, which needs it
from fastai.distributed import DistributedDL, DistributedTrainer  # noqa: F401
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.teacher.following import EMA
from helpers import data, learner, state

DistributedDL._broadcast = lambda self, t, rank: t  # fastai sends it through a GPU; the data here is not shuffled


def model():
    "Without BatchNorm, whose statistics are each process's own"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(4, 3))


def run(bs, distributed):
    dls = data(n=16, bs=bs) # all of it in a step, whoever gets which
    dls.train.shuffle = False
    learn,kd = learner(model(), dls, wd=0.),KnowledgeDistillationCallback(EMA(0.9), partial(SoftTarget, T=4))
    if distributed:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(3, cbs=kd)
    else: learn.fit(3, cbs=kd)
    return dict(average=state(kd.teacher.model), n=int(kd.teacher.averaged.n_averaged), student=state(learn.model))


if __name__=='__main__':
    rank = int(os.environ['RANK'])
    torch.save(run(8, True), Path(sys.argv[1])/f'{rank}.pth')
