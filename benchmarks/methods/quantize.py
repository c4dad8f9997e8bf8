"""What rounding costs and what training gives back: 2 bits with a hundred labels, and 8 and 4 bits with all of them.

Every arm of a seed begins at the same trained network in full precision, and takes as many steps as the others. Arms
of 8 bits are judged as integers; those of fewer bits are simulated. The speed of integers is measured in pairs, the
two networks by turns, since a shared machine is faster at one moment than at another."""
from functools import cache, partial

import pandas as pd
import torch
from fastai.torch_core import set_seed

from families import few100, full1197, results, study, trained
from fasterai.core.cost import best_time
from fasterai.core.seeds import same_start
from fasterai.data.digits import digits_dls
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.ship.quantize import FreezeQuantizers, quantize_aware
from fasterai.distill.study.measure import size_mb
from fasterai.distill.study.one_run import fit_one_cycle, quiet

steps,lr = 190,2e-3 # of what comes after the network in full precision

@cache
def wide(): return trained(partial(full1197, 32), 60)

@cache
def few_in_full(seed):
    "A hundred images, and a wide teacher"
    set_seed(seed)
    learn = few100()
    same_start(learn.dls, seed)
    kd = KnowledgeDistillationCallback(wide(), partial(SoftTarget, T=4), weight=.9)
    with quiet(learn): fit_one_cycle(learn, 120, kd)
    return learn.model.eval()

@cache
def all_in_full(seed): return trained(full1197, 20, seed)

def itself(learn):
    "The teacher is the network in full precision; no labels"
    return KnowledgeDistillationCallback(learn.model, partial(SoftTarget, T=1), weight=1, task_weight=0)


def rounded(learn, epochs, bits): return quantize_aware(learn, bits)

def taught(learn, epochs, bits, teacher=None, dls=None, rate=lr):
    "Quantization-aware training: with the labels of the data, or with a teacher"
    q = quantize_aware(learn, bits)
    if dls is not None: q.dls = dls
    same_start(q.dls, torch.initial_seed())
    q.lr = rate
    epochs = epochs if dls is None else steps//len(dls.train)
    cbs = [FreezeQuantizers()] if bits==8 else []
    with quiet(q): fit_one_cycle(q, epochs, cbs+([teacher(learn)] if teacher else []))
    return q

def unlabelled(learn, epochs, bits): return taught(learn, epochs, bits, itself, digits_dls())

few = {
    '2 bits, rounded': partial(rounded, bits=2),
    '2 bits, trained on the labels': partial(taught, bits=2),
    '2 bits, trained on the labels, 5 times the rate': partial(taught, bits=2, rate=5*lr),
    '2 bits, taught on the 100': partial(taught, bits=2, teacher=itself),
    '2 bits, taught on 1,197 unlabelled': partial(unlabelled, bits=2)}

every = {
    'int8, rounded': partial(rounded, bits=8),
    'int8, taught': partial(taught, bits=8, teacher=itself),
    '4 bits, trained on the labels': partial(taught, bits=4),
    '4 bits, taught': partial(taught, bits=4, teacher=itself)}

def fit(learn, epochs, way, full):
    "From the network in full precision by an arm's way, if it has one"
    learn.model.load_state_dict(full(torch.initial_seed()).state_dict())
    if way is None: return
    q = way(learn, epochs)
    learn.model = q.to_int8() if q.bits==8 else q.model

def arm(way):
    "What a study calls for each run, for the way itself"
    return lambda: way

def arms(ways): return {'full precision': None, **{name:arm(way) for name,way in ways.items()}}


def speed(pairs=15, width=64, bs=64):
    "Both networks by turns; what they weigh is the same each time"
    learn = full1197(width)
    with quiet(learn): learn.fit_one_cycle(2)
    int8 = quantize_aware(learn).to_int8()
    x = torch.rand(bs, 1, 8, 8)
    def seconds(net):
        with torch.no_grad(): return best_time(lambda: net(x), torch.device('cpu'), 20)
    nets = {'full precision': learn.model.eval(), 'int8': int8}
    rows = [dict(pair=i, **{f'{k}, ms': round(1e3*seconds(net), 4) for k,net in nets.items()}) for i in range(pairs)]
    sizes = {f'{k}, kB': round(1e3*size_mb(net), 1) for k,net in nets.items()}
    pd.DataFrame(rows).assign(**sizes).to_csv(results/'family-quantize-speed.csv', index=False)

def run():
    study('quantize-few', few100, arms(few), fit=partial(fit, full=few_in_full)).run(steps, seeds=5)
    study('quantize', full1197, arms(every), fit=partial(fit, full=all_in_full)).run(10, seeds=5)
    speed()
