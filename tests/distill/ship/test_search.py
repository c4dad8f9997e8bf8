"The budget comes before the training, poor students stop at a rung, and the winner is judged on what nobody has seen"
import sys
import warnings
from functools import partial

import fastai.callback.data  # noqa: F401 (gives Datasets `weighted_dataloaders`)
import pytest
import torch
from fastai.data.core import Datasets
from fastai.metrics import accuracy, top_k_accuracy
from torch import nn

from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.ship import budget
from fasterai.distill.ship.budget import check_budget, relative_latency, student_cost
from fasterai.distill.ship.halving import halving, halving_cost, split_training
from fasterai.distill.ship.search import pareto, search_student
from fasterai.distill.ship.space import size_of_space
from fasterai.distill.study.measure import n_params
from classes import At, Gone, named
from helpers import data, net, same, state

optuna = pytest.importorskip('optuna')


def test_reference_case():
    "27 candidates, a third goes on: 81 epochs, where trainings are carried on, instead of 729"
    rungs = halving(27, 1, 27, 3)
    assert rungs==[(27, 1), (9, 3), (3, 9), (1, 27)] and halving_cost(rungs)==81
    assert halving(18, 2, 16, 2)==[(18, 2), (9, 4), (4, 8), (2, 16)]
    assert halving(1, 2, 16)==[(1, 16)] and halving_cost([(3, 16)])==48

def test_parts_of_the_training_set():
    dls = data(n=40)
    a,b = split_training(dls, .25, 0),split_training(dls, .25, 0)
    rows = lambda ds: {tuple(ds[i][0].flatten().tolist()) for i in range(len(ds))}
    train,judge = rows(a.train_ds),rows(a.valid_ds)
    assert (len(train), len(judge))==(30, 10) and not train & judge and train|judge==rows(dls.train_ds)
    assert rows(b.train_ds)==train and rows(split_training(dls, .25, 1).train_ds)!=train
    assert a.train.shuffle and not a.valid.shuffle
    for share in (0, .9, 1):
        with pytest.raises(ValueError, match='share='): split_training(dls, share)

def test_parts_draw_as_the_whole_did():
    "By weight, some rows alone, and without those that have no label; judged without augmentation"
    x,w = torch.arange(24.),[1.]*8+[0.]*16
    ds = Datasets(range(24), [[At(x)], [At([0, 1, 2]*8)]], splits=[range(24)]*2)
    part = split_training(ds.weighted_dataloaders(w, bs=4, num_workers=0, device='cpu')).train
    assert all(p==w[i]/sum(w[j] for j in part.dataset.idxs) for p,i in zip(part.wgts, part.dataset.idxs))
    assert {i for _ in range(3) for b in part for i in b[0].tolist()}<=set(range(8))
    part = split_training(ds.partial_dataloaders(8, bs=4, num_workers=0, device='cpu')).train
    assert (part.partial_n, len(part), len(part.dataset))==(8, 2, 16)
    both = split_training(mix_unlabelled(data(n=24), torch.randn(24, 3, 8, 8), 1.))
    assert [len(o) for o in (both.train_ds, both.valid_ds)]==[16, 8]
    assert all((b[1]>=0).all() for dl in both.loaders for b in dl)
    both = split_training(named('abc', tfms=[Gone()]))
    assert [any(b[0].any() for b in dl) for dl in (*both.loaders, both.train)]==[False, True, False]

def test_costs(monkeypatch):
    small,ms = net(2),iter([3., 2., 9., 1., 3., 2.])
    monkeypatch.setattr(budget, 'latency_ms', lambda *args, **kwargs: (next(ms), 9.))
    x = (torch.randn(4, 3, 8, 8),)
    got = student_cost(small, {'params', 'mb'})
    assert got['params']==n_params(small) and set(got)=={'params', 'mb'}
    assert student_cost(small, {'latency'}, small, x)['latency']==1.5
    with pytest.raises(ValueError, match="unknown budget 'parms'; did you mean 'params'"): check_budget(dict(parms=1))
    with pytest.raises(ValueError, match='params must be above 0'): check_budget(dict(params=0))

