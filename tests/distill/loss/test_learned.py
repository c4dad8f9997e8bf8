"VID, CRD, ReviewKD, OFD: values against plain loops, gradients, what trains, and what is refused"
import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.learned import CRD, OFD, ReviewKD, VID, batch_margin, bn_margin, hcl


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def rnd(*shape): return torch.randn(shape, dtype=torch.float64)

def maps(*shapes, names='abcd'): return {names[i]: rnd(*s) for i,s in enumerate(shapes)}

def stages(): return dict(fm_s=maps((3, 4, 4, 6), (3, 6, 2, 3)), fm_t=maps((3, 5, 4, 6), (3, 7, 4, 6), names='xyzw'))

losses = {'VID': VID, 'CRD': lambda: CRD(dim=4), 'CRD bank': lambda: CRD(dim=4, bank=10, k=7), 'ReviewKD': ReviewKD,
          'OFD': OFD}

@pytest.fixture(params=losses)
def make(request): return losses[request.param]

def extra(loss): return {'index': torch.tensor([4, 0, 7])} if getattr(loss, 'bank', 0) else {}

# --- values ---------------------------------------------------------------------------------------

def conv1x1(w, x):
    "1x1 convolution in loops"
    out = torch.zeros(x.shape[0], w.shape[0], *x.shape[2:], dtype=x.dtype)
    for b in range(x.shape[0]):
        for o in range(w.shape[0]):
            for c in range(x.shape[1]): out[b,o] += w[o,c].reshape(())*x[b,c]
    return out

def slow_bn(x, m):
    "Training-mode batch norm of (B, C, H, W) in loops"
    out = torch.zeros_like(x)
    for c in range(x.shape[1]):
        v = x[:,c].flatten()
        mean = sum(v)/len(v)
        var = sum((a-mean)**2 for a in v)/len(v)
        out[:,c] = (x[:,c]-mean)/(var+m.eps)**.5*m.weight[c]+m.bias[c]
    return out

def test_vid_is_the_gaussian_likelihood():
    d = dict(fm_s=maps((3, 4, 2, 2)), fm_t=maps((3, 5, 2, 2)))
    loss = VID(init_var=2.).build(**d)
    loss.alphas[0].data += rnd(5)
    (s,),(t,) = d['fm_s'].values(),d['fm_t'].values()
    w = [m.weight for m in loss.means[0].project if isinstance(m, nn.Conv2d)]
    mu = conv1x1(w[2], conv1x1(w[1], conv1x1(w[0], s).clamp(min=0)).clamp(min=0))
    total = 0.
    for b in range(3):
        for c in range(5):
            v = math.log(1+math.exp(loss.alphas[0][c].item()))+1e-5
            for i in range(2):
                for j in range(2):
                    total += -norm.logpdf(t[b,c,i,j].item(), mu[b,c,i,j].item(), v**.5) - .5*math.log(2*math.pi)
    assert loss(**d).item()==pytest.approx(total/(3*5*4), rel=1e-10)

def test_vid_starts_at_the_given_variance_and_sums_over_pairs():
    d = stages()
    loss = VID(init_var=3.).build(**d)
    for v in loss.variances(): torch.testing.assert_close(v, torch.full_like(v, 3.))
    one,two = ({k: dict([list(fm.items())[i]]) for k,fm in d.items()} for i in (0, 1))
    parts = []
    for i,p in enumerate((one, two)):
        single = VID(init_var=3.).build(**p)
        single.means[0].load_state_dict(loss.means[i].state_dict())
        parts.append(single(**p))
    torch.testing.assert_close(loss(**d), sum(parts))

def test_vid_variance_is_a_parameter_that_settles_at_the_error():
    "With the mean held, the best variance of a channel is its mean squared error"
    d = dict(fm_s=maps((8, 4, 3, 3)), fm_t=maps((8, 2, 3, 3)))
    d['fm_t']['a'][:,1] *= 3
    loss = VID().build(**d)
    assert {id(a) for a in loss.alphas} <= {id(p) for p in loss.parameters()}
    opt = torch.optim.Adam(loss.alphas.parameters(), .1)
    for _ in range(300):
        opt.zero_grad(); loss(**d).backward(); opt.step()
    want = ((loss.means[0](d['fm_s']['a'])-d['fm_t']['a'])**2).mean((0, 2, 3))
    torch.testing.assert_close(loss.variances()[0], want, rtol=1e-2, atol=0)

