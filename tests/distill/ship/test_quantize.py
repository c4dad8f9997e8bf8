"A quantized copy learns like any other, its ranges follow the training alone, and it becomes integers"
import io
import pickle
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.callback import schedule
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

from fasterai.core.seeds import same_start
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.layers import int8
from fasterai.distill.layers.int8 import as_int8, calibrate, fake_quantized, fake_quantizers
from fasterai.distill.layers.matching import match_feature_layers
from fasterai.distill.losses import Attention, SoftTarget
from fasterai.distill.ship.quantize import (FreezeQuantizers, calibration_batches, quantize_aware, validate_int8)
from fasterai.distill.teacher.following import EMA
from fasterai.distill.training.views import StudentSees
from classes import Gone, named
from helpers import Boom, data, flags, learner, n_hooks, net, same, state


@pytest.fixture
def learn(): return learner(metrics=accuracy)

def ranges(model): return {k:v.clone() for k,v in model.state_dict().items() if '_val' in k or k.endswith('scale')}
def looking(model): return any(m.observer_enabled[0] for m in fake_quantizers(model))


def quantizers():
    "Those of a linear layer, on a backend that uses all eight bits"
    model = fake_quantized(nn.Sequential(nn.Linear(3, 2)), (torch.zeros(1, 3),), 'qnnpack')
    return model.get_submodule('0').weight_fake_quant,model.get_submodule('activation_post_process_0')

def test_reference_case():
    "A case computed in float64 by another program: weights by channel, activations affine"
    weight,activation = quantizers()
    w = torch.tensor([[0.0794, 2.1902, -0.1349], [0.1605, 0.4427, 0.6234]])
    a = torch.tensor([0.221, 0.3405, 0.5777, 0.404, 0.6033])
    for q in (weight, activation): q.observer_enabled[0] = 1
    got = weight(w)
    assert torch.allclose(weight.scale, torch.tensor([0.017245669291338583, 0.004908661417322834]))
    assert torch.allclose(got, torch.tensor([[0.08622834645669292, 2.1902, -0.13796535433070867],
                                             [0.16198582677165352, 0.4417795275590551, 0.6234]]), atol=1e-6)
    assert torch.equal((got/weight.scale[:, None]).round(), torch.tensor([[5., 127, -8], [33, 90, 127]]))
    got = activation(a)
    assert activation.scale.item()==pytest.approx(0.0023658823529411764) and activation.zero_point==0
    assert torch.equal((got/activation.scale).round(), torch.tensor([93., 144, 244, 171, 255]))

def test_reference_loss():
    "The divergence at temperature 1 alone, of a quantized student's logits"
    q = torch.tensor([[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031],
                      [3.4896, -1.5224, 0.6381], [-0.4987, 2.9242, -4.1203]])
    t = torch.tensor([[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835],
                      [1.0058, -2.4906, -2.1159], [-1.818, 1.1029, 4.5844]])
    y = torch.tensor([0, 2, 1, 1])
    assert SoftTarget(pred=q, teacher_pred=t, T=1).item()==pytest.approx(3.2410890977546467, abs=1e-5)
    def seed(T): return SoftTarget(pred=q, teacher_pred=t, T=T)+F.cross_entropy(q, y)
    assert seed(4).item()==pytest.approx(9.020204750954534, abs=1e-4)

def test_original_untouched_and_shared_with_nobody(learn):
    before,modes = state(learn.model),flags(learn.model)
    stream = torch.get_rng_state()
    for bits in (8, 3):
        q = quantize_aware(learn, bits)
        assert torch.equal(torch.get_rng_state(), stream)
        q.fit(1)
        torch.set_rng_state(stream)
    assert same(state(learn.model), before) and flags(learn.model)==modes and not n_hooks(learn.model)
    mine = {p.data_ptr() for p in learn.model.parameters()}
    assert not mine & {p.data_ptr() for p in q.model.parameters()}

