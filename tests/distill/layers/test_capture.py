"Capture under failures, wrappers, compilation and odd modules: what a notebook cell cannot show"
import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fasterai.distill.layers.capture import Capture, as_found, output_shapes
from fasterai.distill.layers.names import get_module_by_name, unwrap
from fasterai.distill.layers.trace import trace


def n_hooks(m): return sum(len(o._forward_hooks)+len(o._forward_pre_hooks) for o in m.modules())

def net():
    "conv, norm, in-place ReLU, conv, in-place ReLU, linear"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3),
                         nn.ReLU(inplace=True),
                         nn.Flatten(), nn.Linear(80, 2))

def by_hand(m, x):
    "What every layer of `net` computes, safe from in-place writes; in training mode"
    res = {}
    for n,o in m.named_children():
        x = nn.functional.batch_norm(x, None, None, o.weight, o.bias,
                                     True) if isinstance(o, nn.BatchNorm2d) else o(x.clone())
        res[n] = x.clone()
    return res

x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('detach', [False, True])
def test_every_batch_holds_what_the_layers_computed(detach):
    m = net()
    c = Capture(m, [str(i) for i in range(7)], detach=detach)
    for i in range(3):
        want = by_hand(m, x+i)
        with c: m(x+i)
        for n,t in c.maps.items(): torch.testing.assert_close(t, want[n], msg=f'layer {n}, batch {i}')
        assert c.maps['1'].requires_grad is not detach
    assert [n for n,t in c.taps.items() if t.copying] == ['1', '3']

def test_gradient_through_an_overwritten_layer():
    m,ref = net(),net()
    with Capture(m, '1') as c: m(x)
    c.maps['1'].pow(2).sum().backward()
    ref[1](ref[0](x)).pow(2).sum().backward()
    torch.testing.assert_close(m[0].weight.grad, ref[0].weight.grad)
    assert m[3].weight.grad is None

def test_no_copy_is_made_of_a_layer_that_is_left_alone():
    m = net()
    c = Capture(m, '5')
    with c: m(x)
    c.maps
    with c: m(x)
    (t,version,copied), = c.taps['5'].kept
    assert copied is None and c.maps['5'] is t

def test_overwriting_that_begins_later_is_an_error_once():
    m = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    c = Capture(m, '0')
    xb = torch.randn(4, 3)
    with c: m(xb)
    c.maps
    m[1].inplace = True
    with c: m(xb)
    with pytest.raises(RuntimeError, match='output of 0 was changed in place'): c.maps
    for _ in range(2):
        with c: m(xb)
        torch.testing.assert_close(c.maps['0'], m[0](xb))

def test_inference_mode():
    m = net().eval()
    c = Capture(m, ['1', '5'])
    for _ in range(2):
        with torch.inference_mode():
            with c: m(x)
            torch.testing.assert_close(c.maps['1'], m[1](m[0](x)))

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, SystemExit])
def test_nothing_is_left_after_an_exception(error):
    m = net()
    class Boom(nn.Module):
        def forward(self, x): raise error('boom')
    m.append(Boom())
    c = Capture(m, ['0', '6:input'])
    for _ in range(2):
        with pytest.raises(error, match='boom'):
            with c: m(x)
        assert n_hooks(m) == 0
        c.clear()
        assert not any(t.kept for t in c.taps.values())

def test_a_layer_that_vanishes_leaves_no_hook():
    m = net()
    c = Capture(m, ['0', '6'])
    del m[6]
    with pytest.raises(ValueError, match="unknown layer '6'"):
        with c: pass
    assert n_hooks(m) == 0

def test_a_layer_that_was_replaced_is_found_by_its_name():
    m = net()
    c = Capture(m, '1')
    m[1] = nn.GroupNorm(2, 4)
    with c: m(x)
    torch.testing.assert_close(c.maps['1'], m[1](m[0](x)))