def test_front():
    assert pareto([1, 2, 3, 2], [.5, .4, .7, .6])==[0, 3, 2]
    assert pareto([1, 2, 3], [.5, .4, .7], lowest=True)==[0, 1]

made = []
def make(width=4):
    made.append(width)
    return net(width)

def search(teacher=None, space=None, **kwargs):
    args = dict(budget=dict(params=1500), trials=3, epochs=4, baseline=dict(width=6), seeds=2, progress=False, T=2,
                metrics=accuracy, loss_func=nn.CrossEntropyLoss())
    return search_student(data(n=48), teacher or net(8, seed=3), make, space or dict(width=[2, 4, 6, 8, 12, 30]),
                          **{**args, **kwargs})

def test_search(capsys):
    stream = torch.get_rng_state()
    teacher = net(8, seed=3)
    before = state(teacher)
    found = search(teacher)
    assert torch.equal(torch.get_rng_state(), stream) and same(state(teacher), before)
    t = found.table
    assert t.state.eq('hand-made').sum()==1 and t.state.isin(['trained', 'stopped']).sum()==3
    over = t[t.state.eq('over budget')]
    assert (over.params>1500).all() and over.score.isna().all() and over.epochs.eq(0).all()
    assert (t.params[t.epochs>0]<=1500).all() and t[t.state.eq('trained')].epochs.eq(4).all()
    assert t[t.state.eq('stopped')].epochs.isin([1, 2]).all() and len({*t.width[t.state.ne('hand-made')]})==len(t)-1
    assert found.best['width'] in [2, 4, 6, 8, 12] and found.first==1
    arms = found.study.table('accuracy')
    assert set(arms.arm)=={'hand-made', 'found'} or found.best==dict(width=6)
    assert found.verdict() and len(found.plot().collections)>=2
    again = search(net(8, seed=3))
    assert again.table.equals(t)

def test_whole_and_broken_numbers():
    found = search(space=dict(width=(2, 7)), trials=2, baseline=None)
    assert found.table.width.between(2, 7).all() and found.table.width.dtype.kind=='i'
    assert 'nobody knows' in found.verdict()

def test_a_small_space_ends_and_says_why():
    with pytest.warns(UserWarning, match='2 trials instead of 9: of the 2 students in the space, 0 are over'):
        found = search(space=dict(width=[2, 4]), trials=9)
    assert found.table.state.ne('hand-made').sum()==2
    with pytest.warns(UserWarning, match='1 trials instead of 3: of the 3 students in the space, 2 are over'):
        search(space=dict(width=[2, 30, 40]), baseline=None)

@pytest.mark.parametrize('metrics', [None, []])
def test_without_a_metric_the_loss_scores(metrics):
    found = search(metrics=metrics, baseline=None)
    t = found.table.query("state=='trained'")
    assert found.metric=='valid_loss' and found.lowest and found.best['width']==t.width[t.score.idxmin()]
    assert ((t.score>.5) & (t.score<3)).all() and set(found.table.state)<={'trained', 'stopped', 'over budget'}

@pytest.mark.parametrize('space', [dict(width=(2, 120)), dict(width=[*range(100, 200), 2, 3, 4])])
def test_rare_students_within_the_budget_are_found(space):
    "Three of some hundred fit: Optuna alone would not see them all"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = search(space=space, baseline=None, budget=dict(params=500), epochs=1)
    t = found.table
    assert t.state.isin(['trained', 'stopped']).sum()==3 and (t.params[t.epochs>0]<=500).all()

