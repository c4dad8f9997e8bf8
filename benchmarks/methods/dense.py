"""Segmentation: CamVid at 64 by 48 pixels, 80 frames to learn from, and 20 of later in the film to judge by.

    python benchmarks/families.py --names dense      # in a folder with data/camvid12_tiny

The student is a network of 2 thousand weights, the teacher of 133 thousand, from scratch on the same frames. The losses
compare the last maps before the classifier, `SoftTarget` compares the classifier's logits. Judged by the mean
intersection over union of the 11 classes that count; the twelfth, void, is left out of training and measure.

The weights of the losses on maps are a tenth of their sources': at the full ones each was worse than none on seed 100,
which is not among those that are shown."""
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import get_image_files
from fastai.layers import ConvLayer, ResBlock
from fastai.learner import Learner, Metric
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from families import study
from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.dense import CIRKD, IFVD
from fasterai.distill.losses import CWD, SoftTarget
from fasterai.distill.study.one_run import fit_one_cycle, quiet

size,n_classes,void = (64, 48),12,11


@cache
def frames(folder):
    "Normalised frames `(N, 3, 48, 64)`, classes of their pixels, and which of them are to judge by"
    files = sorted(get_image_files(folder/'images'))
    def load(f, how): return np.asarray(Image.open(f).resize(size, how))
    x = torch.from_numpy(np.stack([load(f, Image.Resampling.BOX) for f in files])).movedim(-1, 1).float()/255
    labels = [folder/'labels'/f'{f.stem}_P.png' for f in files]
    y = torch.from_numpy(np.stack([load(f, Image.Resampling.NEAREST) for f in labels])).long()
    held_out = set((folder/'valid.txt').read_text().split())
    std,mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    return (x-mean)/std,y,torch.tensor([f.name in held_out for f in files])

def camvid_dls(bs=8, data=Path('data')):
    "Frames in memory"
    x,y,held_out = frames(data/'camvid12_tiny')
    train,valid = (TensorDataset(x[part], y[part]) for part in (~held_out, held_out))
    return DataLoaders(TfmdDL(train, bs=bs, shuffle=True, drop_last=True, num_workers=0),
                       TfmdDL(valid, bs=20, num_workers=0))


class MeanIoU(Metric):
    "Intersection over union of each class that occurs, over all pixels that count, and their mean"
    name = 'mean_iou'
    def reset(self): self.pairs = torch.zeros(n_classes, n_classes)
    def accumulate(self, learn):
        pred,y = learn.pred.argmax(1),learn.y
        keep = y!=void
        self.pairs += torch.bincount(n_classes*y[keep]+pred[keep], minlength=n_classes**2).view(n_classes, n_classes)
    @property
    def value(self):
        both = self.pairs.diag()
        either = self.pairs.sum(0)+self.pairs.sum(1)-both
        return (both/either)[self.pairs.sum(1)>0].mean().item()

def segmenter(w):
    "Four convolutions and more, a quarter of the resolution, and a classifier of its positions, `3`"
    return nn.Sequential(ConvLayer(3, w, stride=2), ResBlock(1, w, 2*w, stride=2), ResBlock(1, 2*w, 2*w),
                         nn.Conv2d(2*w, n_classes, 1), nn.Upsample(scale_factor=4, mode='bilinear'))

def learner(w):
    "A Learner of a segmenter, with AdamW"
    return Learner(camvid_dls(), segmenter(w), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=void), lr=1e-2,
                   metrics=MeanIoU(), opt_func=partial(Adam, decouple_wd=True), wd=1e-2)

def student(): return learner(4)

@cache
def teacher():
    set_seed(0)
    learn = learner(32)
    same_start(learn.dls, 0)
    with quiet(learn): fit_one_cycle(learn, 40)
    return learn

def taught(loss, weight, maps=True):
    "What makes a callback that adds `weight` times `loss` to the task's"
    layers = dict(activations_student='2', activations_teacher='2') if maps else {}
    return lambda: KnowledgeDistillationCallback(teacher(), loss, weight=weight, task_weight=1., **layers)

def run():
    arms = {
        'alone': None,
        'SoftTarget': taught(partial(SoftTarget, T=1), 1., maps=False),
        'CWD': taught(partial(CWD, T=4), 5.),
        'IFVD': taught(IFVD, 5.),
        'CIRKD': taught(CIRKD, 0.1)}
    return study('dense', student, arms).run(20, seeds=5)
