"Sweeps: every run depends on its seed alone, whatever came before it, and nothing finished is lost"

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, error_rate
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import DecoupledKD, FitNet, Logits, SoftTarget
from fasterai.distill.study.sweep import _arm, sweep
from fasterai.distill.teacher.teacher import Teacher

def _dls(n=48):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    y = (x[:, 0]>0).long()+(x[:, 1]>0).long()
    return DataLoaders(*(TfmdDL(TensorDataset(x, y), bs=8, shuffle=s, num_workers=0) for s in (True, False)),
                       device='cpu')

SHARED = _dls()  # one for all learners: its random state must not travel from run to run

def student():
    return Learner(SHARED, nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 3)),
                   loss_func=CrossEntropyLossFlat(), metrics=[accuracy, error_rate], lr=0.05)

@pytest.fixture(scope='module')
def teacher():
    set_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

def _sweep(teacher, grid={'T':[1, 4], 'weight':[0.5, 0.9]}, seeds=(0, 1), **kw):
    return sweep(student, teacher, grid, epochs=1, seeds=seeds, progress=False, **kw)

def _numbers(res): return res.runs.drop(columns='seconds')

def test_a_teacher_without_parameters_teaches_and_has_no_row():
    runs = _sweep(nn.Sequential(nn.Flatten(), nn.LayerNorm(4, elementwise_affine=False)), {'loss':[First]}).runs
    assert sorted(runs.run)==['alone', 'alone', 'distilled', 'distilled'] and runs.valid_loss.notna().all()

def First(pred, teacher_pred): return (pred[:, 0]-teacher_pred[:, 0]).square().mean()

def test_every_point_and_seed_once(teacher):
    runs = _sweep(teacher).runs
    assert (runs.run=='teacher').sum()==1 and (runs.run=='alone').sum()==2
    d = runs[runs.run=='distilled']
    points = sorted(map(tuple, d[['T', 'weight', 'seed']].values.tolist()))
    assert points==[(T, w, s) for T in (1, 4) for w in (0.5, 0.9) for s in (0, 1)]

class StopAt(Callback):
    "A power cut in the n-th training"
    left = 0
    def before_fit(self):
        StopAt.left -= 1
        if StopAt.left==0 and not self.learn.lock.locked(): raise KeyboardInterrupt

@pytest.mark.parametrize('cut', [1, 4, 9])
def test_a_resumed_sweep_equals_an_uninterrupted_one(teacher, tmp_path, cut):
    def fit(learn, epochs, cbs): learn.fit_one_cycle(epochs, cbs=[*([cbs] if cbs else []), StopAt()])
    StopAt.left = 0
    whole,StopAt.left = _sweep(teacher, path=tmp_path/'whole.csv', fit=fit),cut
    part = tmp_path/'part.csv'
    with pytest.raises(KeyboardInterrupt): _sweep(teacher, path=part, fit=fit)
    done = part.read_text().count('\n')
    assert done==1+1+cut-1 # header, teacher, and the runs before the cut
    with open(part, 'a') as f: f.write('distilled,1,0.')
    torch.rand(7) # another state of the random stream
    resumed = _sweep(teacher, path=part, fit=fit)
    assert _numbers(resumed).equals(_numbers(whole))
    strip = lambda p: [l.rsplit(',', 1)[0] for l in p.read_text().splitlines()]
    assert strip(part)==strip(tmp_path/'whole.csv')

def _counting():
    "A `fit`, and the list that it adds to with each training"
    fits = []
    def fit(learn, epochs, cbs): fits.append(1); learn.fit(epochs, cbs=cbs)
    return fit,fits

def test_nothing_is_trained_twice(teacher, tmp_path):
    fit,fits = _counting()
    first = _sweep(teacher, path=tmp_path/'r.csv', fit=fit)
    assert len(fits)==2+2*2*2
    again = _sweep(teacher, path=tmp_path/'r.csv', fit=fit)
    assert len(fits)==10 and again.runs.equals(first.runs)
    more = _sweep(teacher, grid={'T':[1, 4, 9], 'weight':[0.5, 0.9]}, path=tmp_path/'r.csv', fit=fit)
    assert len(fits)==10+1*2*2 and len(more.runs)==1+2+3*2*2

