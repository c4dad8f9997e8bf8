"What the parts of a distributed training on the CPU have in common"
import torch
from accelerate import Accelerator  # noqa: F401, before fastai.distributed, which needs it
from fastai.distributed import DistributedDL, DistributedTrainer  # noqa: F401
from torch import nn

DistributedDL._broadcast = lambda self, t, rank: t  # fastai sends it through a GPU; the order is fixed here


def plain(w, seed):
    "Without BatchNorm, whose statistics are each process's own"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(w, 3))


def fit(learn, epochs, cbs, distributed=True):
    "In all processes, or in this one alone"
    if not distributed: return learn.fit(epochs, cbs=cbs)
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(epochs, cbs=cbs)
