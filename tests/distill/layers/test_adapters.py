"Adapters: values against plain loops, every kind of pair, refusals, and what they leave alone"
import copy
import pickle

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from fasterai.distill.layers.adapters import (Adapters, MapNorm, MeanPositions, ResizeGrid, ResizeTokens, ToGrid,
                                              ToTokens, adapter, position_steps, token_grid)
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import FitNet, SoftTarget


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def rnd(*shape): return torch.randn(shape)

# --- positions ------------------------------------------------------------

@pytest.mark.parametrize('n,like,want', [
    (1, None, (0, 1, 1)), (49, None, (0, 7, 7)), (50, None, (1, 7, 7)), (197, None, (1, 14, 14)),
    (198, None, (2, 14, 14)), (201, None, (5, 14, 14)),
    (261, None, (5, 16, 16)), (577, None, (1, 24, 24)), (128, None, None), (56, None, None), (72, None, None),
    (12, None, None),
    (98, (7, 14), (0, 7, 14)), (393, (7, 14), (1, 14, 28)), (393, (14, 7), (1, 28, 14)), (301, (8, 10), (1, 15, 20)),
    (300, (8, 10), (0, 15, 20)),
    (197, (7, 7), (1, 14, 14)), (197, (7, 14), None)])
def test_token_grid(n, like, want): assert token_grid(n, like)==want

def slow_resize(x, size):
    "Mean over the cells that a target cell covers, for sizes that divide"
    B,C,H,W = x.shape
    out = torch.zeros(B, C, *size)
    kh,kw = H//size[0],W//size[1]
    for b in range(B):
        for c in range(C):
            for i in range(size[0]):
                for j in range(size[1]):
                    out[b,c,i,j] = sum(x[b,c,i*kh+a,j*kw+d] for a in range(kh) for d in range(kw))/(kh*kw)
    return out

@pytest.mark.parametrize('size', [(3, 2), (6, 2), (1, 1), (6, 8)])
def test_resize_grid_averages_what_a_cell_covers(size):
    x = rnd(2, 3, 6, 8)
    torch.testing.assert_close(ResizeGrid(size)(x), slow_resize(x, size))

def test_resize_grid_grows_linearly_and_mixes_both():
    ramp = torch.arange(4.).view(1, 1, 1, 4)
    got = ResizeGrid((1, 8))(ramp)[0,0,0]
    torch.testing.assert_close(got, torch.tensor([0, .25, .75, 1.25, 1.75, 2.25, 2.75, 3]))
    tall = rnd(1, 2, 8, 2)
    assert ResizeGrid((4, 4))(tall).shape==(1, 2, 4, 4)
    torch.testing.assert_close(ResizeGrid((4, 4))(tall).mean((2,3)), tall.mean((2,3)))

def test_tokens_and_grid_are_inverse_but_for_the_front():
    x = rnd(2, 3, 4, 5)
    tokens = ToTokens(2)(x)
    for b in range(2):
        for i in range(4):
            for j in range(5): assert tokens[b, 2+i*5+j].equal(x[b, :, i, j])
        torch.testing.assert_close(tokens[b, :2], x[b].flatten(1).mean(1).expand(2, 3))
    assert ToGrid(2, (4, 5))(tokens).equal(x)

def test_resize_tokens_keeps_class_tokens():
    x = rnd(2, 18, 3)                                    # class, distillation, 4x4
    got = ResizeTokens((2, 4, 4), (1, 2, 2))(x)
    assert got.shape==(2, 5, 3) and got[:, 0].equal(x[:, 0])
    torch.testing.assert_close(got[:, 1], x[:, [2, 3, 6, 7]].mean(1))
    more = ResizeTokens((1, 2, 2), (2, 2, 2))(x[:, :5])  # the token that the student lacks is the mean of its grid
    assert more[:, 0].equal(x[:, 0])
    torch.testing.assert_close(more[:, 1], x[:, 1:5].mean(1))

