"The command as a user calls it: on a folder of images, with a teacher's weights, and with everything that can be wrong"
import subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fastai.learner import load_learner
from fasterai.data.archs import load_weights, make_model
from fasterai.distill.cli import distill

command = Path(sys.executable).parent/'fasterai_distill'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Red and blue noise in train and valid folders"
    root,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for part,n in dict(train=12, valid=6).items():
        for k,c in enumerate(('blue','red')):
            (root/part/c).mkdir(parents=True)
            for i in range(n):
                a = rng.integers(0, 200, (20, 24, 3))
                a[..., 2*(1-k)] += 55
                Image.fromarray(a.astype(np.uint8)).save(root/part/c/f'{i}.png')
    return root


small = dict(teacher='timm:resnet10t', student='timm:resnet10t', epochs=1, size=16, bs=8, workers=0)


def test_images_with_teacher_weights_and_a_feature_loss(images, tmp_path):
    pytest.importorskip('timm')
    torch.save(make_model('timm:resnet10t', 2).state_dict(), tmp_path/'t.pth')
    exp = distill(images, loss='Attention', weight=0.9, teacher_weights=tmp_path/'t.pth', out=tmp_path/'out', **small)
    assert exp.kd['activations_student']['student'] and len(exp.runs)==1
    table = pd.read_csv(tmp_path/'out'/'table.csv')
    assert table.model.tolist()==['teacher','student alone','student distilled'] and table.parameters.min()>1e6
    student = load_weights(make_model('timm:resnet10t', 2), tmp_path/'out'/'student.pth').eval()
    learn = load_learner(tmp_path/'out'/'student.pkl')
    label,i,probs = learn.predict(images/'valid'/'red'/'0.png')
    assert list(learn.dls.vocab)==['blue', 'red'] and label==learn.dls.vocab[i] and probs.sum()==pytest.approx(1)
    x = learn.dls.test_dl([images/'valid'/'red'/'0.png']).one_batch()[0]
    assert torch.allclose(student(x).softmax(1)[0], probs, atol=1e-5)
    page = (tmp_path/'out'/'report.html').read_text()
    assert 'distilled' in page and 'timm:resnet10t' in page
    assert page.count('data:image/png')==3 and '<script' not in page


def test_a_teacher_that_is_no_better_is_named_and_vision_learners_weights_are_explained(images, tmp_path, capsys):
    pytest.importorskip('timm')
    good = make_model('timm:resnet10t', 2)
    # always the first class: half of the images
    torch.nn.init.zeros_(good.get_classifier().weight), torch.nn.init.zeros_(good.get_classifier().bias)
    torch.save(good.state_dict(), tmp_path/'t.pth')
    exp = distill(images, teacher_weights=tmp_path/'t.pth', out=tmp_path/'out', **small | dict(epochs=3))
    assert ('no better than the student alone' in capsys.readouterr().out) == (exp.runs.alone.max()>=0.5)
    torch.save({'0.0.weight': torch.zeros(1)}, tmp_path/'v.pth')
    with pytest.raises(ValueError, match='vision_learner'):
        distill(images, teacher_weights=tmp_path/'v.pth', out=tmp_path/'out', **small)


@pytest.mark.parametrize('args,what', [
    (dict(path='nowhere'), "no folder 'nowhere'"),
    (dict(student='resnet-18'), "'resnet18'"),
    (dict(loss='SoftTargets'), "'SoftTarget'"),
    (dict(loss='Attention', T=4), 'no temperature'),
    (dict(teacher='digits_net4'), 'cannot take a batch'),
    (dict(teacher_weights='nothing.pth'), 'no file'),
    (dict(weight=7.), 'task_weight'),
    (dict(size=0), 'size'),
    (dict(epochs='ten'), 'epochs'),
    (dict(seeds=0), 'seeds'),
    (dict(lr=0.), 'lr'),
    (dict(T=0.), 'T'),
    (dict(teacher_epochs=0), 'teacher_epochs'),
    (dict(weight=float('nan')), 'weight'),
    (dict(workers=-1), 'workers'),
])
def test_what_is_wrong_is_said_before_training(images, tmp_path, args, what, capsys):
    args = {**dict(path=images, out=tmp_path/'out', teacher='resnet18', student='resnet18', epochs=1, size=16, bs=8,
                   workers=0), **args}
    with pytest.raises((ValueError, OSError), match=what): distill(**args)
    assert not (tmp_path/'out').exists()


def test_weights_of_another_number_of_classes(images, tmp_path):
    torch.save(make_model('resnet18', 10).state_dict(), tmp_path/'t.pth')
    with pytest.raises(ValueError, match=r'fc.weight \(10, 512\) for \(2, 512\)'):
        distill(images, teacher='resnet18', teacher_weights=tmp_path/'t.pth', size=16, bs=8, workers=0,
                out=tmp_path/'out')


@pytest.mark.skipif(not command.exists(), reason='the package is not installed')
def test_the_command_says_errors_in_a_line():
    res = subprocess.run([command, 'nowhere'], capture_output=True, text=True)
    assert res.returncode==1 and res.stderr.strip().splitlines()[-1]=="fasterai_distill: no folder 'nowhere'"
    for way in ('--teacher_weights', '--teacher-weights'):
        res = subprocess.run([command, '.', way, 'nothing.pth', '--T', '4', '--loss=Attention'], capture_output=True,
                             text=True, cwd=Path(__file__).parent)
        assert 'no temperature' in res.stderr
