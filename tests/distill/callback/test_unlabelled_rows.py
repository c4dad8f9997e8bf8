"Rows without a label in a distillation: who counts them, who leaves them out, and what is refused"
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import (CrossEntropyLossFlat, FocalLoss, FocalLossFlat, LabelSmoothingCrossEntropy,
                           LabelSmoothingCrossEntropyFlat)
from torch import nn

from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import *
from helpers import GradsAt, data, learner, net, same, state
from kd_helpers import layers, teacher


def mixed(**kwargs): return mix_unlabelled(data(n=16, bs=8, **kwargs), torch.randn(40, 3, 8, 8), ratio=2)


class Batch(GradsAt):
    "Keeps the batches and the student's answers"
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append((*self.learn.xb, *self.learn.yb, self.learn.pred.detach()))


def first(loss, **kwargs):
    "The distillation's loss on the first batch, and that batch"
    kd,batch = KD(teacher(), loss, **kwargs),Batch()
    learn = learner(dls=mixed(), lr=0.)
    learn.fit(1, cbs=[kd, batch])
    return kd.log.history.distill_loss[0],batch.seen[0]


@pytest.mark.parametrize('loss', [SoftTarget, Logits, Mutual, HardTarget, DIST, TTM, BinaryKD, Ranking])
def test_what_a_teacher_says_of_rows_without_a_label_counts(loss):
    value,(x,y,z) = first(loss)
    assert (y<0).sum()==16 and len(y)==24
    want = loss(z, teacher().eval()(x))
    assert value==pytest.approx(want.item(), rel=1e-5)
    assert value!=pytest.approx(loss(z[:8], teacher().eval()(x[:8])).item(), rel=1e-3)


@pytest.mark.parametrize('loss', [DecoupledKD, NKD])
def test_losses_that_need_the_label_leave_them_out(loss):
    value,(x,y,z) = first(loss)
    want = loss(z[:8], teacher().eval()(x[:8]), y[:8])
    assert value==pytest.approx(want.item(), rel=1e-5)


def test_who_says_so_leaves_them_out_of_any_loss():
    value,(x,y,z) = first(partial(SoftTarget, ignore_index=-100))
    assert value==pytest.approx(SoftTarget(z[:8], teacher().eval()(x[:8])).item(), rel=1e-5)


def test_trains_as_a_loop_by_hand():
    seen = Batch()
    learn = learner(dls=mixed(), wd=0.)
    start = state(learn.model)
    learn.fit(2, cbs=[KD(teacher(), SoftTarget, weight=0.5, task_weight=1.), seen])
    model,t = net(),teacher().eval()
    model.load_state_dict(start)
    opt = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for x,y,_ in seen.seen:
        z = model(x)
        with torch.no_grad(): p = F.softmax(t(x)/5, 1)
        kl = 25*(p*(p.log()-F.log_softmax(z/5, 1))).sum(1).mean()
        opt.zero_grad()
        (F.cross_entropy(z[:8], y[:8])+0.5*kl).backward()
        opt.step()
    for a,b in zip(learn.model.parameters(), model.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_weight_0_is_plain_training_bit_for_bit():
    def run(cbs):
        torch.manual_seed(0)
        learn = learner(dls=mixed())
        learn.fit(2, cbs=cbs)
        return state(learn.model)
    assert same(run(None), run(KD(teacher(), weight=0.)))


def test_maps_of_all_rows_are_compared():
    value,(x,y,z) = first(Attention, **layers)
    assert len(x)==24 and value>0


@pytest.mark.parametrize('loss_func', [LabelSmoothingCrossEntropyFlat(), FocalLossFlat(),
                                       LabelSmoothingCrossEntropy(), FocalLoss()])
def test_a_task_s_loss_that_counts_them_is_refused(loss_func):
    learn = learner(dls=mixed(), loss_func=loss_func)
    before = state(learn.model)
    with pytest.raises(ValueError, match=r'the label -100.*ignore_index=-100'): learn.fit(1, cbs=KD(teacher()))
    assert same(before, state(learn.model))


def test_a_loss_of_one_s_own_is_believed_unless_somebody_needs_the_label():
    def own(pred, y): return F.cross_entropy(pred, y)
    learner(dls=mixed(), loss_func=own).fit(1, cbs=KD(teacher()))
    with pytest.raises(ValueError, match='the label -100'):
        learner(dls=mixed(), loss_func=own).fit(1, cbs=KD(teacher(), DecoupledKD))
    own.ignore_index = -100
    learner(dls=mixed(), loss_func=own).fit(1, cbs=KD(teacher(), DecoupledKD))


@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('loss', [SoftTarget, FitNet])
def test_mixing_rows_with_and_without_a_label_is_refused(mix, loss):
    at = layers if loss is FitNet else {}
    learn,cbs = learner(dls=mixed()),[KD(teacher(), loss, **at), mix()]
    own = learn.loss_func
    with pytest.raises(ValueError, match=f'leave {mix.__name__} out'): learn.fit(1, cbs=cbs)
    assert learn.loss_func is own
    learn.fit(1)
    learner(dls=data()).fit(1, cbs=[KD(teacher(), loss, **at), mix()]) # labels alone


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing_a_class_that_the_task_ignores_is_refused_where_a_loss_takes_the_target(mix):
    def fit(*losses): learner(loss_func=CrossEntropyLossFlat(ignore_index=0)).fit(1, cbs=[*losses, mix()])
    fit()
    fit(KD(teacher()))
    with pytest.raises(ValueError, match='the label 0, which the task leaves out by its ignore_index=0: leave'):
        fit(KD(teacher(), lambda pred, target: -(target*pred.log_softmax(1)).sum(1).mean()))


def test_a_cached_teacher_answers_for_them_too():
    "A teacher that is asked once per image gives the same training"
    def run(**kwargs):
        torch.manual_seed(0)
        learn = learner(dls=mixed())
        kd = KD(Teacher(teacher(), **kwargs))
        learn.fit(3, cbs=kd)
        return state(learn.model)
    from fasterai.distill.teacher.teacher import Teacher
    a,b = run(),run(cache=True)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)
