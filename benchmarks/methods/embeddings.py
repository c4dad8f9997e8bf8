"""Digits without labels: a student of the teacher's embeddings, then a linear classifier on 100 labels.

The teacher is a network of width 32 that has learned all 1,197 digits with their labels, without its head. The student,
of width 8, sees the same digits and no label; afterwards a logistic regression of its embeddings learns 100 labels.
`alone` learns these 100 labels from the start, for as many steps (`epochs` counts steps), and for a third of them."""
from functools import partial

from families import few100, full1197, learner, study, trained
from fastai.data.core import DataLoaders, TfmdDL

from fasterai.data.digits import digits_dls
from fasterai.distill.loss.embeddings import Affinity, Cosine, NoTask, Projected, Queue
from fasterai.distill.losses import SoftTarget
from fasterai.distill.study.one_run import fit_one_cycle, quiet
from fasterai.distill.study.probes import knn_accuracy, probe_head
from fasterai.distill.teacher.teacher import Teacher

COLS = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', 'knn', 'seconds']
STEPS_A_PASS = 1197//64


def pictures(bs=64):
    "The digits without their labels"
    dls = digits_dls()
    train,valid = ([(x,) for x,_ in o] for o in (dls.train_ds, dls.valid_ds))
    return DataLoaders(TfmdDL(train, bs=bs, shuffle=True, drop_last=True, num_workers=0),
                       TfmdDL(valid, bs=len(valid), num_workers=0), device=dls.device)

def taught_without_labels(learn, steps, kd):
    "Teach the model of `learn` without a label; where that had no classes, its head comes from the labels of `learn`"
    classes = kd.terms[0].base is SoftTarget
    body = learn.model if classes else learn.model[:-1]
    pupil = learner(pictures(), lr=1e-2, loss_func=NoTask, metrics=[])
    pupil.model = body
    with quiet(pupil): pupil.fit_one_cycle(steps//STEPS_A_PASS, cbs=kd)
    if classes: return
    learn.model[-1] = probe_head(pupil, learn.dls)
    return dict(knn=knn_accuracy(pupil, learn.dls, k=5))

def fit(learn, steps, kd):
    "A step on 100 labels is an epoch"
    return fit_one_cycle(learn, steps) if kd is None else taught_without_labels(learn, steps, kd)


def run():
    whole = trained(partial(full1197, width=32), 60)
    body = dict(teacher=Teacher(whole[:-1], cache=True), weight=1, task_weight=0)
    arms = {'alone': None,
            'nothing taught': body | dict(loss=Projected(Cosine), weight=0),
            'Cosine': body | dict(loss=Projected(Cosine)),
            'Affinity': body | dict(loss=Affinity),
            'Queue': body | dict(loss=Projected(Queue(size=256))),
            'logits of the ten classes': dict(teacher=whole, loss=partial(SoftTarget, T=4), weight=1, task_weight=0)}
    runs = study('embeddings', few100, arms, fit=fit, cols=COLS)
    runs.run(120, 5, ['alone'])
    runs.run(360, 5)
