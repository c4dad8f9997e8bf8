"""A student that sees the digits at 4x4, taught by a network that sees them at 8x8.

On 100 labelled digits, and without a label on all 1,197. The controls: a teacher of the student's own poor view, and
for the unlabelled arms the student alone for as many steps."""
from functools import partial

from fasterai.data.digits import digits_dls
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.generalized import GeneralizedDistillation
from fasterai.distill.losses import SoftTarget
from fasterai.distill.study.one_run import fit_one_cycle
from fasterai.distill.teacher.teacher import Teacher, resize_batch
from fasterai.distill.training.views import StudentSees
from families import few100, full1197, study, trained

poor = partial(resize_batch, size=4)
per_epoch = len(digits_dls().train) # steps of an epoch on all images; on the 100 an epoch is one step
soft = dict(loss=partial(SoftTarget, T=4), weight=0.9)


def student(): return few100(cbs=StudentSees(poor))

def longer(learn, epochs, times=3): fit_one_cycle(learn, times*epochs)

def without_labels(learn, epochs, teacher, times=1):
    "Answers of `teacher` in place of labels, on all images, for as many steps as `times*epochs` on the hundred"
    learn.dls = digits_dls()
    kd = KnowledgeDistillationCallback(teacher, **soft, task_weight=0)
    fit_one_cycle(learn, round(times*epochs/per_epoch), kd)

def fit(learn, epochs, arm):
    "An arm is a way to train, or a callback"
    if isinstance(arm, partial): arm(learn, epochs)
    else: fit_one_cycle(learn, epochs, arm)

def way(f, **kwargs):
    "What a study calls for each run, for the way itself"
    f = partial(f, **kwargs)
    return lambda: f

def run():
    sees_all = trained(partial(full1197, width=32), 60)
    sees_poor = Teacher(trained(partial(full1197, width=32, cbs=StudentSees(poor)), 60), tfms=poor)
    arms = {
        'alone': None,
        'taught from 8x8': dict(teacher=sees_all, **soft),
        'generalized, from 8x8': dict(teacher=sees_all, loss=GeneralizedDistillation, weight=0.5),
        'taught from its own 4x4': dict(teacher=sees_poor, **soft),
        'alone, 3 times the steps': way(longer),
        'no labels, from 8x8': way(without_labels, teacher=sees_all),
        'no labels, from 8x8, 3 times the steps': way(without_labels, teacher=sees_all, times=3),
        'no labels, from its own 4x4, 3 times': way(without_labels, teacher=sees_poor, times=3)}
    return study('views', student, arms, fit=fit).run(120, seeds=5)
