"The mix that is trained: equal to loops by hand, at any weight, in any schedule"
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.schedule import SchedCos, SchedLin, SchedNo, sched_lin
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from torch import nn

from fasterai.core.schedule import Schedule, cos, lin, sched_dsd
from fasterai.distill.losses import *
from helpers import Boom, GradsAt, data, learner, net, same, state
from kd_helpers import KD, teacher, layers


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
    for a,b in zip(learn.model.parameters(), by_hand(epochs=2, **kw).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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


def test_train_loss_is_the_mix():
    learn = learner()
    seen = []
    class See(Boom):
        order = 50
        def __init__(self): pass
        def __call__(self, name):
            if name=='after_batch' and self.learn.training:
                seen.append((self.learn.loss.item(), self.learn.loss.data_ptr()==self.learn.loss_grad.data_ptr()))
    kd = KD(teacher(), weight=0.3)
    learn.fit(1, cbs=[kd, See()])
    h = kd.log.history
    assert [o[0] for o in seen]==pytest.approx((0.7*h.task_loss+0.3*h.distill_loss).tolist(), rel=1e-5)
    assert not any(o[1] for o in seen)


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


@pytest.mark.parametrize('losses', [(SoftTarget, DecoupledKD), (SoftTarget, SoftTarget)], ids=['labels', 'none'])
def test_of_two_callbacks_the_second_takes_no_input_for_a_label(losses):
    from fastai.data.core import DataLoaders, TfmdDL
    x = torch.randn(8, 3, 8, 8)
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x), bs=8, num_workers=0) for _ in range(2)], device='cpu')
    learn,kds = learner(dls=dls),[KD(teacher(), o) for o in losses]
    if DecoupledKD in losses:
        with pytest.raises(ValueError, match='DecoupledKD needs `target`'): learn.fit(1, cbs=kds)
        return
    learn.fit(1, cbs=kds)
    first,second = (kd.log.history.distill_loss[0] for kd in kds)
    assert first==second and learn.recorder.values[0][0]==pytest.approx(0.5*0.5*first+0.5*second, rel=1e-5)


@pytest.mark.parametrize('kw', [dict(schedule='cos'), dict(start_pct=0.1), dict(weight=0.), dict()], ids=str)
def test_a_training_that_distils_at_no_step_says_so(kw, recwarn):
    learn = learner(dls=data(n=8, bs=8)) # one step
    learn.fit(1, cbs=KD(teacher(), **kw))
    said = [str(o.message) for o in recwarn if 'nothing is distilled' in str(o.message)]
    assert len(said)==('schedule' in kw or 'start_pct' in kw)
    assert all('in every step of this training (it has 1)' in o for o in said)


@pytest.mark.parametrize('start,said', [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_a_training_that_is_resumed_after_the_last_distilled_step_says_so(start, said, recwarn):
    learner().fit(4, start_epoch=start, cbs=KD(teacher(), end_pct=.5))
    found = [str(o.message) for o in recwarn if 'nothing is distilled' in str(o.message)]
    assert len(found)==said and all(f'({16-4*start} of 16 are left)' in o for o in found)


def test_repr_says_what_is_trained():
    kd = KD(teacher(), {partial(SoftTarget, T=2): 1, Attention: 1000}, **layers, weight=0.5, schedule=cos)
    title,*pairs = repr(kd).splitlines()
    equation = 'loss = (1-w)*task + w*(SoftTarget(T=2) + 1000*Attention(p=2)), w = 0.5*cos(t)'
    assert title==f'KnowledgeDistillationCallback: {equation}'
    assert pairs==['  0 -> 0', '  1 -> 1']
    assert KD(teacher(), weight=2, task_weight=1).equation()=='1*task + 2*SoftTarget(T=5)'


@pytest.mark.parametrize('schedule,said', [
    (SchedLin(8, 1), 'lin(8 to 1)'), (Schedule(sched_lin, start_val=8, end_val=1), 'lin(8 to 1)'),
    (SchedCos(8, 0.5), 'cos(8 to 0.5)'), (SchedNo(3, 1), 'no(3 to 3)'), ('lin', 'lin(t)'), (SchedLin(0, 1), 'lin(t)'),
    (Schedule(sched_dsd, start_val=2, end_val=6), 'dsd(2 to 6)')], ids=lambda o: o if isinstance(o, str) else '')
def test_equation_says_where_a_schedule_begins_and_ends(schedule, said):
    assert KD(teacher(), SoftTarget, schedules={'T': schedule}).equation().endswith(f'*SoftTarget(T=5), T = {said}')
    falling = KD(teacher(), weight=0.5, schedule=SchedLin(1, 0)).equation()
    assert falling=='(1-w)*task + w*SoftTarget(T=5), w = 0.5*lin(1 to 0)'


def test_a_later_epoch_goes_on_where_the_schedule_was():
    learn = learner()
    kd = KD(teacher(), weight=0.8, schedule=lin)
    learn.fit(4, start_epoch=2, cbs=kd)
    n = len(learn.dls.train)
    assert kd.log.history.weight.tolist()==pytest.approx([0.8*i/(4*n) for i in range(2*n, 4*n)])


def test_unlabelled_batches_at_weight_0_are_passed_over():
    from fastai.data.core import DataLoaders, TfmdDL
    x = torch.randn(32, 3, 8, 8)
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x), bs=8, num_workers=0) for _ in range(2)], device='cpu')
    learn = learner(dls=dls)
    kd = KD(teacher(), weight=1., schedule=cos)
    learn.fit(1, cbs=kd)
    assert len(kd.log.history)==3 # the first of four batches has weight 0


def test_the_weighted_sum_is_what_is_trained():
    def one(pred, teacher_pred, **kw): return (pred-teacher_pred).abs().mean()
    def two(pred, teacher_pred, **kw): return (pred-teacher_pred).pow(2).mean()
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
