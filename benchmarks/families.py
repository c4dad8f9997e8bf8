"""The benches of small images on which the families of methods are measured, and the tables of their runs.

    python benchmarks/families.py --names peers,following         # what is in the log already is not run again

Each family has a module in `benchmarks/methods/` whose `run()` runs a `Study` with an arm for each way to train, five
seeds each, and keeps the runs in `benchmarks/results/family-NAME.csv`. The pages of the families show these files."""
import importlib
import os
from functools import partial
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import fastai.callback.progress  # gives Learner `no_bar`
import fastai.callback.schedule  # noqa: F401 (gives Learner `fit_one_cycle`)
import pandas as pd
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastcore.script import call_parse

from fasterai.core.seeds import same_start
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.study.one_run import quiet
from fasterai.distill.study.study import Study
from fasterai.distill.study.summary import plot_gains, readable, summary

results = Path(__file__).parent/'results'


def learner(dls, width=8, lr=3e-2, **kwargs):
    "A Learner of the digits' network with AdamW"
    kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy) | kwargs
    return Learner(dls, digits_net(width), opt_func=partial(Adam, decouple_wd=True), lr=lr, wd=1e-2, **kwargs)

def few100(width=8, **kwargs):
    "A student of the first 100 digits; alone about 85 % after 120 epochs of one step each"
    return learner(digits_dls(n_train=100, bs=64), width, **kwargs)

def full1197(width=8, **kwargs):
    "A student of all 1,197 digits; alone about 97 % after 20 epochs"
    return learner(digits_dls(), width, lr=1e-2, **kwargs)

def trained(make_learner, epochs, seed=0):
    "A network trained by itself from this seed, for a teacher"
    set_seed(seed)
    learn = make_learner()
    same_start(learn.dls, seed)
    with quiet(learn): learn.fit_one_cycle(epochs)
    return learn.model.eval()

def study(name, make_learner, arms, **kwargs):
    "A `Study` with its log where the pages look for it"
    return Study(make_learner, arms, results/f'family-{name}.csv', **kwargs)

def runs(name):
    "The runs of a family"
    return pd.read_csv(results/f'family-{name}.csv')

def show(name, baseline='alone', metric='accuracy', epochs=None):
    "A family's runs summed up: gains in points over the baseline, with their intervals"
    found = runs(name)
    if epochs: found = found[found.epochs.eq(epochs)]
    return readable(summary(found, metric, baseline), metric, baseline, scale=100)

def plot(name, baseline='alone', metric='accuracy'):
    "The same as a picture; returns the axes"
    return plot_gains(summary(runs(name), metric, baseline), scale=100, label=f'points over {baseline}')


@call_parse
def main(names:str=None): # Families, by commas; all if none
    "Run what is missing of the families' studies"
    all_names = sorted(f.stem for f in (Path(__file__).parent/'methods').glob('[a-z]*.py'))
    for name in names.split(',') if names else all_names: importlib.import_module(f'methods.{name}').run()
