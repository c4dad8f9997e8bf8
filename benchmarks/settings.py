"""Who learns from whom, on which images, for how long: the settings of `accuracy.py`.

Images are held in memory as one tensor, on the device that trains, and augmented a batch at a time; so an epoch costs
little more than its forward and backward passes."""
from dataclasses import dataclass
from functools import partial
from typing import Callable

import cifar_nets
import photographs
import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import get_image_files
from fastai.optimizer import SGD, Adam
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.teacher.pretrained import body_and_head
from fasttransform import ItemTransform
from PIL import Image, ImageOps
from torch.utils.data import TensorDataset
from torchvision import models


class ShiftFlip(ItemTransform):
    "Each image moved by up to `pad` pixels over zeros, and mirrored half of the time"
    def __init__(self, pad): self.pad = pad
    def encodes(self, b):
        x,*rest = b
        n,c,h,w = x.shape
        dy,dx = torch.randint(0, 2*self.pad+1, (2, n, 1), device=x.device)
        rows,cols = dy+torch.arange(h, device=x.device),dx+torch.arange(w, device=x.device)
        cols = torch.where(torch.rand(n, 1, device=x.device)<0.5, cols, cols.flip(1))
        i = torch.arange(n, device=x.device)
        padded = F.pad(x, [self.pad]*4).movedim(1, -1)
        return (padded[i[:, None, None], rows[:, :, None], cols[:, None]].movedim(-1, 1), *rest)


class BatchDL(TfmdDL):
    "Takes whole batches out of the dataset's tensors"
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs | dict(num_workers=0))
    def create_batches(self, samps):
        for i in self.chunkify(iter(samps)): yield tuple(t[list(i)] for t in self.dataset.tensors)


def image_dls(train, valid, label, size, bs, pad, device):
    "`DataLoaders` of two lists of files, squares of `size` pixels, whose class is `label(file)`"
    classes = sorted({label(f) for f in train})
    def load(f): return np.asarray(ImageOps.fit(Image.open(f).convert('RGB'), (size, size), Image.Resampling.BILINEAR))
    def images(files): return torch.from_numpy(np.stack([load(f) for f in files])).movedim(-1, 1).float().div_(255)
    def labels(files): return torch.tensor([classes.index(label(f)) for f in files], device=device)
    xs = [images(files) for files in (train, valid)]
    mean,std = (f(xs[0].movedim(1, 0).flatten(1), dim=1)[:, None, None] for f in (torch.mean, torch.std))
    ds = [TensorDataset(((x-mean)/std).to(device), labels(files)) for x,files in zip(xs, (train, valid))]
    for d in ds: d.n_inp = 1  # else fastai draws a batch to find out
    train_dl = BatchDL(ds[0], bs=bs, shuffle=True, drop_last=True, after_batch=[ShiftFlip(pad)])
    dls = DataLoaders(train_dl, BatchDL(ds[1], bs=4*bs), device=device)
    dls.c = len(classes)
    return dls


def folder_dls(path, device, valid, **kwargs):
    "Of a folder of folders `train` and `valid`, with a folder for each class"
    train,valid = (sorted(get_image_files(path/o)) for o in ('train', valid))
    return image_dls(train, valid, lambda f: f.parent.name, device=device, **kwargs)


def few_digits(path, device):
    "scikit-learn's handwritten digits, of which the teacher sees 1,197 and the student the first 100"
    dls = digits_dls(n_train=100, bs=50, device=device)
    dls.teacher = digits_dls(device=device)
    return dls


