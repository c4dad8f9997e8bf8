"The trial takes the fastest format that is safe, and no copy where nothing is faster"
import copy
import math
import re

import fastai.callback.schedule
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Attention, SoftTarget
from fasterai.distill.teacher import auto
from fasterai.distill.teacher.auto import lost_share
from fasterai.distill.teacher.forward import Plan
from fasterai.distill.teacher.teacher import Teacher
from teacher_nets import net, plain, seed, x


def fake_clock(monkeypatch, fast):
    "A clock for which the formats in `fast` take half the time"
    def time(f, device): return 0.5 if (f.args[2].dtype, f.args[2].channels_last) in fast else 1.
    monkeypatch.setattr(auto, 'best_time', time)

@pytest.mark.parametrize('dtype,cl',
                         [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False),
                          (torch.bfloat16, True)])
def test_auto_takes_the_fastest(net, x, monkeypatch, capsys, dtype, cl):
    fake_clock(monkeypatch, [(dtype, cl)])
    teacher = Teacher(net, dtype='auto')
    teacher(x); teacher(x)
    assert teacher.nets[0].plan==Plan(dtype, cl, True)
    said = capsys.readouterr().out
    assert said.count('\n')==1
    assert str(dtype)[6:] in said and ('channels_last' in said)==cl
    assert '5 BatchNorms folded' in said and 'as it is 1000.0 ms' in said

def test_auto_takes_no_copy_where_nothing_is_faster(net, x, monkeypatch, capsys):
    fake_clock(monkeypatch, [])
    teacher = Teacher(net, dtype='auto')
    assert torch.equal(teacher(x)[0], plain(net, x)) and teacher.nets[0].net is net
    assert 'nothing safe is faster' in capsys.readouterr().out and 'as it is' in repr(teacher)

def test_auto_refuses_what_is_fast_and_wrong(x, monkeypatch):
    class Fine(nn.Module):
        "What it says is in what bf16 rounds away"
        def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(3, 8, 3),nn.Linear(8, 5)
        def forward(self, x):
            z = self.conv(x).mean((2, 3))
            return self.head(1000+z) - self.head(1000+0*z)
    fake_clock(monkeypatch, [(torch.bfloat16, c) for c in (False, True)])
    teacher = Teacher(Fine(), dtype='auto')
    teacher(x)
    assert teacher.nets[0].plan.dtype is None

def test_auto_skips_what_the_device_lacks(net, x, monkeypatch):
    fake_clock(monkeypatch, [(torch.bfloat16, True), (torch.float32, True)])
    net[8] = NoHalf()
    teacher = Teacher(net, dtype='auto')
    teacher(x)
    assert teacher.nets[0].plan==Plan(torch.float32, True, True)

class NoHalf(nn.Module):
    "Stands for a kernel that a device lacks"
    def forward(self, x):
        if torch.is_autocast_enabled('cpu'): raise RuntimeError("\"op_cpu\" not implemented for 'BFloat16'")
        return x

def test_a_dtype_that_the_device_lacks(net, x):
    net[8] = NoHalf()
    with pytest.raises(ValueError, match="dtype=bfloat16: cpu cannot run the teacher Sequential.*dtype='auto'"):
        Teacher(net, dtype='bf16')(x)

def test_a_dtype_that_only_a_part_of_the_network_can_take(x):
    class Mixed(nn.Module):
        "Makes numbers of its own, in fp32"
        def forward(self, x): return x + torch.dot(x[0], torch.ones(3))
    with pytest.raises(ValueError, match='dtype=bfloat16: cpu cannot run the teacher.*same dtype'):
        Teacher(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Mixed()), dtype='bf16')(x)


# Integers

class Slow(nn.Module):
    "A digits' network on which a clock may take its time"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = digits_net(16)
    def forward(self, x): return self.net(x)

