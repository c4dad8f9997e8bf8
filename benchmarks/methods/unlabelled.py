"""What images without labels add: pseudo labels, noisy students and FixMatch on 100 labelled digits and 1,097 others.

All arms but the first see each image moved by up to a pixel; what counts is the gain over the network that is trained
alone with that augmentation, and over the one that has as many steps as pseudo labels take."""
from functools import partial

import torch
import torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImageBW
from fasttransform import Transform

from families import few100, learner, study
from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.fixmatch import fixmatch
from fasterai.distill.methods.noisy_student import noisy_student
from fasterai.distill.study.one_run import fit_one_cycle, quiet

others = range(700, 1797) # the training images of the digits after the first hundred
alone,rounds = 200,30     # epochs on the labels alone: a step each; on all images: 18 steps each


def moved(x, by=1):
    "Each image moved by up to `by` pixels"
    n,size = len(x),x.shape[-1]
    views = F.pad(x, 4*[by]).unfold(2, size, 1).unfold(3, size, 1)
    dy,dx = torch.randint(2*by+1, (2, n), device=x.device)
    return views[torch.arange(n, device=x.device), :, dy, dx]

class Shift(Transform):
    "The weak augmentation, in training"
    split_idx = 0
    def encodes(self, x:TensorImageBW): return moved(x)

def strong(x):
    "Moved once more, with noise: the best of three views that were tried, on three of the seeds"
    x = moved(x)
    return x+0.1*torch.randn_like(x)

def shifted(dls):
    "`dls` with the weak augmentation"
    dls.add_tfms([Shift()], 'after_batch', 'train')
    return dls


def augmented(learn, epochs):
    "The baseline that counts"
    shifted(learn.dls)
    fit_one_cycle(learn, epochs)

def longer(learn, epochs): augmented(learn, epochs+18*rounds)

def labels(learn, epochs, widths=(8, 8), soft=False):
    "A noisy student of networks of these widths, the last of which is the student"
    def make(width): return partial(learner, width=width, loss_func=CrossEntropyLossFlat(flatten=not soft))
    lengths = [epochs] + [rounds]*(len(widths)-1)
    found = noisy_student([make(w) for w in widths], shifted(learn.dls), others, epochs=lengths, soft=soft,
                          seed=torch.initial_seed(), progress=False)
    learn.model = found.student.model

def taught(learn, epochs, ratio=4):
    "A wide network trained on the labels is asked about batches of both, as any teacher is"
    wide = learner(shifted(learn.dls), 32)
    with quiet(wide): fit_one_cycle(wide, epochs)
    learn.dls = mix_unlabelled(learn.dls, others, ratio)
    fit_one_cycle(learn, epochs, KnowledgeDistillationCallback(wide, partial(SoftTarget, T=4), weight=0.9))

def match(learn, epochs, threshold=0.95, ratio=4):
    "FixMatch: its own answers to weak views are the labels of strong ones"
    learn.dls = mix_unlabelled(shifted(learn.dls), others, ratio)
    fit_one_cycle(learn, epochs, fixmatch(strong, threshold))

ways = {
    'augmented': augmented,
    'augmented, equal steps': longer,
    'pseudo labels, hard': labels,
    'pseudo labels, soft': partial(labels, soft=True),
    'noisy student, 2 rounds': partial(labels, widths=(8, 8, 8)),
    'wide noisy student': partial(labels, widths=(32, 8)),
    'wide teacher, batches of both': taught,
    'FixMatch .95': match,
    'FixMatch .80': partial(match, threshold=0.8)}


def fit(learn, epochs, way):
    "An arm's way, or the labels alone"
    if way is None: fit_one_cycle(learn, epochs)
    else: way(learn, epochs)

def arm(way):
    "What a study calls for each run, for the way itself"
    return lambda: way

def run():
    arms = {'alone': None, **{name:arm(way) for name,way in ways.items()}}
    return study('unlabelled', few100, arms, fit=fit).run(alone, seeds=5)
