"New classes in turn: heads, columns, examples, and loops written by hand"
import pickle
import random
from copy import deepcopy
from functools import partial
from threading import Lock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import (
    Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException)
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *  # noqa: F403 (gives Learner `lr_find`)
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize
from fastai.losses import (
    BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat)
from fastcore.basics import noop
from fasttransform import Transform
from torch import nn

from fasterai.core.task import task_of
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.remember import LwF
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.attack import Attack
from fasterai.distill.methods.columns import NewClasses, OneHotBCE
from fasterai.distill.methods.continual import Remember, align_head, grow_head, head_of, head_of_learner
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.teacher.following import EMA
from classes import At, named
from helpers import Boom, data, flags, learner, n_hooks, net, same, state


def two_tasks(seed=0):
    "A Learner whose head has grown from 3 classes to 5, with data of the new ones, and its old self"
    learn = learner(net(c=3, seed=seed), data(y=torch.arange(32)%3))
    learn.fit(1)
    torch.manual_seed(seed)
    old = grow_head(learn, 2)
    learn.dls = data(y=3+torch.arange(32)%2, c=5)
    for dl in learn.dls.loaders: dl.rng = random.Random(0)
    return learn,old


def test_a_grown_head_keeps_its_rows_and_everything_else():
    learn = learner(net(c=3), data())
    learn.fit(1)
    before,ids = state(learn.model),[id(m) for m in learn.model.modules()][:-1]
    learn.model[-1].bias.requires_grad_(False)
    old = grow_head(learn, 2)
    name,head = head_of(learn.model)
    assert (name, head.out_features, head.bias.requires_grad)==('4', 5, False)
    assert [id(m) for m in learn.model.modules()][:-1]==ids
    assert torch.equal(head.weight[:3], before['4.weight']) and torch.equal(head.bias[:3], before['4.bias'])
    assert same(state(old), before) and not old.training and not any(p.requires_grad for p in old.parameters())
    trained = {id(p) for p in learn.model.parameters() if p.requires_grad}
    assert {id(p) for ps in learn.opt.param_lists for p in ps}==trained
    x = learn.dls.one_batch()[0]
    torch.testing.assert_close(learn.model.eval()(x)[:, :3], old(x))
    learn.fit(1)
    assert same(state(old), before)


def test_a_head_keeps_dtype_and_wrapper():
    model = net(c=3).double()
    learn = learner(nn.DataParallel(model), data())
    grow_head(learn, 1)
    assert learn.model.module[-1].weight.dtype==torch.float64 and model[-1].out_features==4


def test_the_order_of_the_vocabulary_is_the_order_of_the_columns():
    learn = learner(net(c=2), named(['b', 'a']))
    before = state(learn.model)
    for vocab,what in (['a', 'b', 'c'], "column 0 is 'b' and would become 'a'"), (['b'], "would become nothing"):
        with pytest.raises(ValueError, match=what): grow_head(learn, named(vocab))
    with pytest.raises(ValueError, match='a class or more'): grow_head(learn, named(['b', 'a']))
    with pytest.raises(ValueError, match='name no classes'): grow_head(learn, data())
    with pytest.raises(ValueError, match='no nn.Linear'): head_of(nn.ReLU())
    assert same(state(learn.model), before) and list(learn.dls.vocab)==['b', 'a']
    grow_head(learn, named(['b', 'a', 'c'], ['c']))
    assert list(learn.dls.vocab)==['b', 'a', 'c'] and learn.model[-1].out_features==3


def test_weight_aligning_golden():
    old = torch.tensor([[1.2856, 0.3036, 0.6191, 0.396, 0.2234], [0.0543, 0.1793, 0.2428, 0.8211, 1.2171],
                        [0.5594, 0.3767, 0.5611, 1.0077, 1.2262], [0.5305, 0.2755, 0.2912, 0.2374, 0.5103]])
    new = torch.tensor([[0.4463, 1.6691, 0.2643, 0.9678, 0.0592], [1.5146, 0.3369, 0.3024, 0.8386, 0.5177]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 6))
    model[1].weight.data = torch.cat([old, new])
    learn = learner(model)
    assert align_head(learn, 2)==pytest.approx(0.7396549, abs=1e-6)
    torch.testing.assert_close(model[1].weight[4, :2], torch.tensor([0.3301079847838268, 1.2345580044873075]))
    assert torch.equal(model[1].weight[:4], old)
    for n in (0, 6):
        with pytest.raises(ValueError, match='leave old and new'): align_head(learn, n)


