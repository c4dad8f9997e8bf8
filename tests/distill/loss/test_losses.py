"""Every loss, in every dtype and shape, against plain loops; its gradient, its limits and its refusals."""
import inspect
import math
import pickle
from functools import partial

import pytest
import torch
from fastai.torch_core import TensorCategory, TensorImage
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import losses_reference as ref
from fasterai.distill import losses as L
from fasterai.distill.loss import relations
from fasterai.distill.losses import *

few_examples = settings(deadline=None, derandomize=True, max_examples=25)

LOGITS = {  # name: loss, slow reference
    'SoftTarget': (SoftTarget, ref.soft_target), 'Logits': (Logits, ref.logits), 'Mutual': (Mutual, ref.mutual),
    'HardTarget': (HardTarget, ref.hard_target),
    'DIST': (partial(DIST, T=2, beta=3, gamma=0.5), partial(ref.dist, T=2, beta=3, gamma=0.5)), 'TTM': (TTM, ref.ttm),
    'WTTM': (WTTM, ref.wttm),
    'BinaryKD': (partial(BinaryKD, T=3), partial(ref.binary_kd, T=3)), 'Ranking': (Ranking, ref.ranking),
    'standardize': (standardize(SoftTarget), ref.standardized),
    'standardize_batch': (standardize(SoftTarget, over='batch'), ref.standardized_over_batch)}
LABELLED = {'DecoupledKD': (DecoupledKD, ref.dkd), 'NKD': (partial(NKD, T=2), partial(ref.nkd, T=2)),
            'RLD': (partial(RLD, T=2, T_alpha=3, alpha=0.5), partial(ref.rld, T=2, T_alpha=3, alpha=0.5)),
            'DecoupledKD_normalize': (partial(DecoupledKD, normalize=True, T=4, beta=8, alpha=0.5),
                                      partial(ref.nkd, T=4, gamma=8, alpha=0.5)),
            'DecoupledKD_normalize_defaults': (partial(DecoupledKD, normalize=True), partial(ref.nkd, T=1, gamma=1.5))}
FEATURES = {'Attention': (Attention, ref.attention),
            'Attention_p3': (partial(Attention, p=3), partial(ref.attention, p=3)), 'FitNet': (FitNet, ref.fitnet),
            'ActivationBoundaries': (ActivationBoundaries, ref.boundaries), 'Similarity': (Similarity, ref.similarity),
            'CWD': (CWD, ref.cwd),
            'ChannelStats': (partial(ChannelStats, ratio=3), partial(ref.channel_stats, ratio=3)),
            'NST': (NST, ref.nst)}
RELATIONS = {'RKDDistance': (RKDDistance, ref.rkd_distance), 'RKDAngle': (RKDAngle, ref.rkd_angle),
             'RKD': (RKD, ref.rkd), 'PKT': (PKT, ref.pkt), 'CC': (CC, ref.cc)}
ON_LOGITS, ON_MAPS = {**LOGITS, **LABELLED}, {**FEATURES, **RELATIONS}
# logits and their class axis
SHAPES = {'classes': ((5, 7), 1), 'dense': ((2, 4, 3, 2), 1), 'sequence': ((2, 3, 5), -1)}
MAPS = {'maps': ((4, 3, 3, 2), (4, 3, 3, 2)), 'tokens': ((4, 6, 3), (4, 6, 3)), 'vectors': ((4, 3), (4, 3)),
        'wide': ((3, 2, 3, 2), (3, 5, 3, 2)), 'narrow': ((3, 7, 2, 2), (3, 6, 2, 2))}       # student's and teacher's
