"The command as a user calls it: on a folder of images, with a teacher's weights, and with everything that can be wrong"
import shutil, signal, subprocess, sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fastai.learner import load_learner
from fasterai.data.archs import load_weights, make_model
from fasterai.data.images import image_dls
from fasterai.distill.cli import distill, main
from fasterai.distill.command.folder import Folder
from fasterai.distill.command.work import set_up

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
    assert exp.arms['distilled']['activations_student']['student'] and len(exp.runs)==1
    table = pd.read_csv(tmp_path/'out'/'table.csv')
    assert table.model[:3].tolist()==['teacher','student alone','student distilled'] and table.parameters.min()>1e6
    assert table.model[3:].tolist()==['student alone, as long']*(exp.as_long()>1)
    student = load_weights(make_model('timm:resnet10t', 2), tmp_path/'out'/'student.pth').eval()
    learn = load_learner(tmp_path/'out'/'student.pkl')
    label,i,probs = learn.predict(images/'valid'/'red'/'0.png')
    assert list(learn.dls.vocab)==['blue', 'red'] and label==learn.dls.vocab[i] and probs.sum()==pytest.approx(1)
    x = learn.dls.test_dl([images/'valid'/'red'/'0.png']).one_batch()[0]
    assert torch.allclose(student(x).softmax(1)[0], probs, atol=1e-5)
    page = (tmp_path/'out'/'report.html').read_text()
    assert 'distilled' in page and 'timm:resnet10t' in page
    assert page.count('data:image/png')==4+8 and '<script' not in page # four figures, eight pictures


def test_a_teacher_that_is_no_better_is_named_and_vision_learners_weights_are_explained(images, tmp_path, capsys):
    pytest.importorskip('timm')
    good = make_model('timm:resnet10t', 2)
    # always the first class: half of the images
    torch.nn.init.zeros_(good.get_classifier().weight), torch.nn.init.zeros_(good.get_classifier().bias)
    torch.save(good.state_dict(), tmp_path/'t.pth')
    exp = distill(images, teacher_weights=tmp_path/'t.pth', out=tmp_path/'out', **small | dict(epochs=3))
    said,runs = capsys.readouterr().out,exp.runs
    assert ('no better than the student alone' in said) == (runs.alone.max()>=0.5)
    assert ('no better than guessing' in said) == (exp.best[0]<=0.5)
    assert ('The student alone is better' in said) == (runs.alone.max()>exp.best[0])
    assert ('try --epochs 3,12\n' in said) == (runs.alone.mean()>runs.distilled.mean())
    longer = exp.as_long()
    assert (f'once more alone, for {longer} epochs' in said) == ('student alone, as long' in said) == (longer>3)
    assert "student.pkl').predict('picture.jpg')" in said
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
    (dict(bs=1), 'bs must be at least 2'),
    (dict(T=float('inf')), 'T must be positive and finite'),
    (dict(teacher_weights=''), 'teacher_weights is empty'),
    (dict(pattern='('), "pattern '.' is no regular expression"),
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


@pytest.mark.parametrize('name', ['teacher.pth', 'student.pkl', 'table.csv', 'log.csv', 'report.html', 'seeds.png'])
def test_files_of_somebody_else_are_neither_taken_nor_replaced(images, tmp_path, name):
    torch.save(make_model('resnet18', 2).state_dict(), tmp_path/name)
    was = (tmp_path/name).read_bytes()
    with pytest.raises(ValueError, match=f'{name}, which no run of this command has left'):
        distill(images, out=tmp_path, **{**small, 'teacher': 'resnet18', 'student': 'resnet18'})
    assert (tmp_path/name).read_bytes()==was and [o.name for o in tmp_path.iterdir()]==[name]


@pytest.mark.parametrize('raw', [b'{"path', b'\xff\xfe{}', b'[1, 2]', b''])
def test_a_plan_that_was_cut_is_named(tmp_path, raw):
    (tmp_path/'plan.json').write_bytes(raw)
    with pytest.raises(ValueError, match="plan.json'"): Folder(tmp_path, dict(epochs=1))
    assert (tmp_path/'plan.json').read_bytes()==raw


