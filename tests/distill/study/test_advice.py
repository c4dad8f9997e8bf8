"Advice on weights: gradients against autograd by hand, warnings where they are due, and a learner that notices nothing"
from copy import deepcopy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import TensorImage
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import Attention, FitNet, Logits, SoftTarget
from fasterai.distill.methods.exits import DeepSupervision
from fasterai.distill.methods.itself import SelfDistillation, kinds
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import RecordedTeacher
from helpers import data, learner, net

def _dls(x, y, bs=None):
    return DataLoaders(*(TfmdDL(TensorDataset(x, y), bs=bs or len(x), shuffle=s, num_workers=0) for s in (True, False)),
                       device='cpu')

@pytest.fixture
def small():
    "One batch is the whole data, so that a gradient can be worked out by hand"
    set_seed(0)
    x = torch.randn(32, 4)
    y = (x[:, 0]>0).long()+(x[:, 1]>0).long()
    teacher = nn.Linear(4, 3)
    with torch.no_grad(): teacher.weight.copy_(torch.tensor([[-4., -4, 0, 0], [0, 0, 0, 0], [4., 4, 0, 0]]))
    return Learner(_dls(x, y), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
                   loss_func=CrossEntropyLossFlat(), metrics=accuracy),teacher,x,y

def test_types_that_a_training_does_not_see(small):
    "PyTorch's own loss cannot take fastai's; the Learner casts them before it is asked"
    learn,teacher,x,y = small
    items = [(TensorImage(a), TensorCategory(b)) for a,b in zip(x, y)]
    dls = DataLoaders(*[TfmdDL(items, bs=32, num_workers=0) for _ in range(2)], device='cpu')
    typed = Learner(dls, learn.model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    a,b = (suggest_weights(o, KD(teacher, Logits), n_batches=1).table for o in (typed, learn))
    assert isinstance(dls.train.one_batch()[0], TensorImage)
    pd.testing.assert_frame_equal(a, b)

def test_gradients_by_hand(small):
    learn,teacher,x,y = small
    a = suggest_weights(learn, KD(teacher, {partial(SoftTarget, T=2):1, Logits:1}, weight=0.5), n_batches=1)
    m = deepcopy(learn.model)
    def grad(loss):
        m.zero_grad()
        loss(m(x)).backward()
        return torch.cat([p.grad.flatten() for p in m.parameters()])
    z = teacher(x).detach()
    task = grad(lambda p: F.cross_entropy(p, y))
    def soft_target(p): return 4*F.kl_div((p/2).log_softmax(1), (z/2).softmax(1), reduction='batchmean')
    def logits(p): return F.mse_loss(p, z)
    for name,loss in dict(SoftTarget=soft_target, Logits=logits).items():
        g = grad(loss)
        r = a.table.loc[name]
        assert r.gradient==pytest.approx(g.norm().item(), rel=1e-4)
        assert r.value==pytest.approx(loss(m(x)).item(), rel=1e-4)
        assert r.cosine==pytest.approx(F.cosine_similarity(g, task, 0).item(), abs=1e-4)
        assert r.suggested==pytest.approx((task.norm()/g.norm()).item(), rel=1e-4)
        assert r.weight==0.5
        assert r.pull==pytest.approx((g.norm()/task.norm()).item(), rel=1e-4)
    assert a.table.gradient.task==pytest.approx(task.norm().item(), rel=1e-4)

def test_the_suggestion_balances(small):
    learn,teacher,*_ = small
    first = suggest_weights(learn, KD(teacher, [SoftTarget, Logits]), ratio={'SoftTarget':0.5, 'Logits':3.})
    kd = KD(teacher, **first)
    assert suggest_weights(learn, kd).table.pull[1:].tolist()==pytest.approx([0.5, 3.], rel=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=kd)

def test_everything_else_of_the_callback_is_kept():
    learn = Learner(digits_dls(64, n_valid=30, device='cpu'), digits_net(4), metrics=accuracy)
    kd = KD(digits_net(8), FitNet, '1', '2', schedule='cos', start_pct=0.2, valid=True)
    new = KD(digits_net(8), **suggest_weights(learn, kd, n_batches=1))
    kept = 'layers_s','layers_t','schedule','window','valid','adapters'
    assert all(getattr(new.recipe, k)==getattr(kd.recipe, k) for k in kept) and new.recipe.valid
    assert new.recipe.weight==new.recipe.task_weight==1

def test_nothing_is_left_behind():
    learn = Learner(digits_dls(128, n_valid=64, device='cpu'), nn.Sequential(digits_net(4), nn.Dropout(0.5)),
                    metrics=accuracy)
    learn.model[0][1].eval()
    teacher = digits_net(8)
    kd = KD(teacher, [SoftTarget, Attention], ['0.1'], ['1'])
    before = [deepcopy(m.state_dict()) for m in (learn.model, teacher)]
    modes,rng,order = [m.training for m in learn.model.modules()],torch.get_rng_state(),learn.dls.train.rng.getstate()
    a = suggest_weights(learn, kd)
    for m,b in zip((learn.model, teacher), before): assert all(torch.equal(v, b[k]) for k,v in m.state_dict().items())
    assert all(p.grad is None for m in (learn.model, teacher) for p in m.parameters())
    assert modes==[m.training for m in learn.model.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert order==learn.dls.train.rng.getstate()
    assert learn.opt is None and not any(len(m._forward_hooks) for m in learn.model.modules())
    assert a.table.equals(suggest_weights(learn, kd).table)

def test_modes_and_buffers_return_after_an_error():
    learn = Learner(digits_dls(64, n_valid=30, device='cpu'), digits_net(4))
    learn.model[0].eval()
    def broken(pred, teacher_pred): raise RuntimeError('no')
    before,modes = deepcopy(learn.model.state_dict()),[m.training for m in learn.model.modules()]
    with pytest.raises(RuntimeError, match='broken'): suggest_weights(learn, KD(digits_net(4), broken))
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert modes==[m.training for m in learn.model.modules()]

def _notes(learn, teacher, loss, **kw): return ' | '.join(suggest_weights(learn, KD(teacher, loss, **kw)).notes)

def tiny(pred, teacher_pred): return 1e-6*(pred-teacher_pred).pow(2).mean()
def against(pred, target): return -F.cross_entropy(pred, target)
def deaf(pred, teacher_pred): return teacher_pred.mean()

def test_warnings_where_they_are_due(small):
    learn,teacher,*_ = small
    assert 'asleep' in _notes(learn, teacher, tiny) and 'asleep' not in _notes(learn, teacher, Logits)
    assert 'fights the task' in _notes(learn, teacher, against) and 'fights' not in _notes(learn, teacher, Logits)
    assert 'no gradient at all' in _notes(learn, teacher, deaf)
    assert 'drowns' in _notes(learn, teacher, Logits, weight=1e4,
                              task_weight=1) and 'drowns' not in _notes(learn, teacher, Logits)

def test_a_deaf_term_keeps_its_weight(small):
    learn,teacher,*_ = small
    assert suggest_weights(learn, KD(teacher, deaf, weight=0.3)).table.suggested['deaf']==pytest.approx(0.3)

def test_one_hot_teacher_raise_the_temperature(small):
    learn,teacher,x,_ = small
    with torch.no_grad(): teacher.weight.mul_(50); teacher.bias.zero_()
    notes = _notes(learn, teacher, partial(SoftTarget, T=1))
    assert 'near one-hot' in notes
    T = float(notes.split('raise T to about ')[1].split()[0])
    assert 1-(teacher(x)/T).softmax(1).amax(1).mean().item()==pytest.approx(0.1, abs=0.02)
    assert 'one-hot' not in _notes(learn, teacher,
                                   partial(SoftTarget, T=T)) and 'one-hot' not in _notes(learn, teacher, Logits)

class Smoothed(nn.Module):
    "Sure of the label, and indifferent among the rest"
    def forward(self, x):
        y = (x[:, 0]>0).long()+(x[:, 1]>0).long()
        return 4*F.one_hot(y, 3).float()+0.1*x[:, :3]

def test_label_smoothed_teacher_lower_the_temperature(small):
    learn,teacher,*_ = small
    assert 'label smoothing' in _notes(learn, Smoothed(), partial(SoftTarget, T=8))
    assert 'label smoothing' not in _notes(learn, Smoothed(), partial(SoftTarget, T=1))
    assert 'label smoothing' not in _notes(learn, teacher, partial(SoftTarget, T=8))

def test_a_teacher_that_is_no_better(small):
    learn,teacher,*_ = small
    assert 'no better' not in _notes(learn, teacher, SoftTarget)
    assert 'no better' in _notes(learn, deepcopy(learn.model), SoftTarget)

def test_regression_compares_losses():
    set_seed(0)
    x = torch.randn(32, 4)
    y = x.sum(1, keepdim=True)
    good,bad = nn.Linear(4, 1),nn.Linear(4, 1)
    with torch.no_grad(): good.weight.fill_(1.); bad.weight.fill_(-1.)
    learn = Learner(_dls(x, y), nn.Linear(4, 1), loss_func=MSELossFlat())
    assert 'no better' not in _notes(learn, good, Logits) and 'its validation loss' in _notes(learn, bad, Logits)

def test_a_large_last_batch_counts_more():
    set_seed(0)
    learn = Learner(digits_dls(64, n_valid=70, device='cpu'), digits_net(4), metrics=accuracy)
    teacher = digits_net(4)
    suggest_weights(learn, KD(teacher, SoftTarget))
    from fasterai.distill.study.advice import _judge
    _,s,t = _judge(learn, KD(teacher, SoftTarget), 10)
    with learn.no_bar(), learn.no_logging(): assert s==pytest.approx(learn.validate()[1])

def test_bad_input(small):
    learn,teacher,x,y = small
    with pytest.raises(ValueError, match="did you mean 'Logits'"):
        suggest_weights(learn, KD(teacher, Logits), ratio={'Logit':1.})
    with pytest.raises(ValueError, match='ratio must be positive'):
        suggest_weights(learn, KD(teacher, Logits), ratio=-1)
    bare = TfmdDL(TensorDataset(x), bs=8, num_workers=0, n_inp=1)
    with pytest.raises(ValueError, match='no labels'):
        suggest_weights(Learner(DataLoaders(bare, bare), learn.model, loss_func=learn.loss_func), KD(teacher, Logits))
    for p in learn.model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='n_batches must be a whole number from 1 on, got 0'):
        suggest_weights(learn, KD(teacher, Logits), n_batches=0)
    with pytest.raises(ValueError, match='unfreeze'): suggest_weights(learn, KD(teacher, Logits))

def test_it_prints_as_a_table(small):
    learn,teacher,*_ = small
    a = suggest_weights(learn, KD(teacher, tiny))
    text,html = repr(a),a._repr_html_()
    assert 'tiny' in text and '- tiny: asleep' in text
    assert '<li>tiny: asleep' in html and '<table' in html


@pytest.mark.parametrize('views', [None, 2])
def test_a_recorded_teacher_is_asked_as_in_a_training(small, tmp_path, views):
    learn,teacher,*_ = small
    learn = Learner(_dls(*small[2:], bs=8), learn.model, learn.loss_func)
    record(teacher, learn, tmp_path, views=views, dtype=torch.float32)
    recorded = RecordedTeacher(tmp_path)
    order = learn.dls.train.rng.getstate()
    a,b = (suggest_weights(learn, KD(o, [SoftTarget, Logits]), n_batches=4) for o in (recorded, teacher))
    found = [o.table.drop('task')[['value', 'gradient']].to_numpy() for o in (a, b)]
    assert np.allclose(*found, rtol=.3)
    assert (recorded.cache.hits, recorded.cache.passes, recorded.fits, learn.training)==(0, 0, 0, False)
    assert learn.dls.train.rng.getstate()==order and 'create_batches' not in vars(learn.dls.train)
    learn.fit(1, cbs=KD(recorded, SoftTarget))
    assert recorded.cache.hits==32


@pytest.mark.parametrize('kind', kinds)
def test_who_teaches_itself_is_weighed_too(kind):
    learn = learner(dls=data(n=64))
    table = suggest_weights(learn, SelfDistillation(kind)).table
    assert table.loc['task', 'gradient']>0 and table.gradient.notna().all()


def test_the_student_runs_once_a_batch_unless_its_teacher_repeats_it():
    learn,seen = learner(dls=data(n=64)),[]
    learn.model.register_forward_hook(lambda *o: seen.append(learn.model.training))
    counts = []
    for kd in KD(net(6), SoftTarget),SelfDistillation('last_batch'):
        del seen[:]
        suggest_weights(learn, kd, n_batches=3)
        counts.append(sum(seen))
    assert counts==[3, 6]


def test_exits_are_weighed_too():
    table = suggest_weights(learner(), DeepSupervision('0')).table
    assert table.pull.iloc[-1]>0
