"What a mask silences: values against plain loops over what is left, gradients of exactly zero, and where it fits"
import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import TensorMask
from torch import nn

import losses_reference as ref
from fasterai.distill import losses as L
from fasterai.distill.loss import relations
from fasterai.distill.loss.base import as_loss
from fasterai.distill.loss.learned import VID
from fasterai.distill.loss.padding import present
from fasterai.distill.loss.terms import Term
from fasterai.distill.losses import *
from test_losses import DTYPES, LABELLED, NO_VECTORS, ON_LOGITS, ON_MAPS, RELATIONS, SHAPES
from test_losses import NoSync, channels, finite, randn, rows

PLACES = {'maps': ((5, 3, 3, 4), (5, 3, 4)), 'tokens': ((5, 7, 3), (5, 7)), 'vectors': ((5, 3), (5,)),
          'samples': ((5, 3, 3, 4), (5,))}   # maps, and their mask
SOME = (0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1)


def some(shape):
    "A mask of another size in each sample: nothing of the second one, two positions or more elsewhere"
    if len(shape)==1: return torch.tensor(SOME[3:3+shape[0]])
    share = torch.tensor([0.5, -1, 0.8, 0.6, 0.7]).view(-1, *[1]*(len(shape)-1))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < share
    n = mask.flatten(1).sum(1).tolist()
    assert n[1]==0 and sorted(n)[1]>1 and len(set(n))>2, n
    return mask.int()


def spread(mask, s):
    "The mask, at every element of a map"
    if s.ndim==2: return mask.bool()[:, None].expand_as(s)
    if mask.ndim==1: return mask.bool().view(-1, 1, 1, 1).expand_as(s)
    return mask.bool().unsqueeze(-1 if s.ndim==3 else 1).expand_as(s)


def left(x, keep, name):
    "Channels by positions of the samples that are left, as lists; for `Similarity` zeros, since it compares positions"
    x, keep = channels(x.masked_fill(~keep, 0)), [[bool(v) for v in c[0]] for c in channels(keep.double())]
    there = [(m, k) for m, k in zip(x, keep) if any(k)]
    if name=='Similarity': return [m for m, _ in there]
    return [[[v for v, on in zip(c, k) if on] for c in m] for m, k in there]


def map_case(name, place, dtype=torch.float64):
    "A loss of student, teacher and mask, what it should be, student, teacher, mask, and the mask at every element"
    loss, slow = ON_MAPS[name]
    shape, size = PLACES[place]
    s, t = (randn(*shape, seed=i, dtype=dtype) for i in (1, 2))
    mask = some(size)
    keep = spread(mask, s)
    want = slow(left(s, keep, name), left(t, keep, name))
    return (lambda s, t, mask: loss({'a': s}, {'b': t}, mask=mask)), want, s, t, mask, keep


def logit_case(name, place, dtype=torch.float64):
    loss, slow = ON_LOGITS[name]
    shape, axis = SHAPES[place]
    s, t = (2*randn(*shape, seed=i, dtype=dtype) for i in (1, 2))
    size = list(shape)
    n = size.pop(axis)
    mask = torch.tensor((SOME*2)[1:1+math.prod(size)]).view(size)
    kw, labels = dict(axis=axis), ()
    if name in LABELLED:
        y = torch.randint(0, n, size, generator=torch.Generator().manual_seed(3))
        kw['target'] = y.masked_fill(mask==0, -100)      # as padding is labelled, which the mask alone must survive
        labels = (y[mask>0].tolist(),)
    on = [i for i, v in enumerate(mask.flatten().tolist()) if v]
    want = slow(*([rows(x, axis)[i] for i in on] for x in (s, t)), *labels)
    return (lambda s, t, mask: loss(s, t, mask=mask, **kw)), want, s, t, mask, mask.bool().unsqueeze(axis).expand_as(s)


def cases():
    for name in ON_LOGITS:
        for place in SHAPES: yield pytest.param(logit_case, (name, place), id=f'{name}-{place}')
    for name in ON_MAPS:
        for place in PLACES:
            if place=='vectors' and name in NO_VECTORS: continue
            yield pytest.param(map_case, (name, place), id=f'{name}-{place}')


every_case = pytest.mark.parametrize('case, args', list(cases()))


@every_case
@pytest.mark.parametrize('dtype', DTYPES)
def test_value_and_gradient(case, args, dtype):
    "The loss of what is left; nothing comes back to the rest"
    loss, want, s, t, mask, keep = case(*args, dtype=DTYPES[dtype][0])
    got, grad = finite(loss, s, t, mask)
    assert got.dtype==(torch.float64 if dtype=='f64' else torch.float32)
    assert math.isclose(got.item(), want, rel_tol=DTYPES[dtype][1], abs_tol=DTYPES[dtype][1]/100), (got.item(), want)
    assert not grad[~keep].any() and grad[keep].any()


