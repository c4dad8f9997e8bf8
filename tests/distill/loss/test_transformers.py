"Losses between tokens: golden numbers, padding, timm's transformers, and what is learned along"
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.loss.transformers import (
    AttentionScores, HiddenCosine, HiddenStates, Relations, ViTKD, split_qkv)
from helpers import data, learner, n_hooks, same, state

# Computed in float64 by a slow and literal program, and by a second one
tokens_s = torch.tensor([[[-0.0545, 0.6743, 0.3466, -1.3003, 1.5185, 0.9898],
                          [0.2777, -0.4486, 0.962, -0.8276, 0.5347, 1.2284],
                          [0.5196, -0.0634, -0.0348, 0.0456, 1.448, 1.8935],
                          [0.403, 0.1924, -0.3037, -0.8598, -0.2673, -2.0691]]], dtype=torch.float64)
tokens_t = torch.tensor(
    [[[1.0087, -0.3231, 0.1277, 0.2798, 1.2887, 1.6253, -0.4692, -1.2494, -0.2604, -0.1476],
      [-0.4802, -1.7084, 1.1019, -0.0501, 2.5419, 1.2096, 1.9391, -0.2972, 1.3209, 0.0197],
      [0.4864, -1.8668, 0.4137, 0.1419, -0.0462, 0.4262, 0.6464, 0.8471, 0.1899, 0.6993],
      [-0.6716, -0.7519, 1.5793, -0.5983, 2.1064, -1.2195, 0.216, -0.2582, -0.1204, -0.0829]]], dtype=torch.float64)
scores_s = torch.tensor([[[[1.4048, 0.2211, -10000],
                           [0.1232, 0.606, -10000],
                           [-1.9166, -2.4225, -10000]],
                          [[0.2015, -0.1567, -10000],
                           [-1.3576, 0.7017, -10000],
                           [0.2699, -0.9709, -10000]]]], dtype=torch.float64)
scores_t = torch.tensor([[[[-0.6075, -0.1261, -10000],
                           [0.9287, -1.8444, -10000],
                           [2.2925, 0.4888, -10000]],
                          [[1.0555, 0.0541, -10000],
                           [0.5883, 0.8852, -10000],
                           [-0.1337, -0.4382, -10000]]]], dtype=torch.float64)
hidden_s = torch.tensor([[[-0.2707, 0.1048],
                          [0.2505, -0.9252],
                          [0.5671, -1.0402]]], dtype=torch.float64)
hidden_t = torch.tensor([[[0.4967, -0.1383, 0.6477, 1.523],
                          [-0.2342, -0.2341, 1.5792, 0.7674],
                          [-0.4695, 0.5426, -0.4634, -0.4657]]], dtype=torch.float64)
matrix = torch.tensor([[0.2574, -0.9085, -0.3785, -0.5349],
                       [0.8581, -0.413, 0.4982, 2.0102]], dtype=torch.float64)
vectors_s = torch.tensor([[-0.7506, 1.3164, 1.2461, -1.6049],
                          [-1.4681, -1.7151, 1.8588, 0.0876]], dtype=torch.float64)
vectors_t = torch.tensor([[0.0264, 0.2603, -0.3951, -0.2043],
                          [-1.2716, -2.5969, 0.2897, -0.8733]], dtype=torch.float64)


def test_golden_relations():
    got = Relations([tokens_s], [tokens_t], heads=2, mask=torch.tensor([[1, 1, 1, 0]]))
    assert got.item()==pytest.approx(0.3060882395925114, abs=1e-9)


def test_golden_of_tinybert():
    assert AttentionScores([scores_s], [scores_t]).item()==pytest.approx(2.336444110555556, abs=1e-9)
    hidden = HiddenStates().build(fm_s=[hidden_s], fm_t=[hidden_t])
    hidden.project.weight.data,hidden.project.bias.data = matrix.T.clone(),torch.zeros(4, dtype=torch.float64)
    assert hidden([hidden_s], [hidden_t]).item()==pytest.approx(1.5659920356948576, abs=1e-9)


def test_golden_of_distilbert():
    assert HiddenCosine([vectors_s], [vectors_t]).item()==pytest.approx(0.5574402950186537, abs=1e-9)


def slow_relations(s, t, heads, mask):
    "The formula of MiniLM v2, token by token"
    total,n = 0.,0
    for b in range(len(s)):
        real = mask[b].nonzero().flatten().tolist()
        for h in range(heads):
            ps = []
            for x in (s[b], t[b]):
                d = x.shape[1]//heads
                x = x[real, h*d:(h+1)*d]
                ps.append((x@x.T/d**0.5).log_softmax(1))
            total += (ps[1].exp()*(ps[1]-ps[0])).sum().item()
            n += len(real)
    return total/n