def test_columns_of_the_labels_golden():
    z = torch.tensor([[-0.1839, -2.9267, 2.1636, -0.4787, -0.9823, -2.0045],
                      [1.8376, -2.2073, 1.253, -1.123, 0.0577, -0.4615],
                      [1.1755, 1.5046, -2.117, 2.1119, 1.4955, 2.1294]], dtype=torch.float64)
    y = torch.tensor([4, 5, 4])
    for func in nn.CrossEntropyLoss(),F.cross_entropy:
        new = NewClasses(func, 4)
        assert new(z, y).item()==pytest.approx(0.7843058814228536, abs=1e-9)
        assert new(z, torch.tensor([4, 1, -100])).item()==pytest.approx(func(z[:1, 4:], y[:1]-4).item())
        assert new(z, y*0)==0 and task_of(new).axis==1
    yes = F.one_hot(y, 6).to(z)
    torch.testing.assert_close(OneHotBCE()(z, y), F.binary_cross_entropy_with_logits(z, yes))
    torch.testing.assert_close(OneHotBCE(4)(z, torch.tensor([4, 0, -100]))*2,
                               F.binary_cross_entropy_with_logits(z[:2, 4:], yes[[0, 1], 4:]*torch.tensor([[1], [0]]))
                               *2*2/6)


def by_hand(loss_of, epochs=2):
    "Plain SGD on `loss_of(logits, old logits, labels)` in the order of the Learner's batches"
    learn,old = two_tasks()
    model,opt = learn.model.train(),torch.optim.SGD(learn.model.parameters(), 0.05)
    for _ in range(epochs):
        for x,y in learn.dls.train:
            with torch.no_grad(): zt = old(x)
            loss_of(model(x), zt, y).backward()
            opt.step()
            opt.zero_grad()
    return state(model)


def of_new(z, zt, y): return F.cross_entropy(z[:, 3:], y-3)+2*lwf(z, zt)
def of_all(z, zt, y): return F.cross_entropy(z, y)+2*lwf(z, zt)
def lwf(z, zt): return 4*F.kl_div((z[:, :3]/2).log_softmax(1), (zt/2).softmax(1), reduction='batchmean')
def icarl(z, zt, y):
    target = F.one_hot(y, 5).float()
    target[:, :3] = zt.sigmoid()
    return F.binary_cross_entropy_with_logits(z, target)


@pytest.mark.parametrize('ce, loss, weight', [('new', of_new, 2.), ('all', of_all, 2.), ('binary', icarl, 1.)])
def test_remember_is_the_loop_written_by_hand(ce, loss, weight):
    learn,old = two_tasks()
    before = state(old),flags(old)
    func = learn.loss_func
    learn.fit(2, cbs=Remember(old.train(), ce, weight=weight))
    want = by_hand(loss)
    for k,v in state(learn.model).items(): torch.testing.assert_close(v, want[k], atol=1e-6, rtol=1e-5)
    assert same(state(old), before[0]) and learn.loss_func is func and old.training


def test_the_validation_is_over_all_classes():
    learn,old = two_tasks()
    learn.fit(1, cbs=Remember(old))
    shown = learn.recorder.values[-1][1]
    learn2,old2 = two_tasks()
    learn2.loss_func = NewClasses(learn2.loss_func, 3)
    learn2.fit(1, cbs=Remember(old2, 'all'))
    assert same(state(learn.model), state(learn2.model)) # the same training
    learn2.loss_func = learn.loss_func
    assert learn2.validate()[0]==pytest.approx(shown) # by another loss shown


def test_weight_0_is_the_task_alone():
    learn,old = two_tasks()
    learn.fit(2, cbs=Remember(old, 'all', weight=0.))
    plain,_ = two_tasks()
    plain.fit(2)
    assert same(state(learn.model), state(plain.model))


