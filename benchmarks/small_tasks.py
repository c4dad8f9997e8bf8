"""Twenty small tasks for a student and a teacher, of four sets of pictures, some of which no teacher can help.

The digits come with scikit-learn. The others lie in `data/`, a folder for each class: `mnist_sample` (MNIST's 3 and 7),
`cifar10_small` (5,000 + 1,000 pictures), `imagenette2sq_160_small` (1,000 + 400). Pictures are held as tensors."""
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.core import imagenet_stats
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

from families import full1197, trained
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.losses import Logits, SoftTarget
from photographs import lite0
from settings import BatchDL

folder = Path('data')


# Pictures and labels: of the training set and of the validation set

def _unpacked(ds): return torch.stack([x.as_subclass(torch.Tensor) for x,_ in ds]),torch.tensor([int(y) for _,y in ds])

@cache
def digits():
    dls = digits_dls()
    return _unpacked(dls.train_ds),_unpacked(dls.valid_ds)

def _pictures(path, mode):
    "Pictures `(N, C, H, W)` from 0 to 1, in an order in which classes are mixed, and their classes"
    files = sorted(get_image_files(path))
    names = sorted({f.parent.name for f in files})
    x = torch.from_numpy(np.stack([np.asarray(Image.open(f).convert(mode)) for f in files])).float()/255
    x = x.movedim(-1, 1) if x.ndim==4 else x[:, None]
    mixed = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    return x[mixed],torch.tensor([names.index(f.parent.name) for f in files])[mixed]

@cache
def threes_sevens(): return tuple(_pictures(folder/'mnist_sample'/o, 'L') for o in ('train', 'valid'))

@cache
def cifar():
    "At 16 pixels"
    sets = [_pictures(folder/'cifar10_small'/o, 'RGB') for o in ('train', 'test')]
    return tuple(((F.avg_pool2d(x, 2)-.5)/.25, y) for x,y in sets)

@cache
def imagenette(size=32):
    mean,std = (torch.tensor(o)[:, None, None] for o in imagenet_stats)
    sets = [_pictures(folder/'imagenette2sq_160_small'/o, 'RGB') for o in ('train', 'val')]
    return tuple(((F.adaptive_avg_pool2d(x, size)-mean)/std, y) for x,y in sets)

def drawn_anew(y, noise, c):
    "The labels `y`, of which a share `noise` is drawn by chance"
    g = torch.Generator().manual_seed(0)
    return torch.where(torch.rand(len(y), generator=g)<noise, torch.randint(c, y.shape, generator=g), y)

def data(of=digits, n=100, noise=0., bs=50, c=10):
    "`DataLoaders` of the first `n` pictures of a set, of whose labels a share is drawn anew; all of the validation set"
    (x,y),valid = of()
    sets = TensorDataset(x[:n], drawn_anew(y[:n], noise, c)),TensorDataset(*valid)
    dl = partial(BatchDL, n_inp=1, device='cpu')
    dls = DataLoaders(dl(sets[0], bs=bs, shuffle=True, drop_last=True), dl(sets[1], bs=1000))
    dls.c = c
    return dls


# Teachers

def net(width, c=10, ch=3):
    "Three convolutions, each halving the picture"
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(block(ch, width), block(width, 2*width), block(2*width, 4*width), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4*width, c))

def taught(model, dls, epochs, lr=1e-2):
    "The network that `model()` gives, trained by itself"
    def learner(): return Learner(dls(), model(), CrossEntropyLossFlat(), lr=lr, metrics=accuracy)
    return trained(learner, epochs)

@cache
def of_all_digits(epochs=12, width=32): return trained(partial(full1197, width), epochs)

def untrained():
    set_seed(0)
    return digits_net(32).eval()

class Renamed(nn.Module):
    "Takes each class for the next one"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net(x).roll(1, -1)

class Recites(nn.Module):
    "Says of each picture what was `said` of it, or of the nearest one"
    def __init__(self, x, said):
        super().__init__()
        self.register_buffer('x', x.flatten(1))
        self.register_buffer('said', said)

    def forward(self, x): return self.said[torch.cdist(x.flatten(1), self.x).argmin(1)]

class Constant(nn.Module):
    "Is sure of the first class, whatever it is shown"
    def __init__(self, c):
        super().__init__()
        self.register_buffer('said', 10.*F.one_hot(torch.tensor(0), c))

    def forward(self, x): return self.said.expand(len(x), -1)

def renamed(): return Renamed(of_all_digits()).eval()

def labels(dls):
    "Sure of the labels of the training pictures"
    x,y = dls().train_ds.tensors
    return Recites(x, 30.*F.one_hot(y, dls.keywords.get('c', 10))).eval()

