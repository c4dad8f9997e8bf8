"The callback in fastai's loop: what it changes, what it leaves alone, and what it leaves behind (nothing), whatever happens"
import copy, pickle, warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import CancelBatchException, CancelFitException
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
import fastai.callback.hook
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import set_seed
from torch import nn

from fasterai.core.schedule import Schedule, cos, lin
from fasterai.distill.teacher.recorded.recorded import TeacherCache
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.learned import VID
from fasterai.distill.losses import *
from fasterai.distill.teacher.teacher import Teacher
from helpers import Boom, GradsAt, block, data, flags, learner, n_hooks, net, same, state

KD = KnowledgeDistillationCallback
teacher = partial(net, width=8, seed=1)
layers = dict(activations_student=['0','1'], activations_teacher=['0','1'])


# --- the mix ----------------------------------------------------------------

def by_hand(weight, T=5., epochs=1, task_weight=None):
    "A plain loop: SGD on the mix, in the learner's order of batches"
    learn,t = learner(),teacher().eval()
    model,opt = learn.model,torch.optim.SGD(learn.model.parameters(), lr=0.05)
    model.train()
    for _ in range(epochs):
        for x,y in learn.dls.train:
            z = model(x)
            with torch.no_grad(): zt = t(x)
            kl = (F.softmax(zt/T, 1)*(F.log_softmax(zt/T, 1)-F.log_softmax(z/T, 1))).sum(1).mean()*T**2
            task = F.cross_entropy(z, y)
            loss = ((1-weight) if task_weight is None else task_weight)*task + weight*kl
            opt.zero_grad()
            loss.backward()
            opt.step()
    return model


@pytest.mark.parametrize('kw', [dict(weight=0.5), dict(weight=0.9), dict(weight=3., task_weight=0.5)])
def test_trains_as_a_loop_by_hand(kw):
    learn = learner(wd=0.)
    learn.fit(2, cbs=KD(teacher(), **kw))
    for a,b in zip(learn.model.parameters(), by_hand(epochs=2, **kw).parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('loss', [SoftTarget, lambda pred, teacher_pred, **kw: pred.sum()*float('nan')])
def test_weight_0_is_plain_training_bit_for_bit(loss):
    def run(cbs):
        set_seed(3)
        learn = learner(net(head=[nn.Dropout(0.5)]), opt_func=Adam)
        learn.fit(2, cbs=cbs)
        return state(learn.model),learn.recorder.losses
    (a,la),(b,lb) = run(None),run(KD(net(8, head=[nn.Dropout(0.5)]), loss, weight=0.))
    assert same(a, b) and torch.equal(torch.stack(la), torch.stack(lb))


def test_the_teacher_draws_nothing_from_the_students_random_stream():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.net = teacher()
        def forward(self, x): return self.net(x + 0*torch.randn_like(x))
    def run(t):
        set_seed(3)
        learn = learner(net(head=[nn.Dropout(0.5)]))
        learn.fit(1, cbs=KD(t))
        return state(learn.model)
    assert same(run(teacher()), run(Noisy()))


def test_in_learner_or_in_fit_is_the_same():
    a,b = learner(),learner(cbs=KD(teacher()))
    a.fit(2, cbs=KD(teacher()))
    b.fit(2)
    assert same(state(a.model), state(b.model))


def test_several_losses_have_a_column_each():
    learn = learner()
    kd = KD(teacher(), [SoftTarget, partial(SoftTarget, T=2), Logits])
    learn.fit(1, cbs=kd)
    assert learn.recorder.metric_names[3:-1]==['task_loss','SoftTarget_loss','SoftTarget_2_loss','Logits_loss']
    assert len({round(v, 6) for v in learn.recorder.values[0][2:]})==4


def test_one_teacher_pass_a_batch_whatever_the_losses():
    t,calls = teacher(),[]
    t.register_forward_hook(lambda *_: calls.append(1))
    learn = learner()
    learn.fit(2, cbs=KD(t, [SoftTarget, Logits, Mutual]))
    assert len(calls)==2*len(learn.dls.train)


def test_no_teacher_pass_at_weight_0_or_outside_the_window():
    t,calls = teacher(),[]
    t.register_forward_hook(lambda *_: calls.append(1))
    learn = learner()
    n = len(learn.dls.train)
    learn.fit(4, cbs=KD(t, end_pct=0.5))
    assert len(calls)==2*n
    learn.fit(4, cbs=KD(t, schedule=Schedule(lambda s,e,p: e, start_pct=0.75)))
    assert len(calls)==3*n
    learn.validate(); learn.get_preds()
    assert len(calls)==3*n


def test_weight_follows_the_schedule():
    learn = learner()
    kd = KD(teacher(), weight=0.8, schedule='lin')
    learn.fit(2, cbs=kd)
    n = 2*len(learn.dls.train)
    assert kd.log.history.weight.tolist()==pytest.approx([0.8*i/n for i in range(n)])


def test_temperature_follows_its_schedule():
    seen = []
    def loss(pred, teacher_pred, T=1.): seen.append(T); return (pred/T).mean()
    learn = learner()
    learn.fit(1, cbs=KD(teacher(), loss, schedules={'T': SchedLin(8, 4)}))
    n = len(learn.dls.train)
    assert seen==pytest.approx([8-4*i/n for i in range(n)])


def test_lr_find_sees_the_full_weight_and_leaves_no_state(tmp_path):
    learn = learner(opt_func=Adam, path=tmp_path)
    kd = KD(teacher(), FitNet, weight=0.8, schedule=lin, **layers)
    before = state(learn.model)
    learn.add_cb(kd)
    learn.lr_find(num_it=8, show_plot=False)
    assert set(kd.log.history.weight)=={0.8}
    assert same(before, state(learn.model)) and not n_hooks(learn.model) and not kd._fitting
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))


