"Studies: what makes a run another run, runs that share nothing, any metric, and files that outlive their writers"
import csv, math, os
from copy import deepcopy
from functools import partial
from multiprocessing import get_context

import pandas as pd
import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy, mse, top_k_accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fasttransform import Transform
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.distill.command.page import headline
from fasterai.distill.loss.learned import VID
from fasterai.distill.losses import FitNet, Logits, SoftTarget
from fasterai.distill.methods.assistants import assistants
from fasterai.distill.methods.generations import born_again
from fasterai.distill.methods.noisy_student import noisy_student
from fasterai.distill.study.compare import compare
from fasterai.distill.study.experiment import Experiment
from fasterai.distill.study.report import save_report
from fasterai.distill.study.run_log import RunLog
from fasterai.distill.study.setting import describe
from fasterai.distill.study.study import Study
from fasterai.distill.study.should_i_distil import should_i_distil
from fasterai.distill.study.summary import by_arm, lower_is_better, summary
from fasterai.distill.study.sweep import sweep


def _dls(n=32, bs=8, regression=False, **kw):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    y = x.sum(1, keepdim=True) if regression else (x[:, 0]>0).long()+(x[:, 1]>0).long()
    dls = DataLoaders(*(TfmdDL(TensorDataset(x, y), bs=bs, shuffle=s, num_workers=0, **kw) for s in (True, False)),
                      device='cpu')
    dls.c = 1 if regression else 3
    return dls

def _net(width=6, c=3): return nn.Sequential(nn.Sequential(nn.Linear(4, width), nn.Tanh()), nn.Linear(width, c))

class Noise(Transform):
    "An augmentation"
    def encodes(self, x:torch.Tensor): return x+0.1*torch.randn_like(x) if x.is_floating_point() else x

@pytest.fixture
def teacher():
    set_seed(1)
    return _net(8)

def make(dls=None, net=_net, **kw):
    return Learner(dls or _dls(), net(), **{**dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=0.05), **kw})

def _trained(path, teacher, make_learner=make, **kd):
    "How many runs were trained"
    fits = []
    def fit(learn, epochs, cbs): learn.fit(epochs, cbs=cbs)
    def count(learn): fits.append(1); return dict(valid_loss=0., accuracy=0.)
    arms = dict(alone=None, distilled=dict(teacher=teacher, **{**dict(loss=SoftTarget, weight=0.5), **kd}))
    Study(make_learner, arms, path, fit=fit, measure=count).run(1, 1, progress=False)
    return len(fits)


def test_what_makes_a_run_another_run(teacher, tmp_path):
    path,other = tmp_path/'r.csv',deepcopy(teacher)
    with torch.no_grad(): other[1].bias.add_(1e-3)
    def pretrained():
        net = _net()
        with torch.no_grad(): net[1].bias.zero_()
        return net
    assert _trained(path, teacher)==2 and _trained(path, teacher)==0 and _trained(path, deepcopy(teacher))==0
    for change in (partial(make, _dls(bs=16)), partial(make, opt_func=SGD), partial(make, net=pretrained),
                   partial(make, _dls(after_batch=[Noise()])),
                   partial(make, wd=0.1), partial(make, lr=0.01), lambda: make(cbs=MixUp(0.3)),
                   lambda: make(cbs=MixUp(0.4)), partial(make, loss_func=CrossEntropyLossFlat(label_smoothing=0.1))):
        assert _trained(path, teacher, change)==2 and _trained(path, teacher, change)==0, change
    for change in (dict(loss=partial(SoftTarget, T=3)), dict(loss=partial(SoftTarget, T=3.5)), dict(weight=0.4),
                   dict(schedule='cos'), dict(loss={SoftTarget:0.5})):
        # the student alone is the same
        assert _trained(path, teacher, **change)==1 and _trained(path, teacher, **change)==0, change
    assert _trained(path, other)==1
    maps = dict(activations_student='0', activations_teacher='0')
    adapters = [{'0': nn.Linear(6, 8)} for _ in range(2)]
    assert [_trained(path, teacher, loss=FitNet, adapters=a, **maps)
            for a in (adapters[0], adapters[1], adapters[0])]==[1, 1, 0]


