"""Networks that teach each other, and the same networks trained side by side without a word: 100 digits, 120 epochs.

Beside the student's accuracy the log has the mean over all networks of an arm (`mean`), their average of probabilities
(`ensemble`), and how often two of them agree on the validation images (`agreement`)."""
from functools import partial
from itertools import combinations

import torch
from families import few100, study

from fasterai.data.digits import digits_net
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.mutual import MutualLearning
from fasterai.distill.study.one_run import fit_one_cycle
from fasterai.distill.teacher.ensemble import ensemble_logits
from fasterai.distill.teacher.teacher import Teacher


def students(n, T=3, **kwargs):
    "An arm in which `n` networks of width 8 train together"
    def arm(): return MutualLearning([digits_net(8) for _ in range(n-1)], partial(SoftTarget, T=T), **kwargs)
    return arm

arms = {'alone': None,
        'two apart': students(2, weight=0),
        'four apart': students(4, weight=0),
        'two, T=3': students(2),
        'two, T=1': students(2, T=1),
        'four, T=3': students(4),
        'two, mean of logits, T=2': students(2, T=2, target='mean'),
        'two, least sure, T=2': students(2, T=2, target='min')}

@torch.no_grad()
def together(models, dl):
    "Of the networks of an arm: mean accuracy, that of their average, and the share of images on which two agree"
    x,y = (torch.cat(o) for o in zip(*dl))
    preds = [Teacher(m)(x)[0] for m in models]
    top = [z.argmax(1) for z in preds]
    def right(z): return (z.argmax(1)==y).float().mean().item()
    pairs = [(a==b).float().mean().item() for a,b in combinations(top, 2)]
    return dict(mean=sum(map(right, preds))/len(preds), ensemble=right(ensemble_logits(preds)),
                agreement=sum(pairs)/len(pairs) if pairs else None)

def fit(learn, epochs, cbs=None):
    "Train, and look at all networks"
    fit_one_cycle(learn, epochs, cbs)
    return together([learn.model, *(cbs.peers if cbs else [])], learn.dls.valid)

def run():
    cols = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', 'mean', 'ensemble', 'agreement', 'seconds']
    found = study('peers', few100, arms, fit=fit, cols=cols)
    found.run(120, seeds=5, progress=False)
    return found.run(240, seeds=5, arms=['alone'], progress=False) # as many passes as two networks take