def test_another_way_of_training_is_another_run(teacher, tmp_path):
    fit,fits = _counting()
    def shorter(learn, epochs, cbs): fit(learn, 0, cbs)
    a,b = (_sweep(teacher, {'T':[4]}, path=tmp_path/'r.csv', fit=f) for f in (fit, shorter))
    assert len(fits)==2*(2+2) and not _numbers(a).equals(_numbers(b)) and len(a.runs)==len(b.runs)==1+2+2
    assert (tmp_path/'r.csv').read_text().count('teacher,')==1 # judged once: nobody trains it

def _apart(path, teacher, make, **kw):
    """Runs of `make` and `teacher` in the file of other ones, and the number of fits

    Asserts that the runs are those of a file of their own"""
    (fit,fits),(plain,_) = _counting(),_counting()
    shared,own = (sweep(make, teacher, {'T':[4]}, epochs=1, seeds=(0, 1), path=p, fit=f, progress=False, **kw)
                  for p,f in ((path, fit), (None, plain)))
    assert _numbers(shared).equals(_numbers(own))
    return shared.runs.set_index(['run', 'seed']).valid_loss,len(fits)

def test_rows_of_another_teacher_are_not_taken(teacher, tmp_path):
    set_seed(7)
    other = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    (a,n),(b,m) = _apart(tmp_path/'r.csv', teacher, student),_apart(tmp_path/'r.csv', other, student)
    assert n==4 and m==2                                              # the student alone has no teacher
    assert a.loc['alone'].equals(b.loc['alone']) and (a.loc['distilled']!=b.loc['distilled']).all()
    by_hand = CrossEntropyLossFlat()(other.eval()(SHARED.valid.dataset.tensors[0]),
                                     SHARED.valid.dataset.tensors[1]).item()
    assert b.loc['teacher'].item()==pytest.approx(by_hand, rel=1e-5)!=a.loc['teacher'].item()
    # the same weights
    assert _apart(tmp_path/'r.csv', Learner(SHARED, teacher, loss_func=CrossEntropyLossFlat()), student)[1]==0

def test_rows_of_another_head_are_not_taken(teacher, tmp_path):
    (a,n),(b,m) = (_apart(tmp_path/'r.csv', Teacher(teacher, select=f), student) for f in (lambda o: o, lambda o: -o))
    assert (n, m)==(4, 2) and (a.loc['distilled']!=b.loc['distilled']).all()

def test_rows_of_another_learner_are_not_taken(teacher, tmp_path):
    def wider():
        return Learner(SHARED, nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)),
                       loss_func=CrossEntropyLossFlat(), metrics=[accuracy, error_rate], lr=0.05)
    def slower(): learn = student(); learn.lr = 1e-3; return learn
    assert [_apart(tmp_path/'r.csv', teacher, make)[1] for make in (student, wider, slower, student)]==[4, 4, 4, 0]
    assert (tmp_path/'r.csv').read_text().count('teacher,')==1

def test_rows_of_other_data_are_not_taken(teacher, tmp_path):
    def fewer(): learn = student(); learn.dls = _dls(40); return learn
    (a,n),(b,m) = _apart(tmp_path/'r.csv', teacher, student),_apart(tmp_path/'r.csv', teacher, fewer)
    assert (n, m)==(4, 4) and a.loc['teacher'].item()!=b.loc['teacher'].item()

def test_other_settings_are_other_runs(teacher, tmp_path):
    a = _sweep(teacher, {'T':[4]}, path=tmp_path/'r.csv', weight=0.9)
    b = _sweep(teacher, {'T':[4]}, path=tmp_path/'r.csv', weight=0.1)
    assert not _numbers(a).equals(_numbers(b)) and len(a.runs)==len(b.runs)==1+2+2
    assert (tmp_path/'r.csv').read_text().count('alone')==2

def test_order_of_the_grid_does_not_matter(teacher):
    a,b = (_sweep(teacher, {'T':Ts}, baseline=False).runs.set_index(['T', 'seed']).drop(columns='seconds').sort_index()
           for Ts in ([1, 4], [4, 1]))
    assert a.equals(b)

def test_weight_zero_is_the_student_alone(teacher):
    "Same initial weights, batches and dropout: the runs are pairs"
    runs = _sweep(teacher, {'weight':[0.]}).runs.set_index(['run', 'seed'])
    for s in (0, 1): assert runs.loc[('distilled', s), 'valid_loss']==runs.loc[('alone', s), 'valid_loss']

