"Which way a network is quantized: PyTorch's FX while it is there, torchao's PT2E otherwise"
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from fasterai.distill.layers import int8_fx
from fasterai.distill.layers.capture import Capture
from fasterai.distill.layers.int8 import (as_int8, as_reference, calibrate, fake_quantized, fake_quantizers,
                                          freeze_statistics, quantized_layers)
from fasterai.distill.layers.int8_pt2e import _layer_of
from fasterai.distill.layers.trace import trace
from helpers import flags, net, same, state

FX = 'torch.ao.quantization.quantize_fx'


class Mixed(nn.Module):
    "What a graph may get wrong: numbers of BatchNorms, dropout, a skip, parameters of its own, a layer used twice"
    def __init__(self):
        super().__init__()
        self.gain,self.table = nn.Parameter(torch.ones(1)),torch.arange(3.)
        self.register_buffer('shift', torch.zeros(1))
        self.a,self.an = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8, eps=.1, momentum=.01)
        self.b,self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),nn.BatchNorm2d(8)
        self.up,self.un = nn.ConvTranspose2d(8, 8, 2, 2),nn.BatchNorm2d(8, eps=.01)
        self.twice,self.drop,self.fc = nn.Conv2d(8, 8, 1),nn.Dropout(.5),nn.Linear(8, 3)
    def forward(self, x):
        x = self.an(self.a(x*self.gain+self.shift)).relu()
        x = (self.bn(self.b(x))+x).relu()
        x = self.un(self.up(self.twice(self.twice(x))))
        return self.fc(self.drop(x.mean((2, 3))))+self.table


@pytest.fixture(scope='module')
def pictures():
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))

@pytest.fixture(scope='module')
def mixed(pictures):
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        for _ in range(300): model(pictures)
    return model.eval()

@pytest.fixture(scope='module')
def exported(mixed, pictures):
    "Calibrated, by PT2E"
    pytest.importorskip('torchao')
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, FX, None)
        found = fake_quantized(deepcopy(mixed), (pictures,))
    calibrate(found, [(pictures,)])
    return found

def off(a, b): return ((a-b).norm()/b.norm()).item()


def test_fx_while_it_is_there(pictures, monkeypatch):
    pytest.importorskip(FX)
    def gone(): raise AssertionError('torchao is asked though FX is there')
    monkeypatch.setattr('fasterai.distill.layers.int8_pt2e.tools', gone)
    found = fake_quantized(net(), (pictures,))
    calibrate(found, [(pictures,)])
    assert type(as_int8(found).net) is int8_fx.Kernels and quantized_layers(found)==['0.0', '1.0', '4']

def test_neither(pictures, monkeypatch):
    for n in (FX, 'torchao', 'torchao.quantization'): monkeypatch.setitem(sys.modules, n, None)
    with pytest.raises(ImportError, match='pip install torchao, or quantize with bits<8'):
        fake_quantized(net(), (pictures,))

@pytest.mark.parametrize('way', ['FX', 'PT2E'])
def test_ranges_span_all_batches_of_a_calibration_whichever_comes_first(pictures, way, monkeypatch):
    pytest.importorskip(FX if way=='FX' else 'torchao')
    if way=='PT2E': monkeypatch.setitem(sys.modules, FX, None)
    model = net().eval()
    def calibrated(*batches):
        found = fake_quantized(deepcopy(model), (pictures,), 'qnnpack')
        calibrate(found, [(b,) for b in batches])
        return found.eval()
    def scales(model):
        return [m.scale.item() for m in fake_quantizers(model) if m.activation_post_process.averaging_constant<1]
    dark = pictures*.1
    a,b = calibrated(dark, pictures),calibrated(pictures, dark, dark)
    assert scales(a)==pytest.approx(scales(b), rel=.05) and off(a(pictures), model(pictures))<.02
    assert {m.activation_post_process.averaging_constant for m in fake_quantizers(a)}=={.01, 1.} # as the training moves
    calibrate(a, [(dark,)]) # begins anew
    assert any(new==pytest.approx(.1*old, rel=1e-3) for new,old in zip(scales(a), scales(b)))

