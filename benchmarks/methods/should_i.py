"""Should I distil? Small tasks of the digits, and what a sequential study says of them

Each task has a log of its runs in `benchmarks/results/should_i/`; `family-should_i.csv` has a row for each task, with
the leading arm's gain in fresh pairs of runs beside the answer."""
from functools import partial

import pandas as pd
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from families import full1197, learner, results, trained
from fasterai.core.stats import paired_test
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.losses import Logits, SoftTarget
from fasterai.distill.study.should_i_distil import should_i_distil

arms = {'soft targets': dict(loss=partial(SoftTarget, T=4), weight=.9),
        'mild targets': dict(loss=partial(SoftTarget, T=2), weight=.5),
        'logits': dict(loss=Logits, weight=.5),
        'a trace': dict(loss=partial(SoftTarget, T=4), weight=1e-3)}
width,epochs,pairs = 8,60,12
fresh = range(100, 108) # seeds


class Renamed(nn.Module):
    "Takes each class for the next one"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net(x).roll(1, -1)


def _tensors(ds): return torch.stack([x.as_subclass(torch.Tensor) for x,_ in ds]),torch.tensor([int(y) for _,y in ds])

def data(n=100, noise=0., bs=50):
    "The first `n` digits, of whose labels a share `noise` is drawn anew; all 600 of the validation set"
    own = digits_dls(n_train=n)
    x,y = _tensors(own.train_ds)
    g = torch.Generator().manual_seed(0)
    y = torch.where(torch.rand(n, generator=g)<noise, torch.randint(10, (n,), generator=g), y)
    sets = TensorDataset(x, y),TensorDataset(*_tensors(own.valid_ds))
    shared = dict(num_workers=0, device='cpu')
    dls = DataLoaders(TfmdDL(sets[0], bs=bs, shuffle=True, drop_last=True, **shared), TfmdDL(sets[1], bs=600, **shared))
    dls.c = 10
    return dls

def good(): return trained(partial(full1197, 32), 12)
def early(): return trained(partial(full1197, 32), 2)
def renamed(): return Renamed(good()).eval()
def likewise(**kwargs): return trained(lambda: learner(data(**kwargs), width), epochs)

def untrained():
    set_seed(0)
    return digits_net(32).eval()

# name -> (arguments of `data`, what makes the teacher, is it expected to help?)
tasks = {
    '100 labels': (dict(), good, True),
    '100 labels, early teacher': (dict(), early, True),
    '40 labels': (dict(n=40, bs=20), good, True),
    '200 labels, 40 % drawn anew': (dict(n=200, noise=.4), good, True),
    '200 labels, 40 % drawn anew, also for the teacher':
        (dict(n=200, noise=.4), partial(likewise, n=200, noise=.4), True),
    'untrained teacher': (dict(), untrained, False),
    'teacher with other names': (dict(), renamed, False),
}

def ask(name, epochs=epochs, pairs=pairs, folder=results/'should_i', **kwargs):
    "The sequential study of a task"
    of_data,teacher,_ = tasks[name]
    path = folder/f"{name.replace(' %', '').replace(',', '').replace(' ', '_')}.csv" if folder else None
    return should_i_distil(partial(digits_net, width), teacher(), data(**of_data), arms, epochs, pairs, path=path,
                           finalists=1, progress=False, lr=3e-2,
                           loss_func=CrossEntropyLossFlat(), **kwargs)

def row(name, found):
    "A task's answer"
    low,high = found.interval or (None, None)
    return dict(task=name, can_help=tasks[name][2], answer=found.answer, arm=found.arm, leading=found.leading,
                low=low, high=high, **found.cost)

def confirm(found, seeds=fresh):
    "The leading arm's gain in pairs that the sequential study has not seen"
    if found.leading is None: return {}
    study,arm,alone = found.study,found.leading,found.as_long[found.leading]
    study.run(found.epochs, seeds, [arm], progress=False)
    study.run(alone, seeds, ['alone'], progress=False)
    runs = study.named().set_index('seed')
    def of(a, n): return runs[runs.arm.eq(a) & runs.epochs.eq(n)][found.metric].loc[list(seeds)]
    t = paired_test(of(arm, found.epochs), of('alone', alone))
    return dict(fresh_gain=t.diff, fresh_low=t.ci[0], fresh_high=t.ci[1])

def run():
    "Run what is missing: the answers first, then the fresh pairs"
    found = {name: ask(name) for name in tasks}
    rows = {name: row(name, o) for name,o in found.items()}
    for name,o in found.items():
        rows[name] |= confirm(o)
        pd.DataFrame(rows.values()).to_csv(results/'family-should_i.csv', index=False, float_format='%.6g')

def table():
    "The tasks' answers, gains in points"
    found = pd.read_csv(results/'family-should_i.csv')
    def span(low, high): return ['' if pd.isna(a) else f'{100*a:+.1f} to {100*b:+.1f}' for a,b in zip(low, high)]
    return pd.DataFrame({'expected to help':found.can_help.map({True:'yes', False:'no'}), 'answer':found.answer,
                         'leading':found.leading, 'interval':span(found.low, found.high), 'pairs':found.pairs,
                         'runs':found.runs, 'cost':[f'{o:.0%}' for o in found.share],
                         'fresh pairs':span(found.fresh_low, found.fresh_high)}).fillna('').set_index(found.task)
