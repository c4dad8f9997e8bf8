"From a Learner to a file: every kind of head and input, nothing changed, nothing half-written"
import json, os

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock
import fastai.callback.schedule
from fastai.losses import BCEWithLogitsLossFlat
from fastai.metrics import accuracy
from fastai.tabular.core import Categorify
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.model import TabularModel
from fastai.vision.learner import create_vision_model
from torch import nn

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.ship import export
from fasterai.distill.ship.check import check_file
from fasterai.distill.ship.export import export_student
from fasterai.distill.ship.onnx_file import OnnxFile
from helpers import data, flags, learner, net, same, state
from ship_helpers import quiet_learner


def answers(file, model, x): return torch.allclose(OnnxFile(file)(x), model.eval()(x), atol=1e-4)


def test_vision_learners_own_heads(tmp_path):
    torchvision = pytest.importorskip('torchvision')
    model = create_vision_model(torchvision.models.resnet18, 3, pretrained=False, weights=None)
    file = export_student(learner(model), tmp_path/'r.onnx')
    assert answers(file, model, torch.randn(5, 3, 8, 8))
    assert file.stat().st_size < 1.01*sum(4*p.numel() for p in model.parameters())+1e5
    assert sorted(o.name for o in tmp_path.iterdir())==['r.json', 'r.onnx'] # one file holds the weights


@pytest.mark.parametrize('training', [True, False])
def test_the_student_is_left_as_it_was(tmp_path, training):
    learn = learner()
    learn.model.train(training)
    learn.model[0].eval()
    before,modes,stream = state(learn.model),flags(learn.model),torch.get_rng_state()
    export_student(learn, tmp_path/'s.onnx', int8=True)
    assert same(before, learn.model.state_dict()) and flags(learn.model)==modes
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())


def test_the_description_lies_inside_and_beside_and_names_no_folder_of_this_machine(tmp_path):
    dls = digits_dls(64)
    file = export_student(quiet_learner(dls, digits_net(4)), tmp_path/'s.onnx', opset=18)
    said = json.loads((tmp_path/'s.json').read_text())
    proto = onnx.load(file)
    assert json.loads(next(o.value for o in proto.metadata_props if o.key=='description'))==said
    assert said['file']==dict(name='s.onnx', opset=18, int8=False, calibrated_on=None)
    assert said['classes']==list('0123456789') and said['output']['activation']=='softmax'
    assert {'fasterai', 'torch', 'onnx', 'onnxruntime'}<=said['versions'].keys()
    for folder in (os.getcwd(), os.path.dirname(torch.__file__)): assert folder.encode() not in file.read_bytes()


def test_several_inputs(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(colour=rng.choice(list('rgb'), 96), size=rng.random(96), kind=rng.choice(list('xy'), 96)))
    dls = TabularDataLoaders.from_df(table, procs=[Categorify], cat_names=['colour'], cont_names=['size'],
                                     y_names='kind', y_block=CategoryBlock(), bs=8, valid_idx=list(range(64, 96)))
    model = TabularModel([(4, 3)], 1, 2, [8])
    learn = quiet_learner(dls, model)
    cats,conts,_ = dls.valid.one_batch()
    for int8,tol in (False, 1e-4), (True, .2):
        file = OnnxFile(export_student(learn, tmp_path/'t.onnx', int8=int8))
        assert torch.allclose(file(cats, conts), model.eval()(cats, conts), atol=tol)
    assert [o['name'] for o in file.description['inputs']]==['input_0', 'input_1']
    with pytest.raises(ValueError, match=r'takes 2 input\(s\), input_0, input_1, and the batch has 1'): file(cats)


