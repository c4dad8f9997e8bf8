"""What the first batch shows is used or said; and any object teaches

Axis, gradients, probabilities, masks, layouts and outputs"""
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.rnn import ModelResetter
from fastai.data.core import DataLoaders, TfmdDL
from torch import nn

from fasterai.distill.losses import FitNet, Logits, SoftTarget
from fasterai.distill.teacher.protocol import BaseTeacher
from fasterai.distill.teacher.teacher import Teacher
from helpers import learner, net, same, state
from kd_helpers import KD, layers, teacher


def tokens(n=16, length=6, classes=5):
    "Padded token ids with a label for each"
    g = torch.Generator().manual_seed(0)
    x = torch.randint(1, 20, (n, length), generator=g)
    x[:, 4:] = 0
    y = torch.randint(classes, (n, length), generator=g).masked_fill(x==0, -100)
    ds = torch.utils.data.TensorDataset(x, y)
    return DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0) for _ in range(2)], device='cpu')


class Tagger(nn.Module):
    "A class for each token; `babble` changes what is said of padding"
    def __init__(self, width, seed=0, babble=0.):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.emb,self.enc,self.head = nn.Embedding(20, width),nn.Linear(width, width),nn.Linear(width, 5)
        self.babble = babble
    def forward(self, ids): return self.head(self.enc(self.emb(ids)+self.babble*(ids==0)[..., None]).tanh())


def own_loss(pred, y): return F.cross_entropy(pred.flatten(0, 1), y.flatten())


def first_value(kd, model, dls, loss_func):
    "The distillation loss on the first batch"
    learner(model, dls, loss_func=loss_func, lr=0.).fit(1, cbs=kd)
    return kd.log.history.iloc[0, 1]


# --- the class axis -----------------------------------------------------------

def test_a_class_axis_that_nobody_knows_is_refused_before_a_step():
    learn = learner(Tagger(8), tokens(), loss_func=own_loss)
    before = state(learn.model)
    match = r'axis: the logits have the shape \(8, 6, 5\).*partial\(SoftTarget, axis=-1\)'
    with pytest.raises(ValueError, match=match):
        learn.fit(1, cbs=KD(Tagger(16)))
    assert same(before, state(learn.model))


@pytest.mark.parametrize('kd', [
    lambda t: KD(Teacher(t, axis=-1), partial(SoftTarget, T=2)), lambda t: KD(t, partial(SoftTarget, T=2, axis=-1))],
    ids=['teacher', 'loss'])
def test_the_axis_counts_wherever_it_is_said(kd):
    s,t,dls = Tagger(8),Tagger(16, 1),tokens()
    x,_ = next(iter(dls.valid))
    p,q = F.log_softmax(s(x)/2, -1),F.softmax(t(x)/2, -1)
    want = 4*(q*(q.log()-p)).sum(-1).mean().item()
    assert first_value(kd(t), s, tokens(), own_loss)==pytest.approx(want, rel=1e-5)


# --- what cannot teach --------------------------------------------------------

def test_a_map_without_a_gradient_is_named():
    student = net()
    student[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="the student's '0' carry no gradient"):
        learner(student).fit(1, cbs=KD(teacher(), FitNet, **layers))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner().fit(1, cbs=KD(teacher(), FitNet, **layers))


def test_probabilities_are_told_from_logits():
    class Forest(nn.Module):
        def __init__(self): super().__init__(); self.net = teacher()
        def forward(self, x): return self.net(x).softmax(1)
    with pytest.warns(UserWarning, match='probabilities.*select='): learner().fit(1, cbs=KD(Forest()))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner().fit(1, cbs=KD(Teacher(Forest(), select=lambda p: p.clamp(min=1e-8).log())))


# --- masks --------------------------------------------------------------------

@pytest.mark.parametrize('loss', [FitNet, Logits])
def test_what_a_teacher_says_of_padding_is_masked(loss):
    at = dict(activations_student='enc', activations_teacher='enc') if loss is FitNet else {}
    def value(babble, **kw):
        kd = KD(Teacher(Tagger(8, 1, babble), axis=-1), loss, **at, **kw)
        return first_value(kd, Tagger(8), tokens(), own_loss)
    mask = lambda ids: ids>0
    assert value(3.)!=pytest.approx(value(0.), rel=1e-3)
    assert value(3., mask=mask)==pytest.approx(value(0., mask=mask), rel=1e-6)


# --- outputs, layers, recipes -------------------------------------------------

class Output(OrderedDict):
    "As of transformers"
    def __getattr__(self, k):
        if k in self: return self[k]
        raise AttributeError(k)