SAME_WIDTH = ('FitNet', 'ActivationBoundaries', 'CWD', 'ChannelStats')
NO_VECTORS = ('Attention', 'Attention_p3', 'CWD', 'ChannelStats', 'NST')
DTYPES = {'f64': (torch.float64, 1e-9), 'f32': (torch.float32, 2e-5), 'f16': (torch.float16, 2e-5),
          'bf16': (torch.bfloat16, 2e-5)}  # inputs, error against their exact value


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
def rows(z, axis): return z.double().movedim(axis, -1).flatten(0, -2).tolist()
def channels(x):
    return (x.double().unsqueeze(2) if x.ndim==2 else x.double().mT if x.ndim==3 else x.double().flatten(2)).tolist()


def logit_case(name, shape, axis, dtype=torch.float64):
    "A loss of student and teacher, what it should be, student, teacher"
    loss, slow = ON_LOGITS[name]
    s, t = 2*randn(*shape, seed=1, dtype=dtype), 2*randn(*shape, seed=2, dtype=dtype)
    kw, labels = dict(axis=axis), ()
    if name in LABELLED:
        size = list(shape); C = size.pop(axis)
        kw['target'] = torch.randint(0, C, size, generator=torch.Generator().manual_seed(3))
        labels = (kw['target'].flatten().tolist(),)
    return partial(loss, **kw), slow(rows(s, axis), rows(t, axis), *labels), s, t


def map_case(name, shapes, dtype=torch.float64):
    loss, slow = ON_MAPS[name]
    s, t = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))
    return (lambda s, t: loss({'a': s}, {'b': t})), slow(channels(s), channels(t)), s, t


def cases():
    for name in ON_LOGITS:
        for shape, (size, axis) in SHAPES.items():
            yield pytest.param(logit_case, (name, size, axis), id=f'{name}-{shape}')
    for name in ON_MAPS:
        for shape, sizes in MAPS.items():
            if shape in ('wide', 'narrow') and name in SAME_WIDTH or shape=='vectors' and name in NO_VECTORS: continue
            yield pytest.param(map_case, (name, sizes), id=f'{name}-{shape}')


every_case = pytest.mark.parametrize('case, args', list(cases()))


@every_case
@pytest.mark.parametrize('dtype', DTYPES)
def test_value(case, args, dtype):
    loss, want, s, t = case(*args, dtype=DTYPES[dtype][0])
    got = loss(s.requires_grad_(), t)
    assert type(got) is torch.Tensor and got.ndim==0 and got.dtype==(torch.float64 if dtype=='f64' else torch.float32)
    assert math.isclose(got.item(), want, rel_tol=DTYPES[dtype][1], abs_tol=DTYPES[dtype][1]/100), (got.item(), want)
    got.backward()
    assert s.grad.dtype==s.dtype and s.grad.isfinite().all()