# --- what is logged ---------------------------------------------------------

def test_columns_hold_the_means_of_the_epoch_and_go_with_the_fit():
    learn = learner()
    kd = KD(teacher())
    learn.fit(2, cbs=kd)
    assert learn.recorder.metric_names[-3:]==['task_loss','distill_loss','time']
    rec = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    last = kd.log.history.tail(len(learn.dls.train))
    assert rec['task_loss']==pytest.approx(last.task_loss.mean(), rel=1e-5)
    assert rec['distill_loss']==pytest.approx(last.distill_loss.mean(), rel=1e-5)
    assert len(learn.metrics)==0
    learn.fit(1)
    assert 'distill_loss' not in learn.recorder.metric_names


def test_valid_loss_and_inference_are_the_students_own():
    learn = learner()
    learn.fit(1, cbs=KD(teacher()))
    valid = learn.recorder.values[-1][1]
    z,y = zip(*[(learn.model(x),y) for x,y in learn.dls.valid])
    assert valid==pytest.approx(F.cross_entropy(torch.cat(z), torch.cat(y)).item(), rel=1e-5)
    kept = learner(learn.model, cbs=KD(teacher()))
    assert list(kept.validate())==pytest.approx([valid], rel=1e-5)
    losses = kept.get_preds(with_loss=True)[2]
    assert losses.mean().item()==pytest.approx(valid, rel=1e-5)


def test_valid_true_fills_a_column_and_leaves_valid_loss():
    a,b = learner(),learner()
    a.fit(1, cbs=KD(teacher()))
    b.fit(1, cbs=KD(teacher(), valid=True))
    names = b.recorder.metric_names
    assert names[-2]=='valid_distill_loss' and b.recorder.values[0][1]==a.recorder.values[0][1]
    t = teacher().eval()
    d = torch.stack([SoftTarget(b.model(x), t(x)) for x,_ in b.dls.valid]).mean().item()
    assert b.recorder.values[0][names.index('valid_distill_loss')-1]==pytest.approx(d, rel=1e-4)


def test_train_loss_is_the_mix():
    learn = learner()
    seen = []
    class See(Boom):
        order = 50
        def __init__(self): pass
        def __call__(self, name):
            if name=='after_batch' and self.learn.training: seen.append((self.learn.loss.item(), self.learn.loss.data_ptr()==self.learn.loss_grad.data_ptr()))
    kd = KD(teacher(), weight=0.3)
    learn.fit(1, cbs=[kd, See()])
    h = kd.log.history
    assert [o[0] for o in seen]==pytest.approx((0.7*h.task_loss+0.3*h.distill_loss).tolist(), rel=1e-5)
    assert not any(o[1] for o in seen)


# --- the teacher ------------------------------------------------------------

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


# --- nothing leaks ----------------------------------------------------------

class Broken(nn.Module):
    "A student whose forward raises in its third training batch"
    def __init__(self, exc): super().__init__(); self.net,self.exc,self.n = net(),exc,0
    def forward(self, x):
        self.n += self.training
        h = self.net[0](x)
        if self.training and self.n==3: raise self.exc
        return self.net[1:](h)


def clean(learn, t, before, kd):
    assert not n_hooks(learn.model, t) and same(before[0], state(t)) and flags(t)==before[1]
    assert all(p.grad is None for p in t.parameters())
    assert '_with_events' not in learn.__dict__ and not kd._fitting and kd._along is None
    assert len(learn.metrics)==0 and len(learn.cbs)==len({type(c) for c in learn.cbs})
    if learn.opt: assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))
    pickle.dumps(learn.model)


excs = [KeyboardInterrupt(), RuntimeError('out of memory'), CancelFitException()]
events = ['before_epoch','before_train','before_batch','after_pred','after_loss','before_backward','before_step','after_step',
          'after_batch','after_train','before_validate','after_validate','after_epoch']

@pytest.mark.parametrize('exc', excs, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', events)
@pytest.mark.parametrize('order', [0, 20])
def test_clean_after_an_exception_at_any_event(event, exc, order):
    for inside in (True, False):
        t = teacher().train()
        before,kd,boom = (state(t),flags(t)),KD(t, FitNet, **layers),Boom(event, exc, at=0 if 'epoch' in event or 'train' in event or 'valid' in event else 1, order=order)
        learn = learner(cbs=kd if inside else None)
        try: learn.fit(2, cbs=[boom] if inside else [kd, boom])
        except (KeyboardInterrupt, RuntimeError): pass
        assert boom.n>boom.at # it did happen
        clean(learn, t, before, kd)


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('out of memory')], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('inside', [True, False])
def test_clean_after_an_exception_in_the_students_forward(exc, inside):
    t = teacher()
    before,kd = (state(t),flags(t)),KD(t, Attention, 'net.0', '0')
    learn = learner(Broken(exc), cbs=kd if inside else None)
    with pytest.raises(type(exc)): learn.fit(1, cbs=None if inside else kd)
    clean(learn, t, before, kd)
    learn.fit(1, cbs=None if inside else kd) # and it trains on, hooked once
    clean(learn, t, before, kd)


def test_clean_after_an_error_in_a_later_before_fit():
    t = teacher()
    before,kd = (state(t),flags(t)),KD(t, Attention, **layers)
    learn = learner(cbs=kd)
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Boom('before_fit', RuntimeError('typo'), at=0, order=60))
    assert not n_hooks(learn.model, t)
    learn.fit(1)
    clean(learn, t, before, kd)


