"""The runs of `accuracy.py` summed up: a table for each file, and a picture.

    python benchmarks/accuracy_table.py benchmarks/results/accuracy-*.csv --picture gains.png

For each loss the accuracy after the last epoch (mean and standard deviation over the seeds, and the 95 % interval of the mean), and the difference to the students without a teacher, paired by
seed, with its 95 % interval: at as many epochs, and against the shortest training without a teacher that took as long (a tenth less will do; the longest one if none did). The p-values of a
table are adjusted for their number (Benjamini and Hochberg's false discovery rate); the intervals are not."""
from argparse import ArgumentParser
from pathlib import Path

import pandas as pd
from fasterai.core.plots import COLORS, GREY, look, new_axes
from fasterai.core.stats import paired_test
from scipy import stats


TITLES = {'cifar10_small': 'CIFAR-10, 5,000 images', 'digits': 'digits, 100 labels'}


def half_width(x, conf=0.95):
    "Of the interval of the mean of `x`"
    return stats.t.ppf((1+conf)/2, len(x)-1)*x.std(ddof=1)/len(x)**0.5 if len(x)>1 else float('nan')


def differences(a, b):
    "Paired test of two series of accuracies with the seed as index, over the seeds that both have"
    seeds = a.index.intersection(b.index)
    return paired_test(a[seeds], b[seeds]) if len(seeds)>1 else None


def _against(a, b, name):
    t = differences(a, b)
    return {name:t.diff, f'{name}_low':t.ci[0], f'{name}_high':t.ci[1], f'{name}_p':t.p} if t else {}


def table(
    runs, # Lines of one setting
):
    "A row for each loss and length of training, the best first. Raises ValueError without runs of `alone`, for a run that is there twice, or a single seed"
    twice = runs[runs.duplicated(['loss', 'epochs', 'seed'])]
    if len(twice): raise ValueError(f"there are two runs of {twice.loss.iloc[0]}, {twice.epochs.iloc[0]} epochs, seed {twice.seed.iloc[0]}: keep one")
    if runs.seed.nunique()<2: raise ValueError(f"runs: intervals need two seeds at least, got seed {runs.seed.iloc[0]} only")
    runs = runs.set_index('seed')
    groups = {k:g for k,g in runs.groupby(['loss', 'epochs'], sort=False)}
    alone = {n:g for (loss,n),g in groups.items() if loss=='alone'}
    if not alone: raise ValueError("there are no runs of `alone`, without a teacher, to compare with")
    rows = []
    for (loss,n),g in groups.items():
        row = dict(loss=loss, epochs=n, task_weight=g.task_weight.iloc[0], weight=g.weight.iloc[0], seeds=len(g), accuracy=g.accuracy.mean(), sd=g.accuracy.std(), ci=half_width(g.accuracy), best=g.best.mean(), seconds=g.seconds.median())
        if loss!='alone' and n in alone:
            row |= dict(time=row['seconds']/alone[n].seconds.median()) | _against(g.accuracy, alone[n].accuracy, 'gain')
            as_long = [m for m in sorted(alone) if alone[m].seconds.median()>0.9*row['seconds']] or [max(alone)]
            row |= dict(alone_epochs=as_long[0]) | _against(g.accuracy, alone[as_long[0]].accuracy, 'same_time')
        rows.append(row)
    df = pd.DataFrame(rows).sort_values('accuracy', ascending=False, ignore_index=True)
    for k in ('gain', 'same_time'):
        if k not in df: continue
        known = df[f'{k}_p'].notna()
        df.loc[known, f'{k}_p'] = stats.false_discovery_control(df.loc[known, f'{k}_p'])
    return df


def readable(df):
    "The table as text: an accuracy and the half of its 95 % interval, gains with theirs, p-values, and `time` in units of the student's without a teacher"
    def known(r, k): return pd.notna(r.get(k))
    def interval(r, k): return f'{r[k]:+.1f} ({r[k+"_low"]:+.1f} to {r[k+"_high"]:+.1f})' if known(r, k) else ''
    def number(r, k, form): return format(r[k], form) if known(r, k) else ''
    rows = [{'':r.loss, 'weights':' + '.join(number(r, k, 'g') for k in ('task_weight', 'weight') if known(r, k)), 'epochs':f'{r.epochs}',
             'accuracy':f'{r.accuracy:.1f} ± {r.ci:.1f}', 'gain':interval(r, 'gain'), 'p':number(r, 'gain_p', '.2g'), 'time':number(r, 'time', '.2f'),
             'at equal time':interval(r, 'same_time'), 'of':number(r, 'alone_epochs', '.0f') if known(r, 'same_time') else ''} for _,r in df.iterrows()]
    return pd.DataFrame(rows).set_index('').rename_axis(None)


def plot(df, ax=None):
    "Each loss's gain with its interval, at equal epochs (filled) and at equal time (hollow); returns the axes"
    d = df[df.gain.notna()].sort_values('gain', ignore_index=True)
    if ax is None: ax = new_axes(size=(6, 1+0.28*len(d)))[0, 0]
    for k,name,dy,face in (('gain', 'equal epochs', 0.12, COLORS[0]), ('same_time', 'equal time', -0.12, 'none')):
        ax.errorbar(d[k], d.index+dy, xerr=[d[k]-d[f'{k}_low'], d[f'{k}_high']-d[k]], fmt='o', ms=5, capsize=2, lw=1, color=COLORS[k!='gain'], mfc=face, label=name)
    ax.axvline(0, color=GREY, ls='--', lw=1)
    ax.set(yticks=d.index, yticklabels=d.loss, xlabel='points over no teacher')
    with look(): ax.legend(fontsize='small')
    return ax


def picture(tables, path):
    "The plots of several settings side by side, readable on a light page and on a dark one"
    axs = new_axes(1, len(tables), size=(4.2, 1+0.28*max(len(t) for t in tables.values())))[0]
    for ax,(name,t) in zip(axs, tables.items()): plot(t, ax).set_title(TITLES.get(name, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    axs[0].figure.savefig(path, dpi=150)


def main():
    parser = ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('files', nargs='+', type=Path, help='CSV files of `accuracy.py`')
    parser.add_argument('--only', default='', help='comma-separated losses; all if empty')
    parser.add_argument('--picture', type=Path, help='PNG to draw them into')
    args = parser.parse_args()
    tables = {}
    for f in args.files:
        runs = pd.read_csv(f)
        if args.only: runs = runs[runs.loss.isin(['alone', *args.only.split(',')])]
        t = tables[f.stem.removeprefix('accuracy-')] = table(runs)
        print(f'\n{f.stem}: teacher {runs.teacher_accuracy.iloc[0]:.1f} %, {runs.device.iloc[0]}\n{readable(t).to_string()}')
    if args.picture: picture(tables, args.picture)


if __name__=='__main__': main()
