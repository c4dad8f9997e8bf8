"Which teacher: the table against scipy, teachers of every kind, runs that are kept"
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import get_random_states, set_seed
from scipy import stats
from torch import nn

from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Logits, SoftTarget
from fasterai.distill.study.one_run import measure, quiet
from fasterai.distill.study.teacher_numbers import measure_teacher, sureness
from fasterai.distill.study.which_teacher import which_teacher
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import RecordedTeacher, TeacherCache
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from helpers import Boom, data, flags, n_hooks, net, same, state


def make(**kwargs):
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    return Learner(data(), model, CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD, lr=.5, **kwargs)

def plain_fit(learn, epochs, cbs): learn.fit(epochs, cbs=cbs)

kd = dict(loss=partial(SoftTarget, T=2), weight=.9)
run = partial(which_teacher, make, epochs=2, fit=plain_fit, progress=False, **kd)

@pytest.fixture
def nets(): return {f'net {i}': net(4+i, seed=i) for i in range(3)}


def test_the_table_is_scipy_s(nets):
    found = run(nets, seeds=4)
    vals = {k:v.sort_index().to_numpy() for k,v in found.values().items()}
    best = max(nets, key=lambda k: vals[k].mean())
    assert found.best==best and found.teacher is found.teachers[best]
    t = found.table.set_index('teacher')
    others = [k for k in vals if k!=best]
    tests = {k:stats.ttest_rel(vals[k], vals[best]) for k in others}
    ps = dict(zip(others, stats.false_discovery_control([tests[k].pvalue for k in others])))
    for k in others:
        row,ci = t.loc[k],tests[k].confidence_interval()
        assert row[['to_best', 'to_best_low', 'to_best_high']].tolist()==pytest.approx(
            [np.mean(vals[k]-vals[best]), ci.low, ci.high])
        assert row.to_best_p==pytest.approx(ps[k])
    for k in vals: assert t.ci[k]==pytest.approx(stats.sem(vals[k])*stats.t.ppf(.975, 3))
    assert np.isnan(t.to_best[best]) and np.isnan(t.own['alone'])
    assert t.accuracy.is_monotonic_decreasing


def test_runs_are_the_students_own_trainings(nets):
    found = run(nets, seeds=[7])
    set_seed(7)
    learn = make()
    same_start(learn.dls, 7)
    with quiet(learn): learn.fit(2, cbs=KnowledgeDistillationCallback(nets['net 1'], **kd))
    assert found.values()['net 1'][7]==pytest.approx(measure(learn)['accuracy'])
    assert 'to_best' not in found.table and found.verdict().endswith('run several.')
    found.plot()


def test_less_of_a_loss_is_better(nets):
    found = run(nets, seeds=2, metric='valid_loss')
    means = {k:found.values()[k].mean() for k in nets}
    assert found.best==min(means, key=means.get) and found.table.valid_loss.is_monotonic_increasing
    assert found.best in found.verdict() and '%' not in found.verdict()
    assert run(nets, seeds=2, metric='valid_loss', lowest=False).best==max(means, key=means.get)


def test_candidates_of_every_kind(nets):
    a,b,c = nets.values()
    learn = make()
    learn.model = c
    found = run({'module':a, 'ensemble':[a, b], 'teacher':Teacher([a, b]), 'learner':learn}, seeds=1)
    x,y = (torch.cat(o) for o in zip(*data().valid))
    for k,models in dict(module=[a], ensemble=[a, b], teacher=[a, b], learner=[c]).items():
        with torch.no_grad(): p = sum(m.eval()(x).softmax(1) for m in models)/len(models)
        own = found.facts[k]
        assert own['accuracy']==pytest.approx(float((p.argmax(1)==y).float().mean()))
        x0 = torch.stack([o[0] for o in data().train_ds])
        with torch.no_grad(): q = sum(m(x0).softmax(1) for m in models)/len(models)
        assert own['confidence']==pytest.approx(float(q.max(1).values.mean()), abs=1e-5)
        assert own['entropy']==pytest.approx(float(stats.entropy(q, axis=1).mean()), abs=1e-5)
    assert found.values()['ensemble'][0]==found.values()['teacher'][0]