def test_the_same_callback_fits_twice_and_hooks_are_there_only_in_the_forward():
    learn,counts = learner(),[]
    class Count(GradsAt):
        order = 0
        def before_fit(self): pass
        def before_step(self): counts.append(n_hooks(self.learn.model))
    learn.model.register_forward_hook(lambda m,i,o: counts.append(n_hooks(m)-1) if m.training else None)
    kd = KD(teacher(), Attention, **layers)
    for _ in range(2): learn.fit(1, cbs=[kd, Count()])
    n = len(learn.dls.train)
    assert counts==[2, 1]*2*n # two hooks while the student runs; at the step only the one of this test


def test_a_cached_teacher_is_asked_once_a_sample_and_trains_the_same():
    def run(**kw):
        t,calls = teacher(),[]
        t.register_forward_hook(lambda *_: calls.append(1))
        learn = learner()
        learn.fit(3, cbs=KD(Teacher(t, **kw)))
        return state(learn.model),len(calls),learn
    (a,n,learn),(b,m,cached) = run(),run(cache=TeacherCache(dtype=torch.float32))
    assert same(a, b) and n==3*len(learn.dls.train) and m==len(learn.dls.train)+1 # one batch to know the teacher again
    assert not cached.dls.train.__dict__.keys()-learn.dls.train.__dict__.keys()
    with pytest.raises(ValueError, match='Replay'): learner().fit(1, cbs=[KD(Teacher(teacher(), cache=True)), MixUp()])


def test_two_callbacks_at_once():
    t1,t2 = teacher(),net(8, seed=9)
    learn = learner()
    a,b = KD(t1, SoftTarget, weight=0.2, task_weight=1.),KD(t2, Attention, **layers, weight=0.1, task_weight=1.)
    learn.fit(1, cbs=[a, b])
    assert not n_hooks(learn.model, t1, t2) and '_with_events' not in learn.__dict__ and len(learn.metrics)==0
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[a, b, Boom('after_loss', KeyboardInterrupt(), order=20)])
    assert not n_hooks(learn.model, t1, t2) and '_with_events' not in learn.__dict__ and len(learn.metrics)==0


class CPUMixedPrecision(MixedPrecision):
    "fastai's own is for CUDA; autocast works on the CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.amp.autocast('cpu', dtype=torch.bfloat16)

def test_an_error_in_a_loss_does_not_leave_autocast_on():
    def bad(pred, teacher_pred, **kw): assert False
    learn = learner(cbs=CPUMixedPrecision('bf16'))
    with pytest.raises(AssertionError, match='bad'): learn.fit(1, cbs=KD(teacher(), bad))
    assert not torch.is_autocast_enabled('cpu')


# --- the rest of fastai -----------------------------------------------------

def test_gradient_accumulation_scales_both_terms():
    def grads(bs, cbs):
        learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), data(n=32, bs=bs), wd=0.)
        with torch.no_grad(): learn.model[1].weight.fill_(0.01); learn.model[1].bias.zero_()
        g = GradsAt()
        learn.fit(1, cbs=[KD(teacher(), weight=0.7), g, *cbs])
        return g.grads
    a,b = grads(32, []),grads(4, [GradientAccumulation(32)])
    assert len(a)==len(b)==1
    for x,y in zip(a[0], b[0]): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_adapters_are_clipped_too():
    learn,norms = learner(),[]
    kd = KD(teacher(), FitNet, **layers, weight=1000., task_weight=1.)
    class Norms(GradsAt):
        def before_fit(self): pass
        def before_step(self): norms.append([nn.utils.get_total_norm([p.grad for p in ps]).item() for ps in (self.learn.model.parameters(), kd.learned.parameters())])
    learn.fit(1, cbs=[kd, GradientClip(0.1), Norms()])
    assert all(n<=0.1001 for o in norms for n in o) and max(n for o in norms for n in o)>0.09


@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD, Attention, FitNet, Similarity, ActivationBoundaries])
def test_under_autocast(loss):
    learn = learner(cbs=CPUMixedPrecision('bf16'))
    t,seen = teacher(),[]
    def spy(pred=None, teacher_pred=None, fm_s=None, fm_t=None, target=None, **kw):
        seen.append((pred.dtype, torch.is_autocast_enabled('cpu'), *[o.dtype for o in (*fm_s.values(), *fm_t.values())]))
        return loss(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, target=target)
    spy.same_shape = getattr(loss, 'same_shape', False)
    learn.fit(1, cbs=KD(t, spy, **layers))
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert set(seen)=={(torch.float32, False, *[torch.float32]*4)}