rate,places,rates = 1e-9,dict(lr=(0, 1e-9)),[1e-9] # globals of the functions below

@pytest.mark.parametrize('how', ['number', 'dict', 'list', 'closure', 'nested', 'path'])
def test_what_a_function_reads_makes_another_run(monkeypatch, tmp_path, how):
    got = []
    for lr in (1e-9, 1., 1e-9):
        cfg,file = dict(lr=lr),tmp_path/f'{lr}'
        file.write_text(f'{lr}')
        for k,v in dict(rate=lr, places=dict(lr=(0, lr)), rates=[lr]).items(): monkeypatch.setitem(globals(), k, v)
        def nested(learn, epochs, cbs): learn.fit(epochs, (lambda: max(o for o in rates))(), cbs=cbs)
        fit = dict(number=lambda learn, epochs, cbs: learn.fit(epochs, rate, cbs=cbs),
                   dict=lambda learn, epochs, cbs: learn.fit(epochs, places['lr'][1], cbs=cbs),
                   list=lambda learn, epochs, cbs: learn.fit(epochs, rates[0], cbs=cbs),
                   closure=lambda learn, epochs, cbs: learn.fit(epochs, cfg['lr'], cbs=cbs), nested=nested,
                   path=lambda learn, epochs, cbs: learn.fit(epochs, float(file.read_text()), cbs=cbs))[how]
        study = Study(make, {'alone':None}, tmp_path/'r.csv', fit=fit).run(1, 1, progress=False)
        got.append(study.runs.valid_loss.item())
    assert got[0]==got[2]!=got[1] and len(study.log.rows)==2

def test_what_a_function_counts_makes_no_other_run():
    calls,last,cfg = [],dict(n=0),dict(lr=.1)
    def counts(x):
        calls.append(x)
        last['n'] += 1
        return cfg['lr']
    said = describe(counts)
    counts(1)
    assert (calls, last)==([1], dict(n=1)) and describe(counts)==said
    cfg['lr'] = .2
    assert describe(counts)!=said

def test_only_what_reads_plain_values_is_described_with_them(monkeypatch):
    number = 3
    def reads_none(x): return torch.relu(x)**number+_net()(x)
    def reads(x): return x*rate
    fs = reads_none,reads,Learner.fit,_net().forward,partial(SoftTarget, T=2)
    now = [describe(f) for f in fs]
    monkeypatch.setattr('fasterai.distill.study.setting._read_by', lambda f: {})
    assert [describe(f)==said for f,said in zip(fs, now)]==[True, False, True, True, True]

def test_runs_share_nothing_and_arguments_stay(teacher):
    own,vid = {'0': nn.Linear(6, 8)},VID()
    maps = dict(teacher=teacher, activations_student='0', activations_teacher='0')
    arms = dict(alone=None, own=dict(loss=FitNet, adapters=own, **maps), vid=dict(loss=vid, **maps))
    was,size = deepcopy(own['0'].state_dict()),len(list(vid.parameters()))
    together = Study(make, arms).run(2, [0, 1], progress=False).runs.set_index(['arm', 'seed']).valid_loss
    for arm in ('vid', 'own'):
        lone = Study(make, {arm: arms[arm]}).run(2, [1], progress=False).runs
        assert lone.valid_loss[0]==together[arm, 1]
    assert all(torch.equal(v, was[k]) for k,v in own['0'].state_dict().items()) and len(list(vid.parameters()))==size


def test_a_factory_makes_each_run_s_callback(teacher):
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
    made = []
    def kd(): made.append(KD(teacher, SoftTarget)); return made[-1]
    study = Study(make, dict(alone=None, kd=kd)).run(1, 2, progress=False)
    as_dict = Study(make, dict(alone=None, kd=dict(teacher=teacher, loss=SoftTarget))).run(1, 2, progress=False)
    assert len(made)==2 and study.tests('valid_loss')==as_dict.tests('valid_loss')!={}


