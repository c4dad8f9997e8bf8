"Dreams: terms by golden numbers, a descent by hand, and a teacher that stays as it is, whatever happens"
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage, set_seed
from torch import nn

import fasterai.distill.methods.dream as room
from fasterai.distill.methods.data_free import data_free_learner
from fasterai.distill.methods.dream import Dreams, Still, dream
from fasterai.distill.methods.priors import (BatchNormGap, competition, disagreement, imbalance, inactivity,
                                             statistics_gap, total_variation)
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from helpers import flags, n_hooks, net, same, state


size = 3,8,8

def teacher():
    "A network that has seen something, in the mode of a training"
    t = net(width=8, seed=1)
    for _ in range(20): t(torch.randn(32, *size)*2+1)
    return t


def test_golden_total_variation():
    x = torch.tensor([[[[0.473, -0.6814, 0.2424, -1.7007], [0.7531, -1.5347, 0.0051, -0.1202],
                        [-0.807, 2.8718, -0.5978, 0.4725], [1.096, -1.2152, 1.3424, -0.1221]]],
                      [[[1.0125, -0.9139, -1.0295, 1.2098], [0.5019, 0.1388, 0.6408, 0.5273],
                        [-1.1544, -2.2133, -1.6818, -1.7881], [-2.2185, -0.6474, -0.5284, -0.0392]]]])
    assert total_variation(x).item()==pytest.approx(30.18998511459062, rel=1e-6)
    assert torch.linalg.vector_norm(x).item()==pytest.approx(6.616077806374409, rel=1e-6) # the term `l2`


def test_golden_statistics():
    x = torch.tensor([[[[-0.7124, 0.7538], [-0.0445, 0.4518]], [[1.3451, 0.5323], [1.3502, 0.8612]]],
                      [[[1.4787, -1.0454], [-0.789, -1.2616]], [[0.5628, -0.2433], [0.9137, 0.3174]]],
                      [[[0.1273, 2.1504], [0.6063, -0.0268]], [[-0.9842, 1.1907], [0.9528, -1.0872]]]])
    r = statistics_gap(x, torch.tensor([0.1, -0.2]), torch.tensor([0.5, 1.5]))
    assert r.item()==pytest.approx(1.650098082894027, rel=1e-6)
    bn = nn.BatchNorm2d(2).eval()
    bn.running_mean.copy_(torch.tensor([0.1, -0.2]))
    bn.running_var.copy_(torch.tensor([0.5, 1.5]))
    with BatchNormGap(nn.Sequential(bn)) as gap:
        bn(x)
        bn(x)
        assert gap.take().item()==pytest.approx(2*1.650098082894027, rel=1e-6) # it ran twice


def test_golden_competition():
    "The definition, not the authors' code"
    zs = torch.tensor([[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381],
                       [-0.4987, 2.9242, -4.1203]])
    zt = torch.tensor([[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159],
                       [-1.818, 1.1029, 4.5844]])
    assert competition(zs, zt, T=3).item()==pytest.approx(0.861846436632604, rel=1e-5)


zt = torch.tensor([[3.1027, 0.1584, 0.348, -0.1447], [-4.0087, 0.2894, -3.0023, 0.4222],
                   [-1.1164, 2.1691, -0.3726, 0.0293], [-2.1511, 1.2845, -0.3607, 1.2406],
                   [1.6219, 1.5559, -0.475, -3.7838]])

def test_golden_dafl():
    h = torch.tensor([[-0.3123, 0.3393, -0.1559, -0.5018, 0.2356, -1.7636],
                      [-1.0959, -1.0878, -0.3052, -0.4737, -0.2006, 0.3552],
                      [0.6895, 0.4106, -0.565, 0.5994, -0.1629, 1.6002],
                      [0.6816, 0.0149, -0.0878, -0.9821, 0.1217, -1.1374],
                      [0.349, -1.8585, -1.1672, 1.4249, 1.4966, 1.2899]])
    label = F.cross_entropy(zt, zt.argmax(1))
    assert label.item()==pytest.approx(0.5022923082021549, rel=1e-5)
    assert imbalance(zt).item()==pytest.approx(-1.2118396205878803, rel=1e-5)
    assert inactivity(h).item()==pytest.approx(-0.7155366666666668, rel=1e-5)
    total = label + 20*imbalance(zt) + 0.001*inactivity(h)
    assert total.item()==pytest.approx(-23.73521564022212, rel=1e-5)


def test_golden_disagreement():
    zs = torch.tensor([[0.2559, -3.0569, -1.1889, 0.1327], [-2.471, -1.2427, -1.7779, 0.9978],
                       [-1.5738, 0.2375, -1.5137, 0.9867], [-1.6788, -2.03, -0.685, 3.7689],
                       [-0.5418, -2.9034, -2.1603, 5.1302]])
    assert disagreement(zs, zt).item()==pytest.approx(-1.9382871231394383, rel=1e-5)
    assert disagreement(zs, zt, masked=True).item()==pytest.approx(-0.1875425447585928, rel=1e-5)


