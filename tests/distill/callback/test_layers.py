"Pairs of layers: their order, their names, what is refused"
import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn

from fasterai.core.schedule import Schedule, lin
from fasterai.distill.loss.learned import VID
from fasterai.distill.losses import *
from helpers import block, data, learner, n_hooks, net, same, state
from kd_helpers import KD, teacher, layers


def test_pairs_keep_their_order_and_one_layer_may_stand_in_two():
    seen = []
    def loss(fm_s, fm_t, **kw):
        seen.append([(tuple(s.shape[1:]), tuple(t.shape[1:])) for s,t in zip(fm_s.values(), fm_t.values())])
        return sum(o.mean() for o in fm_s.values())
    learner().fit(1, cbs=KD(teacher(), loss, ['0','1'], ['1','0']))
    learner().fit(1, cbs=KD(teacher(), loss, ['1','1'], ['0','1']))
    s0,s1,t0,t1 = (4,4,4),(8,2,2),(8,4,4),(16,2,2)
    assert seen[-1]==[(s1,t0), (s1,t1)] and seen[0]==[(s0,t1), (s1,t0)]


def test_refused_at_construction():
    t = teacher()
    with pytest.raises(TypeError, match="did you mean 'T'"): KD(t, partial(SoftTarget, t=3))
    with pytest.raises(TypeError, match='temperature'): KD(t, partial(SoftTarget, temperature=3))
    with pytest.raises(ValueError, match='1 of the student'): KD(t, Attention, ['0'], ['0','1'])
    with pytest.raises(ValueError, match='takes no feature maps'): KD(t, SoftTarget, **layers)
    with pytest.raises(ValueError, match='unknown hyper-parameter'): KD(t, schedules={'temp': lin})
    with pytest.raises(ValueError, match="did you mean 'cos'"): KD(t, schedule='cosine')
    with pytest.raises(ValueError, match='start_pct'): KD(t, start_pct=0.6, end_pct=0.5)
    with pytest.raises(TypeError, match='teacher'): KD('resnet34')
    with pytest.raises(ValueError, match='layer of the student'): learner().fit(1, cbs=KD(t, Attention, 'layer1', '1'))


def test_misfits_are_refused_before_any_step():
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match='adapt|channel'):
        learn.fit(1, cbs=KD(teacher(), FitNet, **layers, adapters=None))
    assert same(before, state(learn.model)) and not n_hooks(learn.model)


def test_layers_with_the_names_of_learner_attributes():
    class Odd(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.opt = block(3, w)
            self.path = block(w, w)
            self.loss = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 3))
        def forward(self, x): return self.loss(self.path(self.opt(x)))
    learner(Odd(4)).fit(1, cbs=KD(Odd(8), Attention, ['opt','path'], ['opt','path']))


def test_an_inplace_relu_after_the_layer_does_not_spoil_the_map():
    def m(w, inplace): 
        torch.manual_seed(w)
        return nn.Sequential(nn.Conv2d(3, w, 3), nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(w, 3))
    def run(inplace):
        learn = learner(m(4, inplace))
        kd = KD(m(8, inplace), Attention, '0', '0')
        learn.fit(1, cbs=kd)
        return kd.log.history.distill_loss
    assert run(True).tolist()==pytest.approx(run(False).tolist())


def test_a_fraction_is_a_weight():
    def loss(weight):
        torch.manual_seed(0)
        kd,learn = KD(teacher(), {SoftTarget: weight}),learner()
        learn.fit(1, cbs=kd)
        return kd.log.history.distill_loss.tolist()
    assert loss(Fraction(1, 4))==loss(.25)

