"Small teachers, the slow answers to compare with, and all that a call could leave behind"
from copy import deepcopy

import pytest
import torch
from torch import nn


class Block(nn.Module):
    "A residual block with one in-place ReLU that runs twice, as torchvision's"
    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(c)

    def forward(self, x): return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

class Breaks(nn.Module):
    "Fails at its fourth batch"
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        self.n = 0

    def forward(self, x):
        self.n += 1
        if self.n>3: raise KeyError('the fourth batch')
        return self.inner(x)

def ends(*args):
    "A process that cannot begin"
    raise SystemExit(7)

def make_net(c_out=5, head=None):
    "Stem, two blocks, head; BatchNorms that do something; dropout; in train mode but for one part"
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Block(8), Block(8),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), head or nn.Linear(8, c_out))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-.5, .5), m.running_var.uniform_(.5, 2), nn.init.uniform_(m.weight, .5, 2)
    net[4].eval()
    return net

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture
def net(): return make_net()

@pytest.fixture
def x(): return torch.randn(16, 3, 12, 12)

@torch.no_grad()
def plain(net, x):
    "The slow reference: a copy in eval mode, in fp32"
    return deepcopy(net).eval()(x)

@torch.no_grad()
def plain_maps(net, x, names):
    net,maps = deepcopy(net).eval(),{}
    for n in names: net.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: maps.__setitem__(n, o.clone()))
    net(x)
    return {n:maps[n] for n in names}

def rel_err(a, b): return ((a.float()-b).norm()/b.norm()).item()

def state(net):
    "Everything that a call could leave behind in a module"
    return ({k:v.clone() for k,v in net.state_dict().items()}, [m.training for m in net.modules()],
            [(p.requires_grad, p.grad, p.dtype, p.stride(), p.data_ptr(), p._version) for p in net.parameters()],
            [b._version for b in net.buffers()],
            [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in net.modules()])

def assert_same_state(a, b):
    assert a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1:]==b[1:]

def count_calls(net):
    "A list that grows by the name of each module that runs, and a function that takes the hooks off"
    ran = []
    hs = [m.register_forward_pre_hook(lambda m, i, n=n: ran.append(n)) for n,m in net.named_modules()]
    return ran, lambda: [h.remove() for h in hs]

modes = {'as it is': ({}, 0), 'fp32': (dict(dtype='fp32'), 0), 'channels_last': (dict(channels_last=True), 1e-5),
         'fused': (dict(fuse=True), 1e-5),
         'fused channels_last': (dict(fuse=True, channels_last=True), 1e-5), 'bf16': (dict(dtype='bf16'), 0.02),
         'fp16': (dict(dtype='fp16'), 0.003),
         'bf16 channels_last fused': (dict(dtype=torch.bfloat16, channels_last=True, fuse=True), 0.02),
         'auto': (dict(dtype='auto'), 0.03),
         'compiled': (dict(compile=dict(backend='eager')), 1e-6),
         'bf16 compiled': (dict(dtype='bf16', fuse=True, compile=dict(backend='eager')), 0.02)}

each_mode = pytest.mark.parametrize('opts,tol', modes.values(), ids=modes)
