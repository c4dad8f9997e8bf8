"Should I distil: what the probe leaves out, pairs of equal length, when it stops, kill and resume"
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import get_random_states
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.core.sequences import chance_to_decide, confidence_sequence
from fasterai.distill.losses import SoftTarget
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.study.distil_answer import BETTER, NO_BETTER, NOT_DECIDED
from fasterai.distill.study.one_run import fresh_callback
from fasterai.distill.study.should_i_distil import should_i_distil
from fasterai.distill.teacher.following import EMA
from helpers import data, flags, n_hooks, net, same, state


def student():
    return nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))

world = dict(gains={}, slow={}, sd=.1, calls=0, die_at=None) # of `Luck`; not of its own, for a study knows its `fit`

class Luck:
    "Trains nothing: what a student reaches comes from a table, and from luck of its seed"
    def __call__(self, learn, epochs, kd):
        world['calls'] += 1
        if world['calls']==world['die_at']: raise KeyboardInterrupt
        weight = kd.recipe.weight if kd else 0
        luck = np.random.default_rng([torch.initial_seed(), int(100*weight), epochs]).normal()
        with torch.no_grad():
            learn.model[-1].weight.zero_()
            learn.model[-1].bias.fill_(world['gains'].get(weight, 0)+world['sd']*luck)
        return dict(seconds=world['slow'].get(weight, 1.)*epochs)

def level(pred, y): return pred.mean()
def level_loss(pred, y): return -pred.mean()

@pytest.fixture
def fake():
    def ask_fake(gains=(0, 0), slow=(1, 1), die_at=None, sd=.1, **kwargs):
        named = {.9:0, .5:1}
        world.update(gains={w:gains[i] for w,i in named.items()}, slow={w:slow[i] for w,i in named.items()}, sd=sd,
                     calls=0, die_at=die_at)
        return ask(**dict(fit=Luck(), metrics=level) | kwargs)
    return ask_fake

arms = {'a': dict(loss=SoftTarget, weight=.9), 'b': dict(loss=SoftTarget, weight=.5)}

def ask(fit=None, arms=arms, dls=None, teacher=None, **kwargs):
    kwargs = dict(epochs=4, pairs=8, equal='epochs', finalists=2, progress=False, loss_func=CrossEntropyLossFlat(),
                  opt_func=SGD, lr=.1) | kwargs
    if fit: kwargs['fit'] = fit
    return should_i_distil(student, teacher or net(6), dls or data(), arms, **kwargs)


def test_it_stops_as_soon_as_an_arm_is_better(fake):
    found = fake((.5, 0))
    d = found.gains('a')
    seq = confidence_sequence(d, 2*.05/2)
    assert found.answer==BETTER and found.arm=='a'==found.leading and found.verdict_of('a')==BETTER
    assert 4<=len(d)<8 and seq.low[-1]>0 and not (seq.low[:-1]>0).any()
    assert found.interval==(seq.low[-1], seq.high[-1]) and found.cost['pairs']==len(d)
    assert found.cost['runs']==3*len(d) and found.cost['share']==pytest.approx(len(d)/8)
    assert 'Use a.' in repr(found) and '<table' in found._repr_html_() and found.verdict().startswith('BETTER: a, +')
    found.plot()

def test_gains_are_those_of_the_runs(fake):
    found = fake((.1, .2))
    runs = found.study.runs
    for arm in 'ab':
        by = {a:runs[runs.arm.eq(a)].set_index('seed').level for a in (arm, 'alone')}
        assert found.gains(arm)==pytest.approx((by[arm]-by['alone']).dropna().to_numpy())
    assert found.table.gain.is_monotonic_decreasing

def test_no_better_and_not_decided(fake):
    worse = fake((-.5, -.6))
    assert worse.answer==NO_BETTER and worse.arm=='alone' and 'Train the student alone' in worse.verdict()
    small = fake((.05, .05), worth=1.)
    assert small.answer==NO_BETTER and small.interval[1]<1
    open_ = fake((.03, -.5), hopeless=0)
    assert open_.answer==NOT_DECIDED and open_.arm=='alone' and open_.leading=='a'
    assert open_.verdict_of('b')==NO_BETTER and len(open_.gains('b'))<8==len(open_.gains('a'))

def test_what_is_hopeless_is_given_up(fake):
    args = dict(gains=(.03, -.5), worth=.01)
    whole,found = fake(hopeless=0, **args),fake(**args)
    n = len(found.gains('a'))
    assert found.answer==NOT_DECIDED==found.verdict_of('a') and 2<=n<8==len(whole.gains('a'))
    assert found.gains('a')==pytest.approx(whole.gains('a')[:n]) and found.cost['share']<whole.cost['share']
    for k in range(1, n+1):
        hope = chance_to_decide(whole.gains('a')[:k], 8, .01, .05)
        assert (hope<found.hopeless)==(k==n)
    assert found.hope('a')==hope and 'given up, 8 pairs would decide' in repr(found) and 'given up' not in repr(whole)