@pytest.mark.parametrize('s,t',
                         [((2, 17, 6), (2, 5, 4)), ((2, 6), (2, 4)), ((2, 6, 4, 4), (2, 17, 4)),
                          ((2, 7, 7, 48), (2, 7, 7, 64)), ((2, 17, 6), (2, 4, 4, 4))])
@pytest.mark.parametrize('make', [VID, OFD])
def test_vid_and_ofd_take_tokens_vectors_and_channels_last(make, s, t):
    d = dict(fm_s=maps(s), fm_t=maps(t))
    loss = make().build(**d)
    loss(**d).backward()
    assert all(p.grad.abs().sum()>0 for p in loss.parameters())

def slow_crd(scores_s, scores_t, y, T, M=1000):
    "The paper's objective with its N/M and Z = M c, in loops; scores_s[i][j]: student i against teacher j"
    n,total = len(y),0.
    for scores in (scores_s, scores_t):
        e = [[math.exp(scores[i][j]/T) for j in range(n)] for i in range(n)]
        use = [e[i][j] for i in range(n) for j in range(n) if i==j or y[i]!=y[j]]
        Z = M*sum(use)/len(use)
        for i in range(n):
            neg = [j for j in range(n) if y[j]!=y[i]]
            N = max(len(neg), 1)
            h = lambda j: (e[i][j]/Z)/(e[i][j]/Z + N/M)
            total -= (math.log(h(i)) + sum(math.log(1-h(j)) for j in neg))/n
    return total

@pytest.mark.parametrize('y', [None, [0, 1, 1, 2, 0], [0, 1, 2, 3, 4], [3]*5])
def test_crd_in_batch(y):
    d = dict(fm_s=maps((5, 6, 2, 2)), fm_t=maps((5, 7)))
    loss = CRD(dim=3, T=.3).build(**d)
    z = [e(fm['a'])/e(fm['a']).norm(dim=1, keepdim=True) for e,
         fm in ((loss.embed_s, d['fm_s']), (loss.embed_t, d['fm_t']))]
    dots = [[sum(a*b for a,b in zip(z[0][i].tolist(), z[1][j].tolist())) for j in range(5)] for i in range(5)]
    want = slow_crd(dots, [list(r) for r in zip(*dots)], y or list(range(5)), .3)
    assert loss(**d, target=None if y is None else torch.tensor(y)).item()==pytest.approx(want, rel=1e-9)

def test_crd_keeps_the_constant_of_its_first_batch():
    d = dict(fm_s=maps((4, 6)), fm_t=maps((4, 7)))
    loss = CRD(dim=3).build(**d)
    loss(**d)
    c = loss.log_c.clone()
    loss(fm_s=maps((4, 6)), fm_t=maps((4, 7)))
    assert c.isfinite().all() and loss.log_c.equal(c)

def test_crd_takes_labels_in_any_usual_form():
    d,y = dict(fm_s=maps((4, 6)), fm_t=maps((4, 7))),torch.tensor([0, 2, 0, 1])
    loss = CRD(dim=3).build(**d)
    want = loss(**d, target=y)
    for same in (y[:,None], F.one_hot(y), .8*F.one_hot(y)+.2/3, (.8*F.one_hot(y)+.2/3).half().float()):
        torch.testing.assert_close(loss(**d, target=same), want)
    assert loss(**d)!=want
    dense = torch.zeros(4, 5, 5).long()
    says = r'one label per sample.*partial\(CRD\(\), target=None\)'
    with pytest.raises(ValueError, match=says): loss(**d, target=dense)
    assert partial(loss, target=None)(**d)==loss(**d)

def test_crd_on_dense_targets_as_its_message_says():
    x,y = torch.randn(8, 3, 6, 6),torch.zeros(8, 6, 6).long()
    dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=4) for _ in range(2)])
    def dense(w): return nn.Sequential(nn.Conv2d(3, w, 3, padding=1), nn.Conv2d(w, 2, 1))
    learn = Learner(dls, dense(4), CrossEntropyLossFlat(axis=1))
    with pytest.raises(ValueError, match='target=None'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(dense(6), CRD(dim=4), '0', '0'))
    kd = KnowledgeDistillationCallback(dense(6), partial(CRD(dim=4), target=None), '0', '0')
    learn.fit(1, cbs=kd)
    assert kd.log.history.distill_loss.notna().all() and (kd.log.history.distill_loss>0).all()

