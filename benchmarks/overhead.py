"""What a distillation costs, as a ratio to the floor: a hand-written loop of student step and teacher forward under
`no_grad`.

    python benchmarks/overhead.py                 # resnet34 -> resnet18 at 64 px on a CPU;
                                                  # resnet50 -> resnet18 at 224 px under amp on a GPU
    python benchmarks/overhead.py --pair toy      # a net of about a millisecond a step: what the Python around it costs
    python benchmarks/overhead.py --only SoftTarget,Attention --rounds 4 --out -

All variants live in one process and train the same student. A round visits each once, in shuffled order and right
after a visit of the floor; a visit is a fit of a few batches and one of validation. The first batch is timed apart,
with all else that a fit does only once. What is reported are medians and quartiles of the paired ratios, so a machine
that is busy for a while slows both sides of a pair. Peak memory is measured apart, each variant in a process of its
own. Data and weights are random: neither changes the time of a step. But for `dtype='auto'`, which judges formats by
what they do to answers, the teacher first learns ten patterns in noise: an untrained network has nothing to say that
rounding could leave."""
import argparse
import csv
import importlib.util
import os
import random
import resource
import statistics as stats
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext, redirect_stdout
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')   # threads that spin would make the machine's other work ours

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastai.vision.augment import Flip
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import models

from fasterai.data.digits import digits_net
from fasterai.distill.teacher.recorded.recorded import RecordedTeacher, Replay, TeacherCache
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Attention, DecoupledKD, FitNet, Similarity, SoftTarget
from fasterai.distill.teacher.teacher import Teacher

STAGES = ['layer1', 'layer2', 'layer3', 'layer4']
RESULTS = Path(__file__).parent/'results'
T = 5.                                                # the temperature of the floor, as SoftTarget's default


# ## Pairs

def _resnet(name, c):
    net = getattr(models, name)(num_classes=c)
    # statistics as training leaves them, so that formats differ as they do in earnest
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
    return net

pairs = dict(
    cpu=dict(teacher=partial(_resnet, 'resnet34', 10), student=partial(_resnet, 'resnet18', 10), shape=(3, 64, 64),
             bs=64, c=10, steps=4, amp=False),
    cuda=dict(teacher=partial(_resnet, 'resnet50', 1000), student=partial(_resnet, 'resnet18', 1000),
              shape=(3, 224, 224), bs=256, c=1000, steps=8, amp=True),
    toy=dict(teacher=partial(digits_net, 8), student=partial(digits_net, 8), shape=(1, 8, 8), bs=64, c=10, steps=20,
             amp=False))

def noisy(patterns, n):
    "Patterns in noise, and which"
    y = torch.randint(0, len(patterns), (n,), device=patterns.device)
    return torch.randn(n, *patterns.shape[1:], device=patterns.device)+patterns[y], y

@cache
def taught(new_teacher, patterns, steps=36, bs=32):
    "A teacher that can tell the patterns"
    net = new_teacher().to(patterns.device)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        x,y = noisy(patterns, bs)
        F.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        for _ in range(6): net(noisy(patterns, bs)[0]) # statistics of what it has become
    return net.eval()

class Loader(TfmdDL):
    "A fastai DataLoader that takes its batches out of tensors on the device, so that a step's time is the step's"
    def create_item(self, i): return i or 0
    def create_batch(self, rows): x,y = self.dataset[torch.tensor(rows, device=self.device)]; return TensorImage(x), y
    def retain(self, res, b): return res

def make_bench(name, steps=None):
    "Everything that the variants share: data, teacher, student"
    p = pairs[name]
    device = torch.device('cuda' if name=='cuda' or name=='toy' and torch.cuda.is_available() else 'cpu')
    steps = steps or p['steps']
    torch.manual_seed(0)
    patterns = torch.randn(10, *p['shape'], device=device)
    def data(n): return TensorDataset(*noisy(patterns, n))
    def loader(data, **kwargs): return Loader(data, bs=p['bs'], num_workers=0, device=device, **kwargs)
    train,valid = data((steps+1)*p['bs']),loader(data(p['bs']))
    dls,augmented = [DataLoaders(loader(train, shuffle=True, after_batch=tfms), valid, device=device)
                     for tfms in (None, [Flip()])]
    return SimpleNamespace(name=name, dls=dls, augmented=augmented, device=device, steps=steps, bs=p['bs'], c=p['c'],
                           amp=p['amp'], loss_func=CrossEntropyLossFlat(),
                           student=p['student']().to(device), teacher=p['teacher']().to(device).eval(),
                           new_teacher=p['teacher'], patterns=patterns,
                           stages=['1', '2'] if name=='toy' else STAGES)


