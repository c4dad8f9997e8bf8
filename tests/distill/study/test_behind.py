"The code behind a run: an edit of anything of one's own is another run, and nothing else is"
import csv
from functools import lru_cache, partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import AvgMetric, Metric
from fastai.metrics import F1Score, accuracy
from torch import nn

from fasterai.distill.methods import chain
from fasterai.distill.methods.chain import OneByOne
from fasterai.distill.study.behind import behind
from fasterai.distill.study.study import Study
from fasterai.distill.study.sweep import sweep
from helpers import data, learner, net


class Reads(nn.Module):
    "What an edit of a class is tried on: `by` is written into the code of a method, which `forward` calls"
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return self.net(self.prepared(x))


def student(by):
    class Student(Reads):
        if by==1:
            def prepared(self, x): return x
        else:
            def prepared(self, x): return 9*x
    return Student()

def callback(by):
    class Louder(Callback):
        if by==1:
            def before_batch(self): self.learn.xb = self.x,
        else:
            def before_batch(self): self.learn.xb = 9*self.x,
    return Louder()

def task(by):
    class Task:
        if by==1:
            def __call__(self, pred, y): return F.cross_entropy(pred, y)
        else:
            def __call__(self, pred, y): return 9*F.cross_entropy(pred, y)
    return Task()

def loss(by, base=object):
    class Loss(base):
        if by==1:
            def part(self, a, b): return F.mse_loss(a, b)
        else:
            def part(self, a, b): return 9*F.mse_loss(a, b)
        def forward(self, pred, teacher_pred): return self.part(pred, teacher_pred)
        if base is object: __call__ = forward
    return Loss()

def metric(by):
    if by==1:
        def score(pred, y): return (pred.argmax(1)==y).float().mean()
    else:
        def score(pred, y): return 9*(pred.argmax(1)==y).float().mean()
    return score

def helped(by):
    if by==1:
        def rate(): return 1e-9
    else:
        def rate(): return 1.
    def fit(learn, epochs, cbs): learn.fit(epochs, rate(), cbs=cbs)
    return fit

def made(make=net, **kwargs): return learner(make(), lr=.1, **{'metrics': accuracy, **kwargs})

def judged(by): return dict(accuracy=.1*by, valid_loss=1.*by)

EDITS = dict(
    student=lambda by: dict(make=partial(made, partial(student, by))),
    callback=lambda by: dict(make=lambda: made(cbs=callback(by))),
    task=lambda by: dict(make=lambda: made(loss_func=task(by))),
    loss=lambda by: dict(loss=loss(by)), module=lambda by: dict(loss=loss(by, nn.Module)),
    metric=lambda by: dict(make=lambda: made(metrics=metric(by))),
    average=lambda by: dict(make=lambda: made(metrics=F1Score(average=['macro', 'micro'][by-1]))),
    measure=lambda by: dict(measure=partial(judged, by) if by else None),
    helper=lambda by: dict(fit=helped(by)))


def run(path, make=made, loss='Logits', **kwargs):
    if 'measure' in kwargs: kwargs['measure'] = lambda learn, f=kwargs['measure']: f()
    arm = dict(teacher=net(8, seed=1), loss=loss, weight=.5)
    return Study(make, dict(distilled=arm), path, **kwargs).run(1, 1, progress=False)


@pytest.mark.parametrize('edit', EDITS.values(), ids=list(EDITS))
def test_an_edit_makes_another_run(tmp_path, edit):
    found = [run(tmp_path/'r.csv', **edit(by)) for by in (1, 2, 1)]
    assert [len(o.log.rows) for o in found]==[1, 2, 2]
    a,b,c = (o.runs.drop(columns=['setting', 'seconds']) for o in found)
    assert a.equals(c) and not a.equals(b)