@pytest.mark.parametrize('exc', [CancelBatchException, CancelTrainException, CancelEpochException])
@pytest.mark.parametrize('event, order', [('after_pred', 90), ('after_loss', -90)])
@pytest.mark.parametrize('ce', ['new', 'binary'])
def test_the_loss_function_is_given_back_after_a_cancel(ce, event, order, exc):
    class Cancel(Callback):
        def cancel(self):
            if self.training and self.train_iter%4==1: raise exc()
    cancel = Cancel()
    cancel.order = order
    setattr(cancel, event, cancel.cancel)
    learn,old = two_tasks()
    func,seen = learn.loss_func,[]
    class Look(Callback):
        order = 95
        def before_validate(self): seen.append(self.learn.loss_func)
        def after_batch(self): seen.append(self.learn.loss_func)
    learn.fit(2, cbs=[Remember(old, ce), cancel, Look()])
    assert learn.loss_func is func and seen and all(o is func for o in seen)


@pytest.mark.parametrize('event', ['before_epoch', 'before_train', 'after_pred', 'after_loss', 'after_step',
                                   'before_validate'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('out of memory'), CancelFitException()],
                         ids=lambda e: type(e).__name__)
def test_the_loss_function_is_given_back(event, exc):
    learn,old = two_tasks()
    before,func,kd = (state(old), flags(old)),learn.loss_func,Remember(old)
    boom = Boom(event, exc, at=0 if event.startswith('before') else 1, order=20)
    try: learn.fit(2, cbs=[kd, boom])
    except (KeyboardInterrupt, RuntimeError): pass
    assert boom.n and learn.loss_func is func and kd.session is None
    assert same(state(old), before[0]) and flags(old)==before[1] and not n_hooks(learn.model, old)
    assert not learn.metrics and len(learn.cbs)==len({type(c) for c in learn.cbs})


def test_lr_find_and_copies():
    learn,old = two_tasks()
    func,kd = learn.loss_func,Remember(old, T=3, ce='new', weight=2.)
    before = state(learn.model)
    learn.add_cb(kd)
    learn.lr_find(num_it=5, show_plot=False)
    assert learn.loss_func is func and same(before, state(learn.model))
    other = kd.replace(weight=1.)
    assert (other.ce, other.recipe.weight, other.terms[0].hypers['T'])==('new', 1., 3) and deepcopy(kd).ce=='new'
    assert other.teacher.models[0] is old


def test_refusals():
    learn,old = two_tasks()
    with pytest.raises(ValueError, match="did you mean 'new'"): Remember(old, ce='news')
    with pytest.raises(ValueError, match='MixUp mixes labels'): learn.fit(1, cbs=[Remember(old), MixUp()])
    with pytest.raises(ValueError, match='let grow_head add'): learn.fit(1, cbs=Remember(learn.model.train()))
    plain = learner(net(c=3))
    with pytest.raises(ValueError, match='let grow_head add'): plain.fit(1, cbs=Remember(old))
    assert plain.loss_func is not None and not plain.metrics


def test_the_loss_works_in_the_plain_callback_too():
    learn,old = two_tasks()
    learn.fit(1, cbs=KnowledgeDistillationCallback(old, LwF, T=2, weight=.5))
    assert learn.model[-1].out_features==5


class Midway(Callback):
    "Calls `f(learn)` after each event of the training but the loss itself"
    order = 99
    def __init__(self, f): self.f,self.found = f,[]
    def _note(self):
        if self.training: self.found.append(self.f(self.learn))
    before_batch = after_pred = after_loss = after_step = after_batch = _note


@pytest.mark.parametrize('ce', ['new', 'binary'])
def test_a_validation_within_the_training_is_over_all_classes(ce):
    def own(learn):
        model = deepcopy(learn.model).eval()
        with torch.no_grad(): pairs = [(model(x), y) for x,y in learn.dls.valid]
        return F.cross_entropy(*map(torch.cat, zip(*pairs))).item()
    def both(learn):
        found = learn.validate()[0],own(learn)
        learn.training = learn.model.train().training # which fastai's `validate` leaves as it needs it
        return found
    learn,old = two_tasks()
    midway = Midway(both)
    midway.before_batch = midway.after_pred = midway.after_loss = noop
    learn.fit(1, cbs=[Remember(old, ce), midway])
    assert len(midway.found)==8 and all(a==pytest.approx(b, rel=1e-5) for a,b in midway.found)


@pytest.mark.parametrize('ce', ['new', 'binary'])
def test_a_student_exported_within_the_training_has_its_own_loss_function(ce):
    learn,old = two_tasks()
    func = learn.loss_func
    midway = Midway(lambda l: pickle.loads(pickle.dumps(l.loss_func)))
    midway.after_pred = noop
    learn.fit(1, cbs=[Remember(old, ce), midway])
    assert len(midway.found)==16 and {type(o) for o in midway.found}=={type(func)}