def test_channels_last():
    learn = learner(cbs=ChannelsLast())
    learn.fit(1, cbs=KD(teacher(), [Similarity, Attention], **layers))
    ref = learner()
    ref.fit(1, cbs=KD(teacher(), [Similarity, Attention], **layers))
    for a,b in zip(learn.model.parameters(), ref.model.parameters()): torch.testing.assert_close(a.contiguous(), b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels_reach_a_loss_that_takes_them_and_others_refuse(mix):
    seen = []
    def soft(pred, target, **kw): seen.append(target); return -(pred.log_softmax(1)*target).sum(1).mean()
    set_seed(0)
    learner().fit(1, cbs=[KD(teacher(), soft), mix()])
    assert all(y.shape==(8, 3) for y in seen)
    torch.testing.assert_close(torch.cat(seen).sum(1), torch.ones(32))
    assert any(((y>0).sum(1)==2).any() for y in seen)
    with pytest.raises(TypeError, match='DecoupledKD.*class indices'): learner().fit(1, cbs=[KD(teacher(), DecoupledKD), mix()])


def test_trackers_follow_the_task_loss(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(3, cbs=[KD(teacher(), FitNet, **layers, weight=0.9), SaveModelCallback(with_opt=True, fname='best'), EarlyStoppingCallback(patience=2)])
    fresh = learner(path=tmp_path)
    fresh.create_opt()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Could not load the optimizer')
        fresh.load('best', with_opt=True) # written while adapters were in the optimizer
    fresh.fit(1)


@pytest.mark.parametrize('lf', [LabelSmoothingCrossEntropyFlat(), FocalLossFlat(), nn.CrossEntropyLoss()])
def test_other_task_losses(lf):
    learn = learner(loss_func=lf)
    learn.fit(1, cbs=KD(teacher(), DecoupledKD))
    assert learn.recorder.values[-1][1]>0


@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['fastai','torch'])
@pytest.mark.parametrize('split', [False, True])
def test_adapters_train_with_the_students_optimizer_and_leave_it_as_it_was(opt, split):
    from fastai.torch_core import params
    kw = dict(splitter=lambda m: [params(m[:2]), params(m[2:])]) if split else {}
    learn = learner(opt_func=opt, **kw)
    learn.create_opt()
    sizes = [len(o) for o in learn.opt.param_lists]
    kd,first = KD(teacher(), FitNet, **layers),{}
    class First(GradsAt):
        order = 4
        def before_fit(self): self.lrs = []
        def before_step(self):
            if not first: first.update(state(kd.learned))
            self.lrs.append((self.learn.opt.hypers[-1]['lr'], len(self.learn.opt.param_lists[-1])-sizes[-1]))
    see = First()
    learn.fit_one_cycle(2, slice(1e-3, 1e-2), cbs=[kd, see])
    n = len(list(kd.learned.parameters()))
    assert n==6 and {o[1] for o in see.lrs}=={n} and len({o[0] for o in see.lrs})>3
    after = state(kd.learned)
    assert not [k for k,_ in kd.learned.named_parameters() if torch.equal(first[k], after[k])]
    assert [len(o) for o in learn.opt.param_lists]==sizes and all(p.grad is None for p in kd.learned.parameters())
    assert not any('adapter' in k for k in learn.model.state_dict())
    first.clear()
    learn.fit_one_cycle(1, 1e-3, cbs=[kd, see]) # a second fit goes on from there
    assert all(torch.equal(first[k], after[k]) for k,_ in kd.learned.named_parameters())


def test_learned_losses_train():
    learn = learner(opt_func=Adam)
    vid = VID()
    kd = KD(teacher(), vid, **layers)
    learn.fit(1, cbs=kd)
    was = [p.detach().clone() for p in vid.parameters()]
    learn.fit(1, cbs=kd)
    assert len(was) and all(not torch.equal(a, b) for a,b in zip(was, vid.parameters()))


def test_fine_tune_freezes_and_unfreezes_with_adapters():
    from fastai.torch_core import params
    learn = learner(splitter=lambda m: [params(m[:2]), params(m[2:])], opt_func=Adam)
    learn.fine_tune(1, cbs=KD(teacher(), FitNet, **layers))
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))


def test_export_and_pickle_hold_no_teacher(tmp_path):
    from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
    from fastai.data.transforms import RandomSplitter
    big = nn.Sequential(nn.Linear(4, 3000), nn.Linear(3000, 3))
    db = DataBlock(blocks=(_Floats, CategoryBlock), get_x=_x, get_y=_y, splitter=RandomSplitter(seed=0))
    learn = learner(nn.Linear(4, 3), db.dataloaders(list(range(40)), bs=8, num_workers=0, device='cpu'), path=tmp_path)
    kd = KD(big)
    learn.add_cb(kd)
    learn.fit(1)
    size = len(pickle.dumps(learn))
    learn.export('student.pkl')
    assert kd.teacher is not None and (tmp_path/'student.pkl').stat().st_size<60_000 and size<60_000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'student.pkl')
    loaded.remove_cbs([c for c in loaded.cbs if type(c).__name__=='ProgressCallback'])
    a,b = [l.get_preds(dl=l.dls.test_dl(list(range(5))))[0] for l in (learn, loaded)]
    torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match='without its teacher'):
        loaded.dls = learn.dls
        loaded.fit(1)


def _x(i): return torch.tensor([i, -i, 1, 0.])/40
def _y(i): return 'abc'[i%3]
def _Floats():
    from fastai.data.block import TransformBlock
    return TransformBlock()


def test_unlabelled_inference_and_summary():
    learn = learner(cbs=KD(teacher(), Attention, **layers))
    dl = learn.dls.valid.new(torch.utils.data.TensorDataset(torch.randn(5, 3, 8, 8)))
    assert learn.get_preds(dl=dl)[0].shape==(5, 3)
    assert 'Conv2d' in learn.summary() and not n_hooks(learn.model) and len(learn.metrics)==0


def test_unlabelled_batches_train_on_the_teacher_alone():
    from fastai.data.core import DataLoaders, TfmdDL
    x = torch.randn(16, 3, 8, 8)
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x), bs=8, num_workers=0) for _ in range(2)], device='cpu')
    learn,g = learner(dls=dls),GradsAt()
    before = state(learn.model)
    learn.fit(1, cbs=[KD(teacher(), weight=1.), g])
    assert len(g.grads)==2 and not same(before, state(learn.model))
    model = net().train()
    SoftTarget(model(x[:8]), teacher().eval()(x[:8])).backward()
    for a,p in zip(g.grads[0], model.parameters()): torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match='needs `target`'): learner(dls=dls).fit(1, cbs=KD(teacher(), DecoupledKD))


