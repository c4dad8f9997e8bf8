"One of several outputs of a layer, by brackets after its name: captured, stopped after, adapted, refused"
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torchvision.ops import FeaturePyramidNetwork

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.layers.capture import Capture, output_shapes
from fasterai.distill.layers.layout import layout_of
from fasterai.distill.layers.places import place_of
from fasterai.distill.loss.dense import PKD
from fasterai.distill.losses import Attention, FitNet
from fasterai.distill.ship.quantize import quantize_aware
from fasterai.distill.teacher.teacher import Teacher
from helpers import learner, n_hooks, same, state


Pair = namedtuple('Pair', 'low high')

@dataclass
class Record:
    low:torch.Tensor
    high:tuple

wraps = dict(tuple=lambda a,b: (a, b), list=lambda a,b: [a, b], dict=lambda a,b: {'low': a, 'high': b},
             pair=Pair, dataclass=Record, nested=lambda a,b: (a, {'high': (b, a)}),
             object=lambda a,b: type('Bag', (), {})())


class Neck(nn.Module):
    "Two maps in whatever `wrap` makes of them"
    def __init__(self, c, w, wrap):
        super().__init__()
        self.low,self.high = nn.Conv2d(3, w, 3, 2, 1),nn.Conv2d(w, w, 3, 2, 1)
        self.norm = nn.BatchNorm2d(w)
        self.wrap = wrap
    def forward(self, x):
        a = self.norm(self.low(x))
        return self.wrap(a, self.high(a))

class Net(nn.Module):
    def __init__(self, w=4, wrap=wraps['tuple'], take=lambda o: o[1]):
        super().__init__()
        self.neck,self.head,self.take = Neck(3, w, wrap),nn.Linear(w, 3),take
    def forward(self, x): return self.head(self.take(self.neck(x)).mean((2, 3)))

x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('kind,names,take', [
    ('tuple', ('neck[0]', 'neck[1]'), lambda o: o[1]), ('list', ('neck[-2]', 'neck[-1]'), lambda o: o[1]),
    ('dict', ("neck['low']", 'neck[1]'), lambda o: o['high']), ('dict', ('neck[0]', 'neck[high]'), lambda o: o['high']),
    ('pair', ('neck[low]', 'neck[high]'), lambda o: o.high), ('dataclass', ('neck[low]', 'neck[1]'), lambda o: o.high),
    ('nested', ('neck[0]', "neck[1]['high'][0]"), lambda o: o[1]['high'][0])])
def test_each_output_by_position_or_key(kind, names, take):
    m = Net(wrap=wraps[kind], take=take).eval()
    with Capture(m, names) as c: m(x)
    a = m.neck.norm(m.neck.low(x))
    torch.testing.assert_close(list(c.maps.values()), [a, m.neck.high(a)])
    assert list(c.maps)==list(names) and not n_hooks(m)


def test_without_brackets_it_is_the_first_one_in_a_dataclass_too():
    m = Net(wrap=Record, take=lambda o: o.high)
    with Capture(m, 'neck') as c: m(x)
    assert c.maps['neck'].shape==(2, 4, 4, 4)


def test_inputs_by_position_and_name():
    class Two(nn.Module):
        def forward(self, a, *, scale): return a*scale
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()
        def forward(self, x): return self.two(x, scale=x+1)
    m = Outer()
    with Capture(m, ['two:input[0]', 'two:input[scale]', 'two:input[1]']) as c: m(x)
    torch.testing.assert_close(list(c.maps.values()), [x, x+1, x+1])


def test_a_write_to_the_chosen_output_is_noticed():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = Neck(3, 4, wraps['tuple'])
        def forward(self, x): return self.neck(x)[1].relu_().mean((1, 2, 3))
    m = Writes()
    with Capture(m, ['neck[1]', 'neck[0]']) as c: m(x)
    assert c.maps['neck[1]'].min()<0
    assert {n:t.copying for n,t in c.taps.items()}=={'neck[1]': True, 'neck[0]': False}


@pytest.mark.parametrize('name,message', [
    ('neck[2]', "student 'neck[2]': neck gives 2, 0, 1: write a key, or a position from 0 to 1"),
    ('neck[-3]', 'from 0 to 1'), ('neck[high]', 'neck gives 2'), ('neck[0][0]', 'neck[0] gives a single one'),
    ('head[0]', "written with a dot")])
