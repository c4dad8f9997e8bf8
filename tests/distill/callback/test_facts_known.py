"""What the first batch shows is used or said; and any object teaches

Axis, gradients, probabilities, masks, layouts and outputs"""
import warnings
from collections import OrderedDict
from copy import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.rnn import ModelResetter
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterai.distill.layers.matching import match_feature_layers
from fasterai.distill.losses import DIST, NKD, BinaryKD, DecoupledKD, FitNet, Logits, Similarity, SoftTarget
from fasterai.distill.teacher.protocol import BaseTeacher
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.keep_batch import on_copies
from fasterai.distill.training.views import StudentSees
from helpers import CPUMixedPrecision, data, learner, n_hooks, net, same, state
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


@pytest.mark.parametrize('loss', [Logits, BinaryKD])
def test_value_by_value_the_axis_is_no_matter_unless_something_is_left_out(loss):
    s,t = Tagger(8),Tagger(16, 1)
    x,_ = next(iter(tokens().valid))
    assert first_value(KD(t, loss), s, tokens(), own_loss)==pytest.approx(loss(s(x), t(x)).item(), rel=1e-5)
    with pytest.raises(ValueError, match='axis: the logits have'):
        learner(s, tokens(), loss_func=own_loss).fit(1, cbs=KD(t, partial(loss, ignore_index=-100)))


@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD, NKD])
def test_padding_is_left_out_of_a_batch_of_one_token_each(loss):
    s,t,ds = Tagger(8),Tagger(16, 1),torch.utils.data.TensorDataset(torch.tensor([[1], [2], [0], [0]]),
                                                                    torch.tensor([[3], [4], [-100], [-100]]))
    dls = DataLoaders(*[TfmdDL(ds, bs=4, num_workers=0) for _ in range(2)], device='cpu')
    x,y = (o[:2, 0] for o in ds.tensors)
    want = loss(pred=s(x), teacher_pred=t(x), target=y).item()
    assert first_value(KD(t, loss), s, dls, CrossEntropyLossFlat(axis=-1))==pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize('length', [5, 6])
def test_a_teachers_learner_says_where_its_classes_are(length):
    class Swapped(nn.Module):
        def __init__(self): super().__init__(); self.net = Tagger(8)
        def forward(self, ids): return self.net(ids).mT
    def dls(): return tokens(length=length)
    s,u = Swapped(),Swapped()
    t = learner(Tagger(16, 1), dls(), loss_func=CrossEntropyLossFlat(axis=-1))
    x,_ = next(iter(dls().valid))
    for who,want in (t, t.model(x).mT), (Teacher([t, u], average='none'), (t.model(x).mT+u(x))/2):
        got = first_value(KD(who, partial(Logits, ignore_index=None)), s, dls(), CrossEntropyLossFlat(axis=1))
        assert got==pytest.approx(F.mse_loss(s(x), want).item(), rel=1e-4)
    by_hand = Teacher(t, axis=1, select=lambda z: z.mT)
    got = first_value(KD(by_hand, partial(Logits, ignore_index=None)), s, dls(), CrossEntropyLossFlat(axis=1))
    assert got==pytest.approx(F.mse_loss(s(x), t.model(x).mT).item(), rel=1e-4)


@pytest.mark.parametrize('shape,line', [((8, 5), ''), ((4, 4), 'its logits (8, 4, 4, 4) fit either way: they stay')])
def test_a_loss_that_the_teacher_was_never_trained_with_moves_no_pixels(shape, line, capsys):
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(8, 3, *shape, generator=g),torch.randint(4, (8, *shape), generator=g)
    ds = torch.utils.data.TensorDataset(x, y)
    dls = DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0) for _ in range(2)], device='cpu')
    s,t = nn.Conv2d(3, 4, 1),nn.Conv2d(3, 4, 1)
    want = F.mse_loss(s(x), t(x)).item()
    got = first_value(KD(learner(t, dls), partial(Logits, ignore_index=None)), s, dls, CrossEntropyLossFlat(axis=1))
    assert got==pytest.approx(want, rel=1e-4)
    said = capsys.readouterr().out
    assert line in said and bool(line)==bool(said)


