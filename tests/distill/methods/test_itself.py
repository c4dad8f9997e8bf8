"Self-distillation in a fit, against loops written by hand"
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *  # noqa: F403 (gives Learner `lr_find`)
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.losses import DIST, SoftTarget
from fasterai.distill.methods.itself import SelfDistillation, kinds
from helpers import Boom, GradsAt, data, learner, n_hooks, same, state


def fitted(cbs=None, epochs=3, learn=None, **kwargs):
    learn = learn or learner(**kwargs)
    learn.fit(epochs, cbs=cbs)
    return learn


def kl(student, teacher, T):
    return T**2*F.kl_div((student/T).log_softmax(1), (teacher/T).softmax(1), reduction='batchmean')


def by_hand(loss_of, epochs=3):
    "Plain SGD on `loss_of(model, x, y, rows)`, in the order of the learner's batches"
    learn = learner(dls=data(y=torch.arange(32)%3))
    model,opt = learn.model.train(),torch.optim.SGD(learn.model.parameters(), 0.05)
    for epoch in range(epochs):
        for x,y in learn.dls.train:
            loss_of(model, x, y, epoch).backward()
            opt.step()
            opt.zero_grad()
    return model


def close(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), atol=1e-6, rtol=0)


three = partial(data, y=torch.arange(32)%3)


def test_the_last_batch_equals_a_loop_by_hand():
    kept = []
    def loss(model, x, y, epoch):
        n = len(x)
        if not kept:
            z = model(x)
            total = F.cross_entropy(z, y)
        else:
            x0,y0,z0 = kept.pop()
            z = model(torch.cat([x, x0]))
            total = F.cross_entropy(z, torch.cat([y, y0])) + kl(z[n:], z0, 3)
        kept.append((x, y, z[:n].detach()))
        return total
    close(fitted(SelfDistillation('last_batch'), dls=three()).model, by_hand(loss))


def test_the_class_equals_a_loop_by_hand():
    def loss(model, x, y, epoch):
        z = model(x)
        rows = [[i for i in range(len(y)) if y[i]==c] for c in range(3)]
        pairs = [(i, js[(k+1)%len(js)]) for js in rows if len(js)>1 for k,i in enumerate(js)]
        a,b = map(list, zip(*pairs))
        return F.cross_entropy(z, y) + kl(z[a], z[b].detach(), 4)
    close(fitted(SelfDistillation('class'), dls=three()).model, by_hand(loss))


def test_the_past_equals_a_loop_by_hand():
    said = {} # by the picture itself
    def loss(model, x, y, epoch):
        z = model(x)
        keys = [o.numpy().tobytes() for o in x]
        p = torch.stack([said.get(k, F.one_hot(y, 3)[i].float()) for i,k in enumerate(keys)])
        said.update({k:o for k,o in zip(keys, z.detach().softmax(1))})
        a = 0.8*(epoch+1)/3
        return F.cross_entropy(z, (1-a)*F.one_hot(y, 3)+a*p)
    close(fitted(SelfDistillation('past'), dls=three()).model, by_hand(loss))


@pytest.mark.parametrize('kind', kinds)
def test_no_weight_is_plain_training(kind):
    assert same(state(fitted().model), state(fitted(SelfDistillation(kind, weight=0., task_weight=1.)).model))


@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'before_validate'])
def test_nothing_is_left_behind(kind, event):
    for exc in KeyboardInterrupt(), CancelFitException():
        kd,learn = SelfDistillation(kind),learner()
        loader = learn.dls.train.after_batch
        boom = Boom(event, exc, at=0 if 'valid' in event else 2, order=20)
        try: learn.fit(2, cbs=[kd, boom])
        except KeyboardInterrupt: pass
        assert boom.n>boom.at
        assert not n_hooks(learn.model) and not len(learn.metrics) and kd.session is None
        assert 'create_batches' not in vars(learn.dls.train) and learn.dls.train.after_batch is loader
        assert vars(learn).get('_with_events') is None
        assert len(learn.opt.all_params())==len(list(learn.model.parameters()))
        learn.fit(1, cbs=kd)


@pytest.mark.parametrize('kind', kinds)
def test_nothing_is_warned_of_that_nobody_gave(kind, recwarn):
    learner().fit(1, cbs=SelfDistillation(kind))
    assert not [o for o in recwarn if 'mask' in str(o.message)]


@pytest.mark.parametrize('kind', ['last_batch', 'past'])
def test_a_resumed_training_equals_an_uninterrupted_one(kind, tmp_path):
    make = partial(SelfDistillation, kind, schedule=lambda pct: 1.)
    whole = fitted(make(), epochs=4)
    kd,learn = make(),learner()
    learn.fit(2, cbs=kd)
    torch.save(kd.learned.state_dict(), tmp_path/'kd.pt')
    new = make()
    new.load_learned(torch.load(tmp_path/'kd.pt', weights_only=True))
    learn.fit(2, cbs=new)
    assert same(state(whole.model), state(learn.model))
    again = fitted(kd := make(), epochs=2) # the same callback goes on, too
    assert same(state(whole.model), state(fitted(kd, epochs=2, learn=again).model))
    assert not same(state(whole.model), state(fitted(make(), epochs=2, learn=fitted(make(), epochs=2)).model))


