"Teachers that remember what the student said"
import random
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner

import fasterai.distill.teacher.past as past
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import Mutual, SoftTarget
from fasterai.distill.teacher.past import LastBatch, PastEpoch
from fasterai.distill.teacher.peers import Peers
from helpers import data, learner, net


now = torch.tensor([[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381],
                    [-0.4987, 2.9242, -4.1203]])
then = torch.tensor([[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159],
                     [-1.818, 1.1029, 4.5844]])
old = torch.tensor([0, 2, 1, 1])


def test_the_last_batch_has_the_reference_s_value():
    new = torch.tensor([[3.5773, 0.873, 0.193], [-3.727, -0.5548, -0.7095], [-0.1655, -1.254, -0.0876],
                        [-0.9544, -2.6277, 1.7692]])
    t = LastBatch()
    batch = SimpleNamespace(xb=(torch.zeros(4, 2),), yb=(old,))
    t.join(batch)
    t.answer(*batch.xb, pred=then)
    batch = SimpleNamespace(xb=(torch.ones(4, 2),), yb=(torch.tensor([1, 1, 0, 2]),))
    t.join(batch)
    pred = torch.cat([new, now]).requires_grad_()
    kd = SoftTarget(pred, t.answer(*batch.xb, pred=pred)[0], T=3, mask=t.repeated(*batch.xb))
    torch.testing.assert_close(F.cross_entropy(pred, batch.yb[0])+kd, torch.tensor(7.816880379008751))
    grad = torch.autograd.grad(kd, pred)[0]
    assert not grad[:4].any() and grad[4:].any()


def test_the_past_epoch_has_the_reference_s_value():
    said = torch.tensor([[0.3237724780454878, 0.6658344332160634, 0.010393088738448781],
                         [0.9920377928048032, 0.0010328905222710561, 0.006929316672925647],
                         [0.9307620492566431, 0.02820794450824271, 0.041030006235114345],
                         [0.0016055251056347182, 0.02979530621953166, 0.9685991686748336]])
    t = PastEpoch()
    t.trace = SimpleNamespace(rows_of=lambda xb: [3, 1, 0, 2], n=4)
    t.answer(pred=said.log(), target=old)
    p = F.softmax(t.answer(pred=now, target=old)[0], 1)
    targets = 0.68*F.one_hot(old)+0.32*p
    torch.testing.assert_close(targets[0], torch.tensor([0.783607192974556, 0.2130670186291403, 0.0033257883963036102]))
    entropy = -(p*p.log()).sum(1).mean() # by which the divergence is less than a cross-entropy
    mixed = 0.68*F.cross_entropy(now, old)+0.32*(Mutual(now, p.log())+entropy)
    torch.testing.assert_close(mixed, torch.tensor(3.084310503137021))


def test_the_label_is_the_answer_until_a_picture_was_seen():
    t = PastEpoch()
    t.trace = SimpleNamespace(rows_of=lambda xb: [0, 1, 2, 3], n=9)
    pred = now.clone().requires_grad_()
    answer = t.answer(pred=pred, target=old)[0]
    a,b = Mutual(pred, answer),F.cross_entropy(pred, old)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(o, pred)[0] for o in (a, b)))
    t.trace.rows_of = lambda xb: [4, 5, 6, 7]
    assert torch.equal(t.answer(pred=pred, target=(old, old))[0], pred) # of two targets none is the class


def test_a_big_table_is_kept_in_half_precision(monkeypatch):
    monkeypatch.setattr(past, '_SMALL', 10)
    t = PastEpoch()
    t.trace = SimpleNamespace(rows_of=lambda xb: [0, 1, 2, 3], n=9)
    t.answer(pred=now, target=old)
    assert t.learns.said.dtype==torch.float16
    torch.testing.assert_close(t.answer(pred=then, target=old)[0], now, rtol=1e-3, atol=1e-3)


def test_what_it_cannot_remember_is_refused():
    def fit(dls=None, t=None, cbs=(), loss=Mutual, **kwargs):
        learner(dls=dls).fit(1, cbs=[KD(t or PastEpoch(), loss), *cbs], **kwargs)
    for t in PastEpoch(), LastBatch():
        with pytest.raises(ValueError, match='MixUp mixes others each time'): fit(t=t, cbs=[MixUp()])
    with pytest.raises(TypeError, match='PastEpoch: bs=None'):
        dls = data()
        dls.train.bs = None
        fit(dls)
    with pytest.raises(ValueError, match='max_gb=1e-09: 32 pictures of 3 classes'): fit(t=PastEpoch(1e-9))
    dense = net()[:2]
    with pytest.raises(ValueError, match='one prediction a picture'):
        Learner(data(), dense, loss_func=lambda p,y: p.mean()).fit(1, cbs=KD(PastEpoch(), SoftTarget))
    both = KD(PastEpoch(), Mutual),KD(PastEpoch(), Mutual)
    with pytest.raises(ValueError, match='PastEpoch: another one is attached'): learner().fit(1, cbs=both)


def test_a_validation_changes_no_memory():
    t,learn = PastEpoch(),learner()
    kd = KD(t, Mutual, valid=True)
    seen = []
    class Look(Callback):
        order = 99
        def after_train(self): seen.append(t.learns.said.clone())
        def after_validate(self): seen.append(t.learns.said.clone())
    learn.fit(1, cbs=[kd, Look()])
    assert torch.equal(*seen)
    assert learn.recorder.values[0][-1]==pytest.approx(0, abs=1e-6) # it says what the student says