@every_case
def test_gradient_is_that_of_the_value(case, args):
    loss, _, s, t, mask, _ = case(*args)
    torch.autograd.gradcheck(lambda s: loss(s, t, mask), s.requires_grad_())


@every_case
def test_what_is_said_there_does_not_matter(case, args):
    loss, _, s, t, mask, keep = case(*args)
    want, grad = finite(loss, s, t, mask)
    for junk in (7., 1e4, *[math.nan, math.inf]*(case is map_case)):
        got, again = finite(loss, s.masked_fill(~keep, junk), t.masked_fill(~keep, -junk), mask)
        assert got==want and torch.equal(again, grad)


@every_case
def test_all_and_nothing(case, args):
    loss, _, s, t, mask, _ = case(*args)
    if args[0] in LABELLED:
        shape, axis = SHAPES[args[1]]
        labels = torch.zeros([n for i, n in enumerate(shape) if i!=axis%len(shape)]).long()
        def loss(s, t, mask): return ON_LOGITS[args[0]][0](s, t, axis=axis, target=labels, mask=mask)
    (a, g), (b, h) = finite(loss, s, t, torch.ones_like(mask)), finite(loss, s, t, None)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12)
    value, grad = finite(loss, s, t, torch.zeros_like(mask))
    assert value==0 and not grad.any()


@every_case
def test_masks_of_any_type_without_waiting_for_the_device(case, args):
    loss, _, s, t, mask, _ = case(*args)
    want = loss(s, t, mask)
    for m in (mask.bool(), mask.half(), mask.to(torch.uint8), TensorMask(mask)): assert loss(s, t, m)==want
    assert type(loss(s, t, TensorMask(mask))) is torch.Tensor
    with NoSync(): loss(s.requires_grad_(), t, mask).backward()


@pytest.mark.parametrize('name', ('Attention', 'CWD', 'NST'))
def test_pooled_maps(name):
    "A cell of a pooled map is the mean of what counts in it, and where nothing does the cell does not count"
    loss, slow = ON_MAPS[name]
    s, t, mask = randn(2, 3, 4, 4), randn(2, 3, 2, 4, seed=1), torch.ones(2, 4, 4)
    mask[0, 0, 1] = 0        # half of a cell
    mask[1, :2, 0] = 0       # a whole one
    pooled = s.view(2, 3, 2, 2, 4).mean(3)
    pooled[0, :, 0, 1] = s[0, :, 1, 1]
    keep = torch.ones(2, 3, 2, 4, dtype=torch.bool)
    keep[1, :, 0, 0] = False
    want = slow(left(pooled, keep, name), left(t, keep, name))
    got, grad = finite(lambda s: loss([s], [t], mask=mask), s)
    assert math.isclose(got.item(), want, rel_tol=1e-9)
    assert not grad[0, :, 0, 1].any() and not grad[1, :, :2, 0].any() and grad[0, :, 1, 1].any()


@pytest.mark.parametrize('name', ('ChannelStats', *RELATIONS))
def test_other_sizes(name):
    loss, slow = ON_MAPS[name]
    s, t, mask = randn(4, 3, 2, 2), randn(4, 3, 4, 4, seed=1), torch.ones(4, 4, 4)
    mask[0, 2:] = mask[2] = 0
    mask[1, :, 2:] = 0
    keep_t = spread(mask, t)
    keep_s = spread(mask[:, 1::2, 1::2], s)
    want = slow(left(s, keep_s, name), left(t, keep_t, name))
    assert math.isclose(loss([s], [t], mask=mask).item(), want, rel_tol=1e-9)


def test_irg():
    z, maps = [randn(5, 3, seed=i) for i in (0, 1)], [[randn(5, c, 2, 3, seed=10*i+c) for c in (2, 5)] for i in (0, 1)]
    mask = torch.ones(5, 2, 3)
    mask[0, 1] = mask[3] = 0
    some_rows = lambda x: [r for i, r in enumerate(rows(x, 1)) if i!=3]
    want = ref.irg(*([left(x, spread(mask, x), 'IRG') for x in m] for m in maps), *map(some_rows, z))
    assert math.isclose(IRG(*maps, *z, mask=mask).item(), want, rel_tol=1e-9)
    _, grad = finite(lambda x: IRG([x, maps[0][1]], maps[1], *z, mask=mask), maps[0][0])
    assert not grad[~spread(mask, grad)].any() and grad.any()
    assert finite(lambda x: IRG([x, maps[0][1]], maps[1], *z, mask=mask*0), maps[0][0])[0]==0


