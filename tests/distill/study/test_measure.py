"What a model costs, and the statistics beside it: numbers against counts by hand, and nothing left behind"
import io, itertools

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fasterai.core.stats import ece, mcnemar, paired_test
from fasterai.distill.study.measure import latency_ms, macs, model_cost, n_params, peak_mb, size_mb


class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(3, 4),nn.Linear(5, 4)
    def forward(self, x, y): return self.a(x)+self.b(y)

def _state(model): return {k:v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()]

def _same(a, b): return a[1]==b[1] and all(torch.equal(a[0][k], v) for k,v in b[0].items())


@pytest.mark.parametrize('layer,shape,by_hand', [
    (nn.Linear(7, 5),                                       (1, 7),        7*5),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),     (1, 4, 8, 8),  4*4*6*(4//2)*9),
    (nn.ConvTranspose2d(4, 6, 2, stride=2),                 (1, 4, 5, 5),  5*5*4*6*4),
    (nn.LSTM(8, 16, num_layers=2, batch_first=True),        (1, 5, 8),     5*4*16*((8+16)+(16+16))),
    (nn.GRU(8, 16, batch_first=True),                       (1, 5, 8),     5*3*16*(8+16)),
    (nn.Sequential(nn.BatchNorm1d(7), nn.ReLU()),           (1, 7),        0)])
def test_macs_by_hand(layer, shape, by_hand): assert macs(layer, torch.randn(shape))==by_hand

def test_macs_of_attention_by_hand():
    n,d = 6,8
    att = nn.TransformerEncoderLayer(d, 2, 16, batch_first=True)
    assert macs(att, torch.randn(1, n, d))==n*d*3*d + 2*n*n*d + n*d*d + 2*n*d*16
    assert torch.backends.mha.get_fastpath_enabled()

def test_macs_of_fused_attention_by_hand():
    class Att(nn.Module):
        def forward(self, x): return nn.functional.scaled_dot_product_attention(x, x, x)
    assert macs(Att(), torch.randn(2, 3, 6, 8))==2*3*2*6*6*8

def test_macs_of_resnet18_are_the_published_ones():
    assert macs(resnet18(), torch.randn(1, 3, 224, 224))==1_814_073_344  # 1.81 G in torchvision's own table

def test_several_inputs():
    x = torch.randn(4, 3),torch.randn(4, 5)
    assert macs(TwoInputs(), x)==4*(3*4+5*4)
    assert model_cost(TwoInputs(), x, min_time=0.01)['macs']==3*4+5*4

def test_shared_parameters_count_once():
    l = nn.Linear(6, 6)
    assert n_params(nn.Sequential(l, nn.ReLU(), l))==42

def test_size_is_that_of_the_file():
    net,f = resnet18(num_classes=3),io.BytesIO()
    torch.save(net.state_dict(), f)
    assert size_mb(net)==len(f.getvalue())/1e6

@pytest.mark.parametrize('inplace', [False, True])
def test_peak_memory_by_hand(inplace):
    "Input 100, then 300 and (unless in place) 300 more, then 50: the peak is at the ReLU or at the last layer"
    net = nn.Sequential(nn.Linear(10, 30, bias=False), nn.ReLU(inplace), nn.Linear(30, 5, bias=False))
    alive = 100+300+50 if inplace else 100+300+300
    assert round(1e6*peak_mb(net, torch.randn(10, 10)))==4*(n_params(net)+alive)

def test_peak_memory_sees_freed_tensors():
    chain = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(6)])
    # the input, and never more than two activations
    assert round(1e6*peak_mb(chain, torch.randn(10, 10)))==4*(600 + 100 + 2*100)

def test_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net[1].eval()
    before = _state(net)
    model_cost(net, torch.randn(4, 1, 8, 8), min_time=0.01)
    assert _same(before, _state(net)) and all(p.grad is None for p in net.parameters())