def test_lengths_and_equal_time(teacher):
    def fit(learn, epochs, cbs): learn.fit(epochs, cbs=cbs); return dict(seconds=epochs*(2. if cbs else 1.))
    study = Study(make, dict(alone=None, kd=dict(teacher=teacher, loss=Logits)), fit=fit)
    assert 'at equal time' not in study.run([1], 3, progress=False).verdict('valid_loss') # nothing took as long
    study.run([2], 3, ['alone'], progress=False)
    r = study.table('valid_loss').set_index(['arm', 'epochs']).loc['kd', 1]
    runs = study.runs.set_index(['arm', 'epochs', 'seed']).valid_loss
    assert r.time==2 and r.alone_epochs==2
    assert r.gain==pytest.approx((runs['kd', 1]-runs['alone', 1]).mean())
    assert r.same_time==pytest.approx((runs['kd', 1]-runs['alone', 2]).mean())
    assert 'kd, 1 epochs at equal time: ' in study.verdict('valid_loss')


def test_an_experiment_of_a_regression():
    set_seed(0)
    teacher = _net(16, 1)
    exp = Experiment(_dls(64, regression=True), teacher, partial(_net, 6, 1), Logits, lr=1e-2, metrics=mse,
                     loss_func=MSELossFlat(), weight=0.5)
    exp.train_teacher(20)
    exp.run([1, 2], 3)
    assert exp.table().columns[2]=='mse'
    assert len(exp.runs)==6 and len(exp.pairs)==3
    assert exp.best[0]==exp.runs.query('epochs==2').distilled.min()
    raw = {n:(g.distilled-g.alone) for n,g in exp.runs.groupby('epochs')}
    assert {n:t.diff for n,t in exp.tests().items()}==pytest.approx({n:d.mean() for n,d in raw.items()})
    assert exp.verdict().count('adjusted p')==2 and ' mse (95%' in exp.verdict()


@pytest.mark.parametrize('metrics', [None, []])
def test_an_experiment_without_a_metric_is_judged_by_its_loss(teacher, metrics):
    exp = Experiment(_dls(), teacher, _net, lr=.05, metrics=metrics, loss_func=CrossEntropyLossFlat())
    exp.run(1, 2, progress=False)
    assert exp.table().columns[2]=='valid_loss' and ' valid_loss (95%' in exp.verdict()
    assert exp.best[0]==exp.runs.distilled.min()

def test_a_network_where_a_function_makes_one_is_refused(teacher):
    for make_one,args in ((Experiment, (_dls(), teacher, _net())), (Study, (make(), {'alone':None}))):
        with pytest.raises(TypeError, match='must be a function that makes a new one for each run, got (Seq|Learner)'):
            make_one(*args)

@pytest.mark.parametrize('name', ['teacher', 'alone', 'epochs', 'seed', 1, None])
def test_names_that_an_experiment_has_are_refused_before_it_trains(teacher, name):
    with pytest.raises((ValueError, TypeError), match=f'arms: .*{name!r}'):
        Experiment(_dls(), teacher, _net, loss_func=CrossEntropyLossFlat(), arms={'a':{}, name:{}})
    with pytest.raises(TypeError, match="arms: 'a' must be a dict of the callback's arguments, got NoneType"):
        Experiment(_dls(), teacher, _net, loss_func=CrossEntropyLossFlat(), arms={'a':None})

def test_p_values_of_an_experiment_count_its_lengths(teacher):
    from scipy import stats
    exp = Experiment(_dls(), teacher, _net, Logits, lr=0.05, weight=0.9,
                     loss_func=CrossEntropyLossFlat()).run([1, 3, 6], 4)
    raw = [stats.ttest_rel(g.distilled, g.alone).pvalue for _,g in exp.runs.groupby('epochs')]
    if not any(p!=p for p in raw):
        assert [t.p for t in exp.tests().values()]==pytest.approx(stats.false_discovery_control(raw))