def test_a_probe_changes_no_memory():
    t = PastEpoch()
    learn = learner()
    kd = KD(t, Mutual)
    learn.fit(1, cbs=kd)
    before = t.learns.said.clone()
    xb,yb = learn.dls.one_batch()
    _,parts = kd.terms_on(learn, (xb,), (yb,))
    assert abs(parts['Mutual'])<1e-6 and torch.equal(before, t.learns.said)
    assert 'create_batches' not in vars(learn.dls.train)


def test_other_data_are_no_past():
    t = PastEpoch()
    learn = learner()
    learn.fit(1, cbs=KD(t, Mutual))
    assert t.learns.seen.all()
    learn.dls = data(n=40)
    learn.fit(1, cbs=KD(t, Mutual))
    assert len(t.learns.said)==40


def shuffle(ds): ds.tensors = tuple(t[torch.arange(len(t)).roll(7)] for t in ds.tensors)
def change(ds): ds.tensors = ds.tensors[0].flip(-1),ds.tensors[1]


@pytest.mark.parametrize('edit', [shuffle, change])
def test_data_that_were_edited_between_two_fits_are_no_past(edit):
    t = PastEpoch()
    learn = learner(dls=data(40))
    learn.fit(1, cbs=KD(t, Mutual))
    kept = t.learns.said.clone()
    learn.fit(1, 0., cbs=KD(t, Mutual))
    assert t.learns.said is not None and t.learns.seen.all()
    edit(learn.dls.train_ds)
    class First(Callback):
        order = 60
        def after_loss(self):
            if self.training and self.train_iter==0: self.seen = t.learns.seen.sum().item()
    first = First()
    learn.fit(1, 0., cbs=[KD(t, Mutual), first])
    assert first.seen==8 and not torch.equal(kept, t.learns.said)


def test_what_was_saved_is_of_its_data_alone():
    t = PastEpoch()
    learn = learner(dls=data(40))
    kd = KD(t, Mutual)
    learn.fit(1, cbs=kd)
    state = kd.learned.state_dict()
    same = KD(PastEpoch(), Mutual)
    same.load_learned(state)
    learn.fit(1, 0., cbs=same)
    shuffle(learn.dls.train_ds)
    other = KD(PastEpoch(), Mutual)
    other.load_learned(state)
    with pytest.raises(ValueError, match='other pictures, or in another order'): learn.fit(1, 0., cbs=other)


@pytest.mark.parametrize('whole', [True, False])
def test_a_loader_that_is_replaced_within_the_fit_is_refused(whole):
    other = data(40, seed=1)
    class Replace(Callback):
        order = -10
        def before_epoch(self):
            if self.epoch!=1: return
            if whole: self.learn.dls = other
            else: self.learn.dls.loaders[0] = other.train
    with pytest.raises(ValueError, match='was replaced within the fit'):
        learner(dls=data(40)).fit(2, cbs=[KD(PastEpoch(), Mutual), Replace()])


@pytest.mark.parametrize('named', [
    dict(items=lambda self: []), dict(items=None), dict(tensors=[torch.ones(3)]*40), dict(tensors=torch.ones(3)),
    dict(tensors=dict(x=torch.ones(3))), dict(tensors=None), dict(items=pd.DataFrame(dict(a=[1]))),
    dict(items=iter([1]))], ids=lambda o: '-'.join((*o, *(type(v).__name__ for v in o.values()))))
def test_data_sets_that_call_other_things_items_or_tensors(named):
    x,y = data(40).train_ds.tensors
    class Own:
        def __len__(self): return 40
        def __getitem__(self, i): return x[i],y[i]
    ds = type('Named', (Own,), named)()
    dls = DataLoaders(*(TfmdDL(ds, bs=8, shuffle=s, num_workers=0) for s in (True, False)), device='cpu')
    t = PastEpoch()
    for _ in range(2): learner(dls=dls).fit(1, cbs=KD(t, Mutual))
    assert t.learns.seen.all()


@pytest.mark.parametrize('event', ['before_batch', 'after_pred'])
def test_who_draws_from_the_loader_in_between_changes_no_answer(event):
    said = []
    def loss(pred, teacher_pred): said.append(teacher_pred.clone()); return 0*pred.sum()
    def after(*cbs):
        learn = learner(dls=data(40))
        learn.dls.train.rng = random.Random(1)
        del said[:]
        learn.fit(2, 0., cbs=[KD(PastEpoch(), loss), *cbs])
        return torch.cat(said[5:])[torch.cat(order[-5:]).argsort()] # of the second epoch, by rows
    order = []
    class Order(Callback):
        def before_batch(self):
            if self.training: order.append(_rows_of(self.x, self.dls))
    class Draws(Callback): pass
    setattr(Draws, event, lambda self: self.dls.train.one_batch())
    torch.testing.assert_close(after(Order(), Draws()), after(Order()), rtol=0, atol=1e-5)


def _rows_of(x, dls): return torch.stack([(dls.train_ds.tensors[0]==o).flatten(1).all(1).int().argmax() for o in x])


def test_another_of_a_class_of_one_s_own_is_of_that_class():
    class Epochs(PastEpoch): pass
    class Batches(LastBatch): pass
    class Others(Peers): pass
    for own in Epochs(max_gb=0.5), Batches(), Others([torch.nn.Linear(2, 2)]):
        other = own.another()
        assert type(other) is type(own) and other is not own and other.learns is not own.learns
        assert getattr(other, 'max_gb', 0.5)==0.5
