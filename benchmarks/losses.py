"""Time and memory of every loss, forward and backward, next to the plainest correct torch expression and to the
teacher's forward.

    python benchmarks/losses.py [--out benchmarks/results/losses.csv] [--only SoftTarget,Attention] [--repeats 7]

Logits are (256, 1000) and (64, 21000), maps those of the four stages of a ResNet on 32 images of 224 px (relational
losses: the last stage, 256 images). Loss and expression run in turn. On a CPU times are of one thread, in CPU
seconds, so that a busy machine disturbs them less; the least of all repeats counts. Peak memory is what one forward
and backward allocates above its inputs, in multiples of the student's input."""
import math
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import pandas as pd
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet34

from fasterai.distill.losses import *

device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
STAGES = [(64, 56), (128, 28), (256, 14), (512, 7)]


# The plainest expression that is right on ordinary inputs: no checks, no masked classes, no dead samples

def plain_kl(s, t, T=1., axis=1):
    return F.kl_div(F.log_softmax(s/T, axis), F.softmax(t/T, axis), reduction='sum')/(s.numel()/s.shape[axis])*T**2

def without(z, y): return z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -1e9)

def plain_dkd(s, t, y, T=4., alpha=1., beta=8.):
    def target(z):
        p = F.softmax(z/T, 1).gather(1, y[:, None])
        return torch.cat([p, 1-p], 1)
    return T**2*alpha*F.kl_div(target(s).log(), target(t),
                               reduction='batchmean') + beta*plain_kl(without(s/T, y), without(t/T, y))*T**2

def plain_nkd(s, t, y, gamma=1.5):
    ls, pt = F.log_softmax(s, 1), F.softmax(t, 1)
    target = -(pt.gather(1, y[:, None])*ls.gather(1, y[:, None])).mean()
    return target-gamma*(F.softmax(without(t, y), 1)*F.log_softmax(without(s, y), 1)).sum(1).mean()

def plain_dist(s, t):
    q, p = F.softmax(s, 1), F.softmax(t, 1)
    corr = lambda a, b: F.cosine_similarity(a-a.mean(1, keepdim=True), b-b.mean(1, keepdim=True), dim=1, eps=1e-20)
    return (1-corr(q, p)).mean()+(1-corr(q.T, p.T)).mean()

def plain_ttm(s, t, gamma=0.1, weighted=False):
    p = F.softmax(t, 1)**gamma
    kl = F.kl_div(F.log_softmax(s, 1), p/p.sum(1, keepdim=True), reduction='none').sum(1)
    return (kl*p.sum(1) if weighted else kl).mean()

def plain_binary(s, t):
    coin = lambda x: torch.stack([F.logsigmoid(x), F.logsigmoid(-x)])
    return F.kl_div(coin(s), coin(t), log_target=True, reduction='none').sum(0).mean()

def plain_ranking(s, t):
    s = s.gather(1, t.argsort(1, descending=True))
    return (s.flip(1).logcumsumexp(1).flip(1)-s).sum(1).mean()

def z(x, d=1, correction=1): return (x-x.mean(d, keepdim=True))/(x.std(d, keepdim=True, correction=correction)+1e-7)

def plain_att(s, t): return F.mse_loss(*(F.normalize(x.pow(2).mean(1).flatten(1)) for x in (s, t)))
def plain_sp(s, t): return F.mse_loss(*(F.normalize(x.flatten(1)@x.flatten(1).T) for x in (s, t)))
def plain_ab(s, t, m=2.): return ((s+m).square()*((s>-m)&(t<=0))+(s-m).square()*((s<=m)&(t>0))).mean()

def plain_stats(s, t):
    std = lambda x: (x.var((2, 3))+1e-5).sqrt()
    mean = F.mse_loss(s.mean((2, 3)), t.mean((2, 3)), reduction='sum')/len(s)
    return mean+F.mse_loss(std(s), std(t), reduction='sum')/len(s)