def test_a_study_that_learned_a_new_teacher_forgets_the_old_runs(teacher, tmp_path):
    study = Study(make, dict(alone=None, kd=dict(teacher=teacher, loss=Logits)),
                  tmp_path/'r.csv').run([1, 2], 2, progress=False)
    with torch.no_grad(): teacher[1].bias.add_(1)
    study.run(1, 2, progress=False)
    sizes = study.runs.groupby(['arm', 'epochs']).size().to_dict()
    assert sizes=={('alone', 1):2, ('alone', 2):2, ('kd', 1):2}
    assert len(study.log.rows)==10


def zeros():
    "Of one class alone: whoever answers NaN is right"
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    ds = TensorDataset(x, torch.zeros(24, dtype=torch.long))
    return DataLoaders(*(TfmdDL(ds, bs=8) for _ in range(2)), device='cpu')

def no_number(pred, teacher_pred): return (pred*float('nan')).mean()

def test_an_arm_that_diverged_is_not_called_better(teacher, tmp_path):
    arms = dict(alone=None, bad=dict(teacher=teacher, loss=no_number), good=dict(teacher=teacher, loss=Logits))
    for _ in range(2): # the second time out of its file
        study = Study(partial(make, zeros(), lr=1e-6), arms, tmp_path/'r.csv').run(1, 2, progress=False)
        assert study.runs.query("arm=='bad'").accuracy.eq(1).all() # and better than alone
        first,*others = study.verdict().split('\n')
        assert first=='bad, 1 epochs: diverged, valid_loss is no finite number for 2 of 2 seeds'
        assert others and all(l.startswith('good, 1 epochs') for l in others) and study.diverged()=={('bad', 1): [0, 1]}
        for metric in ('accuracy', 'valid_loss'):
            table = study.table(metric)
            assert table.arm.iloc[-1]=='bad' and table.diverged.tolist()==[0, 0, 2]

def test_without_a_validation_loss_nothing_diverges():
    study = Study(make, dict(alone=None, other=lambda: None), measure=lambda learn: dict(accuracy=.5))
    assert study.run(1, 2, progress=False).diverged()=={} and 'diverged' not in study.table() and len(study.tests())==1

def test_an_experiment_has_no_best_arm_that_diverged(teacher):
    def net(): return _net()
    exp = Experiment(zeros(), teacher, net, lr=1e-6, metrics=[accuracy], loss_func=CrossEntropyLossFlat(),
                     arms=dict(bad=dict(loss=no_number), good=dict(loss=Logits))).run(1, 2, progress=False)
    assert exp.runs.bad.eq(1).all() and exp.best_arm=='good' and 'bad, 1 epochs: diverged' in exp.verdict()
    assert not exp.diverged and exp.best[1] is exp.study.models['good', 1, int(exp.runs.good.idxmax())]

def test_where_every_student_diverged_none_is_offered(teacher, tmp_path):
    exp = Experiment(zeros(), teacher, _net, lr=1e-6, metrics=[accuracy], loss_func=CrossEntropyLossFlat(),
                     loss=no_number).run(1, 2, progress=False)
    assert exp.diverged and headline(exp).endswith('every distilled student diverged')

@pytest.mark.parametrize('bad_seeds', [(0,), (0, 1, 2)])
def test_runs_without_a_number_leave_the_others_as_they_are(teacher, bad_seeds):
    arms = dict(bad=dict(loss=no_number), good=dict(loss=Logits))
    exp = Experiment(_dls(), teacher, _net, lr=.01, metrics=None, loss_func=CrossEntropyLossFlat(), arms=arms)
    exp.run(1, 3, progress=False)
    for r in exp.study.log.rows:
        if r['arm']=='bad' and int(r['seed']) not in bad_seeds: r.update(valid_loss='0.7')
    runs = exp.runs
    assert len(runs)==3 and runs.bad.isna().tolist()==[s in bad_seeds for s in range(3)] and exp.best_arm=='good'
    table = exp.table().set_index('model').valid_loss
    assert table['student good']==pytest.approx(runs.good.mean()) and math.isnan(table['student bad'])
    assert table['student alone']==pytest.approx(runs.alone.mean()) and exp.best[0]==runs.good.min()
    assert len(exp.pairs)==3 and {*exp.learners()}=={'teacher', 'alone', 'bad', 'good'}

