"""The losses of the original fasterai and of torchdistill beside ours: same students, same seeds, same first weights.

    pip download --no-deps fasterai==0.4.1 torchdistill==1.1.5      # each unpacked into a folder of its name in rivals/
    python benchmarks/families.py --names rivals                    # in the folder that has rivals/

The original comes with its own callback, at its weight of 0.5 and its defaults; torchdistill's losses are called by
our callback, at the weights of their published results. Each is compared with our loss by the same recipe. Seconds are
those of the processor."""
import importlib
import importlib.util
import sys
import time
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import *
from fasterai.distill.study.one_run import fit_one_cycle, quiet

from accuracy import learner, trained_teacher
from families import results, runs, study
from settings import SETTINGS

digits = SETTINGS['digits']
maps,last = list(digits.stages),list(digits.last)


@cache
def original():
    "The original fasterai's `distill`, under another name than ours"
    where = Path('rivals/fasterai/fasterai')
    spec = importlib.util.spec_from_file_location('original', where/'__init__.py',
                                                  submodule_search_locations=[str(where)])
    sys.modules['original'] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module('original.distill.all')

@cache
def torchdistill():
    sys.path.append('rivals/torchdistill')
    return importlib.import_module('torchdistill.losses.mid_level')

@cache
def data(): return digits.data(None, torch.device('cpu'))

@cache
def teacher():
    net = trained_teacher(digits, data(), Path('models/accuracy-digits.pth'))[0]
    return net.to(memory_format=torch.contiguous_format) # else the original's `Similarity` fails

def student(): return learner(digits, data(), digits.student(10))


def by_original(name, layers=None):
    "Its callback looks for the student's layers below the Learner"
    def make():
        own = original()
        below = layers and [f'model.{o}' for o in layers]
        return own.KnowledgeDistillationCallback(teacher(), getattr(own, name), below, layers, weight=0.5)
    return make

def ours(loss, layers=None, weight=0.5, task_weight=None):
    def make():
        return KnowledgeDistillationCallback(teacher(), loss, layers, layers, weight=weight, task_weight=task_weight)
    return make

def on_logits(name, **kwargs):
    "torchdistill's loss as a function of ours"
    own = getattr(torchdistill(), name)('out', 'output', 'out', 'output', **kwargs)
    def loss(pred, teacher_pred, target): return own(*({'out': {'output': o}} for o in (pred, teacher_pred)), target)
    return loss

def on_maps(name, *args, pooled=False, **kwargs):
    own = getattr(torchdistill(), name)(*args, **kwargs)
    def io(fm): return {k: {'output': x.mean((2, 3)) if pooled else x} for k,x in fm.items()}
    def loss(fm_s, fm_t): return own(io(fm_s), io(fm_t))
    return loss

def at_pairs(): return {o: dict(student=dict(io='output', path=o), teacher=dict(io='output', path=o)) for o in maps}


def compared():
    "(loss, whose, theirs, ours by their recipe)"
    original_losses = {
        'SoftTarget': (partial(SoftTarget, T=5), None), 'Logits': (Logits, None), 'Mutual': (Mutual, None),
        'DecoupledKD': (partial(DecoupledKD, T=4, beta=8), None), 'Attention': (Attention, maps),
        'Similarity': (Similarity, maps), 'FitNet': (FitNet, maps),
        'ActivationBoundaries': (partial(ActivationBoundaries, m=2), maps)}
    for name,(loss,layers) in original_losses.items():
        yield name,'fasterai 0.4.1',by_original(name, layers),ours(loss, layers)
    layer, = last
    kd = on_logits('KDLoss', temperature=4, alpha=0.1) # with the task's own loss in it
    for name,theirs,loss,layers,weight,task in [
        ('SoftTarget', kd, partial(SoftTarget, T=4), None, 0.9, 0.1),
        ('DIST', on_logits('DISTLoss', tau=4), partial(DIST, T=4), None, 2, 1),
        ('Attention', on_maps('ATLoss', at_pairs()), Attention, maps, 1000, 1),
        ('Similarity', on_maps('SPKDLoss', layer, layer, 'batchmean'), Similarity, last, 3000, 1),
        ('RKD', on_maps('RKDLoss', layer, layer, 25, 50, 'mean'), partial(RKD, distance=25, angle=50), last, 1, 1),
        ('PKT', on_maps('PKTLoss', layer, 'output', layer, 'output', pooled=True), PKT, last, 30000, 1)]:
        as_theirs = dict(weight=1, task_weight=0) if theirs is kd else dict(weight=weight, task_weight=task)
        yield name,'torchdistill 1.1.5',ours(theirs, layers, **as_theirs),ours(loss, layers, weight, task)

def why_not(make):
    "What a way to train says at the first batch, if it fails"
    learn = student()
    try:
        with quiet(learn): learn.fit(1, cbs=make())
    except Exception as e: return f'{type(e).__name__}: {str(e).strip().splitlines()[-1].strip()}'


def fit(learn, epochs, cbs=None):
    start = time.process_time()
    fit_one_cycle(learn, epochs, cbs)
    return dict(seconds=time.process_time()-start)

def run():
    arms,fails = {'alone': None},[]
    for name,whose,theirs,own in compared():
        if said := why_not(theirs): fails.append(dict(loss=name, whose=whose, says=said))
        else: arms |= {f'{name}: {whose}': theirs, f'{name}: ours, as {whose}': own}
    pd.DataFrame(fails).to_csv(results/'family-rivals-fails.csv', index=False)
    return study('rivals', student, arms, fit=fit).run(digits.epochs, seeds=5)

def table():
    "Accuracy of either, the difference by seeds in points with its interval, and their time in units of ours"
    found = runs('rivals')
    rows = []
    for arm in found.arm.unique():
        name,_,whose = arm.partition(': ')
        if arm=='alone' or whose.startswith('ours'): continue
        a,b = (found[found.arm==o].set_index('seed') for o in (f'{name}: ours, as {whose}', arm))
        gain = 100*(a.accuracy-b.accuracy)
        half = 2.776*gain.sem()
        rows.append({'loss': name, 'rival': whose, 'theirs': f'{100*b.accuracy.mean():.1f}',
                     'ours': f'{100*a.accuracy.mean():.1f}', 'ours less theirs': f'{gain.mean():+.1f}',
                     '95 %': f'{gain.mean()-half:+.1f} to {gain.mean()+half:+.1f}',
                     'their time': f'{(b.seconds/a.seconds).median():.2f}'})
    return pd.DataFrame(rows).set_index('loss')
