"Fake quantizers with a learned step: both gradients by hand, and a network of them"
import io
import pickle
from copy import deepcopy
from math import sqrt

import pytest
import torch
from torch import nn

from fasterai.distill.ship.lsq import (LSQFakeQuant, QuantizedLayer, closest_step, fake_quantize, grid_ends,
                                       lsq_quantized, paper_step, quantizable)
from helpers import net, state, same


def test_reference_case():
    "A case computed in float64 by another program: 3 bits, signed, a step of 0.3"
    v = torch.tensor([0.2763, -1.8546, 0.6239, 1.1453, 1.0372, 1.8866], requires_grad=True)
    step = torch.tensor(0.3, requires_grad=True)
    q = fake_quantize(v, step, 3, True)
    q.sum().backward()
    assert torch.allclose(q, torch.tensor([.3, -1.2, .6, .9, .9, .9]))
    assert torch.allclose((q/step).round(), torch.tensor([1., -4, 2, 3, 3, 3]))
    assert torch.equal(v.grad, torch.tensor([1., 0, 1, 0, 0, 0]))
    assert step.grad.item()==pytest.approx(1.1783541671373154, abs=1e-6)
    assert paper_step(v.detach(), 3).item()==pytest.approx(1.313260167307696, abs=1e-6)

@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('signed', [True, False])
def test_both_gradients_by_hand(bits, signed):
    "Number by number, as in the paper"
    low,high = grid_ends(bits, signed)
    v = torch.randn(200, generator=torch.Generator().manual_seed(bits))*high*.2
    v.requires_grad_()
    step = torch.tensor(.17, requires_grad=True)
    w = torch.linspace(-1, 1, 200)
    (w*fake_quantize(v, step, bits, signed)).sum().backward()
    total = 0.
    for x,g,got in zip(v.tolist(), w.tolist(), v.grad.tolist()):
        r = x/.17
        inside = low<=r<=high
        total += g*(round(r)-r if inside else low if r<low else high)
        assert got==pytest.approx(g if inside else 0, abs=1e-6)
    assert step.grad.item()==pytest.approx(total/sqrt(200*high), abs=1e-4)

def test_a_state_dict_holds_where_the_grid_begins():
    "Activations from 0 on, loaded into a network that was calibrated on others, through a file of weights alone"
    def quantized(x): return lsq_quantized(net(seed=0), [(x,)], 4).eval()
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a,b = quantized(x.abs()),quantized(x)
    with torch.no_grad(): assert not torch.equal(a(x.abs()), b(x.abs()))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad(): assert torch.equal(a(x.abs()), b(x.abs()))

@pytest.mark.parametrize('bits', [2, 4, 8])
def test_closest_step_beats_the_papers(bits):
    v = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    def error(step): return (fake_quantize(v, step, bits, True)-v).square().mean()
    steps = torch.linspace(.02, 4, 400)
    found = error(closest_step(v, bits))
    assert found<=1.03*min(map(error, steps)) and found<error(paper_step(v, bits))

def test_grid_of_zeros_and_constants():
    for v in (torch.zeros(8), torch.ones(8)):
        q = LSQFakeQuant(2).calibrate(v)
        assert torch.isfinite(q(v[None])).all() and q.step>0 and torch.allclose(q(v[None]), v[None], atol=1e-6)

def test_step_stays_above_zero_and_weight_decay_leaves_it_where_it_began():
    q = LSQFakeQuant(4).calibrate(torch.randn(1000))
    first = q.step.item()
    opt = torch.optim.SGD(q.parameters(), lr=1., weight_decay=.5)
    for _ in range(3):
        q.growth.grad = torch.zeros(())
        opt.step()
    assert q.step.item()==first
    with torch.no_grad(): q.growth.fill_(-20)
    assert q.step>0

def test_fp32_under_autocast():
    q = LSQFakeQuant(4).calibrate(torch.randn(100))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert q(torch.randn(2, 3).bfloat16()).dtype==torch.float32

def test_network():
    model,x = net(),torch.randn(16, 3, 8, 8)
    before,kept = state(model),deepcopy(model)
    quantized = lsq_quantized(model, [(x,), (x,)], 3)
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer)]
    assert [m.weight_fake_quant.bits for m in layers]==[8, 3, 8]
    assert [m.input_fake_quant.signed for m in layers]==[True, False, False]
    new = state(quantized)
    assert all(torch.equal(new[k.replace('0.0.', '0.0.layer.').replace('1.0.', '1.0.layer.').replace('4.', '4.layer.')]
                           if k not in new else new[k], v) for k,v in before.items())
    def loss(m): return m.train()(x).square().mean()
    loss(quantized).backward()
    assert all(p.grad is not None for p in quantized.parameters())
    assert all(m.weight_fake_quant.growth.grad!=0 for m in layers)
    other = pickle.loads(pickle.dumps(quantized)).eval()
    assert torch.equal(other(x), quantized.eval()(x)) and quantizable(kept)==['0.0', '1.0', '4']

