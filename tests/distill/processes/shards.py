"Trainings by a sharded teacher and by a whole one, and one in which a rank is killed"
import os, signal
from functools import partial

import torch
from fastai.callback.core import Callback, CancelTrainException
from fastai.callback.tracker import SaveModelCallback

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import FitNet, SoftTarget
from fasterai.distill.teacher.recorded.recorded import TeacherCache
from fasterai.distill.teacher.teacher import Teacher
from common import fit
from helpers import data, learner, n_hooks, net, same, state

rank,world = int(os.environ['RANK']),int(os.environ['WORLD_SIZE'])
n = 20*world


class Short(Callback):
    "The first epoch ends after two of five batches: so some rows are on record in the second, and others not"
    def after_batch(self):
        if self.training and self.epoch==0 and self.iter==1: raise CancelTrainException


class Dies(Callback):
    def after_step(self):
        if rank==world-1 and self.epoch==1: os.kill(os.getpid(), signal.SIGKILL)


def orders():
    "Of the epochs: what was recorded in the first is with the first ranks in the second, none of it with the last"
    known = [20*r+i for r in range(world) for i in range(8)]
    yield list(range(n))
    yield known + [i for i in range(n) if i not in known]
    while True: yield list(range(n))[::-1]


def student(**kwargs):
    dls,epochs = data(n=n, bs=4),orders()
    dls.train.get_idxs = lambda: next(epochs)
    return learner(dls=dls, **kwargs)


def taught(teacher, loss=None, epochs=5, cbs=()):
    learn = student(cbs=[Short(), *cbs])
    torch.manual_seed(0) # of the adapter
    layers = () if loss is SoftTarget else ('1', '1')
    kd = KnowledgeDistillationCallback(teacher, loss or {SoftTarget: 1, FitNet: .5}, *layers, valid=True)
    fit(learn, epochs, kd)
    return state(learn.model)


class Weighs(Callback):
    "This rank's share of the teacher's weights"
    order = 60
    def __init__(self, teacher): self.net,self.share = teacher.nets[0],None
    def after_loss(self):
        held,whole = self.net.copy.parameters(),self.net.source.parameters()
        self.share = sum(p.to_local().numel() for p in held)/sum(p.numel() for p in whole)


def big(seed=1, width=8): return net(width, seed=seed)


def compare(path, briefly=False):
    "`{name: (student's weights by a whole teacher, by a sharded one)}`, and how the teacher is afterwards"
    whole = big()
    before,ids = state(whole),[id(p) for p in whole.parameters()]
    teacher,exact = Teacher(whole, shard=True),partial(TeacherCache, dtype=torch.float32)
    weighs = Weighs(teacher)
    pairs = {'all': (taught(Teacher(big())), taught(teacher, cbs=[weighs]))}
    both = [Teacher([big(), big(2, 6)], shard=s, cache=exact(path/f'{s}.cache')) for s in (False, True)]
    pairs['partly on record'] = tuple(taught(t, SoftTarget) for t in both)
    if not briefly:
        pairs['maps alone'] = tuple(taught(t, FitNet) for t in (Teacher(big()), Teacher(whole, shard=True)))
        half = dict(dtype='bf16', fuse=True)
        pairs['half precision'] = tuple(taught(t) for t in (Teacher(big(), **half), Teacher(whole, shard=True, **half)))
        eager = Teacher(whole, shard=True, cache=exact(path/'eager.cache', eager=True))
        pairs['asked before'] = taught(Teacher(big()), SoftTarget),taught(eager, SoftTarget)
    as_before = same(state(whole), before) and ids==[id(p) for p in whole.parameters()] and n_hooks(whole)==0
    return dict(pairs=pairs, as_before=as_before, share=weighs.share, asked=[t.cache.asked for t in both])


def killed(path):
    "The last rank dies in the middle of the second epoch"
    taught(Teacher(big(), shard=True), cbs=[Dies(), SaveModelCallback(every_epoch=True, fname=str(path/'kept'))])