@every_case
def test_autocast_changes_nothing(case, args):
    loss, _, s, t = case(*args, dtype=torch.float32)
    grads = []
    for enabled in (False, True):
        x = s.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled): value = loss(x, t)
        value.backward()
        grads.append((value, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@every_case
def test_gradient(case, args):
    loss, _, s, t = case(*args)
    t.requires_grad_()
    torch.autograd.gradcheck(lambda s: loss(s, t), s.requires_grad_())
    loss(s, t).backward()
    assert t.grad is None                                                   # the teacher learns nothing
    x = s.detach().float().requires_grad_()                                 # and float32 agrees with float64
    loss(x, t.detach().float()).backward()
    torch.testing.assert_close(x.grad.double(), s.grad, rtol=1e-3, atol=1e-5*float(s.grad.abs().max()))


@every_case
def test_order_of_the_batch_is_free(case, args):
    loss, _, s, t = case(*args)
    perm = torch.arange(len(s)).flip(0)
    labels = {'target': loss.keywords['target'][perm]} if args[0] in LABELLED else {}
    torch.testing.assert_close(loss(s[perm], t[perm], **labels), loss(s, t))


@every_case
def test_equal_inputs_cost_nothing(case, args):
    if args[0].startswith(('NKD', 'DecoupledKD_normalize', 'RLD', 'HardTarget', 'TTM', 'WTTM', 'Ranking',
                           'ActivationBoundaries')):
        pytest.skip('by its formula not 0')
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        loss, _, s, _ = case(*args, dtype=dtype)
        value = loss(s.requires_grad_(), s.detach())
        assert value==0
        value.backward()
        assert s.grad.abs().max() < 1e-5


class NoSync(TorchDispatchMode):
    "Refuses what would wait for the device"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split('.')[0] not in ('_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'equal',
                                                   'is_nonzero', '_unique2'), func
        return func(*args, **(kwargs or {}))


@every_case
def test_never_waits_for_the_device(case, args):
    loss, _, s, t = case(*args)
    ignore = {}
    if case is logit_case and args[0]!='BinaryKD':
        positions = [n for i,n in enumerate(s.shape) if i!=args[2]%s.ndim]
        ignore = dict(ignore_index=0, target=torch.ones(positions).long())
    with NoSync():
        loss(s.requires_grad_(), t).backward()
        loss(s, t, **ignore).backward()


@pytest.mark.parametrize('name', ON_MAPS)
def test_memory_format(name):
    s, t = randn(4, 3, 5, 4), randn(4, 3, 5, 4, seed=1)
    loss, cl = ON_MAPS[name][0], torch.channels_last
    torch.testing.assert_close(loss([s.to(memory_format=cl)], [t.to(memory_format=cl)]), loss([s], [t]))
    torch.testing.assert_close(loss([s.to(memory_format=cl)], [t]), loss([s], [t]))


@pytest.mark.parametrize('name', ('Attention', 'CWD', 'NST', 'Similarity', 'ChannelStats', *RELATIONS))
def test_other_sizes(name):
    loss, slow = ON_MAPS[name]
    s, t = randn(3, 4, 6, 4), randn(3, 4, 3, 8, seed=1)
    pooled = s.view(3, 4, 3, 2, 4).mean(3), t.view(3, 4, 3, 4, 2).mean(4)
    want = slow(*map(channels, pooled if name in ('Attention', 'CWD', 'NST') else (s, t)))
    assert math.isclose(loss([s], [t]).item(), want, rel_tol=1e-9)


@pytest.mark.parametrize('name', [*ON_MAPS, 'IRG'])
def test_pairs_and_their_weights(name):
    loss = partial(IRG, pred=randn(3, 5), teacher_pred=randn(3, 5, seed=9), vertex=0,
                   transform=0) if name=='IRG' else ON_MAPS[name][0]
    a, b = [randn(3, 4, 2, 3, seed=i) for i in (0, 1)], [randn(3, 4, 2, 3, seed=i) for i in (2, 3)]
    one, two = loss(a[:1], b[:1]), loss(a[1:], b[1:])
    # by position, not by name
    torch.testing.assert_close(loss({'x': a[0], 'y': a[1]}, {'y': b[0], 'x': b[1]}), one+two)
    torch.testing.assert_close(loss(a, tuple(b), layer_weights=[2, 0.5]), 2*one+two/2)
    with pytest.raises(ValueError, match='1 for 2 pairs'): loss(a, b, layer_weights=[1])
    with pytest.raises(ValueError, match=r'2 of the student \(0, 1\) and 1 of the teacher \(layer1\)'):
        loss(a, {'layer1': b[0]})
    with pytest.raises(ValueError, match='no feature maps'): loss({}, {})
    with pytest.raises(TypeError, match='fm_s must be a dict or a list of feature maps, got Tensor'): loss(a[0], b[0])
    with pytest.raises(ValueError, match=r'student layer1 \(3, 4, 2, 3\) and teacher 0.4 \(2, 4, 2, 3\)'):
        loss({'layer1': a[0]}, {'0.4': b[0][:2]})
    with pytest.raises(TypeError, match='student 0 must be a tensor, got tuple'): loss([(a[0],)], b[:1])


def test_irg():
    z, maps = [randn(4, 3, seed=i) for i in (0, 1)], [[randn(4, c, 2, 3, seed=10*i+c) for c in (2, 5)] for i in (0, 1)]
    want = ref.irg(*([channels(x) for x in m] for m in maps), *(rows(x, 1) for x in z))
    assert math.isclose(IRG(*maps, *z).item(), want, rel_tol=1e-9)
    assert IRG(maps[0], maps[0], z[0], z[0])==0
    assert torch.autograd.gradcheck(lambda a, b, p: IRG([a, b], maps[1], p, z[1]),
                                    [x.requires_grad_() for x in (*maps[0], z[0])])


def test_angles_in_chunks(monkeypatch):
    s, t = randn(9, 5).requires_grad_(), randn(9, 4, seed=1)
    whole = RKDAngle([s], [t]); grad, = torch.autograd.grad(whole, s)
    monkeypatch.setattr(relations, '_CHUNK', 200)
    chunked = RKDAngle([s], [t]); grad2, = torch.autograd.grad(chunked, s)
    torch.testing.assert_close(chunked, whole); torch.testing.assert_close(grad2, grad)


# Extremes

def finite(loss, s, *args, **kw):
    "Value and gradient, which are"
    s = s.detach().clone().requires_grad_()
    value = loss(s, *args, **kw); value.backward()
    assert value.isfinite() and s.grad.isfinite().all(), (value, s.grad)
    return value, s.grad


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', ON_LOGITS)
def test_huge_logits(name, dtype):
    loss, dtype = ON_LOGITS[name][0], DTYPES[dtype][0]
    kw = dict(target=torch.tensor([0, 1, 2])) if name in LABELLED else {}
    s = torch.tensor([[1e4, -1e4, 3., 1], [-1e4, 1e4, -1e4, 2], [1e4, 1e4, -1e4, 0]], dtype=dtype)
    for t in (s, -s, s.flip(0), torch.zeros_like(s)): finite(loss, s, t, **kw)
    finite(loss, torch.zeros_like(s), s, **kw)


@pytest.mark.parametrize('name',
                         [n for n in ON_LOGITS if n not in ('Logits', 'DIST', 'standardize', 'standardize_batch',
                                                            'BinaryKD')])
def test_masked_classes(name):
    "As if the classes were not there"
    loss, (s, t) = ON_LOGITS[name][0], (randn(3, 6), randn(3, 6, seed=1))
    kw = dict(target=torch.tensor([0, 1, 3])) if name in LABELLED else {}
    inf = torch.tensor([0, 0, 0, 0, -math.inf, -math.inf])
    (a, g), (b, h) = finite(loss, s+inf, t+inf, **kw), finite(loss, s[:, :4], t[:, :4], **kw)
    torch.testing.assert_close(a, b); torch.testing.assert_close(g[:, :4], h)
    assert not g[:, 4:].any()


def test_masked_classes_elsewhere():
    s, t = randn(3, 6), randn(3, 6, seed=1)
    s[:, 4:] = t[:, 4:] = -math.inf
    assert not finite(DIST, s, t)[1][:, 4:].any()
    torch.testing.assert_close(finite(BinaryKD, s, t)[0], BinaryKD(s[:, :4], t[:, :4])*4/6)
    assert SoftTarget(s, torch.zeros(3, 6)).isinf()                         # a class that only the student rules out


@pytest.mark.parametrize('wrong', (5., 17., 80., 1000.))
def test_the_most_wrong_student_learns_most(wrong):
    s, t, y = torch.tensor([[-wrong, 0, 0]]), torch.tensor([[6., 0, 0]]), torch.tensor([0])
    for loss in (SoftTarget, partial(DecoupledKD, target=y, beta=0), partial(NKD, target=y, gamma=0)):
        _, g = finite(partial(loss, T=1), s, t)
        assert math.isclose(g[0, 0].item(), -t.softmax(1)[0, 0].item(), rel_tol=0.01)


def test_a_certain_target_hides_nothing():
    s, t, y = torch.tensor([[2500., 1, 2, 3]]), torch.tensor([[2500., 3, 2, 1]]), torch.tensor([0])
    torch.testing.assert_close(DecoupledKD(s, t, y, T=1, alpha=0, beta=1), SoftTarget(s[:, 1:], t[:, 1:], T=1))


@pytest.mark.parametrize('loss', (SoftTarget, partial(DecoupledKD, target=torch.tensor([0, 1, 2])), BinaryKD),
                         ids=('SoftTarget', 'DecoupledKD', 'BinaryKD'))
def test_gradient_keeps_its_size_as_T_grows(loss):
    s, t = randn(3, 5), randn(3, 5, seed=1)
    a, b = (finite(loss, s, t, T=T)[1] for T in (50, 500))
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.02*float(a.abs().max()))


@pytest.mark.parametrize('name', [*ON_LOGITS, *ON_MAPS])
def test_batch_of_one(name):
    if name in ON_MAPS:
        value, _ = finite(lambda s: ON_MAPS[name][0]([s], [randn(1, 4, 2, 3, seed=1)]), randn(1, 4, 2, 3))
    else:
        value, _ = finite(ON_LOGITS[name][0], randn(1, 4), randn(1, 4, seed=1),
                          **(dict(target=torch.tensor([2])) if name in LABELLED else {}))
    if name in ('Similarity', 'standardize_batch', *RELATIONS): assert value==0


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', [*ON_MAPS, 'Attention_p1', 'IRG'])
def test_dead_and_equal_samples(name, dtype):
    "All-zero maps and duplicates on either side: no NaN, and no gradient of 1e10"
    if name=='Attention_p1': loss = partial(Attention, p=1)
    elif name=='IRG': loss = partial(IRG, pred=torch.zeros(5, 2), teacher_pred=torch.zeros(5, 2))
    else: loss = ON_MAPS[name][0]
    s, t = (randn(5, 3, 4, 4, seed=i, dtype=DTYPES[dtype][0]) for i in (0, 1))
    s[0], t[1], s[2], t[2], s[4] = 0, 0, 0, 0, s[3]
    for a, b in ((s, t), (torch.zeros_like(s), t), (s, torch.zeros_like(t)), (torch.zeros_like(s), torch.zeros_like(t)),
                 (s[3:4].expand_as(s), t)):
        _, g = finite(lambda x: loss([x], [b]), a)
        assert g.abs().max() < 1e3


@pytest.mark.parametrize('scale', (1e-6, 1e-3, 1, 1e4))
@pytest.mark.parametrize('name',
                         ('Attention', 'Attention_p3', 'Similarity', 'NST', 'RKDDistance', 'RKDAngle', 'PKT', 'CC'))
def test_half_precision_maps_of_any_scale(name, scale):
    "Losses that do not see the scale give one value at every scale that float16 can hold"
    loss = ON_MAPS[name][0]
    s, t = (randn(4, 64, 14, 7, seed=i).relu() for i in (0, 1))
    half = [(scale*x).half() for x in (s, t)]
    got, grad = finite(lambda x: loss([x], half[1:]), half[0].float())
    # 1e-6 leaves float16 four bits
    assert math.isclose(got.item(), loss([s], [t]).item(), rel_tol=0.02 if scale>=1e-3 else 0.3)
    assert grad.any()
    finite(lambda x: loss([x], half[1:]), half[0])


@pytest.mark.parametrize('name', ('SoftTarget', 'Mutual', 'DIST', 'standardize', 'standardize_batch', 'TTM', 'WTTM'))
def test_constant_logits(name):
    "Rounding errors are not scaled up to a signal"
    for value in (0., 0.1, 1e4):
        s = torch.full((4, 7), value)
        finite(ON_LOGITS[name][0], s, randn(4, 7).float())
        v, g = finite(ON_LOGITS[name][0], s, s)
        assert v==0 and g.abs().max() < 1e-4


# Labels

@pytest.mark.parametrize('name', [n for n in ON_LOGITS if n!='BinaryKD'])
def test_ignored_positions(name):
    loss, (s, t) = ON_LOGITS[name][0], (randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1))
    out = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    for ignore, dtype in ((-100, torch.int64), (255, torch.uint8), (-1, torch.int32)):
        y = torch.randint(0, 5, (2, 3, 4), generator=torch.Generator().manual_seed(2)).to(dtype)
        y[out] = ignore
        got, grad = finite(loss, s, t, target=y, ignore_index=ignore)
        torch.testing.assert_close(got, loss(*(x.movedim(1, -1)[~out] for x in (s, t)), target=y[~out]))
        assert not grad.movedim(1, -1)[out].any()
        value, grad = finite(loss, s, t, target=torch.full_like(y, ignore), ignore_index=ignore)
        assert value==0 and not grad.any()
    if name not in LABELLED:
        # soft labels have nothing to ignore
        torch.testing.assert_close(loss(s, t, target=torch.rand(2, 5, 3, 4), ignore_index=-100), loss(s, t))
        torch.testing.assert_close(loss(s, t, target=None, ignore_index=-100), loss(s, t))
    with pytest.raises(ValueError, match=r'\(2, 3, 4\), got \(2, 3\)'): loss(s, t, target=y[..., 0], ignore_index=0)


