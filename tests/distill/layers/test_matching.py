"Pairs of layers that `match_feature_layers` finds between real architectures, against pairs chosen by hand"
import copy
from functools import lru_cache

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.model import TabularModel
from fastai.text.models import AWD_LSTM
from fastai.text.models.awdlstm import awd_lstm_clas_config, awd_lstm_lm_config
from fastai.text.models.core import get_language_model, get_text_classifier
from fastai.vision.learner import create_timm_model, create_unet_model, create_vision_model
from fastai.vision.models import xresnet
from torch import nn
from torchvision import models as tv

from fasterai.distill.layers.capture import Capture, as_found
from fasterai.distill.layers.matching import find_stages, match_feature_layers
from fasterai.distill.layers.names import layer_pairs

timm = pytest.importorskip('timm')


# What a name in the table below stands for: a torchvision model, unless a prefix says otherwise

VIT = dict(patch_size=16, num_heads=2, hidden_dim=32, mlp_dim=64)
EXTRA = dict(googlenet=dict(init_weights=False, aux_logits=False),
             inception_v3=dict(init_weights=False, aux_logits=False),
             vgg11=dict(init_weights=False), vgg16_bn=dict(init_weights=False),
             swin_tiny_patch4_window7_224=dict(img_size=64, window_size=2), mixer_s32_224=dict(img_size=64),
             vit_tiny_patch16_224=dict(img_size=64, depth=6), deit_tiny_distilled_patch16_224=dict(img_size=64))

def awd_lstm(n, config): return {**config, 'emb_sz': 16, 'n_hid': 24, 'n_layers': n}

class TwoInputs(nn.Module):
    "An image and something else; children called like attributes of a Learner"
    def __init__(self, body):
        super().__init__()
        self.path,self.opt = body,nn.Linear(1002, 2)
    def forward(self, meta, img): return self.opt(torch.cat([self.path(img), meta], 1))

