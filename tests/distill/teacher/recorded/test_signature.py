"The hash of an input: exact, per sample, and the same wherever it is computed"
import hashlib
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fasterai.distill.teacher.recorded import signature as mod
from fasterai.distill.teacher.recorded.signature import signature, weights_digest
from fasterai.distill.teacher.teacher import Teacher

M = 1<<64
def sig(*xb): return signature(xb)
def one(x): return sig(x[None])[0].tolist()

def mix(x):
    x = (x^x>>30)*0xbf58476d1ce4e5b9%M
    x = (x^x>>27)*0x94d049bb133111eb%M
    return x^x>>31

def by_hand(raw, what):
    "The definition, in Python's own integers, for a single tensor's row of bytes"
    raw += bytes(-len(raw)%4)
    words = [int.from_bytes(raw[i:i+4], 'little', signed=True) for i in range(0, len(raw), 4)]
    h = [0, 0]
    for i in range(0, len(words), 4096):
        block = words[i:i+4096]
        for lane in 0,1:
            keys = [mix((1+j+4096*lane)*0x9e3779b97f4a7c15%M) for j in range(len(block))]
            h[lane] = mix(h[lane]^sum(k*w for k,w in zip(keys, block))%M)
    start = np.frombuffer(hashlib.blake2b(what.encode(), digest_size=16).digest(), '<u8').tolist()
    return [mix(s^o) for s,o in zip(start, h)]