def test_less_of_a_loss_is_better(fake):
    found = fake((.5, -.5), metrics=level_loss) # levels: the loss is their negative
    assert found.answer==BETTER and found.arm=='a' and found.interval[0]>0
    assert fake((.5, .5), metrics=level_loss, lowest=False).answer==NO_BETTER

@pytest.mark.parametrize('gains,worse', [((.5, np.nan), 'b'), ((np.nan, .5), 'a')])
def test_an_arm_that_diverges_is_left_out(fake, tmp_path, gains, worse):
    better = 'ab'.replace(worse, '')
    found = fake(gains, finalists=1)
    assert found.answer==BETTER and found.arm==better and list(found.left_out)==[worse]
    for _ in range(2): # the second time out of its file
        found = fake(gains, finalists=2, path=tmp_path/'runs.csv')
        assert found.answer==BETTER and found.arm==better and 'diverged' in found.left_out[worse]

def test_a_student_of_no_numbers_is_not_better_though_its_metric_is(tmp_path):
    def nan(pred, teacher_pred): return (pred*float('nan')).mean()
    x = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ds = TensorDataset(x, torch.zeros(24, dtype=torch.long))
    dls = DataLoaders(*(TfmdDL(ds, bs=8) for _ in range(2)), device='cpu')
    for _ in range(2): # the second time out of its file
        found = should_i_distil(student, student(), dls, dict(bad=dict(loss=nan)), epochs=1, pairs=4, progress=False,
                                lr=1e-6, loss_func=CrossEntropyLossFlat(), path=tmp_path/'runs.csv', equal='epochs')
        assert found.study.runs.query("arm=='bad'").accuracy.eq(1).all()
        assert found.answer!=BETTER and found.arm=='alone' and 'diverged' in found.left_out['bad']

def test_equal_time_and_finalists(fake):
    found = fake((.0, .3), slow=(2, 1.5), equal='time', finalists=1, epochs=8)
    assert found.arms==['b'] and 'behind in short runs' in found.left_out['a'] and found.as_long=={'b':12}
    runs = found.study.named()
    pairs = runs[runs.seed<100]
    assert set(zip(pairs.arm, pairs.epochs))=={('alone', 12), ('b', 8)}
    short = runs[runs.seed>=100]
    assert set(short.epochs)=={2} and len(short)==6 # short runs have seeds of their own
    seq = confidence_sequence(found.gains('b'), .1) # one finalist, one test
    assert found.interval==(seq.low[-1], seq.high[-1])
    both = fake((.0, .3), slow=(2, 1.5), equal='time', epochs=8)
    assert both.as_long=={'a':16, 'b':12}

def test_a_faster_arm_does_not_shorten_the_student_alone(fake):
    assert fake((.3, .3), slow=(.5, .6), equal='time').as_long=={'a':4, 'b':4}

def test_killed_and_resumed(fake, tmp_path):
    args = dict(gains=(.2, .1), slow=(2, 1.5), equal='time', pairs=4)
    whole = fake(**args)
    n = world['calls']
    for at in (2, 8):
        path = tmp_path/f'{at}.csv'
        with pytest.raises(KeyboardInterrupt): fake(**args, die_at=at, path=path)
        found = fake(**args, path=path)
        assert world['calls']==n-at+1
        assert found.table.equals(whole.table) and found.answer==whole.answer and found.cost==whole.cost
    fake(**args, path=path)
    assert world['calls']==0

def test_wrong_better_is_rare(fake):
    "The rule itself, on numbers: two finalists without any gain, looked at after each pair"
    d = np.random.default_rng(5).standard_normal((2, 2000, 12))
    better = confidence_sequence(d, 2*.05/2).low>0
    assert better.any((0, 2)).mean()<=.05


