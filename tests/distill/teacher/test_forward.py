"How one network runs: as the plain forward in every mode, to the last layer that is asked for, compiled or not"
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from fastai.torch_core import TensorImage
from torch import nn

from fasterai.distill.teacher.teacher import Teacher
from teacher_nets import (assert_same_state, count_calls, each_mode, make_net, net, plain, plain_maps, rel_err, seed,
                          state, x)


@each_mode
def test_answers_are_those_of_the_plain_forward(net, x, opts, tol):
    layers,before = ['3', '0', '4.bn1', '1'],state(net)
    teacher = Teacher(net, **opts)
    for batch in (x, torch.randn_like(x), x[:1]):
        pred,fm = teacher(batch, layers=layers)
        want = plain_maps(net, batch, layers)
        assert pred.dtype==torch.float32 and not pred.requires_grad and rel_err(pred, plain(net, batch))<=tol
        assert list(fm)==layers and not any(o.requires_grad for o in fm.values())
        for n in layers: assert rel_err(fm[n], want[n])<=tol, n
    assert_same_state(state(net), before)

@each_mode
def test_early_answers_are_those_of_the_plain_forward(net, x, opts, tol):
    before,teacher = state(net),Teacher(net, **opts)
    warned = pytest.warns(UserWarning, match='compiled teacher does not stop early')
    with warned if 'compile' in opts else nullcontext():
        pred,fm = teacher(x, layers=['3', '1'], logits=False)
    want = plain_maps(net, x, ['3', '1'])
    assert pred is None or 'compile' in opts
    assert list(fm)==['3', '1'] and all(rel_err(fm[n], want[n])<=tol for n in want)
    assert_same_state(state(net), before)

def test_the_early_stop_runs_no_module_after_the_last_layer(net, x):
    teacher = Teacher(net)
    ran,off = count_calls(net)
    for logits in (False, False, True):
        ran.clear()
        teacher(x, layers=['3.bn2', '1'], logits=logits)
        early = ['', '0', '1', '2', '3', '3.conv1', '3.bn1', '3.relu', '3.conv2', '3.bn2']
        assert len(ran)==22 and ran[:10]==early if logits else ran==early
    off()
    assert teacher(x, logits=False)==(None, {})

def test_a_layer_that_runs_twice_is_read_at_the_end_and_said_so(net, x):
    teacher = Teacher(net)
    with pytest.warns(UserWarning, match="runs to its end.*exactly once: 3.relu"):
        fm = teacher(x, layers=['3.relu'], logits=False)[1]
    assert torch.equal(fm['3.relu'], plain_maps(net, x, ['3.relu'])['3.relu'])

def test_the_stop_passes_a_model_that_catches_exceptions(x):
    class Careful(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Flatten(),nn.LazyLinear(3)
        def forward(self, x):
            try: return self.b(self.a(x))
            except Exception: return self.b(torch.zeros(1, 432))
    net = Careful(); net(x)
    teacher = Teacher(net)
    teacher(x, layers=['a'], logits=False)
    ran,off = count_calls(net)
    assert torch.equal(teacher(x, layers=['a'], logits=False)[1]['a'], x.flatten(1)) and ran==['', 'a']

def test_under_the_students_autocast(net, x):
    ref = plain(net, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        as_is,full,half = [Teacher(net, dtype=d)(x) for d in (None, 'fp32', 'fp16')]
        assert Teacher(net)(x, layers=['0'])[1]['0'].dtype==torch.bfloat16
        assert Teacher(net, dtype='fp16')(x, layers=['0'])[1]['0'].dtype==torch.float16
        assert torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu')==torch.bfloat16
    assert [o[0].dtype for o in (as_is, full, half)]==[torch.float32]*3
    assert torch.equal(full[0], ref) and 0<rel_err(as_is[0], ref)<0.02 and 0<rel_err(half[0], ref)<0.003

@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-6), (torch.bfloat16, 0.03)])
def test_a_model_in_another_precision_gets_its_inputs_in_it(net, x, dtype, tol):
    ref = plain(net, x)
    for opts in ({}, dict(dtype='fp32'), dict(dtype='auto')):
        pred = Teacher(deepcopy(net).to(dtype), **opts)(x)[0]
        assert pred.dtype==torch.float32 and rel_err(pred, ref)<(0.03 if 'auto' in opts.values() else tol)

def test_fastai_tensors_and_channels_last_batches(net, x):
    pred,fm = Teacher(net)(TensorImage(x).contiguous(memory_format=torch.channels_last), layers='0')
    assert type(pred) is torch.Tensor and type(fm['0']) is torch.Tensor and rel_err(pred, plain(net, x))<1e-6

@pytest.mark.parametrize('opts', [{}, dict(compile=dict(backend='eager'))])
def test_each_name_of_a_layer_has_its_run(opts):
    act = nn.ReLU()
    net,x = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act).eval(),torch.randn(3, 4)
    maps = Teacher(net, **opts)(x, layers=['1', '3'])[1]
    torch.testing.assert_close(maps, {'1': net[:2](x), '3': net(x)}, check_device=False)

@pytest.mark.parametrize('opts', [{}, dict(compile=dict(backend='eager'))])
def test_a_layer_asked_for_twice(net, x, opts):
    fm = Teacher(net, **opts)(x, layers=['3', '1', '3'])[1]
    assert list(fm)==['3', '1', '3#2'] and torch.equal(fm['3'], fm['3#2'])

