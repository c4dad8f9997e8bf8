"The command's --onnx and --int8: it ends with the file and its check"
import json

import pytest
import torch
from torch import nn

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
from fasterai.distill.cli import distill
from fasterai.distill.command.files import Files
from fasterai.distill.ship import export
from fasterai.distill.ship.predictor import Predictor


def test_ends_with_the_files_and_their_checks(tmp_path, capsys):
    exp = distill(teacher_epochs=1, epochs=1, seeds=1, quick=True, onnx=True, int8=True, out=tmp_path/'out')
    out = capsys.readouterr().out
    assert 'student.onnx answers as the student does' in out and 'student_int8.onnx' in out
    page = (tmp_path/'out'/'report.html').read_text()
    assert 'The file: student.onnx answers as the student does.' in page and 'agrees with student' in page
    said = json.loads((tmp_path/'out'/'student.json').read_text())
    assert said['file']['name']=='student.onnx' and said['classes']==list('0123456789')
    x,_ = exp.dls.valid.one_batch()
    predict = Predictor(tmp_path/'out'/'student.onnx')
    want = exp.best[1].cpu().eval()(x).argmax(1)
    assert [i for _,i,_ in predict.batch(list(x.numpy()))]==want.tolist()


def test_without_the_options_no_file_for_a_device_is_written(tmp_path):
    distill(teacher_epochs=1, epochs=1, seeds=1, quick=True, out=tmp_path/'out')
    assert not list((tmp_path/'out').glob('*.onnx'))
    assert 'file' not in json.loads((tmp_path/'out'/'student.json').read_text())


def test_a_missing_package_is_said_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"fasterai-distill\[export\]"): distill(onnx=True, out=tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_budget_is_checked_before_the_training_and_on_the_file(tmp_path, capsys):
    args = dict(teacher_epochs=1, epochs=1, seeds=1, quick=True, onnx=True, out=tmp_path/'out')
    for budget,said in (('params=500', 'over it with params 2034'), ('parms=1', "did you mean 'params'"),
                        ('mb', 'budget must be like'), ('', 'says nothing'), ('latency=.0001', 'over it with latency')):
        with pytest.raises(ValueError, match=said): distill(budget=budget, **args)
    assert not (tmp_path/'out').exists()
    distill(budget='params=2100,mb=0.015,latency=9', **args)
    out = capsys.readouterr().out
    assert 'budget: the student has params' in out and 'student.onnx has 0.0' in out
    page = (tmp_path/'out'/'report.html').read_text()
    assert 'the budget of 0.015' in page and 'params=2100,mb=0.015,latency=9' in page

def test_the_megabytes_are_those_of_the_file():
    net = nn.Linear(250, 1000) # a megabyte, and a quarter of it
    xb = (torch.zeros(1, 250),)
    with pytest.raises(ValueError, match='mb 1.0'): Files(budget='mb=.5').refuse_costly(net, net, xb)
    with pytest.raises(ValueError, match='mb 1.0'): Files(True, True, budget='mb=.5').refuse_costly(net, net, xb)
    assert Files(int8=True, budget='mb=.5').refuse_costly(net, net, xb)['mb']<.3