def test_angles_in_chunks(monkeypatch):
    s, t, mask = randn(9, 5), randn(9, 4, seed=1), torch.arange(9)%3
    whole, grad = finite(lambda s: RKDAngle([s], [t], mask=mask), s)
    monkeypatch.setattr(relations, '_CHUNK', 200)
    chunked, again = finite(lambda s: RKDAngle([s], [t], mask=mask), s)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(again, grad)
    torch.testing.assert_close(whole, RKDAngle([s[mask>0]], [t[mask>0]]))


# Predictions: with labels, and on their own

@pytest.mark.parametrize('name', ON_LOGITS)
def test_with_an_ignored_label(name):
    "Those positions count that have both"
    loss, s, t = ON_LOGITS[name][0], randn(2, 7, 5), randn(2, 7, 5, seed=1)
    mask = torch.tensor(SOME+(1, 1)).view(2, 7)
    y = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(3))
    y[:, 2:5] = -100
    options = [(dict(ignore_index=-100), y!=-100), (dict(ignore_index=-100, mask=mask), (mask>0) & (y!=-100))]
    if name not in LABELLED: options.append((dict(mask=mask), mask>0))
    for kw, keep in options:
        got, grad = finite(loss, s, t, axis=-1, target=y, **kw)
        torch.testing.assert_close(got, loss(s[keep], t[keep], target=y[keep]))
        assert not grad[~keep].any()


