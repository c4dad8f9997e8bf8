"Networks that teach each other: equal to a loop by hand, restored, cleaned up, and never mixed into the student"
import pickle
import random
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import fastai.callback.schedule
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.metrics import Perplexity, accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.several import ConfidentTeachers, DeepMutualLearning, several
from fasterai.distill.losses import BinaryKD, DecoupledKD, FitNet, SoftTarget
from fasterai.distill.methods.mutual import MutualLearning
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.teacher.peers import Peers
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from helpers import Boom, CPUMixedPrecision, data, flags, learner, n_hooks, net, same, state

def nets(k=2): return [net(4+i, seed=i) for i in range(k)]

def near(a, b, tol=1e-6):
    for p,q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.allclose(p.float(), q.float(), rtol=tol, atol=tol), (p-q).abs().max()


# A loop by hand, with an optimizer for each network

def by_hand(models, loss, opt_func, epochs=3, lr=.05, wd=None, clip=None):
    "`loss(zs, y)` gives each network's own"
    dls = data()
    dls.train.rng = random.Random(0)
    learners = [learner(m, dls, opt_func=opt_func, wd=wd) for m in models]
    for o in learners:
        o.create_opt()
        o.opt.set_hypers(lr=lr, **({} if wd is None else dict(wd=wd)))
        o.model.train()
    for _ in range(epochs):
        for x,y in dls.train:
            losses = loss([o.model(x) for o in learners], y)
            for o,each in zip(learners, losses):
                each.backward()
                if clip: nn.utils.clip_grad_norm_(o.model.parameters(), clip)
                o.opt.step()
                o.opt.zero_grad()
    return models

def one_target(zs, y, how):
    "KDCL at T=2"
    z = torch.stack(zs).detach()
    if how=='min': z = z-z.gather(2, y[None, :, None].expand(len(zs), -1, 1))
    target = z.mean(0) if how=='mean' else z.amin(0)
    return [F.cross_entropy(o, y)+SoftTarget(o, target, T=2) for o in zs]

opts = dict(sgd=partial(SGD, mom=.9), adam=Adam, torch_adam=partial(OptimWrapper, opt=torch.optim.Adam))

@pytest.mark.parametrize('k', [2, 3])
@pytest.mark.parametrize('opt', opts)
def test_one_optimizer_for_all_equals_one_for_each(k, opt):
    lr = .05 if opt=='sgd' else .003
    want = by_hand(nets(k), lambda zs, y: DeepMutualLearning(k, 3.)(zs, y)[1], opts[opt], lr=lr)
    got = nets(k)
    ml = MutualLearning(got[1:])
    learner(got[0], opt_func=opts[opt]).fit(3, lr, cbs=ml)
    for a,b in zip(got, want): near(a, b)
    assert all(a is b for a,b in zip(ml.peers, got[1:]))

@pytest.mark.parametrize('how', ['mean', 'min'])
def test_one_target_for_all_equals_a_loop(how):
    want = by_hand(nets(3), partial(one_target, how=how), SGD)
    got = nets(3)
    learner(got[0]).fit(3, .05, cbs=MutualLearning(got[1:], partial(SoftTarget, T=2), target=how))
    for a,b in zip(got, want): near(a, b)

def test_each_is_clipped_by_itself_and_norms_are_not_decayed():
    want = by_hand(nets(3), lambda zs, y: DeepMutualLearning(3, 3.)(zs, y)[1], SGD, wd=.3, clip=.2)
    got = nets(3)
    learner(got[0], wd=.3).fit(3, .05, cbs=[MutualLearning(got[1:]), GradientClip(.2)])
    for a,b in zip(got, want): near(a, b)

def test_of_one_step_no_gradient_crosses():
    "The student's gradients are those of its own loss, with the peer as a constant"
    a,b = nets()
    class Keep(Callback):
        order = 99
        def before_step(self):
            self.xb_yb = self.learn.xb[0],self.learn.y
            self.grads = [[p.grad.clone() for p in m.parameters()] for m in (a, b)]
            raise CancelFitException()
    a0,b0,keep = deepcopy(a),deepcopy(b),Keep()
    learner(a).fit(1, cbs=[MutualLearning(b), keep])
    x,y = keep.xb_yb
    za,zb = a0.train()(x),b0.train()(x)
    for z,t,m,grads in ((za, zb, a0, keep.grads[0]), (zb, za, b0, keep.grads[1])):
        want = torch.autograd.grad(F.cross_entropy(z, y)+SoftTarget(z, t, T=3), list(m.parameters()), retain_graph=True)
        for g,w in zip(grads, want): assert torch.allclose(g, w, atol=1e-6)