@pytest.mark.parametrize('kind', ['last_batch', 'past'])
def test_lr_find_gives_the_memory_back(kind, tmp_path):
    learn = learner(path=tmp_path)
    kd = SelfDistillation(kind)
    learn.fit(1, cbs=kd)
    was = deepcopy(kd.learned.state_dict())
    learn.add_cb(kd)
    learn.lr_find(num_it=8, stop_div=False, show_plot=False)
    torch.testing.assert_close(dict(kd.learned.state_dict()), dict(was), rtol=0, atol=0)


@pytest.mark.parametrize('kind', kinds)
def test_copies_and_exported_learners(kind, tmp_path):
    learn = Learner(digits_dls(100, n_valid=50), digits_net(4), CrossEntropyLossFlat(), path=tmp_path)
    kd = SelfDistillation(kind, weight=0.3)
    learn.add_cb(kd)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    copied = deepcopy(learn)
    other = next(o for o in copied.cbs if isinstance(o, SelfDistillation))
    assert other is not kd and other.learn is copied and repr(other)==repr(kd)
    assert kind in ('class', 'virtual') or other.teacher is not kd.teacher
    before = state(learn.model)
    with copied.no_bar(), copied.no_logging(): copied.fit(1, 1e-2)
    assert same(state(learn.model), before) and not same(state(copied.model), before)
    learn.export('student.pkl')
    loaded = load_learner(tmp_path/'student.pkl')
    with loaded.no_bar(): pred = loaded.get_preds(dl=loaded.dls.test_dl([0, 1]))[0]
    assert pred.shape==(2, 10)
    learn.remove_cb(kd)
    assert pickle.loads(pickle.dumps(kd)).kind==kind
    assert kd.replace(task_weight=0.5).recipe.task_weight==0.5


def test_a_copy_remembers_what_the_first_one_does():
    learn = learner(cbs=SelfDistillation('past'))
    learn.fit(1)
    copied = deepcopy(learn)
    for o in learn,copied: o.fit(1)
    a,b = learn.self_distillation.teacher.learns,copied.self_distillation.teacher.learns
    assert a is not b and b.seen.all() and same(state(learn.model), state(copied.model))
    for dl in learn.dls.loaders: assert 'create_batches' not in vars(dl)


def test_the_loss_may_be_another():
    kd = SelfDistillation('last_batch', loss=partial(DIST, T=2), weight=0.2)
    learn = fitted(kd)
    assert kd.log.history.distill_loss.iloc[1:].gt(0).all() and kd.recipe.task_weight==1
    assert len(learn.metrics)==0


def test_the_training_alone_is_changed():
    rows = []
    class Rows(GradsAt):
        def before_fit(self): pass
        def before_step(self): pass
        def after_pred(self): rows.append((self.learn.training, len(self.learn.xb[0]), len(self.learn.yb[0])))
    learn = learner(metrics=accuracy, cbs=SelfDistillation('last_batch', end_pct=0.5))
    learn.fit(2, cbs=Rows())
    assert rows==[(True, 8, 8), *[(True, 16, 16)]*3, *[(False, 8, 8)]*4, *[(True, 8, 8)]*4, *[(False, 8, 8)]*4]
    learn.validate()
    assert {o[1] for o in rows if not o[0]}=={8}


def test_rows_of_another_size_are_not_joined():
    sizes = []
    class Sizes(GradsAt):
        order = 0
        def before_fit(self): pass
        def before_step(self): sizes.append(tuple(self.learn.xb[0].shape[::2]))
        def before_batch(self):
            if self.learn.iter>=2: self.learn.xb = (F.interpolate(self.learn.xb[0], size=12),)
    fitted([SelfDistillation('last_batch'), Sizes()], epochs=1)
    assert sizes==[(8, 8), (16, 8), (8, 12), (16, 12)]


def test_steps_that_are_gathered():
    a,b = SelfDistillation('last_batch'),SelfDistillation('past')
    for kd in a,b: fitted([kd, GradientAccumulation(16)], opt_func=Adam, epochs=2)
    assert b.teacher.learns.seen.all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown kind of self-distillation 'pass'; did you mean 'past'"):
        SelfDistillation('pass')
    with pytest.raises(ValueError, match='valid: '): SelfDistillation('last_batch', valid=True)
    with pytest.raises(ValueError, match='mask: '): SelfDistillation('last_batch', mask=0)
    with pytest.raises(TypeError, match='start'): SelfDistillation('class', start=0.1)
    with pytest.raises(ValueError, match='takes no feature maps'):
        SelfDistillation('past', loss=SoftTarget, activations_student='0', activations_teacher='0')
    with pytest.raises(ValueError, match='mixes others each time'):
        fitted([SelfDistillation('last_batch'), MixUp()])
    with pytest.raises(TypeError, match='target must be class indices'): fitted([SelfDistillation('class'), MixUp()])
