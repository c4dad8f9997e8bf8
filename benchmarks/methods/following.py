"A teacher that follows the student: its decay against the length of the training, on 100 digits"
from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy

from families import few100, study
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.study.one_run import fit_one_cycle
from fasterai.distill.teacher.following import EMA

columns = ['arm', 'setting', 'seed', 'epochs', 'valid_loss', 'accuracy', 'average', 'seconds']


class SmoothLabels(Callback):
    "The control that needs no teacher: labels smoothed by 0.1 in the training"
    def before_train(self): self.learn.loss_func,self.sharp = LabelSmoothingCrossEntropyFlat(0.1),self.learn.loss_func
    def after_train(self): self.learn.loss_func = self.sharp

def following(weight=1., **kwargs):
    "The student's average as its teacher"
    return KnowledgeDistillationCallback(EMA(**kwargs), partial(SoftTarget, T=4), weight=weight, task_weight=1.)

def fit(learn, epochs, cbs):
    "A training, and what the average is worth by itself; where there is none, the student"
    fit_one_cycle(learn, epochs, cbs)
    model = getattr(getattr(cbs, 'teacher', None), 'model', learn.model).eval()
    with torch.no_grad(): scores = [(model(x), y) for x,y in learn.dls.valid]
    return dict(average=float(accuracy(*scores[0])))

arms = {'alone': None, 'labels smoothed': SmoothLabels,
        'EMA()': following,
        **{f'EMA({d})': partial(following, decay=d) for d in (0.8, 0.9, 0.95, 0.99, 0.999)},
        **{f'EMA({d}), not warm': partial(following, decay=d, warm=False) for d in (0.95, 0.999)},
        "EMA(), buffers='average'": partial(following, buffers='average'),
        'EMA(), weight 0': partial(following, weight=0.)}

def run():
    s = study('following', few100, arms, fit=fit, cols=columns)
    s.run(epochs=120, seeds=5)
    s.run(epochs=160, seeds=5, arms=['alone']) # the time that a teacher's forward costs
