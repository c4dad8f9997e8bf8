"The teacher: untouched, asked once in eval mode, in any form"

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import MixUp
from fastai.losses import MSELossFlat
from fastai.optimizer import Adam
from torch import nn

from fasterai.distill.teacher.recorded.recorded import TeacherCache
from fasterai.distill.losses import *
from fasterai.distill.teacher.teacher import Teacher
from helpers import GradsAt, data, flags, learner, n_hooks, net, same, state
from kd_helpers import KD, teacher, layers


@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD, Attention])
def test_teacher_is_untouched(loss):
    t = teacher().train()
    t[0].eval()
    t[1].requires_grad_(False)
    before,was = state(t),flags(t)
    learner().fit(2, cbs=KD(t, loss, **(layers if loss is Attention else {})))
    assert same(before, state(t)) and flags(t)==was and not n_hooks(t)
    assert all(p.grad is None for p in t.parameters())


def test_teacher_is_asked_in_eval_mode_on_the_mixed_batch():
    t,seen = teacher().train(),[]
    t.register_forward_hook(lambda m,i,o: seen.append((m.training, i[0].clone(), o.requires_grad)))
    inputs = []
    class Inputs(GradsAt):
        def before_fit(self): pass
        def before_step(self): inputs.append(self.learn.xb[0].clone())
    learner().fit(1, cbs=[KD(t), MixUp(), Inputs()])
    assert len(seen)==len(inputs)>0
    for (training,x,grad),x_s in zip(seen, inputs): assert not training and not grad and torch.equal(x, x_s)


def test_teacher_may_be_a_learner_a_list_or_a_teacher():
    t1,t2 = teacher(),net(8, seed=5)
    def run(t, **kw):
        learn = learner()
        learn.fit(1, cbs=KD(t, **kw))
        return state(learn.model)
    assert same(run(t1), run(learner(t1))) and same(run(t1), run(Teacher(t1)))
    class Mean(nn.Module):
        def __init__(self): super().__init__(); self.nets = nn.ModuleList([t1, t2])
        def forward(self, x): return torch.stack([F.softmax(m(x), 1) for m in self.nets]).mean(0).log()
    for a,b in zip(run([t1, t2]).values(), run(Mean()).values()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_shares_with_the_student_is_refused():
    learn = learner()
    with pytest.raises(ValueError, match='share'): learn.fit(1, cbs=KD(learn.model))
    with pytest.raises(ValueError, match='share'): learn.fit(1, cbs=KD(nn.Sequential(learn.model[0], *teacher()[1:])))
    whole = nn.Sequential(net(), nn.Identity())
    with pytest.raises(ValueError, match='share'): learner(whole).fit(1, cbs=KD(whole[0]))
    tied = net()
    tied[0][0].weight = learn.model[0][0].weight
    with pytest.raises(ValueError, match='share'): learn.fit(1, cbs=KD(tied))


def test_a_frozen_student_is_refused():
    learn = learner()
    learn.model.requires_grad_(False)
    learn.create_opt = lambda: None
    learn.opt = Adam(learn.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match='unfreeze'): learn.fit(1, cbs=KD(teacher()))


def test_a_cached_teacher_is_asked_once_a_sample_and_trains_the_same():
    def run(**kw):
        t,calls = teacher(),[]
        t.register_forward_hook(lambda *_: calls.append(1))
        learn = learner()
        learn.fit(3, cbs=KD(Teacher(t, **kw)))
        return state(learn.model),len(calls),learn
    (a,n,learn),(b,m,cached) = run(),run(cache=TeacherCache(dtype=torch.float32))
    assert same(a, b) and n==3*len(learn.dls.train) and m==len(learn.dls.train)+1 # once more about the file's probes
    assert not cached.dls.train.__dict__.keys()-learn.dls.train.__dict__.keys()
    with pytest.raises(ValueError, match='Replay'): learner().fit(1, cbs=[KD(Teacher(teacher(), cache=True)), MixUp()])


def test_several_inputs_targets_and_tuple_outputs():
    from fastai.data.core import DataLoaders, TfmdDL
    class Two(nn.Module):
        def __init__(self, w): super().__init__(); self.net = net(w, seed=w)
        def forward(self, a, b): return self.net(a+b), a
    class First(nn.Module):
        y_int = True
        def forward(self, pred, y0, y1): return F.cross_entropy(pred[0], y0)
    g = torch.Generator().manual_seed(0)
    ds = torch.utils.data.TensorDataset(*torch.randn(2, 16, 3, 8, 8, generator=g),
                                        *torch.randint(3, (2, 16), generator=g))
    ds.n_inp = 2
    dls = DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0) for _ in range(2)], device='cpu')
    got = []
    def loss(pred, teacher_pred, target, **kw): got.append(target); return (pred-teacher_pred).pow(2).mean()
    learner(Two(4), dls, loss_func=First()).fit(1, cbs=KD(Two(8), loss))
    assert all(isinstance(y, tuple) and len(y)==2 for y in got)
    learner(Two(4), dls, loss_func=First()).fit(1,
                                                cbs=KD(Teacher(Two(8), select=lambda o: o[0]*2), SoftTarget,
                                                       select=lambda o: o[0]))
    def of_first(pred, teacher_pred, target): return DecoupledKD(pred, teacher_pred, target=target[0])
    learner(Two(4), dls, loss_func=First()).fit(1, cbs=KD(Two(8), of_first))
    for refused in (DecoupledKD, partial(SoftTarget, ignore_index=-100)):
        with pytest.raises(ValueError, match='data has 2 targets, and .* looks at one'):
            learner(Two(4), dls, loss_func=First()).fit(1, cbs=KD(Two(8), refused))


