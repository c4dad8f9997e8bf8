"""The networks of the CIFAR distillation literature, by the names and sizes of its tables.

Residual networks of He et al. (CVPR 2016, arXiv 1512.03385) and wide ones (Zagoruyko and Komodakis, BMVC 2016,
arXiv 1605.07146), VGG13 with BatchNorm, and MobileNets at half width. Feature maps are those of `stages.i`."""
import torch.nn.functional as F
from torch import nn


def conv(i, o, k=3, stride=1, groups=1): return nn.Conv2d(i, o, k, stride, k//2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    "Two convolutions and a short cut, which is projected where the shape changes"
    def __init__(self, i, o, stride):
        super().__init__()
        self.body = nn.Sequential(conv(i, o, stride=stride), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o),
                                  nn.BatchNorm2d(o))
        self.skip = nn.Identity() if i==o and stride==1 else nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))
        self.act = nn.ReLU()
    def forward(self, x): return self.act(self.body(x)+self.skip(x))


class WideBlock(nn.Module):
    "The same with normalization and activation in front of each convolution"
    def __init__(self, i, o, stride):
        super().__init__()
        self.pre = nn.Sequential(nn.BatchNorm2d(i), nn.ReLU())
        self.body = nn.Sequential(conv(i, o, stride=stride), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o))
        self.skip = nn.Identity() if i==o and stride==1 else conv(i, o, 1, stride)
    def forward(self, x):
        y = self.pre(x)
        return self.body(y) + (x if isinstance(self.skip, nn.Identity) else self.skip(y))


class InvertedResidual(nn.Module):
    "Expand six times, convolve each channel apart, project back"
    def __init__(self, i, o, stride, expand):
        super().__init__()
        m = i*expand
        self.body = nn.Sequential(conv(i, m, 1), nn.BatchNorm2d(m), nn.ReLU(), conv(m, m, stride=stride, groups=m),
                                  nn.BatchNorm2d(m), nn.ReLU(), conv(m, o, 1), nn.BatchNorm2d(o))
        self.add = i==o and stride==1
    def forward(self, x): return x+self.body(x) if self.add else self.body(x)


class Net(nn.Module):
    "`stem`, then `stages`, pooled into a linear `head`"
    def __init__(self, stem, stages, width, c):
        super().__init__()
        self.stem,self.stages,self.head = stem,nn.ModuleList(stages),nn.Linear(width, c)
        for m in self.modules():
            if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages: x = stage(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stages(block, n, widths):
    return [nn.Sequential(*(block(widths[j] if k==0 else widths[j+1], widths[j+1], 2 if j and not k else 1)
                            for k in range(n))) for j in range(len(widths)-1)]

def resnet(depth, c=10, k=1):
    "`resnet20`, or with `k=4` the four times wider `resnet8x4`, whose stem has 32 channels"
    widths = [16 if k==1 else 32, *(16*k*2**j for j in range(3))]
    return Net(nn.Sequential(conv(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU()),
               _stages(BasicBlock, (depth-2)//6, widths), widths[-1], c)

def wrn(depth, k, c=10):
    widths = [16, 16*k, 32*k, 64*k]
    stages = _stages(WideBlock, (depth-4)//6, widths)
    stages[-1].extend([nn.BatchNorm2d(widths[-1]), nn.ReLU()])
    return Net(conv(3, 16), stages, widths[-1], c)

def vgg13(c=10):
    "Five stages, of which the last two have 4 by 4 positions on CIFAR"
    def stage(i, o, pool):
        return nn.Sequential(*([nn.MaxPool2d(2)] if pool else []), nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o),
                             nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
    widths = [3, 64, 128, 256, 512, 512]
    return Net(nn.Identity(), [stage(widths[j], widths[j+1], 0<j<4) for j in range(5)], 512, c)

def mobilenetv2(c=10):
    "At half the width of the paper but for its last layer, as the literature's student"
    rows = [[(1, 8, 1, 1), (6, 12, 2, 1)], [(6, 16, 3, 2)], [(6, 32, 4, 2), (6, 48, 3, 1)],
            [(6, 80, 3, 2), (6, 160, 1, 1)]]
    i,stages = 16,[]
    for row in rows:
        blocks = []
        for expand,o,n,stride in row:
            for k in range(n):
                blocks.append(InvertedResidual(i, o, 1 if k else stride, expand))
                i = o
        stages.append(nn.Sequential(*blocks))
    stages[-1].extend([conv(i, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU()])
    return Net(nn.Sequential(conv(3, 16, stride=2), nn.BatchNorm2d(16), nn.ReLU()), stages, 1280, c)


class Separable(nn.Sequential):
    "A convolution of each channel by itself, then one over the channels"
    def __init__(self, i, o, stride):
        super().__init__(conv(i, i, stride=stride, groups=i), nn.BatchNorm2d(i), nn.ReLU(),
                         conv(i, o, 1), nn.BatchNorm2d(o), nn.ReLU())

def mobilenetv1(c=10, width=0.5):
    "Howard et al. (2017, arXiv 1704.04861) without the last layers: the map is a sixteenth of the picture"
    widths = [int(width*o) for o in (32, 64, 128, 256, 512)]
    def stage(j, n):
        i,o = widths[j:j+2]
        return nn.Sequential(*(Separable(o if k else i, o, 2 if j and not k else 1) for k in range(n)))
    stem = nn.Sequential(conv(3, widths[0], stride=2), nn.BatchNorm2d(widths[0]), nn.ReLU())
    return Net(stem, [stage(j, n) for j,n in enumerate((1, 2, 2, 3))], widths[-1], c)
