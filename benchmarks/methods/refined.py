"""A teacher that is wrong on the images that its student learns from: what each loss on logits makes of it.

Students of width 8 learn from 100 digits with their right labels. A teacher of width 32 has learned all 1,197 digits as
they are labelled (`right`), after three in ten of the labels were drawn at random (`misled`), or as they are labelled
but in a single short pass (`hasty`). The last two err on about as many of the 100 digits."""
from functools import partial

import numpy as np
import torch
from families import few100, full1197, learner, study, trained
from fastai.data.core import DataLoaders, TfmdDL

from fasterai.data.digits import digits_dls
from fasterai.distill.losses import recipe_of
from fasterai.distill.study.one_run import fit_one_cycle

COLS = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', 'teacher_errs', 'seconds']


def mislabelled(share=0.3, bs=64):
    "The digits, a share of whose training labels says nothing"
    dls,rng = digits_dls(),np.random.default_rng(1)
    items = [(x, int(y) if rng.random()>share else int(rng.integers(10))) for x,y in dls.train_ds]
    return DataLoaders(TfmdDL(items, bs=bs, shuffle=True, drop_last=True, num_workers=0), dls.valid, device=dls.device)

@torch.no_grad()
def errors(learn, teacher):
    "Share of the student's training images that `teacher` takes for something else"
    x,y = (torch.stack(list(map(torch.as_tensor, o))) for o in zip(*learn.dls.train_ds))
    return float((teacher(x.as_subclass(torch.Tensor)).argmax(1)!=y).float().mean())

def fit(learn, epochs, kd):
    "As ever, and how often the teacher errs"
    errs = None if kd is None else errors(learn, kd.teacher.models[0])
    fit_one_cycle(learn, epochs, kd)
    return {} if errs is None else dict(teacher_errs=errs)


def run():
    right = trained(partial(full1197, width=32), 60)
    misled = trained(lambda: learner(mislabelled(), 32, lr=1e-2), 60)
    hasty = trained(lambda: learner(digits_dls(), 32, lr=3e-3), 1)
    losses = 'SoftTarget','DecoupledKD','RLD'
    arms = {f'{o}, {name} teacher': dict(teacher=t, **recipe_of(o))
            for name,t in dict(right=right, misled=misled, hasty=hasty).items() for o in losses}
    study('refined', few100, {'alone': None} | arms, fit=fit, cols=COLS).run(120, 5)