@pytest.mark.parametrize('name', LABELLED)
def test_labels(name):
    loss, (s, t), y = ON_LOGITS[name][0], (randn(4, 3), randn(4, 3, seed=1)), torch.tensor([0, 2, 1, 1])
    want = loss(s, t, y)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32): assert loss(s, t, y.to(dtype))==want
    assert loss(s, t, TensorCategory(y))==want
    for bad in (y[:3], y[:1], y[:, None], y[None], torch.eye(3)[y].long()):
        with pytest.raises(ValueError, match=r'shape \(4,\), got'): loss(s, t, bad)
    for soft in (torch.eye(3)[y], y.float()):
        with pytest.raises(TypeError, match='class indices'): loss(s, t, soft)
    with pytest.raises(TypeError, match='NoneType'): loss(s, t, None)


def test_decoupled_kd_of_two_classes():
    "There is one class beside the target: nothing to compare among the rest"
    s, t, y = randn(4, 2), randn(4, 2, seed=1), torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(finite(DecoupledKD, s, t, y)[0], SoftTarget(s, t, T=4))


# Refusals

@pytest.mark.parametrize('name', ON_LOGITS)
def test_bad_logits(name):
    loss, s = ON_LOGITS[name][0], randn(4, 5)
    loss = partial(loss, target=torch.zeros(4, dtype=torch.long)) if name in LABELLED else loss
    for bad in (s[:1], s[:, :1], s[:, :3], s[0], s[None], randn(4, 5, 1)):
        with pytest.raises(ValueError) as e: loss(s, bad)
        assert '(4, 5)' in str(e.value) and str(tuple(bad.shape)) in str(e.value)
    with pytest.raises(ValueError, match='pred is empty'): loss(s[:0], s[:0])
    with pytest.raises(TypeError, match='pred must be a tensor, got tuple'): loss((s,), s)
    with pytest.raises(TypeError, match='teacher_pred must be a tensor, got dict'): loss(s, {'logits': s})
    with pytest.raises(TypeError, match='floating point, got torch.int64'): loss(s.long(), s)
    if name in ('Logits', 'BinaryKD'): return
    with pytest.raises(ValueError, match=r'axis=2 is no class axis of logits of shape \(4, 5\)'): loss(s, s, axis=2)
    with pytest.raises(ValueError, match='axis=0'): loss(s, s, axis=0)
    with pytest.raises(ValueError, match='BinaryKD'): loss(s[:, :1], s[:, :1])