def test_a_hooked_model_pickles_and_copies_without_the_captured_tensors():
    m = net()
    with Capture(m, ['0', '6:input']) as c:
        m(x)
        for twin in (pickle.loads(pickle.dumps(m)), copy.deepcopy(m)):
            assert all(not h.__self__.kept for o in twin.modules()
                       for h in (*o._forward_hooks.values(), *o._forward_pre_hooks.values()))
    assert len(c.maps) == 2

def test_clear_frees_the_maps():
    import weakref
    m = net()
    with Capture(m, '0') as c: m(x)
    t = weakref.ref(c.maps['0'])
    assert t() is not None
    c.clear()
    assert t() is None


class Twice(nn.Module):
    "One module called twice, ones that return a tuple, a dict and no tensor, and one that never runs"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.table,self.text = Table(),Text()
        self.idle = nn.Linear(1, 1)
    def forward(self, x, with_text=False):
        h = self.lin(self.lin(x))
        if with_text: self.text(h)
        return self.table(inp=self.lstm(h)[0])

class Table(nn.Module):
    def forward(self, inp): return {'name': 'table', 'states': [inp+1, inp+2]}

class Text(nn.Module):
    def forward(self, x): return 'text'

def test_calls():
    m,xb = Twice(),torch.randn(2, 5, 4)
    once,twice = m.lin(xb),m.lin(m.lin(xb))
    with Capture(m, 'lin') as c: m(xb)
    with pytest.warns(UserWarning, match="layer 'lin' ran several times before its map was read: the last one counts"):
        torch.testing.assert_close(c.maps['lin'], twice)
    with c: m(xb)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        c.maps                                                                                        # said once
    with Capture(m, ['lin', 'lin:input'], calls='all') as c: m(xb)
    torch.testing.assert_close(c.maps['lin'], [once, twice])
    torch.testing.assert_close(c.maps['lin:input'], [xb, once])

@pytest.mark.parametrize('inplace', [False, True])
def test_a_module_with_several_names_has_a_run_for_each(inplace):
    act = nn.ReLU(inplace)
    m,xb = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2)),torch.randn(3, 4)
    want = {n: m[:int(n)+1](xb) for n in '310'}
    if inplace: want['0'] = m[0](xb)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with Capture(m, list('310')) as c: m(xb)
        assert all(torch.equal(c.maps[n], want[n]) for n in want)
    steps = trace(m, xb)
    assert list(steps)[:4]==['0', '1', '2', '4'] and steps['1'].depth==2/5 # whose run that of '3' is not

def test_parents_that_run_in_another_order_than_they_are_named():
    "Each name of a module has the last run, as nobody knows which is whose, and a warning says so"
    act = nn.ReLU()
    class UpDown(nn.Module):
        def __init__(self):
            super().__init__()
            self.up,self.down = (nn.Sequential(nn.Linear(4, 4), act) for _ in range(2))
        def forward(self, x): return self.up(self.down(x))
    m,xb = UpDown(),torch.randn(3, 4)
    with Capture(m, ['up.1', 'down.1']) as c: out = m(xb)
    with pytest.warns(UserWarning, match="'up.1' ran several times"): assert torch.equal(c.maps['up.1'], out)

def test_one_entry_for_several_forwards():
    "Each is read before the next one, whose maps alone are kept"
    act = nn.ReLU()
    m = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    batches = torch.randn(4, 3, 4)
    want = [m[:2](xb) for xb in batches]
    with warnings.catch_warnings(), Capture(m, ['0', '1', '3']) as c:
        warnings.simplefilter('error')
        for xb,first in zip(batches, want):
            out = m(xb)
            assert torch.equal(c.maps['1'], first) and torch.equal(c.maps['3'], out) and len(c.taps['0'].kept)==1