@pytest.mark.parametrize('weighted', [lambda w: CrossEntropyLossFlat(weight=w), lambda w: nn.CrossEntropyLoss(weight=w),
                                      lambda w: partial(F.cross_entropy, weight=w)])
def test_weights_of_all_classes(weighted):
    z,y,w = torch.randn(6, 5),torch.tensor([3, 4, 1, 3, 4, 0]),torch.arange(1., 6)
    func = weighted(w)
    new = y>=3
    torch.testing.assert_close(NewClasses(func, 3)(z, y), F.cross_entropy(z[new, 3:], y[new]-3, w[3:]))
    torch.testing.assert_close(func(z, y), F.cross_entropy(z, y, w)) # itself as before
    learn,old = two_tasks()
    learn.loss_func = func
    learn.fit(1, cbs=Remember(old))
    assert learn.loss_func is func


@pytest.mark.parametrize('ce', ['new', 'binary'])
def test_rows_without_a_label_by_another_number(ce):
    found = []
    for ignore in -100, 255:
        learn,old = two_tasks()
        learn.dls = data(y=torch.where(torch.arange(32)%4==0, ignore, 3+torch.arange(32)%2), c=5)
        for dl in learn.dls.loaders: dl.rng = random.Random(0)
        learn.loss_func = CrossEntropyLossFlat(ignore_index=ignore)
        learn.fit(1, cbs=Remember(old, ce))
        found.append(state(learn.model))
    assert same(*found)


@pytest.mark.parametrize('func', [nn.CrossEntropyLoss, CrossEntropyLossFlat, partial(partial, F.cross_entropy)])
@pytest.mark.parametrize('ignore', [0, 1, 3])
def test_the_number_of_the_ignored_label_may_be_that_of_a_new_class(func, ignore):
    own,z,y = func(ignore_index=ignore),torch.randn(8, 4),torch.arange(8)%4
    new = (y>=2) & (y!=ignore)
    want = F.cross_entropy(z[new, 2:], y[new]-2)
    torch.testing.assert_close(NewClasses(own, 2)(z, y), want)
    maps,ys = z.T.reshape(1, 4, 2, 4),y.reshape(1, 2, 4)
    if not isinstance(own, CrossEntropyLossFlat): torch.testing.assert_close(NewClasses(own, 2)(maps, ys), want)
    assert task_of(own).ignore_index==ignore


class Scaled(nn.Module):
    "A loss with a parameter, and a lock that nobody can copy"
    def __init__(self, **kwargs):
        super().__init__()
        self.scale,self.lock = nn.Parameter(torch.ones(())),Lock()
        self.func = nn.CrossEntropyLoss(**kwargs)
    def forward(self, pred, y): return self.func(pred*self.scale, y)


@pytest.mark.parametrize('ignore', [-100, 255, 0])
def test_a_loss_function_of_ones_own_goes_on_learning(ignore):
    own,z,y = Scaled(ignore_index=ignore),torch.randn(8, 4),torch.arange(8)%4
    new = (y>=2) & (y!=ignore)
    NewClasses(own, 2)(z, y).backward()
    scale = torch.ones((), requires_grad=True)
    F.cross_entropy(z[new, 2:]*scale, y[new]-2).backward()
    torch.testing.assert_close(own.scale.grad, scale.grad)
    assert own.func.ignore_index==ignore


def test_a_loss_function_whose_ignored_label_is_its_own_affair():
    def own(pred, y): return F.cross_entropy(pred, y, ignore_index=own.ignore_index)
    z,y = torch.randn(1, 4, 2, 2),torch.tensor([[[0, 2], [3, 255]]])
    own.ignore_index = 255
    want = F.cross_entropy(z[:, 2:], torch.tensor([[[255, 0], [1, 255]]]), ignore_index=255)
    torch.testing.assert_close(NewClasses(own, 2)(z, y), want)
    own.ignore_index = 1
    with pytest.raises(ValueError, match='leaves out 1, the number of a new class'): NewClasses(own, 2)(z, y)