# Weight 0

def dropped(seed=0): return net(4, seed=seed, head=(nn.Dropout(),))

KD = KnowledgeDistillationCallback
unweighted = dict(kd=lambda: KD(net(8, seed=1), SoftTarget, weight=0),
                  peers=lambda: KD(Peers(dropped(1)), several(SoftTarget), weight=0),
                  mutual=lambda: MutualLearning(dropped(1), weight=0))

@pytest.mark.parametrize('make', unweighted.values(), ids=unweighted)
def test_weight_0_is_plain_training_bit_for_bit(make):
    def trained(cbs):
        torch.manual_seed(0)
        learn = learner(dropped(), opt_func=Adam)
        learn.fit(3, cbs=cbs)
        return state(learn.model)
    assert same(trained(None), trained(make()))

def test_with_weight_0_the_peers_train_each_alone():
    want = by_hand(nets(3), lambda zs, y: [F.cross_entropy(z, y) for z in zs], SGD)
    got = nets(3)
    learner(got[0]).fit(3, .05, cbs=(ml := MutualLearning(got[1:], weight=0)))
    for a,b in zip(got, want): near(a, b)
    assert ml.log.history.mutual_loss.min()>0 # and the table says how far they are apart

def test_before_the_start_peers_train_alone_and_the_schedule_is_theirs_too():
    def loss(zs, y, step=iter(range(99))):
        w = 0 if next(step)<6 else 1
        return [F.cross_entropy(z, y)+w*SoftTarget(z, t, T=3) for z,t in zip(zs, zs[::-1])]
    want = by_hand(nets(), loss, SGD)
    got = nets()
    learner(got[0]).fit(3, .05, cbs=MutualLearning(got[1], start_pct=.5))
    for a,b in zip(got, want): near(a, b)


# What else a fit may be

def test_mixup_is_the_peers_too():
    "Their task's loss is the Learner's, so a peer that is as the student was ends as the student of swapped roles"
    def trained(a, b):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        learner(a).fit(2, .05, cbs=[MutualLearning(b), MixUp(.4)])
    a,b = nets()
    c,d = nets()
    trained(a, b), trained(d, c)
    near(a, c), near(b, d)

@pytest.mark.parametrize('how', ['each', 'mean', 'min'])
def test_labels_mixed_by_mixup_are_known_to_the_target(how):
    learn = learner(nets()[0])
    learn.fit(1, cbs=[MutualLearning(net(6, seed=3), DecoupledKD if how=='each' else SoftTarget, target=how)]
              + ([] if how=='each' else [MixUp(.4)]))
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_accumulated_gradients_are_one_step_for_all():
    class Half(Callback):
        "Every batch twice, in halves, would be the same mean; here just the number of steps is of interest"
        n = 0
        def after_step(self): self.n += 1
    got = nets()
    before = state(got[1])
    learner(got[0]).fit(1, cbs=[MutualLearning(got[1]), GradientAccumulation(16), (half := Half())])
    assert half.n==2 and not same(before, state(got[1]))

def test_mixed_precision():
    def trained(*cbs):
        got = nets()
        learn = learner(got[0], metrics=accuracy)
        learn.fit(2, .05, cbs=[MutualLearning(got[1]), *cbs])
        assert all(p.dtype==torch.float32 for m in got for p in m.parameters())
        return got
    for a,b in zip(trained(), trained(CPUMixedPrecision('bf16'))): near(a, b, .1)

def test_peers_of_any_architecture_that_see_more_than_the_student():
    other = nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 3))
    learn = learner(net(), metrics=accuracy, cbs=StudentSees(lambda x: x[..., ::2, ::2]))
    ml = MutualLearning([other, net(6, seed=2)])
    learn.fit(1, cbs=ml)
    assert ml.log.history.mutual_loss.min()>0

def test_a_yes_or_no_for_each_label():
    y = torch.randint(2, (32, 3)).float()
    learn = learner(nets()[0], data(y=y), loss_func=nn.BCEWithLogitsLoss())
    ml = MutualLearning(nets()[1], BinaryKD)
    learn.fit(1, cbs=ml)
    assert ml.log.history.mutual_loss.min()>0

