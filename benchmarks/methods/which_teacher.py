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
short,full = 30,120          # epochs of the runs that choose, and of the training that follows
repeats,n = 5,3              # searches, and the seeds of each
facts_file = results/'family-which_teacher-teachers.csv'


def candidates():
    "States of one training of 60 epochs, and short trainings of their own"
    set_seed(0)
    learn,keep = wide(),KeepEpochs(1, 2, 4, 8, 16, 32, 60)
    same_start(learn.dls, 0)
    with quiet(learn): learn.fit_one_cycle(60, cbs=keep)
    return {**{f'{k} of 60':net for k,net in keep.nets.items()}, **{f'{e} alone':trained(wide, e) for e in (2, 4, 8)}}

def run():
    "Run what is missing; full trainings have seeds of their own"
    found = which_teacher(partial(few100, 4), candidates(), short, repeats*n, path=results/'family-which_teacher.csv',
                          progress=False, loss=partial(SoftTarget, T=4), weight=.9)
    found.study.run(full, range(100, 100+repeats), progress=False)
    pd.DataFrame(found.facts).T.rename_axis('teacher').to_csv(facts_file, float_format='%.6g')

def picks(among='of 60'):
    "For each search the teacher that its short runs chose, and what the students of full trainings made of it"
    found = runs('which_teacher')
    found = found[found.arm.str.endswith(among)]
    long = found[found.epochs.eq(full)].pivot(index='seed', columns='arm', values='accuracy')
    tried = found[found.epochs.eq(short)].assign(search=lambda d: d.seed//n)
    chosen = tried.groupby(['search', 'arm']).accuracy.mean().unstack().idxmax(axis=1)
    return pd.DataFrame([_judged(a, long, long.iloc[i]) for i,a in chosen.items()]).rename_axis('search')

def _judged(arm, long, one):
    "Gaps in points to the best teacher: by the mean of all full trainings, and in one training"
    means = long.mean()
    return dict(chosen=arm, student=100*means[arm], gap=100*(means.max()-means[arm]), best=means.idxmax(),
                gap_in_one_training=100*(one.max()-one[arm]))