def plain_nst(s, t):
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (s, t))
    k = lambda a, b: (a@b.mT).square().mean()
    return k(s, s)+k(t, t)-2*k(s, t)

# the default is off by 0.3 % in RKDDistance
def dists(x): return torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist')

def plain_rkd_d(s, t):
    s, t = (dists(x.mean((2, 3))) for x in (s, t))
    return F.smooth_l1_loss(s/s[s>0].mean(), t/t[t>0].mean())

def plain_rkd_a(s, t):
    def angles(x):
        u = F.normalize(x[None]-x[:, None], dim=2)
        return u@u.mT
    return F.smooth_l1_loss(*(angles(x.mean((2, 3))) for x in (s, t)))

def plain_pkt(s, t):
    def p(x):
        x = F.normalize(x.mean((2, 3)))
        c = (x@x.T+1)/2
        return c/c.sum(1, keepdim=True)
    s, t = p(s), p(t)
    return (t*torch.log((t+1e-7)/(s+1e-7))).mean()

def plain_cc(s, t):
    def k(x):
        x = F.normalize(x.mean((2, 3)))
        return sum(math.exp(-0.8)*0.8**p/math.factorial(p)*(x@x.T)**p for p in range(3))
    return F.mse_loss(k(s), k(t))

def plain_irg(s, t):
    s, t = (dists(x.mean((2, 3)))**2 for x in (s, t))
    return 5*F.mse_loss(s/s.max(), t/t.max())


ON_LOGITS = {  # the library's loss, the plain one; both take student, teacher, labels
    'SoftTarget': (SoftTarget, lambda s, t, y: plain_kl(s, t, 5.)), 'Mutual': (Mutual, lambda s, t, y: plain_kl(s, t)),
    'Logits': (Logits, lambda s, t, y: F.mse_loss(s, t)),
    'DecoupledKD': (DecoupledKD, plain_dkd), 'NKD': (NKD, plain_nkd),
    'HardTarget': (HardTarget, lambda s, t, y: F.cross_entropy(s, t.argmax(1))),
    'DIST': (DIST, lambda s, t, y: plain_dist(s, t)), 'TTM': (TTM, lambda s, t, y: plain_ttm(s, t)),
    'WTTM': (WTTM, lambda s, t, y: plain_ttm(s, t, weighted=True)),
    'BinaryKD': (BinaryKD, lambda s, t, y: plain_binary(s, t)),
    'Ranking': (Ranking, lambda s, t, y: plain_ranking(s, t)),
    'standardize(SoftTarget)': (standardize(SoftTarget), lambda s, t, y: plain_kl(z(s), z(t), 5.)),
    'standardize(SoftTarget, over=batch)': (standardize(SoftTarget, over='batch'),
                                            lambda s, t, y: plain_kl(z(s, 0, 0), z(t, 0, 0), 5.))}
ON_MAPS = {'Attention': (Attention, plain_att), 'FitNet': (FitNet, F.mse_loss),
           'ActivationBoundaries': (ActivationBoundaries, plain_ab), 'Similarity': (Similarity, plain_sp),
           'CWD': (CWD, lambda s, t: plain_kl(s.flatten(2), t.flatten(2), 4., 2)),
           'ChannelStats': (ChannelStats, plain_stats), 'NST': (NST, plain_nst)}
RELATIONAL = {'RKDDistance': (RKDDistance, plain_rkd_d), 'RKDAngle': (RKDAngle, plain_rkd_a),
              'RKD': (RKD, lambda s, t: 25*plain_rkd_d(s, t)+50*plain_rkd_a(s, t)),
              'PKT': (PKT, plain_pkt), 'CC': (CC, plain_cc),
              'IRG (edges)': (partial(IRG, pred=torch.zeros(256, 2, device=device),
                                      teacher_pred=torch.zeros(256, 2, device=device)), plain_irg)}