def test_a_log_of_something_else_is_refused_before_the_teacher_is_trained(images, tmp_path):
    args = {**small, 'teacher': 'resnet18', 'student': 'resnet18', 'out': tmp_path/'out'}
    set_up(images, **args)
    (tmp_path/'out'/'log.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='belongs to other runs'): set_up(images, **args)
    assert not (tmp_path/'out'/'teacher.pth').exists()


def test_pictures_that_were_changed_are_another_plan(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(16):
        to = tmp_path/'pics'/'ab'[i%2]
        to.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(to/f'{i//2}.png')
    args = {**small, 'teacher': 'resnet18', 'student': 'resnet18', 'out': tmp_path/'out', 'bs': 4}
    for _ in range(2): set_up(tmp_path/'pics', **args)
    for a,b in ('a', 'c'), ('b', 'a'), ('c', 'b'): (tmp_path/'pics'/a).rename(tmp_path/'pics'/b)
    with pytest.raises(ValueError, match='results of another plan \\(other pictures'): set_up(tmp_path/'pics', **args)


def test_weights_of_another_number_of_classes(images, tmp_path):
    torch.save(make_model('resnet18', 10).state_dict(), tmp_path/'t.pth')
    with pytest.raises(ValueError, match=r'fc.weight \(10, 512\) for \(2, 512\)'):
        distill(images, teacher='resnet18', teacher_weights=tmp_path/'t.pth', size=16, bs=8, workers=0,
                out=tmp_path/'out')


def test_another_loss_and_more_seeds_find_the_teacher_and_the_runs_of_before(images, tmp_path, capsys):
    pytest.importorskip('timm')
    args = small | dict(out=tmp_path/'out', quick=True)
    first = distill(images, **args)
    teacher = (tmp_path/'out'/'teacher.pth').read_bytes()
    again = distill(images, loss='SoftTarget,Attention', seeds=2, **args)
    assert 'an earlier run has trained' in capsys.readouterr().out
    assert (tmp_path/'out'/'teacher.pth').read_bytes()==teacher
    assert again.runs.alone[0]==first.runs.alone[0] and list(again.arms)==['SoftTarget', 'Attention']
    assert len(pd.read_csv(tmp_path/'out'/'log.csv'))==2+1+2*2 # alone twice, distilled once, two losses of two seeds
    with pytest.raises(ValueError, match='image_size 16 there, 24 here'): distill(images, **args | dict(size=24))


@pytest.fixture
def python_handles_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_run_that_is_stopped_loses_nothing(images, tmp_path, monkeypatch, capsys, python_handles_ctrl_c):
    pytest.importorskip('timm')
    from fasterai.distill.study.study import Study
    train,calls = Study.train,[]
    def stopped(self, *args):
        calls.append(args[:3])
        with suppress(KeyboardInterrupt): # as Python drops it where a loader's worker is forked
            if len(calls)==2: signal.raise_signal(signal.SIGINT)
        return train(self, *args)
    args = small | dict(out=tmp_path/'out', quick=True, epochs=2)
    monkeypatch.setattr(Study, 'train', stopped)
    options = [f'--{k}={v}' for k,v in args.items() if k!='quick']
    monkeypatch.setattr(sys, 'argv', ['fasterai_distill', str(images), '--quick', *options])
    with pytest.raises(SystemExit, match='130'): main()
    assert 'stopped; what is finished is kept' in capsys.readouterr().err
    files = {f.name for f in (tmp_path/'out').iterdir()}
    assert files=={'plan.json', 'teacher.pth', 'teacher.pkl', 'log.csv', 'students'}
    assert load_learner(tmp_path/'out'/'teacher.pkl').predict(images/'valid'/'red'/'0.png')[0] in ('red', 'blue')
    exp = distill(images, **args)
    assert [o[0] for o in calls]==['alone', 'distilled', 'distilled']
    whole = distill(images, **args | dict(out=tmp_path/'other'))
    assert exp.runs.equals(whole.runs)


def test_teachers_as_people_have_them(images, tmp_path):
    pytest.importorskip('timm')
    first = distill(images, out=tmp_path/'out', quick=True, **small)
    learn = load_learner(tmp_path/'out'/'teacher.pkl')
    learn.dls,learn.path = first.dls,tmp_path
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    learn.save('with_optimizer')
    state = {f'module.{k}':v for k,v in learn.model.state_dict().items()}
    torch.save({'model_state_dict': state}, tmp_path/'wrapped.pth')
    for file in tmp_path/'models'/'with_optimizer.pth',tmp_path/'wrapped.pth':
        exp = distill(images, out=tmp_path/file.stem, quick=True, teacher_weights=file, **small)
        assert exp.runs.equals(first.runs) or exp.teacher.state_dict().keys()==first.teacher.state_dict().keys()
    pkl = tmp_path/'out'/'teacher.pkl'
    with pytest.raises(ValueError, match='trust-pickle'):
        distill(images, out=tmp_path/'p', teacher_weights=pkl, **small)
    exp = distill(images, out=tmp_path/'p', quick=True, teacher_weights=pkl, trust_pickle=True, **small)
    assert exp.runs.equals(first.runs)
    learn = load_learner(tmp_path/'p'/'student.pkl')
    learn.export(tmp_path/'again.pkl') # exports once more
    assert load_learner(tmp_path/'again.pkl').predict(images/'valid'/'red'/'0.png')[0] in ('red', 'blue')


def test_output_without_a_terminal_has_a_line_for_each_run(images, tmp_path, capsys):
    pytest.importorskip('timm')
    distill(images, out=tmp_path/'out', quick=True, **small | dict(epochs=2))
    lines = capsys.readouterr().out.splitlines()
    assert [l.split(':')[0] for l in lines if ', epoch ' in l]==['teacher, epoch 1 of 2', 'teacher, epoch 2 of 2']
    first,second = (l for l in lines if l.startswith('['))
    assert first.startswith('[1/2] seed 0, alone, 2 epochs: ') and 'accuracy ' in first and first.endswith(' left')
    assert second.startswith('[2/2] seed 0, distilled, 2 epochs: ') and second.endswith(' s')


@pytest.mark.skipif(not command.exists(), reason='the package is not installed')
def test_the_command_says_errors_in_a_line():
    res = subprocess.run([command, 'nowhere'], capture_output=True, text=True)
    assert res.returncode==1 and res.stderr=="fasterai_distill: no folder 'nowhere'\n"
    for way in ('--teacher_weights', '--teacher-weights'):
        res = subprocess.run([command, '.', way, 'nothing.pth', '--T', '4', '--loss=Attention'], capture_output=True,
                             text=True, cwd=Path(__file__).parent)
        assert 'no temperature' in res.stderr


def test_figures_of_results_among_the_pictures_are_no_class(images, tmp_path):
    shutil.copytree(images, tmp_path/'images')
    results = tmp_path/'images'/'train'/'distilled'
    results.mkdir()
    (results/'plan.json').write_text('{"training_images": 24}')
    for d in tmp_path/'images',tmp_path/'images'/'train'/'red': (d/'plan.json').write_text('{"mine": 1}')
    Image.new('RGB', (20, 20)).save(results/'seeds.png')
    dls = image_dls(tmp_path/'images', size=16, bs=8, num_workers=0)
    assert list(dls.vocab)==['blue', 'red'] and len(dls.train_ds)==24
