"""Digits in five tasks of two classes, one after the other, judged on all ten classes without being told the task.

`labels over the new, no teacher` and `replay` are the controls of what distillation adds; `joint` has all the data at
once, for about as many steps as the five tasks together."""
from functools import partial

import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import TensorCategory, TensorImageBW
from sklearn.datasets import load_digits

from fasterai.core.seeds import same_start
from fasterai.distill.loss.remember import LessForget, PooledOutput, weight_by_classes
from fasterai.distill.methods.columns import OneHotBCE
from fasterai.distill.methods.continual import Remember, grow_head
from fasterai.distill.methods.exemplars import Exemplars, nearest_mean
from fasterai.distill.study.one_run import fit_one_cycle, quiet
from families import learner, study

tasks = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
stages = [f'stage_{i+1}' for i in range(len(tasks))]
cols = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', *stages, 'mean_of_stages', 'task_known',
        'seconds']


images = torch.tensor(load_digits().images/16, dtype=torch.float32)[:, None]
labels = load_digits().target


class Digits:
    "Digits by their numbers, of classes that have names"
    def __init__(self, numbers, vocab):
        self.vocab = list(vocab)
        self.rows = [(TensorImageBW(images[i]), TensorCategory(int(labels[i]))) for i in numbers]

    def __len__(self): return len(self.rows)
    def __getitem__(self, i): return self.rows[i]


def digits_of(classes, seen=None):
    "Training digits of `classes`, validation digits of all that were `seen`; the first 600 are those of the validation"
    seen = range(max(classes)+1) if seen is None else seen
    train = Digits([i for i in range(600, len(labels)) if labels[i] in classes], seen)
    valid = Digits([i for i in range(600) if labels[i] in seen], seen)
    return DataLoaders.from_dsets(train, valid, bs=64, val_bs=600, num_workers=0, device='cpu')


def student():
    "A network of two classes, which will be ten"
    learn = learner(digits_of(tasks[0]), 16, lr=1e-2)
    learn.model[-1] = torch.nn.Linear(32, 2)
    return learn

def accuracy_of(learn):
    "Over the classes seen so far"
    with quiet(learn): return learn.validate()[1]

@torch.no_grad()
def task_known(learn):
    "Accuracy among the two classes of a picture's own task"
    with quiet(learn): pred,y = learn.get_preds()
    own = y//2
    pairs = pred.view(len(y), -1, 2)[torch.arange(len(y)), own]
    return (pairs.argmax(1)==y%2).float().mean().item()


def in_turn(learn, epochs, remember=None, keep=0, binary=False, mean=False):
    "One task after the other; `remember(old, n_old)` makes the callback of each after the first"
    seed = torch.initial_seed()
    memory = Exemplars(keep) if keep else None
    found = []
    if binary: learn.loss_func = OneHotBCE()
    for k,classes in enumerate(tasks):
        kd = None
        if k:
            same_start((), seed+k) # the same new rows for each arm
            old = grow_head(learn, digits_of(classes))
            if k and memory: learn.dls = memory.join(learn.dls)
            same_start(learn.dls, seed+k)
            if remember: kd = remember(old, 2*k)
        fit_one_cycle(learn, epochs, kd)
        if memory is not None: memory.add(learn, digits_of(classes).train_ds)
        judged = nearest_mean(learn, memory) if mean else learn
        found.append(accuracy_of(judged))
    learn.model = judged.model
    return {**dict(zip(stages, found)), 'mean_of_stages': sum(found)/len(found), 'task_known': task_known(learn)}

def joint(learn, epochs):
    "All classes at once"
    learn.model[-1] = torch.nn.Linear(32, 10)
    learn.dls = digits_of(range(10))
    same_start(learn.dls, torch.initial_seed())
    fit_one_cycle(learn, epochs)
    return {'task_known': task_known(learn)}


def lwf(old, n_old, **kwargs): return Remember(old, **kwargs)
def less_forget(old, n_old):
    return Remember(old, 'all', LessForget, weight=weight_by_classes(5, n_old, 2), activations_student='5:input',
                    activations_teacher='5:input')
def pooled(old, n_old):
    "Of all stages; PODNet's weight grows with the share of all classes"
    layers = ['0', '1', '2', '5:input']
    return Remember(old, 'all', PooledOutput, weight=weight_by_classes(3, n_old+2, 2), activations_student=layers,
                    activations_teacher=layers)

ways = {
    'finetune': in_turn,
    'LwF, labels over all': partial(in_turn, remember=partial(lwf, ce='all')),
    'LwF, labels over the new': partial(in_turn, remember=lwf),
    'labels over the new, no teacher': partial(in_turn, remember=partial(lwf, weight=0)),
    'replay': partial(in_turn, keep=20),
    'replay + LwF': partial(in_turn, keep=20, remember=partial(lwf, ce='all')),
    'replay + LessForget': partial(in_turn, keep=20, remember=less_forget),
    'replay + PooledOutput': partial(in_turn, keep=20, remember=pooled),
    'iCaRL': partial(in_turn, keep=20, remember=partial(lwf, ce='binary'), binary=True, mean=True),
    'joint': joint}


def fit(learn, epochs, way): return way(learn, epochs)

def arm(way):
    "What a study calls for each run, for the way itself"
    return lambda: way

def run():
    arms = {name:arm(way) for name,way in ways.items()}
    return study('continual', student, arms, fit=fit, cols=cols, baseline='finetune').run(15, seeds=5)
