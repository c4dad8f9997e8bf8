"""The runs of `accuracy.py` summed up: a table for each file, and a picture.

    python benchmarks/accuracy_table.py benchmarks/results/accuracy-*.csv --picture gains.png

For each loss the accuracy after the last epoch (mean and standard deviation over the seeds, and the 95 % interval of
the mean), and the difference to the students without a teacher, paired by seed, with its 95 % interval: at as many
epochs, and against the shortest training without a teacher that took as long (a tenth less will do; the longest one
if none did). The p-values of a table are adjusted for their number (Benjamini and Hochberg's false discovery rate);
the intervals are not. The statistics are those of `fasterai.distill.study.summary`."""
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import pandas as pd
from fasterai.core.plots import new_axes
from fasterai.distill.study.summary import plot_gains, readable as as_text, summary

TITLES = {'imagenette_mobilenet': '1,053 photographs', 'cifar10_small': 'CIFAR-10, 5,000 images',
          'digits': 'digits, 100 labels'}
plot = partial(plot_gains, arm='loss')


def table(
    runs, # Lines of one setting
):
    """A row for each loss and length of training, the best first. Raises ValueError without runs of `alone`, for a
    run that is there twice, or a single seed"""
    if runs.seed.nunique()<2:
        raise ValueError(f"runs: intervals need two seeds at least, got seed {runs.seed.iloc[0]} only")
    df = summary(runs, arm='loss')
    groups = runs.groupby(['loss', 'epochs'])
    more = groups.agg(task_weight=('task_weight', 'first'), weight=('weight', 'first'), best=('best', 'mean'))
    return df.merge(more, on=['loss', 'epochs'])


def readable(df):
    """The table as text: an accuracy and the half of its 95 % interval, gains with theirs, p-values, and `time` in
    units of the student's without a teacher"""
    text = as_text(df, arm='loss')
    weights = [' + '.join(f'{r[k]:g}' for k in ('task_weight', 'weight') if pd.notna(r[k])) for _,r in df.iterrows()]
    text.insert(0, 'weights', weights)
    return text


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
        first = runs.iloc[0]
        print(f'\n{f.stem}: teacher {first.teacher_accuracy:.1f} %, {first.device}\n{readable(t).to_string()}')
    if args.picture: picture(tables, args.picture)


if __name__=='__main__': main()
