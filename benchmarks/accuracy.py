"""What each loss is worth: students alone and distilled, from the same first weights, batches and augmentations.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py cifar10_small --data DIR               # DIR/cifar10_small/{train,test}/<class>/*
    python benchmarks/accuracy.py cifar10_small --data DIR --seeds 0 --only SoftTarget,Attention --out again.csv

It is a `Study` with an arm for each loss. One line per run goes into `benchmarks/results/accuracy-SETTING.csv` as
soon as it is finished; what is there already is not run again, so it may be stopped at any time, and several commands
with other `--seeds` may share a file. The teacher is trained once and kept in `models/`. `accuracy_table.py` makes
the tables and plots.

The losses' weights are those of the papers, or of the CIFAR-100 benchmark of Tian et al. (ICLR 2020, arXiv
1910.10699), beside a full task loss where these say no other; those of `Logits`, `CC` and `IRG` are of the collection
Knowledge-Distillation-Zoo. `BinaryKD` and `Ranking` have none that would fit these tasks; theirs are round numbers
that were set before the first run."""
import ctypes
import gc
import os
import re
import resource
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkstemp

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import fastai
import fastai.callback.progress  # gives Learner `no_bar`
import fastai.callback.schedule  # gives Learner `fit_one_cycle`
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import *
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.study.one_run import measure, quiet
from fasterai.distill.study.setting import weights_of
from fasterai.distill.study.study import Study
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import RecordedTeacher
from fasterai.distill.teacher.teacher import Teacher, resize_batch
from fasterai.distill.training.views import StudentSees
from fastcore.foundation import L
from fastcore.script import call_parse
from settings import SETTINGS
from torch import nn

here = Path(__file__).parent
COLS = ['setting', 'loss', 'epochs', 'seed', 'accuracy', 'best', 'task_weight', 'weight', 'task_loss', 'distill_loss',
        'seconds', 'memory_mb', 'teacher', 'teacher_accuracy', 'device', 'torch', 'fastai', 'commit']


def published(s):
    "Each loss by the recipe that the catalogue has of it, at the layers that the setting has for it"
    where = dict.fromkeys(['Attention', 'NST', 'VID', 'ReviewKD'], s.stages) | {'FitNet': s.hint, 'OFD': s.before}
    found = {}
    for name,info in catalogue.items():
        if info.kind not in ('prediction', 'map', 'relation') and name not in LEARNED_LOSSES: continue
        layers = where.get(name, s.last) if 'fm_s' in info.needs else None
        found[name] = recipe_of(name) | dict(activations_student=layers)
    found['DecoupledKD']['loss'] = partial(DecoupledKD, T=4, beta=s.beta)  # by the pair of networks
    boundaries = {partial(ActivationBoundaries, m=1): s.ab}                # alone at first, then the task alone
    found['ActivationBoundaries'] = dict(loss=boundaries, weight=1, task_weight=None, activations_student=s.before,
                                         end_pct=1/8)
    return dict(sorted(found.items(), key=lambda o: o[0] not in SEEDS_LOSSES))

def combined_losses(s):
    "Two that the catalogue does not have"
    both = {partial(SoftTarget, T=4): 0.9, Attention: 1000}
    return {'standardize(SoftTarget)': dict(loss=partial(standardize(SoftTarget), T=2), weight=9, task_weight=0.1),
            'SoftTarget + Attention': dict(loss=both, weight=1, task_weight=0.1, activations_student=s.stages)}

def light_losses(s):
    "As a first try of the callback has them"
    losses = Attention, FitNet, Similarity, ActivationBoundaries
    half = dict(weight=0.5, task_weight=0.5, activations_student=s.stages)
    return {f'{o.__name__} at 0.5': dict(loss=o, **half) for o in losses}

def recipes(s):
    """Arguments of the callback for each loss, by its name; the losses of the first tutorials come first. None trains
    without a teacher"""
    return {'alone': None} | published(s) | combined_losses(s) | light_losses(s)

def suggested(s, dls, teacher):
    "The losses of the first tutorials at weights by which each pulls as hard as the task, by a probe of a new student"
    same_start(dls, 0)
    learn,found = learner(s, dls, s.student(dls.c), s.size),{}
    for name in SEEDS_LOSSES:
        r = published(s)[name]
        recipe = dict(loss=list(r['loss'])[0] if isinstance(r['loss'], dict) else r['loss'],
                      activations_student=r['activations_student'])
        kd = KnowledgeDistillationCallback(teacher, weight=1, task_weight=1, **recipe)
        weight, = suggest_weights(learn, kd).table.suggested.drop('task')
        found[f'{name}, suggested'] = dict(weight=float(f'{weight:.2g}'), task_weight=1, **recipe)
    return found