# ## Visits: a function that trains for an epoch, and returns its times

def _now(device):
    if device.type=='cuda': torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()

class Clock(Callback):
    "The times of a fit: the end of its first training batch, and of its last"
    order = -1000
    def before_train(self): self.times = []
    def after_batch(self):
        if self.training and not self.times: self.times.append(_now(self.dls.device))
    def after_train(self): self.times.append(_now(self.dls.device))

def _parts(b, start, first, last, end):
    "Seconds of wall and CPU time a step; of the epoch, and of the start with the first batch, which neither counts"
    return *((e-s)/b.steps for s,e in zip(first, last)), end[0]-first[0], first[0]-start[0]

def visit_fastai(b, *cbs, dls=None):
    clock,amp = Clock(),[MixedPrecision()]*b.amp
    learn = Learner(dls or b.dls, b.student, loss_func=b.loss_func, opt_func=partial(SGD, mom=0.9), lr=1e-4,
                    cbs=[clock, *amp, *cbs])
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    def visit():
        start = _now(b.device)
        learn.fit(1)
        return _parts(b, start, *clock.times, _now(b.device))
    return visit

def visit_by_hand(b, teacher=True):
    "The floor, and without a teacher the floor of the floor"
    opt = torch.optim.SGD(b.student.parameters(), lr=1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(b.device.type, enabled=b.amp)
    autocast = (lambda: torch.autocast(b.device.type, dtype=torch.float16)) if b.amp else nullcontext
    def train():
        b.student.train()
        first = None
        for x,y in b.dls.train:
            x = x.as_subclass(torch.Tensor)
            with autocast():
                z = b.student(x)
                loss = b.loss_func(z, y)
                if teacher:
                    with torch.no_grad(): zt = b.teacher(x)
                    loss = torch.lerp(loss, F.kl_div(F.log_softmax(z/T, 1), F.softmax(zt/T, 1),
                                                     reduction='batchmean')*T*T, 0.5)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            first = first or _now(b.device)
        return first, _now(b.device)
    @torch.no_grad()
    def validate():
        b.student.eval()
        for x,y in b.dls.valid:
            with autocast(): b.loss_func(b.student(x.as_subclass(torch.Tensor)), y).item()
    def visit():
        start,(first,last) = _now(b.device),train()
        validate()
        return _parts(b, start, first, last, _now(b.device))
    return visit

def visit_forward(b):
    "The teacher's forward, and nothing else"
    @torch.no_grad()
    def visit():
        start,first = _now(b.device),None
        for x,_ in b.dls.train:
            with torch.autocast(b.device.type, dtype=torch.float16, enabled=b.amp):
                b.teacher(x.as_subclass(torch.Tensor))
            first = first or _now(b.device)
        return _parts(b, start, first, last := _now(b.device), last)
    return visit


class Shortest(Callback):
    "The least that distils in fastai's loop: no name, no column, no check, no layer; with `known` logits, no teacher"
    def __init__(self, teacher, known=None): self.teacher,self.known = teacher,known
    def after_loss(self):
        if not self.training: return
        z,zt = self.learn.pred.as_subclass(torch.Tensor),self.known
        if zt is None:
            with torch.no_grad(): zt = self.teacher(self.learn.xb[0].as_subclass(torch.Tensor))
        soft = F.kl_div(F.log_softmax(z/T, 1), F.softmax(zt/T, 1), reduction='batchmean')*T*T
        self.learn.loss_grad = torch.lerp(self.learn.loss_grad, soft, 0.5)
        self.learn.loss = self.learn.loss_grad.detach().clone()

def shortest(b, known=False, **kwargs):
    "The floor within fastai; where the logits are known, it has nothing to look up either"
    known = torch.randn(b.bs, b.c, device=b.device) if known else None
    return visit_fastai(b, Shortest(b.teacher, known), **kwargs)


# ## Variants

def ours(b, loss=SoftTarget, layers=None, teacher=None, **options):
    teacher = Teacher(b.teacher if teacher is None else teacher(b), **options)
    return visit_fastai(b, KnowledgeDistillationCallback(teacher, loss, layers, layers, weight=0.5))

def knowing(b): return taught(b.new_teacher, b.patterns)

def cached(b, cache, dls=None):
    "Ours once the cache has seen every view of every sample"
    visit = visit_fastai(b, KnowledgeDistillationCallback(Teacher(b.teacher, cache=cache), weight=0.5), dls=dls)
    for _ in range(1+(cache.k or 1)): visit()
    if not cache.hits: raise RuntimeError("the callback did not ask the cache")
    return visit

def recorded(b):
    "Ours with what a job has recorded, and no teacher"
    folder = tempfile.TemporaryDirectory()
    with redirect_stdout(None): record(b.teacher, b.dls.train, folder.name)
    kd = KnowledgeDistillationCallback(RecordedTeacher(folder.name), weight=0.5)
    kd.folder = folder # there as long as it is
    visit = visit_fastai(b, kd)
    for _ in range(2): visit()
    return visit

def original(b, loss, layers=None):
    lib = sys.modules['fasterai_original']
    loss = getattr(lib.losses, loss)
    kd = lib.callback.KnowledgeDistillationCallback(b.teacher, loss, layers, layers, weight=0.5)
    return visit_fastai(b, kd)

def variants(b):
    "Name to a function that makes the visit"
    stages,compiled = f'{len(b.stages)} stages',dict(compile=True)
    v = {'hand-written loop': partial(visit_by_hand, b),
         'hand-written, student only': partial(visit_by_hand, b, teacher=False),
         'plain student': partial(visit_fastai, b), 'teacher forward': partial(visit_forward, b),
         'shortest callback': partial(shortest, b), 'shortest callback, known logits': partial(shortest, b, True),
         'SoftTarget': partial(ours, b), 'DecoupledKD': partial(ours, b, DecoupledKD),
         **{f'{l.__name__}, {stages}': partial(ours, b, l, b.stages) for l in (Attention, FitNet, Similarity)},
         "SoftTarget, teacher dtype='auto'": partial(ours, b, teacher=knowing, dtype='auto'),
         'SoftTarget, int8 teacher': partial(ours, b, dtype='int8'),
         'SoftTarget, bf16 teacher': partial(ours, b, dtype='bf16'),
         'SoftTarget, bf16 channels_last teacher': partial(ours, b, dtype='bf16', channels_last=True),
         'SoftTarget, channels_last teacher': partial(ours, b, channels_last=True),
         'SoftTarget, fused teacher': partial(ours, b, fuse=True),
         'SoftTarget, compiled teacher': partial(ours, b, **compiled),
         **{f'FitNet at {s}, early stop': partial(ours, b, FitNet, [s]) for s in b.stages[1:3]},
         'SoftTarget, cached': lambda: cached(b, TeacherCache()),
         'SoftTarget, recorded': lambda: recorded(b),
         'plain student, augmented': partial(visit_fastai, b, dls=b.augmented),
         'SoftTarget, replayed, augmented': lambda: cached(b, Replay(k=2), b.augmented),
         'SoftTarget, two teachers': partial(ours, b, teacher=lambda b: [b.teacher, b.new_teacher()])}
    if 'fasterai_original' in sys.modules:
        v |= {'original fasterai, SoftTarget': partial(original, b, 'SoftTarget')}
        v |= {f'original fasterai, {l}, {stages}': partial(original, b, l, b.stages)
              for l in ('Attention', 'FitNet', 'Similarity')}
    return v

FLOOR = 'hand-written loop'

def load_original(path):
    "The original package in the folder `path`, under a name of its own"
    def load(name, file, **kw):
        spec = importlib.util.spec_from_file_location(name, file, **kw)
        sys.modules[name] = mod = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mod)
        return mod
    path = Path(path)
    lib = load('fasterai_original', path/'__init__.py', submodule_search_locations=[str(path)])
    lib.callback = importlib.import_module('fasterai_original.distill.distillation_callback')
    lib.losses = importlib.import_module('fasterai_original.distill.losses')


