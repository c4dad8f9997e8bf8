"A student as its own teacher: with its weights, and without a trace"
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Adam
from torch import nn

from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.loss.consistency import Consistency
from fasterai.distill.losses import *
from fasterai.distill.methods.fixmatch import StrongView, fixmatch
from fasterai.distill.teacher.forward import same_rng
from fasterai.distill.teacher.oneself import Oneself
from fasterai.distill.training.views import StudentSees
from helpers import Boom, CPUMixedPrecision, GradsAt, data, learner, n_hooks, net, same, state



loss = partial(Consistency, threshold=0.4)
def half(x): return x*(torch.arange(8)<4)
def consistent(mode='train', **kwargs): return KD(Oneself(mode), loss, **{'weight': 1., 'task_weight': 1., **kwargs})


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_trains_as_a_loop_by_hand(mode):
    "Statistics of BatchNorm included: they are of what the student saw"
    learn = learner(wd=0., cbs=StudentSees(half))
    start = state(learn.model)
    learn.fit(2, cbs=consistent(mode))
    order = learner(wd=0.)
    model = net()
    model.load_state_dict(start)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        for x,y in order.dls.train:
            z = model.train()(half(x))
            kept = state(model)
            model.train(mode=='train')
            with torch.no_grad(): other = copy.deepcopy(model)(x)
            assert same(kept, state(model))
            p,label = other.softmax(1).max(1)
            ce = F.cross_entropy(z, label, reduction='none')
            opt.zero_grad()
            (F.cross_entropy(z, y) + (ce*(p>=0.4)).mean()).backward()
            opt.step()
    for k,v in state(learn.model).items():
        torch.testing.assert_close(v, state(model)[k], rtol=1e-5, atol=1e-6, msg=k)


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_an_answer_leaves_no_trace(mode):
    learn = learner(net(head=[nn.Dropout(0.5)]))
    t,x = Oneself(mode),torch.randn(6, 3, 8, 8)
    t.begin(learn)
    learn.model.train()[0][1].eval() # a frozen BatchNorm stays frozen
    modes = [m.training for m in learn.model.modules()]
    before,rng = state(learn.model),torch.get_rng_state()
    pred,maps = t.answer(x, layers=('0', '1'))
    assert same(before, state(learn.model)) and torch.equal(rng, torch.get_rng_state())
    assert modes==[m.training for m in learn.model.modules()] and not n_hooks(learn.model)
    assert not pred.requires_grad and list(maps)==['0', '1'] and not maps['0'].requires_grad
    learn.model.train(mode=='train')
    if mode=='train': learn.model[0][1].eval()
    torch.testing.assert_close(pred, learn.model(x))
    assert t.answer(x, logits=False)==(None, {})
    t.end()
    t.end()
    with pytest.raises(RuntimeError, match='has no student'): t.answer(x)


def test_a_hidden_state_is_the_student_s_own():
    class Remembers(nn.Module):
        "As fastai's recurrent networks do: its state is an attribute"
        def __init__(self): super().__init__(); self.cell,self.hidden = nn.GRU(4, 3, batch_first=True),None
        def forward(self, x):
            out,h = self.cell(x, self.hidden)
            self.hidden = h.detach()
            return out[:, -1]
    learn,t = learner(Remembers()),Oneself()
    learn.model(torch.randn(2, 5, 4))
    before = learn.model.hidden
    t.begin(learn)
    with same_rng(torch.device('cpu')): want = copy.deepcopy(learn.model)(torch.ones(2, 5, 4))
    assert torch.equal(t.answer(torch.ones(2, 5, 4))[0], want) and learn.model.hidden is before
    t.end()


def test_weight_0_is_plain_training_bit_for_bit():
    def run(cbs):
        torch.manual_seed(0)
        learn = learner(net(head=[nn.Dropout(0.5)]), opt_func=Adam, cbs=StudentSees(half))
        learn.fit(2, cbs=cbs)
        return state(learn.model)
    assert same(run(None), run(consistent(weight=0.)))


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'before_validate'])
def test_nothing_is_left_after_an_exception(event):
    kd = consistent()
    learn = learner(cbs=StudentSees(half))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[kd, Boom(event, KeyboardInterrupt(), at=0, order=20)])
    assert kd.session is None and kd.teacher.students==[] and not n_hooks(learn.model) and len(learn.metrics)==0
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))
    learn.fit(1, cbs=kd)
    assert kd.teacher.students==[]


def test_lr_find_and_copies(tmp_path):
    kd = consistent()
    learn = learner(path=tmp_path, cbs=[StudentSees(half), kd])
    before = state(learn.model)
    learn.lr_find(num_it=6, stop_div=False, show_plot=False)
    assert same(before, state(learn.model)) and kd.teacher.students==[]
    other = kd.replace()
    assert other.teacher is not kd.teacher and other.teacher.mode=='train'
    assert copy.deepcopy(kd).teacher.students==[]


def test_its_own_maps_teach_under_autocast_and_accumulation():
    kd = KD(Oneself(), {loss: 1, FitNet: 1}, '0', '0', weight=1., task_weight=1.)
    learn = learner(cbs=[StudentSees(half), CPUMixedPrecision('bf16'), GradientAccumulation(16)])
    learn.fit(2, cbs=kd)
    assert kd.log.history.notna().all().all() and not torch.is_autocast_enabled('cpu')


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="did you mean 'train'"): Oneself('trains')


# FixMatch in one line
def test_fixmatch_shows_the_strong_view_of_rows_without_a_label_only():
    seen = []
    class See(GradsAt):
        def before_fit(self): pass
        def before_step(self): pass
        def after_pred(self): seen.append((self.learn.training, self.learn.xb[0], *self.learn.yb))
    learn = learner(dls=mix_unlabelled(data(n=16, bs=8), torch.ones(20, 3, 8, 8), ratio=1))
    learn.fit(1, cbs=[*fixmatch(lambda x: 0*x, threshold=0.3), See()])
    training = [o for o in seen if o[0]]
    assert len(training)==2 and any(not o[0] for o in seen)
    for _,x,y in training: assert not x[y<0].any() and x[y>=0].any() and (y<0).sum()==8
    for _,x,_ in (o for o in seen if not o[0]): assert x.any()


def test_fixmatch_as_a_loop_by_hand():
    dls = mix_unlabelled(data(n=16, bs=8), torch.randn(20, 3, 8, 8), ratio=2)
    batches = []
    class Keep(GradsAt):
        order = -5
        def before_fit(self): pass
        def before_step(self): pass
        def before_batch(self):
            if self.learn.training: batches.append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))
    learn = learner(dls=dls, wd=0.)
    start = state(learn.model)
    learn.fit(2, cbs=[Keep(), *fixmatch(half, threshold=0.4)])
    model = net().train()
    model.load_state_dict(start)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for x,y in batches:
        z = model(torch.cat([x[:8], half(x[8:])]))
        with torch.no_grad(): p,label = copy.deepcopy(model)(x).softmax(1).max(1)
        ce = F.cross_entropy(z, label, reduction='none')
        opt.zero_grad()
        (F.cross_entropy(z[:8], y[:8]) + (ce*(p>=0.4)).mean()).backward()
        opt.step()
    for a,b in zip(learn.model.parameters(), model.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_view_of_another_shape_is_refused():
    learn = learner(dls=mix_unlabelled(data(n=16, bs=8), torch.randn(20, 3, 8, 8), ratio=1))
    with pytest.raises(ValueError, match='keep the shape'): learn.fit(1, cbs=fixmatch(lambda x: x[..., ::2]))
    with pytest.raises(TypeError, match='must be a function'): StrongView(1)