def test_several_mutual_losses_and_a_name():
    ml = MutualLearning(nets()[1], {partial(SoftTarget, T=2): .5, DecoupledKD: .1})
    learner(nets()[0]).fit(1, cbs=ml)
    assert list(ml.log.history)[:3]==['task_loss', 'SoftTarget_loss', 'DecoupledKD_loss']
    assert repr(MutualLearning(nets()[1], 'SoftTarget'))=='MutualLearning: loss = 1*task + 1*SoftTarget(T=4)'


# The table

def test_columns_of_the_peers_and_their_ensemble():
    learn = learner(nets()[0], metrics=[accuracy])
    ml = MutualLearning(nets(3)[1:])
    learn.fit(2, cbs=ml)
    names = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'task_loss', 'mutual_loss', 'peer_1', 'peer_2',
             'ensemble', 'time']
    assert learn.recorder.metric_names==names
    row = dict(zip(names[1:], learn.recorder.values[-1]))
    x,y = (torch.cat(o) for o in zip(*learn.dls.valid))
    def score(teacher): return float(accuracy(teacher(x)[0], y))
    assert row['peer_1']==pytest.approx(score(Teacher(ml.peers[0])), abs=1e-6)
    assert row['peer_2']==pytest.approx(score(Teacher(ml.peers[1])), abs=1e-6)
    assert row['ensemble']==pytest.approx(score(ml.ensemble), abs=1e-6)
    assert row['accuracy']==pytest.approx(score(Teacher(learn.model)), abs=1e-6)
    assert row['valid_loss']==pytest.approx(float(F.cross_entropy(Teacher(learn.model)(x)[0], y)), abs=1e-5)
    assert learn.validate()[1]==pytest.approx(row['accuracy']) and [m.name for m in learn.metrics]==['accuracy']
    assert len(learn.validate())==2 and ml.answers is None

def test_the_loss_that_is_shown_is_the_student_s():
    shown = []
    class Shown(Callback):
        order = 20
        def after_loss(self):
            if self.training: shown.append(float(self.learn.loss))
    ml = MutualLearning(nets(4)[1:])
    learner(nets()[0]).fit(1, cbs=[ml, Shown()])
    assert shown==pytest.approx((ml.log.history.task_loss+ml.log.history.mutual_loss).tolist(), rel=1e-5)

def test_without_a_metric_or_with_those_of_the_training():
    learn = learner(nets()[0])
    learn.fit(1, cbs=MutualLearning(nets()[1]))
    assert 'peer_1' not in learn.recorder.metric_names
    learn = learner(nets()[0], metrics=accuracy)
    learn.recorder.train_metrics = True
    learn.fit(1, cbs=MutualLearning(nets()[1]))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['valid_peer_1']==row['valid_peer_1'] and row['train_peer_1']!=row['train_peer_1'] # NaN

def test_an_ensemble_needs_a_student():
    with pytest.raises(ValueError, match='no student yet'): MutualLearning(nets()[1]).ensemble


# Nothing stays, and all goes on

events = ['before_epoch', 'after_pred', 'after_loss', 'before_step', 'after_step', 'after_batch', 'before_validate',
          'after_epoch']

@pytest.mark.parametrize('exc', [KeyboardInterrupt(), CancelFitException()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', events)
def test_clean_after_an_exception(event, exc):
    got = nets()
    for order in (0, 20):
        boom = Boom(event, exc, at=0 if 'epoch' in event or 'valid' in event else 1, order=order)
        learn,ml = learner(got[0], metrics=accuracy),MutualLearning(got[1])
        try: learn.fit(2, cbs=[ml, boom])
        except KeyboardInterrupt: pass
        assert boom.n>boom.at and not n_hooks(*got) and [m.name for m in learn.metrics]==['accuracy']
        assert ml.session is None and ml.answers is None and not ml.teacher.outs and ml.teacher.as_student is None
        assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))
        assert all(p.grad is None for p in got[1].parameters()) and '_with_events' not in vars(learn)
        assert len(learn.cbs)==len({type(c) for c in learn.cbs})
        pickle.dumps(learn.model)

def test_lr_find_leaves_peers_and_their_norms_as_they_were():
    got = nets(3)
    learn,ml = learner(got[0]),MutualLearning(got[1:])
    learn.add_cb(ml)
    learn.fit(1)
    before = [state(m) for m in got]
    learn.lr_find(show_plot=False, num_it=6)
    assert all(same(a, state(m)) for a,m in zip(before, got))
    learn.fit(1)
    assert not any(same(a, state(m)) for a,m in zip(before, got))

