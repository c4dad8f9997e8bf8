"Batches of another size and normalisation"
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastcore.foundation import L

from fasterai.distill.teacher.teacher import Renormalize, Teacher, resize_batch
from teacher_nets import make_net, net, plain, seed, x


def test_each_network_gets_its_own_transform(net, x):
    other = make_net()
    a,b = Teacher([net, other], tfms=[None,
                                      partial(resize_batch, size=(24, 18))]),Teacher([net, other], tfms=lambda x: x+1)
    want = lambda u,v: torch.log((plain(net, u).softmax(1)+plain(other, v).softmax(1))/2)
    small = F.interpolate(x, (24, 18), mode='bilinear', antialias=True)
    assert torch.allclose(a(x)[0], want(x, small), atol=1e-5) and torch.allclose(b(x)[0], want(x+1, x+1), atol=1e-5)

def test_renormalize_reads_the_dataloaders(x):
    def dls(m, s):
        dl = TfmdDL(list(torch.zeros(4, 3, 2, 2)), bs=2, num_workers=0,
                    after_batch=[Normalize.from_stats(m, s, cuda=False)])
        return DataLoaders(dl, dl, device=torch.device('cpu'))
    ms,ss,mt,st = [.1, .2, .3],[.5, .6, .7],[.4, .5, .6],[.2, .3, .9]
    got = Renormalize(dls(ms, ss), dls(mt, st))(x)
    for c in range(3): assert torch.allclose(got[:,c], ((x[:,c]*ss[c]+ms[c])-mt[c])/st[c], atol=1e-5)
    assert torch.allclose(Renormalize(None, (mt, st))(x)[:,0], (x[:,0]-.4)/.2, atol=1e-5)
    assert torch.equal(Renormalize((ms, ss), (ms, ss))(x), x)


def test_a_transform_that_writes_into_its_batch_changes_nobody_else_s(net, x):
    was,double = x.clone(),lambda x: x.mul_(2)
    two = Teacher([net, net], tfms=[double, None], average='none')
    for _ in range(3):
        torch.testing.assert_close(two(x)[0], (plain(net, 2*was)+plain(net, was))/2)
        assert x.equal(was)


@pytest.mark.parametrize('args, error, words', [
    (dict(normalize=.5), TypeError, r'normalize: expected \(mean, std\)'),
    (dict(size='big'), TypeError, r"size: expected a side in pixels, or \(height, width\), got 'big'"),
    (dict(size=(32,)), TypeError, r'got \(32,\)'), (dict(size=True), TypeError, 'got True'),
    (dict(size=0), ValueError, 'size: expected pixels, 1 or more'),
    (dict(axis=5), ValueError, 'with axes 0 to 1, got 5'), (dict(axis='c'), TypeError, "axis: .*got 'c'")])
def test_arguments_that_cannot_be(net, x, args, error, words):
    with pytest.raises(error, match=words): Teacher(net, **args)(x)


def test_pairs_of_any_kind(net, x):
    for pair in np.array([[.5]*3, [.2]*3]), torch.tensor([[.5]*3, [.2]*3]), L([.5]*3, [.2]*3):
        assert torch.equal(Renormalize(None, pair)(x), Renormalize(None, ([.5]*3, [.2]*3))(x))
    for size in np.array([8, 8]), L(8, 8), np.int64(8), [8, 8]:
        assert torch.equal(Teacher(net, size=size)(x)[0], Teacher(net, size=8)(x)[0])

def test_a_size_of_any_whole_number():
    x = torch.randn(2, 3, 8, 8)
    want = resize_batch(x, 4)
    for size in np.int64(4), (4, 4), [np.int64(4)]*2: assert resize_batch(x, size).equal(want)
    assert resize_batch(x, np.int64(8)) is x
    with pytest.raises(TypeError, match='expected a side in pixels'): resize_batch(x, 4.5)

def test_a_size_for_images_within_an_input(net, x):
    "As those of a Siamese network are, or of a batch that is a dict or a dataclass"
    from collections import UserDict
    from collections.abc import MutableMapping
    from dataclasses import dataclass, field, is_dataclass
    from types import MappingProxyType
    from fastcore.basics import fastuple
    @dataclass(frozen=True)
    class Pair:
        x:torch.Tensor
        n:int
        unset:object = field(init=False)
    class Own(MutableMapping):
        def __init__(self, d): self.items_of = d
        def __getitem__(self, k): return self.items_of[k]
        def __setitem__(self, k, v): self.items_of[k] = v
        def __delitem__(self, k): del self.items_of[k]
        def __iter__(self): return iter(self.items_of)
        def __len__(self): return len(self.items_of)
        @property
        def image(self): return self['x']
    class First(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def pick(self, o):
            if isinstance(o, Own): return o.image
            return o.x if is_dataclass(o) else o['x'] if hasattr(o, 'keys') else o[0]
        def forward(self, o): self.kind = type(o); return self.net(self.pick(o))
    small = resize_batch(x, 8)
    fixed = MappingProxyType(dict(x=x))
    for xb in fastuple(x, x), [x, 1], dict(x=x), UserDict(x=x, n=2), fixed, Pair(x, 3), Own(dict(x=x)):
        first = First()
        torch.testing.assert_close(Teacher(first, size=8)(xb)[0], plain(net, small))
        assert first.pick(xb) is x and first.kind is (dict if xb is fixed else type(xb))
    with pytest.raises(ValueError, match=r'size: the batch has no images.*got torch.float32 \(4, 3\)'):
        Teacher(net, size=8)(torch.zeros(4, 3))