def test_random_state_and_teacher_are_left_alone(teacher):
    set_seed(5)
    before,weights = torch.get_rng_state(),{k:v.clone() for k,v in teacher.state_dict().items()}
    teacher.train()
    _sweep(teacher, {'T':[1]}, seeds=(0,))
    assert torch.equal(before, torch.get_rng_state()) and teacher.training
    assert all(torch.equal(v, weights[k]) for k,v in teacher.state_dict().items())

def test_table_by_hand(teacher):
    res = _sweep(teacher, {'T':[1, 4]}, seeds=(0, 1, 2))
    t = res.table('error_rate').set_index(['run', 'T'])
    acc = res.runs.set_index(['run', 'T', 'seed']).error_rate
    d = [acc['distilled', 4., s]-res.runs[(res.runs.run=='alone')&(res.runs.seed==s)].error_rate.item()
         for s in (0, 1, 2)]
    assert t.loc[('distilled', 4.), 'vs alone']==pytest.approx(sum(d)/3) and t.loc[('distilled', 4.), 'seeds']==3
    best = res.best('error_rate')['T']
    assert t.loc[('distilled', best), 'error_rate']==t.loc['distilled'].error_rate.min()
    assert res.best('accuracy')['T']==best

def test_a_point_that_diverged_is_not_the_best(teacher):
    def nan(pred, teacher_pred): return (pred*float('nan')).mean()
    def ones(): learn = student(); learn.metrics = [accuracy_of_ones]; return learn
    def accuracy_of_ones(pred, targ): return float(not pred.isfinite().all())
    def run(losses): return sweep(ones, teacher, {'loss':losses}, epochs=1, seeds=(0, 1), progress=False)
    res = run([nan, Logits])
    best = res.best('accuracy_of_ones')['loss']
    assert best in ('Logits', Logits) and res.best('valid_loss')['loss']==best
    assert res.table('valid_loss').set_index('loss').diverged[['nan', 'Logits']].tolist()==[2, 0]
    assert 'diverged' not in _sweep(teacher, {'T':[1]}).table()
    with pytest.raises(ValueError, match='every point has a run whose validation loss is no number'): run([nan]).best()

class Scaled(nn.Module):
    "A loss with a setting that its text does not show"
    def __init__(self, by):
        super().__init__()
        self.by = by
    def forward(self, pred, teacher_pred): return self.by*(pred-teacher_pred).pow(2).mean()
    def __repr__(self): return 'Scaled()'

def test_values_of_one_name_are_points_of_their_own(teacher, tmp_path):
    for name,vs in (('loss', [Scaled(1.), Scaled(9.)]), ('schedule', [lambda s,e,p: s+(e-s)*p, lambda s,e,p: e])):
        path = tmp_path/f'{name}.csv'
        res = _sweep(teacher, {name:vs}, seeds=(0,), baseline=False, path=path)
        assert len(res.runs)==len(res.table())==2 and res.runs[name].nunique()==res.runs.valid_loss.nunique()==2
        assert res.best()[name] in vs
        again = _sweep(teacher, {name:vs[::-1]}, seeds=(0,), baseline=False, path=path)
        assert sorted(again.runs[name])==sorted(res.runs[name]) and path.read_text().count('\n')==3
    assert len(_sweep(teacher, {'loss':[Scaled(1.), Scaled(1.)]}, seeds=(0,), baseline=False).runs)==1
    assert len(_sweep(teacher, {'T':[1, 1.]}, seeds=(0,), baseline=False).runs)==1

def test_the_best_values_are_those_of_the_grid(teacher):
    def best(grid, **kw):
        res = _sweep(teacher, grid, seeds=(0,), baseline=False, **kw)
        assert len(res.table('valid_loss'))==len(next(iter(grid.values())))
        return next(iter(res.best('valid_loss').values())),res
    assert best({'normalize':[True, False]}, loss=DecoupledKD)[0] in (True, False)
    assert best({'schedule':[None, 'cos']}, )[0] in (None, 'cos')
    assert best({'loss':[Logits, SoftTarget]})[0] in (Logits, SoftTarget)
    value,res = best({'T':[2, 3.5, 10]})
    assert value in (2, 3.5, 10) and res.runs['T'].tolist()==[2, 3.5, 10]
    assert type(best({'T':[3]})[0]) is int

