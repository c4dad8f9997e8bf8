"""The documents that this library was asked for run as they are written

They are the callback tutorial, the losses guide and the blog post. Epochs are cut to 1, batches to 16, pictures to 96
pixels.
`untar_data(URLs.PETS)` finds a small folder of images made here, and the pretrained weights that `vision_learner` asks
for are random ones, so nothing is downloaded."""
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet34


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """Homes of fastai and torch: pets on a plain ground, and untrained weights

    Cats (capital letter) are reddish, dogs bluish"""
    home,rng = tmp_path_factory.mktemp('home'),np.random.default_rng(0)
    images = home/'data'/'oxford-iiit-pet'/'images'
    images.mkdir(parents=True)
    for i in range(28):
        a = rng.integers(0, 120, (72, 80, 3)) + np.array([100, 0, 0] if i%2 else [0, 0, 100])
        Image.fromarray(a.astype(np.uint8)).save(images/f"{'Bengal' if i%2 else 'beagle'}_{i}.jpg")
    (home/'hub'/'checkpoints').mkdir(parents=True)
    torch.save(resnet34().state_dict(), home/'hub'/'checkpoints'/'resnet34-b627a593.pth')
    return home


def _run(home, code):
    "Run `code`, one epoch a fit and 16 small images a batch, and return what it printed"
    head = "import warnings; warnings.filterwarnings('ignore')\nimport matplotlib; matplotlib.use('agg')\n"
    env = dict(os.environ, FASTAI_HOME=str(home), TORCH_HOME=str(home), OMP_NUM_THREADS='2', PYTHONWARNINGS='ignore')
    for n in (5, 10): code = code.replace(f'fit_one_cycle({n},', 'fit_one_cycle(1,')
    code = code.replace(', item_tfms=', ', bs=16, item_tfms=').replace('Resize(224)', 'Resize(96)')
    res = subprocess.run([sys.executable, '-c', head+code], env=env, capture_output=True, text=True, cwd=home)
    assert res.returncode==0, res.stderr[-3000:]
    return res.stdout


losses_guide = '''
from fasterai.distill.all import *
from fasterai.core.schedule import cos
from fastai.vision.all import *
# Data
path = untar_data(URLs.PETS)
files = get_image_files(path/'images')
def label_func(f): return f[0].isupper()
dls = ImageDataLoaders.from_name_func(path, files, label_func, item_tfms=Resize(224))
# Train teacher (ResNet-34)
teacher = vision_learner(dls, resnet34, metrics=accuracy)
teacher.fit_one_cycle(5, 1e-3)
student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
kd = KnowledgeDistillationCallback(teacher.model, SoftTarget, weight=0.5)
student.fit_one_cycle(10, 1e-3, cbs=kd)
student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
kd = KnowledgeDistillationCallback(teacher.model, DecoupledKD, weight=0.5)
student.fit_one_cycle(10, 1e-3, cbs=kd)
import torch
student_model = resnet18(num_classes=2)
# Auto-match layers by spatial resolution
try:
    from fasterai.distill.distillation_callback import match_feature_layers
    pairs = match_feature_layers(student_model, teacher.model, torch.randn(1, 3, 224, 224))
except ImportError:
    # Fallback: manual layer names (ResNet family)
    pairs = {'student': ['layer1', 'layer2', 'layer3', 'layer4'],
             'teacher': ['layer1', 'layer2', 'layer3', 'layer4']}
print(f'{"Student":<16} Teacher')
for s, t in zip(pairs['student'], pairs['teacher']):
    print(f'{s:<12} <-> {t}')
student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
kd = KnowledgeDistillationCallback(
    teacher.model, Attention,
    pairs['student'], pairs['teacher'],
    weight=0.9
)
student.fit_one_cycle(10, 1e-3, cbs=kd)
for loss in (Similarity, FitNet, ActivationBoundaries):
    student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
    kd = KnowledgeDistillationCallback(
        teacher.model, loss,
        pairs['student'], pairs['teacher'],
        weight=0.5
    )
    student.fit_one_cycle(10, 1e-3, cbs=kd)
'''