def test_broken_numbers_are_looked_at_too():
    def make_rounded(width=4.): return net(round(width))
    found = search_student(data(n=48), net(8, seed=3), make_rounded, dict(width=(2., 300.)), dict(params=400), 2, 1,
                           progress=False, metrics=accuracy, loss_func=nn.CrossEntropyLoss(), seeds=1)
    assert found.table.state.eq('trained').sum()==2 and size_of_space(dict(width=(2., 300.)))==float('inf')

def test_too_few_within_reach(monkeypatch):
    monkeypatch.setattr('fasterai.distill.ship.space._looks', 0)
    with pytest.warns(UserWarning, match=r'trials instead of 9: of \d+ students that were looked at, \d+ are over'):
        search(space=dict(width=[*range(2, 300)]), trials=9, budget=dict(params=1000), baseline=None, epochs=1)

def test_a_student_that_fails_costs_the_others_nothing():
    def some(width=4):
        if width==2: raise RuntimeError('no such width')
        if width==8: return nn.Sequential(nn.Flatten(), nn.Linear(7, 3)) # does not take the images
        return net(width) if width<12 else nn.Sequential(net(width), Broken())
    def find(widths, **kw):
        return search_student(data(n=48), net(8, seed=3), some, dict(width=widths), None, len(widths), 2, seeds=1,
                              progress=False, metrics=accuracy, loss_func=nn.CrossEntropyLoss(), **kw)
    with pytest.warns(UserWarning, match='search_student: width=. failed and is left out, RuntimeError'):
        found = find([2, 4, 8, 12, 5])
    t = found.table.set_index('width')
    assert t.state[[2, 8, 12]].eq('failed').all() and t.state[[4, 5]].isin(['trained', 'stopped']).all()
    assert 'no such width' in t.why[2] and 'cannot be multiplied' in t.why[8] and 'diverged' in t.why[12]
    assert found.best['width'] in (4, 5) and len(found.plot().collections)>=2
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='1 failed; the last that failed: RuntimeError: no'):
        find([2])

def test_scores_that_are_no_numbers_are_no_matter_of_the_budget():
    def no_number(pred, y): return torch.tensor(float('nan'))
    with pytest.raises(ValueError, match='to the end, 3 failed; .* diverged: its no_number, or its loss, is no'):
        search(budget=None, baseline=None, metrics=no_number, cache=False)
    ks = [partial(top_k_accuracy, k=1), partial(top_k_accuracy, k=2)]
    with pytest.raises(ValueError, match="2 of them are called 'top_k_accuracy'"): search(metrics=ks)

class Broken(nn.Module):
    "Answers NaN, which is class 0 to a metric"
    def forward(self, x): return x*float('nan')

def test_latency():
    found = search(budget=dict(latency=50.), trials=1)
    assert 'latency' in found.table and found.table.latency.notna().all()

def test_refused(monkeypatch):
    with pytest.raises(ValueError, match='the student made by hand is over the budget: params'):
        search(budget=dict(params=10))
    with pytest.raises(ValueError, match='no student of 6 fits it; the least that was seen is params='):
        search(budget=dict(params=10), baseline=None, reference=net())
    made.clear()
    for space in ({}, dict(width=4), dict(width=(4, 2)), dict(width=[])):
        with pytest.raises(ValueError, match='space'): search_student(data(), net(), make, space)
    for seeds in 0, -1, 1.5, []:
        with pytest.raises(ValueError, match='seeds '): search(seeds=seeds)
    assert not made
    for name in 'params','epochs','score':
        with pytest.raises(ValueError, match=f"space: '{name}' is a column of the table"): search(space={name:[2, 4]})
    for name,low in dict(trials=1, epochs=1, eta=2).items():
        with pytest.raises(ValueError, match=f'{name} must be a whole number from {low} on, got {low-1}'):
            search(**{name: low-1})
    with pytest.raises(TypeError, match='make must be a function that makes a new one for each run, got Sequential'):
        search_student(data(), net(), net(), dict(width=[2]))
    assert not made
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r'fasterai-distill\[search\]'): search()
