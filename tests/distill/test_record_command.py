"`fasterai_record` as a user calls it: on a folder of images, by parts, and on what was recorded"
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasterai.data.archs import make_model
from fasterai.distill.command import record as command
from fasterai.distill.teacher.recorded.upkeep import check_recording


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Noise of two colours, and a teacher's weights"
    root,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for part,n in dict(train=12, valid=4).items():
        for c in 'blue','red':
            (root/'pictures'/part/c).mkdir(parents=True)
            for i in range(n):
                a = rng.integers(0, 200, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(a).save(root/'pictures'/part/c/f'{i}.png')
    torch.manual_seed(0)
    torch.save(make_model('resnet18', 2).state_dict(), root/'teacher.pth')
    return root

def call(monkeypatch, *args):
    "The exit code of the command, or what it says on its way out"
    monkeypatch.setattr(sys, 'argv', ['fasterai_record', *map(str, args)])
    with pytest.raises(SystemExit) as e: command.main()
    return e.value.code

def recording(monkeypatch, folder, out, *args):
    return call(monkeypatch, folder/'pictures', out, '--teacher', 'resnet18', '--teacher-weights', folder/'teacher.pth',
                '--size', 16, '--bs', 8, '--workers', 0, *args)


def test_two_parts_then_checked_described_and_merged(folder, tmp_path, monkeypatch, capsys):
    for i in range(2): assert recording(monkeypatch, folder, tmp_path/'a', '--views', 2, '--part', f'{i}/2')==0
    said = capsys.readouterr().out
    assert 'part 1 of 2: 24 of 24 rows recorded' in said and 'soft target at T=5 is off by' in said
    assert call(monkeypatch, '--check', tmp_path/'a')==0 and 'all is well' in capsys.readouterr().out
    assert call(monkeypatch, '--info', tmp_path/'a')==0
    assert 'ResNet, weights' in (said := capsys.readouterr().out) and '48 of 32 B' in said
    (tmp_path/'a'/'shard-00001').unlink()
    assert call(monkeypatch, tmp_path/'a', '--check')==1 and '8 holes' in capsys.readouterr().out
    assert call(monkeypatch, '--merge', tmp_path/'a', tmp_path/'b')==1
    assert recording(monkeypatch, folder, tmp_path/'b', '--VIEWS', 2)==0
    assert check_recording(tmp_path/'b').ok

@pytest.mark.parametrize('args,what', [
    (['--chek', 'a'], "unknown option '--chek'; did you mean '--check'"),
    (['--check'], '--check needs the folder of a recording'),
    (['--check', 'nowhere'], 'there is no recording in nowhere'),
    (['--check', '--info', 'a'], 'one thing at a time, not check and info'),
    (['--merge', 'a'], '--merge needs two folders'),
    (['--info', 'a', 'b'], "--info takes one folder, got 'a' and 'b'"),
    ([], 'give the folder of images and that of the recording'),
    (['nowhere', 'b'], "no folder 'nowhere'"),
    (['.', 'b'], 'teacher_weights: a file of the trained teacher is needed'),
    (['.', 'b', '--part', '2'], "part must be i/n, for example 0/4, got '2'")])
def test_what_is_wrong_is_said_at_once(monkeypatch, args, what):
    assert what in call(monkeypatch, *args)

def test_pictures_that_are_cropped_at_random_need_views(folder, tmp_path, monkeypatch):
    assert 'use views=8' in recording(monkeypatch, folder, tmp_path/'a')
    assert 'does not fit' not in recording(monkeypatch, folder, tmp_path/'a') and not (tmp_path/'a').exists()

def test_no_views_are_not_one_view(folder, tmp_path, monkeypatch):
    assert 'k must be at least 1, got 0' in recording(monkeypatch, folder, tmp_path/'answers', '--views', 0)

def test_looking_after_a_recording_loads_no_pytorch(tmp_path):
    code = ("import sys; from fasterai.distill.command.record import main; sys.argv = ['x', '--check', sys.argv[1]]\n"
            "try: main()\nexcept SystemExit as e: print(e, 'torch' in sys.modules)")
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    said = f"fasterai_record: recording: there is no recording in {tmp_path}: no teacher.recording"
    assert r.stdout.strip()==f"{said} False"
