"Weights from files as trainings, wrappers and strangers write them"
import os

import fastai.callback.progress  # noqa: F401 gives Learner `no_bar`
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torchvision import models as tv
from torchvision.models._api import WeightsEnum

from fasterai.data.archs import load_weights, make_model, with_new_head
from fasterai.data.digits import digits_dls


def test_names_of_timm_say_that_it_is_missing(monkeypatch):
    monkeypatch.setattr('fasterai.data.archs._timm', lambda: None)
    with pytest.raises(ValueError, match=r"^'timm:resnet18' needs timm: pip install 'fasterai-distill\[timm\]'$"):
        make_model('timm:resnet18', 3)
    with pytest.raises(ValueError, match="did you mean 'resnet18'.*need timm installed"): make_model('resnet-18', 3)


def model(seed=0, c=10):
    torch.manual_seed(seed)
    return make_model('digits_net4', c)

def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

wrappers = dict(bare=lambda sd: sd, state_dict=lambda sd: {'epoch': 3, 'state_dict': sd},
                model_state_dict=lambda sd: {'model_state_dict': sd, 'loss': .5},
                model=lambda sd: {'model': sd, 'optimizer': {'state': {}}},
                twice=lambda sd: {'model': {'state_dict': sd}},
                module=lambda sd: {f'module.{k}': v for k,v in sd.items()},
                compiled=lambda sd: {f'_orig_mod.{k}': v for k,v in sd.items()},
                both=lambda sd: {'state_dict': {f'module._orig_mod.{k}': v for k,v in sd.items()}})

@pytest.mark.parametrize('how', wrappers)
def test_a_state_dict_is_found_where_trainings_put_it(tmp_path, how):
    torch.save(wrappers[how](model(1).state_dict()), tmp_path/'w.pth')
    m = model()
    assert not same(m, model(1))
    assert load_weights(m, tmp_path/'w.pth') is m and same(m, model(1))

@pytest.mark.parametrize('with_opt', [True, False])
def test_what_a_learner_saved(tmp_path, with_opt):
    learn = Learner(digits_dls(64, 32, 'cpu'), model(1), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    f = learn.save('w', with_opt=with_opt)
    assert same(load_weights(model(), f), learn.model)

@pytest.mark.parametrize('names', [('module', 'model'), ('module',), ('model', 'state_dict_')])
def test_a_model_with_layers_called_module_or_model(tmp_path, names):
    def make(): return nn.ModuleDict({n: nn.Linear(2, 2) for n in names})
    a,b = make(),make()
    torch.save(a.state_dict(), tmp_path/'w.pth')
    assert same(load_weights(b, tmp_path/'w.pth'), a)

def test_safetensors(tmp_path):
    st = pytest.importorskip('safetensors.torch')
    f = tmp_path/'w.safetensors'
    st.save_file(model(1).state_dict(), f)
    assert same(load_weights(model(), f), model(1))
    os.truncate(f, f.stat().st_size//2)
    m = model()
    with pytest.raises(ValueError, match='w.safetensors is no state dict'): load_weights(m, f)
    assert same(m, model())


class Evil:
    def __reduce__(self): return os.system, ('echo evil',)

odd = dict(a_list=([1, 2], 'holds no state dict, but a list'), nothing=({}, 'holds no state dict'),
           a_tensor=(torch.ones(2), 'holds no state dict, but a Tensor'),
           numbers=({k:5 for k in model().state_dict()}, 'holds no weights'),
           nan=({k:v*float('nan') for k,v in model().state_dict().items()}, 'are NaN'),
           inf=({k:v/0 for k,v in model(1).state_dict().items()}, 'are NaN or infinite'),
           other=(model(c=3).state_dict(), r'other shapes: 5.weight \(3, 8\) for \(10, 8\)'),
           part=(dict(list(model().state_dict().items())[:3]), 'missing: '), code=(Evil(), 'read safely'),
           no_names=({1: torch.ones(1)}, 'unknown: 1'))

@pytest.mark.parametrize('what', odd)
def test_other_files_are_refused_by_name_and_the_model_stays(tmp_path, what, capfd):
    content,said = odd[what]
    torch.save(content, tmp_path/'odd.pth')
    m = model()
    with pytest.raises(ValueError, match=said) as e: load_weights(m, tmp_path/'odd.pth')
    assert 'odd.pth' in str(e.value) and same(m, model()) and 'evil' not in capfd.readouterr().out

def test_a_file_of_noise(tmp_path):
    (tmp_path/'noise.pth').write_bytes(os.urandom(100))
    with pytest.raises(ValueError, match='noise.pth is no state dict'): load_weights(model(), tmp_path/'noise.pth')


def test_a_mask_that_the_model_has_itself_is_no_spoilt_weight(tmp_path):
    class Causal(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer('mask', torch.full((4, 4), -torch.inf).triu(1))
    torch.save(Causal().state_dict(), tmp_path/'m.pth')
    load_weights(Causal(), tmp_path/'m.pth')
    spoilt = Causal().state_dict() | {'weight': torch.full((4, 4), torch.nan)}
    torch.save(spoilt, tmp_path/'m.pth')
    with pytest.raises(ValueError, match='NaN or infinite: weight'): load_weights(Causal(), tmp_path/'m.pth')


def test_weights_with_a_second_head_give_logits_in_training(monkeypatch):
    state = tv.inception_v3(weights=None, init_weights=False).state_dict()
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda self, *args, **kwargs: state)
    m = make_model('inception_v3', 7, pretrained=True)
    kept = m.state_dict()
    assert all(torch.equal(state[k], v) for k,v in kept.items() if not k.startswith('fc'))
    with torch.device('meta'): out = m.to('meta').train()(torch.empty(2, 3, 299, 299))
    assert out.shape==(2, 7)

def test_a_name_of_timm_without_weights_is_refused():
    timm = pytest.importorskip('timm')
    name = next(n for n in timm.list_models('beit*') if not timm.is_model_pretrained(n))
    with pytest.raises(ValueError, match=f'pretrained: there are no weights of {name}'): make_model(name, 3, True)

def test_a_head_is_replaced_where_it_is():
    m = nn.Sequential(nn.Linear(2, 3), nn.ModuleDict(dict(head=nn.Linear(3, 1000, bias=False))))
    assert with_new_head(m, 5) is m and (m[1].head.out_features, m[1].head.bias)==(5, None)
    with pytest.raises(ValueError, match='no layer of 1000'): with_new_head(nn.Linear(2, 3), 5)
    assert with_new_head(nn.Sequential(nn.Conv2d(2, 1000, 1)), 5)[0].out_channels==5

@pytest.mark.parametrize('prefix', ['module._orig_mod.', '_orig_mod.module.', 'module.module.'])
def test_wrappers_in_any_order(tmp_path, prefix):
    m = model()
    torch.save({prefix+k: v+1 for k,v in m.state_dict().items()}, tmp_path/'m.pth')
    loaded = load_weights(model(), tmp_path/'m.pth').state_dict()
    assert all(torch.equal(loaded[k], v+1) for k,v in m.state_dict().items())

def test_weights_of_before_batches_were_counted(tmp_path):
    def norms(): return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    old = {k:v+1 for k,v in norms().state_dict().items() if not k.endswith('num_batches_tracked')}
    torch.save(old, tmp_path/'m.pth')
    m = load_weights(norms(), tmp_path/'m.pth')
    assert all(torch.equal(m.state_dict()[k], v) for k,v in old.items()) and m[1].num_batches_tracked==0