@pytest.mark.parametrize('bits', [8, 4])
def test_close_to_the_original_before_any_training(learn, bits):
    learn.fit(2)
    x = torch.cat([b[0] for b in learn.dls.valid])
    want = learn.model.eval()(x)
    got = quantize_aware(learn, bits).model.eval()(x)
    assert (got-want).norm()/want.norm()<{8: .05, 4: .3}[bits]

def test_calibrated_on_all_of_the_data_though_files_are_sorted_by_class():
    "The first 64 pictures are dark, and the batches that are asked for are fewer than there are"
    x,y = torch.rand(256, 3, 8, 8, generator=torch.Generator().manual_seed(0)),torch.arange(256)//64%3
    x[:64] *= .1
    loaders = [TfmdDL(TensorDataset(x, y), bs=32, shuffle=s, num_workers=0) for s in (True, False)]
    learn = learner(net(8), DataLoaders(*loaders))
    learn.fit(3)
    xb = torch.cat([b[0] for b in calibration_batches(learn, 2)])
    assert len(xb)==64 and .2<(xb.amax((1, 2, 3))>.5).float().mean()<1
    assert torch.equal(xb, torch.cat([b[0] for b in calibration_batches(learn, 2)]))
    want = learn.model.eval()(x)
    def off(bits): return ((quantize_aware(learn, bits).model.eval()(x)-want).norm()/want.norm()).item()
    assert off(8)<.03 and off(8)<3*off(7) # the activations of 'x86' have seven bits, and there are more of them

def test_operations_in_floats_with_two_parameters_are_no_grids():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.head = nn.Conv2d(3, 8, 3),nn.Linear(8, 3)
            self.w,self.b = nn.Parameter(torch.rand(8)+.5),nn.Parameter(torch.rand(8))
        def forward(self, x): return self.head(F.group_norm(self.conv(x), 2, self.w, self.b).mean((2, 3)))
    torch.manual_seed(0)
    q = quantize_aware(learner(Normed()))
    q.fit(1)
    x = torch.randn(8, 3, 8, 8)
    want = q.model.eval()(x)
    assert ((q.to_int8()(x)-want).abs().max()/want.abs().max()).item()<.1 # a step of the last grid

def test_samples_are_counted_by_the_inputs_whatever_the_labels_are():
    pictures = [(torch.rand(3, 8, 8), dict(boxes=torch.zeros(4), name='a')) for _ in range(32)]
    dls = DataLoaders(*[TfmdDL(pictures, bs=16, num_workers=0) for _ in range(2)])
    assert [tuple(x.shape) for x, in calibration_batches(learner(net(8), dls), 2)]==[(16, 3, 8, 8)]*2

def test_calibrated_without_augmentation():
    still,moved = (calibration_batches(learner(net(c=3), named('abc', tfms=o)), 3, 24) for o in ([], [Gone()]))
    assert all(torch.equal(a, b) for (a,),(b,) in zip(still, moved)) and still[0][0].any()

def test_ranges_follow_training_alone(learn):
    q = quantize_aware(learn)
    was = ranges(q.model)
    q.validate()
    q.get_preds()
    q.model(torch.randn(4, 3, 8, 8)*100)
    assert same(ranges(q.model), was) and not looking(q.model)
    seen = []
    class Look(Boom):
        def __init__(self): super().__init__('after_pred', None, order=50)
        def __call__(self, name):
            if name=='after_pred': seen.append((self.learn.training, looking(self.learn.model)))
    q.fit(2, cbs=Look())
    assert all(training==on for training,on in seen) and {t for t,_ in seen}=={True, False}
    assert not same(ranges(q.model), was) and not looking(q.model)