def test_losses_guide(home):
    out = _run(home, losses_guide)
    assert '''Student          Teacher
conv1        <-> 0.0
layer1       <-> 0.4
layer2       <-> 0.5
layer3       <-> 0.6
layer4       <-> 0
''' in out
    assert out.count('distill_loss')>=6


callback_tutorial = '''
from fastai.vision.all import *
from fasterai.distill.all import *
path = untar_data(URLs.PETS)
files = get_image_files(path/"images")

def label_func(f): return f[0].isupper()

dls = ImageDataLoaders.from_name_func(path, files, label_func, item_tfms=Resize(64))
teacher = vision_learner(dls, resnet34, metrics=accuracy)
teacher.unfreeze()
teacher.fit_one_cycle(10, 1e-3)
student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
student.fit_one_cycle(10, 1e-3)
student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
kd = KnowledgeDistillationCallback(teacher.model, SoftTarget, schedule=cos)
student.fit_one_cycle(10, 1e-3, cbs=kd)
student_model = resnet18(num_classes=2)

# Auto-match layers by spatial resolution
pairs = match_feature_layers(student_model, teacher.model, torch.randn(1, 3, 64, 64))
print(pairs)
# {'student': ['conv1', 'layer1', 'layer2', 'layer3', 'layer4'],
#  'teacher': ['conv1', 'layer1', 'layer2', 'layer3', 'layer4']}

student = Learner(dls, student_model, metrics=accuracy)
kd = KnowledgeDistillationCallback(
    teacher.model, Attention,
    pairs['student'], pairs['teacher'],
    weight=0.9
)
student.fit_one_cycle(10, 1e-3, cbs=kd)
'''


def test_callback_tutorial(home):
    out = _run(home, callback_tutorial)
    student = "['conv1', 'layer1', 'layer2', 'layer3', 'layer4']"
    teacher = "['0.0', '0.4', '0.5', '0.6', '0']"
    assert f"{{'student': {student}, 'teacher': {teacher}}}" in out


blog_post = '''
from fastai.vision.all import *
from fasterai.distill.all import *

path = untar_data(URLs.PETS)
files = get_image_files(path/"images")

def label_func(f): return f[0].isupper()

dls = ImageDataLoaders.from_name_func(path, files, label_func, item_tfms=Resize(64))

teacher = vision_learner(dls, resnet34, metrics=accuracy)
teacher.unfreeze()
teacher.fit_one_cycle(5, 1e-3)
student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
student.fit_one_cycle(10, 1e-3)
student = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
kd_cb = KnowledgeDistillationCallback(teacher=teacher, weight=0.5)
student.fit_one_cycle(10, 1e-3, cbs=kd_cb)
'''


def test_blog_post(home):
    assert 'distill_loss' in _run(home, blog_post)


def test_signatures():
    "The parameters, in their order and with their defaults, that the documents show"
    from inspect import signature
    from fasterai.distill import all as d
    shown = dict(SoftTarget='pred teacher_pred T=5', Logits='pred teacher_pred', Mutual='pred teacher_pred',
                 Attention='fm_s fm_t p=2',
                 ActivationBoundaries='fm_s fm_t m=2', FitNet='fm_s fm_t', Similarity='fm_s fm_t pred p=2')
    for name,params in shown.items():
        got = list(signature(getattr(d, name)).parameters.values())
        for want,p in zip(params.split(), got):
            n,_,default = want.partition('=')
            assert p.name==n and (not default or p.default==float(default)), f'{name}: {p} for {want}'
        assert got[-1].kind==got[-1].VAR_KEYWORD, name
    kd = list(signature(d.KnowledgeDistillationCallback).parameters.values())
    assert [p.name for p in kd[:6]]==['teacher', 'loss', 'activations_student', 'activations_teacher', 'weight',
                                      'schedule']
    assert kd[1].default is d.SoftTarget and kd[4].default==0.5