# ## Measuring

def measure(b, names, rounds):
    "Per variant a list of (floor's visit, its visit), without those that cannot run here; Ctrl-C ends it early"
    makers,visits = variants(b),{}
    floor = makers[FLOOR]()
    for name in names:
        # the first visit compiles, tries formats and fills caches
        try: visits[name] = makers[name](); visits[name]()
        except Exception as e:
            visits.pop(name, None); print(f'left out: {name} ({type(e).__name__}: {str(e)[:200]})', file=sys.stderr)
    got,rng = {n:[] for n in visits},random.Random(0)
    floor()
    try:
        for r in range(rounds):
            for name in rng.sample(list(visits), len(visits)): got[name].append((floor(), visits[name]()))
            print(f'round {r+1} of {rounds}', end='\r', file=sys.stderr)
    except KeyboardInterrupt: print('stopped early: what has been measured follows', file=sys.stderr)
    return {n:o for n,o in got.items() if o}

def quartiles(xs): return stats.quantiles(xs, n=4, method='inclusive') if len(xs)>1 else [xs[0]]*3

def row(b, name, pairs, plain):
    "One line of the results; `plain` are the pairs of plain training on the same data"
    def ratio(i): return [v[i]/f[i] for f,v in pairs]
    step,(q1,med,q3),(e1,epoch,e3) = stats.median(v[0] for _,v in pairs),quartiles(ratio(0)),quartiles(ratio(2))
    if 'teacher forward'==name: e1 = epoch = e3 = float('nan')              # it has no validation
    to_plain = stats.median((v[0]/f[0])/(pv[0]/pf[0]) for (f,v),(pf,pv) in zip(pairs, plain)) if plain else float('nan')
    return dict(variant=name, ratio=med, ratio_q25=q1, ratio_q75=q3, to_plain=to_plain,
                cpu_ratio=stats.median(ratio(1)), epoch_ratio=epoch, epoch_q25=e1, epoch_q75=e3,
                step_ms=step*1e3, cpu_ms=stats.median(v[1] for _,v in pairs)*1e3,
                over_floor_ms=stats.median(v[0]-f[0] for f,v in pairs)*1e3,
                cpu_over_floor_ms=stats.median(v[1]-f[1] for f,v in pairs)*1e3,
                start_ms=stats.median(v[3] for _,v in pairs)*1e3, samples_per_s=b.bs/step, rounds=len(pairs))