class Tuple(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return self.net(x),x


class Dict(Tuple):
    def forward(self, x): return dict(out=self.net(x))


def test_outputs_that_are_not_a_tensor(tmp_path):
    x = torch.randn(3, 3, 8, 8)
    two = Tuple()
    assert answers(export_student(learner(two), tmp_path/'a.onnx'), two.net, x)
    named = Dict()
    with pytest.raises(TypeError, match=r"the student must return a tensor.*pass select="):
        export_student(learner(named), tmp_path/'b.onnx')
    assert answers(export_student(learner(named), tmp_path/'b.onnx', select=lambda o: o['out']), named.net, x)


@pytest.mark.parametrize('batch', [1, 3, 64])
def test_a_fixed_batch_is_calibrated_on_as_many_samples(tmp_path, batch, monkeypatch):
    seen = []
    def noting(proto, batches):
        seen.extend(b['input'] for b in batches)
        return proto
    monkeypatch.setattr(export, '_in_8_bits', noting)
    learn = learner(dls=data(50))
    export_student(learn, tmp_path/'s.onnx', int8=True, calibrate=40, batch=batch)
    shown = {x.tobytes() for b in seen for x in b}
    assert len(shown)==40 and all(len(b)==batch for b in seen)


def test_a_fixed_batch(tmp_path):
    file = OnnxFile(export_student(learner(), tmp_path/'s.onnx', batch=3, int8=True))
    assert file(torch.randn(3, 3, 8, 8)).shape==(3, 3)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(file(x), torch.cat([file(x[:3]), file(x[[3, 4, 4]])[:2]]))
    with pytest.raises(ValueError, match=r'made for \(3, 3, 8, 8\).*the batch has \(2, 3, 9, 8\)'):
        file(torch.randn(2, 3, 9, 8))


class OldWeightNorm(nn.Module):
    "Whose weight, after a step, is what came out of an operation"
    def __init__(self):
        super().__init__()
        self.fc = nn.utils.weight_norm(nn.Linear(192, 3))
    def forward(self, x): return self.fc(x.flatten(1))


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('make, dtype', [(net, torch.float64), (net, torch.bfloat16), (OldWeightNorm, torch.float32)])
def test_other_floats_and_weights_that_are_computed(tmp_path, make, dtype):
    "A file computes in fp32, be the student what it may; a step of the training was before"
    dls = data()
    for ds in (dls.train_ds, dls.valid_ds): ds.tensors = ds.tensors[0].to(dtype),ds.tensors[1]
    learn = learner(make().to(dtype), dls, metrics=accuracy)
    before,x = state(learn.model),dls.valid_ds[:][0]
    learn.model.eval()(x).sum().backward()
    with torch.no_grad(): want = learn.model.eval()(x).float()
    for int8 in (False, True):
        file = OnnxFile(export_student(learn, tmp_path/'s.onnx', int8=int8))
        assert (file(x)-want).norm()<(.1 if int8 or dtype==torch.bfloat16 else 1e-5)*want.norm()
        assert file.description['inputs'][0]['dtype']=='float32' and file.description['input']['height']==8
    assert same(before, state(learn.model)) and check_file(file.path, learn, min_time=.01).same>=28


# What cannot be written

class Branch(nn.Module):
    def forward(self, x): return x if x.sum()>0 else -x


class SizeInCode(nn.Module):
    def forward(self, x): return x.reshape(8, 8)


class Noisy(nn.Module):
    def forward(self, x): return x+torch.rand_like(x)


class NoOperation(nn.Module):
    def forward(self, x): return x*torch.linalg.svdvals(x[:, None])


@pytest.mark.parametrize('part', [Branch, SizeInCode, pytest.param(Noisy, marks=pytest.mark.slow),
                                  pytest.param(NoOperation, marks=pytest.mark.slow)])
def test_the_part_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, part):
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(192, 8), part()), nn.Linear(8, 3))
    learn = learner(model, data(bs=8))
    old = tmp_path/'s.onnx'
    old.write_bytes(b'of before')
    with pytest.raises(ValueError, match=rf"its part '1.1', a {part.__name__}, is why.*Nothing was written"):
        export_student(learn, old)
    assert old.read_bytes()==b'of before' and [o.name for o in tmp_path.iterdir()]==['s.onnx']


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch):
    file = export_student(learner(), tmp_path/'s.onnx')
    before = file.read_bytes()
    def full(fd): raise OSError('no space left')
    monkeypatch.setattr('fasterai.core.files.os.fsync', full)
    with pytest.raises(OSError, match='no space'): export_student(learner(net(seed=1)), file)
    assert file.read_bytes()==before and sorted(o.name for o in tmp_path.iterdir())==['s.json', 's.onnx']