def test_resumed_is_uninterrupted(tmp_path):
    "With an optimizer that keeps nothing of its own"
    class Stop(Callback):
        def after_epoch(self): raise CancelFitException()
    whole = nets(3)
    learner(whole[0]).fit(2, .05, cbs=MutualLearning(whole[1:]))
    first = nets(3)
    ml = MutualLearning(first[1:])
    learn = learner(first[0])
    learn.fit(2, .05, cbs=[ml, Stop()])
    learned = deepcopy(ml.learned.state_dict())
    assert {k.split('.')[0] for k in learned}=={'teacher'}
    assert not any(k.startswith('teacher') for k in learn.model.state_dict())
    second = [first[0], net(5, seed=8), net(6, seed=9)]
    again = MutualLearning(second[1:])
    again.load_learned(learned)
    orders = learn.dls.train.rng.getstate()
    later = learner(second[0], learn.dls)
    later.dls.train.rng.setstate(orders)
    later.fit(1, .05, cbs=again)
    for a,b in zip(second, whole): near(a, b)

def test_copies_have_peers_of_their_own():
    got = nets()
    ml = MutualLearning(got[1], partial(SoftTarget, T=2), .5, 'min', start_pct=.25)
    learner(got[0]).fit(1, cbs=ml)
    for other in (ml.replace(), deepcopy(ml)):
        assert repr(other)==repr(ml) and same(state(other.peers[0]), state(ml.peers[0]))
        assert other.peers[0] is not ml.peers[0] and other.given==ml.given
        was = state(ml.peers[0])
        learner(net(4, seed=7)).fit(1, cbs=other)
        assert same(was, state(ml.peers[0]))
    assert ml.replace(target='mean', weight=.1).given['target']=='mean'

def test_another_student_begins_anew():
    got = nets()
    ml = MutualLearning(got[1])
    start = state(got[1])
    learner(got[0]).fit(1, cbs=ml)
    class Look(Callback):
        order = 20
        def before_batch(self):
            if self.training and self.iter==0: assert same(start, state(got[1]))
    learner(net(4, seed=5)).fit(1, cbs=[ml, Look()])

def test_a_saved_student_has_no_peers(tmp_path):
    learn = learner(nets()[0])
    learn.path = tmp_path
    learn.add_cb(MutualLearning(nets()[1], lambda pred, teacher_pred: (pred-teacher_pred).square().mean()))
    learn.fit(1)
    learn.save('student')
    learn.load('student')
    pickle.loads(pickle.dumps(learn.cbs[-1]))
    assert set(learn.model.state_dict())==set(nets()[0].state_dict())


# What is refused

def test_equal_starts_and_shared_weights():
    student = nets()[0]
    with pytest.raises(ValueError, match='the student and peer 1 have the same weights'):
        learner(student).fit(1, cbs=MutualLearning(deepcopy(student)))
    with pytest.raises(ValueError, match='share weights'): learner(student).fit(1, cbs=MutualLearning(student))
    twin = net(6, seed=3)
    with pytest.raises(ValueError, match='peer 1 and peer 2 have the same weights'):
        learner(student).fit(1, cbs=MutualLearning([twin, deepcopy(twin)]))
    with pytest.raises(ValueError, match='peer 1 and peer 2 share weights'):
        learner(student).fit(1, cbs=MutualLearning([twin, nn.Sequential(twin)]))
    before = state(twin)
    dropped_out = dropped()
    learner(dropped_out).fit(1, cbs=MutualLearning(deepcopy(dropped_out))) # Dropout sets them apart
    assert same(before, state(twin))

def test_other_refusals():
    with pytest.raises(TypeError, match='expected a network'): MutualLearning(['resnet18'])
    with pytest.raises(ValueError, match="did you mean 'each'"): MutualLearning(nets(), target='eachh')
    with pytest.raises(TypeError, match='compares pred and teacher_pred'): MutualLearning(nets(), FitNet)
    with pytest.raises(ValueError, match='agree in output shape'):
        learner(nets()[0]).fit(1, cbs=MutualLearning([net(4, c=3, seed=1), net(4, c=5, seed=2)]))
    with pytest.raises(ValueError, match='answers of several networks'):
        learner(nets()[0]).fit(1, cbs=MutualLearning(net(4, c=5, seed=2)))
    with pytest.raises(ValueError, match='compare logits'):
        learner(nets()[0]).fit(1, cbs=KnowledgeDistillationCallback(Peers(nets()[1]), FitNet, '0', '0'))


# Several frozen teachers, sample by sample

