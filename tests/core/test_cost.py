"The timer takes the best run, and the counter sees into fused layers"
import pytest
import torch
from torch import nn
from torch.backends import mha

from fasterai.core import cost
from fasterai.core.cost import best_time, flops


def test_the_first_run_does_not_count_and_the_best_of_the_others_does(monkeypatch):
    now,takes = [0.],iter([5., 3., 1., 2., .1])
    monkeypatch.setattr(cost.time, 'perf_counter', lambda: now[0])
    def run(): now[0] += next(takes)
    assert best_time(run, torch.device('cpu'))==1. and next(takes)==.1
    takes = iter([.1, 3., 4.])
    assert best_time(run, 'cpu', n=2)==3.

def test_products_and_convolutions():
    conv,linear = nn.Conv2d(3, 8, 3, padding=1, bias=False),nn.Linear(8, 5)
    x = torch.randn(2, 3, 6, 6)
    assert flops(lambda: linear(conv(x).mean((2, 3))))==2*2*(6*6*8*27 + 8*5)
    assert flops(lambda: None)==0

@pytest.mark.parametrize('layer,gates', [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(layer, gates):
    net,x = layer(16, 32, batch_first=True),torch.randn(5, 7, 16)
    with torch.no_grad(): assert flops(lambda: net(x))==2*5*7*gates*32*(16+32)

def test_a_transformer_on_its_fast_path():
    d,ff,B,N = 16,32,4,6
    net,x = nn.TransformerEncoderLayer(d, 2, ff, batch_first=True).eval(),torch.randn(B, N, d)
    # to queries, keys, values; attention twice; out; feed-forward
    macs = B*N*d*3*d + 2*B*N*N*d + B*N*d*d + 2*B*N*d*ff
    with torch.no_grad(): assert flops(lambda: net(x))==2*macs

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    conv,x = nn.Conv2d(3, 8, 3),torch.randn(2, 3, 6, 6)
    def run():
        with torch.autocast('cpu', dtype=dtype): conv.to(dtype)(x)
    assert flops(run)==2*2*4*4*8*27

def test_it_leaves_the_backends_as_they_were():
    before = mha.get_fastpath_enabled(),torch.backends.mkldnn.flags,torch.backends.cudnn.enabled
    def fails(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): flops(fails)
    assert (mha.get_fastpath_enabled(), torch.backends.mkldnn.flags, torch.backends.cudnn.enabled)==before
