"A student that was trained to round becomes a file of integers with the scales that it has learned"
import json

import numpy as np
import pytest
import torch
from fastai.callback.schedule import *
from torch import nn

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.ship import export
from fasterai.distill.ship.check import check_file
from fasterai.distill.ship.export import export_student
from fasterai.distill.ship.onnx_file import OnnxFile
from fasterai.distill.ship.predictor import Predictor
from fasterai.distill.ship.quantize import quantize_aware
from fasterai.distill.training.views import StudentSees
from helpers import flags, same, state
from ship_helpers import quiet_learner

pytestmark = pytest.mark.skipif('x86' not in torch.backends.quantized.supported_engines, reason='no kernels')


class Residual(nn.Module):
    "What a ResNet is made of, in small"
    def __init__(self, w=32):
        super().__init__()
        def conv(i, o, s=1): return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o))
        self.stem,self.a,self.b,self.c = conv(1, w),conv(w, w),conv(w, w),conv(w, 2*w, 2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*w, 10))
    def forward(self, x):
        x = self.stem(x).relu()
        x = (x+self.b(self.a(x).relu())).relu()
        return self.head(self.c(x).relu())


@pytest.fixture(scope='module')
def students():
    torch.manual_seed(0)
    learn = quiet_learner(digits_dls(600), Residual(), lr=1e-2)
    with learn.no_logging(): learn.fit_one_cycle(4)
    q = quantize_aware(learn)
    q.remove_cbs([cb for cb in q.cbs if cb.name=='progress'])
    with q.no_logging(): q.fit_one_cycle(1, 1e-3)
    return learn,q

@pytest.fixture(scope='module')
def file(students, tmp_path_factory):
    return export_student(students[1], tmp_path_factory.mktemp('own')/'q.onnx', int8=True)

def answers(learn):
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad(): return x,learn.model.eval()(x)


def test_classes_are_those_of_the_student_that_rounds(students, file):
    _,q = students
    x,wanted = answers(q)
    z = OnnxFile(file)(x)
    assert (z.argmax(1)==wanted.argmax(1)).float().mean()>=.99 # 600 digits
    assert (z-wanted).norm()/wanted.norm()<.05
    ints = q.to_int8()(x)
    assert (z.argmax(1)==ints.argmax(1)).float().mean()>=.99 and (z-ints).norm()/ints.norm()<.05

def test_ranges_that_were_hardly_seen_end_alike_in_the_student_its_integers_and_the_file(tmp_path):
    "Kernels know twice the range on x86: integers and file were .41 away, of answers up to .27"
    torch.manual_seed(0)
    learn = quiet_learner(digits_dls(600), digits_net(8), lr=1e-2)
    q = quantize_aware(learn)
    q.remove_cbs([cb for cb in q.cbs if cb.name=='progress'])
    with q.no_logging(): q.fit_one_cycle(1, 5e-2)
    x,rounded = answers(q)
    file = OnnxFile(export_student(q, tmp_path/'q.onnx', int8=True))
    with torch.no_grad(): found = dict(integers=q.to_int8()(x), file=file(x))
    for got in found.values():
        assert (got-rounded).abs().max()<.03*rounded.abs().max()
        assert (got.argmax(1)==rounded.argmax(1)).float().mean()>.98

def test_onnxruntime_computes_with_integers(file, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath,options.log_severity_level = str(tmp_path/'opt.onnx'),3
    ort.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    found = [n.op_type for n in onnx.load(tmp_path/'opt.onnx').graph.node]
    assert found.count('QLinearConv')==4 and {'QGemm', 'QLinearAdd'}<=set(found) and not {'Conv', 'Gemm'} & set(found)

def test_weights_are_whole_numbers_and_the_scales_those_of_the_training(students, file):
    q = students[1].model
    graph = onnx.load(file).graph
    held = {o.name: onnx.numpy_helper.to_array(o) for o in graph.initializer}
    assert all(o.dtype==np.int8 for o in held.values() if o.ndim>1) and file.stat().st_size<.5*_floats(students[0])
    scales = {float(m.scale.flatten()[0]) for m in q.modules() if hasattr(m, 'scale') and m.scale.numel()==1}
    asked = {held[n.input[1]].item() for n in graph.node if n.op_type=='QuantizeLinear'}
    assert asked and all(min(abs(a-s) for s in scales)<1e-7 for a in asked)

def _floats(learn): return sum(4*p.numel() for p in learn.model.parameters())

def test_what_is_said_and_checked(students, file):
    _,q = students
    said = json.loads(file.with_suffix('.json').read_text())
    assert said['file']['int8'] is True and said['file']['calibrated_on'] is None and said['classes'][:2]==['0', '1']
    check = check_file(file, q, min_time=.01)
    assert check.n==600 and check.same>=594 and not check.differs
    assert check.table.loc['q.onnx'].size_mb<check.table.loc['student'].size_mb
    x,wanted = answers(q)
    got = [i for _,i,_ in Predictor(file).batch(list(x[:8].numpy()))]
    assert got==OnnxFile(file)(x[:8]).argmax(1).tolist()

def test_the_student_is_left_as_it_was(students, tmp_path):
    _,q = students
    q.model.train()
    before,modes,stream = state(q.model),flags(q.model),torch.get_rng_state()
    export_student(q, tmp_path/'q.onnx', int8=True, batch=3)
    assert same(before, q.model.state_dict()) and flags(q.model)==modes and torch.equal(stream, torch.get_rng_state())
    assert OnnxFile(tmp_path/'q.onnx')(torch.rand(3, 1, 8, 8)).shape==(3, 10)

def test_views_and_some_layers(students, tmp_path):
    learn,_ = students
    learn.add_cb(StudentSees(lambda x: x.flip(-1)))
    try:
        q = quantize_aware(learn, layers=['a.0', 'c.0'])
        file = OnnxFile(export_student(q, tmp_path/'q.onnx', int8=True))
        x,_ = answers(q)
        with torch.no_grad(): wanted = q.model(x.flip(-1))
        assert (file(x).argmax(1)==wanted.argmax(1)).float().mean()>=.99
    finally: learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, StudentSees)])

def test_refused(students, tmp_path, monkeypatch):
    learn,q = students
    with pytest.raises(ValueError, match='pass int8=True, or export the Learner from which'):
        export_student(q, tmp_path/'q.onnx')
    with pytest.raises(ValueError, match='fewer bits than 8, which are simulated'):
        export_student(quantize_aware(learn, 3), tmp_path/'q.onnx', int8=True)
    ints = quiet_learner(learn.dls, q.to_int8())
    with pytest.raises(ValueError, match='integers already.*QuantizedLearner'): export_student(ints, tmp_path/'q.onnx')
    for f in (export_student, lambda m, path: check_file(path, m)):
        with pytest.raises(TypeError, match='learn must be a fastai Learner'): f(learn.model, tmp_path/'q.onnx')
    with pytest.raises(ValueError, match='a file, and was to be the folder'): export_student(q, __file__+'/q.onnx')
    (tmp_path/'d.onnx').mkdir()
    with pytest.raises(ValueError, match='is a folder'): export_student(q, tmp_path/'d.onnx', int8=True)
    (tmp_path/'d.onnx').rmdir()
    monkeypatch.setattr(export, '_refuse_other_answers', lambda *_, **__: (_ for _ in ()).throw(ValueError('are off')))
    with pytest.raises(ValueError, match='cannot be written as ONNX.*are off.*Nothing was written'):
        export_student(q, tmp_path/'q.onnx', int8=True)
    assert not list(tmp_path.iterdir())