def test_students_whose_weights_are_gone(teacher, tmp_path):
    def experiment():
        return Experiment(_dls(), teacher, _net, lr=.01, loss_func=CrossEntropyLossFlat(), folder=tmp_path)
    experiment().run(1, 2, progress=False)
    for o in (tmp_path/'students').iterdir(): o.unlink()
    exp = experiment().run(1, 2, progress=False)
    assert len(exp.runs)==2
    for ask in (lambda: exp.best, lambda: exp.typical, exp.learners):
        with pytest.raises(ValueError, match="the student's weights are not there: bring them"): ask()

def seconds(pred, y): return accuracy(pred, y)

asking = dict(
    study=lambda net, ms: Study(partial(make, metrics=ms), dict(alone=None)),
    sweep=lambda net, ms: sweep(partial(make, metrics=ms), net, dict(T=[1, 2])),
    experiment=lambda net, ms: Experiment(_dls(), net, _net, metrics=ms, loss_func=CrossEntropyLossFlat()),
    answer=lambda net, ms: should_i_distil(_net, net, _dls(), metrics=ms, loss_func=CrossEntropyLossFlat()),
    generations=lambda net, ms: born_again(partial(make, metrics=ms)),
    assistants=lambda net, ms: assistants(lambda w: make(net=partial(_net, w), metrics=ms), [5, 4], net),
    noisy=lambda net, ms: noisy_student(partial(make, metrics=ms), _dls(), torch.randn(5, 4)),
    compare=lambda net, ms: compare(dict(a=make(metrics=ms), b=net)))

@pytest.mark.parametrize('who', asking)
def test_metrics_of_one_name_are_refused_before_any_training(teacher, monkeypatch, who):
    monkeypatch.setattr(Learner, 'fit', None)
    ks = [partial(top_k_accuracy, k=1), partial(top_k_accuracy, k=2)]
    lambdas = [lambda p, y: 0., lambda p, y: 1.]
    cases = {"2 of them are called 'top_k_accuracy'": ks, "2 of them are called '<lambda>'": lambdas}
    if who!='compare': cases["'seconds' is another column's name"] = [accuracy, seconds]
    for said,metrics in cases.items():
        with pytest.raises(ValueError, match=said): asking[who](teacher, metrics)

@pytest.mark.parametrize('name,arm,said', [
    ('mix', MixUp(), "'mix' must be .*, got MixUp: give its class"), ('mix', [MixUp], 'got list'),
    ('a', 'KD', 'got str'), ('a', _net(), 'got Sequential'), (None, None, 'a name must be text, got None')])
def test_an_arm_that_gives_no_callback_to_each_run(name, arm, said):
    with pytest.raises(TypeError, match=f'arms: .*{said}'): Study(make, {'alone':None, name:arm})

def test_where_there_is_no_difference_to_tell_it_says_why(teacher):
    arms = {k: dict(teacher=teacher, weight=w) for k,w in dict(a=.1, b=.9).items()}
    def said(study):
        with pytest.raises(ValueError, match='nothing to draw') as e: study.plot()
        assert study.verdict() in str(e.value)
        return study.verdict()
    assert "No arm is the task alone: say which" in said(Study(make, arms).run(1, 2, progress=False))
    assert Study(make, arms, baseline='a').run(1, 2, progress=False).verdict().startswith('b, 1 epochs:')
    study = Study(make, dict(alone=None, **arms)).run(1, 1, 'alone', progress=False)
    assert said(study)=="Only 'alone' was run, there is nothing to compare with."
    assert said(study.run(1, 1, progress=False)).startswith('One seed is an anecdote')
    assert said(study.run(1, 2, 'b', progress=False)).startswith("No arm shares two seeds with 'alone', at one")
    assert study.run(1, 2, 'alone', progress=False).verdict().startswith('b, 1 epochs:')