def test_finished_runs_are_kept(nets, tmp_path):
    fits = []
    class Fit:
        def __call__(self, learn, epochs, cbs):
            fits.append(learn)
            if len(fits)==at: raise KeyboardInterrupt
            learn.fit(epochs, cbs=cbs)
    again = partial(run, nets, seeds=2, path=tmp_path/'runs.csv', fit=Fit())
    at = 6
    with pytest.raises(KeyboardInterrupt): again()
    fits,at = [],0
    found = again()
    assert len(fits)==3
    assert found.table.equals(again().table) and len(fits)==3
    whole = run(nets, seeds=2).table
    assert found.table.equals(whole)
    found.study.run(2, 3, progress=False) # more seeds: the table has them
    assert set(found.table.seeds)=={3} and len(fits)==7
    found.study.run(1, 1, progress=False) # another length is none of it
    assert set(found.table.seeds)=={3}


def test_teachers_and_streams_are_left_alone(nets):
    before = [(state(o), flags(o)) for o in nets.values()]
    set_seed(3)
    streams = get_random_states()['torch_state']
    run(nets, seeds=1)
    assert torch.equal(streams, get_random_states()['torch_state'])
    for o,(s,f) in zip(nets.values(), before): assert same(s, state(o)) and flags(o)==f and not n_hooks(o)


def test_a_teacher_is_measured_on_the_whole_batch_and_leaves_no_trace(nets):
    def crop(x): return x[..., :4, :4]
    t,learn = Teacher(nets['net 0'], cache=TeacherCache()),make(cbs=StudentSees(crop))
    model = learn.model
    own = measure_teacher(learn, t)
    assert own==pytest.approx(measure_teacher(make(), nets['net 0']))
    assert learn.model is model and not t.fits and len(learn.metrics)==1 and sureness(learn, t)
    class Bad(Callback):
        def after_pred(self): raise KeyboardInterrupt
    with learn.added_cbs(Bad()), pytest.raises(KeyboardInterrupt): measure_teacher(learn, t)
    assert learn.model is model and not t.fits


def test_no_teachers(nets):
    with pytest.raises(ValueError, match=r"two teachers by name, got \['net 0'\]"): run({'net 0':nets['net 0']})
    with pytest.raises(ValueError, match='got list'): run(list(nets.values()))
    with pytest.raises(TypeError, match='`checkpoints'): run({'a':nets['net 0'].state_dict(), 'b':nets['net 1']})
    with pytest.raises(TypeError, match='expected a Module'): run({'a':'net.pth', 'b':nets['net 1']})
    with pytest.raises(ValueError, match='unknown metric'): run(nets, metric='acuracy')
    with pytest.raises(TypeError, match='wieght'): run(nets, wieght=1)


def test_a_recorded_teacher_has_no_numbers_of_its_own_but_is_as_sure(nets, tmp_path):
    learn,live = make(),nets['net 0'].eval()
    record(live, learn, tmp_path, dtype=torch.float32)
    recorded = RecordedTeacher(tmp_path)
    assert sureness(learn, recorded)==pytest.approx(sureness(learn, live), rel=1e-5)
    own = measure_teacher(learn, recorded)
    assert list(own)==['valid_loss', 'accuracy'] and np.isnan([*own.values()]).all()
    t = run({'recorded':recorded, 'live':live}, seeds=1).table.set_index('teacher')
    assert t.accuracy.recorded==t.accuracy.live and t.confidence.recorded==pytest.approx(t.confidence.live)
    assert np.isnan(t.own.recorded) and t.own.live>0


class Huge(nn.Module):
    def __init__(self): super().__init__(); self.net = net(4)
    def forward(self, x): return self.net(x)*1e25


def test_a_teacher_whose_students_diverged_is_not_the_best():
    def student(): return Learner(data(y=torch.zeros(32, dtype=torch.long)), net(), CrossEntropyLossFlat(),
                                  metrics=accuracy, opt_func=SGD, lr=1e-3)
    found = which_teacher(student, dict(bad=Huge(), good=net(4)), epochs=1, seeds=2, loss=Logits, progress=False)
    assert found.values()['bad'].eq(1).all() and found.diverged()=={'bad': [0, 1]} # NaN is of class 0, which all are
    assert found.best=='good' and found.table.teacher.iloc[-1]=='bad' and 'bad' not in found.to_best()
    assert found.table.diverged.tolist()==[0, 0, 2] and 'bad diverged for 2 of 2 seeds.' in found.verdict()
    found.plot()
    worse = which_teacher(student, dict(a=Huge(), b=Huge()), epochs=1, seeds=1, loss=Logits, progress=False)
    with pytest.raises(ValueError, match="no teacher's students can be judged: a diverged for 1 of 1"): worse.best
    assert worse.verdict().startswith("No teacher's students can be judged: a diverged")
    assert worse.verdict() in repr(worse) and worse._repr_html_()