@pytest.mark.parametrize('s,t,want', [
    ((1, 6, 8, 8), (1, 9, 8, 8), ([], 6, 9, 1)),
    ((1, 512, 7, 7), (1, 7, 7, 768), (['Permute'], 512, 768, -1)),
    ((1, 7, 7, 768), (1, 512, 7, 7), (['Permute'], 768, 512, 1)),
    ((1, 7, 7, 768), (1, 7, 7, 1024), ([], 768, 1024, -1)),
    ((1, 56, 56, 96), (1, 56, 56, 104), ([], 96, 104, -1)),
    ((1, 28, 28, 192), (1, 14, 14, 384), (['Permute', 'ResizeGrid', 'Permute'], 192, 384, -1)),
    ((1, 64, 64, 128), (1, 256, 32, 64), (['ResizeGrid'], 64, 256, 1)),  # first, although two sides are equal
    ((1, 6, 15, 20), (1, 9, 8, 10), (['ResizeGrid'], 6, 9, 1)),            # proportions that strides rounded off
    ((1, 7, 7, 768), (1, 197, 192), (['Permute', 'ResizeGrid', 'ToTokens'], 768, 192, -1)),
    ((1, 6, 4, 8), (1, 33, 9), (['ToTokens'], 6, 9, -1)),
    ((1, 197, 6), (1, 9, 7, 7), (['ToGrid', 'ResizeGrid'], 6, 9, 1)),
    ((1, 20, 6), (1, 20, 9), ([], 6, 9, -1)),                              # as many tokens: text needs no grid
    ((1, 7, 7, 768), (1, 512), (['MeanPositions'], 768, 512, -1)),
    ((1, 64, 8, 16), (1, 512), (['MeanPositions'], 64, 512, -1))])
def test_position_steps(s, t, want):
    steps,*rest = position_steps(s, t)
    assert ([type(o).__name__ for o in steps], *rest)==want

def test_channels_last_maps_are_moved_not_mixed():
    x,m = rnd(2, 5, 5, 48),adapter((2, 5, 5, 48), (2, 3, 5, 5))
    torch.testing.assert_close(m(x), m[1:](x.permute(0, 3, 1, 2)))
    y,m = rnd(2, 8, 5, 5),adapter((2, 8, 5, 5), (2, 5, 5, 48))
    torch.testing.assert_close(m(y), m[1:](y.permute(0, 2, 3, 1)))
    torch.testing.assert_close(MeanPositions((1, 2))(x), x.permute(0, 3, 1, 2).mean((2, 3)))

# --- one adapter ------------------------------------------------------------

shapes = [((6,8,8), (9,4,4)), ((6,4,4), (6,8,8)), ((6,4,8), (9,8,4)), ((6,4,4), (17,9)), ((6,2,4), (33,9)),
          ((18,6), (9,2,2)), ((17,6), (5,9)), ((16,6), (5,6)),
          ((7,6), (7,9)), ((6,7,7), (7,7,9)), ((7,7,6), (9,7,7)), ((7,7,6), (7,7,9)), ((14,14,6), (7,7,9)),
          ((7,7,6), (50,9)), ((50,9), (7,7,6)), ((6,), (9,)),
          ((6,4,4), (9,)), ((7,7,6), (9,)), ((5,6), (9,)), ((6,), (9,1,1)), ((6,4,8), (9,1,1)), ((6,1,1), (9,))]

@pytest.mark.parametrize('s,t', shapes)
def test_every_kind_of_pair_trains_and_takes_a_batch_of_one(s, t):
    m = adapter((2,)+s, (2,)+t)
    for B in (2, 1):
        x = rnd(B, *s).requires_grad_()
        out = m(x)
        assert out.shape==(B,)+t
        m.zero_grad()
        (out*rnd(*out.shape)).sum().backward()
        assert x.grad.abs().sum()>0 or B==1
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())