def test_plain_batchnorms_freeze():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    freeze_statistics(model)
    assert [m.training for m in model]==[False, True]
    freeze_statistics(model, False)
    assert model[0].training
    freeze_statistics(model.eval(), False)
    assert not model[0].training


def test_close_to_the_network_and_equal_to_its_integers(exported, mixed, pictures):
    want,got = mixed(pictures),exported.eval()(pictures)
    assert 0<off(got, want)<.02 # of eight bits
    assert off(as_int8(exported)(pictures), got)<1e-3 and off(as_reference(exported)(pictures), got)<1e-3
    names = quantized_layers(exported)
    assert {'a', 'b', 'twice', 'fc'}<=set(names) and as_int8(exported).quantized==names

def test_it_shows_the_layers_of_the_network(exported, mixed):
    assert {k for k,_ in exported.named_parameters()}=={k for k,_ in mixed.named_parameters()}
    assert all(type(exported.get_submodule(n)) is type(m) for n,m in mixed.named_modules() if n)

def test_batches_of_any_size(exported, pictures):
    z,ints = exported.eval()(pictures),as_int8(exported)
    for n in (1, 2, 3, 17):
        assert torch.allclose(exported(pictures[:n]), z[:n], atol=1e-5) and ints(pictures[:n]).shape==(n, 3)
    with pytest.raises(AssertionError, match=r'size\(\)\[2\] == 8'): exported(torch.randn(2, 3, 16, 16))

def test_training_and_evaluation(exported, pictures):
    model = deepcopy(exported)
    before = state(model.eval())
    assert torch.equal(model(pictures), model(pictures)) and same(before, state(model))
    for m in model.modules(): m.training = True # as those do who put modes back
    assert not torch.equal(model(pictures), model(pictures)) # dropout
    assert not torch.equal(model.bn.running_mean, before['bn.running_mean'])
    freeze_statistics(model)
    before = state(model)
    model(pictures)
    assert same(before, state(model))
    freeze_statistics(model, False)
    model(pictures)
    assert not torch.equal(model.un.running_var, before['un.running_var'])

def test_momentum_is_the_layers_own(exported, pictures):
    "One step of the graph moves statistics as one of the layers does"
    model = deepcopy(exported)
    for m in fake_quantizers(model): m.fake_quant_enabled[0] = 0
    model.source.train()(pictures)
    want = {k: model.get_submodule(k).running_var.clone() for k in ('an', 'bn', 'un')}
    model = deepcopy(exported)
    for m in fake_quantizers(model): m.fake_quant_enabled[0] = 0
    model.train()(pictures)
    for k,w in want.items(): assert torch.allclose(model.get_submodule(k).running_var, w, rtol=1e-4)

def test_a_copy_is_its_own(exported, pictures):
    model = deepcopy(exported)
    z = exported.eval()(pictures)
    assert torch.equal(model.eval()(pictures), z)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in exported.parameters()}
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1)
    assert torch.equal(exported(pictures), z) and off(model(pictures), z)>.01
    assert off(as_int8(model)(pictures), model(pictures))<1e-3

def test_conversion_leaves_it_as_it_was(exported, pictures):
    exported.train()
    before,modes = state(exported),flags(exported)
    as_int8(exported), as_reference(exported)
    assert same(before, state(exported)) and flags(exported)==modes

def test_files(exported, pictures, tmp_path):
    exported.eval()
    z,ints = exported(pictures),as_int8(exported)
    for o,want in ((exported, z), (ints, ints(pictures))):
        torch.save(o, tmp_path/'o.pt')
        found = torch.load(tmp_path/'o.pt', weights_only=False)
        assert torch.equal(found(pictures), want) and flags(found)==flags(o)
        if o is exported: assert torch.equal(as_int8(found)(pictures), ints(pictures))

def test_int8_stays_where_it_is(exported, pictures):
    ints = as_int8(exported)
    got = ints(pictures)
    assert torch.equal(ints.to('meta').half().train()(pictures), got) and not got.requires_grad
    assert not any(p.requires_grad for p in ints.parameters())

def test_no_maps(exported, pictures):
    for f in (lambda: Capture(exported, 'b'), lambda: trace(exported, pictures)):
        with pytest.raises(ValueError, match="no maps of Exported.*never called. Use losses on logits alone"): f()
    with Capture(exported, '') as c: z = exported(pictures)
    assert torch.equal(c.maps[''], z)