@pytest.mark.parametrize('args, what', [
    (dict(path='s.pt'), "path must end with .onnx, got 's.pt'"), (dict(opset=11), 'opset must be 18 or more'),
    (dict(batch=0), 'batch must be a whole number from 1 on, got 0'),
    (dict(batch=1.5), 'batch must be a whole'), (dict(int8=True, calibrate=float('nan')), 'got nan'),
    (dict(int8=True, calibrate=31), 'calibrate: got 31.*fewer than 32')])
def test_arguments_that_make_no_sense(tmp_path, monkeypatch, args, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=what): export_student(learner(), **args)
    assert not list(tmp_path.iterdir())


def test_too_few_pictures_to_calibrate(tmp_path):
    with pytest.raises(ValueError, match='training set has 16 samples.*fewer than 32'):
        export_student(learner(dls=data(16)), tmp_path/'s.onnx', int8=True)
    assert not list(tmp_path.iterdir())


def test_nothing_to_quantize(tmp_path):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match='no convolution and no linear layer'):
        export_student(learner(model), tmp_path/'s.onnx', int8=True)


def test_a_missing_package_is_said_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'find_spec', lambda name: None if name=='onnxscript' else 1)
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'fasterai-distill\[export\]'"):
        export_student(learner(), tmp_path/'s.onnx')


def test_calibration_is_on_unaugmented_pictures_of_all_classes_and_the_same_each_time(tmp_path):
    dls = digits_dls(400)
    learn = quiet_learner(dls, digits_net(4))
    found = [np.concatenate([b['input'] for b in export._calibration(learn, ['input'], 100, 32)]) for _ in range(2)]
    assert found[0].shape==(100, 1, 8, 8) and np.array_equal(*found)
    train = np.stack([dls.train_ds[i][0].numpy() for i in range(400)]).reshape(400, -1)
    where = [int(np.flatnonzero((train==o.ravel()).all(1))[0]) for o in found[0]]
    assert len({int(dls.train_ds[i][1]) for i in where})==10 and max(where)>300


def test_eight_bits_are_smaller_and_about_as_good(tmp_path):
    model = digits_net(32)
    learn = quiet_learner(digits_dls(), model, lr=1e-2)
    learn.fit_one_cycle(2)
    files = {int8: export_student(learn, tmp_path/f'{int8}.onnx', int8=int8) for int8 in (False, True)}
    assert files[True].stat().st_size < .35*files[False].stat().st_size
    x,y = learn.dls.valid.one_batch()
    full,eight = ((OnnxFile(f)(x).argmax(1)==y).float().mean() for f in files.values())
    assert full>.9 and abs(full-eight)<=.01
    ops = {n.op_type for n in onnx.load(files[True]).graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'}<=ops and 'BatchNormalization' not in ops


def test_several_labels_at_once(tmp_path):
    y = torch.randint(0, 2, (32, 3)).float()
    learn = learner(dls=data(y=y), loss_func=BCEWithLogitsLossFlat(thresh=.3))
    learn.dls.vocab = ['a', 'b', 'c']
    file = export_student(learn, tmp_path/'s.onnx')
    assert OnnxFile(file).description['output']==dict(name='logits', axis=-1, activation='sigmoid', threshold=.3)
    assert OnnxFile(file).description['classes']==['a', 'b', 'c']
    x = learn.dls.valid.one_batch()[0]
    assert answers(file, learn.model, x)


def test_without_data_there_is_nothing_to_go_by(tmp_path):
    learn = quiet_learner(None, net())
    with pytest.raises(ValueError, match='no validation data'): export_student(learn, tmp_path/'s.onnx')