def maps(*widths, n=5, kinds=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(3, n, d, generator=g) for _ in range(kinds)] for d in widths]


mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]])


@pytest.mark.parametrize('heads', [1, 4, 8])
def test_relations_by_a_slow_program(heads):
    s,t = maps(8, 24)
    want = sum(slow_relations(a, b, heads, mask) for a,b in zip(s, t))
    assert Relations(s, t, heads=heads, mask=mask).item()==pytest.approx(want, rel=1e-5)
    assert Relations(s, t, heads=heads).item()==pytest.approx(
        sum(slow_relations(a, b, heads, torch.ones(3, 5)) for a,b in zip(s, t)), rel=1e-5)


losses = [partial(Relations, heads=4), partial(AttentionScores, heads=4), HiddenCosine]


@pytest.mark.parametrize('loss', losses, ids=lambda f: getattr(f, 'func', f).__name__)
def test_padding_is_neither_seen_nor_taught(loss):
    s,t = maps(8, 8, kinds=2)
    s = [x.requires_grad_() for x in s]
    real = mask[..., None]>0
    got = loss(s, t, mask=mask)
    noisy = [[torch.where(real, x, torch.randn_like(x)) for x in fm] for fm in (s, t)]
    assert torch.allclose(loss(*noisy, mask=mask), got)
    longer = [[F.pad(x, (0, 0, 0, 2), value=3.) for x in fm] for fm in (s, t)]
    assert torch.allclose(loss(*longer, mask=F.pad(mask, (0, 2))), got)
    got.backward()
    for x in s: assert x.grad[mask>0].any() and not x.grad[mask==0].any()
    assert loss(s, t, mask=0*mask)==0


@pytest.mark.parametrize('loss', losses, ids=lambda f: getattr(f, 'func', f).__name__)
def test_gradients_do_not_reach_the_teacher_and_half_precision_is_computed_in_full(loss):
    s,t = maps(8, 8, kinds=2)
    s,t = [x.requires_grad_() for x in s],[x.requires_grad_() for x in t]
    loss(s, t).backward()
    assert all(x.grad is None for x in t) and all(x.grad.any() for x in s)
    half = [[x.detach().bfloat16() for x in fm] for fm in (s, t)]
    want = loss(*[[x.double() for x in fm] for fm in half])
    with torch.autocast('cpu', dtype=torch.bfloat16): assert loss(*half).item()==pytest.approx(want.item(), rel=1e-4)


def test_scores_are_those_of_pytorch_s_attention():
    s,t = maps(8, 12, kinds=2)
    def scores(q, k, h): return torch.stack([a@b.mT/a.shape[-1]**0.5 for a,b in zip(q.chunk(h, -1), k.chunk(h, -1))], 1)
    want = F.mse_loss(scores(*s, 4), scores(*t, 4))
    assert torch.allclose(AttentionScores(s, t, heads=4), want)
    assert torch.allclose(AttentionScores([scores(*s, 4)], [scores(*t, 4)]), want)


def test_one_matrix_for_all_layers_ignores_padding():
    s,t = maps(4, 6)
    hidden = HiddenStates().build(fm_s=s, fm_t=t)
    want = sum(((hidden.project(a)-b)[mask>0]).square().mean() for a,b in zip(s, t))
    assert torch.allclose(hidden(s, t, mask=mask), want)
    assert len(list(hidden.parameters()))==2
    assert torch.allclose(hidden(fm_s=s, fm_t=t, pred=None, target=None), hidden(s, t))


def test_vitkd_is_the_sum_of_squares_of_its_two_parts():
    s,t = maps(8, 12, n=17)
    loss = ViTKD().build(fm_s=s, fm_t=t)
    torch.manual_seed(0)
    got = loss(s, t)
    torch.manual_seed(0)
    hidden = torch.rand(3, 16).argsort(1)>=8
    low = sum((f(a[:, 1:])-b[:, 1:]).square().sum() for f,a,b in zip(loss.align, s[:2], t))/3
    x = loss.align[2](s[2][:, 1:])
    x[hidden] = 0
    x = loss.fill(x.mT.reshape(3, 12, 4, 4)).flatten(2).mT
    high = (x-t[2][:, 1:])[hidden].square().sum()/3
    assert torch.allclose(got, 3e-5*low + 3e-6/0.5*high)


