"The layout that modules tell, over architectures of series, tokens and images, and what adapters make of series"
import pytest
import torch
from torch import nn
from torchvision import models as tv

from fasterai.distill.layers.adapters import Adapters, adapter
from fasterai.distill.layers.capture import Capture
from fasterai.distill.layers.layout import is_series, layout_of, layouts, spatial


def conv(i, o, stride=1): return nn.Sequential(nn.Conv1d(i, o, 3, stride, 1), nn.BatchNorm1d(o), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.a,self.b = conv(i, o, 2),nn.Conv1d(o, o, 3, padding=1)
        self.skip = nn.Conv1d(i, o, 1, 2)
    def forward(self, x): return (self.b(self.a(x)) + self.skip(x)).relu()


class Mixed(nn.Module):
    "Convolutions in time, then a transformer over the moments, then a recurrent layer"
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(conv(2, width), nn.MaxPool1d(2))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 32, batch_first=True), 1,
                                             enable_nested_tensor=False)
        self.lstm = nn.LSTM(width, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)
    def forward(self, x): return self.head(self.lstm(self.encoder(self.stem(x).mT))[0].mean(1))


@pytest.mark.parametrize('length', [40, 16, 32])  # 16 is the number of channels too
def test_convolutions_transformer_and_recurrent_layer(length):
    m = Mixed().eval()
    with Capture(m, ['stem', 'stem.0', 'stem.0.2', 'encoder', 'encoder:input', 'encoder.layers.0', 'lstm', 'head',
                     'head:input']) as c:
        m(torch.randn(4, 2, length))
    want = {'stem': 'first', 'stem.0': 'first', 'stem.0.2': 'first', 'encoder': 'last', 'encoder:input': 'last',
            'encoder.layers.0': 'last',
            'lstm': 'last', 'head': None, 'head:input': None}
    assert c.layouts == want == layouts(m, c.maps)
    shapes = {k:tuple(x.shape) for k,x in spatial(c.maps, c.layouts).items()}
    assert shapes['stem'] == (4, 16, length//2, 1) and shapes['stem.0'] == (4, 16, length, 1)
    assert shapes['encoder'] == (4, length//2, 16) and shapes['head'] == (4, 3)

def test_residual_blocks_in_time():
    m = nn.Sequential(conv(2, 8), Residual(8, 32), Residual(32, 32), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                      nn.Linear(32, 3))
    with Capture(m, ['1', '1:input', '1.a', '2', '3']) as c: m(torch.randn(4, 2, 32))
    assert set(c.layouts.values()) == {'first'}

def test_a_layer_that_turns_its_map_over():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(2, 16)
        def forward(self, x): return self.conv(x).mT
    m = nn.Sequential(Turned(), nn.Dropout(), nn.Linear(16, 16))
    with Capture(m, ['0', '1', '2', '0.conv']) as c: m(torch.randn(4, 2, 50))
    assert c.layouts == {'0': 'last', '1': 'last', '2': 'last', '0.conv': 'first'}

def test_images_and_their_tokens():
    vit = tv.VisionTransformer(image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    with Capture(vit, ['conv_proj', 'encoder', 'encoder.layers.encoder_layer_0']) as c: vit(torch.randn(2, 3, 32, 32))
    assert c.layouts == {'conv_proj': 'first', 'encoder': 'last', 'encoder.layers.encoder_layer_0': 'last'}
    swin = tv.swin_t(weights=None).eval()
    with Capture(swin, ['features.1', 'features.0.0']) as c: swin(torch.randn(1, 3, 64, 32))
    assert c.layouts == {'features.1': 'last', 'features.0.0': 'first'}

def test_nothing_tells():
    assert layout_of(nn.ReLU(), '', (4, 16, 50)) is None and not is_series((4, 16, 50), None)
    assert layout_of(nn.Conv1d(2, 7, 1), '', (4, 16, 50)) is None  # no axis has 7
    assert layouts(None, {'a': torch.zeros(4, 16, 50)}) == {'a': None}


@pytest.mark.parametrize('shapes',
                         [((16, 50), (64, 50)), ((16, 50), (32, 100)), ((16, 50), (16, 25)), ((24, 50), (64, 1)),
                          ((50, 50), (64, 50))])
def test_adapters_of_series(shapes):
    (cs,ls),(ct,lt) = shapes
    s,t = torch.randn(4, cs, ls, 1),torch.randn(4, ct, lt, 1)
    a = adapter(s.shape, t.shape)
    assert a(s).shape == t.shape
    assert [tuple(p.shape) for p in a.parameters()] == ([] if cs==ct else [(ct, cs, 1, 1), (ct,), (ct,)])

def test_an_adapter_leaves_each_moment_where_it_is():
    s = torch.randn(4, 16, 50, 1)
    a = adapter(s.shape, (4, 64, 50, 1)).eval()
    other = s.clone()
    other[:, :, 10] += 1
    assert (a(s)-a(other)).abs().amax((0, 1, 3)).nonzero().flatten().tolist() == [10]

def test_series_and_tokens():
    s,t = torch.randn(4, 16, 50, 1),torch.randn(4, 50, 64)
    a = adapter(s.shape, t.shape)
    torch.testing.assert_close(a.place(s), s.squeeze(-1).mT)
    assert a(s).shape == t.shape
    assert adapter(t.shape, s.shape)(t).shape == s.shape
    assert adapter(s.shape, (4, 80, 64))(s).shape == (4, 80, 64)
    assert adapter(s.shape, (4, 51, 64)).place(s)[:, 0].allclose(s.mean((2, 3)))  # a class token in front
    torch.testing.assert_close(adapter(s.shape, (4, 16)).place(s), s.mean((2, 3)))

def test_own_modules_get_series_as_they_are():
    s = dict(a=torch.randn(4, 16, 50, 1), b=torch.randn(4, 8, 4, 4))
    t = dict(a=torch.randn(4, 64, 50, 1), b=torch.randn(4, 8, 4, 4))
    m = nn.Conv1d(16, 64, 1)
    for own in {'a': m}, {0: m}:
        got = Adapters.build(s, t, own=own, series=['a'])(s)
        torch.testing.assert_close(got['a'], m(s['a'].squeeze(-1)).unsqueeze(-1))
        assert got['b'] is s['b']