def test_names_that_look_like_numbers_stay_names(teacher):
    def maps():
        learn = student()
        learn.model = nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.ReLU()), nn.ReLU(), nn.Linear(16, 3))
        return learn
    set_seed(0)
    net = maps().model
    res = sweep(maps, net, {'activations_student':['0', '0.0']}, epochs=1, seeds=(0, 1), progress=False, loss=FitNet,
                activations_teacher='0')
    assert res.best()['activations_student'] in ('0', '0.0')
    assert res.table().activations_student.tolist()==['', '', '0', '0.0']

def test_losses_schedules_and_names_as_values(teacher):
    runs = _sweep(teacher, {'loss':[SoftTarget, Logits], 'schedule':['cos', 'lin']}, seeds=(0,), baseline=False).runs
    assert set(runs.loss)=={'SoftTarget(T=5)',
                            'Logits'} and set(runs.schedule)=={'cos', 'lin'} and runs.valid_loss.nunique()==4

def test_hyper_parameters_reach_the_loss_that_has_them(teacher):
    seen = []
    def spy(pred, teacher_pred, T=1.): seen.append(T); return (pred-teacher_pred).pow(2).mean()
    _sweep(teacher, {'T':[2, 7]}, seeds=(0,), loss={spy:1, Logits:0.1}, baseline=False)
    assert set(seen)=={2, 7}

def test_two_parameters_make_two_plots(teacher):
    res = _sweep(teacher)
    axs = res.plot()
    assert len(axs)==2 and [a.get_xlabel() for a in axs]==['T', 'weight']
    line = axs[0].lines[0]
    if len(line.get_xdata())!=2: line = axs[0].containers[0].lines[0]
    x,y = line.get_data()
    assert y[0]==pytest.approx(res.runs[(res.runs['T']==x[0])&(res.runs.weight==0.5)].accuracy.mean())
    plt.close('all')

def test_bad_input(teacher, tmp_path):
    for grid,match in (({}, 'grid is empty'), ({'T':[]}, 'grid is empty'), ({'TT':[1]}, 'unknown hyper-parameter'),
                       ('temperatur', "did you mean 'temperature'"),
                       ({'schedule':[lambda s,e,p: e, object()]}, 'without a name of its own')):
        with pytest.raises(ValueError, match=match): _sweep(teacher, grid)
    with pytest.raises(ValueError, match='seeds is empty'): _sweep(teacher, seeds=())
    with pytest.raises(ValueError, match='seeds must differ'): _sweep(teacher, seeds=(1, 1))
    with pytest.raises(ValueError, match="did you mean 'weight'"): _sweep(teacher, {'T':[1]}, wieght=0.3)
    (tmp_path/'other.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='belongs to other runs'): _sweep(teacher, path=tmp_path/'other.csv')
    assert (tmp_path/'other.csv').read_text()=='a,b\n1,2\n'

def test_an_edited_cell_is_named_with_its_file(teacher, tmp_path):
    path = tmp_path/'r.csv'
    runs = _sweep(teacher, {'T':[4]}, seeds=2, path=path).runs
    assert runs.seed.dropna().tolist()==[0, 1, 0, 1]
    lines = path.read_text().splitlines()
    fields = lines[-1].split(',')
    fields[lines[0].split(',').index('error_rate')] = 'oops'
    path.write_text('\n'.join([*lines[:-1], ','.join(fields)])+'\n')
    with pytest.raises(ValueError, match="r.csv' has 'oops' for error_rate, expected a number"):
        _sweep(teacher, {'T':[4]}, seeds=2, path=path)

@pytest.mark.parametrize('text', ['', 'run,T'])
def test_a_file_without_a_whole_header(teacher, tmp_path, text):
    (tmp_path/'r.csv').write_text(text)
    assert len(_sweep(teacher, {'T':[1]}, seeds=(0,), path=tmp_path/'r.csv').runs)==3
    header = 'run,T,setting,seed,epochs,valid_loss,accuracy,error_rate,seconds\n'
    assert (tmp_path/'r.csv').read_text().startswith(header)

def test_a_loss_by_name_has_its_published_weights_with_hyper_parameters_too(teacher):
    arm = _arm(teacher, 'SoftTarget', {'T': 2, 'start_pct': .1}, {})
    assert KD(**arm).equation()==KD(teacher, 'SoftTarget', T=2, start_pct=.1).equation()
    assert KD(**_arm(teacher, 'DIST', {'loss': 'Logits', 'T': 2}, {})).equation()==KD(teacher, 'Logits').equation()