def test_crd_takes_what_is_no_class_for_none():
    d = dict(fm_s=maps((4, 6)), fm_t=maps((4, 7)))
    loss = CRD(dim=3).build(**d)
    want = loss(**d)
    several = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
    numbers = torch.tensor([1., 1., 2., 1.])
    for other in (several, several.float(), numbers, numbers[:, None], (numbers.long(), numbers.long())):
        assert loss(**d, target=other)==want

def test_crd_with_a_bank():
    n,k,T = 9,4,.5
    d = dict(fm_s=maps((3, 6)), fm_t=maps((3, 7)))
    loss = CRD(dim=3, T=T, bank=n, k=k).build(**d)
    bank_s,bank_t,order = loss.bank_s.tolist(),loss.bank_t.tolist(),loss.order.tolist()
    labels = [-1]*n
    c,start = [None, None],0
    for index,y in [([4, 0, 7], [1, 0, 1]), ([0, 8, 2], [0, 1, 2]), ([4, 1, 3], [1, 1, 0])]:
        z_s,z_t = ((e(fm['a'])/e(fm['a']).norm(dim=1, keepdim=True)).tolist() for e,
                   fm in ((loss.embed_s, d['fm_s']), (loss.embed_t, d['fm_t'])))
        window,want = [order[(start+j)%n] for j in range(k)],0.
        for side,(z,bank) in enumerate([(z_s, bank_t), (z_t, bank_s)]):
            score = lambda i,j: math.exp(sum(a*b for a,b in zip(z[i], bank[j]))/T)
            neg = [[j for j in window if j!=index[i] and labels[j]!=y[i]] for i in range(3)]
            if c[side] is None:
                first = [score(i, index[i]) for i in range(3)] + [score(i, j) for i in range(3) for j in neg[i]]
                c[side] = sum(first)/len(first)
            for i in range(3):
                mc = max(len(neg[i]), 1)*c[side]
                h = lambda j: score(i, j)/(score(i, j)+mc)
                want -= (math.log(h(index[i])) + sum(math.log(1-h(j)) for j in neg[i]))/3
        got = loss(**d, target=torch.tensor(y), index=torch.tensor(index))
        assert got.item()==pytest.approx(want, rel=1e-9)
        for bank,z in ((bank_s, z_s), (bank_t, z_t)):
            for i,j in enumerate(index):
                v = [.5*a+.5*b for a,b in zip(bank[j], z[i])]
                bank[j] = [a/math.sqrt(sum(o*o for o in v)) for a in v]
        for i,j in enumerate(index): labels[j] = y[i]
        start += k
        np.testing.assert_allclose(loss.bank_s.numpy(), bank_s, rtol=1e-9)
        np.testing.assert_allclose(loss.bank_t.numpy(), bank_t, rtol=1e-9)
        assert loss.labels.tolist()==labels

@pytest.mark.parametrize('bank', [0, 9])
def test_crd_knows_that_rows_without_a_label_are_of_no_class(bank):
    "They were of one class, and no negatives of each other"
    d,index = dict(fm_s=maps((5, 6)), fm_t=maps((5, 7))),torch.tensor([4, 0, 7, 2, 1])
    loss = CRD(dim=3, bank=bank).build(**d)
    twin = copy.deepcopy(loss)
    for _ in range(2):  # the second time the bank has their labels too
        got = loss(**d, target=torch.tensor([0, -100, 0, -100, 1]), index=index)
        torch.testing.assert_close(got, twin(**d, target=torch.tensor([0, 5, 0, 6, 1]), index=index))

def test_crd_bank_wants_index_from_call_or_attribute():
    d = dict(fm_s=maps((3, 6)), fm_t=maps((3, 7)))
    loss = CRD(dim=3, bank=9).build(**d)
    for index in (None, torch.tensor([1])):
        with pytest.raises(ValueError, match='needs index'): loss(**d, index=index)
    twin = copy.deepcopy(loss)
    loss.index = torch.tensor([3, 1, 2])
    torch.testing.assert_close(loss(**d), twin(**d, index=[3, 1, 2]))