def test_an_encoder_that_nests_its_tensors_is_refused_with_the_remedy():
    "PyTorch's own, in evaluation and with a mask of padding"
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    def encoder(**kw): return nn.TransformerEncoder(layer, 2, **kw).eval()
    xb,pad = torch.randn(3, 5, 8),torch.arange(5)>=torch.tensor([[3], [5], [2]])
    with pytest.raises(ValueError, match="'layers.0' gives a nested tensor.*enable_nested_tensor=False"):
        with torch.no_grad(), Capture(m := encoder(), 'layers.0'): m(xb, src_key_padding_mask=pad)
    with torch.no_grad(), Capture(m := encoder(enable_nested_tensor=False), 'layers.1') as c:
        assert torch.equal(m(xb, src_key_padding_mask=pad), c.maps['layers.1'])

def test_tuples_mappings_and_keyword_inputs():
    m,xb = Twice(),torch.randn(2, 5, 4)
    with Capture(m, ['lstm', 'table', 'table:input']) as c: m(xb)
    h = m.lstm(m.lin(m.lin(xb)))[0]
    torch.testing.assert_close(list(c.maps.values()), [h, h+1, h])

def test_no_tensor_and_not_reached_are_errors_with_the_name():
    m,xb = Twice(),torch.randn(2, 5, 4)
    with pytest.raises(TypeError, match="text gives a str without a tensor"):
        with Capture(m, 'text', kind='layer of the teacher'): m(xb, with_text=True)
    with Capture(m, ['lin', 'idle', 'text'], kind='layer of the teacher') as c: m(xb)
    with pytest.raises(RuntimeError, match="never reached layer of the teacher 'idle', 'text'$"): c.maps
    assert n_hooks(m) == 0


def test_data_parallel_is_refused_only_where_it_copies():
    m = net()
    Capture(nn.DataParallel(m), '0')
    dp = nn.DataParallel(m)
    dp.device_ids = [0, 1]
    with pytest.raises(ValueError, match='DataParallel.*use DistributedDataParallel'): Capture(dp, '0')

