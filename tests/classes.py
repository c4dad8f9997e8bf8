"Data whose classes have names, for the tests of what learns them in turn"
import torch
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, Normalize
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandTransform


class At:
    def __init__(self, a): self.a = a
    def __call__(self, i): return self.a[i]


class Gone(RandTransform):
    "An augmentation after which there is nothing to be seen"
    def __init__(self): super().__init__(p=1.)
    def encodes(self, x:TensorImage): return x*0


def named(vocab, labels=None, seed=0, std=None, tfms=()):
    "`DataLoaders` of named classes, divided by `std`, with `tfms` for each picture"
    x = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = [(labels or vocab)[i%len(labels or vocab)] for i in range(24)]
    x = x+torch.tensor([float(vocab.index(o)) for o in y]).view(-1, 1, 1, 1)
    tfms = [[At(x.as_subclass(TensorImage)), *tfms], [At(y), Categorize(list(vocab), sort=False)]]
    of_batch = None if std is None else Normalize.from_stats([0.]*3, [std]*3, cuda=False)
    return Datasets(range(24), tfms, splits=[range(24), range(24)]).dataloaders(
        bs=8, num_workers=0, device='cpu', after_batch=of_batch)