@dataclass
class Setting:
    "A pair of networks, their data, and the recipe with which they are trained"
    data:Callable           # `DataLoaders` from a folder and a device; `.teacher`: the teacher's, if others
    teacher:Callable        # A new teacher, given the number of classes
    student:Callable        # A new student
    epochs:int              # Of a student, and of a teacher
    lr:float                # Highest learning rate, for all
    stages:dict             # Layers to compare, student to teacher, from the first to the last
    before:dict             # The same in front of their activations
    ab:float                # Weight of `ActivationBoundaries`: 3/1000 of the deepest map's size, ours being a mean
    opt:Callable = partial(SGD, mom=0.9)
    wd:float = 5e-4
    beta:float = 2          # Of `DecoupledKD`, as its authors have it for the pair or its like
    longer:tuple = (1.5, 2) # Lengths of the student without a teacher, to compare at equal time
    teacher_epochs:int = None
    amp:bool = True         # bfloat16 on a GPU
    amp_on_cpu:bool = False # and the students on a CPU, which pays for large ones on a CPU that computes in it
    fit_teacher:Callable = None # `fit_teacher(learn)`; None: as a student alone, for `teacher_epochs`
    size:int = None         # Pixels that the student sees, if not those of the data
    teacher_size:int = None # and the teacher
    teacher_name:str = None # It is kept under this name, for several settings; None: the setting's
    views:int = None        # The teacher is asked once about so many views of each image, and its answers are kept
    kept:tuple = ()         # with the maps of these layers
    folder:str = ''         # Where the images are, below `--data`

    @property
    def hint(self):
        "The middle one of `stages` (of four the second), as FitNet's"
        return dict([list(self.stages.items())[(len(self.stages)-1)//2]])

    @property
    def last(self): return dict([list(self.stages.items())[-1]])


def same(*layers):
    "Layers of one name in student and teacher"
    return {o:o for o in layers}


def cifar_pair(teacher, student, n_t, n_s, ab=12.3, **kwargs):
    "Two residual networks, with `n_t` and `n_s` blocks in a stage"
    before = {f'stages.{i}.{n_s-1}.act:input':f'stages.{i}.{n_t-1}.act:input' for i in range(3)}
    stages = same(*(f'stages.{i}' for i in range(3)))
    return Setting(teacher=teacher, student=student, stages=stages, before=before, ab=ab, **kwargs)


resnet,wrn = cifar_nets.resnet,cifar_nets.wrn
cifar = partial(folder_dls, valid='test', size=32, pad=4)

blocks = [f'blocks.{i}' for i in (1, 2, 4, 6)] # of the teacher, where it halves its map; linear

def photos(student, stages, before, ab, epochs, **kwargs):
    "A network of ImageNet, fine-tuned, teaches one that begins from nothing"
    return Setting(teacher=photographs.lite0, student=student, stages=dict(zip(stages, blocks)),
                   before=dict(zip(before, blocks)), kept=blocks, ab=ab, epochs=epochs, views=epochs, size=64,
                   teacher_size=192, fit_teacher=fine_tune, opt=Adam, wd=1e-2, longer=(1.5,), **kwargs)

def fine_tune(learn):
    "Its head, then all of it, gently; the statistics of its BatchNorms follow the photographs"
    learn.splitter,learn.train_bn = body_and_head,False
    learn.create_opt()
    learn.freeze()
    learn.fit_one_cycle(3, 1e-2)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))

resnet_stages = [f'layer{i}' for i in range(1, 5)]
mobilenet_stages = [f'stages.{i}' for i in (1, 2, 3)]
students = dict(
    mobilenet=dict(student=cifar_nets.mobilenetv1, lr=1e-2, ab=12.3, stages=mobilenet_stages,
                   before=['stages.1.1.5:input', 'stages.2.1.5:input', 'stages.3.2.5:input']),
    resnet18=dict(student=lambda c: models.resnet18(num_classes=c), lr=1e-3, ab=6.1, stages=resnet_stages,
                  amp_on_cpu=True, before=[f'{o}.1.relu:input' for o in resnet_stages]))
shifted = ShiftFlip(8)
photo_sets = dict(
    imagenette=dict(data=partial(photographs.part_of_folder, n_train=1000, n_valid=600, augment=shifted),
                    folder='imagenette2sq_96', epochs=16),
    catdog=dict(data=partial(photographs.pets, label=photographs.species, augment=shifted), folder='pets96', epochs=16),
    breeds=dict(data=partial(photographs.pets, label=photographs.breed, augment=shifted), folder='pets96', epochs=24))
of_photos = {f'{d}_{n}':photos(teacher_name=f'{d}_lite0', **photo_sets[d], **students[n])
             for d in photo_sets for n in students}

wrns = dict(
    teacher=lambda c: wrn(40, 2, c), student=lambda c: wrn(16, 2, c), ab=24.6, beta=6,
    stages=same(*(f'stages.{i}' for i in range(3))),
    before={**same('stages.1.0.pre.1:input', 'stages.2.0.pre.1:input'), 'stages.2.3:input':'stages.2.7:input'})

vgg_mobile = dict(
    teacher=cifar_nets.vgg13, student=cifar_nets.mobilenetv2, ab=24.6, beta=6,
    stages={f'stages.{i}':f'stages.{i+1}' for i in range(4)},
    before={'stages.0':'stages.1.6:input', 'stages.1':'stages.2.6:input', 'stages.2':'stages.3.6:input',
            'stages.3.6:input':'stages.4.5:input'})

literature = partial(SGD, mom=0.9, decouple_wd=False)  # with its weight decay
on_gpu = dict(folder='cifar100', data=partial(cifar, bs=256), epochs=240, lr=0.2, opt=literature)

SETTINGS = dict(
    digits=Setting(
        few_digits, lambda c: digits_net(32, c), lambda c: digits_net(8, c), epochs=150, lr=3e-2, teacher_epochs=10,
        opt=Adam, wd=1e-2, amp=False, ab=0.77, stages=same('0', '1', '2'),
        before=same(*(f'{i}.2:input' for i in range(3)))),
    cifar10_small=cifar_pair(
        lambda c: resnet(20, c), lambda c: resnet(8, c), 3, 1, folder='cifar10_small', data=partial(cifar, bs=64),
        epochs=30, teacher_epochs=60, lr=0.3, longer=(2,)),
    **of_photos,
    cifar100_resnet32x4_8x4=cifar_pair(
        lambda c: resnet(32, c, 4), lambda c: resnet(8, c, 4), 5, 1, ab=49, beta=8, **on_gpu),
    cifar100_resnet56_20=cifar_pair(lambda c: resnet(56, c), lambda c: resnet(20, c), 9, 3, **on_gpu),
    cifar100_wrn40_2_16_2=Setting(**wrns, **on_gpu),
    cifar100_vgg13_mobilenetv2=Setting(**vgg_mobile, **on_gpu | dict(lr=0.05)),
)
