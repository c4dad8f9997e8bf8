"""Fits within fits, Learners copied or exported in the middle, callbacks used twice

The weights are those of a loop by hand"""
import copy, pickle

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelTrainException
from fastai.callback.schedule import Learner  # noqa: F401  with `lr_find`
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, ranger
from torch import nn

from fasterai.distill.loss.learned import VID
from fasterai.distill.losses import FitNet
from helpers import Boom, data, learner, n_hooks, net, state
from kd_helpers import KD, layers, teacher


def mse(pred, teacher_pred): return F.mse_loss(pred, teacher_pred)


def by_hand(model, t, epochs=3, weight=0.5):
    "A copy of `model` after plain SGD on the mix of cross-entropy and `mse`"
    model,t = copy.deepcopy(model).train(),t.eval()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    dls = learner(model).dls
    for _ in range(epochs):
        for x,y in dls.train:
            z = model(x)
            loss = (1-weight)*F.cross_entropy(z, y) + weight*mse(z, t(x).detach())
            opt.zero_grad(); loss.backward(); opt.step()
    return model


def close(a, b, tol=1e-5): return max((p-q).abs().max().item() for p,q in zip(a.parameters(), b.parameters()))<tol


class At(Callback):
    "Does `f(learn)` the first time that an event comes"
    def __init__(self, event, f, order=20): self.event,self.f,self.order,self.done = event,f,order,False
    def __call__(self, name):
        if name!=self.event or self.done: return
        self.done = True
        self.f(self.learn)


# --- other callbacks that use the Learner in the middle of a fit --------------

@pytest.mark.parametrize('act,event', [
    (lambda l: l.validate(), 'after_epoch'), (lambda l: l.get_preds(), 'after_epoch'),
    (lambda l: l.get_preds(), 'after_train'),
    (lambda l: l.lr_find(num_it=6, show_plot=False), 'after_epoch'), (lambda l: l.summary(), 'after_epoch')],
    ids=['validate', 'get_preds', 'get_preds in training', 'lr_find', 'summary'])
@pytest.mark.parametrize('inside', [True, False], ids=['in Learner', 'in fit'])
def test_what_others_do_in_the_middle_does_not_end_the_distillation(act, event, inside, tmp_path):
    import fastai.callback.hook  # noqa: F401  `summary`
    model,kd,at = net(),KD(teacher(), mse),At(event, act, order=70)
    learn = learner(copy.deepcopy(model), cbs=kd if inside else None, wd=0., path=tmp_path)
    def keep_order(l):
        was = [copy.deepcopy(dl.rng) for dl in l.dls.loaders]
        act(l)
        for dl,rng in zip(l.dls.loaders, was): dl.rng = rng
    at.f = keep_order
    learn.fit(3, cbs=[at] if inside else [kd, at])
    assert close(learn.model, by_hand(model, teacher()))
    assert len(learn.metrics)==0 and kd.session is None and not n_hooks(learn.model)
    assert len(kd.log.history)==3*len(learn.dls.train)


def test_a_fit_within_a_fit_distils_and_so_does_the_outer_one_to_its_end():
    model,kd = net(),KD(teacher(), mse)
    learn = learner(copy.deepcopy(model), cbs=kd, wd=0.)
    learn.fit(3, cbs=At('after_epoch', lambda l: l.fit(1)))
    assert close(learn.model, by_hand(model, teacher(), epochs=4)) and kd.session is None
    assert len(kd.log.history)==3*len(learn.dls.train) # the inner fit has a log of its own


@pytest.mark.parametrize('opt_func', [Adam, ranger], ids=['Adam', 'ranger'])
def test_lr_find_within_a_fit_gives_adapters_and_their_momentum_back(opt_func, tmp_path):
    def run(act):
        kd = KD(teacher(), FitNet, **layers)
        torch.manual_seed(0)
        learn = learner(opt_func=opt_func, path=tmp_path)
        def keep_order(l):
            was = [copy.deepcopy(dl.rng) for dl in l.dls.loaders]
            act(l)
            for dl,rng in zip(l.dls.loaders, was): dl.rng = rng
            l.opt.set_hypers(lr=0.05)
        learn.fit(3, cbs=[kd, At('after_epoch', keep_order, order=70)])
        return learn.model,kd.learned
    (a,ka),(b,kb) = run(lambda l: None),run(lambda l: l.lr_find(num_it=6, show_plot=False))
    assert close(a, b, 1e-6) and close(ka, kb, 1e-6)