def test_an_axis_that_is_said_for_both_names_the_way_to_move_the_teachers_alone(capsys):
    net = nn.Embedding(20, 5)
    kd = KD(Teacher(Tagger(16, 1), axis=-1), partial(Logits, ignore_index=None))
    class Swapped(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, ids): return self.net(ids).mT
    first_value(kd, Swapped(), tokens(length=5), CrossEntropyLossFlat(axis=1))
    assert 'take select=lambda z: z.movedim(-1, 1) in place of axis=' in capsys.readouterr().out


# --- what cannot teach --------------------------------------------------------

class Steps(nn.Module):
    "A recurrent network, with the samples or the time steps first in its map"
    def __init__(self, width, batch_first):
        super().__init__()
        self.first = batch_first
        self.rnn,self.head = nn.GRU(192//8, width, batch_first=batch_first),nn.Linear(width, 3)
    def forward(self, x):
        x = x.reshape(len(x), 8, -1)[:, :self.steps]
        z = self.rnn(x if self.first else x.transpose(0, 1))[0]
        return self.head(z.mean(1 if self.first else 0))


@pytest.mark.parametrize('batch,steps,first,loss,said', [
    (4, 3, False, Similarity, True), (4, 8, False, Similarity, True), (4, 3, True, Similarity, False),
    (4, 3, False, FitNet, False)])
def test_maps_that_begin_with_time_steps_are_warned_of(batch, steps, first, loss, said, recwarn):
    s,t = Steps(4, first),Steps(6, first)
    s.steps = t.steps = steps
    learner(s, data(n=batch, bs=batch)).fit(1, cbs=KD(t, loss, 'rnn', 'rnn'))
    found = [o for o in recwarn if f"the maps of 'rnn' seem to have the {batch} samples" in str(o.message)]
    assert len(found)==said


def test_windows_are_no_time_steps_whatever_stands_beside_the_layer(recwarn):
    class Windows(Steps):
        def __init__(self): super().__init__(6, True); self.beside = nn.LSTM(8, 8)
        def forward(self, x): return self.head(self.rnn(x.reshape(2*len(x), 4, -1))[0].reshape(len(x), 8, -1).mean(1))
    learner(Windows(), data(n=4, bs=4)).fit(1, cbs=KD(Windows(), Similarity, 'rnn', 'rnn'))
    assert not [o for o in recwarn if 'samples on their second axis' in str(o.message)]


def test_a_map_without_a_gradient_is_named():
    student = net()
    student[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="the student's '0' carry no gradient"):
        learner(student).fit(1, cbs=KD(teacher(), FitNet, **layers))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner().fit(1, cbs=KD(teacher(), FitNet, **layers))


class Probable(nn.Module):
    "A network that gives probabilities"
    def __init__(self, inner, last): super().__init__(); self.net,self.last = inner,last
    def forward(self, x): return self.last(self.net(x))

@pytest.mark.parametrize('who', ['student', 'teacher'])
def test_probabilities_of_classes_are_told_from_logits(who):
    def first(select=None):
        sides = ('student', net()),('teacher', teacher())
        s,t = (Probable(m, nn.Softmax(1)) if who==o else m for o,m in sides)
        kd = KD(t, SoftTarget, **{'select_teacher' if who=='teacher' else 'select': select})
        return first_value(kd, s, data(), lambda p,y: F.mse_loss(p, F.one_hot(y, p.shape[1]).float()))
    with pytest.warns(UserWarning, match=f"the {who}'s answers are probabilities.*select="): wrong = first()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        right = first(lambda p: p.clamp(min=1e-8).log())
        other = first_value(KD(teacher(), SoftTarget), net(), data(), nn.CrossEntropyLoss())
    assert right==pytest.approx(other, rel=2e-4)!=wrong


def test_probabilities_of_labels_one_by_one_are_told_from_logits():
    "Of the student by its task's loss, as one that knows nothing may have small logits; of a teacher by its answers"
    class Labels(nn.BCELoss):
        def forward(self, p, y): return super().forward(p, F.one_hot(y, 3).float())
    class LabelLogits(nn.BCEWithLogitsLoss):
        def forward(self, z, y): return super().forward(z, F.one_hot(y, 3).float())
    def logit(p): return p.clamp(1e-6, 1-1e-6).logit()
    def first(s, t, task, **kw): return first_value(KD(t, BinaryKD, **kw), s, data(), task())
    sure = Probable(teacher(), lambda z: 3*(z-z.mean())/z.std())
    with pytest.warns(UserWarning, match="task's loss takes probabilities, and BinaryKD compares logits: select="):
        first(Probable(net(), nn.Sigmoid()), sure, Labels)
    with pytest.warns(UserWarning, match="the teacher's answers are probabilities.*select="):
        first(net(), Probable(sure, nn.Sigmoid()), LabelLogits)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        want = first(net(), sure, LabelLogits)
        assert first(Probable(net(), nn.Sigmoid()), sure, Labels, select=logit)==pytest.approx(want, rel=1e-4)
        probable = first(net(), Probable(sure, nn.Sigmoid()), LabelLogits, select_teacher=logit)
        assert probable==pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize('mask, said', [(torch.tensor([0., -1e4]), 'added to scores'),
                                        (torch.zeros(2), 'nothing counts')])
def test_a_mask_the_other_way_round_is_told(mask, said):
    def way(ids): return mask.repeat(3).expand(ids.shape)
    heard = pytest.raises(ValueError, match=said) if mask.any() else pytest.warns(UserWarning, match=said)
    kd = KD(Teacher(Tagger(8, 1), axis=-1), Logits, mask=way)
    with heard: first_value(kd, Tagger(8), tokens(), own_loss)


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
    for kd_0 in (KD(teacher(), 'SoftTarget'), KD(teacher()), KD(teacher(), T=2).replace(valid=True)):
        assert kd_0.replace(loss='DIST').equation()==KD(teacher(), 'DIST').equation()
    said = KD(teacher(), 'DIST', weight=3., task_weight=0.2).replace(T=1)
    assert said.replace(loss='SoftTarget').equation()=='0.2*task + 3*SoftTarget(T=4)'
    for other in (DIST, {'DIST': 1}):
        assert KD(teacher(), 'SoftTarget').replace(loss=other).equation()==KD(teacher(), other).equation()
    assert KD(teacher(), 'DIST', weight=KD(teacher()).recipe.weight).recipe.weight==0.5
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


# --- what the task is of ------------------------------------------------------

@pytest.mark.parametrize('loss_func,y,said', [
    (nn.BCEWithLogitsLoss(), torch.zeros(32, 3), 'labels that are there or not: BinaryKD'),
    (nn.MSELoss(), torch.zeros(32, 3), 'numbers: Logits'), (nn.CrossEntropyLoss(), None, None)])
def test_a_softmax_where_the_task_has_no_classes_is_warned_of(loss_func, y, said):
    def said_of(loss):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            learner(dls=data(y=y), loss_func=loss_func).fit(1, cbs=KD(teacher(), loss))
        return [str(w.message) for w in found if 'softmax over classes' in str(w.message)]
    found = said_of(partial(SoftTarget, T=2))
    assert len(found)==1 and found[0].endswith(f'{said} compares these') if said else not found
    if said: assert not said_of(BinaryKD if 'BinaryKD' in said else Logits)


# --- arguments ----------------------------------------------------------------

@pytest.mark.parametrize('kwargs,said', [
    (dict(weight=None), 'weight must be a number, got None'), (dict(task_weight='1'), "task_weight must be .*'1'"),
    (dict(start_pct='0.1'), 'start_pct must be'), (dict(end_pct=None), 'end_pct must be'),
    (dict(schedules=[1]), r"schedules must be a dict of a hyper-parameter's name .*\[1\]"),
    (dict(valid='no'), "valid must be True or False, got 'no'"), (dict(select=3), 'select must be a function .* 3'),
    (dict(loss=FitNet, activations_student=3), 'layers must be names, .* got 3'),
    (dict(loss={SoftTarget: 'a'}), "the weight of a loss must be a number, got 'a'"),
    (dict(mask=True), 'mask must be the name or the number of an input, .* got True')])
def test_arguments_of_another_type_are_named(kwargs, said):
    with pytest.raises(TypeError, match=said): KD(teacher(), **kwargs)


def test_shapes_that_differ_are_each_named_with_the_remedy():
    def fit(s, t, **kw):
        y = torch.randint(3, (32, 8, 8)) if isinstance(s, nn.Conv2d) else None
        learner(s, data(y=y), loss_func=nn.CrossEntropyLoss()).fit(1, cbs=KD(t, **kw))
    def conv(stride): return nn.Conv2d(3, 3, 3, stride, 1)
    with pytest.raises(ValueError, match=r"teacher's \(8, 5\): select_teacher=lambda z: z\[:, \[...\]\] picks .* 3"):
        fit(net(), net(c=5, seed=1))
    with pytest.raises(ValueError, match=r'select_teacher=lambda z: F.interpolate\(z, \(8, 8\)\) brings'):
        fit(conv(1), conv(2))


def test_a_temperature_in_words():
    with pytest.raises(TypeError, match="T must be a number, got '4'"): learner().fit(1, cbs=KD(teacher(), T='4'))


def test_a_copy_of_the_callback_teaches_too():
    kd = KD(teacher(), SoftTarget, weight=.3)
    again = copy(kd)
    learner().fit(1, cbs=again)
    assert again.equation()==kd.equation() and len(again.log.history)==4 and kd.log is None


# --- networks of other kinds --------------------------------------------------

@pytest.mark.parametrize('made', [
    torch.jit.script, lambda m: torch.jit.freeze(torch.jit.script(m)),
    lambda m: torch.jit.trace(m, torch.zeros(2, 3, 8, 8))], ids=['script', 'freeze', 'trace'])
def test_torchscript_teaches_as_its_network_does(made):
    value = [first_value(KD(t, SoftTarget), net(), data(), nn.CrossEntropyLoss())
             for t in (teacher(), made(teacher().eval()))]
    assert value[1]==pytest.approx(value[0], rel=1e-3)


def test_nobody_listens_to_torchscript():
    script = torch.jit.script(teacher())
    said = "no maps of RecursiveScriptModule: nobody can listen to TorchScript"
    with pytest.raises(ValueError, match=said): learner().fit(1, cbs=KD(script, FitNet, **layers))
    with pytest.raises(ValueError, match=said):
        learner(torch.jit.script(net())).fit(1, cbs=KD(teacher(), FitNet, **layers))
    with pytest.raises(ValueError, match=said): match_feature_layers(net(), script, torch.zeros(2, 3, 8, 8))
    inside = nn.Sequential(torch.jit.script(net()), nn.Flatten())
    with pytest.raises(ValueError, match='there are no maps of'): learner().fit(1, cbs=KD(inside, FitNet, '0', '0.1'))


def test_a_teacher_that_no_batch_has_given_a_size_is_refused():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"no batch has given a size yet \(1.weight, 1.bias\)"):
        learner().fit(1, cbs=KD(lazy))
    learn = learner(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    learn.fit(1, cbs=KD(teacher()))
    assert learn.model[1].weight.shape==(3, 192)


# --- the batch is everybody's -------------------------------------------------

class WritesIntoIts(nn.Module):
    def __init__(self): super().__init__(); self.net = teacher()
    def forward(self, x): return self.net(x.sub_(.5).div_(2.))


def test_a_teacher_that_writes_into_its_batch_changes_nobody_else_s():
    x = torch.randn(4, 3, 8, 8)
    was,two = x.clone(),Teacher([WritesIntoIts(), WritesIntoIts()], average='none')
    want = Teacher(WritesIntoIts())(was.clone())[0]
    for _ in range(3):
        torch.testing.assert_close(two(x)[0], want)
        assert x.equal(was)


def test_a_teacher_that_begins_with_a_relu_in_place_leaves_the_student_its_gradients():
    inplace,plain = nn.Sequential(nn.ReLU(inplace=True), teacher()),nn.Sequential(nn.ReLU(), teacher())
    found = []
    for t in (inplace, plain):
        learn = learner(net())
        learn.fit(1, cbs=KD(t))
        found.append(state(learn.model))
    assert same(*found)


class Seen(nn.Module):
    "Keeps what its network was shown"
    def __init__(self): super().__init__(); self.net,self.xs = teacher(),[]
    def forward(self, x):
        self.xs.append(x.clone())
        return self.net(x)


class Keep(Callback):
    "Keeps the batches as they come"
    order = -20
    def before_fit(self): self.xs = []
    def before_batch(self): self.xs.append(self.x.clone())


def writing():
    "A student that writes into its batch"
    n = WritesIntoIts()
    n.net = net()
    return n


def shown(student, *cbs, epochs=2, **kwargs):
    "The training batches, and what a teacher was asked about"
    t,keep = Seen(),Keep()
    learner(student).fit(epochs, cbs=[keep, KD(t, **kwargs), *cbs])
    return keep.xs,t.xs


@pytest.mark.parametrize('start_pct', [0., .5])
def test_a_student_that_writes_into_its_batch_changes_not_what_the_teacher_is_asked(start_pct):
    xs,asked = shown(writing(), start_pct=start_pct)
    xs = [x for i in range(2) for x in xs[8*i:8*i+4]][-len(asked):] # four to train, four to validate
    assert len(asked)==(8 if start_pct==0 else 4)
    for x,got in zip(xs, asked): assert x.equal(got)


class Halved(nn.Module):
    def forward(self, pred, y): return F.cross_entropy(pred.div_(2.), y)


@pytest.mark.parametrize('cbs', [[], [CPUMixedPrecision()]], ids=['fp32', 'autocast'])
def test_a_task_s_loss_that_writes_into_the_output_is_refused(cbs):
    learn,kd = learner(loss_func=Halved()),KD(teacher(), Logits)
    before = state(learn.model)
    with pytest.raises(ValueError, match=r"pred.clone\(\)"): learn.fit(1, cbs=[kd, *cbs])
    assert same(before, state(learn.model))
    with pytest.raises(ValueError, match=r"pred.clone\(\)"): kd.terms_on(learn, *[(o,) for o in learn.dls.one_batch()])
    learner(loss_func=Halved()).fit(1, cbs=[KD(teacher(), weight=0.), *cbs])


class WritesNowAndThen(nn.Module):
    def __init__(self): super().__init__(); self.net = teacher()
    def forward(self, x):
        if x.max()>3: x.clamp_(-1, 1)
        return self.net(x)


def test_a_teacher_that_writes_now_and_then():
    t,calm,wild = Teacher(WritesNowAndThen()),torch.zeros(2, 3, 8, 8),torch.full((2, 3, 8, 8), 4.)
    for x in calm, wild: t(x)
    assert wild.eq(4).all()


def test_a_student_that_writes_learns_as_one_that_does_not():
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return self.net((x-.5)/2.)
    found = []
    for student in writing(), Reads():
        learn = learner(student)
        learn.fit(2, cbs=[KD(teacher()), KD(Seen(), Logits, valid=True)])
        found.append(state(learn.model))
        assert not n_hooks(learn.model)
    assert same(*found)


def test_a_view_that_writes_shows_the_teacher_the_whole_batch():
    xs,asked = shown(net(), StudentSees(lambda x: x.zero_()), epochs=1)
    for x,got in zip(xs[:4], asked): assert x.equal(got)


def test_who_changes_the_batch_late_changes_it_for_both_and_gradients_reach_it():
    grads,t = [],Seen()
    class Late(Callback):
        order = 1000
        def before_batch(self): self.learn.xb = (2*self.x).requires_grad_(self.training),
        def after_backward(self): grads.append(self.x.grad.abs().sum().item())
    keep = Keep()
    learner().fit(1, cbs=[keep, KD(t), Late()])
    assert len(grads)==4 and min(grads)>0
    for x,got in zip(keep.xs[:4], t.xs): assert got.equal(2*x)


def test_torchscript_and_compiled_students_are_left_as_they_are():
    x = torch.randn(2, 3, 8, 8)
    for model in torch.jit.trace(net().eval(), x), torch.compile(net(), backend='eager'):
        with on_copies(model): assert not n_hooks(model)
