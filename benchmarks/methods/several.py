"""Three teachers of unequal worth, and three ways to follow them: 100 digits, 120 epochs.

One teacher has seen all 1,197 digits, one the student's 100, and one all of them with a third of its labels wrong."""
from functools import partial

import torch
from families import few100, full1197, learner, study, trained
from fastai.data.core import DataLoaders

from fasterai.data.digits import digits_dls
from fasterai.distill.loss.several import ConfidentTeachers, several
from fasterai.distill.losses import SoftTarget
from fasterai.distill.teacher.teacher import Teacher


def misled(width=32):
    "A Learner of all digits, of which a third has a wrong label, always the same one"
    dls,g = digits_dls(bs=1197),torch.Generator().manual_seed(0)
    x,y = next(iter(dls.train.new(shuffle=False)))
    wrong = torch.rand(len(y), generator=g)<1/3
    y = torch.where(wrong, (y+torch.randint(1, 10, y.shape, generator=g))%10, y)
    train,valid = list(zip(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))),dls.valid_ds
    return learner(DataLoaders.from_dsets(train, valid, bs=64, num_workers=0, device='cpu'), width, lr=1e-2)

def arms():
    "Ways to follow the same three teachers"
    nets = [trained(partial(full1197, 32), 20), trained(partial(few100, 32), 120), trained(misled, 20)]
    kd,soft = dict(weight=0.9, task_weight=0.1),partial(SoftTarget, T=4)
    stack = Teacher(nets, average='stack')
    return {'alone': None,
            'the first teacher': dict(teacher=Teacher(nets[0]), loss=soft, **kd),
            'average of probabilities': dict(teacher=Teacher(nets, average='softmax'), loss=soft, **kd),
            'each teacher in turn': dict(teacher=stack, loss=several(soft), **kd),
            'ConfidentTeachers': dict(teacher=stack, loss=partial(ConfidentTeachers, T=4), **kd)}

def run(): return study('several', few100, arms()).run(120, seeds=5, progress=False)
