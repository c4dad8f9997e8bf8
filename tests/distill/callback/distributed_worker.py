"""One process of a distributed training on the CPU; `test_distributed.py` starts two.

Saves its gradients and what it saw"""
import os, sys
from pathlib import Path

import torch
from accelerate import Accelerator  # noqa: F401, before fastai.distributed, which needs it
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.distributed import DistributedDL, DistributedTrainer  # noqa: F401
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Attention, FitNet, Mutual, SoftTarget
from fasterai.distill.teacher.past import PastEpoch
from helpers import GradsAt, data, learner, n_hooks, state

DistributedDL._broadcast = lambda self, t, rank: t  # fastai sends it through a GPU; the data here is not shuffled


def model(w, seed):
    "Without BatchNorm, whose statistics are each process's own"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(w, 3))


class Scale(nn.Module):
    "An adapter without a norm, the same in each process only if it is sent around"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        for p in self.parameters(): nn.init.constant_(p, 0.1*(1+int(os.environ.get('RANK', 0))))

    def forward(self, x): return self.conv(x)


def run(bs, distributed):
    dls = data(n=16, bs=bs)
    dls.train.shuffle = False
    learn,g,teacher = learner(model(4, 0), dls, wd=0.),GradsAt(),model(8, 1)
    before = state(teacher)
    kd = KnowledgeDistillationCallback(teacher, {SoftTarget: 1, Attention: 100, FitNet: 1}, '0', '0',
                                       adapters={'0': Scale()}, weight=0.7)
    class Adapter(GradsAt):
        def before_step(self): self.grads.append([p.grad.clone() for p in kd.learned.parameters()])
    a = Adapter()
    if distributed:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, cbs=[kd, g, a])
    else: learn.fit(1, cbs=[kd, g, a])
    after = state(teacher)
    return dict(student=g.grads, adapter=a.grads, hooks=n_hooks(learn.model, teacher),
                names=list(learn.model.state_dict()), rows=len(kd.log.history),
                teacher_same=all(torch.equal(before[k], after[k]) for k in before), weights=state(kd.learned))


def soft_target(pred, y): return SoftTarget(pred, soft_target.teacher)
def task(pred, y): return nn.functional.cross_entropy(pred, y)


class Answers(GradsAt):
    "Lets fastai's own metric know what the teacher says"
    def after_pred(self):
        with torch.no_grad(): soft_target.teacher = model(8, 1)(self.learn.xb[0])


def columns(bs, distributed):
    "A table in which the teacher's columns stand beside those of fastai's own metrics, until one of them rises"
    dls = data(n=40, bs=bs)
    same = [20*r+i+j for i in range(0, 20, 5) for r in range(2) for j in range(5)] # in one process, the same batches
    dls.train.get_idxs = lambda: list(range(40)) if distributed else same
    learn = learner(model(4, 0), dls, wd=0., lr=1., metrics=[task, soft_target])
    stop = EarlyStoppingCallback('valid_distill_loss', patience=1)
    kd = KnowledgeDistillationCallback(model(8, 1), SoftTarget, weight=0.7, valid=True)
    cbs = [kd, Answers(), stop]
    if distributed:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(12, cbs=cbs)
    else: learn.fit(12, cbs=cbs)
    return dict(names=list(learn.recorder.metric_names[1:-1]), values=[[*v] for v in learn.recorder.values])


def past(bs, distributed):
    "What is known of the student's past, after epochs of other orders"
    dls = data(n=18, bs=bs)
    epochs = iter(range(100))
    dls.train.get_idxs = lambda: torch.randperm(18, generator=torch.Generator().manual_seed(next(epochs))).tolist()
    learn,kd = learner(model(4, 0), dls, wd=0., lr=1.),KnowledgeDistillationCallback(PastEpoch(), Mutual, weight=.9)
    if distributed:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(3, cbs=kd)
    else: learn.fit(3, cbs=kd)
    table = kd.teacher.learns
    return dict(said=table.said, seen=table.seen, student=state(learn.model))


if __name__=='__main__':
    rank = int(os.environ['RANK'])
    found = dict(gradients=run(8, True), columns=columns(5, True), past=past(9, True))
    torch.save(found, Path(sys.argv[1])/f'{rank}.pth')