# --- the optimizer or the whole Learner, in the middle ------------------------

class Moves(Callback):
    "In which steps what learns beside the student has changed"
    order = 99
    def __init__(self, kd): self.kd,self.was,self.moved = kd,None,[]
    def after_batch(self):
        if not self.training: return
        now = [p.detach().clone() for p in self.kd.learned.parameters()]
        if self.was: self.moved.append(any(not torch.equal(a, b) for a,b in zip(now, self.was)))
        self.was = now


@pytest.mark.parametrize('loss', [FitNet, VID], ids=['adapters', 'VID'])
@pytest.mark.parametrize('event', ['after_epoch', 'after_batch'])
@pytest.mark.parametrize('opt_func', [SGD, Adam])
def test_a_new_optimizer_in_the_middle_takes_the_adapters_over(loss, event, opt_func):
    def anew(l):
        state = l.opt.state_dict()
        l.create_opt()
        l.opt.load_state_dict(state)
    def run(act):
        kd = KD(teacher(), loss() if loss is VID else loss, **layers)
        torch.manual_seed(0)
        learn,moves = learner(opt_func=opt_func),Moves(kd)
        learn.fit(3, cbs=[kd, moves, At(event, act, order=70)])
        assert all(moves.moved) and len(moves.moved)==3*len(learn.dls.train)-1
        assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))
        return learn.model,kd.learned
    (a,ka),(b,kb) = run(lambda l: None),run(anew)
    assert close(a, b, 1e-6) and close(ka, kb, 1e-6)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda l: pickle.loads(pickle.dumps(l))], ids=['deepcopy', 'pickle'])
def test_a_copy_in_the_middle_holds_nothing_of_the_distillation(copied):
    class KeepsCopies(Callback):
        order,remove_on_fetch = 70,True
        def before_fit(self): self.copies = []
        def after_epoch(self):
            learn = self.learn
            learn.remove_cb(self)
            self.kept.append(copied(learn))
    keeps = KeepsCopies()
    keeps.kept = []
    learn = learner(metrics=accuracy)
    learn.fit(2, cbs=[KD(teacher(), FitNet, **layers), keeps])
    got = keeps.kept[0]
    assert [m.name for m in got.metrics]==['accuracy'] and not n_hooks(got.model)
    assert not [c for c in got.cbs if type(c).__module__.startswith('fasterai')]
    got.fit(1)
    assert sum(map(len, got.opt.param_lists))==len(list(got.model.parameters())) and 'state_dict' not in vars(got.opt)
    assert len(got.recorder.values[-1])==3 and [m.name for m in learn.metrics]==['accuracy']


def test_a_copied_learner_distils_with_the_same_teacher_and_its_own_adapters():
    t = teacher()
    kd = KD(t, FitNet, **layers)
    learn = learner(opt_func=Adam, cbs=kd)
    learn.fit(1)
    other = copy.deepcopy(learn)
    own = other.cbs[-1]
    assert type(own) is KD and own is not kd and own.teacher.models[0] is t and own.learn is other
    other.fit(1); learn.fit(1)
    assert close(learn.model, other.model, 1e-6) and close(kd.learned, own.learned, 1e-6)
    assert not {id(p) for p in kd.learned.parameters()} & {id(p) for p in own.learned.parameters()}


# --- two callbacks, two students, two Learners --------------------------------

def test_two_callbacks_with_adapters_train_as_the_sum_of_both():
    t1,t2,model = teacher().eval(),net(8, seed=9).eval(),net()
    a1,a2 = (nn.Conv2d(4, 8, 1) for _ in range(2))
    kds = [KD(t, FitNet, '0', '0', weight=0.2, task_weight=1., adapters={'0': copy.deepcopy(a)})
           for t,a in ((t1, a1), (t2, a2))]
    learn = learner(copy.deepcopy(model), wd=0.)
    learn.fit(2, cbs=kds)
    hand = copy.deepcopy(model).train()
    opt = torch.optim.SGD([*hand.parameters(), *a1.parameters(), *a2.parameters()], lr=0.05)
    dls = learner(hand).dls
    for _ in range(2):
        for x,y in dls.train:
            h = hand[0](x)
            hints = (F.mse_loss(a(h), t[0](x).detach()) for a,t in ((a1, t1), (a2, t2)))
            loss = F.cross_entropy(hand[1:](h), y) + sum(0.2*o for o in hints)
            opt.zero_grad(); loss.backward(); opt.step()
    assert close(learn.model, hand)
    for kd,a in zip(kds, (a1, a2)): assert close(kd.learned, a)
    assert len(learn.metrics)==0 and [len(g) for g in learn.opt.param_lists]==[len(list(learn.model.parameters()))]


