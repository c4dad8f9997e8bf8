"Test time: entropy by golden numbers, statistics by hand, and the old Learner as it was"
import math
from functools import partial

import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader
from fastai.losses import BCEWithLogitsLossFlat
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.distill.methods.adapt import METHODS, Entropy, adapt
from fasterai.distill.training.views import StudentSees
from classes import named
from helpers import data, flags, learner, n_hooks, net, same, state


def items(n=64, seed=5): return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))*2+1
def loader(x, bs=32): return TfmdDL([(o,) for o in x], bs=bs, num_workers=0)


z = torch.tensor([[3.7997, 0.4176, 1.7904], [-2.3615, 0.5471, 1.2057], [-1.3227, -2.0872, -1.1623],
                  [-0.7127, 0.5881, -3.5939]])

def test_golden_entropy():
    x = z.clone().requires_grad_()
    loss = Entropy(x)
    assert loss.item()==pytest.approx(0.7042911717839478, rel=1e-5)
    grad = torch.tensor([[-0.07042167985816741, 0.022201651703213823, 0.048220028154953624],
                         [0.014984584258864609, 0.0312163939764418, -0.04620097823530641],
                         [-0.006014577337503834, 0.030910683537938796, -0.024896106200434996],
                         [0.05160950826414128, -0.0630443247363149, 0.011434816472173592]])
    assert torch.allclose(torch.autograd.grad(loss, x)[0], grad, atol=1e-6)
    assert Entropy(z, balance=1.).item()==pytest.approx(-0.3914505609464164, rel=1e-5)
    assert Entropy(z, below=0.4)==0 # EATA keeps none of them
    h = -(z.softmax(1)*z.log_softmax(1)).sum(1)
    kept = h[h<0.7*math.log(3)]
    assert 0<len(kept)<4 and Entropy(z, below=0.7).item()==pytest.approx(kept.mean().item(), rel=1e-5)


def test_entropy_of_dense_answers():
    x = torch.randn(2, 3, 4, 4)
    rows = x.movedim(1, -1).reshape(-1, 3)
    for found in (Entropy(x), Entropy(x.movedim(1, -1), axis=-1)): assert torch.allclose(found, Entropy(rows))


def test_the_new_learner_trains_as_the_old_one():
    learn = learner(net(), wd_bn_bias=True, train_bn=False, wd=0.3, moms=(0.8, 0.7, 0.8))
    new = adapt(learn, loader(items()))
    assert new.wd_bn_bias and not new.train_bn and new.wd==0.3 and new.moms==(0.8, 0.7, 0.8)
    assert new.splitter is learn.splitter and new.opt_func is learn.opt_func and new.lr==learn.lr


def test_statistics_by_hand():
    "Those of the plain mean over the batches, layer by layer"
    learn = learner()
    x = items(32)
    new = adapt(learn, loader(x), 'bn', bs=32)
    conv,bn = new.model[0][0],new.model[0][1]
    h = conv(x).transpose(0, 1).flatten(1)
    assert torch.allclose(bn.running_mean, h.mean(1), atol=1e-5) and torch.allclose(bn.running_var, h.var(1), atol=1e-4)
    conv,bn = new.model[1][0],new.model[1][1]
    new.model.train()
    h = conv(new.model[0](x)).transpose(0, 1).flatten(1)
    assert torch.allclose(bn.running_mean, h.mean(1), atol=1e-5) and bn.momentum==0.1


def test_statistics_in_16_bits():
    "Of 256 batches, whose mean stands still in bf16 after some"
    x = (items(1024)[:, :, :1, :1]*2+1).bfloat16()
    learn = learner(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3)).bfloat16())
    with pytest.warns(UserWarning, match='a batch of 4 says little'): bn = adapt(learn, loader(x), bs=4).model[0]
    assert bn.running_mean.dtype==bn.weight.dtype==torch.bfloat16
    assert torch.allclose(bn.running_mean.double(), x.double().mean((0, 2, 3)), rtol=2**-8)


@pytest.mark.parametrize('method', METHODS)
def test_the_old_learner_is_as_it_was(method):
    learn = learner()
    learn.fit(1)
    before,opt,cbs = (state(learn.model), flags(learn.model)),learn.opt.state_dict(),list(learn.cbs)
    new = adapt(learn, loader(items()), method, epochs=2)
    assert same(before[0], state(learn.model)) and flags(learn.model)==before[1] and not n_hooks(learn.model, new.model)
    assert str(opt)==str(learn.opt.state_dict()) and all(a is b for a,b in zip(cbs, learn.cbs))
    assert not same(before[0], state(new.model)) and flags(new.model)[1]==before[1][1]
    assert all(p.grad is None for p in new.model.parameters())
    assert new.dls is learn.dls and new.loss_func is learn.loss_func and new.opt_func is learn.opt_func
    new.fit(1) # it is a Learner as any


