"""What each loss is worth: students alone and distilled, from the same first weights, batches and augmentations.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py cifar10_small --data DIR               # DIR/cifar10_small/{train,test}/<class>/*
    python benchmarks/accuracy.py cifar10_small --data DIR --seeds 0 --only SoftTarget,Attention --out again.csv

One line per run goes into `benchmarks/results/accuracy-SETTING.csv` as soon as it is finished; what is there already is not run again, so it may be stopped at any time, and several
commands with other `--seeds` may share a file. The teacher is trained once and kept in `models/`. `accuracy_table.py` makes the tables and plots.

The losses' weights are those of the papers, or of the CIFAR-100 benchmark of Tian et al. (ICLR 2020, arXiv 1910.10699), beside a full task loss where these say no other. `BinaryKD`, `Ranking`, `NKD` and
`Logits` have none that would fit these tasks; theirs are round numbers that were set before the first run."""
import ctypes
import gc
import os
import re
import resource
import subprocess
import time
from functools import partial
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import fastai
import fastai.callback.progress  # gives Learner `no_bar`
import fastai.callback.schedule  # gives Learner `fit_one_cycle`
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fasterai.distill.study.run_log import RunLog
from fasterai.core.seeds import same_start
from fasterai.distill.teacher.recorded.signature import weights_digest
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import *
from fasterai.distill.teacher.teacher import Teacher
from fastcore.script import call_parse
from settings import SETTINGS

here = Path(__file__).parent
COLS = ['setting', 'loss', 'epochs', 'seed', 'accuracy', 'best', 'task_weight', 'weight', 'task_loss', 'distill_loss', 'seconds', 'memory_mb', 'teacher', 'teacher_accuracy', 'device', 'torch', 'fastai', 'commit']


def recipes(s):
    "Arguments of the callback for each loss, by its name; the losses of the first tutorials come first. None trains without a teacher"
    logits = {'SoftTarget': dict(loss=partial(SoftTarget, T=4), weight=0.9, task_weight=0.1), 'Logits': Logits, 'Mutual': Mutual, 'DecoupledKD': partial(DecoupledKD, T=4, beta=s.beta)}
    maps = {'Attention': (Attention, 1000, s.stages), 'FitNet': (FitNet, 100, s.hint), 'Similarity': (Similarity, 3000, s.last),
            'ActivationBoundaries': dict(loss={partial(ActivationBoundaries, m=1): s.ab}, weight=1, task_weight=None, activations_student=s.before, end_pct=1/8)}  # alone at first, then the task alone
    more = {'HardTarget': dict(loss=HardTarget, weight=0.5, task_weight=0.5), 'NKD': NKD, 'DIST': (partial(DIST, T=4), 2), 'TTM': (TTM, 45), 'WTTM': (WTTM, 45), 'BinaryKD': (BinaryKD, 10), 'Ranking': (Ranking, 0.1),
            'standardize(SoftTarget)': dict(loss=partial(standardize(SoftTarget), T=2), weight=9, task_weight=0.1),
            'SoftTarget + Attention': dict(loss={partial(SoftTarget, T=4): 0.9, Attention: 1000}, weight=1, task_weight=0.1, activations_student=s.stages),
            'CWD': (CWD, 50, s.last), 'ChannelStats': (ChannelStats, 0.08, s.last), 'NST': (NST, 50, s.stages), 'RKDDistance': (RKDDistance, 25, s.last), 'RKDAngle': (RKDAngle, 50, s.last),
            'RKD': (RKD, 1, s.last), 'PKT': (PKT, 30000, s.last), 'CC': (CC, 100, s.last), 'IRG': (IRG, 1, s.last)}
    light = {f'{o.__name__} at 0.5': dict(loss=o, weight=0.5, task_weight=0.5, activations_student=s.stages) for o in
             (Attention, FitNet, Similarity, ActivationBoundaries)}  # as a first try of the callback has them
    def recipe(r):
        if isinstance(r, dict): return dict(task_weight=1) | r
        loss,weight,layers = (*r, None)[:3] if isinstance(r, tuple) else (r, 1, None)
        return dict(loss=loss, weight=weight, task_weight=1, activations_student=layers)
    return {'alone': None} | {k:recipe(r) for k,r in (logits|maps|more|light).items()}

SEEDS_LOSSES = ['SoftTarget', 'Logits', 'Mutual', 'DecoupledKD', 'Attention', 'FitNet', 'Similarity', 'ActivationBoundaries']


def fit(s, dls, net, epochs, seed, kd=None):
    "Train `net` and return its Learner, and the seconds it took: of the processor where that is what trains, since other work on the machine does not count"
    cbs = [MixedPrecision(AMPMode.BF16)] if s.amp and dls.device.type=='cuda' else []
    learn = Learner(dls, net, CrossEntropyLossFlat(), opt_func=s.opt, metrics=accuracy, cbs=cbs, wd=s.wd)
    clock = time.perf_counter if dls.device.type=='cuda' else time.process_time
    same_start(dls, seed)
    start = clock()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, s.lr, cbs=kd)
    return learn,clock()-start