@pytest.fixture(scope='module')
def digits():
    dls = digits_dls(n_train=256, bs=64)
    learn = Learner(dls, Slow(), CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    return dls,learn.model.eval()

integers = pytest.mark.skipif('none'==torch.backends.quantized.engine, reason='no kernels')
fast_integers = [(torch.qint8, None)]

def batch(dls, n=64): return dls.train.one_batch()[0][:n].as_subclass(torch.Tensor)

@integers
def test_auto_takes_integers_where_targets_keep_what_they_tell(digits, monkeypatch, capsys):
    fake_clock(monkeypatch, fast_integers)
    dls,net = digits
    teacher,x = Teacher(net, dtype='auto'),batch(dls)
    z,ref = teacher(x)[0],plain(net, x)
    assert teacher.nets[0].plan.integers and 'int8' in repr(teacher) and 0<lost_share(z, ref)<=.01
    said = capsys.readouterr().out
    assert said.count('\n')==1 and 'int8 on cpu: 500.0 ms for 64 samples, as it is 1000.0 ms (soft targets lose' in said

@integers
def test_maps_of_a_later_question_bring_floats_back(digits, monkeypatch, capsys):
    fake_clock(monkeypatch, fast_integers)
    dls,net = digits
    teacher,x = Teacher(net, dtype='auto'),batch(dls)
    teacher(x)
    _,maps = teacher(x, layers='net.0')
    assert maps['net.0'].is_floating_point() and not teacher.nets[0].plan.integers
    assert 'no int8: a loss asks for feature maps' in capsys.readouterr().out
    teacher(x)
    assert not teacher.nets[0].plan.integers and not capsys.readouterr().out # said once, and for good

@integers
def test_weights_that_change_in_a_fit_rule_integers_out(digits, monkeypatch, capsys):
    fake_clock(monkeypatch, fast_integers)
    dls,net = digits
    net = copy.deepcopy(net)
    teacher,x = Teacher(net, dtype='auto'),batch(dls)
    teacher(x)
    with torch.no_grad(): net.net[-1].weight.mul_(-1)
    assert torch.equal(teacher(x)[0], plain(net, x))
    assert 'no int8: its weights change' in capsys.readouterr().out

class Branches(Slow):
    def forward(self, x): return self.net(x) if x.sum()>-1e9 else self.net(-x)

class Constant(Slow):
    "Says the same of everything"
    def forward(self, x): return self.net(0*x)

@integers
@pytest.mark.parametrize('make,options,n,said', [
    (Branches, {}, 64, 'it cannot be made .torch.fx cannot follow'), (Constant, {}, 64, 'would lose all'),
    (Slow, dict(average='none'), 64, 'not of classes'), (Slow, {}, 16, '16 samples are too few'),
    (Slow, dict(channels_last=True), 64, 'another format'), (Slow, dict(fuse=False), 64, 'another format')])
def test_auto_says_why_there_are_no_integers(digits, monkeypatch, capsys, make, options, n, said):
    fake_clock(monkeypatch, fast_integers)
    teacher = Teacher(make().eval(), dtype='auto', **options)
    teacher(batch(digits[0], n))
    assert not teacher.nets[0].plan.integers and re.search('no int8: .*'+said, capsys.readouterr().out)

@integers
def test_a_cheap_forward_is_left_alone(digits, monkeypatch, capsys):
    dls,net = digits
    monkeypatch.setattr(auto, 'best_time', lambda f, device: .001 if f.args[2].dtype is None else .0005)
    monkeypatch.setattr(auto, 'integer_copy', lambda *_: 1/0)
    Teacher(net, dtype='auto')(batch(dls))
    assert 'below 10 ms it is not worth a trial' in capsys.readouterr().out

@integers
def test_slow_integers_and_wrong_ones_are_not_taken(digits, monkeypatch, capsys):
    dls,net = digits
    fake_clock(monkeypatch, [])
    teacher = Teacher(net, dtype='auto')
    teacher(batch(dls))
    assert teacher.nets[0].plan.dtype is None and 'no int8: it is not faster' in capsys.readouterr().out
    fake_clock(monkeypatch, fast_integers)
    def noisy(net, xb):
        def forward(x): return net(x)+2*torch.randn(len(x), 10)
        m = nn.Module()
        m.forward = forward
        return m
    monkeypatch.setattr(auto, 'integer_copy', noisy)
    Teacher(net, dtype='auto')(batch(dls))
    assert re.search(r'no int8: its soft targets would lose ([\d.]+%|all) of what they tell', capsys.readouterr().out)

@integers
def test_in_a_training_of_either_kind(digits, monkeypatch):
    fake_clock(monkeypatch, fast_integers)
    dls,net = digits
    teacher = Teacher(net, dtype='auto')
    for loss,layers,whole in (SoftTarget, None, True), (Attention, {'1':'net.1'}, False), (SoftTarget, None, False):
        kd = KnowledgeDistillationCallback(teacher, loss, layers, weight=.5)
        learn = Learner(dls, digits_net(4), CrossEntropyLossFlat(), cbs=kd)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert teacher.nets[0].plan.integers is whole and learn.recorder.values[-1][0]>0

@pytest.mark.parametrize('average', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('shape', [(32, 5), (8, 5, 4, 4)])
def test_what_targets_lose(average, shape):
    torch.manual_seed(0)
    ref = torch.randn(shape)*3
    assert lost_share(ref.clone(), ref, 1, average)==0
    little,more = (lost_share(ref+noise*torch.randn(shape), ref, 1, average) for noise in (.1, 1))
    assert 0<little<.01<more
    assert lost_share(ref.movedim(1, -1)*1.1, ref.movedim(1, -1), -1, average)==pytest.approx(
        lost_share(ref*1.1, ref, 1, average), rel=1e-4)
    assert not lost_share(ref*math.inf, ref, 1, average)<=1

def test_by_hand():
    "Two samples, two classes: the average target is even"
    z = torch.tensor([[2., 0.], [0., 2.]])
    p,q = (1/(1+math.exp(-d)) for d in (2, 3))
    lost = p*math.log(p/q)+(1-p)*math.log((1-p)/(1-q))
    told = p*math.log(2*p)+(1-p)*math.log(2*(1-p))
    assert lost_share(8*1.5*z, 8*z)==pytest.approx(lost/told, rel=1e-5) # the worst is T=8
    assert lost_share(1.5*z/100, z/100)==pytest.approx(.25, rel=1e-2) # in the limit: of the variance