def by_hand(t, n, iters, lr):
    "The same, as one would write it"
    t = t.eval()
    bns = [m for m in t.modules() if isinstance(m, nn.BatchNorm2d)]
    seen = {}
    for m in bns: m.register_forward_hook(lambda m, args, out: seen.__setitem__(m, args[0]))
    y = torch.arange(n)%3
    x = torch.randn(n, *size).requires_grad_()
    opt = torch.optim.Adam([x], lr)
    for _ in range(iters):
        opt.zero_grad()
        loss = F.cross_entropy(t(x), y)
        for m in bns:
            h = seen[m].transpose(0, 1).flatten(1)
            loss = loss + 10*((h.mean(1)-m.running_mean).norm() + (h.var(1, correction=0)-m.running_var).norm())
        d = [x[..., 1:]-x[..., :-1], x[..., 1:, :]-x[..., :-1, :], x[..., 1:, 1:]-x[..., :-1, :-1],
             x[..., 1:, :-1]-x[..., :-1, 1:]]
        loss = loss + 1e-2*sum(o.norm() for o in d)
        loss.backward()
        opt.step()
    return x.detach()


def test_a_descent_by_hand_gives_the_same():
    set_seed(3)
    t = teacher()
    set_seed(3)
    fake = dream(t, 12, size, iters=5, tv=1e-2, shifts=0, progress=False)
    set_seed(3)
    assert torch.allclose(fake.x, by_hand(t, 12, 5, 0.05), atol=1e-6)


def test_the_distance_of_the_statistics_falls_tenfold():
    set_seed(0)
    fake = dream(teacher(), 64, size, iters=200, label=0., tv=0., lr=0.1, shifts=0, progress=False)
    assert fake.losses.bn.iloc[-1]<fake.losses.bn.iloc[0]/10


def test_classes_are_balanced_in_every_batch():
    fake = dream(teacher(), 22, size, iters=1, bs=8, progress=False)
    assert fake.y.bincount().tolist()==[8, 7, 7] and len(fake.losses)==1
    assert dream(teacher(), 4, size, [2, 0], iters=1, progress=False).y.tolist()==[2, 0, 2, 0]


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('exc', [None, KeyboardInterrupt(), RuntimeError('out of memory')], ids=repr)
def test_teacher_is_as_it_was_whatever_happens(train, exc, monkeypatch):
    t,s = teacher().train(train),net(seed=2)
    t[0][0].weight.requires_grad_(False)
    t[0].eval() # modes may be mixed
    before = [(state(m), flags(m)) for m in (t, s)]
    if exc:
        def boom(*args): raise exc
        monkeypatch.setattr(room, 'total_variation', boom)
        with pytest.raises(type(exc)): dream(t, 8, size, iters=3, adi=1., student=s, progress=False)
    else:
        with torch.no_grad(): dream(t, 8, size, iters=3, adi=1., student=s, progress=False)
    for m,(values,found) in zip((t, s), before):
        assert same(values, state(m)) and flags(m)==found and not n_hooks(m)
        assert all(p.grad is None for p in m.parameters())


def test_half_precision_and_autocast_change_nothing():
    def made(t):
        set_seed(0)
        return dream(t, 8, size, iters=3, progress=False).x
    t = teacher().bfloat16().float() # the same values in both
    x = made(t)
    assert torch.equal(x, made(teacher_like(t).bfloat16()))
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(x, made(t))

def teacher_like(t):
    new = net(width=8)
    new.load_state_dict(t.state_dict())
    return new


