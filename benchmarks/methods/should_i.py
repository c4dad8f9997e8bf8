"""Should I distil? Twenty small tasks, and what a sequential study says of them

    python benchmarks/families.py --names should_i    # in a folder with the `data` of `small_tasks.py`

Each task has a log of its runs in `benchmarks/results/should_i/`; `family-should_i.csv` has a row for each task, with
the leading arm's gain in fresh pairs of runs beside the answer."""
import re

import pandas as pd
from fastai.losses import CrossEntropyLossFlat

from families import results
from fasterai.core.stats import paired_test
from fasterai.distill.study.should_i_distil import should_i_distil
from small_tasks import tasks, usual

pairs = 12
fresh = range(100, 108) # seeds


def ask(name, epochs=None, pairs=pairs, folder=results/'should_i', **kwargs):
    "The sequential study of a task"
    t = tasks[name]
    path = folder/f"{re.sub('[^0-9A-Za-z]+', '_', name)}.csv" if folder else None
    return should_i_distil(t.student, t.teacher(), t.data(), t.arms or usual, epochs or t.epochs, pairs, path=path,
                           finalists=1, progress=False, lr=t.lr, loss_func=CrossEntropyLossFlat(), **kwargs)

def row(name, found):
    "A task's answer"
    low,high = found.interval or (None, None)
    return dict(task=name, of=tasks[name].of, cannot=tasks[name].cannot, answer=found.answer, arm=found.arm,
                leading=found.leading, low=low, high=high, **found.cost)

def to_the_end(found):
    "What would be said, at which cost, if no arm were given up as hopeless"
    found.hopeless = 0
    found.run(progress=False)
    return dict(whole_answer=found.answer, whole_share=found.cost['share'])

def confirm(found, seeds=fresh):
    "The leading arm's gain in pairs that the sequential study has not seen"
    if found.leading is None: return {}
    study,arm,alone = found.study,found.leading,found.as_long[found.leading]
    study.run(found.epochs, seeds, [arm], progress=False)
    study.run(alone, seeds, ['alone'], progress=False)
    runs = study.named().set_index('seed')
    def of(a, n): return runs[runs.arm.eq(a) & runs.epochs.eq(n)][found.metric].loc[list(seeds)]
    t = paired_test(of(arm, found.epochs), of('alone', alone))
    return dict(fresh_gain=t.diff, fresh_low=t.ci[0], fresh_high=t.ci[1])

def run():
    "Run what is missing, task by task: the answer, what is left of its pairs, then the fresh ones"
    rows = []
    for name in tasks:
        found = ask(name)
        print(f'{name}: {found.verdict()}')
        rows.append(row(name, found) | to_the_end(found) | confirm(found))
    pd.DataFrame(rows).to_csv(results/'family-should_i.csv', index=False, float_format='%.6g')

def answers():
    "A row for each task"
    found = pd.read_csv(results/'family-should_i.csv', index_col='task')
    return found.fillna(dict(cannot='', leading=''))

def table():
    "The tasks' answers, gains in points"
    found = answers()
    def span(low, high): return ['' if pd.isna(a) else f'{100*a:+.1f} to {100*b:+.1f}' for a,b in zip(low, high)]
    return pd.DataFrame({'pictures':found.of, 'cannot help, for':found.cannot, 'answer':found.answer,
                         'leading':found.leading, 'interval':span(found.low, found.high), 'pairs':found.pairs,
                         'cost':[f'{o:.0%}' for o in found.share],
                         'fresh pairs':span(found.fresh_low, found.fresh_high)})
