"""Without another network: self-distillation in its kinds, deep supervision, and what each must be set against. On 100
digits, some on all 1,197.

`last_batch` makes as many steps as `alone`, with every row in two of them. So it has three controls: `alone` (equal
steps), `alone` for 240 epochs (as many rows), and the same batches without the divergence (`rows twice`)."""
from functools import partial

import torch
from fastai.metrics import AccumMetric, accuracy
from torch import Tensor

from families import few100, full1197, study
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.teacherless import VirtualTeacher
from fasterai.distill.methods.exits import DeepSupervision
from fasterai.distill.methods.itself import SelfDistillation
from fasterai.distill.study.one_run import fit_one_cycle


def ece(pred, target, bins=15):
    "Expected calibration error: how far confidence and accuracy lie apart, on average over bins of confidence"
    sure,said = pred.as_subclass(Tensor).softmax(1).max(1)
    right = (said==target.as_subclass(Tensor)).float()
    which = (sure*bins).long().clamp(max=bins-1)
    return torch.zeros(bins).index_add(0, which, right-sure).abs().sum().item()/len(pred)

def few_with_ece(): return few100(metrics=[accuracy, AccumMetric(ece, flatten=False)])

def smoothing(eps=0.1, classes=10):
    "Label smoothing, whose gradients are those of a virtual teacher at T=1"
    loss = partial(VirtualTeacher, T=1, p=1-eps+eps/classes)
    return KnowledgeDistillationCallback(None, loss, weight=1.)

arms = {
    'alone': None,
    'label smoothing': smoothing,
    'last_batch': partial(SelfDistillation, 'last_batch'),
    'rows twice': partial(SelfDistillation, 'last_batch', weight=1e-9),
    'class': partial(SelfDistillation, 'class'),
    'past': partial(SelfDistillation, 'past'),
    'virtual': partial(SelfDistillation, 'virtual'),
    'virtual, as run': partial(SelfDistillation, 'virtual', partial(VirtualTeacher, as_run=True)),
    'deep supervision': partial(DeepSupervision, ['0', '1'])}


def fit(learn, epochs, cbs):
    "Train, and judge the exits if there are any"
    fit_one_cycle(learn, epochs, cbs)
    if not isinstance(cbs, DeepSupervision): return
    return {f'exit {k}':v for k,v in cbs.exit_accuracies(learn).items()}

def run():
    few = study('itself', few_with_ece, arms).run(120, 5)
    few.run(240, 5, arms=['alone'])
    cols = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', 'exit 0', 'exit 1', 'seconds']
    full = {k:arms[k] for k in ('alone', 'last_batch', 'class', 'deep supervision')}
    study('itself-full', full1197, full, fit=fit, cols=cols).run(20, 5)
