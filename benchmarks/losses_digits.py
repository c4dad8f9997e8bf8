"""What each loss is worth on a small task: 100 labelled digits, a teacher that has seen 1,197.

    python benchmarks/losses_digits.py [--out benchmarks/results/losses_digits.csv] [--seeds 4] [--only SoftTarget]

A small student trains on 100 of scikit-learn's handwritten digits (8x8 scans, shifted by up to one pixel), alone and with each loss at the weight of the literature,
from the same initial weights, batches and shifts; 600 other digits are the test. One line per run: the accuracy after the last epoch. No weight was tuned on this task."""
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from sklearn.datasets import load_digits
from torch import nn

from fasterai.distill.losses import *

LOSSES = {  # name: loss, weight of the task, weight of the loss
    'alone': (None, 1, 0), 'SoftTarget': (partial(SoftTarget, T=4), 0.1, 0.9), 'Logits': (Logits, 1, 1), 'Mutual': (Mutual, 1, 1), 'DecoupledKD': (DecoupledKD, 1, 1), 'NKD': (NKD, 1, 1),
    'HardTarget': (HardTarget, 0.5, 0.5), 'DIST': (partial(DIST, T=4), 1, 2), 'TTM': (TTM, 1, 1), 'WTTM': (WTTM, 1, 1), 'BinaryKD': (BinaryKD, 1, 10), 'Ranking': (Ranking, 1, 0.1),
    'standardize(SoftTarget)': (partial(standardize(SoftTarget), T=2), 0.1, 9), 'standardize(SoftTarget, over=batch)': (partial(standardize(SoftTarget, over='batch'), T=4), 1, 34),
    'Attention': (Attention, 1, 1000), 'FitNet': (FitNet, 1, 100), 'ActivationBoundaries': (partial(ActivationBoundaries, m=1), 1, 1), 'Similarity': (Similarity, 1, 3000),
    'CWD': (CWD, 1, 50), 'ChannelStats': (ChannelStats, 1, 0.08), 'NST': (NST, 1, 50), 'RKDDistance': (RKDDistance, 1, 25), 'RKDAngle': (RKDAngle, 1, 50), 'RKD': (RKD, 1, 1),
    'PKT': (PKT, 1, 30000), 'CC': (CC, 1, 100), 'IRG': (IRG, 1, 1)}


class Net(nn.Module):
    "Three convolutions of `width`, `width` and 32 channels; returns logits, the last map before its activation, and after it"
    def __init__(self, width):
        super().__init__()
        block = lambda a, b, stride=1: [nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b)]
        self.body = nn.Sequential(*block(1, width), nn.ReLU(), *block(width, width, 2), nn.ReLU(), *block(width, 32))
        self.head = nn.Linear(32, 10)
    def forward(self, x):
        before = self.body(x)
        after = before.relu()
        return self.head(after.mean((2, 3))), before, after


def shifted(x):
    "Images moved by up to a pixel each way"
    dx, dy = torch.randint(0, 3, (2, len(x), 1))
    r = torch.arange(8)
    return F.pad(x, (1, 1, 1, 1))[torch.arange(len(x))[:, None, None], :, (dy+r)[:, :, None], (dx+r)[:, None]].movedim(-1, 1)


def train(net, x, y, epochs, seed, bs=50, teacher=None, loss=None, task_weight=1, weight=0):
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    steps = epochs*(len(x)//bs)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=steps)
    torch.manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(bs)[:len(x)//bs]:
            xb, yb = shifted(x[i]), y[i]
            pred, before, after = net(xb)
            total = task_weight*F.cross_entropy(pred, yb)
            if loss:
                with torch.no_grad(): teacher_pred, *maps = teacher(xb)
                k = 0 if getattr(loss, 'func', loss) is ActivationBoundaries else 1
                total = total + weight*loss(pred=pred, teacher_pred=teacher_pred, fm_s=[(before, after)[k]], fm_t=[maps[k]], target=yb)
            opt.zero_grad(); total.backward(); opt.step(); sched.step()
    return net.eval()


@torch.no_grad()
def accuracy(net, x, y): return 100*(net(x)[0].argmax(1)==y).float().mean().item()


@call_parse
def main(
    out:str='benchmarks/results/losses_digits.csv', # Where to write the runs
    seeds:int=4,                                    # Runs per loss
    epochs:int=150,                                 # Epochs of the student, of two batches each
    only:str='',                                    # Comma-separated losses beside `alone`; all if empty
):
    torch.set_num_threads(1)
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None]/16, torch.tensor(data.target)
    perm = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, test = x[perm], y[perm], slice(1197, None)
    torch.manual_seed(0)
    teacher = train(Net(32), x[:1197], y[:1197], 10, 0)
    print(f'teacher: {accuracy(teacher, x[test], y[test]):.1f} %')
    rows = []
    for seed in range(seeds):
        i = torch.randperm(1197, generator=torch.Generator().manual_seed(seed))[:100]
        torch.manual_seed(seed); start = Net(16).state_dict()
        for name, (loss, task_weight, weight) in LOSSES.items():
            if only and name not in ('alone', *only.split(',')): continue
            net = Net(16); net.load_state_dict(start)
            train(net, x[i], y[i], epochs, seed, teacher=teacher, loss=loss, task_weight=task_weight, weight=weight)
            rows.append(dict(loss=name, task_weight=task_weight, weight=weight, seed=seed, accuracy=accuracy(net, x[test], y[test])))
        print(f'seed {seed}:', ', '.join(f"{r['loss']} {r['accuracy']:.1f}" for r in rows if r['seed']==seed), flush=True)
    df = pd.DataFrame(rows)
    df['teacher'] = accuracy(teacher, x[test], y[test])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    df.to_csv(out, index=False, float_format='%.4g')