def test_one_output():
    s, t = randn(4, 1), randn(4, 1, seed=1)
    for a, b in ((s, t), (s[:, 0], t[:, 0])):
        assert math.isclose(Logits(a, b).item(), ref.logits(s.tolist(), t.tolist()))
        assert math.isclose(BinaryKD(a, b).item(), ref.binary_kd(s.tolist(), t.tolist()))
    with pytest.raises(ValueError): Logits(s, t[:, 0])                      # would compare all with all


@pytest.mark.parametrize('T', (0, -1, math.nan))
@pytest.mark.parametrize('name', ('SoftTarget', 'DecoupledKD', 'NKD', 'RLD', 'DIST', 'BinaryKD', 'CWD'))
def test_bad_temperature(name, T):
    x = randn(2, 4, 2, 2)
    with pytest.raises(ValueError, match='T must be positive'):
        getattr(L, name)(pred=x, teacher_pred=x, fm_s=[x], fm_t=[x], target=torch.zeros(2, 2, 2).long(), T=T)


@pytest.mark.parametrize('name', SAME_WIDTH)
def test_same_shape(name):
    loss = getattr(L, name)
    assert loss.same_shape and not hasattr(Attention, 'same_shape')
    bad = [(4, 1, 6, 6), (4, 12, 6, 6), (4, 8, 6), (4, 8)]
    if name in ('FitNet', 'ActivationBoundaries'): bad += [(4, 8, 1, 1), (4, 8, 3, 3)]
    for shape in bad:
        with pytest.raises(ValueError) as e: loss({'layer1': randn(4, 8, 6, 6)}, {'0.4': randn(*shape)})
        assert all(x in str(e.value) for x in ('layer1 (4, 8, 6, 6)', f'0.4 {shape}', "adapters='auto'", 'Attention',
                                               'Similarity'))


