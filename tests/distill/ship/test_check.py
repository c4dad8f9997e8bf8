"What is said of a file agrees with what can be computed by hand, and a file of something else is refused"
import sys

import numpy as np
import pytest
import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy, accuracy_multi, mse
from scipy.stats import binomtest
from torch import nn

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.ship.check import check_file
from fasterai.distill.ship.export import export_student
from fasterai.distill.ship.onnx_file import OnnxFile
from fasterai.distill.study.compare import compare
from helpers import data, flags, learner, net, same, state
from ship_helpers import quiet_learner


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "A student, its file, and the file of another student on the same digits"
    to = tmp_path_factory.mktemp('files')
    a,b = (quiet_learner(digits_dls(400), digits_net(w), lr=1e-2) for w in (4, 8))
    for l in (a, b): l.fit_one_cycle(2)
    return a,export_student(a, to/'a.onnx'),export_student(b, to/'b.onnx'),b


def test_the_file_of_the_student(digits):
    learn,file,_,_ = digits
    learn.model.train()
    before,modes = state(learn.model),flags(learn.model)
    check = check_file(file, learn, min_time=.01)
    assert (check.n, check.same, check.differs)==(600, 600, False) and check.max_diff<1e-5
    assert check.verdict()=='a.onnx answers as the student does.'
    assert same(before, learn.model.state_dict()) and flags(learn.model)==modes
    r = check.table.loc['a.onnx']
    assert r.size_mb==pytest.approx(file.stat().st_size/1e6) and 0<r.latency_ms<=r.latency_p90_ms
    assert 'on 1 thread' in str(check_file(file, learn, min_time=.01, threads=1))
    html = check._repr_html_()
    assert 'agrees with student' in html and 'MB on disk' in html and 'nan' not in html


def test_accuracy_test_and_agreement_are_those_of_the_file_s_own_answers(digits):
    learn,_,file,other = digits
    check = check_file(file, learn, min_time=.01)
    x,y = learn.dls.valid.one_batch()
    with torch.no_grad(): mine,its = (l.model.eval()(x).softmax(1) for l in (learn, other))
    a,b = ((p.argmax(1)==y).numpy() for p in (its, mine))
    won,lost = (a&~b).sum(),(b&~a).sum()
    r = check.table.loc['b.onnx']
    assert r.accuracy==pytest.approx(a.mean()) and r.accuracy_diff==pytest.approx(a.mean()-b.mean())
    assert r.accuracy_p==pytest.approx(binomtest(int(won), int(won+lost)).pvalue)
    assert check.same==int((its.argmax(1)==mine.argmax(1)).sum())==pytest.approx(600*r.agreement)
    assert check.max_diff==pytest.approx(float((its-mine).abs().max()), abs=1e-4)
    assert check.differs==(r.accuracy_p<.05) and 'b.onnx' in check.verdict()
    assert r.accuracy_lo<r.accuracy<r.accuracy_hi


def test_a_file_is_a_row_beside_learners(digits):
    learn,file,_,_ = digits
    table = compare(dict(alone=learn, file=OnnxFile(file)), min_time=.01)
    assert table.accuracy['file']==table.accuracy['alone'] and np.isnan(table.params['file'])
    assert table.readable()['parameters'].tolist()[1]==''
    assert table.size_mb['file']==pytest.approx(file.stat().st_size/1e6)
    by_name = compare([learn, OnnxFile(file)], min_time=.01)
    assert list(by_name.index)==['Sequential', 'OnnxFile']


def test_several_labels_and_numbers(tmp_path):
    y = torch.randint(0, 2, (32, 3), generator=torch.Generator().manual_seed(0)).float()
    learn = learner(dls=data(y=y), loss_func=BCEWithLogitsLossFlat(), metrics=accuracy_multi)
    check = check_file(export_student(learn, tmp_path/'s.onnx'), learn, min_time=.01)
    assert (check.same, check.n)==(32, 32) and check.max_diff<1e-5
    learn = learner(dls=data(y=y), loss_func=MSELossFlat(), metrics=mse)
    check = check_file(tmp_path/'s.onnx', learn, min_time=.01)
    assert check.same is None and 'The outputs differ by' in str(check)
    assert check.verdict()=='s.onnx answers as the student does.'
    check.table.loc['s.onnx', 'mse_p'] = .001 # as sure as differences of rounding may be
    assert check.verdict()=='s.onnx answers as the student does.' and not check.differs


def test_files_of_something_else_are_refused(digits, tmp_path):
    learn,file,_,_ = digits
    small = learner(net(c=3), data(), metrics=accuracy)
    with pytest.raises(ValueError, match=r'a.onnx was made for \(batch, 1, 8, 8\).*the batch has \(8, 3, 8, 8\)'):
        check_file(file, small)
    letters = learner(digits_net(4), digits_dls(64), metrics=accuracy)
    letters.dls.train_ds.tls[1].tfms[-1].vocab = list('abcdefghij')
    with pytest.raises(ValueError, match=r"other classes than the Learner's: 0, 1, 2, 3, 4, ... \(10\) there, a, b"):
        check_file(file, letters)
    three = export_student(small, tmp_path/'three.onnx')
    with pytest.raises(ValueError, match=r'three.onnx gives outputs \(3,\) a sample, and the student \(5,\)'):
        check_file(three, learner(net(c=5), data(), metrics=accuracy))
    with pytest.raises(FileNotFoundError, match="no file 'nowhere.onnx'"): check_file('nowhere.onnx', learn)
    (tmp_path/'text.onnx').write_text('not a network')
    with pytest.raises(ValueError, match='is it a whole ONNX file'): check_file(tmp_path/'text.onnx', learn)


def test_without_onnxruntime(digits, monkeypatch):
    learn,file,_,_ = digits
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r"pip install 'fasterai-distill\[export\]'"): check_file(file, learn)


def test_a_file_for_batches_of_one_size_takes_any(digits, tmp_path):
    "600 samples in batches of 200, by a file for batches of 7"
    learn = digits[0]
    file = OnnxFile(export_student(learn, tmp_path/'seven.onnx', batch=7))
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad(): want = learn.model.eval()(x)
    assert file.batch==7 and OnnxFile(digits[1]).batch is None
    for n in (1, 7, 16, len(x)): torch.testing.assert_close(file(x[:n]), want[:n], rtol=1e-4, atol=1e-4)
    assert check_file(file.path, learn, min_time=.01).same==600