def test_data_without_a_validation_are_refused_before_any_training(teacher):
    dls = zeros()
    dls.loaders[1] = dls.valid.new(TensorDataset(*(t[:0] for t in dls.valid_ds.tensors)))
    with pytest.raises(ValueError, match='no validation samples'): Study(partial(make, dls), dict(alone=None))
    with pytest.raises(ValueError, match='no validation samples'):
        Study(partial(make, DataLoaders(dls.train)), dict(alone=None))
    assert Study(partial(make, dls), dict(alone=None), measure=lambda learn: dict(n=1)).run(1, 1, progress=False)


@pytest.mark.parametrize('path', [None, 'r.csv'])
def test_the_numbers_of_fit_and_measure_are_kept(tmp_path, path):
    def fit(learn, epochs, cbs): learn.fit(epochs, cbs=cbs); return dict(steps=4*epochs, epochs=99)
    def own(learn): return dict(myscore=learn.model[1].bias.sum().item(), big=True)
    path = path and tmp_path/path
    plain = Study(make, {'alone':None}, path, fit=fit).run(1, 2, progress=False)
    study = Study(make, {'alone':None, 'other':lambda: None}, path, fit=fit, measure=own).run([1, 2], 2, progress=False)
    runs = study.runs
    assert runs.steps.tolist()==[4*n for n in runs.epochs] and set(runs.epochs)=={1, 2}
    assert len(runs)==8 and runs.myscore.notna().all() and runs.valid_loss.isna().all()
    assert study.table('myscore').myscore.notna().any() and len(study.log.rows)==(10 if path else 8) # and `plain`'s
    with pytest.raises(ValueError, match="did you mean 'myscore'"): study.table('myscor')
    if not path: return
    again = Study(make, {'alone':None, 'other':lambda: None}, path, fit=fit, measure=own).run([1, 2], 2, progress=False)
    assert again.runs.equals(runs) and len(path.read_text().splitlines())==1+10
    assert plain.run(1, 2, progress=False).runs.steps.tolist()==[4, 4]


# --- what cannot be asked

@pytest.mark.parametrize('epochs', [0, -1, True, 1.5, '3', None, [1, 0], [1, 'a'], []])
def test_lengths_that_are_none(epochs):
    study = Study(make, {'alone':None})
    with pytest.raises(ValueError, match='epochs (must be whole numbers from 1 on, got|is empty)'): study.run(epochs, 1)
    assert not study.log.rows and not study.asked

def test_seeds_and_arms_by_themselves():
    import numpy as np
    study = Study(make, {'alone':None, 'b':None})
    with pytest.raises(ValueError, match='seeds: tables would round those above 2.53'): study.run(1, [2**60, 2**60+1])
    for seeds in (True, '3', 1.5, -1, [0, -1], None):
        with pytest.raises(ValueError, match='seeds must be whole numbers from 0 on, got'): study.run(1, seeds)
    runs = study.run(np.int64(1), np.int64(2), 'alone', progress=False).runs
    assert runs.seed.tolist()==[0, 1] and set(runs.arm)=={'alone'}
    assert len(study.run(1, np.array([0, 1]), progress=False).log.rows)==4

def test_before_any_run(teacher):
    study = Study(make, {'alone':None, 'b':None})
    exp = Experiment(_dls(), teacher, _net, lr=.05, loss_func=CrossEntropyLossFlat())
    for ask in (study.table, study.verdict, study.plot, exp.learners, exp.plot, exp.run_as_long, lambda: exp.best,
                lambda: exp.best_arm, lambda: exp.typical):
        with pytest.raises(ValueError, match='no runs: call `run`'): ask()
    assert study._repr_html_()=='<p>no runs yet</p>' and exp.pairs=={} and exp.tests()=={} and not len(exp.runs)