def test_several_inputs_targets_and_tuple_outputs():
    from fastai.data.core import DataLoaders, TfmdDL
    class Two(nn.Module):
        def __init__(self, w): super().__init__(); self.net = net(w, seed=w)
        def forward(self, a, b): return self.net(a+b), a
    class First(nn.Module):
        y_int = True
        def forward(self, pred, y0, y1): return F.cross_entropy(pred[0], y0)
    g = torch.Generator().manual_seed(0)
    ds = torch.utils.data.TensorDataset(*torch.randn(2, 16, 3, 8, 8, generator=g), *torch.randint(3, (2, 16), generator=g))
    ds.n_inp = 2
    dls = DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0) for _ in range(2)], device='cpu')
    got = []
    def loss(pred, teacher_pred, target, **kw): got.append(target); return (pred-teacher_pred).pow(2).mean()
    learner(Two(4), dls, loss_func=First()).fit(1, cbs=KD(Two(8), loss))
    assert all(isinstance(y, tuple) and len(y)==2 for y in got)
    learner(Two(4), dls, loss_func=First()).fit(1, cbs=KD(Teacher(Two(8), select=lambda o: o[0]*2), SoftTarget, select=lambda o: o[0]))


def test_a_last_batch_of_one():
    learn = learner(dls=data(n=9, bs=8), model=nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    learn.dls.train.drop_last = False
    kd = KD(teacher())
    learn.fit(1, cbs=kd)
    assert len(kd.log.history)==2


def test_bad_outputs_and_bad_losses_say_so():
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.net = teacher()
        def forward(self, x): return {'logits': self.net(x)}
    with pytest.raises(TypeError, match='select'): learner().fit(1, cbs=KD(Dict()))
    with pytest.raises(ValueError, match='scalar'): learner().fit(1, cbs=KD(teacher(), lambda pred, **kw: pred.mean(1)))
    with pytest.raises(TypeError, match='scalar tensor'): learner().fit(1, cbs=KD(teacher(), lambda pred, **kw: 0.))
    with pytest.raises(ValueError, match='same shape'): learner().fit(1, cbs=KD(net(8, c=5)))


def test_pairs_keep_their_order_and_one_layer_may_stand_in_two():
    seen = []
    def loss(fm_s, fm_t, **kw):
        seen.append([(tuple(s.shape[1:]), tuple(t.shape[1:])) for s,t in zip(fm_s.values(), fm_t.values())])
        return sum(o.mean() for o in fm_s.values())
    learner().fit(1, cbs=KD(teacher(), loss, ['0','1'], ['1','0']))
    learner().fit(1, cbs=KD(teacher(), loss, ['1','1'], ['0','1']))
    s0,s1,t0,t1 = (4,4,4),(8,2,2),(8,4,4),(16,2,2)
    assert seen[-1]==[(s1,t0), (s1,t1)] and seen[0]==[(s0,t1), (s1,t0)]


def test_refused_at_construction():
    t = teacher()
    with pytest.raises(TypeError, match="did you mean 'T'"): KD(t, partial(SoftTarget, t=3))
    with pytest.raises(TypeError, match='temperature'): KD(t, partial(SoftTarget, temperature=3))
    with pytest.raises(ValueError, match='1 of the student'): KD(t, Attention, ['0'], ['0','1'])
    with pytest.raises(ValueError, match='takes no feature maps'): KD(t, SoftTarget, **layers)
    with pytest.raises(ValueError, match='unknown hyper-parameter'): KD(t, schedules={'temp': lin})
    with pytest.raises(ValueError, match="did you mean 'cos'"): KD(t, schedule='cosine')
    with pytest.raises(ValueError, match='start_pct'): KD(t, start_pct=0.6, end_pct=0.5)
    with pytest.raises(TypeError, match='teacher'): KD('resnet34')
    with pytest.raises(ValueError, match='layer of the student'): learner().fit(1, cbs=KD(t, Attention, 'layer1', '1'))


def test_misfits_are_refused_before_any_step():
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match='adapt|channel'): learn.fit(1, cbs=KD(teacher(), FitNet, **layers, adapters=None))
    assert same(before, state(learn.model)) and not n_hooks(learn.model)


def test_layers_with_the_names_of_learner_attributes():
    class Odd(nn.Module):
        def __init__(self, w): super().__init__(); self.opt,self.path,self.loss = block(3, w),block(w, w),nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 3))
        def forward(self, x): return self.loss(self.path(self.opt(x)))
    learner(Odd(4)).fit(1, cbs=KD(Odd(8), Attention, ['opt','path'], ['opt','path']))


def test_an_inplace_relu_after_the_layer_does_not_spoil_the_map():
    def m(w, inplace): 
        torch.manual_seed(w)
        return nn.Sequential(nn.Conv2d(3, w, 3), nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 3))
    def run(inplace):
        learn = learner(m(4, inplace))
        kd = KD(m(8, inplace), Attention, '0', '0')
        learn.fit(1, cbs=kd)
        return kd.log.history.distill_loss
    assert run(True).tolist()==pytest.approx(run(False).tolist())