def test_what_is_not_there_is_refused_and_nothing_is_left(name, message):
    learn = learner(Net())
    before = state(learn.model)
    with pytest.raises(ValueError) as e: learn.fit(1, cbs=KD(Net(8), Attention, name, 'neck[1]'))
    assert message in str(e.value) and 'layer of the student' in str(e.value)
    assert same(before, state(learn.model)) and not n_hooks(learn.model)
    with pytest.raises(ValueError) as e: learn.fit(1, cbs=KD(Net(8), Attention, 'neck[1]', name))
    assert message.replace('student', 'teacher') in str(e.value) and 'layer of the teacher' in str(e.value)
    assert same(before, state(learn.model)) and not n_hooks(learn.model)


@pytest.mark.parametrize('typo', ['neck[0', 'neck0]', 'neck[]', "neck['low]", 'neck[0].low', 'neck[0]:input'])
def test_typos_are_refused_at_once(typo):
    with pytest.raises(ValueError, match=r"layer of the teacher .*did you mean 'neck\[0\]'.*Brackets come last"):
        KD(Net(), Attention, 'neck[0]', typo)
    with pytest.raises(ValueError, match="unknown layer of the teacher 'nekc'; did you mean 'neck'"):
        KD(Net(), Attention, 'neck[0]', 'nekc[0]')


def test_numbers_that_could_mean_two_things():
    place = place_of(Net(), 'neck[2]')
    with pytest.raises(ValueError, match="the keys are '2', '3', 'pool'"):
        place.choose(dict.fromkeys(['2', '3', 'pool']))
    assert place.choose({2: 'a', 3: 'b'})=='a'
    assert place.choose({'0': 'a', '1': 'b', '2': 'c'})=='c'


def test_modules_whose_own_names_have_brackets():
    m = nn.Sequential()
    m.add_module('a[0]', nn.Identity())
    m.add_module('b', nn.Linear(3, 2))
    with Capture(m, ['a[0]', 'a[0]:input', 'b']) as c: m(x[:, :, 0, 0])
    assert list(c.maps)==['a[0]', 'a[0]:input', 'b']


def test_layouts_and_dry_run():
    m = Net(wrap=wraps['dict'], take=lambda o: o['high'])
    assert output_shapes(m, ['neck[low]', 'neck[high]'], x)=={'neck[low]': (2, 4, 4, 4), 'neck[high]': (2, 4, 2, 2)}
    assert layout_of(m, 'neck[high]', (2, 4, 2, 2))=='first'


def pyramid(w=4):
    "A feature pyramid that gives three maps, the smallest one by pooling"
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.one,self.two = nn.Conv2d(3, w, 3, 2, 1),nn.Conv2d(w, w, 3, 2, 1)
        def forward(self, x): return OrderedDict([('0', a:=self.one(x)), ('1', self.two(a))])
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.fpn = Body(),FeaturePyramidNetwork([w, w], w, LastLevelMaxPool())
            self.head = nn.Linear(w, 3)
        def forward(self, x): return self.head(self.fpn(self.body(x))['1'].mean((2, 3)))
    return Model()


def test_the_teacher_stops_after_the_pyramid():
    t = pyramid(8)
    ran = []
    t.head.register_forward_hook(lambda *_: ran.append(1))
    pred,maps = Teacher(t).compute(x, layers=['fpn[0]', "fpn['1']", 'fpn[pool]'], logits=False)
    assert pred is None and not ran
    assert [tuple(m.shape[1:]) for m in maps.values()]==[(8, 4, 4), (8, 2, 2), (8, 1, 1)]


@pytest.mark.parametrize('loss', [PKD, FitNet, Attention])
def test_in_a_fit_with_adapters_under_the_layers_names(loss):
    learn,names = learner(pyramid()),['fpn[0]', 'fpn[pool]']
    kd = KD(pyramid(8), loss, names, ["fpn['0']", 'fpn[2]'], adapters={'fpn[pool]': nn.Conv2d(4, 8, 1)})
    learn.fit(2, cbs=kd)
    assert kd.activations_student==names and kd.log.history.distill_loss.gt(0).all()
    assert "fpn[pool] -> fpn[2]" in repr(kd)


def test_the_same_loss_as_by_modules_of_their_own():
    s,t = Net(),Net(8)
    def loss(names):
        kd = KD(t, PKD, names, names, adapters={0: nn.Conv2d(4, 8, 1, bias=False)})
        learn = learner(s, cbs=kd)
        nn.init.ones_(kd.recipe.adapters[0].weight)
        _,said = kd.terms_on(learn, *[(o,) for o in learn.dls.valid.one_batch()])
        return said['PKD'].item()
    assert loss('neck[1]')==pytest.approx(loss('neck.high'), rel=1e-6)