def trained_teacher(s, dls, path):
    "The teacher, from `path` if it is there, else trained; and its accuracy"
    same_start(dls, 0)
    net,own = s.teacher(dls.c).to(dls.device, memory_format=torch.channels_last),getattr(dls, 'teacher', dls)
    if not path.exists():
        fit(s, own, net, s.teacher_epochs or s.epochs, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), tmp := path.with_suffix(f'.{os.getpid()}'))
        try: os.link(tmp, path)
        except FileExistsError: pass  # another process was faster; all use its teacher
        finally: tmp.unlink()
    net.load_state_dict(torch.load(path, map_location=dls.device, weights_only=True))
    learn = Learner(dls, net, CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): return net,learn.validate()[1]


def peak_memory(device, reset=False):
    "Megabytes at the most since `reset`: of the GPU, else of this process where the system can tell"
    if reset: gc.collect()
    if device.type=='cuda':
        if reset: torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)/1e6
    if reset:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed, and the allocator has kept
            Path('/proc/self/clear_refs').write_text('5')
        except (OSError, AttributeError): return
    try: return next(int(l.split()[1])/1e3 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM'))
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3


def run(s, dls, teacher, recipe, epochs, seed):
    "One run: what its line says about it"
    same_start(dls, seed)
    student = s.student(dls.c).to(memory_format=torch.channels_last)
    kd = recipe and KnowledgeDistillationCallback(Teacher(teacher), **recipe)
    peak_memory(dls.device, reset=True)
    learn,seconds = fit(s, dls, student, epochs, seed, kd)
    names,values = learn.recorder.metric_names[1:-1],learn.recorder.values
    last,accs = dict(zip(names, values[-1])),[v[names.index('accuracy')] for v in values]
    weights = {k:recipe[k] for k in ('task_weight', 'weight')} if recipe else dict(task_weight=1)
    return dict(accuracy=100*accs[-1], best=100*max(accs), seconds=seconds, memory_mb=peak_memory(dls.device), task_loss=last.get('task_loss', last['train_loss']), distill_loss=last.get('distill_loss')) | weights


def commit():
    "The commit of this checkout, with a plus if what runs has been edited since"
    def git(*args): return subprocess.run(['git', '-C', here, *args], capture_output=True, text=True).stdout.strip()
    return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain', '--', '../fasterai', '*.py') else '')


def plan(s, only, epochs):
    "(loss, epochs) of a seed, what the comparison needs most first"
    known = recipes(s)
    for o in only:
        if o not in known: raise SystemExit(f"--only: no loss {o!r}; there are {', '.join(known)}")
    return [(o, epochs) for o in (only or known)] + [('alone', round(epochs*f)) for f in s.longer if not only or 'alone' in only]


@call_parse
def main(
    setting:str,                 # Which one of `settings.py`
    data:Path=Path('data'),      # Folder of the data sets' folders
    seeds:str='0-4',             # Seeds, such as 3 or 0-4
    only:str='',                 # Comma-separated losses; all if empty, `seeds` for those of the first tutorials
    epochs:int=None,             # Other than the setting's
    out:Path=None,               # CSV of the runs
    models:Path=Path('models'),  # Where the trained teacher is kept
    threads:int=1,               # On a CPU
):
    if setting not in SETTINGS: raise SystemExit(f"setting: no {setting!r}; there are {', '.join(SETTINGS)}")
    if not (m := re.fullmatch(r'(\d+)(?:-(\d+))?', seeds)) or int(m[2] or m[1])<int(m[1]): raise SystemExit(f"--seeds: a number, or two like 0-4, got {seeds!r}")
    s,device = SETTINGS[setting],torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if not (data/s.folder).is_dir() and s.folder: raise SystemExit(f"--data: no folder {s.folder!r} in {str(data)!r}")
    todo = plan(s, ['alone', *SEEDS_LOSSES] if only=='seeds' else [o for o in only.split(',') if o], epochs or s.epochs)
    torch.set_num_threads(threads)
    log = RunLog(out or here/'results'/f'accuracy-{setting}.csv', COLS)
    dls = s.data(data/s.folder, device)
    teacher,acc = trained_teacher(s, dls, models/f'accuracy-{setting}.pth')
    about = dict(setting=setting, teacher=weights_digest(teacher)[:8], teacher_accuracy=100*acc, device=torch.cuda.get_device_name() if device.type=='cuda' else f'cpu, {threads} threads',
                 torch=torch.__version__, fastai=fastai.__version__, commit=commit())
    if others := {r['teacher'] for r in log.rows} - {about['teacher']}:
        raise SystemExit(f"--out: the runs of {log.path.name} had another teacher ({others.pop()}, here {about['teacher']}): give another file")
    print(f'teacher: {100*acc:.1f} %', flush=True)
    for seed in range(int(m[1]), int(m[2] or m[1])+1):
        for loss,n in todo:
            if log.find(loss=loss, epochs=n, seed=seed): continue
            log.add(row := about | dict(loss=loss, epochs=n, seed=seed) | run(s, dls, teacher, recipes(s)[loss], n, seed))
            print(f"seed {seed}, {n} epochs, {loss}: {row['accuracy']:.1f} %, {row['seconds']:.0f} s", flush=True)