class Inside:
    "A loss with the one that computes inside"
    def __init__(self, ignore_index):
        self.ignore_index,self.ce = ignore_index,nn.CrossEntropyLoss(ignore_index=ignore_index)
    def __call__(self, pred, y): return self.ce(pred, y)

class Slots:
    __slots__ = 'ignore_index',
    def __init__(self, ignore_index): self.ignore_index = ignore_index
    def __call__(self, pred, y): return F.cross_entropy(pred, y, ignore_index=self.ignore_index)

def test_what_cannot_be_told_another_ignored_label_is_refused():
    z,y = torch.randn(8, 4),torch.arange(8)%4
    with pytest.raises(ValueError, match='leaves out 0, the number of a new class'): NewClasses(Inside(0), 2)(z, y)
    want = F.cross_entropy(z[y>=2, 2:], y[y>=2]-2)
    for own in Slots(0),Inside(255): torch.testing.assert_close(NewClasses(own, 2)(z, y), want)


class Strong(nn.Module):
    "A loss whose `weight` is none of classes"
    def __init__(self, weight):
        super().__init__()
        self.weight = weight
    def forward(self, pred, y): return F.cross_entropy(pred, y)*self.weight.mean()


@pytest.mark.parametrize('weight', [torch.tensor(.5), nn.Parameter(torch.ones(5)), torch.ones(1, 5)])
def test_another_kind_of_weight_is_left_alone(weight):
    learn,old = two_tasks()
    learn.loss_func = Strong(weight)
    learn.fit(1, cbs=Remember(old))
    assert learn.loss_func.weight is weight and all(p.isfinite().all() for p in learn.model.parameters())


def test_new_rows_of_zeros_stay():
    learn = learner()
    name,head = head_of(learn.model)
    with torch.no_grad(): head.weight[-1] = 0
    before = head.weight.clone()
    assert align_head(learn, 1)==1 and torch.equal(head.weight, before)


def test_one_new_class_has_nothing_to_be_told_from_and_is_learned_beside_the_others():
    learn = learner()
    old = grow_head(learn, np.int64(1))
    with pytest.raises(ValueError, match="ce='new' is about the new classes alone, and one has nothing beside it"):
        learn.fit(1, cbs=Remember(old))
    before = head_of(learn.model)[1].weight[-1].clone()
    learn.fit(1, cbs=Remember(old, ce='binary'))
    assert not torch.equal(head_of(learn.model)[1].weight[-1], before)


@pytest.mark.parametrize('ce', ['new', 'binary'])
@pytest.mark.parametrize('loss,y', [(BCEWithLogitsLossFlat(), torch.ones(32, 5)), (MSELossFlat(), torch.ones(32, 5)),
                                    (CrossEntropyLossFlat(), torch.ones(32, 5)/5)])
def test_targets_that_are_no_class_numbers_are_refused(ce, loss, y):
    learn = learner(dls=data(c=3))
    old = grow_head(learn, 2)
    learn.dls,learn.loss_func = data(y=y, c=5),loss
    with pytest.raises(ValueError, match='takes a class number a row, got targets .8, 5. of torch.float32'):
        learn.fit(1, cbs=Remember(old, ce=ce))


def test_labels_in_a_column_are_class_numbers():
    y = torch.arange(12)%5
    for loss in (NewClasses(CrossEntropyLossFlat(), 3), OneHotBCE(3)):
        pred = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        assert loss(pred, y[:, None])==loss(pred, y)


@pytest.mark.parametrize('loss', [FocalLossFlat(), LabelSmoothingCrossEntropyFlat(), CrossEntropyLossFlat()])
def test_new_classes_are_learned_as_if_there_were_no_rows_of_others(loss):
    g = torch.Generator().manual_seed(0)
    pred,y = torch.randn(12, 5, generator=g),torch.arange(12)%5
    new = y>=3
    assert NewClasses(loss, 3)(pred, y).item()==pytest.approx(loss(pred[new, 3:], y[new]-3).item(), rel=1e-6)


class TwoHeads(nn.Module):
    "One of 3 classes, and one registered after it that helps in training alone"
    def __init__(self): super().__init__(); self.body,self.head,self.aux = net(c=8),nn.Linear(8, 3),nn.Linear(8, 7)
    def forward(self, x): return self.head(self.body(x))


