"""Without the data: what a teacher can teach by pictures that were made from its weights.

The teacher has seen all 1,197 digits, the student sees none of them: it gets 512 pictures, or as many as a generator
makes, in 320 steps, and no label. `all real images` is the bound from above: the 1,197 digits, without labels, as many
steps. Students are judged by the real validation images. `second` is the share of the made pictures that a second
network, trained from another start, takes for what they are meant to be."""
from functools import cache, partial

import torch

from families import full1197, quiet, study, trained
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.data_free import data_free_learner
from fasterai.distill.methods.dream import Dreams, dream
from fasterai.distill.study.one_run import fit_one_cycle

n,size,bs = 512,(1, 8, 8),64
kd_loss = partial(SoftTarget, T=4)


@cache
def teacher(): return trained(partial(full1197, 16), 30)
@cache
def second(): return trained(partial(full1197, 16), 30, seed=100)

def dreams(**kwargs):
    "Made from the teacher's weights, with pixels between 0 and 1"
    return dream(teacher(), n, size, iters=200, lr=0.1, bounds=(0, 1), progress=False, **kwargs)

def noise():
    "Uniform noise, which is nobody's picture"
    return _unnamed(torch.rand(n, *size))

def real():
    "The images that the teacher was trained on"
    return _unnamed(torch.stack([torch.Tensor(x) for x,_ in full1197().dls.train_ds]))

def _unnamed(x): return Dreams(x, torch.arange(len(x))%10, torch.zeros(len(x), 10), list(range(10)))

def taught_on(make, learn, epochs):
    "The student learns from the teacher's answers to these pictures"
    pictures = make()
    learn.dls = pictures.dls(bs, valid=learn.dls.valid)
    steps = epochs*n//bs
    kd = KnowledgeDistillationCallback(teacher(), kd_loss, weight=1., task_weight=0.)
    fit_one_cycle(learn, max(1, round(steps/len(learn.dls.train))), kd)
    if not pictures.logits.any(): return # they are meant to be nothing
    judge = second()
    with torch.no_grad(): return dict(second=judge(pictures.x).argmax(1).eq(pictures.y).float().mean().item())

def generated(method, learn, epochs):
    "As many steps, with a generator in the loop"
    free = data_free_learner(teacher(), learn.model, size, method, bs=bs, n_batches=n//bs, valid=learn.dls.valid,
                             loss=kd_loss, bounds=(0, 1), opt_func=learn.opt_func, lr=learn.lr, wd=learn.wd)
    with quiet(free): fit_one_cycle(free, epochs)


def fit(learn, epochs, way): return way(learn, epochs)

def way(f, *args):
    "What a study calls for each run, for the way itself"
    f = partial(f, *args)
    return lambda: f

def run():
    arms = {
        'uniform noise': way(taught_on, noise),
        'dream': way(taught_on, dreams),
        'dream without statistics': way(taught_on, partial(dreams, bn=0.)),
        'generator, fast': way(generated, 'fast'),
        'all real images': way(taught_on, real)}
    cols = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', 'second', 'seconds']
    return study('dream', full1197, arms, fit=fit, baseline='uniform noise', cols=cols).run(40, seeds=5)