@pytest.mark.parametrize('buffers', ['copy', 'average'])
def test_an_average_of_the_student_looks_at_nothing(learn, buffers):
    q,ema,seen = quantize_aware(learn),EMA(.5, buffers=buffers),[]
    class Look(Boom):
        def __init__(self): super().__init__('after_batch', None, order=50)
        def __call__(self, name):
            if name=='after_batch' and self.learn.training: seen.append((looking(q.model), looking(ema.model)))
    q.fit(1, cbs=[KD(ema, SoftTarget, valid=True), Look()])
    assert set(seen)=={(True, False)} and not looking(ema.model)
    was,x = state(ema.model),torch.randn(16, 3, 8, 8)*3
    answer = ema.model.eval()(x)
    assert same(state(ema.model), was)
    q.model.load_state_dict(was)
    assert torch.equal(q.model.eval()(x), answer) and torch.equal(q.model(x), answer)

def test_freeze(learn):
    q = quantize_aware(learn)
    bn = q.model.get_submodule('0.0').bn
    seen = []
    class Look(Boom):
        def __init__(self): super().__init__('after_pred', None, order=50)
        def __call__(self, name):
            if name=='after_pred' and self.learn.training:
                seen.append((self.learn.pct_train, looking(self.learn.model), bn.training))
    q.fit(4, cbs=[FreezeQuantizers(.5, .75), Look()])
    for pct,on,stats in seen: assert on==(pct<.5) and stats==(pct<.75)
    assert len({s[1:] for s in seen})==3
    seen.clear()
    q.fit(1, cbs=Look())
    assert all(on and stats for _,on,stats in seen)

@pytest.mark.parametrize('bits', [8, 4])
def test_batchnorms_that_the_user_has_frozen_stay_so(learn, bits):
    q = quantize_aware(learn, bits)
    for m in q.model.modules():
        if isinstance(m, nn.BatchNorm2d): m.requires_grad_(False)
    def statistics(): return {k:v.clone() for k,v in q.model.state_dict().items() if 'running' in k}
    was = statistics()
    with q.no_bar(), q.no_logging():
        q.fit(2, cbs=BnFreeze())
        assert was and same(was, statistics())
        q.fit(1)
    assert not any(torch.equal(v, was[k]) for k,v in statistics().items())

def test_freeze_batchnorms_with_learned_steps(learn):
    q = quantize_aware(learn, 3)
    bn = q.model[0][1]
    q.fit(1, cbs=FreezeQuantizers(batchnorm=0))
    assert bn.running_mean.equal(learn.model[0][1].running_mean)
    q.fit(1)
    assert not bn.running_mean.equal(learn.model[0][1].running_mean)

@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('memory'), CancelFitException()],
                         ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'before_validate'])
def test_nothing_left_behind(learn, exc, event):
    q = quantize_aware(learn)
    kd = KD(learn, Attention, match_feature_layers(q, learn))
    n = len(q.cbs)
    try: q.fit(1, cbs=[kd, FreezeQuantizers(0, 0), Boom(event, exc, at=0 if 'valid' in event else 1)])
    except (KeyboardInterrupt, RuntimeError): pass
    assert not looking(q.model) and not n_hooks(q.model, learn.model) and len(q.cbs)==n
    assert all(not m.freeze_bn for m in q.model.modules() if hasattr(m, 'freeze_bn'))
    found = next(cb for cb in q.cbs if hasattr(cb, 'looking'))
    assert (found.observe, found.batchnorm)==(1, 1)

def test_lr_find_restores(learn, tmp_path):
    for bits in (8, 3):
        q = quantize_aware(learn, bits)
        q.path = tmp_path
        before = state(q.model)
        with q.no_bar(): q.lr_find(num_it=6, show_plot=False)
        assert same(state(q.model), before) and not looking(q.model)

