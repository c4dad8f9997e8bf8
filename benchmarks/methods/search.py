"""Is the student that a search finds better than one made by hand? Towers of three widths for the digits, of at most
2,000 parameters; what was tried is in `family-search-tried.csv`, and winner and hand-made student are judged on new
seeds."""
from functools import partial

from fastai.losses import CrossEntropyLossFlat
from torch import nn

from families import full1197, results, trained
from fasterai.data.digits import digits_dls
from fasterai.distill.losses import SoftTarget
from fasterai.distill.ship.search import search_student


def block(i, o, stride=2):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

def tower(a, b, c):
    "As the digits' network, with other widths"
    return nn.Sequential(block(1, a, 1), block(a, b), block(b, c), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(c, 10))

by_hand = dict(a=8, b=8, c=14)
space = dict(a=(4, 16), b=(4, 16), c=(6, 18))

def found(teacher, trials=16, epochs=16, seeds=5, **kwargs):
    return search_student(digits_dls(), teacher, tower, space, dict(params=2000), trials, epochs, by_hand,
                          loss_func=CrossEntropyLossFlat(), seeds=seeds, loss=partial(SoftTarget, T=4), weight=.9,
                          **kwargs)

def run():
    if (results/'family-search.csv').exists(): return
    search = found(trained(partial(full1197, 32), 60))
    search.table.round(5).to_csv(results/'family-search-tried.csv', index=False)
    search.study.named().to_csv(results/'family-search.csv', index=False)
    return search