def clock():
    if device.type=='cpu': return process_time()
    torch.cuda.synchronize()
    return perf_counter()

def step(f, xs): torch.autograd.grad(f(*xs), [x for x in (xs[0] if isinstance(xs[0], list) else xs[:1])])

def seconds(fs, repeats):
    "Least time of each of `fs`, called in turn"
    best = [math.inf]*len(fs)
    for f in fs: f()
    for _ in range(repeats):
        for i, f in enumerate(fs):
            start = clock(); n = 0
            while n<1 or clock()-start<0.02: f(); n += 1
            best[i] = min(best[i], (clock()-start)/n)
    return best

def peak(f):
    "Most bytes held at once during `f()`"
    if device.type=='cuda':
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated(); f()
        return torch.cuda.max_memory_allocated()-before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    held = top = 0
    for e in sorted((e for e in prof.profiler.kineto_results.events() if e.name()=='[memory]'),
                    key=lambda e: e.start_ns()):
        held += e.nbytes(); top = max(top, held)
    return top

def measure(name, loss, plain, xs, what, teacher, repeats):
    run, base = partial(step, loss, xs), partial(step, plain, xs)
    a, b = (float(f(*xs).detach()) for f in (loss, plain))
    assert math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6), f'{name} {what}: {a} but the plain expression gives {b}'
    t, t0 = seconds([run, base], repeats)
    size = sum(x.numel()*x.element_size() for x in (xs[0] if isinstance(xs[0], list) else xs[:1]))
    return dict(loss=name, inputs=what, ms=1000*t, plain_ms=1000*t0, ratio=t/t0, of_teacher=t/teacher,
                memory=peak(run)/size, plain_memory=peak(base)/size, device=str(device), torch=torch.__version__)


@call_parse
def main(
    out:str='benchmarks/results/losses.csv', # Where to write the table
    only:str='',                             # Comma-separated losses; all if empty
    repeats:int=7,                           # The least time of so many counts
):
    torch.manual_seed(0); torch.set_num_threads(1)
    chosen = lambda d: {k: v for k, v in d.items() if not only or k in only.split(',')}
    model, images = resnet34().eval().to(device), torch.randn(32, 3, 224, 224, device=device)
    with torch.no_grad(): teacher = seconds([lambda: model(images)], 3)[0]/32
    print(f'resnet34 forward: {1000*teacher:.1f} ms an image')
    rows = []
    for B, C in ((256, 1000), (64, 21000)):
        s, t = (3*torch.randn(B, C, device=device).requires_grad_(i==0) for i in range(2))
        y = torch.randint(0, C, (B,), device=device)
        s = s.detach().requires_grad_()
        for name, (loss, plain) in chosen(ON_LOGITS).items():
            ours = partial(lambda f, s, t, y: f(s, t, target=y), loss)
            rows.append(measure(name, ours, plain, (s, t, y), f'({B}, {C})', teacher*B, repeats))
    def maps(B, stages):
        return [[torch.randn(B, c, n, n, device=device).relu().requires_grad_(i==0) for c, n in stages] for i in (0, 1)]
    xs = maps(32, STAGES)
    for name, (loss, plain) in chosen(ON_MAPS).items():
        rows.append(measure(name, loss, lambda s, t, plain=plain: sum(map(plain, s, t)), xs, '4 stages, 32 images',
                            teacher*32, repeats))
    xs = maps(256, STAGES[3:])
    for name, (loss, plain) in chosen(RELATIONAL).items():
        rows.append(measure(name, loss, lambda s, t, plain=plain: plain(s[0], t[0]), xs, 'last stage, 256 images',
                            teacher*256, min(repeats, 3)))
    df = pd.DataFrame(rows)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    df.to_csv(out, index=False, float_format='%.4g')
    print(df.drop(columns=['device', 'torch']).to_string(index=False, float_format='{:.3g}'.format))
