"A student that torchao's PT2E has quantized: it learns, freezes, is saved and is shipped like one of FX"
import sys
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.schedule import *
from fastai.learner import load_learner
from fastai.torch_core import set_seed

pytest.importorskip('torchao')
from fasterai.core.seeds import same_start
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.layers.int8 import fake_quantizers
from fasterai.distill.layers.matching import match_feature_layers
from fasterai.distill.losses import Attention, SoftTarget
from fasterai.distill.ship.quantize import FreezeQuantizers, quantize_aware, validate_int8
from fasterai.distill.teacher.teacher import Teacher
from helpers import Boom, flags, n_hooks, same, state
from ship_helpers import quiet_learner

FX = 'torch.ao.quantization.quantize_fx'


def ranges(model): return {k:v.clone() for k,v in model.state_dict().items() if '_val' in k or k.endswith('scale')}
def looking(model): return any(m.observer_enabled[0] for m in fake_quantizers(model))
def soft(learn): return KD(learn, partial(SoftTarget, T=1), weight=1, task_weight=0)

@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = quiet_learner(digits_dls(1190, bs=128), digits_net(16), lr=1e-2)
    same_start(learn.dls, 0)
    with learn.no_logging(): learn.fit_one_cycle(8)
    return learn

def quantized(learn):
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, FX, None)
        q = quantize_aware(learn)
    q.remove_cbs([cb for cb in q.cbs if cb.name=='progress'])
    return q

@pytest.fixture(scope='module')
def before(learn): return state(learn.model),flags(learn.model)

@pytest.fixture(scope='module')
def q(learn, before):
    "Distilled for two epochs"
    found = quantized(learn)
    same_start(found.dls, 0)
    with found.no_logging(): found.fit_one_cycle(2, 1e-3, cbs=[soft(learn), FreezeQuantizers()])
    return found

def answers(learn):
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad(): return x,learn.model.eval()(x)


def test_accuracy_and_the_original(learn, q, before):
    "Within a point of full precision"
    ints = q.to_int8()
    assert q.quantized==['0.0', '1.0', '2.0', '5']==ints.quantized
    full = learn.validate()[1]
    assert abs(q.validate()[1]-full)<=.01 and abs(validate_int8(ints, learn)['accuracy']-full)<=.01
    x,z = answers(q)
    assert (ints(x)-z).norm()<1e-3*z.norm()
    assert same(state(learn.model), before[0]) and not n_hooks(learn.model)

def test_ranges_follow_training_alone(learn, q):
    assert len(learn.dls.train_ds)%128 and len(learn.dls.valid_ds)%128 # the last batches are smaller
    was = state(q.model)
    q.validate()
    q.get_preds()
    assert same(state(q.model), was) and not looking(q.model)
    seen = []
    class Look(Boom):
        def __init__(self): super().__init__('after_pred', None, order=50)
        def __call__(self, name):
            if name=='after_pred': seen.append((self.learn.training, looking(self.learn.model), len(self.learn.pred)))
    learn.dls.train.drop_last = False
    try:
        with q.no_logging(): q.fit(1, 1e-4, cbs=Look())
    finally: learn.dls.train.drop_last = True
    assert all(training==on for training,on,_ in seen) and {t for t,*_ in seen}=={True, False}
    assert {n for t,_,n in seen if t}=={128, len(learn.dls.train_ds)%128}
    assert not same(ranges(q.model), was) and not looking(q.model)

def test_freeze(q):
    norm = q.model.get_submodule('0.1')
    was = norm.running_mean.clone()
    with q.no_logging(): q.fit(1, 1e-4, cbs=FreezeQuantizers(0, 0))
    assert torch.equal(norm.running_mean, was)
    with q.no_logging(): q.fit(1, 1e-4)
    assert not torch.equal(norm.running_mean, was)

@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'before_validate'])
def test_nothing_left_behind(learn, q, event):
    n = len(q.cbs)
    with pytest.raises(RuntimeError, match='memory'), q.no_logging():
        at = 0 if 'valid' in event else 1
        q.fit(1, 1e-4, cbs=[soft(learn), FreezeQuantizers(0, 0), Boom(event, RuntimeError('memory'), at=at)])
    assert not looking(q.model) and not n_hooks(q.model) and len(q.cbs)==n
    assert all(m.training==q.model.training for m in q.model.modules())

def test_lr_find_restores(q, tmp_path):
    q.path,was = tmp_path,state(q.model)
    with q.no_bar(): q.lr_find(num_it=6, show_plot=False)
    assert same(state(q.model), was) and not looking(q.model)

def test_losses_on_maps_are_refused(learn, q):
    for f in (lambda: match_feature_layers(q, learn), lambda: q.fit(1, cbs=KD(learn, Attention, {'1': '1'}))):
        with pytest.raises(ValueError, match='a graph of operations, and its layers are never called'): f()

def test_quantized_already(q):
    with pytest.raises(ValueError, match='quantized already'): quantize_aware(q)

@pytest.mark.filterwarnings('ignore:load_learner')
def test_saved(q, tmp_path):
    q.path = tmp_path
    x,z = answers(q)
    q.export('q.pkl')
    found = load_learner(tmp_path/'q.pkl')
    with torch.no_grad(): assert torch.equal(found.model.eval()(x), z)
    assert found.quantized==q.quantized and torch.equal(found.to_int8()(x), q.to_int8()(x))
    q.save('weights')
    with torch.no_grad(): next(q.model.parameters()).add_(1)
    q.load('weights')
    assert torch.equal(answers(q)[1], z)

@pytest.mark.parametrize('batch', [None, 3])
def test_onnx_file(q, tmp_path, batch):
    for n in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(n)
    from fasterai.distill.ship.export import export_student
    from fasterai.distill.ship.onnx_file import OnnxFile
    was = state(q.model)
    file = export_student(q, tmp_path/'q.onnx', int8=True, batch=batch)
    (x,z),run = answers(q),OnnxFile(file)
    with torch.no_grad(): got = torch.cat([run(o) for o in x.split(batch or len(x))])
    assert (got-z).norm()<.05*z.norm() and (got.argmax(1)==z.argmax(1)).float().mean()>=.99
    assert same(was, state(q.model))
    import onnx
    held = [onnx.numpy_helper.to_array(o) for o in onnx.load(file).graph.initializer]
    assert all(o.dtype==np.int8 for o in held if o.ndim>1)

def test_teacher_of_integers(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, FX, None)
    x,z = answers(learn)
    got = Teacher(learn.model, dtype='int8').compute(x)[0]
    assert 0<(got-z).norm()<.1*z.norm()