def test_modes_return_after_an_interrupt():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()); net[0].eval()
    def interrupt(*_): raise KeyboardInterrupt
    net[1].register_forward_hook(interrupt)
    for f in (macs, peak_mb, latency_ms):
        with pytest.raises(KeyboardInterrupt): f(net, torch.randn(1, 2))
    assert torch.backends.mha.get_fastpath_enabled()
    assert [m.training for m in net.modules()]==[True, False, True]

def test_a_recurrent_model_can_train_after_being_timed():
    class Stateful(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.h = nn.GRU(3, 4, batch_first=True),None
        def forward(self, x):
            out,self.h = self.rnn(x, self.h if self.h is not None and self.h.shape[1]==len(x) else None); return out
    net,x = Stateful(),torch.randn(2, 5, 3)
    latency_ms(net, x, min_time=0.01)
    net(x).sum().backward()
    assert net.rnn.weight_hh_l0.grad.abs().sum()>0

def test_more_work_takes_longer():
    small,big = (nn.Sequential(*[nn.Linear(256, 256) for _ in range(n)]) for n in (1, 12))
    assert latency_ms(big, torch.randn(64, 256), 0.05)[0]>2*latency_ms(small, torch.randn(64, 256), 0.05)[0]

def test_bad_batches():
    for x in (torch.empty(0, 3), (), 'x', torch.tensor(1.)):
        with pytest.raises(ValueError, match='x must be a batch'): model_cost(nn.Linear(3, 3), x)


# --- statistics

def test_paired_test_covers_what_it_says():
    rng = np.random.default_rng(2)
    cis = [paired_test(rng.normal(1, 1, 5), np.zeros(5)).ci for _ in range(400)]
    assert 0.92<=np.mean([lo<=1<=hi for lo,hi in cis])<=0.98

def test_pairing_finds_what_separate_intervals_hide():
    rng = np.random.default_rng(3)
    seed_luck = rng.normal(0, 1, 8)
    a,b = seed_luck+0.1,seed_luck+rng.normal(0, 0.03, 8)
    assert paired_test(a, b).p<0.01
    for odd in np.inf, np.nan:
        found = paired_test([1, 2, odd], [1, 2, 3])
        assert np.isnan([found.p, found.sd, *found.ci]).all()

def test_mcnemar_by_enumeration():
    "Every way in which 6 disagreements can fall"
    a,b = np.array([1]*5+[0]*1+[1]*10),np.array([0]*5+[1]*1+[1]*10)
    as_extreme = sum(abs(sum(c)-3)>=2 for c in itertools.product([0, 1], repeat=6))
    assert mcnemar(a, b)==pytest.approx(as_extreme/2**6)

def test_ece_by_loops():
    torch.manual_seed(0)
    probs,targs,n = torch.randn(300, 4).mul(2).softmax(1),torch.randint(0, 4, (300,)),15
    bins = [[] for _ in range(n)]
    for p,t in zip(probs.double().tolist(), targs.tolist()):
        conf = max(p)
        b = next(i for i in range(n) if i/n<conf<=(i+1)/n)
        bins[b].append((conf, p.index(conf)==t))
    slow = sum(abs(sum(c for c,_ in b)-sum(r for _,r in b)) for b in bins)/300
    assert ece(probs, targs)==pytest.approx(slow, abs=1e-9)
    with pytest.raises(ValueError, match=r'\(N, C\)'): ece(probs[:, 0], targs)


def test_inputs_in_a_dict_cost_what_they_cost_alone():
    class OfDict(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, b): return self.net(b['x'])
    net,x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)),torch.randn(8, 6)
    names = 'params','macs','batch_size','peak_mb'
    plain,nested = model_cost(net, x, 1e-3),model_cost(OfDict(net), {'x':x}, 1e-3)
    assert [nested[k] for k in names]==[plain[k] for k in names] and plain['macs']==36
    with pytest.raises(ValueError, match='at least one sample'): model_cost(OfDict(net), {'x':'text'})