def test_weight_is_rounded_input_is_rounded():
    layer = QuantizedLayer(nn.Linear(4, 3), 2)
    x = torch.randn(50, 4)
    layer.input_fake_quant.calibrate(x)
    w,xq = layer.weight_fake_quant(layer.layer.weight),layer.input_fake_quant(x)
    assert torch.allclose(layer(x), xq@w.T+layer.layer.bias, atol=1e-6)
    assert len(w.unique())<=4 and len(xq.unique())<=4

def test_layers_that_do_not_run():
    class Spare(nn.Module):
        def __init__(self): super().__init__(); self.used,self.spare = nn.Linear(4, 2),nn.Linear(4, 2)
        def forward(self, x): return self.used(x)
    x = torch.randn(8, 4)
    found = lsq_quantized(Spare(), [(x,)], 4)
    assert type(found.spare) is nn.Linear and type(found.used) is QuantizedLayer
    with pytest.raises(ValueError, match='spare did not run'): lsq_quantized(Spare(), [(x,)], 4, ['spare'])
    with pytest.raises(ValueError, match='no convolution or linear layer'):
        lsq_quantized(nn.Sequential(nn.ReLU()), [(x,)], 4)
    with pytest.raises(ValueError, match='layers is empty'): lsq_quantized(Spare(), [(x,)], 4, [])

def test_a_layer_that_is_called_from_a_plain_list_is_none_of_them():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 4),nn.Linear(4, 2)
            self.plain = [self.a]
        def forward(self, x):
            for m in self.plain: x = m(x)
            return self.b(x)
    x = torch.randn(8, 4)
    model = Listed()
    found = lsq_quantized(model, [(x,)], 4)
    assert found.a is found.plain[0] and type(found.a) is nn.Linear and type(found.b) is QuantizedLayer
    for layers in ['a'],['a', 'b']:
        model = Listed()
        with pytest.raises(ValueError, match='layers: the network does not call a by name.*ModuleList'):
            lsq_quantized(model, [(x,)], 4, layers)
        assert type(model.a) is type(model.b) is nn.Linear # as it was

def test_the_first_layer_that_is_quantized_has_the_bits_of_the_ends():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c,self.d = (nn.Linear(4, 4) for _ in range(4))
            self.plain = [self.a]
        def forward(self, x):
            runs.append(len(x))
            return self.d(self.c(self.b(self.plain[0](x))))
    runs = []
    found = lsq_quantized(Listed(), [(torch.randn(8, 4),)]*3, 2)
    assert type(found.a) is nn.Linear and runs==[8]*6
    assert [m.weight_fake_quant.bits for m in (found.b, found.c, found.d)]==[8, 2, 8]

class ReadsItsLayers(nn.Module):
    "One layer under two names, and a forward that asks a layer for its weight and its size, as T5's does"
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 2)
    def forward(self, x): return self.c(self.b(self.a(x.to(self.c.weight.dtype))))+0*self.c.out_features

def test_a_layer_under_two_names_and_one_that_is_asked_for_its_weight():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    model = ReadsItsLayers()
    kept = deepcopy(model)
    found = lsq_quantized(model, [(x,)], 8)
    assert type(found.a) is QuantizedLayer and found.a is found.b and type(kept.b) is nn.Linear
    assert found.c.weight is found.c.layer.weight and found.c.bias is found.c.layer.bias and (found.c.in_features==4)
    assert 0<(found(x)-kept(x)).norm()/kept(x).norm()<.02
    assert torch.equal(pickle.loads(pickle.dumps(found))(x), found(x)) and torch.equal(deepcopy(found)(x), found(x))
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'wieght'"): found.c.wieght

@pytest.mark.parametrize('bits', [0, 1, 9, 2.5, '4'])
def test_bits(bits):
    with pytest.raises(ValueError, match='whole number from 2 to 8'): LSQFakeQuant(bits)


class OfTokens(nn.Module):
    "With PyTorch's own transformer, whose fast path would read the weights past the quantizers"
    def __init__(self, masked):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.masked = masked

    def forward(self, x):
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, -1] = True
        return self.encoder(x, src_key_padding_mask=mask if self.masked else None)

@pytest.mark.parametrize('masked', [False, True])
def test_the_transformers_of_pytorch_are_rounded_without_gradients_too(masked):
    model,x = OfTokens(masked).eval(),torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    found = lsq_quantized(model, [(x,)], 3)
    with torch.no_grad(): got = found(x)
    torch.testing.assert_close(got, found(x))
    assert (got-plain).abs().max()>.01