@pytest.mark.parametrize('s,t', [((6,8,8), (9,4,4)), ((6,4,4), (17,9)), ((6,4,4), (9,8,8))])
def test_memory_format_does_not_matter(s, t):
    m,x = adapter((2,)+s, (2,)+t).double(),rnd(2, *s).double()
    torch.testing.assert_close(m(x.contiguous(memory_format=torch.channels_last)), m(x))

def test_regressor_of_maps_is_a_1x1_convolution_and_batchnorm():
    x,m = rnd(3, 4, 2, 2),adapter((1, 4, 2, 2), (1, 5, 2, 2))
    w,got = m.project[0].weight[:, :, 0, 0],m(x)
    z = torch.zeros(3, 5, 2, 2)
    for b in range(3):
        for o in range(5):
            for i in range(2):
                for j in range(2): z[b,o,i,j] = sum(w[o,c]*x[b,c,i,j] for c in range(4))
    want = (z-z.mean((0,2,3), keepdim=True))/(z.var((0,2,3), correction=0, keepdim=True)+1e-5)**.5
    torch.testing.assert_close(got, want)

def test_nothing_that_shapes_do_not_ask_for():
    assert adapter((2, 6, 4, 4), (7, 6, 4, 4)) is None
    assert not list(adapter((2, 6, 8, 8), (2, 6, 4, 4)).parameters())
    assert not list(adapter((2, 17, 6), (2, 5, 6)).parameters())

def test_one_value_per_channel_uses_running_statistics():
    m = MapNorm(3)
    m.running_mean.fill_(2.); m.running_var.fill_(4.)
    torch.testing.assert_close(m(torch.full((1, 3, 1, 1), 6.)), torch.full((1, 3, 1, 1), 2.), rtol=1e-4, atol=0)
    assert m.running_mean.eq(2).all()
    m(rnd(1, 3, 2, 2))
    assert m.running_mean.ne(2).any()

@pytest.mark.parametrize('s,t,why', [
    ((2,6), (2,5,9), 'no positions'), ((2,6), (2,6,4,4), 'no positions'), ((2,6,4,4), (2,15,9), '15 tokens'),
    ((2,15,9), (2,6,4,4), '15 tokens'),
    ((2,72,9), (2,81,9), '72 tokens'), ((2,16,9), (2,15,9), '15 tokens'), ((2,3,4,4,4), (2,6,4,4,4), 'only vectors'),
    ((2,), (2,9), 'only vectors')])
def test_refusals_say_why(s, t, why):
    with pytest.raises(ValueError, match=why) as e: adapter(s, t)
    assert str(s) in str(e.value) and str(t) in str(e.value)

# --- one for every pair ------------------------------------------------------------

@pytest.fixture
def fms():
    return ({'a': rnd(2, 4, 4, 4), 'b': rnd(2, 6, 2, 2), 'c': rnd(2, 5)},
            {'x': rnd(2, 4, 4, 4), 'y': rnd(2, 8, 4, 4), 'z': rnd(2, 7)})

def shapes_of(fm): return [tuple(o.shape) for o in fm.values()]

def test_build_adapts_only_where_needed(fms):
    s,t = fms
    ad = Adapters.build(s, t)
    out = ad(s)
    assert list(out)==['a', 'b', 'c'] and shapes_of(out)==shapes_of(t)
    assert out['a'] is s['a']
    assert sum(p.numel() for p in ad.parameters())==6*8+2*8 + 5*7+7

def test_pairs_are_matched_by_position(fms):
    s,t = fms
    renamed = {f'other.{k}': v for k,v in s.items()}
    ad = Adapters.build(s, t)
    assert shapes_of(ad(renamed))==shapes_of(t)
    with pytest.raises(ValueError, match='3 adapters got 1'): ad({'a': s['a']})
    with pytest.raises(ValueError, match='3 student maps for 1 teacher'): Adapters.build(s, {'x': t['x']})