def test_bounds_and_normalisation():
    t = Teacher(teacher(), normalize=([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    fake = dream(t, 8, size, iters=3, lr=5., progress=False)
    assert fake.x.min()>-1e-5 and fake.x.max()<1+1e-5 and ((fake.x<1e-5)|(fake.x>1-1e-5)).float().mean()>0.3
    x,_ = fake.dls(4, device='cpu').train.one_batch()
    assert x.min()==pytest.approx(-2.5, abs=1e-3) # (0-0.5)/0.2
    free = dream(t.models[0], 8, size, iters=3, lr=5., progress=False)
    assert free.x.min()<-1 and free.x.max()>1
    z = Still(t)((fake.x-t.facts[0].normalize[0])/t.facts[0].normalize[1])
    assert torch.allclose(z, fake.logits, atol=1e-4)


def named(vocab, stats=None, said=None, model=None):
    "A Learner of pictures of classes `vocab`; all of class `said`"
    x,y = torch.rand(12, *size),[said or vocab[i%len(vocab)] for i in range(12)]
    tfms = [[lambda i: TensorImage(x[i])], [lambda i: y[i], Categorize(vocab=vocab, sort=False)]]
    normalize = [Normalize.from_stats(*stats, cuda=False)] if stats else None
    dls = Datasets(range(12), tfms, splits=[range(12)]*2).dataloaders(bs=4, num_workers=0, device='cpu',
                                                                     after_batch=normalize)
    return Learner(dls, net() if model is None else model, CrossEntropyLossFlat(), metrics=accuracy)

half = 3*[.5],3*[.25]


@pytest.mark.parametrize('said', [dict(tfms=lambda x: 2*x-1), dict(size=16)])
def test_what_a_teacher_is_shown_it_is_shown_here(said):
    t = Teacher(teacher().eval(), **said)
    fake = dream(t, 4, size, iters=2, bounds=(0, 1), progress=False)
    torch.testing.assert_close(t(fake.x)[0], fake.logits)
    learn = named('abc')
    learn.add_cb(StudentSees(lambda x: x.flip(1)))
    torch.testing.assert_close(Still(learn)(fake.x), learn.model.eval()(fake.x.flip(1)))


@pytest.mark.parametrize('make', [
    lambda t, valid: dream(t, 12, size, iters=1, progress=False).dls(4, valid=valid, device='cpu'),
    lambda t, valid: data_free_learner(t, net(), size, bs=4, n_batches=1, valid=valid)])
def test_pictures_to_judge_by_are_of_the_same_classes_and_normalisation(make):
    t = named('abc', half, model=teacher())
    make(t, named('abc', half).dls.valid)
    make(t.model, named('cab').dls.valid) # of a bare network nothing is known
    with pytest.raises(ValueError, match="valid: its classes are c, a, b, the teacher's a, b, c"):
        make(t, named('cab', half).dls.valid)
    for other in None, (3*[.5], 3*[.5]):
        with pytest.raises(ValueError, match='valid: .*normalised'): make(t, named('abc', other).dls.valid)
    with pytest.raises(ValueError, match='valid: .*normalised'):
        make(named('abc', model=teacher()), named('abc', half).dls.valid)


def test_a_student_that_competes_is_asked_about_the_teachers_data():
    s = named('cab', half)
    facts = Still(named('abc', (3*[.2], 3*[.5]), model=teacher())).facts
    x = torch.randn(4, *size)
    want = s.model.eval()(((x*.5+.2)-.5)/.25)[:, [1, 2, 0]]
    torch.testing.assert_close(Still(s).about(facts)(x), want)
    with pytest.raises(ValueError, match='same shape, got .4, 4. and .4, 3.'):
        dream(teacher(), 4, size, iters=1, adi=1., student=net(c=4), progress=False)
    with pytest.raises(ValueError, match="student: its classes are a, b, x, the teacher's a, b, c"):
        dream(named('abc', model=teacher()), 4, size, iters=1, adi=1., student=named('abx'), progress=False)


def test_what_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match="no BatchNorm.*What remains.*zskt"): dream(flat, 8, size)
    with pytest.raises(ValueError, match='size must be'): dream(teacher(), 8, 28)
    for wrong in dict(n=1), dict(n=1e2), dict(iters=0), dict(iters=100.), dict(bs=0):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number from"):
            dream(teacher(), **dict(n=8, size=size) | wrong)
    assert dream(teacher(), 4, np.array(size), iters=1, progress=False).x.shape==(4, *size)
    with pytest.raises(ValueError, match='lower lr, got 1e\\+30'):
        dream(teacher(), 8, size, iters=3, lr=1e30, progress=False)
    with pytest.raises(TypeError, match='one network'): dream([teacher(), teacher()], 8, size)


def test_joined_pickled_and_held_out():
    fake = dream(teacher(), 12, size, iters=2, progress=False)
    both = pickle.loads(pickle.dumps(fake+fake))
    assert len(both)==24 and torch.equal(both.x[12:], fake.x) and len(both.losses)==4
    dls = both.dls(4, valid=0.25, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds))==(18, 6) and list(dls.vocab)==[0, 1, 2]
    assert [len(both.dls(bs, device='cpu').train) for bs in (4, 64)]==[4, 1] # 19 pictures: whole batches, if there are
    with pytest.raises(ValueError, match='valid must be a share'): fake.dls(valid=1.)
    other = Dreams(torch.rand(2, 3, 4, 4), fake.y[:2], fake.logits[:2], fake.vocab, losses=fake.losses)
    with pytest.raises(ValueError, match='size, classes and normalisation'): fake+other
    half = torch.full((1, 3, 1, 1), .5)
    other = Dreams(fake.x, fake.y, fake.logits, fake.vocab, (half, half))
    assert len(other+other)==24
    for a,b in (fake, other), (other, fake):
        with pytest.raises(ValueError, match='normalisation'): a+b
    assert math.isclose(fake.as_intended, fake.logits.argmax(1).eq(fake.y).float().mean().item())


def test_dreams_are_joined_with_or_without_a_record_of_their_losses():
    x,y,z = torch.zeros(2, *size),torch.tensor([0, 1]),torch.zeros(2, 2)
    def some(losses): return Dreams(x, y, z, ['a', 'b'], losses=losses)
    table = pd.DataFrame(dict(label=[1., 2.]))
    both = some(None)+some(None)
    assert (len(both), both.losses, both.y.tolist())==(4, None, [0, 1, 0, 1])
    assert [(some(a)+some(b)).losses.label.tolist() for a,b in ((table, None), (None, table), (table, table))]==[
        [1, 2], [1, 2], [1, 2, 1, 2]]