@pytest.mark.parametrize('loss', [FitNet, VID], ids=['adapters', 'VID'])
def test_another_student_begins_as_with_a_new_callback(loss):
    def run(first):
        kd = KD(teacher(), loss() if loss is VID else loss, **layers)
        if first: learner(net(seed=4), opt_func=Adam).fit(2, cbs=kd)
        torch.manual_seed(0)
        learn = learner(net(seed=5), opt_func=Adam)
        learn.fit(2, cbs=kd)
        return learn.model
    assert close(run(True), run(False), 1e-6)


def test_a_callback_that_went_over_to_another_learner_is_refused_in_the_first():
    model,kd = net(),KD(teacher(), mse)
    first = learner(cbs=kd)
    second = learner(copy.deepcopy(model), cbs=kd, wd=0.)
    with pytest.raises(ValueError, match='another Learner'): first.fit(1)
    second.fit(3)
    assert close(second.model, by_hand(model, teacher())) and len(first.metrics)==0


# --- fits that end badly ------------------------------------------------------

@pytest.mark.parametrize('event,error,order,at', [
    ('before_fit', RuntimeError('typo'), 60, 0), ('after_fit', RuntimeError('disk'), -20, 0),
    ('after_epoch', CancelBatchException(), 20, 0)])
def test_a_fit_that_ends_by_an_error_outside_of_the_epochs_is_undone(event, error, order, at):
    kd = KD(teacher(), FitNet, **layers)
    learn = learner(cbs=kd, metrics=accuracy)
    with pytest.raises(type(error)): learn.fit(1, cbs=Boom(event, error, at=at, order=order))
    assert [m.name for m in learn.metrics]==['accuracy'] and kd.session is None and not n_hooks(learn.model)
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))
    assert len(learn.validate())==2
    learn.fit(1)
    assert len(kd.log.history)==len(learn.dls.train)


def test_a_cancelled_training_leaves_the_validation_alone():
    learn,kd,hooks = learner(),KD(teacher(), FitNet, valid=True, **layers),[]
    learn.fit(1, cbs=kd)
    learn.fit(1, cbs=[kd, Boom('before_train', CancelTrainException(), at=0, order=-20)])
    assert len(learn.recorder.values[-1])>=2
    def cancel(l): raise CancelTrainException()
    see = At('before_validate', lambda l: hooks.append(n_hooks(l.model)), order=99)
    learn.fit(1, cbs=[kd, At('before_batch', cancel, order=50), see])
    assert hooks==[0]


@pytest.mark.parametrize('k', range(1, 10))
def test_the_window_is_exact_in_whole_batches(k):
    counts = []
    for kw in dict(start_pct=k/10),dict(end_pct=k/10):
        n = []
        def loss(pred, teacher_pred): n.append(1); return mse(pred, teacher_pred)
        learner(dls=data(n=80)).fit(1, cbs=KD(teacher(), loss, **kw))
        counts.append(len(n))
    assert counts==[10-k, k]


# --- what a second review found -----------------------------------------------

def own(): 
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {'0': nn.Conv2d(4, 8, 1)}


def test_lr_find_gives_ones_own_adapters_back_too(tmp_path):
    adapters = own()
    kd = KD(teacher(), FitNet, '0', '0', adapters=adapters)
    learner(cbs=kd, path=tmp_path).lr_find(num_it=12, show_plot=False)
    assert close(adapters['0'], own()['0'], 1e-9)