class Wrapped(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return Output(logits=self.net(x))


def test_outputs_with_logits_need_no_select():
    def run(s, t, lf):
        learn = learner(s, loss_func=lf)
        learn.fit(1, cbs=KD(t))
        return learn.model
    plain = run(net(), teacher(), F.cross_entropy)
    wrapped = run(Wrapped(net()), Wrapped(teacher()), lambda out, y: F.cross_entropy(out.logits, y))
    assert same(state(plain), state(wrapped.net))


def test_a_layer_of_the_student_may_stand_against_the_teachers_output():
    def loss(fm_s, teacher_pred): return (fm_s['1'].mean((2, 3))[:, :3]-teacher_pred).square().mean()
    kd = KD(teacher(), loss, '1')
    learner().fit(1, cbs=kd)
    assert kd.log.history.distill_loss.notna().all() and not kd.recipe.layers_t
    with pytest.raises(ValueError, match='1 of the student'): KD(teacher(), FitNet, '1')


def test_a_loss_by_name_takes_its_authors_recipe():
    kd = KD(teacher(), 'Attention', **layers)
    assert (kd.recipe.weight, kd.recipe.task_weight)==(1000, 1)
    assert KD(teacher(), 'Attention', **layers, weight=3).recipe.weight==3
    assert KD(teacher()).recipe.weight==0.5
    with pytest.raises(ValueError, match="did you mean 'SoftTarget'"): KD(teacher(), 'SoftTargets')
    learner().fit(1, cbs=kd)


def test_maps_of_1d_convolutions_keep_their_moments():
    class Series(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.a = nn.Sequential(nn.Conv1d(2, w, 5, padding=2), nn.BatchNorm1d(w), nn.ReLU())
            self.head = nn.Linear(w, 3)
        def forward(self, x): return self.head(self.a(x).mean(-1))
    ds = torch.utils.data.TensorDataset(torch.randn(16, 2, 50), torch.arange(16)%3)
    dls = DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0) for _ in range(2)], device='cpu')
    kd = KD(Series(24), FitNet, 'a', 'a')
    learner(Series(16), dls).fit(1, cbs=kd)
    assert [p.shape for p in kd.learned.parameters()][0]==(24, 16, 1, 1) # channels to channels
    seen = []
    def own(fm_s, fm_t): seen.append(fm_s['a'].shape); return fm_s['a'].square().mean()
    learner(Series(16), dls).fit(1, cbs=KD(Series(24), own, 'a', 'a'))
    assert set(seen)=={(8, 16, 50)} # one's own loss gets the maps as they are


def test_a_recurrent_teacher_forgets_when_the_student_does():
    class Stateful(nn.Module):
        def __init__(self): super().__init__(); self.net,self.resets = net(),0
        def reset(self): self.resets += 1
        def forward(self, x): return self.net(x)
    s,t = Stateful(),Stateful()
    learner(s).fit(2, cbs=[ModelResetter(), KD(t)])
    assert t.resets==4 # each epoch's training and validation
    learner(Stateful()).fit(2, cbs=KD(u := Stateful()))
    assert u.resets==0


# --- a teacher is whatever answers a batch ------------------------------------

@pytest.mark.parametrize('base', [object, BaseTeacher])
def test_any_object_with_answer_teaches_and_is_told_of_steps(base):
    class Constant(base):
        def __init__(self): self.heard = []
        def answer(self, x): return torch.zeros(len(x), 3), {}
        def begin(self, learn): self.heard.append('begin')
        def after_step(self, learn): self.heard.append('step')
        def end(self): self.heard.append('end')
    t,learn = Constant(),learner()
    kd = KD(t, Logits)
    learn.fit(1, cbs=kd)
    n = len(learn.dls.train)
    assert t.heard[0]=='begin' and t.heard.count('step')==n and t.heard[-1]=='end'
    plain = KD(type('Zero', (), dict(answer=lambda self, x: torch.zeros(len(x), 3)))(), Logits)
    learner().fit(1, cbs=plain)
    assert plain.log.history.distill_loss.tolist()==kd.log.history.distill_loss.tolist()


def test_a_teacher_of_an_older_student_can_be_written_in_a_few_lines():
    "A mean teacher: the student's average, moved after each step; equal to the same by hand"
    from copy import deepcopy
    class Mean:
        def begin(self, learn): self.net = deepcopy(learn.model).eval().requires_grad_(False)
        def answer(self, x): return self.net(x)
        def after_step(self, learn):
            for a,b in zip(self.net.parameters(), learn.model.parameters()): a.data.lerp_(b.data, 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    learn = learner(deepcopy(model), wd=0.)
    learn.fit(1, cbs=KD(Mean(), Logits))
    hand,mean = deepcopy(model),deepcopy(model)
    opt = torch.optim.SGD(hand.parameters(), lr=0.05)
    for x,y in learner(hand).dls.train:
        loss = 0.5*F.cross_entropy(hand(x), y) + 0.5*F.mse_loss(hand(x), mean(x).detach())
        opt.zero_grad()
        loss.backward()
        opt.step()
        for a,b in zip(mean.parameters(), hand.parameters()): a.data.lerp_(b.data, 0.5)
    for a,b in zip(learn.model.parameters(), hand.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_teachers_output_may_have_a_select_of_its_own():
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.net = teacher()
        def forward(self, x): return {'scores': self.net(x)}
    kd,plain = KD(Dict(), select_teacher=lambda o: o['scores']),KD(teacher())
    learner().fit(1, cbs=kd)
    learner().fit(1, cbs=plain)
    assert kd.log.history.distill_loss.tolist()==plain.log.history.distill_loss.tolist()
    with pytest.raises(ValueError, match='select: the teacher is a Teacher already'):
        KD(Teacher(teacher()), select_teacher=lambda o: o)