def test_own_modules_by_name_and_number(fms):
    s,t = fms
    deconv,linear = nn.ConvTranspose2d(6, 8, 2, 2),nn.LazyLinear(7)
    ad = Adapters.build(s, t, {'b': deconv, 2: linear})
    assert ad.mods[1] is deconv and ad.mods[2] is linear and linear.in_features==5
    assert shapes_of(ad(s))==shapes_of(t)
    torch.testing.assert_close(ad(s)['b'], deconv(s['b']))

def test_same_shape_false_uses_own_modules_alone(fms):
    s,t = fms
    ad = Adapters.build(s, t, {'b': nn.Conv2d(6, 3, 1)}, same_shape=False)
    assert shapes_of(ad(s))==[(2, 4, 4, 4), (2, 3, 2, 2), (2, 5)]
    assert not list(Adapters.build(s, t, same_shape=False).parameters())

def test_refusals_name_layer_shapes_and_remedy(fms):
    s,t = fms
    for own,kind,why in [({'b': nn.Conv2d(6, 8, 1)}, ValueError,
                          r"'b' \(2, 6, 2, 2\).*'y' \(2, 8, 4, 4\).*gives \(2, 8, 2, 2\).*adapters=\{'b': module\}"),
                         ({'b': nn.Conv2d(5, 8, 1)}, ValueError, r"'b'.*'y'.*adapters="),
                         ({'b': None}, ValueError, r"'b'.*gives"),
                         ({'bb': nn.Identity()}, ValueError, "did you mean 'b'"),
                         ({3: nn.Identity()}, ValueError, 'unknown student layer'),
                         ({'b': len}, TypeError, 'nn.Module')]:
        with pytest.raises(kind, match=why): Adapters.build(s, t, own)
    with pytest.raises(ValueError, match=r"'v' \(2, 5\).*no positions.*adapters=\{'v'"):
        Adapters.build({'v': rnd(2, 5)}, {'w': rnd(2, 8, 4, 4)})

def test_build_leaves_random_stream_modes_and_statistics(fms):
    s,t = fms
    own = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8).eval(), nn.Dropout(.5), nn.Upsample(scale_factor=2))
    before,modes = copy.deepcopy(own.state_dict()),[m.training for m in own.modules()]
    state = torch.get_rng_state()
    Adapters.build(s, t, {'b': own})
    assert torch.get_rng_state().equal(state)
    assert [m.training for m in own.modules()]==modes
    assert all(v.equal(before[k]) for k,v in own.state_dict().items())
    torch.manual_seed(3); a = Adapters.build(s, t)
    torch.manual_seed(3); b = Adapters.build(s, t)
    assert all(p.equal(q) for p,q in zip(a.parameters(), b.parameters()))

def test_old_adapters_go_on_at_another_image_size(fms):
    s,t = fms
    old = Adapters.build(s, t)
    for p in old.parameters(): p.data += 1
    # no resizing any more, other sizes
    for s2,t2 in [({**s, 'b': rnd(2, 6, 4, 4)}, t), ({**s, 'b': rnd(2, 6, 4, 4)}, {**t, 'y': rnd(2, 8, 8, 8)})]:
        new = Adapters.build(s2, t2, old=old)
        assert all(v.equal(old.state_dict()[k]) for k,v in new.state_dict().items())
        assert shapes_of(new(s2))==shapes_of(t2)
    other = Adapters.build({**s, 'c': rnd(2, 6)}, t, old=old)      # other channels: all anew
    assert not any(p.equal(q) for p,q in zip(other.parameters(), old.parameters()))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('autocast', [False, True])
def test_computes_in_full_precision(fms, dtype, autocast):
    s,t = ({k: v.to(dtype) for k,v in fm.items()} for fm in fms)
    ad = Adapters.build(s, t)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(p.dtype==wide for p in ad.parameters())
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): got = ad(s)
    want = Adapters.build(s, t)
    want.load_state_dict(ad.state_dict())
    assert got['b'].dtype==wide
    torch.testing.assert_close(got['b'], want({k: v.to(wide) for k,v in s.items()})['b'])