def test_crd_bank_window_visits_every_sample():
    d = dict(fm_s=maps((2, 6)), fm_t=maps((2, 7)))
    loss = CRD(dim=3, bank=10, k=5).build(**d)
    assert loss.order.sort().values.tolist()==list(range(10)) and loss.order.tolist()!=list(range(10))
    seen = set()
    for _ in range(2):
        seen |= set(loss.order[(loss.start+torch.arange(5))%10].tolist())
        loss(**d, index=[0, 1])
    assert seen==set(range(10))

def test_hcl():
    s,t = rnd(2, 3, 4, 8),rnd(2, 3, 4, 8)
    terms,w = [((s-t)**2).mean()],1.
    weights = [w]
    for l in (2, 1):    # 4 is not smaller than the map's 4 rows
        w /= 2
        weights.append(w)
        kh,kw = 4//l,8//l
        cells = torch.stack([(s-t)[:,:,i*kh:(i+1)*kh,j*kw:(j+1)*kw].mean((2,3)) for i in range(l) for j in range(l)])
        terms.append((cells**2).mean())
    torch.testing.assert_close(hcl(s, t), sum(a*b for a,b in zip(weights, terms))/sum(weights))
    assert hcl(s, s)==0

def slow_nearest(x, size):
    H,W = x.shape[2:]
    return torch.stack([torch.stack([x[:,:,i*H//size[0],j*W//size[1]] for j in range(size[1])], -1)
                        for i in range(size[0])], -2)

def slow_conv3x3(w, x):
    B,C,H,W = x.shape
    out = torch.zeros(B, w.shape[0], H, W, dtype=x.dtype)
    for o in range(w.shape[0]):
        for i in range(H):
            for j in range(W):
                for a in (-1, 0, 1):
                    for d in (-1, 0, 1):
                        if 0<=i+a<H and 0<=j+d<W: out[:,o,i,j] += (w[o,:,a+1,d+1]*x[:,:,i+a,j+d]).sum(1)
    return out

def test_review_kd_fuses_from_deep_to_shallow():
    d = dict(fm_s=maps((2, 3, 4, 4), (2, 4, 2, 2), (2, 5)), fm_t=maps((2, 6, 4, 4), (2, 7, 4, 4), (2, 8)))
    loss = ReviewKD(mid=4).build(**d)
    r,want = None,0.
    for block,s,t in list(zip(loss.blocks, d['fm_s'].values(), d['fm_t'].values()))[::-1]:
        s,t = (o[:,:,None,None] if o.ndim==2 else o for o in (s, t))
        x = slow_bn(conv1x1(block.reduce[0].weight, s), block.reduce[1])
        if r is not None:
            r = slow_nearest(r, x.shape[2:])
            conv = block.attend[0]
            a = 1/(1+(-(conv1x1(conv.weight, torch.cat([x, r], 1))+conv.bias[:,None,None])).exp())
            x = x*a[:,0][:,None]+r*a[:,1][:,None]
        r = slow_nearest(x, t.shape[2:])
        want += hcl(slow_bn(slow_conv3x3(block.expand[0].weight, r), block.expand[1]), t)
    torch.testing.assert_close(loss(**d), want)
    assert [b.attend is None for b in loss.blocks]==[False, False, True]

def test_review_kd_takes_grids_of_tokens():
    d = dict(fm_s=maps((2, 17, 6), (2, 17, 6)), fm_t=maps((2, 4, 8, 8), (2, 4, 4, 4)))
    loss = ReviewKD().build(**d)
    loss(**d).backward()
    assert all(p.grad is not None for p in loss.parameters())

@pytest.mark.parametrize('b,g', [(0., 1.), (1., 2.), (-1., .5), (.7, -.9), (2.9, 1.), (-5., 1.)])
def test_bn_margin_is_the_mean_negative_response(b, g):
    bn = nn.BatchNorm2d(1)
    bn.weight.data[:],bn.bias.data[:] = g,b
    s = abs(g)
    mass = quad(lambda x: norm.pdf(x, b, s), -40, 0, points=[b])[0]
    want = quad(lambda x: x*norm.pdf(x, b, s), -40, 0, points=[min(b, 0)])[0]/mass
    assert bn_margin(bn).item()==pytest.approx(want, rel=1e-5)

def test_bn_margin_of_channels_that_are_hardly_ever_negative():
    bn = nn.BatchNorm2d(3)
    bn.weight.data,bn.bias.data = torch.tensor([.5, 1., 0.]),torch.tensor([5., 40., 1.])
    torch.testing.assert_close(bn_margin(bn), torch.tensor([-1.5, -3., 0.]), atol=1e-6, rtol=1e-6)

def slow_ofd(loss, d, margins, scale):
    pairs,total = list(zip(d['fm_s'].values(), d['fm_t'].values())),0.
    for i,(s,t) in enumerate(pairs):
        s = loss.connectors[i](s).tolist()
        t,part = t.tolist(),0.
        for sb,tb in zip(s, t):
            for sc,tc,m in zip(sb, tb, margins[i]):
                for sr,tr in zip(sc, tc):
                    for a,b in zip(sr, tr):
                        if a>b or b>0: part += (a-max(b, m))**2
        total += part/len(t)/2**(len(pairs)-1-i)
    return scale*total

@pytest.mark.parametrize('given', [False, True])
def test_ofd(given):
    d = stages()
    bns = [nn.BatchNorm2d(5), nn.BatchNorm2d(7)] if given else None
    for bn in bns or []: bn.weight.data.uniform_(.5, 2); bn.bias.data.normal_()
    loss = OFD(bns, scale=.01).build(**d)
    margins = [[(lambda neg: sum(neg)/len(neg))([v for v in t[:,c].flatten().tolist() if v<0])
                for c in range(t.shape[1])] for t in d['fm_t'].values()]
    if given: margins = [bn_margin(bn).tolist() for bn in bns]
    else: torch.testing.assert_close(batch_margin(d['fm_t']['x']), torch.tensor(margins[0], dtype=torch.float64))
    assert loss(**d).item()==pytest.approx(slow_ofd(loss, d, margins, .01), rel=1e-6)

def test_ofd_asks_nothing_of_responses_below_the_margin():
    d = dict(fm_s=maps((2, 4, 3, 3)), fm_t=maps((2, 4, 3, 3)))
    loss = OFD().build(**d)
    loss.connectors[0] = nn.Identity()
    t = d['fm_t']['a']
    assert loss({'a': t.where(t>0, t-5)}, d['fm_t'])==0
    assert loss({'a': t.where(t>0, t+5)}, d['fm_t'])>0

# --- for all of them ------------------------------------------------------------------------------

def test_gradcheck(make):
    d = stages()
    loss = make().build(**d)
    kw = extra(loss)
    loss(**d, **kw)  # CRD fixes its constant
    state = {k: v.clone() for k,v in loss.state_dict().items() if k.startswith(('bank', 'start', 'labels'))}
    def f(*xs):
        loss.load_state_dict(state, strict=False)
        return loss(dict(zip('ab', xs)), d['fm_t'], **kw)
    assert torch.autograd.gradcheck(f, [v.requires_grad_() for v in d['fm_s'].values()], nondet_tol=1e-12)
    params = list(loss.parameters())
    loss.load_state_dict(state, strict=False)
    got = torch.autograd.grad(loss(**d, **kw), params)
    for p,g in zip(params, got):   # one direction per parameter, by central differences
        step = 1e-6*torch.randn_like(p)
        vals = []
        for sign in (1, -1):
            loss.load_state_dict(state, strict=False)
            with torch.no_grad():
                p += sign*step
                vals.append(loss(**d, **kw).item())
                p -= sign*step
        assert (vals[0]-vals[1])/2==pytest.approx((g*step).sum().item(), rel=1e-3, abs=1e-13)

def test_every_parameter_trains(make):
    d = stages()
    loss = make().build(**d)
    before = {k: p.detach().clone() for k,p in loss.named_parameters()}
    assert before
    opt = torch.optim.Adam(loss.parameters(), 1e-2)
    values = []
    for _ in range(15):
        l = loss(**d, **extra(loss))
        opt.zero_grad(); l.backward(); opt.step()
        values.append(l.item())
    still = [k for k,p in loss.named_parameters() if p.equal(before[k])]
    assert not still, still
    assert values[-1]<values[0], values

def test_teacher_gets_no_gradient_and_student_does(make):
    d = stages()
    for fm in d.values():
        for v in fm.values(): v.requires_grad_()
    loss = make().build(**d)
    loss(**d, **extra(loss)).backward()
    assert all(v.grad is None for v in d['fm_t'].values())
    used = list(d['fm_s'].values())[-1 if isinstance(loss, CRD) else 0:]
    assert all(v.grad.abs().sum()>0 for v in used)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32_under_autocast(make, dtype):
    d = {k: {n: v.to(dtype) for n,v in fm.items()} for k,fm in stages().items()}
    wide = {k: {n: v.float() for n,v in fm.items()} for k,fm in d.items()}
    loss = make().build(**d)
    assert all(p.dtype==torch.float32 for p in loss.parameters())
    twin = copy.deepcopy(loss)
    with torch.autocast('cpu', torch.bfloat16): got = loss(**d, **extra(loss))
    assert got.dtype==torch.float32 and got.shape==()
    torch.testing.assert_close(got, twin(**wide, **extra(loss)), rtol=0, atol=0)

def test_memory_format_does_not_matter(make):
    d = stages()
    loss = make().build(**d)
    twin = copy.deepcopy(loss)
    last = {k: {n: v.contiguous(memory_format=torch.channels_last) for n,v in fm.items()} for k,fm in d.items()}
    torch.testing.assert_close(twin(**last, **extra(loss)), loss(**d, **extra(loss)))

def test_before_build(make):
    with pytest.raises(RuntimeError, match='has no parameters yet: call build'): make()(**stages())
    assert not list(make().parameters())

def test_build_twice_keeps_the_parameters_if_shapes_agree(make):
    d = stages()
    loss = make().build(**d)
    ps = list(loss.parameters())
    state = {k: v.clone() for k,v in loss.state_dict().items()}
    loss.build(**stages())
    assert all(p is q for p,q in zip(loss.parameters(), ps, strict=True))
    torch.testing.assert_close(dict(loss.state_dict()), state, equal_nan=True)
    other = dict(fm_s=maps((3, 4, 4, 4), (3, 8, 2, 2)), fm_t=maps((3, 5, 4, 4), (3, 9, 4, 4)))
    loss.build(**other)
    assert loss(**other, **extra(loss)).isfinite()

def test_build_at_another_image_size_keeps_what_was_learned(make):
    loss = make().build(**stages())
    for p in loss.parameters(): p.data += 1
    state = {k: v.clone() for k,v in loss.state_dict().items()}
    # the second pair needs no resizing any more
    big = dict(fm_s=maps((3, 4, 8, 12), (3, 6, 4, 6)), fm_t=maps((3, 5, 8, 12), (3, 7, 4, 6), names='xyzw'))
    loss.build(**big)
    torch.testing.assert_close(dict(loss.state_dict()), state, equal_nan=True)
    assert loss(**big, **extra(loss)).isfinite()

def sized(n, channels=(4, 6, 5, 7)):
    "Two pairs of maps, as of images of size `n`"
    a,b,c,d = channels
    return dict(fm_s=maps((3, a, n, n), (3, b, n//2, n//2)), fm_t=maps((3, c, n, n), (3, d, n, n), names='xyzw'))

def test_sizes_that_alternate_train_the_same_parameters(make):
    "An optimizer that was made at the first size goes on, with its state, whatever sizes follow"
    loss = make().build(**sized(4))
    params = list(loss.parameters())
    opt = torch.optim.Adam(params, .01)
    for i,n in enumerate([4, 6, 4, 4, 8, 6, 4]):
        loss.build(**sized(n))
        assert all(p is q for p,q in zip(loss.parameters(), params, strict=True))
        before = [p.detach().clone() for p in params]
        value = loss(**sized(n), **extra(loss))
        opt.zero_grad()
        value.backward()
        opt.step()
        assert value.isfinite() and all(p.ne(q).any() for p,q in zip(params, before, strict=True))
    assert {s['step'].item() for s in opt.state.values()}=={7} and len(opt.state)==len(params)

def test_each_size_is_made_once(make, monkeypatch):
    loss,made = make(),[]
    do = loss.make
    monkeypatch.setattr(loss, 'make', lambda *args: (made.append(args[0][0].shape[-1]), do(*args)))
    for n in (4, 4, 6, 4, 6, 8, 4): loss.build(**sized(n))
    assert made==[4, 6, 8]

def test_a_size_that_returns_computes_as_before(make):
    loss,d = make().build(**sized(4)).eval(),sized(4)
    want = copy.deepcopy(loss)(**d, **extra(loss))
    loss.build(**sized(6))
    for clone in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(clone.build(**d)(**d, **extra(loss)), want)
        assert not any(m.training for m in clone.modules())
    loss.train().build(**d)
    assert all(m.training for m in loss.modules())
    assert set(loss.state_dict())==set(make().build(**d).state_dict())

def test_sizes_share_what_is_loaded_and_cast(make):
    a,b = make().build(**sized(4)),make().build(**sized(4))
    for p in b.parameters(): p.data += 1
    a.build(**sized(6))
    a.load_state_dict(b.state_dict())
    a.build(**sized(4))
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), equal_nan=True)
    half = {k: {n: v.float() for n,v in fm.items()} for k,fm in sized(6).items()}
    assert {p.dtype for p in a.build(**half).parameters()}=={torch.float32}
    assert {p.dtype for p in a.build(**sized(4)).parameters()}=={torch.float64}

def test_other_channels_and_back(make):
    "Another network has parameters of its own; the first one's are there when it returns"
    loss = make().build(**sized(4))
    params = list(loss.parameters())
    loss.build(**sized(4, (5, 7, 6, 8)))
    assert not {id(p) for p in loss.parameters()} & {id(p) for p in params if p.ndim>1}
    assert loss(**sized(4, (5, 7, 6, 8)), **extra(loss)).isfinite()
    loss.build(**sized(4))
    assert all(p is q for p,q in zip(loss.parameters(), params, strict=True))

@pytest.mark.parametrize('make', [VID, OFD, ReviewKD])
def test_a_refused_build_changes_nothing(make):
    loss,d = make().build(**sized(4)),sized(4)
    want = copy.deepcopy(loss)(**d)
    params = list(loss.parameters())
    bad = dict(fm_s=maps((3, 4, 4, 4), (3, 6)), fm_t=maps((3, 5, 4, 4), (3, 7, 5, 4, 4)))
    with pytest.raises(ValueError, match='student b'): loss.build(**bad)
    assert all(p is q for p,q in zip(loss.parameters(), params, strict=True))
    torch.testing.assert_close(loss(**d), want)
    empty = make()
    with pytest.raises(ValueError): empty.build(**bad)
    assert not list(empty.parameters()) and not list(empty.buffers())

def test_build_leaves_the_random_stream(make):
    d = stages()
    state = torch.get_rng_state()
    a = make().build(**d)
    assert torch.get_rng_state().equal(state)
    b = make().build(**d)
    assert all(p.equal(q) for p,q in zip(a.parameters(), b.parameters(), strict=True))
    a(**d, **extra(a))
    assert torch.get_rng_state().equal(state)

def test_build_takes_all_outputs_and_a_batch_of_one(make):
    d = {k: {n: v[:1] for n,v in fm.items()} for k,fm in stages().items()}
    loss = make().build(pred=rnd(1, 4), teacher_pred=rnd(1, 4), target=torch.tensor([1]), **d)
    one = {'index': [3]} if extra(loss) else {}
    value = loss(**d, pred=rnd(1, 4), **one)
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in loss.parameters())

def test_pickles_and_copies(make):
    d = stages()
    loss = make().build(**d)
    a,b = pickle.loads(pickle.dumps(loss)),copy.deepcopy(loss)
    want = loss(**d, **extra(loss))
    for o in (a, b): torch.testing.assert_close(o(**d, **extra(loss)), want)

@pytest.mark.parametrize('name', losses)
def test_refusals(name):
    loss,d = losses[name](),stages()
    with pytest.raises(ValueError, match='no feature maps'): loss.build(pred=rnd(3, 4), teacher_pred=rnd(3, 4))
    with pytest.raises(ValueError, match='paired by position'): loss.build(fm_s=d['fm_s'], fm_t={})
    loss.build(**d)
    with pytest.raises(ValueError, match='was built for 2 pairs'):
        loss(**{k: {n: fm[n] for n in list(fm)[:1]} for k,fm in d.items()})

def test_refusals_name_the_layers():
    bad = dict(fm_s=maps((2, 6)), fm_t=maps((2, 8, 4, 4), names='x'))
    for make in (VID, OFD):
        with pytest.raises(ValueError,
                           match=r"student a \(2, 6\), teacher x \(2, 8, 4, 4\): a vector has no positions"):
            make().build(**bad)
    post = dict(fm_s=maps((2, 6, 4, 4)), fm_t={'x': rnd(2, 8, 4, 4).relu()})
    with pytest.raises(ValueError, match=r"teacher x.*before the ReLU"): OFD([nn.BatchNorm2d(8)]).build(**post)
    with pytest.raises(ValueError, match=r"bns\[0\] has 5 channels, the teacher's map 8"):
        OFD([nn.BatchNorm2d(5)]).build(fm_s=maps((2, 6, 4, 4)), fm_t=maps((2, 8, 4, 4)))
    with pytest.raises(ValueError, match='1 bns for 2 pairs'): OFD([nn.BatchNorm2d(5)]).build(**stages())
    with pytest.raises(ValueError, match='shallow to deep'):
        ReviewKD().build(fm_s=maps((2, 6, 2, 2), (2, 6, 4, 4)), fm_t=maps((2, 6, 2, 2), (2, 6, 4, 4)))
    with pytest.raises(ValueError, match='student a.*square grids'):
        ReviewKD().build(fm_s=maps((2, 7, 6)), fm_t=maps((2, 6, 4, 4)))
    with pytest.raises(ValueError, match='init_var > eps'): VID(init_var=0)

def test_other_sizes_than_built_on_are_refused_not_broadcast():
    d = dict(fm_s=maps((2, 6, 4, 4)), fm_t=maps((2, 8, 2, 2)))
    for make in (VID, OFD, ReviewKD):
        loss = make().build(**d)
        with pytest.raises(ValueError, match='build it again'): loss(fm_s=d['fm_s'], fm_t=maps((2, 8, 1, 1)))

# --- in a training --------------------------------------------------------------------------------

class Net(nn.Module):
    "Two stages before their ReLU, and a head"
    def __init__(self, width):
        super().__init__()
        self.a,self.b = nn.Conv2d(3, width, 3, 2, 1),nn.Conv2d(width, 2*width, 3, 2, 1)
        self.head = nn.Linear(2*width, 4)
    def forward(self, x): return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))

class FirstParams(Callback):
    order = 55
    def after_batch(self):
        if not hasattr(self, 'first'): self.first = [p.detach().clone() for p in self.loss.parameters()]
    def __init__(self, loss): self.loss = loss

@pytest.mark.parametrize('name', ['VID', 'CRD', 'ReviewKD', 'OFD'])
def test_trains_under_the_callback(name):
    student,teacher,loss = Net(4),Net(8),losses[name]()
    items = list(zip(torch.randn(16, 3, 8, 8), torch.arange(16)%4))
    dl = DataLoader(items, bs=8)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), student, CrossEntropyLossFlat())
    first = FirstParams(loss)
    kd = KnowledgeDistillationCallback(teacher, loss, ['a', 'b'], ['a', 'b'], weight=1., task_weight=1.)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=[kd, first])
    moved = [p.ne(q).any().item() for p,q in zip(loss.parameters(), first.first, strict=True)]
    assert all(moved), [k for (k,_),m in zip(loss.named_parameters(), moved) if not m]
    assert [len(g) for g in learn.opt.param_lists]==[len(list(student.parameters()))]
    assert set(student.state_dict())==set(Net(4).state_dict())