def test_learned_weights_load_at_any_time_and_survive_lr_find(tmp_path):
    kd = KD(teacher(), FitNet, **layers)
    learn = learner(cbs=kd)
    learn.fit(1)
    saved = state(kd.learned)
    learn.fit(2)
    kd.load_learned(saved)
    assert kd.loading is None and all(torch.equal(v, saved[k]) for k,v in kd.learned.state_dict().items())
    fresh = KD(teacher(), FitNet, **layers)
    fresh.load_learned(saved)
    other = learner(cbs=fresh, path=tmp_path)
    other.lr_find(num_it=8, show_plot=False)
    other.fit(1, lr=0.)
    assert all(torch.equal(p, saved[k]) for k,p in fresh.learned.named_parameters())


def test_a_callback_taken_out_of_a_learner_leaves_it_free():
    kd,a,b = KD(teacher(), mse),None,learner(net(seed=3))
    a = learner(cbs=kd)
    b.add_cb(kd)
    a.remove_cb(kd)
    a.fit(1)
    assert len(a.recorder.values)==1


@pytest.mark.parametrize('event', ['before_batch', 'after_batch'])
def test_a_validation_within_a_batch_changes_neither_hooks_nor_modes(event):
    modes,kd = [],KD(teacher(), FitNet, **layers)
    def validate(l):
        kept = {k:vars(l).get(k) for k in ('training', 'dl', 'xb', 'yb', 'iter', 'n_iter', 'pct_train')}
        l.validate()
        vars(l).update(kept)
        l.model.train()
    class Modes(Callback):
        order = 60
        def before_step(self): modes.append(all(m.training for m in kd.learned.modules() if m is not kd.learned))
    learn = learner()
    learn.fit(2, cbs=[kd, Modes(), At(event, validate, order=30)])
    assert len(modes)==2*len(learn.dls.train) and all(modes) and len(kd.log.history)==len(modes)


def test_terms_on_in_the_middle_of_a_fit_leave_its_teacher_alone():
    heard = []
    class Told:
        def begin(self, learn): heard.append('begin')
        def end(self): heard.append('end')
        def answer(self, x): return torch.zeros(len(x), 3)
    kd = KD(Told(), mse)
    learn = learner()
    learn.fit(2, cbs=[kd, At('after_epoch', lambda l: kd.terms_on(l, *map(lambda o: (o,), l.dls.one_batch())))])
    assert heard==['begin', 'end'] and len(kd.log.history)==2*len(learn.dls.train)


def test_a_student_swapped_in_the_middle_is_looked_at_and_a_shared_one_refused():
    def swap(to):
        def f(l):
            l.model = to
            l.create_opt()
        return f
    kd,other = KD(teacher(), FitNet, **layers),net(seed=7)
    learn = learner()
    learn.fit(2, cbs=[kd, At('after_epoch', swap(other))])
    assert kd.eyes.model is other and len(kd.log.history)==2*len(learn.dls.train)
    t = teacher()
    before = state(t)
    with pytest.raises(ValueError, match='share'): learner().fit(2, cbs=[KD(t, mse), At('after_epoch', swap(t))])
    assert all(torch.equal(v, before[k]) for k,v in t.state_dict().items())


def test_losses_that_are_objects_copy_and_names_stay_apart():
    from dataclasses import dataclass
    @dataclass
    class Scaled:
        by:float
        def __call__(self, pred, teacher_pred): return self.by*F.mse_loss(pred, teacher_pred)
    kd = KD(teacher(), Scaled(2.)).replace(weight=0.2)
    assert kd.recipe.terms[0].loss.by==2. and kd.recipe.weight==0.2
    def f(pred, teacher_pred): return pred.mean()
    def f_2(pred, teacher_pred): return pred.mean()
    assert len({o.name for o in KD(teacher(), [f, f, f_2]).terms})==3


def test_a_callback_taken_out_in_the_middle_says_that_the_fit_goes_on_without_it():
    def validate_alone(l):
        with l.removed_cbs(kd): l.validate()
    kd,learn = KD(teacher(), mse),learner()
    with pytest.warns(UserWarning, match='goes on: without a teacher'):
        learn.fit(2, cbs=[kd, At('after_epoch', validate_alone)])
    assert len(kd.log.history)==len(learn.dls.train) and len(learn.metrics)==0
    kd,learn = KD(teacher(), FitNet, **layers),learner() # its adapters leave before they are clipped
    with pytest.warns(UserWarning, match='goes on: without a teacher'):
        learn.fit(1, cbs=[kd, At('before_step', lambda l: l.remove_cb(kd), order=0)])
    assert len(learn.recorder.values)==1