def test_distributed(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        m = net()
        ddp = nn.parallel.DistributedDataParallel(m)
        c = Capture(ddp, ['1', '6'])
        assert get_module_by_name(ddp, '6') is m[6]
        for _ in range(2):
            want = by_hand(m, x)
            with c: out = ddp(x)
            torch.testing.assert_close(c.maps, {n:want[n] for n in ('1', '6')})
            out.sum().backward()
        assert output_shapes(ddp, ['6'], x) == {'6': (2, 2)}
    finally: dist.destroy_process_group()


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()

@pytest.mark.parametrize('in_place', [False, True])
def test_compiled_model(compiler, in_place):
    m = net()
    if in_place: (model := m).compile(backend='aot_eager', fullgraph=True)
    else: model = torch.compile(m, backend='aot_eager', fullgraph=True)
    assert unwrap(model) is m
    c = Capture(model, ['1', '6'])
    assert output_shapes(model, ['1'], x) == {'1': (2, 4, 6, 6)}
    for i in range(3):
        want = by_hand(m, x+i)
        with c: model(x+i)
        torch.testing.assert_close(c.maps, {n:want[n] for n in ('1', '6')})
        model.eval()
        c.clear()
        with torch.no_grad(): model(x)
        assert not any(t.kept for t in c.taps.values())
        model.train()

def test_compiled_code_that_is_older_than_the_hooks_is_detected(compiler):
    m = net()
    model = torch.compile(m, backend='aot_eager')
    model(x)
    c = Capture(model, ['1', '6'])
    with c: model(x)
    with pytest.raises(RuntimeError,
                       match=r"never reached layer '1', '6': the model was compiled .* torch.compiler.reset\(\)"):
        c.maps
    torch.compiler.reset()
    with c: model(x)
    assert list(c.maps) == ['1', '6']


def test_a_compiled_part_that_is_older_than_the_hooks_is_detected(compiler):
    m = net()
    m[3] = torch.compile(m[3], backend='aot_eager')
    m(x)
    with Capture(m, ['1', '3._orig_mod']) as c: m(x)
    with pytest.raises(RuntimeError, match=r"never reached layer '3._orig_mod': the model was compiled"): c.maps


class Counts(nn.Module):
    "Changes a buffer and draws random numbers even in evaluation mode"
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
    def forward(self, x):
        self.n += 1
        return x + torch.randn_like(x)

@pytest.mark.parametrize('fails', [False, True])
def test_a_dry_run_leaves_everything_as_it_was(fails):
    m = nn.Sequential(net(), Counts(), nn.Linear(2, 3 if fails else 2), nn.Linear(2, 2))
    m[0][1].eval()
    m[0][0].weight.requires_grad_(False)
    m[3].weight.grad = torch.ones(2, 2)
    facts = lambda: (copy.deepcopy(m.state_dict()), [o.training for o in m.modules()],
                     [p.requires_grad for p in m.parameters()],
                     [p.grad for p in m.parameters()], torch.get_rng_state(), torch.is_grad_enabled(), n_hooks(m))
    before = facts()
    if fails:
        with pytest.raises(RuntimeError, match='shapes cannot be multiplied'): output_shapes(m, ['0.1'], x[:1])
    else: assert output_shapes(m, ['0.1', '3'], x[:1]) == {'0.1': (1, 4, 6, 6), '3': (1, 2)}
    torch.testing.assert_close(facts(), before, rtol=0, atol=0)

def test_a_dry_run_takes_the_models_precision():
    assert output_shapes(net().double(), ['6'], x) == {'6': (2, 2)}

def test_a_dry_run_may_be_the_first_of_a_lazy_model():
    m = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    assert output_shapes(m, ['1'], x) == {'1': (2, 3)}
    assert m[1].in_features == 192 and m.training and m[1].training

def test_as_found_takes_several_models():
    a,b = net(),net().eval()
    with as_found(a, b): assert not (a.training or b.training or torch.is_grad_enabled())
    assert a.training and not b.training


@pytest.mark.parametrize('fails', [False, True])
def test_observers_of_quantization_aware_training_stay_as_they_were(fails):
    Q = pytest.importorskip('torch.ao.quantization')
    m = nn.Sequential(Q.QuantStub(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), Q.DeQuantStub(),
                      nn.Linear(6, 9 if fails else 6), nn.Linear(6, 2))
    engines = torch.backends.quantized.supported_engines
    m.qconfig = Q.get_default_qat_qconfig('x86' if 'x86' in engines else 'qnnpack')
    Q.prepare_qat(m.train(), inplace=True)
    was = copy.deepcopy(m.state_dict())
    if fails:
        with pytest.raises(RuntimeError): output_shapes(m, ['1'], x)
    else: assert output_shapes(m, ['1'], x) == {'1': (2, 4, 6, 6)}
    assert {k:v.shape for k,v in m.state_dict().items()} == {k:v.shape for k,v in was.items()}
    torch.testing.assert_close(m.state_dict(), was, rtol=0, atol=0, equal_nan=True)
    if not fails: m(x).sum().backward()

def test_a_dry_run_keeps_a_lazy_norms_buffers():
    m = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d())
    assert output_shapes(m, ['1'], torch.randn(2, 3, 8)) == {'1': (2, 4, 6)}
    assert m[1].running_mean.tolist() == [0]*4 and m[1].num_batches_tracked == 0

def test_the_whole_model_is_a_layer():
    m = net()
    want = m(x)
    with Capture(m, ['', ':input', '3'], detach=True) as c: m(x)
    torch.testing.assert_close(c.maps[''], want.detach())
    assert c.maps[':input'].equal(x)
    assert output_shapes(nn.DataParallel(m), [''], x) == {'': (2, 2)}
    assert get_module_by_name(nn.DataParallel(m), '') is m

def test_the_whole_of_a_compiled_model_is_a_layer(compiler):
    m = net()
    model = torch.compile(m, backend='aot_eager', fullgraph=True)
    with Capture(model, ['', '1']) as c: out = model(x)
    torch.testing.assert_close(c.maps[''], out)