def test_confident_teachers_in_a_fit():
    a,b = net(8, seed=1),net(8, seed=2)
    teacher = Teacher([a, b], average='stack')
    x,y = data().one_batch()
    assert teacher(x)[0].shape==(2, 8, 3) and torch.equal(teacher(x)[0][1], Teacher(b)(x)[0])
    assert Teacher(a, average='stack')(x)[0].shape==(1, 8, 3)
    kd = KnowledgeDistillationCallback(teacher, ConfidentTeachers)
    learn = learner()
    before = state(a)
    learn.fit(1, cbs=kd)
    assert kd.log.history.distill_loss.min()>0 and same(before, state(a))
    with pytest.raises(ValueError, match='SoftTarget: pred and teacher_pred.*one behind the other'):
        learner().fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))

def test_a_stack_of_probabilities_is_warned_of():
    def odds(pair): return nn.Sequential(net(4, seed=pair), nn.Softmax(1))
    with pytest.warns(UserWarning, match='answers are probabilities'):
        learner().fit(1, cbs=KD(Teacher([odds(1), odds(2)], average='stack'), ConfidentTeachers))

def test_a_stack_is_not_recorded_and_not_weighted():
    with pytest.raises(ValueError, match='one for each network'): Teacher(nets(), average='stack', cache=True)
    with pytest.raises(ValueError, match='averages nothing'):
        Teacher(nets(), average='stack', weights=[1, 2])(torch.randn(2, 3, 8, 8))

def test_advice_on_peers_and_on_a_stack():
    "It leaves the peers as they were, and judges several teachers by their average"
    learn = learner(dls=data(64))
    a,b = net(8, seed=1),net(8, seed=2)
    stack = suggest_weights(learn, KD(Teacher([a, b], average='stack'), ConfidentTeachers))
    whole = suggest_weights(learn, KD(Teacher([a, b]), SoftTarget))
    def judged(advice): return [o for o in advice.notes if 'no better than the student' in o]
    assert judged(stack)==judged(whole) and stack['loss']
    ml = MutualLearning(b)
    before,modes = state(b),flags(b)
    assert suggest_weights(learn, ml).table.loc['SoftTarget'].gradient>0
    assert same(before, state(b)) and flags(b)==modes and not ml.teacher.outs


# What the peers' columns are of

class Pair(nn.Module):
    "A network that returns more than logits"
    def __init__(self, net, form): super().__init__(); self.net,self.form = net,form
    def forward(self, x):
        z = self.net(x)
        return (z, x) if self.form=='tuple' else dict(said=z, x=x)

@pytest.mark.parametrize('form', ['tuple', 'dict'])
def test_a_metric_is_given_what_it_gets_of_the_student(form):
    def of(o): return o[0] if form=='tuple' else o['said']
    def right(pred, y): return (of(pred).argmax(1)==y).float().mean()
    a,b = (Pair(n, form) for n in nets())
    learn = learner(a, loss_func=lambda pred, y: F.cross_entropy(of(pred), y), metrics=right)
    ml = MutualLearning(b, select=of)
    learn.fit(1, cbs=ml)
    x,y = learn.dls.valid_ds.tensors
    shown = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    with torch.no_grad(): assert shown['peer_1']==pytest.approx(right(ml.peers[0].eval()(x), y).item())
    assert np.isnan(shown['ensemble'])

def test_a_metric_of_the_loss_is_of_each_one_s_own():
    learn,ml = learner(nets()[0], metrics=Perplexity()),MutualLearning(learner(nets()[1]))
    learn.fit(1, cbs=ml)
    x,y = learn.dls.valid_ds.tensors
    shown = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    both = [m.eval()(x) for m in (learn.model, ml.peers[0])]
    average = torch.stack([z.softmax(1) for z in both]).mean(0).log()
    with torch.no_grad(): want = [F.cross_entropy(z, y).exp().item() for z in (*both, average)]
    assert [shown[k] for k in ('perplexity', 'peer_1', 'ensemble')]==pytest.approx(want, rel=1e-5)
    assert len({round(o, 6) for o in want})==3


def test_peers_may_come_from_a_generator():
    kd = MutualLearning(net(seed=s) for s in (1, 2))
    learner().fit(1, cbs=kd)
    assert len(kd.peers)==2


def test_a_peers_learner_of_other_classes_or_another_normalisation_is_warned_of():
    from fasterai.distill.teacher.facts import Facts
    student,peers = learner(net()),Peers(learner(net(5, seed=1)))
    peers.facts = [Facts(classes=('b', 'a'))]
    student.dls.vocab = ['a', 'b']
    for o in peers,peers.another():
        with pytest.warns(UserWarning, match='peer 1: its Learner has other classes'): o.begin(student)