def test_distilled_as_by_hand(learn):
    "Two steps of the callback, and the same loop written out"
    q,hand = (quantize_aware(learn, 4) for _ in range(2))
    kd = KD(learn, partial(SoftTarget, T=1), weight=1, task_weight=0)
    batches = []
    class Note(Boom):
        def __init__(self): super().__init__('after_batch', None, order=50)
        def __call__(self, name):
            if name=='after_batch' and self.learn.training: batches.append(self.learn.xb[0].clone())
    q.fit(1, .05, wd=0, cbs=[kd, Note()])
    model,teacher = hand.model.train(),learn.model.eval()
    opt = SGD(list(model.parameters()), lr=.05, mom=0., wd=0)
    for x in batches:
        with torch.no_grad(): t = teacher(x)
        F.kl_div(F.log_softmax(model(x), 1), F.log_softmax(t, 1), log_target=True, reduction='batchmean').backward()
        opt.step()
        opt.zero_grad()
    a,b = state(q.model),state(model)
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-6) for k in a)

def test_weight_0_is_plain_training(learn):
    a,b = quantize_aware(learn),quantize_aware(learn)
    same_start(a.dls, 0)
    a.fit(1)
    same_start(b.dls, 0)
    b.fit(1, cbs=KD(learn, weight=0))
    assert same(state(a.model), state(b.model))

def test_int8(learn):
    learn.fit(2)
    q = quantize_aware(learn)
    found = q.to_int8()
    assert found.quantized==['0.0', '1.0', '4'] and not any(p.requires_grad for p in found.parameters())
    x = torch.cat([b[0] for b in learn.dls.valid])
    want,got = q.model.eval()(x),found(x)
    assert (got-want).norm()/want.norm()<.05
    assert torch.equal(found.to('meta').half()(x), got)
    assert set(validate_int8(found, learn))=={'valid_loss', 'accuracy'}
    loaded = torch.load(_saved(found), weights_only=False)
    assert torch.equal(loaded(x), got)

class Adding(nn.Module):
    "A sum, and a sigmoid, whose grid uses all eight bits"
    def __init__(self):
        super().__init__()
        self.stem,self.more,self.head = net()[0],nn.Conv2d(4, 4, 1),nn.Linear(4, 3)
    def forward(self, x):
        x = self.stem(x)
        x = (x+self.more(x))*x.sigmoid()
        return self.head(x.mean((2, 3)))

@pytest.mark.parametrize('make', [net, Adding])
def test_integers_cut_where_fake_quantizers_do(make):
    "Beyond the ranges, too, which the kernels of x86 know twice as wide: .24 and .09 of the answers were between them"
    q = quantize_aware(learner(make()))
    with torch.no_grad():
        for m in q.model.modules():
            if hasattr(m, 'bn'): m.bn.weight.mul_(4) # as a training that has outrun its ranges
    x = torch.cat([b[0] for b in q.dls.valid])
    int8 = q.to_int8()
    want,got,loaded = q.model.eval()(x),int8(x),torch.load(_saved(int8), weights_only=False)(x)
    assert (got-want).norm()/want.norm()<.03 and torch.equal(loaded, got)

def _saved(o):
    f = io.BytesIO()
    torch.save(o, f)
    f.seek(0)
    return f

def test_engine_comes_back(learn):
    was = torch.backends.quantized.engine
    q = quantize_aware(learn, backend='qnnpack')
    found = q.to_int8()
    found(torch.randn(2, 3, 8, 8))
    assert torch.backends.quantized.engine==was and found.backend=='qnnpack'

def test_some_layers(learn):
    q = quantize_aware(learn, layers=['1.0'])
    assert q.quantized==['1.0'] and q.to_int8().quantized==['1.0']
    assert quantize_aware(learn, 3, layers=['1.0']).quantized==['1.0']
    assert quantize_aware(learn, layers='1.0').quantized==quantize_aware(learn, 3, layers='1.0').quantized==['1.0']
    for bits in (8, 3):
        with pytest.raises(ValueError, match="unknown layer to quantize '1.1'"):
            quantize_aware(learn, bits, layers=['1.1'])

def test_view_stays(learn):
    learn.add_cb(StudentSees(lambda x: x.flip(-1)))
    q = quantize_aware(learn)
    assert any(isinstance(cb, StudentSees) for cb in q.cbs)
    def rows(x): return {tuple(o.flatten().tolist()) for o in x}
    assert rows(torch.cat([b[0] for b in calibration_batches(learn)]))==rows(learn.dls.train_ds[:][0].flip(-1))
    assert validate_int8(q.to_int8(), learn)['valid_loss']==pytest.approx(q.validate()[0], rel=.1)