def test_pickles_and_copies(fms):
    s,t = fms
    ad = Adapters.build(s, t).eval()
    for other in (pickle.loads(pickle.dumps(ad)), copy.deepcopy(ad)):
        torch.testing.assert_close(other(s)['b'], ad(s)['b'])

# --- in a training ------------------------------------------------------------

def cnn(block, width):
    return ResNet(block, [1, 1, 1, 1], num_classes=4,
                  width_per_group=width) if block is Bottleneck else ResNet(block, [1, 1, 1, 1], num_classes=4)
def vit(dim):
    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=dim, mlp_dim=2*dim,
                             num_classes=4)

pairs = {'resnet <- resnet, wider': (lambda: cnn(BasicBlock, 64), lambda: cnn(Bottleneck, 64),
                                     {'layer2': 'layer2', 'layer3': 'layer3'}),
         'resnet <- vit': (lambda: cnn(BasicBlock, 64), lambda: vit(48),
                           {'layer2': 'encoder.layers.encoder_layer_0', 'layer3': 'encoder.layers.encoder_layer_1'}),
         'vit <- resnet': (lambda: vit(24), lambda: cnn(BasicBlock, 64),
                           {'encoder.layers.encoder_layer_0': 'layer2', 'encoder.layers.encoder_layer_1': 'layer3'})}

class Steps(Callback):
    "Losses of every step, and the adapters of the first"
    order = 55
    def before_fit(self): self.losses,self.first = [],None
    def after_batch(self):
        if not self.training: return
        self.losses.append(self.learn.loss.item())
        ad = self.learn.knowledge_distillation.learned['adapters']
        if self.first is None: self.first = [p.detach().clone() for p in ad.parameters()]

def learner(student, size=32):
    dl = DataLoader(list(zip(rnd(4, 3, size, size), torch.arange(4))), bs=4, shuffle=False)
    return Learner(DataLoaders(dl, dl, device='cpu'), student, CrossEntropyLossFlat())

@pytest.mark.parametrize('name', pairs)
def test_fitnet_across_families(name):
    make_s,make_t,layers = pairs[name]
    student,teacher = make_s(),make_t()
    learn = learner(student)
    kd,steps = KnowledgeDistillationCallback(teacher, FitNet, layers, weight=1.),Steps()
    keys = set(student.state_dict())
    with learn.no_bar(), learn.no_logging():
        learn.create_opt()
        groups = [len(g) for g in learn.opt.param_lists]
        learn.fit_one_cycle(12, 2e-2, cbs=[kd, steps])
    assert steps.losses[-1]<0.85*steps.losses[0], steps.losses
    assert all(p.ne(q).any() for p,q in zip(kd.learned['adapters'].parameters(), steps.first))
    assert set(student.state_dict())==keys and [len(g) for g in learn.opt.param_lists]==groups

def test_fitnets_two_stages():
    def net(w):
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, w, 3, 2, 1), nn.ReLU()),
                             nn.Sequential(nn.Conv2d(w, w, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16*w, 4)))
    student,teacher = net(4),net(8)
    learn = learner(student, 16)
    lower,upper = ([p.detach().clone() for p in part.parameters()] for part in student)
    hint,steps = KnowledgeDistillationCallback(teacher, FitNet, '0', '0', weight=1.),Steps()
    with learn.no_bar(), learn.no_logging():
        learn.fit(8, 1e-2, wd=0., cbs=[hint, steps])
        assert steps.losses[-1]<steps.losses[0]
        assert all(p.ne(q).any() for p,q in zip(student[0].parameters(), lower))
        assert all(p.equal(q) for p,q in zip(student[1].parameters(), upper))
        learn.fit(2, 1e-2, cbs=KnowledgeDistillationCallback(teacher, SoftTarget, weight=.9))
    assert all(p.ne(q).any() for p,q in zip(student[1].parameters(), upper))
    assert len(learn.opt.param_lists[-1])==len(list(student.parameters()))
