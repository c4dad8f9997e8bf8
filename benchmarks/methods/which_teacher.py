"Which state of a wide teacher is best for a narrow student: short runs against the training that they stand for"
from functools import partial

import pandas as pd
from fastai.torch_core import set_seed

from families import few100, full1197, results, runs, trained
from fasterai.core.seeds import same_start
from fasterai.distill.losses import SoftTarget
from fasterai.distill.study.one_run import quiet
from fasterai.distill.study.which_teacher import which_teacher
from fasterai.distill.teacher.checkpoints import KeepEpochs

wide = partial(full1197, 64)
full = 120      # epochs of the training that follows a search
repeats,n = 5,3 # searches, and the seeds of each
names = ['which_teacher', 'which_teacher-again'] # the second is another training of the teacher, to confirm the first


def states(seed=0):
    "Of one training of 60 epochs"
    set_seed(seed)
    learn,keep = wide(),KeepEpochs(1, 2, 4, 8, 16, 32, 60)
    same_start(learn.dls, seed)
    with quiet(learn): learn.fit_one_cycle(60, cbs=keep)
    return {f'{k} of 60':net for k,net in keep.nets.items()}

def run():
    "Run what is missing"
    own = {f'{e} epochs in all':trained(wide, e) for e in (2, 4, 8)} # short trainings, each with its own one-cycle
    _search(names[0], {**states(), **own}, lengths=[30, 60])
    _search(names[1], states(seed=1), lengths=[30])

def _search(name, teachers, lengths):
    "Short runs, and full trainings with seeds of their own; and what the teachers themselves know"
    found = which_teacher(partial(few100, 4), teachers, lengths[0], repeats*n, path=results/f'family-{name}.csv',
                          progress=False, loss=partial(SoftTarget, T=4), weight=.9)
    of_one = [a for a in teachers if a.endswith('of 60')]
    for epochs in lengths[1:]: found.study.run(epochs, repeats*n, arms=of_one, progress=False)
    found.study.run(full, range(100, 100+repeats), progress=False)
    facts = pd.DataFrame(found.facts).T.rename_axis('teacher')
    facts.to_csv(results/f'family-{name}-teachers.csv', float_format='%.6g')

def picks(name=names[0], epochs=30, by='accuracy'):
    "For each search among the states the one that its short runs chose, and what students of full trainings made of it"
    found = runs(name)
    found = found[found.arm.str.endswith('of 60')]
    long = found[found.epochs.eq(full)].pivot(index='seed', columns='arm', values='accuracy')
    tried = found[found.epochs.eq(epochs)].assign(search=lambda d: d.seed//n)
    tried = tried.groupby(['search', 'arm'])[by].mean().unstack()
    chosen = tried.idxmin(axis=1) if by=='valid_loss' else tried.idxmax(axis=1)
    return pd.DataFrame([_judged(a, long, long.iloc[i]) for i,a in chosen.items()]).rename_axis('search')

def _judged(arm, long, one):
    "Gaps in points to the best teacher: by the mean of all full trainings, and in one training"
    means = long.mean()
    return dict(chosen=arm, student=100*means[arm], gap=100*(means.max()-means[arm]), best=means.idxmax(),
                gap_in_one_training=100*(one.max()-one[arm]))