def test_what_each_method_changes():
    learn = learner()
    def changed(method):
        new = adapt(learn, loader(items()), method, lr=1e-2, epochs=2)
        was = dict(learn.model.named_parameters())
        return {n for n,p in new.model.named_parameters() if not torch.equal(p, was[n])}
    norms = {f'{i}.1.{k}' for i in (0, 1) for k in ('weight', 'bias')}
    assert changed('bn')==set() and changed('tent')==norms and changed('ema')>norms


def test_tent_lowers_the_entropy():
    learn = learner()
    x = items()
    def entropy(l): return Entropy(l.model.eval()(x)).item()
    bn,tent = (entropy(adapt(learn, loader(x), m, **kw)) for m,kw in (('bn', {}), ('tent', dict(lr=1e-2, epochs=5))))
    assert tent<bn


def test_labels_are_not_looked_at():
    def adapted(y):
        torch.manual_seed(0)
        x = items()
        dl = TfmdDL([(a, b) for a,b in zip(x, y)], bs=32, num_workers=0)
        dl.rng.seed(0)
        new = adapt(learner(), dl, 'ema', epochs=1)
        return state(new.model)
    same_order = partial(adapted, torch.zeros(64, dtype=torch.long))
    assert {k:v.shape for k,v in same_order().items()}=={k:v.shape for k,v in adapted(torch.arange(64)%3).items()}
    import random
    random.seed(3)
    a = same_order()
    random.seed(3)
    assert same(a, adapted(torch.arange(64)%3))


def test_views_go_along():
    def half(x): return x[..., ::2, ::2]
    learn = learner(cbs=StudentSees(half))
    new = adapt(learn, loader(items()), 'tent')
    assert new.student_sees is not learn.student_sees and new.student_sees.learn is new
    assert learn.student_sees.learn is learn


def test_items_of_the_data():
    "What the Learner's own data start from"
    learn = learner()
    x = items(40)
    want = state(adapt(learn, [(o,) for o in x], bs=40).model)
    for rows in list(x),x,TensorDataset(x, torch.zeros(40)),DataLoader([(o,) for o in x], bs=40):
        for k,v in state(adapt(learn, rows, bs=40).model).items(): torch.testing.assert_close(v, want[k])
    adapt(learn, DataLoader([(o,) for o in x], bs=40), 'tent', bs=40)


def test_what_is_refused_and_warned_of():
    learn = learner()
    with pytest.raises(ValueError, match="unknown method 'tend'.*'tent'"): adapt(learn, loader(items()), 'tend')
    flat = learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    for m in METHODS:
        with pytest.raises(ValueError, match='no BatchNorm'): adapt(flat, loader(items()), m)
    with pytest.warns(UserWarning, match='a batch of 8 says little'): adapt(learn, loader(items(8)))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='batches of 2 items'):
        adapt(learn, loader(items(1)))
    with pytest.raises(ValueError, match='items is empty'): adapt(learn, [])
    with pytest.raises(ValueError, match='epochs must be a whole number from 1 on, got 0'):
        adapt(learn, loader(items()), 'tent', epochs=0)
    with pytest.raises(ValueError, match="sure of one class.*BCEWithLogitsLossFlat.*method='bn'"):
        adapt(learner(net(c=1), loss_func=BCEWithLogitsLossFlat()), loader(items()), 'tent')
    bare = net()
    for m in bare.modules():
        if isinstance(m, nn.BatchNorm2d): m.weight = m.bias = None
    with pytest.raises(ValueError, match="affine=False.*method='bn'"): adapt(learner(bare), loader(items()), 'tent')


def test_interrupted():
    def boom(pred): raise KeyboardInterrupt
    learn = learner(dls=data())
    before = state(learn.model),flags(learn.model)
    with pytest.raises(KeyboardInterrupt): adapt(learn, loader(items()), 'tent', loss=boom)
    assert same(before[0], state(learn.model)) and flags(learn.model)==before[1] and not n_hooks(learn.model)


def test_a_loader_of_another_normalisation_is_refused_and_another_order_of_classes_is_not():
    learn = learner(dls=named('abc', std=.5))
    with pytest.raises(ValueError, match="items: its pictures are normalised by .*0.25.*the Learner's are normalised"):
        adapt(learn, named('abc', std=.25).train)
    with pytest.warns(UserWarning, match='24 says little'): adapt(learn, named('cab', std=.5).train)


def test_what_fastai_makes_of_items_is_no_list_of_them():
    learn = learner(dls=named('abc'))
    with pytest.raises(TypeError, match='one loader, such as dls.train, got DataLoaders'): adapt(learn, learn.dls)
    with pytest.raises(TypeError, match='a Datasets that has been through its own'): adapt(learn, learn.dls.train_ds)
