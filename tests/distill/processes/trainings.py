"Trainings for several processes, or for one, with what is to be the same in both"
import os
from functools import partial

import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientClip
from fastai.metrics import accuracy
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Attention, FitNet, Mutual, SoftTarget
from fasterai.distill.methods.mutual import MutualLearning
from fasterai.distill.teacher.following import EMA
from fasterai.distill.teacher.past import PastEpoch
from common import fit, plain
from helpers import GradsAt, data, learner, n_hooks, state


class Scale(nn.Module):
    "An adapter without a norm, the same in each process only if it is sent around"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        for p in self.parameters(): nn.init.constant_(p, 0.1*(1+int(os.environ.get('RANK', 0))))

    def forward(self, x): return self.conv(x)


def gradients(bs, distributed):
    "Of a prediction's loss, of maps' losses and of an adapter"
    dls = data(n=16, bs=bs)
    dls.train.shuffle = False
    learn,g,teacher = learner(plain(4, 0), dls, wd=0.),GradsAt(),plain(8, 1)
    before = state(teacher)
    kd = KnowledgeDistillationCallback(teacher, {SoftTarget: 1, Attention: 100, FitNet: 1}, '0', '0',
                                       adapters={'0': Scale()}, weight=0.7)
    class Adapter(GradsAt):
        def before_step(self): self.grads.append([p.grad.clone() for p in kd.learned.parameters()])
    a = Adapter()
    fit(learn, 1, [kd, g, a], distributed)
    after = state(teacher)
    return dict(student=g.grads, adapter=a.grads, hooks=n_hooks(learn.model, teacher),
                names=list(learn.model.state_dict()), rows=len(kd.log.history),
                teacher_same=all(torch.equal(before[k], after[k]) for k in before), weights=state(kd.learned))


def soft_target(pred, y): return SoftTarget(pred, soft_target.teacher)
def task(pred, y): return nn.functional.cross_entropy(pred, y)


class Answers(GradsAt):
    "Lets fastai's own metric know what the teacher says"
    def after_pred(self):
        with torch.no_grad(): soft_target.teacher = plain(8, 1)(self.learn.xb[0])


def columns(bs, distributed):
    "A table in which the teacher's columns stand beside those of fastai's own metrics, until one of them rises"
    dls = data(n=40, bs=bs)
    same = [20*r+i+j for i in range(0, 20, 5) for r in range(2) for j in range(5)] # in one process, the same batches
    dls.train.get_idxs = lambda: list(range(40)) if distributed else same
    learn = learner(plain(4, 0), dls, wd=0., lr=1., metrics=[task, soft_target])
    stop = EarlyStoppingCallback('valid_distill_loss', patience=1)
    kd = KnowledgeDistillationCallback(plain(8, 1), SoftTarget, weight=0.7, valid=True)
    fit(learn, 12, [kd, Answers(), stop], distributed)
    return dict(names=list(learn.recorder.metric_names[1:-1]), values=[[*v] for v in learn.recorder.values])


def past(bs, distributed):
    "What is known of the student's past, after epochs of other orders"
    dls = data(n=18, bs=bs)
    epochs = iter(range(100))
    dls.train.get_idxs = lambda: torch.randperm(18, generator=torch.Generator().manual_seed(next(epochs))).tolist()
    learn,kd = learner(plain(4, 0), dls, wd=0., lr=1.),KnowledgeDistillationCallback(PastEpoch(), Mutual, weight=.9)
    fit(learn, 3, kd, distributed)
    table = kd.teacher.learns
    return dict(said=table.said, seen=table.seen, student=state(learn.model))


def average(bs, distributed):
    "Of the student's weights after each step"
    dls = data(n=16, bs=bs) # all of it in a step, whoever gets which
    dls.train.shuffle = False
    learn,kd = learner(plain(4, 0), dls, wd=0.),KnowledgeDistillationCallback(EMA(0.9), partial(SoftTarget, T=4))
    fit(learn, 3, kd, distributed)
    return dict(average=state(kd.teacher.model), n=int(kd.teacher.averaged.n_averaged), student=state(learn.model))


def peers(bs, distributed):
    "All networks of mutual learning, which begin as others in each process, and the last row of the table"
    dls = data(n=16, bs=bs)
    dls.train.shuffle = False
    learn = learner(plain(4, 0), dls, wd=0., lr=.5, metrics=accuracy)
    ml = MutualLearning([plain(4+i, 1+10*int(os.environ.get('RANK', 0))+i) for i in range(2)])
    fit(learn, 3, [ml, GradientClip(.1)], distributed)
    return [state(learn.model), *map(state, ml.peers)],list(learn.recorder.values[-1])


batch_sizes = {gradients: 8, columns: 5, past: 9, average: 8, peers: 8}  # of one process