@pytest.mark.parametrize('cell', ['oops', '0,5'])
def test_an_edited_cell_is_named_with_its_file(tmp_path, cell):
    path,arms = tmp_path/'r.csv',{'alone':None, 'b':lambda: None}
    Study(make, arms, path).run(1, 2, progress=False)
    rows = list(csv.reader(path.open()))
    def edited(value):
        rows[-1][rows[0].index('accuracy')] = value
        with path.open('w', newline='') as f: csv.writer(f, lineterminator='\n').writerows(rows)
        return Study(make, arms, path).run(1, 2, progress=False)
    study = edited(cell)
    for ask in (study.table, study.verdict, study.tests):
        with pytest.raises(ValueError, match=f"r.csv' has '{cell}' for accuracy, expected a number"): ask()
    assert edited('').verdict().startswith('b, 1 epochs: nothing can be told, accuracy is no number in some run')

def test_an_experiment_says_so_where_a_metric_is_missing(teacher):
    exp = Experiment(_dls(), teacher, _net, lr=.05, loss_func=CrossEntropyLossFlat()).run(1, 2, progress=False)
    exp.study.log.rows[0]['accuracy'] = ''
    assert 'nothing can be told' in exp.verdict() and 'nan' not in exp.verdict()

def test_a_kept_student_that_was_cut_is_named(teacher, tmp_path):
    args = dict(lr=.05, loss_func=CrossEntropyLossFlat(), folder=tmp_path)
    Experiment(_dls(), teacher, _net, **args).run(1, 1, progress=False)
    for f in (tmp_path/'students').iterdir(): f.write_bytes(f.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"\.pth' holds no student"):
        Experiment(_dls(), teacher, _net, **args).run(1, 1, progress=False).best


# --- the log

def _add(path, name, n):
    log = RunLog(path, ['who', 'i'])
    for i in range(n): log.add(dict(who=name, i=i))

def test_two_processes_share_a_file(tmp_path):
    jobs = [get_context('spawn').Process(target=_add, args=(tmp_path/'r.csv', name, 40)) for name in 'ab']
    for j in jobs: j.start()
    for j in jobs: j.join(120)
    rows = list(csv.reader((tmp_path/'r.csv').open()))
    assert rows[0]==['who', 'i'] and len(rows)==81 and sorted(p.name for p in tmp_path.iterdir())==['r.csv']
    for name in 'ab': assert [r[1] for r in rows if r[0]==name]==[str(i) for i in range(40)]

def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, 'write', lambda fd, data: write(fd, data[:3]))
    log = RunLog(tmp_path/'r.csv', ['a', 'b'])
    log.add(dict(a='a long value, with a comma', b='two\nlines'))
    monkeypatch.undo()
    assert RunLog(tmp_path/'r.csv', ['a', 'b']).rows==[dict(a='a long value, with a comma', b='two\nlines')]

def test_rows_that_do_not_fit_are_said_and_kept(tmp_path):
    path = tmp_path/'r.csv'
    for raw,rows in ((b'a,b\n\n1,2\n', 1), (b'a,b\n9\n1,2\n', 1), (b'a,b\r\n1,2\r\n', 1),
                     (b'\xef\xbb\xbfa,b\n1,2\n', 1), (b'a,b\n"1,2\n3,4\n', 1)):
        path.write_bytes(raw)
        if b'\n9\n' in raw or b'"' in raw:
            with pytest.warns(UserWarning, match='1 rows do not have 2 fields'): log = RunLog(path, ['a', 'b'])
        else: log = RunLog(path, ['a', 'b'])
        assert len(log.rows)==rows and path.read_bytes()==raw
    path.write_bytes(raw := 'a,b\nr\xe9,3\n'.encode('latin-1'))
    with pytest.raises(ValueError, match='r.csv.*no text in UTF-8'): RunLog(path, ['a', 'b'])
    assert path.read_bytes()==raw