def test_the_head_is_the_one_with_as_many_outputs_as_the_data_have_classes():
    learn = learner(TwoHeads(), named(['b', 'a', 'c']))
    old = grow_head(learn, named(['b', 'a', 'c', 'd'], ['d']))
    assert (learn.model.head.out_features, learn.model.aux.out_features)==(4, 7)
    before = learn.model.aux.weight.clone()
    assert align_head(learn, 1)>0 and torch.equal(learn.model.aux.weight, before)
    assert learn.model(learn.dls.one_batch()[0]).shape[1]==4
    kd = Remember(old, 'binary')
    learn.fit(1, cbs=kd)
    learn.add_cb(kd)
    assert kd.n_old==3
    unnamed = learner(TwoHeads(), data(c=3))
    grow_head(unnamed, 2)
    assert (unnamed.model.head.out_features, unnamed.model.aux.out_features)==(5, 7)


class Cosine(nn.Linear):
    "LUCIR's head"
    def forward(self, x): return 10*F.linear(F.normalize(x), F.normalize(self.weight))


def test_a_head_of_a_class_of_its_own_grows_in_place_with_its_hooks():
    model = net(c=3)
    model[-1] = head = Cosine(8, 3, bias=False)
    learn,seen = learner(model),[]
    head.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    x = learn.dls.one_batch()[0]
    was = model.eval()(x)
    grow_head(learn, 2)
    torch.testing.assert_close(model(x)[:, :3], was)
    assert model[-1] is head and head.out_features==5 and seen==[(8, 3), (8, 5)]


class Words(Transform):
    "Has a vocabulary, and changes nothing"
    def __init__(self, vocab): self.vocab = vocab


class LowRank(nn.Linear):
    "With an update in two factors, one of which has a row for each class"
    def __init__(self):
        super().__init__(8, 3)
        self.a,self.b = nn.Parameter(torch.ones(2, 8)),nn.Parameter(torch.ones(3, 2))
    def forward(self, x): return super().forward(x)+x@self.a.T@self.b.T


def tied(model):
    names = nn.Embedding(3, 8)
    names.weight = model[-1].weight
    model.names = names


def changed(f):
    def change(model): model[-1] = f(model[-1])
    return change


@pytest.mark.parametrize('change, match', [
    (changed(nn.utils.parametrizations.weight_norm), "'4' computes its weight.*remove_parametrizations"),
    (changed(nn.utils.parametrizations.spectral_norm), "'4' computes its weight"),
    (changed(nn.utils.weight_norm), "'4' computes its weight"),
    (changed(lambda _: LowRank()), "'4', a LowRank, has 'b' with a row for each output"),
    (tied, "'4' has the weight of 'names'")])
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_head_that_is_not_its_own_weight_is_refused(change, match):
    learn = learner(net(c=3))
    change(learn.model)
    before = state(learn.model)
    for f in grow_head,align_head:
        with pytest.raises(ValueError, match=match): f(learn, 1)
    assert same(state(learn.model), before)


def test_a_head_of_other_classes_than_the_data_grows_by_a_number_alone():
    learn = learner(net(c=4), named(['b', 'a', 'c']))
    more = named(['b', 'a', 'c', 'd', 'e'])
    with pytest.raises(ValueError, match="'4' has 4 outputs, and learn's data 3 classes"): grow_head(learn, more)
    assert learn.model[-1].out_features==4 and len(learn.dls.vocab)==3
    grow_head(learn, 2)
    assert learn.model[-1].out_features==6


def test_a_teacher_without_a_network_does_not_tell_the_old_classes():
    learn = learner(net(c=5))
    for ce in 'new','binary':
        with pytest.raises(ValueError, match="old: EMA has no network at hand.*ce='all'"):
            learn.fit(1, cbs=Remember(EMA(.9), ce))
    learn.fit(1, cbs=Remember(EMA(.9), 'all', loss=SoftTarget))


@pytest.mark.parametrize('ce, task', [('new', lambda z, y: F.cross_entropy(z[:, 3:], y-3)), ('all', F.cross_entropy),
                                      ('binary', lambda z, y: F.binary_cross_entropy_with_logits(
                                          z[:, 3:], F.one_hot(y, 5)[:, 3:].float())*2/5)])