class IndexedDL(DataLoader):
    def get_idxs(self):
        self.order = super().get_idxs()
        return self.order

class GiveIndex(Callback):
    order = -1
    def __init__(self, crd): self.crd,self.seen = crd,[]
    def before_batch(self):
        if self.training:
            self.crd.index = torch.tensor(self.dl.order[self.iter*self.dl.bs:][:self.dl.bs])
            self.seen.append((self.x[:,0,0,0].long().tolist(), self.crd.index.tolist()))

def test_crd_bank_under_the_callback():
    "The recipe of the docs: the first pixel of each image says which sample it is"
    x = torch.randn(12, 3, 8, 8)
    x[:,0,0,0] = torch.arange(12.)
    items = list(zip(x, torch.arange(12)%4))
    learn = Learner(DataLoaders(IndexedDL(items, bs=4, shuffle=True), DataLoader(items, bs=4), device='cpu'), Net(4),
                    CrossEntropyLossFlat())
    loss = CRD(dim=4, bank=12, k=6)
    give = GiveIndex(loss)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2, cbs=[give, KnowledgeDistillationCallback(Net(8), loss, 'b', 'b', weight=.8, task_weight=1.)])
    assert len(give.seen)==6 and all(a==b for a,b in give.seen)
    assert loss.labels.tolist()==[i%4 for i in range(12)]
    torch.testing.assert_close(loss.bank_s.norm(dim=1), torch.ones(12))