def test_logs_of_before_are_taken_as_they_are(tmp_path):
    path = tmp_path/'r.csv'
    first = run(path)
    with open(path, newline='') as f: rows = list(csv.reader(f))
    at = rows[0].index('setting')
    assert '; code=' in rows[1][at]
    rows[1][at] = rows[1][at].partition('; code=')[0]
    with open(path, 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows(rows)
    again = run(path)
    assert len(again.log.rows)==1 and again.runs.accuracy.equals(first.runs.accuracy)


def test_a_sweep_judges_the_teacher_anew_by_another_metric(tmp_path):
    def go(by):
        found = sweep(lambda: made(metrics=metric(by)), net(8, seed=1), {'T':[2.]}, epochs=1, seeds=[0],
                      path=tmp_path/'s.csv', progress=False)
        return found.runs.set_index('run').score
    a,b = go(1),go(2)
    assert b['teacher']==pytest.approx(9*a['teacher']) and b['alone']==pytest.approx(9*a['alone'])


def test_finished_networks_of_another_code_are_not_taken(tmp_path):
    files = [OneByOne(1, path=tmp_path)._file('a', made(cbs=callback(by)), 0, None) for by in (1, 1, 2)]
    assert files[0]==files[1]!=files[2]


def test_docstrings_and_what_is_installed_are_no_part():
    def a(x):
        "One"
        return x+1
    def b(x):
        "Another"
        return x+1
    b.__qualname__ = a.__qualname__
    assert behind(a)==behind(b)!=behind(lambda x: x+1)
    assert behind(nn.Linear(2, 2), F.cross_entropy, torch.optim.SGD)==behind()


def test_what_refers_to_itself_and_what_counts():
    class Node:
        calls = 0
        def __init__(self): self.me,self.kept = self,[]
        def __call__(self, pred, teacher_pred):
            self.kept.append(1)
            return F.mse_loss(pred, teacher_pred)
    node = Node()
    before = behind(node)
    run(None, loss=node)
    assert behind(node)==before


def test_a_deep_structure_and_an_object_that_shows_nothing():
    class Link: next = None
    class Shy:
        @property
        def __dict__(self): raise RuntimeError('not now')
    first = last = Link()
    for _ in range(5000):
        last.next = Link()
        last = last.next
    cb = callback(1)
    cb.root,cb.shy = first,Shy()
    assert behind(cb)!=behind(callback(2))


@pytest.mark.parametrize('shared', [lambda: AvgMetric(metric(1)), lambda: F1Score(average='macro'), lambda: Counts()])
def test_a_metric_that_two_studies_share_counts_for_neither(tmp_path, shared):
    shared = shared()
    for _ in range(2): study = run(tmp_path/'r.csv', lambda: made(metrics=shared))
    assert len(study.log.rows)==1


class Counts(Metric):
    made = 0
    def __init__(self): type(self).made += 1
    def reset(self): self.n = 0
    def accumulate(self, learn): self.n += 1
    @property
    def value(self): return self.n


class CountsToo(Counts): "Its own number lies in it, and what sets it in its base"


def test_classes_that_count_what_was_made_of_them():
    was,made_before = behind(CountsToo()),CountsToo.made
    assert behind(CountsToo())==was and CountsToo.made==made_before+1


limit,table = .5,torch.ones(2)

@pytest.mark.parametrize('read', ['dict', 'cache', 'setter', 'tuple', 'partial', 'global', 'tensor', 'module'])
def test_what_is_read_in_other_ways(monkeypatch, tmp_path, read):
    def part(by):
        if by==1:
            def part(x): return x
        else:
            def part(x): return 2*x
        return part
    def of(by):
        losses,cached = {'a': part(by)},lru_cache(part(by))
        monkeypatch.setitem(globals(), 'limit', by/2)
        monkeypatch.setitem(globals(), 'table', torch.full((2,), 1.*by))
        class Tuple: th = .5,by
        class Partial: half = partial(part(1), by)
        class Global:
            def __call__(self): return limit
        class Setter: value = property(part(1), part(by))
        file = tmp_path/'own_helpers.py'
        file.write_text(f'def part(x): return {by}*x')
        helpers = ModuleType('own_helpers')
        helpers.__file__ = str(file)
        exec(compile(file.read_text(), str(file), 'exec'), vars(helpers))
        return dict(dict=lambda p: losses['a'](p), cache=lambda p: cached(p), setter=Setter(), tuple=Tuple(),
                    partial=Partial(), tensor=lambda p: table*p, module=lambda p: helpers.part(p),
                    **{'global': Global()})[read]
    a,b,c = (behind(of(by)) for by in (1, 2, 1))
    assert a==c!=b


def test_finished_networks_of_before_are_found(tmp_path, monkeypatch):
    one,learn = OneByOne(1, path=tmp_path),made()
    new = one._file('a', learn, 0, None)
    with monkeypatch.context() as m: # as names were without code
        for name in 'behind','code_of_learner','rows_text': m.setattr(chain, name, lambda *a: '')
        before = one._file('a', learn, 0, None)
    before.touch()
    assert one._file('a', learn, 0, None)==before!=new
    new.touch()
    assert one._file('a', learn, 0, None)==new
