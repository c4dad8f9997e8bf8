"""What capturing four stages costs a training step of resnet18 at 64 px

Steps with and without `Capture` take turns, so that other work on the machine meets both alike; CPU time is compared,
since wall time on a shared machine says more about the neighbours. On a GPU the wall time of synchronized steps is
compared. The ratio of two steps is noisy by more than the answer, so what capture does is also timed alone, around four
modules that do nothing, and given as a share of the step."""
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from torch import nn
from torchvision.models import resnet18

from fasterai.distill.layers.capture import Capture


def timed(f, cuda):
    if cuda: torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    f()
    if cuda: torch.cuda.synchronize()
    return clock()-start

def alone(n=2000):
    "Seconds that a capture of four layers takes by itself"
    model,x = nn.Sequential(*[nn.Identity() for _ in range(4)]),torch.randn(1)
    capture = Capture(model, ['0', '1', '2', '3'])
    def plain(): model(x)
    def captured():
        with capture: model(x)
        capture.maps
        capture.clear()
    each = {f:[timed(f, False) for _ in range(n)] for f in (captured, plain)}
    return median(each[captured])-median(each[plain])

@call_parse
def measure(
    rounds:int=100, # Pairs of steps
    bs:int=16,     # Batch size
    size:int=64,   # Side of the images
    device:str='cpu', # Where
    out:Path=None, # JSON file for the result
)->dict:
    """Print and return the paired ratio of a step with capture to one without: median and quartiles; and the cost of
    the capture alone"""
    torch.manual_seed(0)
    cuda,model = device!='cpu',resnet18(num_classes=10).to(device)
    opt = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x,y = torch.randn(bs, 3, size, size, device=device),torch.randint(10, (bs,), device=device)
    capture = Capture(model, ['layer1', 'layer2', 'layer3', 'layer4'])
    def finish(pred):
        F.cross_entropy(pred, y).backward()
        opt.step()
        opt.zero_grad()
    def plain(): finish(model(x))
    def captured():
        with capture: pred = model(x)
        capture.maps
        finish(pred)
        capture.clear()
    for _ in range(3): plain(), captured()
    ratios,steps = [],[]
    for i in range(rounds):
        both = {f:timed(f, cuda) for f in ((plain, captured) if i%2 else (captured, plain))}
        ratios.append(both[captured]/both[plain])
        steps.append(both[plain])
    low,_,high = quantiles(ratios, n=4)
    cost = alone()
    res = dict(device=torch.cuda.get_device_name() if cuda else 'cpu', threads=torch.get_num_threads(), bs=bs,
               size=size, rounds=rounds,
               step_ms=round(1e3*median(steps), 2), ratio=round(median(ratios), 4),
               quartiles=(round(low, 4), round(high, 4)),
               alone_us=round(1e6*cost, 1), alone_percent=round(100*cost/median(steps), 3))
    print(res)
    if out: Path(out).write_text(json.dumps(res, indent=1)+'\n')
    return res