def test_segmentation_ignores_what_the_task_ignores():
    y = torch.randint(0, 3, (16, 8, 8))
    y[:, :4] = 255
    dls = data(n=16, y=y)
    seg = lambda w: nn.Sequential(nn.Conv2d(3, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, 3, 1))
    got = []
    def loss(pred, teacher_pred, target=None, axis=1, ignore_index=None, **kw):
        got.append((axis, ignore_index))
        return SoftTarget(pred, teacher_pred, target=target, axis=axis, ignore_index=ignore_index)
    learn = learner(seg(4), dls, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    learn.fit(1, cbs=KD(seg(8), loss))
    assert set(got)=={(1, 255)}
    learner(seg(4), dls, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255)).fit(1, cbs=KD(seg(8), [SoftTarget, DecoupledKD]))


def test_compiled_student_and_teacher():
    s,t = (torch.compile(m, backend='eager') for m in (net(), teacher()))
    learn = learner(s)
    learn.fit(1, cbs=KD(t, [SoftTarget, Attention], **layers))
    ref = learner()
    ref.fit(1, cbs=KD(teacher(), [SoftTarget, Attention], **layers))
    for a,b in zip(learn.model.parameters(), ref.model.parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_compiled_student_whose_distillation_starts_late():
    torch.compiler.reset()
    learn = learner(torch.compile(net(), backend='eager'))
    kd = KD(teacher(), Attention, **layers, start_pct=0.5)
    learn.fit(2, cbs=kd)
    assert (kd.log.history.weight>0).sum()==len(learn.dls.train) and kd.log.history.distill_loss.notna().sum()==len(learn.dls.train)


def test_a_compiled_student_that_ran_unhooked_is_told_apart():
    torch.compiler.reset()
    learn = learner(torch.compile(net(), backend='eager'))
    learn.fit(1)
    with pytest.raises(RuntimeError, match='compiled'): learn.fit(1, cbs=KD(teacher(), Attention, **layers))


def test_repr_says_what_is_trained():
    kd = KD(teacher(), {partial(SoftTarget, T=2): 1, Attention: 1000}, **layers, weight=0.5, schedule=cos)
    assert repr(kd).splitlines()==['KnowledgeDistillationCallback: loss = (1-w)*task + w*(SoftTarget(T=2) + 1000*Attention(p=2)), w = 0.5*cos(t)', '  0 -> 0', '  1 -> 1']
    assert KD(teacher(), weight=2, task_weight=1).equation()=='1*task + 2*SoftTarget(T=5)'


def test_predict_show_results_and_the_other_ways_to_fit(tmp_path):
    import fastai.vision.data
    from fastai.callback.progress import CSVLogger
    from fasterai.data.digits import digits_dls, digits_net
    dls = digits_dls(n_train=40, bs=20, n_valid=20)
    learn = learner(digits_net(4), dls, opt_func=Adam, path=tmp_path, cbs=KD(digits_net(8), [SoftTarget, Attention], {'0': '0'}))
    learn.fit_flat_cos(1, 1e-3)
    learn.fit(2, cbs=CSVLogger())
    head,*rows = (tmp_path/'history.csv').read_text().splitlines()
    assert head.endswith('SoftTarget_loss,Attention_loss,time') and len(rows)==2
    assert learn.predict(dls.valid_ds[0][0])[0] in '0123456789'
    learn.show_results(max_n=2)
    assert len(learn.tta(n=1)[0])==20
    assert not n_hooks(learn.model) and len(learn.metrics)==0


def test_a_later_epoch_goes_on_where_the_schedule_was():
    learn = learner()
    kd = KD(teacher(), weight=0.8, schedule=lin)
    learn.fit(4, start_epoch=2, cbs=kd)
    n = len(learn.dls.train)
    assert kd.log.history.weight.tolist()==pytest.approx([0.8*i/(4*n) for i in range(2*n, 4*n)])


def test_save_load_and_resume(tmp_path):
    a = learner(path=tmp_path, opt_func=Adam)
    kd = KD(teacher(), FitNet, **layers)
    a.fit(2, cbs=kd)
    a.save('half')
    torch.save(kd.learned.state_dict(), tmp_path/'adapters.pth')
    b = learner(path=tmp_path, opt_func=Adam)
    b.create_opt()
    b.load('half')
    kd2 = KD(teacher(), FitNet, **layers)
    kd2.load_learned(torch.load(tmp_path/'adapters.pth'))
    for dl,other in zip(a.dls.loaders, b.dls.loaders): other.rng = copy.deepcopy(dl.rng)
    a.fit(1, cbs=kd)
    b.fit(1, cbs=kd2)
    assert same(state(a.model), state(b.model)) and same(state(kd.learned), state(kd2.learned))


def test_data_parallel_is_refused_by_name():
    model = nn.DataParallel(net())
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match='DataParallel'): learner(model).fit(1, cbs=KD(teacher(), Attention, **layers))


def test_terms_on_a_batch_leave_the_learner_as_it_was():
    learn = learner()
    kd = KD(teacher(), {SoftTarget: 2, FitNet: 1}, **layers)
    before,(x,y) = state(learn.model),learn.dls.one_batch()
    learn.model.eval()
    task,parts = kd.terms_on(learn, (x,), (y,))
    torch.testing.assert_close(task, F.cross_entropy(learn.model(x), y))
    torch.testing.assert_close(parts['SoftTarget'], SoftTarget(learn.model(x), teacher().eval()(x)))
    assert parts['FitNet'].requires_grad and same(before, state(learn.model)) and not n_hooks(learn.model) and kd.learn is None
    assert not any(isinstance(o, KD) for o in learn.cbs) and learn.opt is None


# --- what a review found ----------------------------------------------------