SEEDS_LOSSES = ['SoftTarget', 'Logits', 'Mutual', 'DecoupledKD',
                'Attention', 'FitNet', 'Similarity', 'ActivationBoundaries']
LEARNED_LOSSES = ['VID', 'CRD', 'ReviewKD', 'OFD']


class Bfloat16(MixedPrecision):
    "fastai's is for GPUs; this is for any device"
    def __init__(self): super().__init__(AMPMode.BF16)
    def before_fit(self):
        device,self.scales = self.dls.device.type,L()
        self.autocast,self.learn.scaler = torch.autocast(device, torch.bfloat16),torch.GradScaler(device, enabled=False)


def learner(s, dls, net, size=None):
    "As all of a setting's are; the network sees pictures of `size` pixels"
    cbs = [Bfloat16()] if (s.amp if dls.device.type=='cuda' else s.amp_on_cpu) else []
    if size: cbs.append(StudentSees(partial(resize_batch, size=size)))
    return Learner(dls, net, CrossEntropyLossFlat(), opt_func=s.opt, lr=s.lr, metrics=accuracy, cbs=cbs, wd=s.wd)


def fit(learn, epochs, cbs=None):
    """Train, and tell the seconds: of the processor where that is what trains, since other work on the machine does
    not count"""
    clock = time.perf_counter if learn.dls.device.type=='cuda' else time.process_time
    start = clock()
    learn.fit_one_cycle(epochs, cbs=cbs)
    return dict(seconds=clock()-start)


def trained_teacher(s, dls, path):
    "The teacher, from `path` if it is there, else trained; and its accuracy"
    same_start(dls, 0)
    s = replace(s, amp_on_cpu=False)  # several settings share it
    net = s.teacher(dls.c).to(dls.device, memory_format=torch.channels_last)
    if not path.exists():
        learn = learner(s, getattr(dls, 'teacher', dls), net, s.teacher_size)
        same_start(learn.dls, 0)
        train = s.fit_teacher or partial(fit, epochs=s.teacher_epochs or s.epochs)
        with quiet(learn): train(learn)
        save_first(net, path)
    net.load_state_dict(torch.load(path, map_location=dls.device, weights_only=True))
    return net,measure(learner(s, dls, net, s.teacher_size))['accuracy']


def answers(s, dls, net, folder=None):
    "The teacher, or what it says about the setting's views, asked once and kept in `folder`"
    teacher = Teacher(net, size=s.teacher_size)
    if not s.views or folder is None: return teacher
    record(teacher, dls, folder, views=s.views, maps=s.kept)
    return RecordedTeacher(folder)


def save_first(net, path):
    "Save the weights, unless another process was faster; all use its teacher"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd,tmp = mkstemp(dir=path.parent)
    try:
        with open(fd, 'wb') as f: torch.save(net.state_dict(), f)
        os.link(tmp, path)
    except FileExistsError: pass
    finally: os.unlink(tmp)


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
    try:
        status = Path('/proc/self/status').read_text().splitlines()
        return next(int(l.split()[1])/1e3 for l in status if l.startswith('VmHWM'))
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3


def numbers(learn):
    "What a run's line says about it"
    names,values = learn.recorder.metric_names[1:-1],learn.recorder.values
    last = dict(zip(names, values[-1]))
    accs = [v[names.index('accuracy')] for v in values]
    losses = dict(task_loss=last.get('task_loss', last['train_loss']), distill_loss=last.get('distill_loss'))
    return dict(accuracy=100*accs[-1], best=100*max(accs), memory_mb=peak_memory(learn.dls.device)) | losses


def study(s, dls, teacher, arms, path=None, about={}):
    "The `Study` of a setting: an arm for each of the recipes `arms`; `about` goes into each row"
    if isinstance(teacher, nn.Module): teacher = answers(s, dls, teacher)
    def make_learner():
        student = s.student(dls.c).to(memory_format=torch.channels_last)
        peak_memory(dls.device, reset=True)
        return learner(s, dls, student, s.size)
    def weights(r): return {k:r[k] for k in ('task_weight', 'weight')} if r else dict(task_weight=1, weight=None)
    full = {k: r and dict(teacher=teacher, **r) for k,r in arms.items()}
    rows = {k: dict(setting=about.get('setting', ''), loss=k, **weights(r)) for k,r in arms.items()}
    return Study(make_learner, full, path, baseline='alone' if 'alone' in arms else None, fit=fit, rows=rows, cols=COLS,
                 measure=lambda learn: about | numbers(learn))


