"""Distillation on adversarial digits against adversarial training, and a discriminator beside the usual loss.

`robust` is the accuracy under 20 steps of the attack that the training took 7 of; changes of up to 0.15 of the range of
a pixel. The baseline is adversarial training; plain students and teachers on clean pictures show that it attacks.
The arms of the discriminator have 100 digits, and the baseline is `SoftTarget` alone."""
from functools import partial

from fastai.torch_core import set_seed

from fasterai.data.digits import digits_dls
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.attack import Attack
from fasterai.distill.methods.discriminator import Discriminator
from fasterai.distill.study.one_run import measure, quiet
from families import few100, full1197, learner, study, trained

attack = partial(Attack, eps=0.15, step=0.04)
cols = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', 'robust', 'seconds']


def student(): return learner(digits_dls(n_train=600), lr=1e-2)

def robust_teacher(width=32, epochs=15):
    "Trained on what the attack makes of all 1,197 digits"
    return trained(partial(full1197, width, cbs=attack(steps=7)), epochs)

def under_attack(learn):
    "`measure`, and the accuracy under 20 steps"
    found = measure(learn)
    set_seed(0)
    with quiet(learn): return {**found, 'robust': learn.validate(cbs=attack(steps=20))[1]}


def way(teacher=None, loss=SoftTarget, against=None, natural=0., **kwargs):
    "What a study calls for each run, for its callbacks: a distillation, an attack, or both"
    def make():
        cbs = [] if against is None else [attack(steps=7, against=against, natural=natural)]
        return cbs if teacher is None else [KnowledgeDistillationCallback(teacher, loss, **kwargs), *cbs]
    return make

def run():
    robust,clean = robust_teacher(),trained(partial(full1197, 32), 60)
    alone = dict(weight=1., task_weight=0.)
    arms = {
        'adversarial training': way(against='label'),
        'plain': way(),
        'taught by a plain teacher, clean pictures': way(clean, T=4, weight=0.9),
        'taught by the robust teacher, clean pictures': way(robust, T=4, weight=0.9),
        'ARD': way(robust, against='label', T=4, **alone),
        'RSLAD': way(robust, against='teacher', natural=1/6, T=1, **alone),
        'AdaAD': way(robust, against='both', T=1, **alone)}
    study('robust', student, arms, measure=under_attack, cols=cols, baseline='adversarial training').run(15, seeds=5)
    run_discriminators(clean)

def run_discriminators(teacher):
    soft = partial(SoftTarget, T=4)
    def beside(*judges, w=0.1, layers=None):
        return dict(teacher=teacher, loss={soft: 1., **{o:w for o in judges}}, weight=0.9, **(layers or {}))
    last = dict(activations_student='2', activations_teacher='2')
    arms = {
        'alone': None,
        'SoftTarget': beside(),
        'SoftTarget + hinge': beside(Discriminator()),
        'SoftTarget + vanilla': beside(Discriminator(loss='vanilla')),
        'SoftTarget + wgan': beside(Discriminator(loss='wgan')),
        'SoftTarget + hinge on maps': beside(Discriminator('maps'), layers=last),
        'hinge, no SoftTarget': dict(teacher=teacher, loss=Discriminator(), weight=0.1, task_weight=0.9)}
    study('discriminator', few100, arms).run(120, seeds=5)