def test_export(learn, tmp_path):
    q = quantize_aware(learn, 3)
    x = torch.randn(2, 3, 8, 8)
    q.path = tmp_path
    want = q.model.eval()(x)
    assert torch.equal(pickle.loads(pickle.dumps(q.model)).eval()(x), want)

class Branches(nn.Module):
    def forward(self, x): return x if x.mean()>.5 else -x

def test_refused(learn):
    for bits in (1, 9, 16, 2.5):
        with pytest.raises(ValueError, match='bits must be a whole number'): quantize_aware(learn, bits)
    with pytest.raises(ValueError, match="unknown backend 'x68'; did you mean 'x86'"):
        quantize_aware(learn, backend='x68')
    with pytest.raises(ValueError, match='simulated'): quantize_aware(learn, 4).to_int8()
    with pytest.raises(ValueError, match='has no quantizers'): learn.fit(1, cbs=FreezeQuantizers())
    with pytest.raises(ValueError, match='observe is a share'): FreezeQuantizers(observe=2)
    with pytest.raises(ValueError, match='n_batches must be 1 or more'): quantize_aware(learn, n_batches=0)
    few = learner(dls=data(n=16))
    with pytest.raises(ValueError, match='at least 32 samples .* got 16'): quantize_aware(few)
    odd = learner(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Branches()), *net()))
    with pytest.raises(ValueError, match=r"in its module '1.0', a Branches"): quantize_aware(odd)
    with pytest.raises(TypeError, match='must be a fastai Learner.*got Sequential; put it into one'):
        quantize_aware(learn.model)
    with pytest.raises(ValueError, match='no layer that can be quantized'):
        quantize_aware(learner(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Softmax(1))))
    for bits,dtype in ((8, torch.float64), (3, torch.bfloat16)):
        with pytest.raises(ValueError, match=f"network's '0.0' computes in {dtype}: pass a Learner whose network and"):
            quantize_aware(learner(net().to(dtype)), bits)
    for other in (quantize_aware(learn), quantize_aware(learn, 3), learner(quantize_aware(learn).to_int8())):
        with pytest.raises(ValueError, match='quantized already'): quantize_aware(other)
    q = quantize_aware(learn)
    q.add_cb(MixedPrecision())
    with pytest.raises(ValueError, match='to_fp32'): q.fit(1)

@pytest.mark.filterwarnings('ignore:.*norm')
@pytest.mark.parametrize('bits', [3, 8])
@pytest.mark.parametrize('bind', [partial(prune.l1_unstructured, name='weight', amount=.5), nn.utils.weight_norm,
                                  nn.utils.spectral_norm])
def test_weights_that_a_hook_computes_anew_are_refused(bind, bits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    bind(model[3])
    with pytest.raises(ValueError, match="'3' computes its weight from others.*prune"):
        quantize_aware(learner(model), bits)
    assert quantize_aware(learner(model), 3, layers=['1', '5']).quantized==['1', '5']


def test_without_torchs_quantization(learn, monkeypatch):
    for n in ('torch.ao.quantization.quantize_fx', 'torchao', 'torchao.quantization'):
        monkeypatch.setitem(sys.modules, n, None)
    with pytest.raises(ImportError, match='pip install torchao, or quantize with bits<8'): quantize_aware(learn)
    assert quantize_aware(learn, 3).quantized


def test_a_learner_from_a_file_says_that_it_makes_no_integers(tmp_path):
    q = quantize_aware(learner(digits_net(4), digits_dls(100)))
    q.path = tmp_path
    q.export('q.pkl')
    again = load_learner(tmp_path/'q.pkl')
    with pytest.raises(ValueError, match='call to_int8 or export_student before the Learner is saved'): again.to_int8()