def plain_cnn(*chs):
    convs = [o for i,(a,b) in enumerate(zip((1, *chs), chs))
             for o in (nn.Conv2d(a, b, 3, 1 if i==0 else 2, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(chs[-1], 10))

def mlp(*sizes):
    hidden = [o for a,b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 3))

@lru_cache(2)
def make(name):
    torch.manual_seed(0)
    if not isinstance(name, str): return name[0](*name[1:])
    lib,_,name = name.rpartition(':')
    kw = EXTRA.get(name, {})
    if lib=='timm':     return timm.create_model(name, pretrained=False, **kw)
    if lib=='body':     return create_vision_model(getattr(tv, name), 5, pretrained=False)
    if lib=='timmbody': return create_timm_model(name, 5, pretrained=False)[0]
    if lib=='unet':     return create_unet_model(getattr(tv, name), 3, (64, 64), pretrained=False)
    if lib=='x':        return getattr(xresnet, name)(n_out=5)
    if lib=='video':    return getattr(tv.video, name)(weights=None)
    if lib=='seg':      return getattr(tv.segmentation, name)(weights=None, weights_backbone=None)
    if lib=='vit':      return tv.VisionTransformer(image_size=64, num_layers=int(name), **VIT)
    if lib=='clas':
        return get_text_classifier(AWD_LSTM, 50, 2, seq_len=5, config=awd_lstm(int(name), awd_lstm_clas_config))
    if lib=='lm':       return get_language_model(AWD_LSTM, 50, config=awd_lstm(int(name), awd_lstm_lm_config))
    if lib=='two':      return TwoInputs(getattr(tv, name)())
    return getattr(tv, name)(weights=None, **kw)

def tab(*layers): return lambda: TabularModel([(10, 4), (5, 3)], 4, 2, list(layers))

def image(h, w=None, n=1): return torch.randn(n, 3, h, w or h)
words = torch.arange(24).view(2, 12)
rows = torch.zeros(2, 2).long(),torch.randn(2, 4)

def seq(s, *ns): return [s.format(n) for n in ns]
res = ['layer1', 'layer2', 'layer3', 'layer4']
stem = ['relu']+res
raw = ['conv1']+res
blocks = 'encoder.layers.encoder_layer_{}'
body34 = ['0.4', '0.5', '0.6', '0']

# student, teacher, input, layers of the student, layers of the teacher
CASES = [
    # the promises of the documentation
    ('resnet18', 'body:resnet34', image(64), raw, ['0.0']+body34),
    ('resnet18', 'body:resnet34', image(224), raw, ['0.0']+body34),
    ('resnet18', 'body:resnet34', image(32), raw, ['0.0']+body34),
    # convolutional networks: stages at equal resolution; a loose stem before norm and activation only if both have one
    ('resnet18', 'resnet50', image(64, 96), raw, raw),
    ('resnet18', 'wide_resnet50_2', image(96, 64), raw, raw),
    ('resnet18', 'vgg16_bn', image(64), stem, seq('features.{}', 12, 22, 32, 42)+['features']),
    ('vgg11', 'vgg16_bn', image(32), seq('features.{}', 1, 4, 9, 14, 19), seq('features.{}', 5, 12, 22, 32, 42)),
    ('alexnet', 'resnet18', image(224), ['features.1', 'features.4', 'features.11', 'features'], res),
    ('mobilenet_v2', 'resnet18', image(64), seq('features.{}', 1, 3, 6, 13)+['features'], stem),
    ('mobilenet_v3_small', 'resnet34', image(64), seq('features.{}', 0, 1, 3, 8)+['features'], stem),
    ('mnasnet0_5', 'efficientnet_b0', image(64), seq('layers.{}', 7, 8, 9, 11)+['layers'],
     seq('features.{}', 1, 2, 3, 5)+['features']),
    ('shufflenet_v2_x0_5', 'resnet18', image(64), ['conv1', 'stage2', 'stage3', 'conv5'],
     ['relu', 'layer2', 'layer3', 'layer4']),
    ('squeezenet1_1', 'resnet18', image(64), ['features.0', 'features.4', 'features.7', 'features'], raw[:4]),
    ('regnet_y_400mf', 'resnet18', image(64), ['stem']+seq('trunk_output.block{}', 1, 2, 3)+['trunk_output'], stem),
    ('resnet18', 'densenet121', image(64), raw, ['features.conv0']+seq('features.denseblock{}', 1, 2, 3)+['features']),
    ('resnet18', 'googlenet', image(64), stem, ['conv1', 'conv3', 'inception3b', 'inception4e', 'inception5b']),
    ('resnet18', 'inception_v3', image(128), stem,
     ['Conv2d_2b_3x3', 'Conv2d_4a_3x3', 'Mixed_5d', 'Mixed_6e', 'Mixed_7c']),
    ('resnet18', 'inception_v3', image(96), stem,
     ['Conv2d_2b_3x3', 'Conv2d_4a_3x3', 'Mixed_5d', 'Mixed_6e', 'Mixed_7c']),
    ('resnet18', 'convnext_tiny', image(64), res, seq('features.{}', 1, 3, 5)+['features']),
    ((plain_cnn, 4, 8, 8), (plain_cnn, 16, 32, 32), torch.randn(2, 1, 8, 8), ['2', '5', '8'], ['2', '5', '8']),
    # transformers: stages of Swin by resolution, blocks of a ViT by relative depth
    ('resnet18', 'swin_t', image(64, 96), res, seq('features.{}', 1, 3, 5)+['features']),
    ('resnet18', 'vit:12', image(64), res, seq(blocks, 2, 5, 8, 11)),
    ('vit:12', 'resnet18', image(64), seq(blocks, 2, 5, 8, 11), res),
    ('vit:6', 'vit:12', image(64), seq(blocks, *range(6)), seq(blocks, 1, 3, 5, 7, 9, 11)),
    ('vit:4', 'swin_t', image(64), seq(blocks, *range(4)), seq('features.{}', 1, 3, 5)+['features']),
    # timm, whose models say where their stages are
    ('timm:resnet18', 'resnet18', image(64), ['act1']+res, stem),
    ('timm:mobilenetv3_small_050', 'timm:efficientnet_b0', image(64), ['bn1']+seq('blocks.{}', 0, 1, 3, 5),
     seq('blocks.{}', 0, 1, 2, 4, 6)),
    ('timm:convnext_atto', 'timm:swin_tiny_patch4_window7_224', image(64), seq('stages.{}', 0, 1, 2, 3),
     seq('layers.{}', 0, 1, 2, 3)),
    ('timm:vit_tiny_patch16_224', 'timm:deit_tiny_distilled_patch16_224', image(64), seq('blocks.{}', *range(6)),
     seq('blocks.{}', 1, 3, 5, 7, 9, 11)),
    ('timm:mixer_s32_224', 'resnet18', image(64), seq('blocks.{}', 1, 3, 5, 7), res),
    ('timm:hrnet_w18_small', 'resnet18', image(64), ['stage2', 'stage3', 'stage4'], ['layer2', 'layer3', 'layer4']),
    ('timmbody:convnext_atto', 'resnet18', image(64), seq('0.model.stages.{}', 0, 1, 2, 3), res),
    # fastai
    ('x:xresnet18', 'body:resnet34', image(64), ['2', '4', '5', '6', '7'], ['0.2']+body34),
    ('body:squeezenet1_1', 'x:xresnet34', image(64), ['0.0.1', '0.0.4', '0.0.7', '0'], ['2', '4', '5', '6']),
    ('unet:resnet18', 'unet:resnet34', image(64),
     *2*[['layers.0.0', 'layers.0.4', 'layers.0.5', 'layers.0.6', 'layers.0']]),
    # other tasks and inputs
    ('seg:deeplabv3_mobilenet_v3_large', 'seg:fcn_resnet50', image(64), ['backbone.1', 'backbone.3', 'backbone'],
     ['backbone.relu', 'backbone.layer1', 'backbone']),
    ('video:r3d_18', 'video:mc3_18', torch.randn(1, 3, 4, 32, 32), res, res),
    ('two:resnet18', 'two:resnet34', (torch.randn(1, 2), image(64)), [f'path.{n}' for n in raw],
     [f'path.{n}' for n in raw]),
    ('clas:2', 'clas:4', words, seq('0.module.rnns.{}', 0, 1), seq('0.module.rnns.{}', 1, 3)),
    ('lm:2', 'lm:3', words, seq('0.rnns.{}', 0, 1), seq('0.rnns.{}', 1, 2)),
    ((tab(20),), (tab(50, 20),), rows, ['layers.0'], ['layers.1']),
    ((mlp, 48, 8, 8), (mlp, 48, 9, 9, 9, 9), torch.randn(2, 3, 4, 4), ['2', '4'], ['4', '8']),
]

def label(case):
    names = [n if isinstance(n, str) else '-'.join([n[0].__name__, *map(str, n[1:])]) for n in case[:2]]
    return f"{names[0]}<-{names[1]}-{case[2].shape[-1] if isinstance(case[2], torch.Tensor) else 'multi'}"

def facts(m):
    return (copy.deepcopy(dict(m.named_buffers())), [o.training for o in m.modules()], [p.grad for p in m.parameters()],
            sum(len(o._forward_hooks)+len(o._forward_pre_hooks) for o in m.modules()), torch.get_rng_state())

def states(m, names, xb):
    "Reference: a forward with copying hooks"
    res,hooks = {},[]
    first = lambda o: o if isinstance(o, torch.Tensor) else first(next(iter(o.values() if isinstance(o, dict) else o)))
    for n,o in m.named_modules():
        if n in names: hooks.append(o.register_forward_hook(lambda m, a, o, n=n: res.__setitem__(n, first(o).clone())))
    m(*xb)
    for h in hooks: h.remove()
    return res

@pytest.mark.parametrize('case', CASES, ids=label)
def test_pairs(case):
    *models,x,in_student,in_teacher = case
    xb = x if isinstance(x, tuple) else (x,)
    models = [make(m) for m in models]
    for m in models: m.train()
    models[0].eval()
    before = [facts(m) for m in models]
    pairs = match_feature_layers(*models, x)
    torch.testing.assert_close([facts(m) for m in models], before, rtol=0, atol=0)
    assert pairs == {'student': in_student, 'teacher': in_teacher}
    table = pairs.table()
    for who in 'student', 'teacher': assert table[f'{who} depth'].is_monotonic_increasing
    for m,names in zip(models, (in_student, in_teacher)):
        with as_found(m), Capture(m, names) as c: m(*xb)
        with as_found(m): want = states(m, names, xb)
        torch.testing.assert_close(c.maps, {n:want[n] for n in names}, rtol=0, atol=0)


@pytest.mark.parametrize('name',
                         ['resnet26d', 'resnetv2_50', 'regnetx_002', 'mobilenetv2_050', 'convnext_atto',
                          'edgenext_xx_small', 'pvt_v2_b0', 'efficientvit_b0'])
def test_the_general_rules_find_what_timm_declares(name):
    "The names may differ (`stages` returns what `stages.3` does), the tensors may not"
    m,x = timm.create_model(name, pretrained=False),image(64)
    told,declared = find_stages(m, x),[o['module'] for o in m.feature_info]
    assert [s.name for s in told] == declared
    del m.feature_info
    found = {s.level:s.name for s in find_stages(m, x)}
    with as_found(m), Capture(m, declared) as c1, Capture(m, [found[s.level] for s in told]) as c2: m(x)
    torch.testing.assert_close(list(c1.maps.values()), list(c2.maps.values()), rtol=0, atol=0)

def test_there_are_enough_of_them(): assert len({c[:2] for c in CASES}) >= 25

def test_one_forward_of_each():
    models,calls = [plain_cnn(4, 8, 8) for _ in range(2)],[]
    for m in models: m.register_forward_hook(lambda m, a, o: calls.append(m))
    match_feature_layers(*models, torch.randn(1, 1, 8, 8))
    assert calls == models

def test_learners_and_wrappers():
    s,t = plain_cnn(4, 8),plain_cnn(8, 16)
    learn = Learner(DataLoaders([], []), t, loss_func=CrossEntropyLossFlat())
    want = {'student': ['2', '5'], 'teacher': ['2', '5']}
    x = torch.randn(1, 1, 8, 8)
    assert match_feature_layers(s, learn, x) == want
    assert match_feature_layers(nn.DataParallel(s), torch.compile(t, backend='eager'), x) == want

@pytest.mark.parametrize('m,x',
                         [(nn.Linear(3, 2), torch.randn(2, 3)),
                          (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(2, 3, 2, 2))])
def test_a_model_without_hidden_states_is_refused(m, x):
    with pytest.raises(ValueError, match=r'nothing to pair: the teacher \(\w+\) has no hidden state'):
        match_feature_layers(mlp(x[0].numel(), 4), m, x)

def test_a_failing_model_is_left_as_it_was():
    s,m,x = plain_cnn(4, 8),plain_cnn(4, 8).append(nn.Conv2d(3, 3, 1)),torch.randn(1, 1, 8, 8)
    m[1].eval()
    before = facts(m)
    with pytest.raises(RuntimeError, match='Expected 3D'): match_feature_layers(s, m, x)
    torch.testing.assert_close(facts(m), before, rtol=0, atol=0)

def test_a_recurrent_model_keeps_its_hidden_state():
    m,state = make('lm:2'),lambda m: [t.clone() for layer in m[0].hidden for t in layer]
    m(words)
    before = state(m)
    match_feature_layers(m, make('lm:3'), words)
    torch.testing.assert_close(state(m), before, rtol=0, atol=0)

def test_the_result_prints_as_the_plain_dict_and_shows_as_a_table():
    pairs = match_feature_layers(plain_cnn(4, 8), plain_cnn(4, 16), torch.randn(1, 1, 8, 8))
    assert str(pairs) == repr(pairs) == "{'student': ['2', '5'], 'teacher': ['2', '5']}"
    assert pairs.table()['adapter'].tolist() == ['none', 'channels']
    assert pairs.table()['student map'].tolist() == ['4x8x8', '8x4x4']
    assert '<table' in pairs._repr_html_() and '16x4x4' in pairs._repr_html_()
    assert layer_pairs(pairs) == (['2', '5'], ['2', '5'])
    twin = copy.deepcopy(pairs)
    assert twin == pairs and twin.table().equals(pairs.table())