class TestExact:
    @pytest.mark.parametrize('x', [torch.randn(3, 5), torch.randn(5000), torch.arange(7, dtype=torch.uint8),
                                   torch.randn(9).half(), torch.randint(-9, 9, (4097,)),
                                   torch.tensor([True, False, True]), torch.randn(3, dtype=torch.float64),
                                   torch.zeros(0)])
    def test_is_what_it_says(self, x):
        assert one(x)==by_hand(x.numpy().tobytes(), f"1 of\neach {x.dtype} {tuple(x.shape)}")

    def test_every_bit_counts(self):
        x = torch.randint(0, 256, (1, 300), dtype=torch.uint8).repeat(2401, 1)
        for i in range(2400): x[i+1, i//8] ^= 1<<i%8
        for lane in sig(x).T: assert len(np.unique(lane))==2401
        for lane in sig(x.view(torch.int16)).T: assert len(np.unique(lane))==2401

    def test_pairs_of_flipped_bits(self):
        "Two signs, two lowest bits: what sums modulo 2**64 of 64-bit words would let pass"
        x = torch.randn(1, 64).repeat(2017, 1)
        words,n = x.view(torch.int32),1
        for i in range(64):
            for j in range(i): words[n, [i, j]] ^= -2**31; n += 1
        for lane in sig(x).T: assert len(np.unique(lane))==2017

    def test_permutations_and_blocks(self):
        x = torch.randn(3*4096+5)
        blocks = x[:3*4096].view(3, 4096)
        others = [x.roll(1), x.flip(0), torch.cat([blocks[[1, 0, 2]].flatten(), x[-5:]]),
                  torch.cat([x[4096:8192], x[:4096], x[8192:]]), x.sort().values, -x, x+0., x*1.]
        seen = [tuple(one(o)) for o in (x, *others)]
        assert len(set(seen))==6 and seen[-2]==seen[-1]==seen[0] and seen[3]==seen[4]

    @settings(max_examples=200, deadline=None)
    @given(st.binary(min_size=1, max_size=40), st.integers(0, 39), st.integers(1, 255))
    def test_other_bytes_other_hash(self, raw, i, d):
        x = torch.tensor(list(raw), dtype=torch.uint8)
        y = x.clone()
        y[i%len(raw)] ^= d
        assert all(a!=b for a,b in zip(one(x), one(y)))

    def test_many_samples_meet_nowhere(self):
        x = torch.arange(200_000).view(-1, 1)
        for lane in sig(x).T: assert len(np.unique(lane))==200_000
        assert len(np.unique(sig(x)[:, 0]>>np.uint64(32)))>199_990  # of 2**32, about 5 pairs meet


class TestOfAnInput:
    x = torch.randn(4, 3, 8, 8)

    def test_layout_and_neighbours_do_not_count(self):
        x = self.x
        for y in (
            x.to(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
            torch.cat([x, x])[4:],
            x.clone().requires_grad_(),
            x.double().float(),
        ):
            assert (sig(y)==sig(x)).all()
        assert (sig(x[1:3])==sig(x)[1:3]).all()
        b = torch.arange(40, dtype=torch.uint8).view(8, 5)
        assert (sig(b.flatten()[5:].view(7, 5))==sig(b)[1:]).all()  # bytes that begin between words

    def test_type_and_shape_count(self):
        x = torch.zeros(4, 6)
        all_of = [sig(o)[0].tolist() for o in (x, x.int(), x.half(), x.double(), x.view(4, 2, 3), x.view(4, 3, 2),
                                               x[:, :5], x[:, :0], x.bool(), x.to(torch.complex64))]
        assert len(set(map(tuple, all_of)))==10

    def test_arrangement_counts(self):
        a,b = torch.randn(2, 4, 5)
        z = torch.zeros(4, 0)
        arranged = [(a, b), (b, a), ((a, b),), ({'a':a, 'b':b},), ({'b':a, 'a':b},), ({'a':b, 'b':a},), (a, b, z),
                    (a, z, b), (a, b, None), (a, None, b), (a, b, 1), (a, b, 1.), (a, b, '1'),
                    (a, b, b'1'), (a, b, True), (a, b, [1]), (a, [b]), ([a, b],), (a, torch.cat([b, z], 1), [None]*4),
                    (a, b, torch.tensor(1)), (a, b, torch.arange(3))]
        seen = [tuple(signature(o)[0].tolist()) for o in arranged]
        assert len(set(seen))==len(arranged)-1 and seen[0]!=seen[1]  # a batch in one list is the batch
        assert (signature([OrderedDict(a=a, b=b)])==signature(({'a':a, 'b':b},))).all()

    def test_values_of_each_sample(self):
        a = torch.zeros(3, 2)
        s = signature([a, ['x', 'y', 'x']])
        assert (s[0]==s[2]).all() and (s[0]!=s[1]).all()
        assert (signature([a, ['x', 'z', 'x']])[[0, 2]]==s[[0, 2]]).all()

    def test_a_tensor_for_all_samples(self):
        a,b = torch.zeros(3, 2),torch.tensor([1., 2.])
        assert (signature([a, b])!=signature([a, b+1])).all() and (signature([a, b])[0]==signature([a, b])[1]).all()

    def test_arrays(self): assert (signature([self.x, self.x.numpy()])==signature([self.x, self.x])).all()

    def test_nan_zero_and_infinity(self):
        x = torch.tensor([[float('nan'), 1.], [float('nan'), 2.], [0., 1.], [-0., 1.], [float('inf'), 1.]])
        s = sig(x)
        assert len({*map(tuple, s.tolist())})==5 and (s==sig(x.clone())).all()

    @pytest.mark.parametrize('xb,words',
                             [((torch.zeros(2), {1}), 'holds a set'), ((torch.zeros(2), object()), 'holds a object'),
                              (('a', 1), 'no tensor'),
        ((torch.zeros(2, 2), torch.eye(2).to_sparse()), 'layout torch.sparse'),
        ((torch.zeros(2), np.array([object()])), 'holds a ndarray')])
    def test_what_has_no_bytes_is_refused(self, xb, words):
        with pytest.raises(TypeError, match=words): signature(xb)

    def test_an_empty_batch(self): assert sig(torch.zeros(0, 3)).shape==(0, 2)

    def test_the_same_in_another_process(self):
        code = ("import torch\nfrom fasterai.distill.teacher.recorded.signature import signature\n"
                "x = torch.arange(6000.).view(2, 3000)\n"
                "said = signature([x, {'k':x.int(), 'names':['a', 'b']}]).tolist()\n")
        here = {}
        exec(code, here)
        there = subprocess.run([sys.executable, '-W', 'ignore', '-c', code+'print(said)'], capture_output=True,
                               text=True, check=True)
        assert there.stdout.strip()==str(here['said'])

    @pytest.mark.parametrize('at_once', [1, 4097, 10**9])
    def test_how_much_is_hashed_at_once_does_not_matter(self, monkeypatch, at_once):
        x = torch.randn(5, 9000)
        before = sig(x)
        monkeypatch.setattr(mod, '_at_once', at_once)
        assert (sig(x)==before).all()

    def test_what_other_devices_do_gives_the_same(self, monkeypatch):
        xs = torch.randn(5, 9000),torch.randn(3, 4096),torch.randint(0, 9, (4, 3), dtype=torch.uint8)
        before = [sig(x) for x in xs]
        monkeypatch.setattr(mod, '_sums_by_numpy', mod._sums_by_torch)
        for at_once in 1,5000,1<<19:
            monkeypatch.setattr(mod, '_at_once', at_once)
            assert all((sig(x)==s).all() for x,s in zip(xs, before))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
    def test_the_same_on_a_gpu(self):
        for x in (
            torch.randn(64, 3, 64, 64),
            torch.randint(0, 9, (5, 7)),
            torch.randn(3, 5).half(),
            torch.zeros(4, 0),
            torch.randn(2, 3*4096+1),
        ):
            assert (sig(x.cuda())==sig(x)).all()


class TestWeightsDigest:
    def test_names_the_weights(self):
        net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        net.register_buffer('hidden', torch.zeros(2), persistent=False)
        before = weights_digest(net)
        assert len(before)==32
        assert before==weights_digest([net])==weights_digest(Teacher(net))
        assert weights_digest([net, net])!=before
        for t in net[0].weight, net[1].running_mean, net.hidden:
            t.data[0] += 1e-6
            assert weights_digest(net)!=before
            before = weights_digest(net)
        assert weights_digest(net.half())!=before

    def test_names_and_places_count(self):
        a,b = nn.Linear(2, 2),nn.Linear(2, 2)
        assert weights_digest(nn.Sequential(a, b))!=weights_digest(nn.Sequential(b, a))
        assert weights_digest(nn.ModuleDict(dict(x=a)))!=weights_digest(nn.ModuleDict(dict(y=a)))


@pytest.mark.parametrize('dtype', [torch.long, torch.double, torch.float32, torch.uint8])
def test_a_column_of_a_table_has_any_stride(dtype):
    x = torch.arange(24).to(dtype)
    assert (sig(x[None].T)==sig(x[:, None].clone())).all() and x[None].T.stride()==(1, 24)
    assert (sig(x.view(2, 12).T)==sig(x.view(2, 12).T.contiguous())).all()