@torch.no_grad()
def pretrained(n=200, size=32):
    "EfficientNet-Lite0 with a linear head for the 1,000 pictures, at 160 pixels; `n` answers for pictures of `size`"
    body = lite0(0).eval()
    x,y = imagenette(160)[0]
    z = torch.cat([*map(body, x.split(50))])
    head = LogisticRegression(max_iter=1000).fit(z, y)
    return Recites(imagenette(size)[0][0][:n], torch.from_numpy(head.decision_function(z[:n])).float()).eval()


# Tasks

usual = {'soft targets': dict(loss=partial(SoftTarget, T=4), weight=.9),
         'mild targets': dict(loss=partial(SoftTarget, T=2), weight=.5),
         'logits': dict(loss=Logits, weight=.5),
         'a trace': dict(loss=partial(SoftTarget, T=4), weight=1e-3)}
as_they_are = {f'weight {w}': dict(loss=partial(SoftTarget, T=1), weight=w) for w in (.9, .5, .2, .1)}
traces = {f'weight {w}': dict(loss=partial(SoftTarget, T=4), weight=w) for w in (1e-6, 1e-7, 1e-8, 1e-9)}

@dataclass
class Task:
    "Who learns what from whom, and for how long"
    of:str           # The set of pictures
    data:Callable    # Gives `DataLoaders`
    student:Callable # Gives a network
    teacher:Callable # Gives a teacher
    epochs:int       # Of a training
    lr:float         # Its learning rate
    arms:dict = None # Ways to distil; None: `usual`
    cannot:str = ''  # Why distilling cannot help here; empty: it may

def of_digits(data, teacher, width=8, epochs=60, lr=3e-2, **kwargs):
    return Task('digits', data, partial(digits_net, width), teacher, epochs, lr, **kwargs)

def of_mnist(data, teacher, **kwargs): return Task('MNIST', data, partial(net, 4, 2, 1), teacher, 40, 1e-2, **kwargs)
def of_cifar(data, teacher, **kwargs): return Task('CIFAR-10', data, partial(net, 16), teacher, 20, 1e-2, **kwargs)
def of_photos(data, teacher, **kwargs): return Task('imagenette', data, partial(net, 8), teacher, 25, 1e-2, **kwargs)

few = partial(data, n=100)
noisy = partial(data, n=200, noise=.4)
threes = partial(data, threes_sevens, c=2)
few_cifar = partial(data, cifar, 500)
few_photos = partial(data, imagenette, 200)

alike = partial(taught, partial(digits_net, 8), epochs=60, lr=3e-2) # a teacher as large as the student, taught as long
of_all_threes = cache(partial(taught, partial(net, 16, 2, 1), partial(threes, n=12396, bs=128), 2))
wide = partial(taught, partial(net, 48))

def recited(make, dls):
    "The teacher says what the labels say"
    return make(dls, partial(labels, dls), arms=as_they_are, cannot='the teacher says what the labels say, no more')

tasks = {
    '100 labels': of_digits(few, of_all_digits),
    '100 labels, early teacher': of_digits(few, partial(of_all_digits, 2)),
    '40 labels': of_digits(partial(data, n=40, bs=20), of_all_digits),
    '200 labels, 40 % drawn anew': of_digits(noisy, of_all_digits),
    '200 labels, 40 % drawn anew, also for the teacher': of_digits(noisy, partial(alike, noisy)),
    'untrained teacher': of_digits(few, untrained),
    'teacher with other names': of_digits(few, renamed, cannot='the teacher takes each class for the next'),
    'all 1,197 labels': of_digits(partial(data, n=1197, bs=64), of_all_digits, epochs=12, lr=1e-2),
    'teacher narrower than the student': of_digits(few, partial(of_all_digits, width=3), width=16),
    'teacher of the same 100 labels': of_digits(few, partial(alike, few)),
    'digits, labels recited': recited(of_digits, few),
    '60 threes and sevens': of_mnist(partial(threes, n=60, bs=20), of_all_threes),
    '100 threes and sevens, 40 % drawn anew': of_mnist(partial(threes, noise=.4), of_all_threes),
    'MNIST, labels recited': recited(of_mnist, threes),
    '500 labels, teacher of 5,000': of_cifar(few_cifar, partial(wide, partial(data, cifar, 5000, bs=100), 10)),
    '500 labels, wider teacher of the same': of_cifar(few_cifar, partial(wide, few_cifar, 20)),
    'CIFAR-10, labels recited': recited(of_cifar, few_cifar),
    'one answer to all': of_mnist(threes, partial(Constant, 2),
                                  cannot='the teacher says the same whatever it is shown'),
    'pretrained teacher': of_photos(few_photos, pretrained),
    'weights of a millionth': of_photos(few_photos, partial(wide, partial(data, imagenette, 1000), 20), arms=traces,
                                        cannot='weights that small change nothing'),
}
