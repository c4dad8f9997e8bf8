"Nothing is left behind, whatever happens at whatever event"
import pickle

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import CancelBatchException, CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback
from torch import nn

from fasterai.distill.losses import *
from helpers import Boom, CPUMixedPrecision, GradsAt, flags, learner, n_hooks, net, same, state
from kd_helpers import KD, teacher, layers


class Broken(nn.Module):
    "A student whose forward raises in its third training batch"
    def __init__(self, exc): super().__init__(); self.net,self.exc,self.n = net(),exc,0
    def forward(self, x):
        self.n += self.training
        h = self.net[0](x)
        if self.training and self.n==3: raise self.exc
        return self.net[1:](h)


def unwatched(learn, *kds):
    "No fit is running, and there is no watch unless a callback is in the Learner for good"
    watch = vars(learn).get('_with_events')
    return not watch.fits if any(kd is c for kd in kds for c in learn.cbs) else watch is None


def clean(learn, t, before, kd):
    assert not n_hooks(learn.model, t) and same(before[0], state(t)) and flags(t)==before[1]
    assert all(p.grad is None for p in t.parameters())
    assert kd.session is None and unwatched(learn, kd)
    assert len(learn.metrics)==0 and len(learn.cbs)==len({type(c) for c in learn.cbs})
    if learn.opt: assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))
    pickle.dumps(learn.model)


excs = [KeyboardInterrupt(), RuntimeError('out of memory'), CancelFitException()]


events = ['before_epoch','before_train','before_batch','after_pred','after_loss','before_backward','before_step',
          'after_step',
          'after_batch','after_train','before_validate','after_validate','after_epoch']


@pytest.mark.parametrize('exc', excs, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', events)
@pytest.mark.parametrize('order', [0, 20])
def test_clean_after_an_exception_at_any_event(event, exc, order):
    for inside in (True, False):
        t = teacher().train()
        before,kd = (state(t), flags(t)),KD(t, FitNet, **layers)
        once_an_epoch = 'epoch' in event or 'train' in event or 'valid' in event
        boom = Boom(event, exc, at=0 if once_an_epoch else 1, order=order)
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
    # while the student runs, two for its layers and one for its inputs; at the step only the one of this test
    assert counts==[3, 1]*2*n


def test_two_callbacks_at_once():
    t1,t2 = teacher(),net(8, seed=9)
    learn = learner()
    a,b = KD(t1, SoftTarget, weight=0.2, task_weight=1.),KD(t2, Attention, **layers, weight=0.1, task_weight=1.)
    learn.fit(1, cbs=[a, b])
    assert not n_hooks(learn.model, t1, t2) and unwatched(learn, a, b) and len(learn.metrics)==0
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[a, b, Boom('after_loss', KeyboardInterrupt(), order=20)])
    assert not n_hooks(learn.model, t1, t2) and unwatched(learn, a, b) and len(learn.metrics)==0


def test_an_error_in_a_loss_does_not_leave_autocast_on():
    def bad(pred, teacher_pred, **kw): assert False
    learn = learner(cbs=CPUMixedPrecision('bf16'))
    with pytest.raises(AssertionError, match='bad'): learn.fit(1, cbs=KD(teacher(), bad))
    assert not torch.is_autocast_enabled('cpu')


def test_terms_on_a_batch_leave_the_learner_as_it_was():
    learn = learner()
    kd = KD(teacher(), {SoftTarget: 2, FitNet: 1}, **layers)
    before,(x,y) = state(learn.model),learn.dls.one_batch()
    learn.model.eval()
    task,parts = kd.terms_on(learn, (x,), (y,))
    torch.testing.assert_close(task, F.cross_entropy(learn.model(x), y))
    torch.testing.assert_close(parts['SoftTarget'], SoftTarget(learn.model(x), teacher().eval()(x)))
    assert parts['FitNet'].requires_grad
    assert same(before, state(learn.model)) and not n_hooks(learn.model)
    assert kd.learn is None
    assert not any(isinstance(o, KD) for o in learn.cbs) and learn.opt is None


def test_an_error_before_the_fit_begins_leaves_nothing():
    learn = learner()
    with pytest.raises(Exception, match='acuracy|monitor|index|not in'):
        learn.fit(1, cbs=[KD(teacher()), EarlyStoppingCallback(monitor='acuracy')])
    assert len(learn.metrics)==0 and unwatched(learn)
    with pytest.raises(RuntimeError, match='real'):
        learn.fit(1, cbs=[KD(teacher()), Boom('after_batch', RuntimeError('real'))])


def test_a_batch_cancelled_after_the_hooks_are_on_leaves_none():
    learn,counts = learner(),[]
    learn.model.register_forward_hook(lambda m,i,
                                      o: counts.append(n_hooks(m)-1) if learn.dl is learn.dls.valid else None)
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


def test_the_same_callback_twice_is_refused_and_leaves_the_learner_as_it_was():
    kd,learn = KD(teacher(), FitNet, **layers),learner()
    with pytest.raises(ValueError, match='in the Learner twice'): learn.fit(1, cbs=[kd, kd])
    assert not any(cb is kd for cb in learn.cbs) and kd.learn is None and unwatched(learn, kd)
    learn.fit(1, cbs=kd)
    assert len(kd.log.history)==4 and unwatched(learn, kd)

def test_a_learner_keeps_its_callback_when_a_fit_is_given_it_again():
    kd = KD(teacher(), FitNet, **layers)
    learn = learner(cbs=kd)
    with pytest.raises(ValueError, match=r'leave it out of fit\(cbs=\)'): learn.fit(1, cbs=kd)
    assert sum(cb is kd for cb in learn.cbs)==1 and kd.learn is learn
    learn.fit(1)
    assert len(kd.log.history)==4