def test_compiled():
    t = pyramid(8)
    names = ['fpn[0]', 'fpn[pool]', 'fpn:input[0]']
    plain = Teacher(t).compute(x, layers=names)
    compiled = Teacher(t, compile=dict(backend='eager')).compute(x, layers=names)
    torch.testing.assert_close(plain, compiled)


def test_folded_and_half_precision_copies():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.neck = Neck(3, 4, wraps['tuple'])
        def forward(self, x): return self.neck(x)[1].mean((2, 3)) + self.stem(x).mean((2, 3))
    t = Folds().eval()
    for kwargs in (dict(fuse=True), dict(dtype='bf16')):
        _,maps = Teacher(t, **kwargs).compute(x, layers=['neck[1]', 'stem.0'])
        with Capture(t, ['neck[1]', 'stem.0']) as c: t(x)
        for k,m in maps.items(): torch.testing.assert_close(m.float(), c.maps[k].float(), atol=0.05, rtol=0.05)


class Blocks(nn.Module):
    "One ends with a layer, one with a sum, one gives two maps"
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.act = nn.Conv2d(4, 4, 1),nn.ReLU()
        def forward(self, x): return self.act(self.conv(self.act(x)))+x

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.sums = nn.Sequential(self.Sum(), self.Sum())
        self.neck,self.head = Neck(4, 4, wraps['tuple']),nn.Linear(4, 3)
        self.neck.low = nn.Conv2d(4, 4, 1)
    def forward(self, x):
        low,high = self.neck(self.sums(self.stem(x)))
        return self.head(low.mean((2, 3))+high.mean((2, 3)))

def test_blocks_that_a_trace_has_taken_apart():
    "Without rounding they give what they gave, to a student's losses and from a teacher"
    from torch.ao.quantization import disable_fake_quant
    m,names = Blocks().eval(),['stem', 'sums', 'sums.0']
    q = quantize_aware(learner(m))
    with Capture(m, names) as c: m(x)
    traced = q.model.eval().apply(disable_fake_quant)
    with Capture(traced, names) as d: traced(x)
    for found in (d.maps, Teacher(traced).compute(x, layers=names)[1]):
        for n in names: torch.testing.assert_close(found[n], c.maps[n], atol=1e-5, rtol=1e-4)
    assert d.layouts==c.layouts
    for name in ('neck', 'sums:input', 'stem[0]'):
        with pytest.raises(ValueError, match="took '[a-z]+' apart; name one of its layers, such as the last, '"):
            Capture(traced, name)
    kd = KD(m, FitNet, ['stem', 'sums'], ['stem', 'sums'])
    q.fit(1, cbs=kd)
    assert kd.log.history.distill_loss.iloc[-1]>0 and n_hooks(q.model)==0

class SharedParts(nn.Module):
    "Two blocks end with one activation, another one runs twice, and the last writes into its map"
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
        def forward(self, x):
            x = self.conv(x)
            torch.relu_(x)
            return x

    def __init__(self):
        super().__init__()
        act = nn.Hardswish()
        self.a,self.b = (nn.Sequential(nn.Conv2d(i, 4, 3, 1, 1), act) for i in (3, 4))
        block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
        self.twice,self.output = nn.Sequential(block, block),nn.Conv2d(4, 3, 1)
        self.last = nn.Sequential(self.Written(), nn.Identity())
    def forward(self, x): return self.last(self.output(self.twice(self.b(self.a(x))))).mean((2, 3))

def test_blocks_of_a_trace_that_share_parts_are_heard_where_they_end_or_refused():
    m,x = SharedParts().eval(),torch.randn(2, 3, 8, 8)
    traced,names = symbolic_trace(m),['a', 'b', 'output', 'twice']
    with Capture(m, names) as c: m(x)
    with Capture(traced, names) as d: traced(x)
    for n in names: torch.testing.assert_close(d.maps[n], c.maps[n])
    for name in ('twice.0', 'last.0'):
        with pytest.raises(ValueError, match=f"took '{name}' apart"): Capture(traced, name)

def test_modules_in_place_of_names_are_refused_without_their_repr():
    m = Blocks()
    for layers in (m.sums, [m.stem, m.sums]):
        with pytest.raises(TypeError, match=r"such as 'layer1', got a \w+ of modules: get_model_layers\(model\)"):
            Capture(m, layers)