def test_who_asks_for_the_task_gets_the_columns_that_are_trained(ce, task):
    "In `suggest_weights`, and in the clean share of an attack's loss"
    learn,old = two_tasks()
    x,y = learn.dls.valid.one_batch()
    model = deepcopy(learn.model).train()
    found = Remember(old, ce).terms_on(learn, (x,), (y,))[0]
    torch.testing.assert_close(found, task(learn.model(x), y))
    learn,old = two_tasks()
    learn.dls = data(8, y=3+torch.arange(8)%2, c=5)
    x,y = tensors = [o.sigmoid() if o.is_floating_point() else o for o in learn.dls.train_ds.tensors]
    learn.dls.train_ds.tensors = tensors
    task(model(x), y).backward()
    want = [p.detach()-.05*p.grad for p in model.parameters()]
    seen = {}
    class Look(Callback):
        def after_pred(self): seen[self.training] = self.attack._task_loss
    learn.fit(1, cbs=[Remember(old, ce, weight=1e-9), Attack(.05, 1, natural=1.), Look()])
    assert seen[False] is learn.loss_func and seen[True](model(x), y).item()==pytest.approx(task(model(x), y).item())
    for p,w in zip(learn.model.parameters(), want): torch.testing.assert_close(p, w, atol=1e-6, rtol=1e-5)


def test_a_head_that_has_not_grown_is_refused_outside_of_a_fit_too():
    learn = learner(net(c=3))
    with pytest.raises(ValueError, match='let grow_head add'): suggest_weights(learn, Remember(net(c=3)))


def test_a_hidden_layer_as_wide_as_the_data_have_classes_is_no_head():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 3))
    learn = learner(model, data(c=3))
    grow_head(learn, 3)
    learn.dls = data(y=3+torch.arange(32)%2, c=5)
    hidden = model[1].weight.clone()
    assert align_head(learn, 2)>0 and torch.equal(model[1].weight, hidden) and model[3].out_features==6


def test_one_squeezed_output_is_the_head_of_two_classes():
    class Squeezed(nn.Module):
        def __init__(self): super().__init__(); self.body = net(c=1)
        def forward(self, x): return self.body(x).squeeze(-1)
    assert head_of_learner(learner(Squeezed(), data(c=2)))[0]=='body.4'


class OfTexts(nn.Module):
    "Logits by what the classes are called"
    def __init__(self): super().__init__(); self.body,self.texts = net(c=4),nn.Parameter(torch.randn(3, 4))
    def forward(self, x): return self.body(x)@self.texts.T


def test_a_network_whose_logits_no_linear_layer_gives_is_refused():
    learn = learner(OfTexts())
    before = state(learn.model)
    for f in grow_head,align_head:
        with pytest.raises(ValueError, match=r"no nn.Linear of the OfTexts gives its logits \(8, 3\).*'body.4', has 4"):
            f(learn, 1)
    assert same(state(learn.model), before)


def test_the_next_data_are_normalised_and_numbered_as_the_first():
    learn = learner(net(c=2), named('ab', std=.5))
    for std,said in (None, 'not normalised'), (.25, r'normalised by \[0.0, 0.0, 0.0\] and \[0.25'):
        with pytest.raises(ValueError, match=f"new: its pictures are {said}.*the Learner's are normalised.*from_stats"):
            grow_head(learn, named('abc', std=std))
    def text(vocab, words):
        tfms = [[At([torch.zeros(3, 8, 8)]*24), Words(words)], [At('ab'*12), Categorize(vocab, sort=False)]]
        return Datasets(range(24), tfms, splits=[range(24), range(24)]).dataloaders(bs=8, num_workers=0, device='cpu')
    learn.dls = text('ab', ['x', 'y'])
    with pytest.raises(ValueError, match='new: its words are numbered otherwise'):
        grow_head(learn, text('abc', ['y', 'x']))
    assert learn.model[-1].out_features==2
    grow_head(learn, text('abc', ['x', 'y']))
    assert learn.model[-1].out_features==3


@pytest.mark.parametrize('n_new', [2, 3])
def test_weights_of_the_old_classes_alone_are_refused(n_new):
    learn = learner(net(c=3), loss_func=CrossEntropyLossFlat(weight=torch.ones(3)))
    old = grow_head(learn, n_new)
    with pytest.raises(ValueError, match='a weight for each of the 3 old classes, and none for the new'):
        learn.fit(1, cbs=Remember(old))
    assert learn.loss_func.func.weight is not None and len(learn.loss_func.func.weight)==3