# --- report and pictures

def test_a_broken_figure_costs_nothing_else(tmp_path):
    runs = [dict(arm=a, epochs=1, seed=s, seconds=1., accuracy=v+s/10)
            for a,v in (('alone', 0.1), ('b', 0.3)) for s in range(2)]
    import pandas as pd
    table = summary(pd.DataFrame(runs))
    def broken(): raise ValueError('$5_$10')
    with pytest.warns(UserWarning, match="the figure 'Seeds' cannot be drawn"):
        page = save_report(tmp_path, table, {'Seeds':broken}, dict(a='<b>'))
    assert '<b>' not in page.read_text() and (tmp_path/'report.csv').exists() and not list(tmp_path.glob('*.png'))
    assert list(by_arm(pd.DataFrame(runs)))==[('alone', 1), ('b', 1)]


@pytest.mark.parametrize('where', ['tensors', 'items', 'labels'])
def test_edited_rows_are_other_runs_though_the_first_batch_is_the_same(tmp_path, where):
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    labels = {i: i%3 for i in range(200)}
    def rows():
        if where=='tensors': return TensorDataset(x, torch.tensor(list(labels.values())))
        if where=='items': return [(x[i], y) for i,y in labels.items()]
        return Datasets(list(labels), [[lambda i: x[i]], [lambda i: labels[i]]])
    def make():
        dls = DataLoaders(*(TfmdDL(rows(), bs=8, num_workers=0) for _ in range(2)), device='cpu')
        return Learner(dls, nn.Linear(6, 3), CrossEntropyLossFlat())
    def again():
        study = Study(make, dict(alone=None), tmp_path/'log.csv')
        study.run(1, 1, progress=False)
        return len(pd.read_csv(tmp_path/'log.csv'))
    assert [again(), again()]==[1, 1]
    for i in range(100, 200): labels[i] = (labels[i]+1)%3
    assert again()==2


def test_loaders_of_pytorch_itself(tmp_path):
    ds = TensorDataset(torch.randn(24, 6), torch.arange(24)%3)
    dls = DataLoaders(*[torch.utils.data.DataLoader(ds, batch_size=8)]*2, device='cpu')
    study = Study(lambda: Learner(dls, nn.Linear(6, 3), CrossEntropyLossFlat(), metrics=accuracy), dict(alone=None))
    study.run(1, 2, progress=False)
    assert len(study.runs)==2 and study.runs.accuracy.between(0, 1).all()


@pytest.mark.parametrize('name', ['msle', 'exp_rmspe', 'brier_score_multi', 'ece', 'kl_divergence', 'MSE', 'wer',
                                  'word_information_lost', 'lpips', 'neg_distance', 'd2_loss'])
def test_less_of_an_error_is_better(name): assert lower_is_better(name)


@pytest.mark.parametrize('name', ['accuracy', 'r2_score', 'cohen_kappa', 'precision_score', 'speaker_f1', 'dice',
                                  'neg_mean_squared_error', 'valid_neg_log_loss', 'd2_absolute_error_score'])
def test_more_of_a_score_is_better(name): assert not lower_is_better(name)


def test_a_run_that_keeps_no_student_finds_none_in_the_folder(tmp_path):
    arms = {'alone':None, 'b':None}
    Study(make, arms, tmp_path/'log.csv', keep=tmp_path/'students').run([1, 2], 1, progress=False)
    again = Study(make, arms, tmp_path/'log.csv', keep=tmp_path/'students').run(1, 2, progress=False)
    of_one_epoch = {(arm, 1, seed) for arm in arms for seed in (0, 1)}
    assert {*again.models}==of_one_epoch
    again.run(2, 1, ['alone'], progress=False, keep=False)
    assert {*again.models}==of_one_epoch