def test_weights_and_adapters_are_checked_at_construction():
    with pytest.raises(ValueError, match='task_weight=1'):
        KD(teacher(), schedule=Schedule(lambda s,e,p: s+(e-s)*p, end_val=4))
    with pytest.raises(ValueError, match='weight'): KD(teacher(), weight=float('nan'))
    with pytest.raises(ValueError, match='task_weight'): KD(teacher(), task_weight=-1)
    with pytest.raises(ValueError, match='weight of a loss'): KD(teacher(), {SoftTarget: -1})
    with pytest.raises(ValueError, match="'atuo'"): KD(teacher(), adapters='atuo')
    with pytest.raises(ValueError, match='match_feature_layers'): KD(teacher(), Attention)
    with pytest.raises(ValueError, match="given for 'zz', but SoftTarget compares no layer"):
        KD(teacher(), adapters={'zz': nn.Linear(2, 2)})
    with pytest.raises(ValueError, match='VID takes none'): KD(teacher(), VID(), '0', '0', mask=lambda x: x)
    with pytest.raises(ValueError, match='LazyConv2d.*make it with its sizes'):
        KD(teacher(), FitNet, '0', '0', adapters={'0': nn.LazyConv2d(8, 1)})


def test_maps_and_tokens_are_compared_by_position():
    class Tokens(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.patch = nn.Conv2d(3, d, 4, 4)
            self.blocks = nn.Sequential(nn.Linear(d, d), nn.GELU())
            self.head = nn.Linear(d, 3)
        def forward(self, x):
            z = self.patch(x).flatten(2).transpose(1, 2)
            return self.head(self.blocks(torch.cat([z.mean(1, keepdim=True), z], 1))[:,0])
    for student,teacher_,s,t in ((Tokens(6), teacher(), 'blocks', '0'), (net(), Tokens(6), '1', 'blocks')):
        seen = []
        def spy(fm_s, fm_t, **kw):
            seen.append([tuple(o.shape[1:]) for o in (*fm_s.values(), *fm_t.values())])
            return Attention(fm_s, fm_t)
        spy.same_positions = True
        learn = learner(student)
        kd = KD(teacher_, {spy: 1, FitNet: 1}, s, t, weight=0.9)
        learn.fit(1, cbs=kd)
        (a,b),n = seen[-1],len(list(kd.learned.parameters()))
        assert a[-2:]==b[-2:] if len(b)==3 else a[0]==b[0]
        assert n>0 and kd.log.history.notna().all().all()
        learner(student).fit(1, cbs=KD(teacher_, Attention, s, t))


@pytest.mark.parametrize('adapters', ['auto', None])
def test_losses_that_compare_samples_take_tokens_beside_a_map_of_any_proportions(adapters):
    class Shaped(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.lin,self.map = nn.Linear(192, math.prod(shape)),nn.Unflatten(1, shape)
            self.head = nn.Linear(math.prod(shape), 3)
        def forward(self, x): return self.head(self.map(self.lin(x.flatten(1))).flatten(1))
    s,t = Shaped(9, 4),Shaped(6, 2, 5)
    learn = learner(s, data(n=8))
    x = learn.dls.train.one_batch()[0]
    want = Similarity([s.map(s.lin(x.flatten(1)))], [t.map(t.lin(x.flatten(1)))]).item()
    kd = KD(t, Similarity, 'map', 'map', adapters=adapters)
    learn.fit(1, 0., cbs=kd)
    assert kd.log.history.distill_loss.iloc[0]==pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match='no grid'): learner(s).fit(1, cbs=KD(t, CWD, 'map', 'map'))


def test_a_lazy_student_is_built_by_its_first_batch():
    def trained(*cbs):
        learn = learner(nn.Sequential(nn.LazyConv2d(4, 3, 2, 1), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1),
                                      nn.Flatten(), nn.LazyLinear(3)))
        torch.manual_seed(0)
        learn.fit(1, cbs=cbs)
        return learn.model.parameters()
    kd = KD(teacher(), FitNet, '1', '0', task_weight=1., weight=1e-9)
    for a,b in zip(trained(), trained(kd)): torch.testing.assert_close(a, b)