def test_lr_find_gives_adapters_and_learned_losses_back(tmp_path):
    vid = VID()
    for trained in (False, True):
        learn = learner(opt_func=Adam, path=tmp_path)
        kd = KD(teacher(), {FitNet: 1, vid: 1}, **layers)
        if trained: learn.fit(1, cbs=kd)
        before = state(kd.learned)
        learn.lr_find(num_it=12, start_lr=1e-3, end_lr=1e3, stop_div=False, show_plot=False) if not trained else learn.add_cb(kd).lr_find(num_it=12, start_lr=1e-3, end_lr=1e3, stop_div=False, show_plot=False)
        if trained: assert same(before, state(kd.learned)) and len(before)
        learn.remove_cb(kd)
    fresh = VID()
    learn = learner(opt_func=Adam, path=tmp_path, cbs=KD(teacher(), fresh, **layers))
    learn.lr_find(num_it=12, start_lr=1e-3, end_lr=1e3, stop_div=False, show_plot=False)
    assert fresh.shapes is None and not list(fresh.parameters())


def test_sizes_that_alternate_keep_the_adapters_parameters():
    learn,teachers_calls,steps = learner(nn.Sequential(block(3, 4), block(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), opt_func=Adam),[],[]
    t = nn.Sequential(block(3, 8), nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    t.register_forward_hook(lambda *_: teachers_calls.append(1))
    kd = KD(t, FitNet, '1', '1')
    class Sizes(GradsAt):
        order = 0
        def before_fit(self): pass
        def before_batch(self):
            if self.learn.iter%2: self.learn.xb = (F.interpolate(self.learn.xb[0], size=12),)
        def before_step(self): pass
    class Steps(GradsAt):
        def before_fit(self): pass
        def before_step(self): pass
        def after_step(self): steps.append({self.learn.opt.state[p].get('step') for p in kd.learned.parameters()})
    learn.fit(2, cbs=[kd, Sizes(), Steps()])
    n = 2*len(learn.dls.train)
    assert steps==[{i+1} for i in range(n)] and len(teachers_calls)==2 # the whole teacher runs once for each size, to try; then up to its layer


def test_unlabelled_batches_at_weight_0_are_passed_over():
    from fastai.data.core import DataLoaders, TfmdDL
    x = torch.randn(32, 3, 8, 8)
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x), bs=8, num_workers=0) for _ in range(2)], device='cpu')
    learn = learner(dls=dls)
    kd = KD(teacher(), weight=1., schedule=cos)
    learn.fit(1, cbs=kd)
    assert len(kd.log.history)==3 # the first of four batches has weight 0


def test_an_error_before_the_fit_begins_leaves_nothing():
    learn = learner()
    with pytest.raises(Exception, match='acuracy|monitor|index|not in'): learn.fit(1, cbs=[KD(teacher()), EarlyStoppingCallback(monitor='acuracy')])
    assert len(learn.metrics)==0 and '_with_events' not in learn.__dict__
    with pytest.raises(RuntimeError, match='real'): learn.fit(1, cbs=[KD(teacher()), Boom('after_batch', RuntimeError('real'))])


@pytest.mark.parametrize('lf,f', [(nn.BCEWithLogitsLoss(), torch.sigmoid), (MSELossFlat(), lambda z: z)], ids=['labels','regression'])
def test_an_ensemble_averages_what_the_task_predicts(lf, f):
    t1,t2,seen = teacher(),net(8, seed=5),[]
    x,y = torch.randn(16, 3, 8, 8),torch.rand(16, 3).round()
    from fastai.data.core import DataLoaders, TfmdDL
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x, y), bs=16, num_workers=0) for _ in range(2)], device='cpu')
    def loss(pred, teacher_pred, **kw): seen.append(teacher_pred); return (pred-teacher_pred).abs().mean()
    learner(dls=dls, loss_func=lf).fit(1, cbs=KD([t1, t2], loss))
    torch.testing.assert_close(f(seen[0]), (f(t1.eval()(x))+f(t2.eval()(x)))/2, rtol=1e-4, atol=1e-5)


def test_validation_teaches_adapters_nothing():
    learn,seen = learner(),[]
    kd = KD(teacher(), FitNet, **layers, valid=True)
    class See(GradsAt):
        def before_fit(self): pass
        def before_step(self): pass
        def after_train(self): seen.append(state(kd.learned))
        def after_validate(self): seen.append(state(kd.learned))
    learn.fit(1, cbs=[kd, See()])
    assert same(*seen) and len(seen[0])


def test_means_of_an_epoch_without_distillation_are_not_those_of_another():
    learn = learner()
    learn.fit(2, cbs=KD(teacher(), end_pct=0.5, valid=True))
    i = learn.recorder.metric_names.index('valid_distill_loss')-1
    first,last = (o[i] for o in learn.recorder.values)
    assert first>0 and last!=last # NaN