def test_some_layers_and_backends(mixed, pictures, monkeypatch):
    pytest.importorskip('torchao')
    monkeypatch.setitem(sys.modules, FX, None)
    found = fake_quantized(deepcopy(mixed), (pictures,), 'qnnpack', layers=['b', 'fc'])
    calibrate(found, [(pictures,)])
    assert quantized_layers(found)==['b', 'fc']==as_int8(found, 'qnnpack').quantized
    assert {m.quant_max for m in fake_quantizers(found)}=={127, 255} # weights and activations
    assert 0<off(found.eval()(pictures), mixed(pictures))<.02
    assert off(as_int8(found, 'qnnpack')(pictures), found(pictures))<1e-3
    with pytest.raises(ValueError, match="unknown backend 'x68'; did you mean 'x86'"):
        fake_quantized(deepcopy(mixed), (pictures,), 'x68')

class Branches(nn.Module):
    def forward(self, x): return x if x.mean()>.5 else -x

class Depth(nn.Module):
    "Something that is left out in training"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
    def forward(self, x): return x if self.training else x+self.conv(x)

@pytest.mark.parametrize('odd,said', [(Branches, 'torch.export cannot follow Sequential'),
                                      (Depth, 'something else in training than in evaluation')])
def test_refused(odd, said, pictures, monkeypatch):
    pytest.importorskip('torchao')
    monkeypatch.setitem(sys.modules, FX, None)
    with pytest.raises(ValueError, match=said): fake_quantized(nn.Sequential(nn.Conv2d(3, 3, 1), odd()), (pictures,))

def test_nothing_to_quantize(pictures, monkeypatch):
    pytest.importorskip('torchao')
    monkeypatch.setitem(sys.modules, FX, None)
    found = fake_quantized(nn.Sequential(nn.Flatten(), nn.ReLU()), (pictures,))
    with pytest.raises(ValueError, match='no layer that can be quantized'): calibrate(found, [(pictures,)])


class Repeats(nn.Module):
    "A layer twice in a row, a block twice with its BatchNorm, and one activation for all"
    def __init__(self):
        super().__init__()
        self.a,self.c,self.n = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1),nn.BatchNorm2d(8)
        self.t,self.act,self.fc = nn.Conv2d(8, 8, 1),nn.ReLU(inplace=True),nn.Linear(8, 3)
    def forward(self, x):
        x = self.act(self.a(x))
        for _ in range(2): x = self.act(self.n(self.c(x))+x)
        return self.fc(self.t(self.t(x)).mean((2, 3)))

def test_each_call_of_a_layer_is_rounded(monkeypatch):
    pytest.importorskip('torchao')
    monkeypatch.setitem(sys.modules, FX, None)
    torch.manual_seed(0)
    net,x = Repeats().train(),torch.randn(8, 3, 8, 8)
    with torch.no_grad(): wanted = deepcopy(net).eval()(x)
    for layers in (None, ['t']):
        q = fake_quantized(deepcopy(net), (x,), layers=layers)
        ops = torch.ops.aten.conv2d.default,torch.ops.aten.linear.default
        heavy = [n for n in q.graph.graph.nodes if n.target in ops]
        rounded = [_layer_of(n) for n in heavy if n.args[1].op=='call_module']
        assert len(heavy)==6 and sorted(rounded)==(['t', 't'] if layers else ['a', 'c', 'c', 'fc', 't', 't'])
        calibrate(q, [(x,)])
        with torch.no_grad(): got,ints = q.eval()(x),as_int8(q)(x)
        assert 0<(got-wanted).norm()<.1*wanted.norm() and (ints-got).norm()<1e-3*got.norm()


class Bright(nn.Module):
    "Does something else with bright pictures"
    def __init__(self):
        super().__init__()
        self.a,self.n = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4)
    def forward(self, x): return self.n(self.a(x if x.mean()>.5 else -x))

def test_a_network_that_branches_is_to_blame_itself():
    with pytest.raises(ValueError, match=r'cannot follow Bright in its own forward \(Bright\)'):
        fake_quantized(Bright(), (torch.randn(2, 3, 8, 8),))
