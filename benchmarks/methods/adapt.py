"""Test time: digits in dim light and with noise (0.55 times the contrast, plus 0.35, noise of 0.15), without labels.

A network of width 16 is trained on the clean ones, and adapted to the 600 dim ones of the validation. Each seed has a
network and noise of its own."""
from functools import cache, partial

import torch
from fastai.data.core import TfmdDL
from fastai.torch_core import TensorImageBW, set_seed

from families import full1197, quiet, study, trained
from fasterai.distill.methods.adapt import Entropy, adapt

bs = 60


@cache
def source(seed):
    "The network that was trained on clean digits"
    return trained(partial(full1197, 16), 20, seed)

def dim(learn, seed):
    "The validation images in dim light, with noise, and their labels"
    x,y = learn.dls.valid.one_batch()
    g = torch.Generator().manual_seed(seed)
    return TensorImageBW(0.55*x + 0.35 + 0.15*torch.randn(x.shape, generator=g)),y

def shifted_loader(learn, seed):
    "A loader of the dim images, with labels, to judge by"
    return TfmdDL(list(zip(*dim(learn, seed))), bs=600, num_workers=0)

def adapted(learn, trained_for, /, method=None, **kwargs):
    "The network as it is, or adapted to the dim images without their labels"
    seed = torch.initial_seed()
    learn.model = source(seed)
    set_seed(seed)
    learn.dls.loaders[1] = shifted_loader(learn, seed)
    items = TfmdDL([(x,) for x in dim(full1197(), seed)[0]], bs=bs, num_workers=0)
    with quiet(learn):
        if method: learn.model = adapt(learn, items, method, bs=bs, **kwargs).model

def clean(learn, epochs):
    "On the images as they were"
    learn.model = source(torch.initial_seed())


def fit(learn, epochs, way): way(learn, epochs)

def way(f, **kwargs):
    "What a study calls for each run, for the way itself"
    f = partial(f, **kwargs)
    return lambda: f

def run():
    longer = dict(method='tent', lr=1e-2, epochs=10)
    arms = {
        'as it was': way(adapted),
        'bn': way(adapted, method='bn'),
        'tent': way(adapted, method='tent'),
        'tent, 10 epochs at 1e-2': way(adapted, **longer),
        'tent with balance, 10 epochs': way(adapted, **longer, loss=partial(Entropy, balance=1.)),
        'ema': way(adapted, method='ema'),
        'clean images': way(clean)}
    return study('adapt', full1197, arms, fit=fit, baseline='as it was').run(1, seeds=5)
