"The command's --onnx and --int8: it ends with the file and its check"
import json

import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
from fasterai.distill.cli import distill
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