def test_the_probe_leaves_out_what_its_advice_names():
    class Turned(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m
        def forward(self, x): return -self.m(x)
    def labelled():
        x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        y = (2*x.mean((1, 2, 3))*20).long().clamp(0, 2)
        sets = [TfmdDL(TensorDataset(x, y), bs=16, shuffle=o, num_workers=0) for o in (True, False)]
        return DataLoaders(*sets, device='cpu')
    dls = labelled()
    teacher = Learner(dls, net(6), CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
    with teacher.no_bar(), teacher.no_logging(): teacher.fit(6)
    t = teacher.model.eval()
    ways = {'fine': dict(loss=SoftTarget, weight=.5), 'asleep': dict(loss=SoftTarget, weight=1e-4),
            'fights': dict(teacher=Turned(t).eval(), loss=SoftTarget, weight=.5)}
    found = ask(arms=ways, dls=dls, teacher=t, pairs=1, epochs=1, metrics=accuracy)
    assert found.arms==['fine'] and set(found.left_out)=={'asleep', 'fights'}
    for arm in ways:
        learn = Learner(dls, student(), CrossEntropyLossFlat())
        notes = suggest_weights(learn, fresh_callback(found.study.arms[arm])).notes
        assert any(f': {arm}' in o for o in notes)==(arm!='fine')
    only = ask(arms={k:ways[k] for k in ('asleep', 'fights')}, dls=dls, teacher=t, metrics=accuracy)
    assert only.answer==NOT_DECIDED and only.arm=='alone' and only.leading is only.interval is None
    assert only.cost['runs']==0 and 'No arm had pairs' in repr(only)
    only.plot()
    found = ask(arms=dict(average=dict(teacher=EMA(), loss=SoftTarget, weight=.5)), dls=dls, pairs=1, epochs=1)
    assert found.arms==['average'] and not found.left_out # which is the student's own at its start

def test_nothing_is_left_behind():
    t = net(6)
    before,f = state(t),flags(t)
    torch.manual_seed(3)
    streams = get_random_states()['torch_state']
    found = ask(teacher=t, pairs=2, epochs=1, metrics=accuracy, equal='time', finalists=1)
    assert torch.equal(streams, get_random_states()['torch_state'])
    assert same(before, state(t)) and flags(t)==f and not n_hooks(t)
    assert len(found.arms)<=1 and found.answer in (NOT_DECIDED, NO_BETTER)

def test_what_is_refused():
    for match,kwargs in {"arms is empty": dict(arms={}), "'alone' is the student": dict(arms={'alone': {}}),
                         'got partial': dict(arms={'a': partial(SoftTarget)}), 'pairs must be': dict(pairs=0),
                         'finalists must be': dict(finalists=1.5), 'alpha must be': dict(alpha=0),
                         'hopeless must be a chance': dict(hopeless=1.),
                         "'time' or 'epochs', got 'steps'": dict(equal='steps'),
                         'unknown metric': dict(metric='acuracy')}.items():
        with pytest.raises((ValueError, TypeError), match=match): ask(**dict(metrics=accuracy) | kwargs)
    with pytest.raises(TypeError, match='make_student must be a function that makes a new one .*, got Sequential'):
        should_i_distil(student(), net(6), data(), arms)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]/'benchmarks'))
    from methods import should_i
    return should_i

def test_the_bench_s_tasks(bench):
    import small_tasks
    cannot = [t for t in bench.tasks.values() if t.cannot]
    assert len(bench.tasks)==20 and len(cannot)>=5 and {t.of for t in cannot}=={t.of for t in bench.tasks.values()}
    noisy = small_tasks.noisy()
    clean,wrong = small_tasks.data(n=200).train_ds.tensors[1],noisy.train_ds.tensors[1]
    assert .25<(clean!=wrong).float().mean()<.45
    assert torch.equal(noisy.valid_ds.tensors[1], small_tasks.few().valid_ds.tensors[1])

def test_a_task_is_asked_and_confirmed(bench, tmp_path):
    found = bench.ask('digits, labels recited', epochs=1, pairs=1, folder=tmp_path)
    row = bench.row('digits, labels recited', found)
    assert row['answer']==NOT_DECIDED and row['pairs']==1 and (tmp_path/'digits_labels_recited.csv').exists()
    n = len(found.study.log.frame())
    assert bench.to_the_end(found)==dict(whole_answer=NOT_DECIDED, whole_share=row['share'])
    assert set(bench.confirm(found, (100, 101)))=={'fresh_gain', 'fresh_low', 'fresh_high'}
    assert len(found.study.log.frame())==n+4

def test_who_recites_labels_adds_nothing_to_them(bench):
    import small_tasks
    dls = small_tasks.few()
    teacher = small_tasks.labels(small_tasks.few)
    x,y = dls.train_ds.tensors
    assert torch.equal(teacher(x).argmax(1), y)
    loss,pred = CrossEntropyLossFlat(),torch.randn(100, 10)
    for arm in small_tasks.as_they_are.values():
        both = arm['weight']*arm['loss'](pred, teacher(x))+(1-arm['weight'])*loss(pred, y)
        assert both==pytest.approx(float(loss(pred, y)), rel=1e-5)