@pytest.mark.parametrize('name', NO_VECTORS)
def test_losses_on_positions(name):
    with pytest.raises(ValueError, match=r'\(4, 8\)'): ON_MAPS[name][0]([randn(4, 8)], [randn(4, 8)])
    if name!='ChannelStats':
        with pytest.raises(ValueError, match='class token'): ON_MAPS[name][0]([randn(4, 16, 8)], [randn(4, 17, 8)])
    if name in ('CWD', 'ChannelStats'):
        with pytest.raises(ValueError, match='several positions'):
            ON_MAPS[name][0]([randn(4, 8, 1, 1)], [randn(4, 8, 1, 1)])


def test_a_convolution_and_a_transformer():
    s, t = randn(3, 4, 2, 3), randn(3, 6, 7, seed=1)
    for loss in (Attention, NST): torch.testing.assert_close(loss([s], [t]), loss([s], [t.mT.reshape(3, 7, 2, 3)]))


def test_attention_power():
    x = randn(2, 3, 4, 4)
    torch.testing.assert_close(Attention([x], [x.flip(0)], p=2.5), Attention([x.abs()], [x.flip(0).abs()], p=2.5))
    finite(lambda s: Attention([s], [x], p=1.5), x.relu())
    with pytest.raises(ValueError, match='at least 1'): Attention([x], [x], p=0.5)