def test_bad_outputs_and_bad_losses_say_so():
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.net = teacher()
        def forward(self, x): return {'logits': self.net(x)}
    with pytest.raises(TypeError, match='select'): learner().fit(1, cbs=KD(Dict()))
    with pytest.raises(ValueError, match='scalar'): learner().fit(1, cbs=KD(teacher(), lambda pred, **kw: pred.mean(1)))
    with pytest.raises(TypeError, match='scalar tensor'): learner().fit(1, cbs=KD(teacher(), lambda pred, **kw: 0.))
    with pytest.raises(ValueError, match='same shape'): learner().fit(1, cbs=KD(net(8, c=5)))


@pytest.mark.parametrize('lf,f', [(nn.BCEWithLogitsLoss(), torch.sigmoid), (MSELossFlat(), lambda z: z)],
                         ids=['labels','regression'])
def test_an_ensemble_averages_what_the_task_predicts(lf, f):
    t1,t2,seen = teacher(),net(8, seed=5),[]
    x,y = torch.randn(16, 3, 8, 8),torch.rand(16, 3).round()
    from fastai.data.core import DataLoaders, TfmdDL
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x, y), bs=16, num_workers=0) for _ in range(2)],
                      device='cpu')
    def loss(pred, teacher_pred, **kw): seen.append(teacher_pred); return (pred-teacher_pred).abs().mean()
    learner(dls=dls, loss_func=lf).fit(1, cbs=KD([t1, t2], loss))
    torch.testing.assert_close(f(seen[0]), (f(t1.eval()(x))+f(t2.eval()(x)))/2, rtol=1e-4, atol=1e-5)


def test_a_teacher_under_inference_mode_teaches_as_another_does():
    class Inferring(nn.Module):
        def __init__(self): super().__init__(); self.net = teacher()
        @torch.inference_mode()
        def forward(self, x): return self.net(x)
    class Answers:
        net = Inferring().eval()
        def answer(self, x): return self.net(x)
    def trained(t, loss, **at):
        torch.manual_seed(0) # of adapters
        learn = learner()
        learn.fit(1, cbs=KD(t, loss, **at))
        return state(learn.model)
    for t1,t2,loss,at in [(Inferring(), teacher(), Logits, {}), (Answers(), teacher(), Logits, {}),
                          (Inferring(), teacher(), FitNet, layers)]:
        at1 = {**at, 'activations_teacher': [f'net.{n}' for n in at['activations_teacher']]} if at else {}
        assert same(trained(t1, loss, **at1), trained(t2, loss, **at))


def test_validation_without_labels_is_not_asked_where_a_loss_needs_them():
    dls = data()
    plain = torch.utils.data.TensorDataset(dls.valid.dataset.tensors[0])
    plain.n_inp = 1
    dls = type(dls)(dls.train, type(dls.train)(plain, bs=8, num_workers=0), device='cpu')
    for loss,known in ((DecoupledKD, False), (SoftTarget, True)):
        learn = learner(dls=dls)
        learn.fit(1, cbs=KD(teacher(), loss, valid=True))
        value = learn.recorder.values[0][learn.recorder.metric_names[1:].index('valid_distill_loss')]
        assert (value==value)==known


@pytest.mark.parametrize('number', [lambda d: torch.tensor(d.item()), lambda d: d.detach()])
def test_a_loss_without_a_gradient_is_said(number):
    def loss(pred, teacher_pred): return number(F.mse_loss(pred, teacher_pred))
    kd = KD(teacher(), loss)
    with pytest.warns(UserWarning, match='loss gives a number without a gradient'): learner().fit(1, cbs=kd)


def test_a_loss_that_is_a_method_of_a_module_does_not_train_it():
    class Head(nn.Linear):
        def loss(self, pred, teacher_pred): return F.mse_loss(self(pred), teacher_pred)
    class Own(nn.Sequential):
        def loss(self, pred, teacher_pred): return F.mse_loss(pred, teacher_pred)
    student = Own(net())
    with pytest.warns(UserWarning, match='loss is a method of a Head.*hand over'):
        learner().fit(1, cbs=KD(teacher(), Head(3, 3).loss))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner().fit(1, cbs=KD(teacher(), Head(3, 3).requires_grad_(False).loss))
        learner(student).fit(1, cbs=KD(teacher(), student.loss))


def test_hyper_parameters_beside_the_loss_go_to_those_that_name_them():
    kd = KD(net(2), ['DIST', SoftTarget], T=2.)
    assert [o.hypers['T'] for o in kd.terms]==[2., 2.] and kd.replace(T=3.).terms[1].hypers['T']==3.
    with pytest.raises(TypeError, match="unknown argument 'wieght'; did you mean 'weight'"):
        KD(net(2), wieght=0.3)
