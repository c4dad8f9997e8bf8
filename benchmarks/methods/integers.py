"""What eight bits cost and save on photographs: a student, its file, and a teacher of integers.

    python benchmarks/families.py --names integers      # in a folder with data/imagenette2sq_160_small

A thousand photographs of imagenette at 64 pixels, and 400 to judge by. In full precision, as integers, and as the file
of integers that onnxruntime runs, the same network of each seed is judged; and students of one teacher are compared,
in full precision and in integers. Times are taken by turns, since a shared machine is faster at one moment than at
another."""
import tempfile
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.core import imagenet_stats
from torch import nn

from families import results, study
from fasterai.core.cost import best_time
from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.ship.export import export_student
from fasterai.distill.ship.onnx_file import OnnxFile
from fasterai.distill.ship.quantize import FreezeQuantizers, quantize_aware
from fasterai.distill.study.measure import size_mb
from fasterai.distill.study.one_run import fit_one_cycle, quiet
from fasterai.distill.teacher.inputs import resize_batch
from fasterai.distill.teacher.teacher import Teacher
from methods.photos import Photos, pictures
from settings import ShiftFlip

bs,lr,epochs,more = 50,5e-3,10,2 # more: epochs of learning to round


@cache
def small(part, data=Path('data')):
    "The photographs of a part at 64 pixels, as bytes, and their classes"
    x,y = pictures(data/'imagenette2sq_160_small'/part)
    return resize_batch(x.float(), size=64).round().byte(),y

def dls():
    norm = partial(Normalize.from_stats, *imagenet_stats, cuda=False)
    found = DataLoaders(TfmdDL(Photos(*small('train')), bs, True, num_workers=0, drop_last=True,
                               after_batch=[IntToFloatTensor(), ShiftFlip(4), norm()]),
                        TfmdDL(Photos(*small('val')), 200, num_workers=0, after_batch=[IntToFloatTensor(), norm()]),
                        device='cpu')
    found.c = 10
    return found

def net(w):
    "Four convolutions, each halving the picture"
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(block(3, w), block(w, 2*w), block(2*w, 4*w), block(4*w, 8*w), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8*w, 10))

def student(w=32): return Learner(dls(), net(w), CrossEntropyLossFlat(), lr=lr, metrics=accuracy)


@cache
def in_full(seed, w=32):
    set_seed(seed)
    learn = student(w)
    same_start(learn.dls, seed)
    with quiet(learn): learn.fit_one_cycle(epochs)
    return learn.model.eval()

@cache
def taught(seed):
    "The student of a seed, which has learned from itself, without labels, to round"
    learn = student()
    learn.model = in_full(seed)
    q = quantize_aware(learn)
    q.lr = 1e-3
    same_start(q.dls, seed)
    kd = KnowledgeDistillationCallback(learn.model, partial(SoftTarget, T=1), weight=1, task_weight=0)
    with quiet(q): fit_one_cycle(q, more, [FreezeQuantizers(), kd])
    return q

def rounded(seed):
    learn = student()
    learn.model = in_full(seed)
    return quantize_aware(learn).to_int8()

def as_file(learn, int8):
    with tempfile.TemporaryDirectory() as d: return _in_memory(export_student(learn, Path(d)/'student.onnx', int8=int8))

def _in_memory(path):
    file = OnnxFile(path) # onnxruntime has read it
    file.mb = path.stat().st_size/1e6
    return file

judged = {'full precision': in_full, 'int8, rounded': rounded, 'int8, taught': lambda seed: taught(seed).to_int8(),
          'int8, taught, as a file': lambda seed: as_file(taught(seed), True)}

def judge(learn, epochs, what): learn.model = what(torch.initial_seed())

def arm(o):
    "What a study calls for each run, for the thing itself"
    return lambda: o


def speed(pairs=15, seed=0):
    "One sample and 64, by turns, of the network and of its file"
    learn = student()
    learn.model = in_full(seed)
    nets = {'PyTorch': in_full(seed), 'PyTorch, int8': taught(seed).to_int8(), 'file': as_file(learn, False),
            'file, int8': as_file(taught(seed), True)}
    x = torch.randn(64, 3, 64, 64)
    def seconds(f, x):
        with torch.no_grad(): return best_time(lambda: f(x), x.device, 5)
    rows = [{'pair': i, 'samples': n, **{f'{k}, ms': round(1e3*seconds(f, x[:n]), 4) for k,f in nets.items()}}
            for i in range(pairs) for n in (1, 64)]
    sizes = {f'{k}, kB': round(1e3*(f.mb if isinstance(f, OnnxFile) else size_mb(f)), 1) for k,f in nets.items()}
    pd.DataFrame(rows).assign(**sizes).to_csv(results/'family-integers-speed.csv', index=False)


def distilled(learn, epochs, teacher):
    kd = teacher and KnowledgeDistillationCallback(teacher(), partial(SoftTarget, T=4), weight=.9)
    fit_one_cycle(learn, epochs, [kd] if kd else [])

def of(dtype):
    "One teacher for all seeds, in a precision"
    def teacher(): return Teacher(in_full(100, 48), dtype=dtype)
    return arm(teacher)

def run():
    study('integers', student, {k: arm(f) for k,f in judged.items()}, fit=judge).run(epochs+more, seeds=5)
    if not (results/'family-integers-speed.csv').exists(): speed()
    arms = {'alone': arm(None), 'teacher in full precision': of(None), 'teacher of integers': of('int8')}
    study('integers-teacher', partial(student, 16), arms, fit=distilled).run(epochs, seeds=5)