def run(s, dls, teacher, recipe, epochs, seed):
    "One run: what its line says about it"
    return study(s, dls, teacher, {'arm': recipe}).train('arm', epochs, seed)


def commit():
    "The commit of this checkout, with a plus if what runs has been edited since"
    def git(*args): return subprocess.run(['git', '-C', here, *args], capture_output=True, text=True).stdout.strip()
    edited = git('status', '--porcelain', '--', '../fasterai', '*.py')
    return git('rev-parse', '--short', 'HEAD') + ('+' if edited else '')


def device_name(s, device, threads):
    "What computes, as a run's line has it"
    if device.type=='cuda': return torch.cuda.get_device_name()
    return f'cpu, {threads} threads' + (', bfloat16' if s.amp_on_cpu else '')


def plan(s, known, only, epochs):
    "(loss, epochs) of a seed, what the comparison needs most first"
    for o in only:
        if o not in known: raise SystemExit(f"--only: no loss {o!r}; there are {', '.join(known)}")
    longer = s.longer if not only or 'alone' in only else ()
    return [(o, epochs) for o in (only or recipes(s))] + [('alone', round(epochs*f)) for f in longer]


def number_range(seeds):
    "Numbers of text such as 3 or 0-4"
    m = re.fullmatch(r'(\d+)(?:-(\d+))?', seeds)
    if not m or int(m[2] or m[1])<int(m[1]): raise SystemExit(f"--seeds: a number, or two like 0-4, got {seeds!r}")
    return range(int(m[1]), int(m[2] or m[1])+1)


def check_rows(log, teacher, rows):
    "Refuse a file of another teacher, or of other weights"
    if others := {r['teacher'] for r in log.rows} - {teacher}:
        raise SystemExit(f"--out: the runs of {log.path.name} had another teacher ({others.pop()}, here {teacher}): "
                         "give another file")
    for name,row in rows.items():
        if log.find(loss=name) and not log.find(**row):
            raise SystemExit(f"--out: the runs of {name} in {log.path.name} had other weights, or another setting: "
                             "give another file")


@call_parse
def main(
    setting:str,                 # Which one of `settings.py`
    data:Path=Path('data'),      # Folder of the data sets' folders
    seeds:str='0-4',             # Seeds, such as 3 or 0-4
    only:str='',                 # Losses by commas; the tutorials' `seeds`, `suggested` by a probe, `learned`; or all
    epochs:int=None,             # Other than the setting's
    out:Path=None,               # CSV of the runs
    models:Path=Path('models'),  # Where the trained teacher is kept
    threads:int=1,               # On a CPU
):
    if setting not in SETTINGS: raise SystemExit(f"setting: no {setting!r}; there are {', '.join(SETTINGS)}")
    seeds = number_range(seeds)
    s,device = SETTINGS[setting],torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if not (data/s.folder).is_dir() and s.folder: raise SystemExit(f"--data: no folder {s.folder!r} in {str(data)!r}")
    known,of_probe = recipes(s),[f'{o}, suggested' for o in SEEDS_LOSSES]
    groups = dict(seeds=SEEDS_LOSSES, suggested=of_probe, learned=LEARNED_LOSSES)
    only = ['alone', *groups[only]] if only in groups else [o for o in only.split(',') if o]
    todo = plan(s, [*known, *of_probe], only, epochs or s.epochs)
    torch.set_num_threads(threads)
    dls = s.data(data/s.folder, device=device)
    net,acc = trained_teacher(s, dls, models/f'accuracy-{s.teacher_name or setting}.pth')
    print(f'teacher: {100*acc:.1f} %', flush=True)
    if any(loss in of_probe for loss,_ in todo): known |= suggested(s, dls, answers(s, dls, net))
    teacher = answers(s, dls, net, models/f'answers-{s.teacher_name or setting}')
    about = dict(setting=setting, teacher=weights_of(net), teacher_accuracy=100*acc,
                 device=device_name(s, device, threads),
                 torch=torch.__version__, fastai=fastai.__version__, commit=commit())
    arms = {k:r for k,r in known.items() if k in {loss for loss,_ in todo}}
    runs = study(s, dls, teacher, arms, out or here/'results'/f'accuracy-{setting}.csv', about)
    check_rows(runs.log, about['teacher'], runs.rows)
    for seed in seeds:
        for loss,n in todo:
            before = len(runs.log.rows)
            runs.run(n, [seed], [loss], progress=False)
            for row in runs.log.rows[before:]:
                acc,seconds = float(row['accuracy']),float(row['seconds'])
                print(f"seed {seed}, {n} epochs, {loss}: {acc:.1f} %, {seconds:.0f} s", flush=True)