def test_binary_labels():
    s, t = randn(3, 4), randn(3, 4, seed=1)
    gaps = torch.tensor([[0, 1, -1, 1], [-1, -1, 0, 1], [1, 1, 1, 0]])
    kl = torch.tensor([[ref.binary_kd([[a]], [[b]]) for a, b in zip(*r)] for r in zip(s.tolist(), t.tolist())]).double()
    got, grad = finite(BinaryKD, s, t, target=gaps, ignore_index=-1)
    torch.testing.assert_close(got, kl[gaps>=0].mean())
    assert not grad[gaps<0].any()
    both = BinaryKD(s, t, target=gaps, ignore_index=-1, mask=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(both, kl[[0, 2]][gaps[[0, 2]]>=0].mean())
    for same in (dict(target=gaps.double(), ignore_index=-1), dict(target=gaps), dict(target=None, ignore_index=-1)):
        assert BinaryKD(s, t, **same)==BinaryKD(s, t)
    with pytest.raises(ValueError, match=r'shape \(3,\), got \(2,\)'):
        BinaryKD(s, t, target=torch.zeros(2).long(), ignore_index=-1)


@pytest.mark.parametrize('loss', (BinaryKD, Logits))
def test_losses_that_know_no_class_axis(loss):
    "A mask of tokens goes to the tokens, though nobody says where the classes are"
    s, t, mask = randn(2, 6, 3), randn(2, 6, 3, seed=1), torch.tensor([[1]*6, [1, 1, 0, 0, 0, 0]])
    torch.testing.assert_close(loss(s, t, mask=mask), loss(s[mask>0], t[mask>0]))
    torch.testing.assert_close(loss(s.mT, t.mT, mask=mask), loss(s[mask>0], t[mask>0]))
    one, other, on = s[0, :, 0], t[0, :, 0], mask[1]>0
    torch.testing.assert_close(loss(one, other, mask=on), loss(one[on], other[on]))
    labels = torch.where(on, 1, -100)
    torch.testing.assert_close(loss(one, other, target=labels, ignore_index=-100), loss(one[on], other[on]))


def test_a_class_for_a_sentence():
    "The mask of its tokens says only whether there is a sentence"
    s, t = randn(3, 4), randn(3, 4, seed=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(SoftTarget(s, t, mask=mask), SoftTarget(s[:2], t[:2]))


@pytest.mark.parametrize('over', ('class', 'batch'))
def test_standardize(over):
    s, t, mask = randn(2, 7, 5), randn(2, 7, 5, seed=1), torch.tensor(SOME+(1, 1)).view(2, 7)
    loss = standardize(partial(SoftTarget, T=2), over=over)
    torch.testing.assert_close(loss(s, t, axis=-1, mask=mask), loss(s[mask>0], t[mask>0]))


# Where a mask fits

def at(mask, *shape):
    x = torch.zeros(shape)
    return present(torch.as_tensor(mask), x).int().squeeze(-1 if x.ndim==3 else 1).tolist()


def test_tokens():
    assert at([[1, 0]], 1, 2, 8)==[[1, 0]]
    assert at([[1, 0]], 1, 3, 8)==[[1, 1, 0]]                              # a class token in front
    assert at([[0, 0]], 1, 7, 8)==[[1, 1, 1, 1, 1, 0, 0]]                  # and registers
    assert at([[1, 1, 0, 1]], 1, 8, 2, 2)==[[[1, 1], [0, 1]]]              # laid out as a grid
    assert at([[0, 1, 1, 0, 1]], 1, 8, 2, 2)==[[[1, 1], [0, 1]]]           # without their class token
    assert at([[1, 1, 1, 0, 0, 0]], 1, 8, 3, 1)==[[[1], [0], [0]]]         # a series of half the length
    assert at([[0, 0], [0, 1]], 2, 8)==[0, 1]


def test_samples():
    assert at([1, 0], 2, 3, 8)==[[1, 1, 1], [0, 0, 0]] and at([1, 0], 2, 8)==[1, 0]
    assert at([1, 0], 2, 8, 1, 2)==[[[1, 1]], [[0, 0]]]


def test_pixels():
    mask = torch.zeros(1, 4, 4)
    mask[0, :2] = 1
    assert at(mask, 1, 8, 2, 2)==[[[1, 1], [0, 0]]]
    assert at(mask, 1, 5, 8)==[[1, 1, 1, 0, 0]] and at(mask, 1, 4, 8)==[[1, 1, 0, 0]]
    assert at(mask, 1, 8, 8, 4)==[[[1]*4]*4+[[0]*4]*4]
    assert at(mask, 1, 8)==[1] and at(mask*0, 1, 8)==[0]
    volume = torch.arange(8).view(1, 2, 2, 2)%2
    assert at(volume, 1, 3, 2, 2, 2)==volume.tolist()


@pytest.mark.parametrize('mask, shape', [
    ((2, 5), (2, 4, 8)), ((2, 4), (2, 13, 8)), ((3, 4), (2, 4, 8)), ((2, 5), (2, 8, 3, 4)), ((2, 77), (2, 8, 7, 7)),
    ((2, 1, 4), (2, 13, 8)), ((2, 2, 2, 2), (2, 8, 2, 2)), ((), (2, 8))])
def test_refused(mask, shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError) as e: FitNet({'layer1': x}, {'0.4': x}, mask=torch.ones(mask))
    assert f"mask of shape {mask} does not fit student layer1 of shape {shape}" in str(e.value)
    assert 'partial(loss, mask=None)' in str(e.value)


def test_refused_in_predictions():
    s = torch.zeros(2, 5, 30)
    with pytest.raises(ValueError) as e: SoftTarget(s, s, mask=torch.ones(2, 5))
    assert 'pred of shape (2, 5, 30), whose channels are on axis 1: it must be (2, 30) or (2,)' in str(e.value)
    with pytest.raises(TypeError, match='mask must be a tensor, got list'): SoftTarget(s, s, mask=[[1]])
    with pytest.raises(TypeError, match='mask must be a tensor, got list'): BinaryKD(s, s, mask=[[1]])


# The protocol

def test_every_function_takes_it():
    for name in available_losses():
        p = inspect.signature(getattr(L, name)).parameters['mask']
        assert p.default is None and p.kind==p.KEYWORD_ONLY, name


def test_terms():
    s, t, mask = randn(2, 6, 3), randn(2, 6, 3, seed=1), torch.tensor([[1]*6, [1, 1, 0, 0, 0, 0]])
    batch = dict(fm_s={'a': s}, fm_t={'b': t}, mask=mask)
    term = Term(FitNet)
    assert term.needs=={'fm_s', 'fm_t', 'mask'} and term.required=={'fm_s', 'fm_t'} and repr(term)=='FitNet'
    torch.testing.assert_close(term(batch), F.mse_loss(s[mask>0], t[mask>0]))
    assert term({**batch, 'mask': None})==term(dict(fm_s=[s], fm_t=[t]))==F.mse_loss(s, t)
    deaf = Term(partial(FitNet, mask=None))
    assert deaf.needs=={'fm_s', 'fm_t'} and deaf(batch)==F.mse_loss(s, t)
    def own(fm_s, mask): return fm_s['a'].sum() if mask is None else mask.sum()
    assert Term(own).required=={'fm_s'} and Term(own)(batch)==8 and Term(own)(dict(fm_s={'a': s}))==s.sum()


def test_those_that_need_none_may_be_offered_it():
    @as_loss
    def gap(pred, teacher_pred): return (pred-teacher_pred).mean()
    s = torch.ones(2)
    assert gap(pred=s, teacher_pred=0*s, mask=s)==1
    maps = dict(fm_s={'a': torch.randn(2, 3, 2, 2)}, fm_t={'a': torch.randn(2, 3, 2, 2)})
    loss = VID().build(**maps, mask=s)
    assert loss(**maps, mask=s)==loss(**maps) and isinstance(loss, nn.Module)