# Compiled

def test_compiled_maps_are_those_of_their_own_batch(net, x):
    teacher = Teacher(net, compile=dict(backend='aot_eager'))
    for batch in (x, x+1):
        pred,fm = teacher(batch, layers=['2', '0', '1:input', '1'])    # '2' is in place on '1'
        assert rel_err(pred, plain(net, batch))<1e-5
        want = plain_maps(net, batch, ['2', '0', '1'])
        assert list(fm)==['2', '0', '1:input', '1'] and torch.equal(fm['1:input'], fm['0'])
        assert all(rel_err(fm[n], want[n])<1e-5 for n in want)
    assert teacher(x)[1]=={}

@pytest.mark.parametrize('in_place', [False, True])
def test_a_model_compiled_by_the_caller_is_still_looked_into(net, x, in_place):
    net.eval()
    compiled = net if in_place else torch.compile(net, backend='eager')
    if in_place: net.compile(backend='eager')
    with torch.no_grad(): compiled(x)
    teacher = Teacher(compiled)
    assert rel_err(teacher(x)[0], plain(net, x))<1e-6
    for batch in (x, x+1): assert rel_err(teacher(batch, layers=['3'])[1]['3'], plain_maps(net, batch, ['3'])['3'])<1e-6
    assert rel_err(Teacher(compiled, dtype='bf16')(x, layers=['3'])[0], plain(net, x))<0.02

def test_a_scripted_teacher(x):
    net = nn.Sequential(nn.Flatten(), nn.Linear(432, 3), nn.Dropout())
    scripted = torch.jit.script(net).train()
    assert torch.equal(Teacher(scripted)(x)[0], plain(net, x)) and scripted.training

# Batches that are no tensors

class OfDict(nn.Module):
    "As a tokenizer and a transformer: a dict in, logits out"
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, b):
        mask = b['mask'][..., None]
        return self.head((self.emb(b['ids'])*mask).sum(1)/mask.sum(1))

@pytest.fixture
def dicts():
    ids = torch.randint(1, 20, (8, 10))
    return {'ids': ids, 'mask': (ids>4).float()}

@pytest.mark.parametrize('opts,tol',
                         [({}, 0), (dict(dtype='bf16'), 0.03), (dict(dtype='auto'), 0.03), (dict(fuse=True), 1e-6)])
def test_a_batch_that_is_a_dict(dicts, opts, tol):
    net = OfDict()
    teacher = Teacher(net, **opts)
    pred,maps = teacher(dicts, layers=['head:input'])
    want = net(dicts).detach()
    assert rel_err(pred, want)<=tol and maps['head:input'].shape==(8, 16)
    macs = 8*16*3
    said = teacher.summary(dicts)
    assert 'batch of 8 ' in said and f'{2*macs/8/1e9:.3g} GFLOPs a sample' in said

def test_floats_in_a_dict_come_in_the_precision_of_the_network(dicts):
    net = OfDict().double()
    want = net({**dicts, 'mask': dicts['mask'].double()}).detach()
    assert rel_err(Teacher(net)(dicts)[0], want)<1e-6


# Models that hold tensors with a graph

class Remembers(nn.Module):
    "Keeps what it computed, as fastai's AWD_LSTM and DynamicUnet do"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = None

    def forward(self, x):
        self.last = {'maps': [self.conv(x)]}
        return self.last['maps'][0].mean((2, 3))

@pytest.mark.parametrize('opts',
                         [dict(dtype='bf16'), dict(fuse=True), dict(dtype='auto'), dict(compile=dict(backend='eager'))])
def test_a_model_that_holds_its_graph_is_copied(x, opts):
    net = Remembers().eval()
    want = net(x).detach()
    kept = net.last['maps'][0]
    assert kept.requires_grad
    for kwargs in ({}, dict(layers=['conv'], logits='compile' in opts)):
        net.last = {'maps': [kept]}
        teacher = Teacher(net, **opts)
        pred,maps = teacher(x, **kwargs)
        assert rel_err(maps['conv'], kept)<0.03 if kwargs else rel_err(pred, want)<0.03
        if teacher.nets[0].net is not net or 'compile' in opts:
            assert net.last['maps'][0] is kept and kept.requires_grad


# The random stream

def test_random_numbers_of_a_network_in_eval_mode_are_given_back(x):
    class Drops(nn.Module):
        def forward(self, x): return nn.functional.dropout(x.mean((2, 3)), training=True)
    teacher = Teacher(Drops())
    torch.manual_seed(3)
    want = torch.rand(5)
    torch.manual_seed(3)
    a,b = teacher(x)[0],teacher(x)[0]
    assert torch.equal(torch.rand(5), want) and torch.equal(a, b)

def test_the_input_of_a_layer_that_is_called_by_keyword():
    class Inner(nn.Linear):
        def forward(self, hidden): return super().forward(hidden)
    class Outer(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4, 4),Inner(4, 3)
        def forward(self, x): return self.b(hidden=self.a(x))
    net,x = Outer(),torch.randn(2, 4)
    for opts in {}, dict(compile=dict(backend='eager')):
        assert Teacher(net, **opts)(x, layers=['b:input'])[1]['b:input'].equal(net.a(x).detach())