@pytest.mark.parametrize('wrong, said', [
    (lambda: Relations(*maps(8, 12), heads=8), 'there could be 1, 2, 4'),
    (lambda: Relations(*maps(8, 12), heads=0), 'does not divide'),
    (lambda: Relations(maps(8)[0], maps(8, n=4)[0]), 'the same tokens'),
    (lambda: Relations(*maps(8, 8), fused=True), 'no multiple of 3'),
    (lambda: AttentionScores(*maps(8, 8), heads=4), 'in turn'),
    (lambda: AttentionScores(*maps(8, 8, kinds=2), heads=3), 'does not divide'),
    (lambda: HiddenCosine(*maps(8, 12)), 'adapter'),
    (lambda: Relations(*maps(8, 8), heads=4, mask=torch.ones(3, 99)), 'does not fit'),
    (lambda: ViTKD().build(fm_s=maps(8, n=8)[0], fm_t=maps(8, n=8)[0]), 'no square grid')])
def test_refused(wrong, said):
    with pytest.raises(ValueError, match=said): wrong()


# In a training, between timm's transformers

def vit(width, depth=3, seed=0):
    timm = pytest.importorskip('timm')
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=2, embed_dim=width, depth=depth, num_heads=2, num_classes=3)


def test_relations_of_timm_s_fused_layers_are_learned():
    s,t = vit(12, 2),vit(24, seed=1).eval()
    loss,alone = partial(Relations, heads=6, fused=True),dict(weight=1, task_weight=0)
    kd = KD(t, loss, 'blocks.1.attn.qkv', 'blocks.2.attn.qkv', **alone)
    learn = learner(s, cbs=kd)
    xb,yb = (learn.dls.one_batch()[:1], learn.dls.one_batch()[1:])
    before = kd.terms_on(learn, xb, yb)[1]['Relations'].item()
    learn.fit(6, 0.1)
    assert kd.terms_on(learn, xb, yb)[1]['Relations'].item()<before
    assert kd.learned.state_dict()=={} and not n_hooks(s, t)


def qkv_by_hand(block, x):
    "What timm's attention makes of the layer's output, `(B, heads, N, d)` each"
    q = block.attn
    return q.qkv(x).reshape(*x.shape[:2], 3, q.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def test_split_qkv_as_timm_does():
    block = vit(12).blocks[0]
    x = torch.randn(2, 5, 12)
    parts = split_qkv([block.attn.qkv(x)])
    for a,b in zip(parts.values(), qkv_by_hand(block, x)): assert torch.equal(a, b.transpose(1, 2).flatten(2))


@pytest.mark.parametrize('make, layers', [
    (HiddenStates, ['blocks.0', 'blocks.1']), (ViTKD, ['blocks.0', 'blocks.1'])], ids=['HiddenStates', 'ViTKD'])
def test_what_is_learned_trains_along_and_is_no_part_of_the_student(make, layers):
    s,t = vit(12, 2),vit(24, seed=1).eval()
    loss = make()
    kd = KD(t, loss, layers, layers)
    learn = learner(s, cbs=kd)
    names = set(s.state_dict())
    learn.fit(1, 0.01)
    first = state(loss)
    learn.fit(1, 0.01)
    assert set(s.state_dict())==names and not same(first, state(loss))
    other = KD(t, make(), layers, layers)
    other.load_learned(kd.learned.state_dict())
    learner(s, cbs=other).fit(1, 0.)
    assert same(state(other.terms[0].base), state(loss))


def test_lr_find_leaves_what_is_learned_as_it_was():
    pytest.importorskip('timm')
    import fastai.callback.schedule
    layers = ['blocks.0', 'blocks.1']
    kd = KD(vit(24, seed=1).eval(), HiddenStates(), layers, layers)
    learn = learner(vit(12, 2), cbs=kd)
    learn.fit(1, 0.01)
    before = state(kd.learned)
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    assert same(before, state(kd.learned))


def test_misspelt_keywords_are_refused():
    maps = {'l': torch.randn(2, 3, 4)}
    loss = HiddenStates().build(fm_s=maps, fm_t=maps)
    with pytest.raises(TypeError, match="HiddenStates: unknown keyword 'maks'"): loss(maps, maps, maks=1)
    offered = dict(pred=1, target=2, mask=torch.ones(2, 3))
    assert loss(maps, maps, **offered).item()==pytest.approx(loss(maps, maps).item(), rel=1e-6)