# The protocol

def test_signatures():
    prefix = {SoftTarget: 'pred, teacher_pred, T=5', Logits: 'pred, teacher_pred', Mutual: 'pred, teacher_pred',
              DecoupledKD: 'pred, teacher_pred, target, T=4, alpha=1.0, beta=8.0, normalize=False',
              Attention: 'fm_s, fm_t, p=2',
              ActivationBoundaries: 'fm_s, fm_t, m=2', FitNet: 'fm_s, fm_t', Similarity: 'fm_s, fm_t, pred=None, p=2'}
    for loss, want in prefix.items():
        ps = [p.replace(annotation=p.empty) for p in inspect.signature(loss).parameters.values()
              if p.kind==p.POSITIONAL_OR_KEYWORD]
        assert ', '.join(map(str, ps))==want
    for name in available_losses():
        ps = inspect.signature(getattr(L, name)).parameters
        assert [p.kind for p in ps.values()][-1]==inspect.Parameter.VAR_KEYWORD
        assert set(ps) >= {'pred', 'teacher_pred'} or set(ps) >= {'fm_s', 'fm_t', 'layer_weights'}
        assert all(p.default is not p.empty for n,
                   p in ps.items() if n not in ('pred', 'teacher_pred', 'target', 'fm_s', 'fm_t', 'kwargs'))
        assert ('axis' in ps)==('ignore_index' in ps) and ('target' in ps or 'ignore_index' not in ps)
    assert set(available_losses()) <= set(L.__all__) and {'standardize', 'available_losses'} <= set(L.__all__)