def peak(pair, name):
    "Peak memory in MB of a process that visits `name` twice: of the device, or of the process where there is none"
    b = make_bench(pair)
    visit = variants(b)[name]()
    visit(), visit()
    if b.device.type=='cuda': return torch.cuda.max_memory_allocated()/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10

def peak_apart(args, name, n=3):
    "Median of `n` processes of their own"
    cmd = [sys.executable, __file__, '--pair', args.pair, '--peak', name, '--threads', str(args.threads)]
    if args.original: cmd += ['--original', args.original]
    runs = [subprocess.run(cmd, capture_output=True, text=True) for _ in range(n)]
    mbs = [float(r.stdout.split()[-1]) for r in runs if r.returncode==0]
    return stats.median(mbs) if mbs else float('nan')

def setting(b, args):
    name = torch.cuda.get_device_name() if b.device.type=='cuda' else f'{args.threads} threads'
    return dict(pair=args.pair, device=f'{b.device.type}, {name}', torch=torch.__version__)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pair', choices=pairs, default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--rounds', type=int, default=16)
    p.add_argument('--steps', type=int, help='training batches a visit, after the first')
    p.add_argument('--only', help='names of variants, or parts of them, with commas')
    p.add_argument('--threads', type=int, help='of the CPU; default 2, for the toy 1')
    p.add_argument('--memory', action='store_true', help='peak memory too, each variant in three processes of its own')
    p.add_argument('--original', help="folder of the original fasterai's package, to measure it beside ours")
    p.add_argument('--out', help='CSV file, - for none; default results/overhead-PAIR.csv')
    p.add_argument('--peak', help=argparse.SUPPRESS)
    args = p.parse_args()
    args.threads = args.threads or (1 if args.pair=='toy' else 2)
    warnings.filterwarnings('ignore', category=FutureWarning)
    torch.set_num_threads(args.threads)
    if args.original: load_original(args.original)
    if args.peak: return print(peak(args.pair, args.peak))
    b = make_bench(args.pair, args.steps)
    names = [n for n in variants(b) if not args.only or n==FLOOR or any(o.strip() in n for o in args.only.split(','))]
    visits = measure(b, names, args.rounds)
    rows = [{**setting(b, args), **row(b, n, vs, visits.get('plain student'+', augmented'*n.endswith('augmented')))}
            for n,vs in visits.items()]
    if args.memory: rows = [{**r, 'peak_mb': peak_apart(args, r['variant'])} for r in rows]
    for r in rows:
        print(f"{r['variant']:42s} {r['ratio']:.3f} [{r['ratio_q25']:.3f}, {r['ratio_q75']:.3f}]  "
              f"cpu {r['cpu_ratio']:.3f}  to plain {r['to_plain']:.3f}  epoch {r['epoch_ratio']:.3f}  "
              f"{r['step_ms']:8.2f} ms  {r['over_floor_ms']:+.2f} ms  cpu {r['cpu_over_floor_ms']:+.2f} ms"
              + (f"  {r['peak_mb']:.0f} MB" if args.memory else ''))
    if args.out!='-': write(args.out or RESULTS/f'overhead-{args.pair}.csv', rows)

def write(path, rows):
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, rows[0].keys())
        w.writeheader()
        w.writerows({k: f'{v:.5g}' if isinstance(v, float) else v for k,v in r.items()} for r in rows)

if __name__=='__main__': main()