def test_the_weighted_sum_is_what_is_trained():
    def one(pred, teacher_pred, **kw): return (pred-teacher_pred).abs().mean()
    def two(pred, teacher_pred, **kw): return (pred-teacher_pred).pow(2).mean()
    x = data()
    learn,g = learner(wd=0.),GradsAt()
    learn.fit(1, cbs=[KD(teacher(), {one: 2., two: 0.5}, weight=0.3, task_weight=0.1), g])
    ref = learner()
    xb,yb = next(iter(ref.dls.train))
    z,zt = ref.model.train()(xb),teacher().eval()(xb)
    (0.1*F.cross_entropy(z, yb) + 0.3*(2*one(z, zt)+0.5*two(z, zt))).backward()
    for a,p in zip(g.grads[0], ref.model.parameters()): torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_a_task_loss_of_weight_0_does_not_count_even_if_it_is_nan():
    class Nan(nn.Module):
        def forward(self, pred, y): return pred.sum()*float('nan')
    learn = learner(loss_func=Nan())
    learn.fit(1, cbs=KD(teacher(), weight=1.))
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_a_batch_cancelled_after_the_hooks_are_on_leaves_none():
    learn,counts = learner(),[]
    learn.model.register_forward_hook(lambda m,i,o: counts.append(n_hooks(m)-1) if learn.dl is learn.dls.valid else None)
    class Once(GradsAt):
        order = 20
        def before_fit(self): pass
        def before_step(self): pass
        def before_batch(self):
            if self.learn.training and self.learn.iter==len(self.learn.dls.train)-1: raise CancelBatchException()
    learn.fit(1, cbs=[KD(teacher(), Attention, **layers), Once()])
    assert counts==[0]*len(learn.dls.valid)


def test_a_log_that_cannot_be_read_does_not_keep_the_rest_from_being_cleaned():
    t = teacher()
    before,kd = (state(t),flags(t)),KD(t, FitNet, **layers)
    learn = learner()
    class Broken(GradsAt):
        def before_fit(self): pass
        def before_step(self):
            def fail(*_): raise RuntimeError('device lost')
            kd.log.close = fail
            raise KeyboardInterrupt()
    with pytest.raises(RuntimeError, match='device lost'): learn.fit(1, cbs=[kd, Broken()])
    clean(learn, t, before, kd)


def test_weights_and_adapters_are_checked_at_construction():
    with pytest.raises(ValueError, match='task_weight=1'): KD(teacher(), schedule=Schedule(lambda s,e,p: s+(e-s)*p, end_val=4))
    with pytest.raises(ValueError, match='weight'): KD(teacher(), weight=float('nan'))
    with pytest.raises(ValueError, match='task_weight'): KD(teacher(), task_weight=-1)
    with pytest.raises(ValueError, match='weight of a loss'): KD(teacher(), {SoftTarget: -1})
    with pytest.raises(ValueError, match="'atuo'"): KD(teacher(), adapters='atuo')
    with pytest.raises(ValueError, match='match_feature_layers'): KD(teacher(), Attention)


def test_a_callback_pickles_whatever_it_was_given():
    kd = KD(teacher(), FitNet, **layers, adapters={'0': nn.Conv2d(4, 8, 1)}, select=lambda o: o, schedule=lambda s,e,p: e)
    learner(opt_func=Adam).fit(1, cbs=kd)
    assert len(pickle.dumps(kd))<2000


def test_learned_weights_load_before_the_first_batch():
    a,b = KD(teacher(), FitNet, **layers),KD(teacher(), FitNet, **layers)
    learner(opt_func=Adam).fit(1, cbs=a)
    saved,seen = state(a.learned),[]
    b.load_learned(saved)
    class First(GradsAt):
        order = 4
        def before_fit(self): pass
        def before_step(self): seen.append(state(b.learned))
    learner(opt_func=Adam).fit(1, cbs=[b, First()])
    assert all(torch.equal(seen[0][k], saved[k]) for k,_ in b.learned.named_parameters())


def test_maps_and_tokens_are_compared_by_position():
    class Tokens(nn.Module):
        def __init__(self, d): super().__init__(); self.patch,self.blocks,self.head = nn.Conv2d(3, d, 4, 4),nn.Sequential(nn.Linear(d, d), nn.GELU()),nn.Linear(d, 3)
        def forward(self, x):
            z = self.patch(x).flatten(2).transpose(1, 2)
            return self.head(self.blocks(torch.cat([z.mean(1, keepdim=True), z], 1))[:,0])
    for student,teacher_,s,t in ((Tokens(6), teacher(), 'blocks', '0'), (net(), Tokens(6), '1', 'blocks')):
        seen = []
        def spy(fm_s, fm_t, **kw):
            seen.append([tuple(o.shape[1:]) for o in (*fm_s.values(), *fm_t.values())])
            return Attention(fm_s, fm_t)
        spy.same_positions = True
        learn = learner(student)
        kd = KD(teacher_, {spy: 1, FitNet: 1}, s, t, weight=0.9)
        learn.fit(1, cbs=kd)
        (a,b),n = seen[-1],len(list(kd.learned.parameters()))
        assert a[-2:]==b[-2:] if len(b)==3 else a[0]==b[0]
        assert n>0 and kd.log.history.notna().all().all()
        learner(student).fit(1, cbs=KD(teacher_, Attention, s, t))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_hidden_synchronisation():
    x,y = torch.randn(32, 3, 8, 8, device='cuda'),torch.randint(3, (32,), device='cuda')
    from fastai.data.core import DataLoaders, TfmdDL
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x, y), bs=8, num_workers=0) for _ in range(2)], device='cuda')
    learn = learner(dls=dls)
    kd = KD(teacher(), [SoftTarget, Attention, FitNet], **layers)
    learn.fit(1, cbs=kd)
    class Strict(Boom):
        order = 4
        def __init__(self, mode, event): self.mode,self.at = mode,event
        def __call__(self, name):
            if name==self.at: torch.cuda.set_sync_debug_mode(self.mode)
    late = Strict('default', 'before_backward')
    late.order = -20
    try: learn.fit(1, cbs=[kd, Strict('error', 'after_loss'), late])
    finally: torch.cuda.set_sync_debug_mode('default')