@pytest.mark.parametrize('name', available_losses())
def test_a_callback_may_pass_everything(name):
    loss, fm = getattr(L, name), lambda i: {'a': TensorImage(randn(4, 3, 2, 2, seed=i)),
                                            'b': TensorImage(randn(4, 3, 2, 2, seed=i+9))}
    got = loss(pred=TensorImage(randn(4, 5)).requires_grad_(), teacher_pred=randn(4, 5, seed=1), fm_s=fm(0), fm_t=fm(1),
               target=TensorCategory(torch.tensor([0, 1, 2, 3])), learn=None)
    assert type(got) is torch.Tensor and got.ndim==0
    assert pickle.loads(pickle.dumps(partial(loss))).func is loss


def test_standardize_is_the_loss_it_wraps():
    loss = partial(standardize(DecoupledKD), T=2)
    assert set(inspect.signature(loss).parameters)==set(inspect.signature(DecoupledKD).parameters)
    again, y = pickle.loads(pickle.dumps(loss)), torch.tensor([0, 1, 2])
    s, t = randn(3, 5), randn(3, 5, seed=1)
    assert again(s, t, target=y)==loss(s, t, target=y)==loss(s, t, y)
    want = ref.dkd([ref.z_score(r) for r in s.tolist()], [ref.z_score(r) for r in t.tolist()], y.tolist(), T=2)
    assert math.isclose(loss(s, t, target=y).item(), want, rel_tol=1e-9)
    last = standardize(partial(SoftTarget, axis=-1))
    torch.testing.assert_close(last(s[None], t[None]), standardize(SoftTarget)(s, t))
    assert repr(standardize(SoftTarget))=='standardize(SoftTarget)'
    assert standardize(SoftTarget).__doc__==SoftTarget.__doc__


# Shapes and scales drawn at random

dims = st.integers(1, 4)


@few_examples
@given(B=dims, C=st.integers(2, 9), extra=st.lists(dims, max_size=2), scale=st.floats(-3, 2), seed=st.integers(0, 99))
def test_any_logits(B, C, extra, scale, seed):
    s, t = (10**scale*randn(B, C, *extra, seed=seed+i) for i in (0, 100))
    y = torch.randint(0, C, (B, *extra), generator=torch.Generator().manual_seed(seed))
    for name in ('SoftTarget', 'HardTarget', 'Ranking', 'TTM', 'WTTM', 'DecoupledKD', 'DecoupledKD_normalize'):
        loss, slow = ON_LOGITS[name]
        labels = (y.flatten().tolist(),) if name in LABELLED else ()
        want = slow(rows(s, 1), rows(t, 1), *labels)
        got = loss(s, t, **(dict(target=y) if labels else {})).item()
        assert math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9*10**(2*scale)), name


@few_examples
@given(B=dims, Cs=dims, Ct=dims, H=dims, W=dims, scale=st.floats(-4, 4), seed=st.integers(0, 99))
def test_any_maps(B, Cs, Ct, H, W, scale, seed):
    s, t = (10**scale*randn(B, C, H, W, seed=seed+i) for i, C in ((0, Cs), (100, Ct)))
    for name in ('Attention', 'Similarity', 'NST', *RELATIONS):
        loss, slow = ON_MAPS[name]
        assert math.isclose(loss([s], [t]).item(), slow(channels(s), channels(t)), rel_tol=1e-6, abs_tol=1e-12), name
        assert loss([s.float()], [t.float()]) >= -1e-6
