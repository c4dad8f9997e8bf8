"What the cache must survive: workers, ranks, kills, damage, full disks, and pipelines that lie"
import os
import pickle
import random
import signal
import subprocess
import sys
import warnings
from functools import partial
from multiprocessing import get_context
from operator import itemgetter, mul

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.mixup import CutMix
from fastai.callback.schedule import lr_find  # patches Learner
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader, SkipItemException
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import Brightness, Resize
from torch import nn

import fasterai.distill.teacher.recorded.recorded as mod
from fasterai.distill.teacher.recorded.recorded import Replay, TeacherCache, _Trace, digest
from fasterai.distill.teacher.teacher import Teacher as Frozen

N,BS = 48,8

class Blobs:
    "`(x, i)`: sample i of n, `jitter`ed by Python's, NumPy's and PyTorch's generators"
    split_idx = 0
    def __init__(self, n=N, jitter=0., skip=(), seed=0):
        self.x,self.jitter,self.skip = torch.randn(n, 3, 6, 6, generator=torch.manual_seed(seed)),jitter,skip
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if i in self.skip: raise SkipItemException()
        x = self.x[i]+self.jitter*(random.random()+np.random.rand()+torch.rand(1)) if self.jitter else self.x[i]
        return TensorImage(x),torch.tensor(i%4)

def loaders(train=None, cls=TfmdDL, valid=True, **kw):
    kw = dict(bs=BS, shuffle=True, num_workers=0, device='cpu', **kw) if 'bs' not in kw else dict(device='cpu', **kw)
    return DataLoaders(cls(Blobs() if train is None else train, **kw), TfmdDL(Blobs(16, seed=9), bs=BS, num_workers=0, device='cpu'), device='cpu')

class Teacher:
    def __init__(self, seed=5, scale=1., classes=4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.models = [nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, classes)).eval()]
        self.seen,self.scale = [],scale
    @torch.no_grad()
    def __call__(self, *xb, layers=(), logits=True):
        self.seen.append(len(xb[0]))
        x,fm = xb[0].as_subclass(torch.Tensor),{}
        for name,m in self.models[0].named_children():
            x = m(x)
            if name in layers: fm[name] = x
        return x*self.scale if logits else None,fm

class Distil(Callback):
    order = 2
    def __init__(self, teacher, cache=None, layers=(), at=None): self.teacher,self.cache,self.layers,self.at = teacher,cache,layers,at
    def before_train(self):
        if self.cache and self.epoch==0: self.cache.attach(self.learn, self.teacher, layers=self.layers)
    def after_loss(self):
        if not self.training: return
        if self.at is not None and self.train_iter==self.at: raise KeyboardInterrupt('now')
        pred,fm = self.cache.ask(*self.xb) if self.cache else self.teacher(*self.xb, layers=self.layers)
        loss = F.mse_loss(self.pred.as_subclass(torch.Tensor), pred) + sum(m.mean()*self.pred.mean() for m in fm.values())
        self.learn.loss_grad = self.learn.loss_grad+loss
        self.learn.loss = self.learn.loss_grad.detach().clone()
    def after_fit(self): self.cache and self.cache.detach()

def learner(dls, teacher, cache=None, cbs=(), **kw):
    set_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 4))
    dls.train.rng.seed(1)
    learn = Learner(dls, net, CrossEntropyLossFlat(), cbs=[Distil(teacher, cache, **kw), *cbs])
    learn.logger = lambda *_: None
    return learn

def train(dls, teacher, cache=None, n=2, cbs=(), **kw):
    learn = learner(dls, teacher, cache, cbs, **kw)
    learn.fit(n, 0.01)
    return torch.cat([o.detach().flatten() for o in learn.model.parameters()])

def state(dl): return {k:v for k,v in dl.__dict__.items() if k not in ('rng', '_DataLoader__idxs', 'it', '_n_inp', '_types')}

@pytest.fixture
def path(tmp_path): return tmp_path/'teacher.cache'


HEAD = 0
def of_global(o): return o[HEAD]
def through_global(o): return of_global(o)
def with_default(o, i=0): return o[i]
def scaled(k): return lambda x: x*k
def nested(k): return lambda x: [(lambda y: y*k)(o) for o in x]
class Times:
    def __init__(self, k): self.k = k
    def __call__(self, x): return x*self.k
    def power(self, x): return x**self.k
class Slotted:
    __slots__ = 'k',
    def __init__(self, k): self.k = k
    def __call__(self, x): return x*self.k
class TimesNet(nn.Module):
    def __init__(self, k): super().__init__(); self.k = k
    def forward(self, x): return x*self.k

class TestDigest:
    net = nn.Linear(2, 2)
    def of(self, **kw): return digest(Frozen(self.net, **kw))

    @pytest.mark.parametrize('f,g', [
        (lambda o: o[0], lambda o: o[1]), (lambda x: x*2, lambda x: x*3), (lambda x: x.sin(), lambda x: x.cos()), (lambda x: x+2., lambda x: x-2.),
        (lambda x: (lambda y: y*2.)(x), lambda x: (lambda y: y*3.)(x)), (lambda x, *k: x, lambda x, k=None: x),
        (scaled(2), scaled(3)), (scaled(torch.zeros(2000)), scaled(torch.eye(2000)[1000])), (scaled([1, {'a':2}]), scaled([1, {'a':3}])), (scaled({1, 2}), scaled({1, 3})),
        (lambda x, k=2: x*k, lambda x, k=3: x*k), (lambda x, *, k=2: x*k, lambda x, *, k=3: x*k), (scaled(scaled(2)), scaled(scaled(3))),
        (partial(mul, 2), partial(mul, 3)), (partial(scaled(2), k=1), partial(scaled(3), k=1)), (itemgetter(0), itemgetter(1)), (torch.sin, torch.cos),
        (Times(2), Times(3)), (Times(torch.zeros(2000)), Times(torch.eye(2000)[1000])), (Times(2).power, Times(3).power), (Times(2), Times(2).power), (Slotted(2), Slotted(3)),
        (TimesNet(2), TimesNet(3)), (nn.BatchNorm2d(2), nn.BatchNorm2d(2).requires_grad_(False).apply(lambda m: m.running_mean.add_(1)))])
    @pytest.mark.parametrize('arg', ['select', 'tfms'])
    def test_another_function_is_another_teacher(self, arg, f, g): assert self.of(**{arg:f})!=self.of(**{arg:g})

    @pytest.mark.parametrize('make', [lambda: lambda o: o[0], lambda: scaled(2), lambda: scaled(torch.ones(3)), lambda: scaled(object()), lambda: partial(mul, scaled(2)), lambda: Times([2.]),
        lambda: Times(2).power, lambda: TimesNet(2), lambda: nested(2), lambda: itemgetter('logits'), lambda: nn.Upsample(scale_factor=2)])
    def test_the_same_function_made_again_is_the_same_teacher(self, make): assert self.of(tfms=make(), select=make())==self.of(tfms=make(), select=make())

    def test_class_axis_and_average(self):
        assert self.of(axis=1)!=self.of(axis=-1)
        a,b = Frozen(self.net),Frozen(self.net)
        a.average,b.average = 'logits','probabilities'
        assert digest(a)!=digest(b)

    def test_select_is_not_taken_for_a_transform(self): assert self.of(select=scaled(2))!=self.of(tfms=scaled(2))

    def test_a_global_that_the_function_reads(self, monkeypatch):
        before = self.of(select=of_global),self.of(select=through_global)
        monkeypatch.setitem(globals(), 'HEAD', 1)
        assert self.of(select=of_global)!=before[0] and self.of(select=through_global)!=before[1]

    def test_what_refers_to_itself_or_to_nothing_yet(self):
        def again(n):
            def f(x): return f(x-n) if x>n else x
            return f
        def unset(n):
            def f(x): return later(x)*n
            if n<0: later = abs
            return f
        assert self.of(tfms=unset(1))==self.of(tfms=unset(1))!=self.of(tfms=unset(2))
        t = Times(2); t.me = t
        assert self.of(tfms=again(1))==self.of(tfms=again(1))!=self.of(tfms=again(2)) and self.of(tfms=t)==self.of(tfms=t)

    def test_use_does_not_change_it(self):
        f = lambda x: x*2+HEAD
        before = self.of(tfms=f)
        for i in range(2000): f(i) # the interpreter rewrites the code that runs often
        assert self.of(tfms=f)==before

    def test_the_same_in_another_process(self):
        code = ("import torch\nfrom functools import partial\nfrom fasterai.distill.teacher.recorded.recorded import digest\nfrom fasterai.distill.teacher.teacher import Teacher\n"
                "net = torch.nn.Linear(2, 2)\nfor p in net.parameters(): p.data.fill_(0.5)\n"
                "def pick(o, head='b', keys={'a', 'b', 'c'}): return o if head in {'x', 'y', 'z'} else o[head]\n"
                "said = digest(Teacher(net, select=partial(pick, head='c'), tfms=lambda x: x*2))\n")
        here = {}
        exec(code, here)
        there = subprocess.run([sys.executable, '-W', 'ignore', '-c', code+'print(said)'], env={**os.environ, 'PYTHONHASHSEED':'7'}, capture_output=True, text=True, check=True)
        assert there.stdout.strip()==here['said']

    def test_another_head_does_not_take_the_stored_answers(self, path):
        class TwoHeads(nn.Module):
            def forward(self, x): return x.mean((2, 3)).repeat(1, 2)[:, :4],-x.mean((2, 3)).repeat(1, 2)[:, :4]
        net = TwoHeads()
        train(loaders(), Frozen(net, select=lambda o: o[0]), TeacherCache(path), n=1)
        with pytest.raises(ValueError, match='another teacher'): train(loaders(), Frozen(net, select=lambda o: o[1]), TeacherCache(path), n=1)


class TestTrace:
    @pytest.mark.parametrize('cls,kw', [(TfmdDL, {}), (TfmdDL, dict(drop_last=True)), (TfmdDL, dict(n=20)), (DataLoader, {}), (PartialDL, dict(partial_n=20)),
                                        (WeightedDL, dict(wgts=np.arange(N)))])
    def test_rows_are_the_samples_of_the_batch(self, cls, kw):
        ds = Blobs(skip=(3,))
        dl = cls(ds, bs=7, shuffle=True, num_workers=0, **kw)
        before,trace,n = state(dl),_Trace(dl),0
        for x,_ in dl:
            assert torch.equal(x.as_subclass(torch.Tensor), ds.x[trace.rows])
            n += len(x)
        assert n>=14 and 3 not in trace.rows
        trace.close()
        assert state(dl)==before

    @pytest.mark.parametrize('k', [None, 2])
    def test_workers_deliver_the_same_rows_and_views(self, k):
        ds,seen = Blobs(jitter=1. if k else 0.),{}
        for nw in 0,2:
            dl = TfmdDL(ds, bs=7, shuffle=True, num_workers=nw)
            dl.rng.seed(3)
            trace = _Trace(dl, k)
            seen[nw] = [(x, trace.rows.tolist()) for _ in range(2) for x,_ in dl]
            trace.close()
        assert all(torch.equal(a, b) and r==s for (a, r),(b, s) in zip(seen[0], seen[2]))

    def test_a_traced_loader_can_be_sent_to_a_spawned_worker(self):
        dl = TfmdDL(Blobs(jitter=1.), bs=2, num_workers=0)
        trace = _Trace(dl, 3, seed=1)
        dl.get_idxs()
        far = pickle.loads(pickle.dumps(dl))
        (x,_),rows = next(iter(far.create_batches([4, 5])))
        (y,_),_ = next(iter(dl.create_batches([4, 5])))
        assert rows.rows.tolist()==[4, 5] and torch.equal(x, y)
        trace.close()

    def test_a_new_loader_made_of_a_traced_one_is_plain(self):
        dl = TfmdDL(Blobs(), bs=2, num_workers=0)
        trace = _Trace(dl, 3)
        assert not {'do_item', 'do_batch', 'get_idxs'} & dl.new().__dict__.keys()
        x,_ = dl.new(shuffle=False).one_batch()
        assert torch.equal(x.as_subclass(torch.Tensor), dl.dataset.x[:2])
        trace.close()

    def test_no_stream_of_random_numbers_moves(self):
        streams = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        dls = loaders(Blobs(jitter=1.))
        before = streams()
        with Replay(k=2).attach(learner(dls, Teacher()), Teacher()) as cache:
            set_seed(1)
            before = streams()
            cache.trace.draw([1, 2])
            cache._dry_run()
        assert streams()==before


class TestRefusals:
    def refused(self, error, words, dls, cache=None, cbs=()):
        learn,before = learner(dls, Teacher(), cbs=cbs),state(dls.train)
        with pytest.raises(error, match=words): (cache or TeacherCache()).attach(learn, Teacher())
        assert state(dls.train)==before

    def test_pytorch_loader(self):
        dls = DataLoaders(torch.utils.data.DataLoader(Blobs(), batch_size=8), torch.utils.data.DataLoader(Blobs(), batch_size=8))
        learn = Learner(dls, nn.Linear(2, 2), nn.CrossEntropyLoss())
        with pytest.raises(TypeError, match='TfmdDL'): TeacherCache().attach(learn, Teacher())

    def test_iterable_dataset(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self): return iter(Blobs())
        self.refused(TypeError, 'iterable', loaders(Stream(), bs=4, num_workers=0))

    def test_ready_made_batches(self): self.refused(TypeError, 'bs=None', loaders(Blobs(), bs=None, num_workers=0))
    def test_random_items(self): self.refused(ValueError, r'something in the dataset.*Replay\(k=8\)', loaders(Blobs(jitter=0.1)))
    def test_random_transform(self): self.refused(ValueError, r'Brightness draw.*Replay\(k=8\)', loaders(after_batch=[Brightness()]))
    def test_cutmix(self): self.refused(ValueError, r'CutMix draw.*Replay\(k=8\)', loaders(), cbs=[CutMix()])
    def test_maps_that_nobody_asked_to_keep(self):
        with pytest.raises(ValueError, match='maps=True'): TeacherCache().attach(learner(loaders(), Teacher()), Teacher(), layers=['0'])

    def test_padding_to_the_longest(self):
        def pad(b): m = max(len(x) for x,_ in b); return [(F.pad(x, (0, m-len(x)), value=1.), y) for x,y in b]
        class Ragged(Blobs):
            def __getitem__(self, i): return torch.ones(1+i%5),torch.tensor(i)
        self.refused(ValueError, 'padding', loaders(Ragged(), before_batch=pad))

    def test_a_generator_that_replay_cannot_set(self):
        class Own(Blobs):
            gen = torch.Generator()
            def __getitem__(self, i): return torch.randn(3, 6, 6, generator=self.gen),torch.tensor(0)
        self.refused(ValueError, 'generator of its own', loaders(Own()), Replay(k=2))

    def test_a_second_cache(self):
        dls = loaders()
        with TeacherCache().attach(learner(dls, Teacher()), Teacher()): self.refused(ValueError, 'another one is attached', dls)

    def test_processes_without_a_path(self, monkeypatch):
        monkeypatch.setenv('WORLD_SIZE', '2')
        self.refused(ValueError, 'give it a path', loaders())

    @pytest.mark.parametrize('kw,words', [(dict(dtype=torch.bfloat16), 'float16 or torch.float32'), (dict(topk=0), 'at least 1')])
    def test_arguments(self, kw, words):
        with pytest.raises(ValueError, match=words): TeacherCache(**kw)


class TestTraining:
    def test_same_weights_as_without_it(self):
        teacher = Teacher()
        plain = train(loaders(), teacher, n=4)
        asked,cache = Teacher(),TeacherCache(dtype=torch.float32)
        assert torch.equal(train(loaders(), asked, cache, n=4), plain) and sum(asked.seen)==N and cache.hits==3*N
        assert (train(loaders(), Teacher(), TeacherCache(), n=4)-plain).abs().max()<1e-3

    def test_what_a_dropped_end_left_out_is_asked_in_one_batch(self):
        dls,teacher = loaders(Blobs(45), bs=8, shuffle=True, drop_last=True, num_workers=0),Teacher()
        weights = train(dls, teacher, TeacherCache(dtype=torch.float32), n=8)
        plain = train(loaders(Blobs(45), bs=8, shuffle=True, drop_last=True, num_workers=0), Teacher(), n=8)
        assert teacher.seen==[8]*6 and torch.equal(weights, plain)

    def test_what_was_not_drawn_with_replacement_is_asked_at_once(self):
        dls,teacher = loaders(cls=WeightedDL),Teacher()
        np.random.seed(0)
        weights = train(dls, teacher, TeacherCache(dtype=torch.float32), n=4)
        first = teacher.seen[:6]
        rest = sum(teacher.seen)-sum(first)
        assert first==[8]*6 and 0<rest<N
        np.random.seed(0)
        assert torch.equal(weights, train(loaders(cls=WeightedDL), Teacher(), n=4))

    def test_feature_maps(self):
        plain = train(loaders(), Teacher(), layers=['0', '2'])
        teacher,cache = Teacher(),TeacherCache(maps=True, dtype=torch.float32)
        assert torch.equal(train(loaders(), teacher, cache, layers=['0', '2']), plain) and sum(teacher.seen)==N

    def test_maps_without_logits(self):
        cache,teacher,learn = TeacherCache(maps=True, dtype=torch.float32),Teacher(),learner(loaders(), Teacher())
        learn.training = True
        with cache.attach(learn, teacher, layers=['2'], logits=False):
            for x,_ in learn.dls.train: pred,fm = cache.ask(x)
            for x,_ in learn.dls.train:
                pred,fm = cache.ask(x)
                assert pred is None and torch.equal(fm['2'], teacher(x, layers=['2'])[1]['2'])

    def test_top_k(self):
        teacher,cache,learn = Teacher(classes=50, scale=9.),TeacherCache(topk=5),learner(loaders(), Teacher())
        learn.training = True
        with cache.attach(learn, teacher):
            for _ in range(2):
                for x,_ in learn.dls.train: pred,_ = cache.ask(x)
            p,q = teacher(x)[0].softmax(1),pred.softmax(1)
            top = p.topk(5, 1).indices
            assert cache.hits==N and torch.allclose(q.gather(1, top), p.gather(1, top), rtol=2e-3)
            for i in range(len(p)):
                rest = [c for c in range(50) if c not in top[i].tolist()]
                assert torch.allclose(q[i, rest], p[i, rest].mean().expand(45), rtol=1e-2)

    def test_validation_asks_the_teacher(self):
        dls,cache = loaders(),TeacherCache()
        learn,teacher = learner(dls, Teacher()),Teacher()
        with cache.attach(learn, teacher):
            learn.training = True
            cache.ask(dls.train.one_batch()[0])
            learn.training = False
            x,_ = dls.valid.one_batch()
            assert torch.equal(cache.ask(x)[0], teacher(x)[0]) and cache.asked==BS and cache.off is None

    def test_another_fit_and_lr_find_go_on_with_what_is_there(self, tmp_path):
        teacher,cache = Teacher(),TeacherCache()
        learn = learner(loaders(), teacher, cache)
        learn.path = tmp_path
        learn.fit(1); learn.lr_find(show_plot=False, num_it=8, suggest_funcs=()); learn.fit_one_cycle(1)
        assert sum(teacher.seen)==N and cache.hits>=N+8

    def test_a_temporary_cache_starts_anew_with_another_teacher(self):
        cache = TeacherCache()
        train(loaders(), Teacher(), cache)
        other = Teacher(seed=6)
        assert (train(loaders(), other, cache)-train(loaders(), Teacher(seed=6))).abs().max()<1e-3 and sum(other.seen[:6])==N

    def test_what_is_random_once_in_a_while_is_noticed(self):
        class Rarely(Blobs):
            def __getitem__(self, i): return TensorImage(self.x[i]*(1.1 if i==7 and random.random()<0.5 else 1.)),torch.tensor(0)
        with pytest.warns(UserWarning, match=r'sample 7 is not the input.*goes on without'):
            weights = train(loaders(Rarely()), Teacher(), TeacherCache(dtype=torch.float32), n=6)
        assert torch.equal(weights, train(loaders(Rarely()), Teacher(), n=6))

    def test_a_resize_is_judged_by_what_it_does(self):
        resize = Resize(4)
        assert mod._random_tfms(TfmdDL(Blobs(), after_item=[resize], num_workers=0))==[]

    @pytest.mark.parametrize('n_workers', [0, 2])
    def test_an_interrupt_leaves_nothing_behind(self, n_workers):
        dls = loaders(Blobs(jitter=1.), bs=8, shuffle=True, num_workers=n_workers)
        before,mix,cache = state(dls.train),CutMix(),Replay(k=2)
        learn = learner(dls, Teacher(), cache, cbs=[mix], at=3)
        with pytest.raises(KeyboardInterrupt): learn.fit(1)
        assert 'before_batch' in mix.__dict__
        cache.detach(); cache.detach()
        assert state(dls.train)==before and 'before_batch' not in mix.__dict__

    def test_pickles_as_its_settings(self):
        with Replay(k=3, seed=4, topk=2).attach(learner(loaders(), Teacher()), Teacher()) as cache: copy = pickle.loads(pickle.dumps(cache))
        assert (copy.k, copy.seed, copy.topk, copy.trace)==(3, 4, 2, None)


class TestReplay:
    def dls(self, **kw): return loaders(Blobs(jitter=0.5), **{**dict(bs=8, shuffle=True, num_workers=0, after_batch=[Brightness(p=0.5)]), **kw})

    def test_views_come_round_and_the_teacher_sees_each_once(self):
        class Record(Callback):
            order = 1
            def before_fit(self): self.xs = []
            def before_batch(self): self.xs.append(self.x.clone()) if self.training else None
        teacher,rec = Teacher(),Record()
        cached = train(self.dls(), teacher, Replay(k=2, dtype=torch.float32), n=5, cbs=[CutMix(), rec])
        assert sum(teacher.seen)==2*N
        epochs = [torch.stack(rec.xs[i:i+6]) for i in range(0, 30, 6)]
        assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3]) and not torch.equal(epochs[0], epochs[1])
        class Asking(Replay):
            def _read(self, rows, seen): return None,np.zeros(len(rows), bool)
        assert torch.equal(train(self.dls(), Teacher(), Asking(k=2), n=5, cbs=[CutMix()]), cached)

    def test_another_run_with_workers_finds_the_views(self, path):
        train(self.dls(), Teacher(), Replay(k=2, path=path), n=2)
        teacher = Teacher()
        train(self.dls(num_workers=2), teacher, Replay(k=2, path=path), n=2)
        assert teacher.seen==[]

    def test_a_second_fit_goes_on_with_the_next_view(self):
        teacher,cache = Teacher(),Replay(k=2)
        learn = learner(self.dls(), teacher, cache)
        for n in N,2*N,2*N,2*N:
            learn.fit(1)
            assert sum(teacher.seen)==n

    def test_samples_drawn_with_replacement_come_back_too(self):
        teacher = Teacher()
        train(self.dls(cls=WeightedDL), teacher, Replay(k=2), n=4)
        assert sum(teacher.seen)==2*N

    def test_another_seed_is_another_cache(self, path):
        train(self.dls(), Teacher(), Replay(k=2, path=path))
        with pytest.raises(ValueError, match=r'views \(number, seed\) are \[2, 0\], here \[2, 1\]'): train(self.dls(), Teacher(), Replay(k=2, seed=1, path=path))

    def test_other_batches_are_asked_anew(self, path):
        train(self.dls(), Teacher(), Replay(k=1, path=path), n=1)
        teacher = Teacher()
        train(self.dls(bs=6), teacher, Replay(k=1, path=path), n=1)
        assert sum(teacher.seen)==N

    def test_eager_fills_all_views(self):
        teacher,cache = Teacher(),Replay(k=3, eager=True)
        train(self.dls(), teacher, cache, n=3)
        assert sum(teacher.seen)==3*N==cache.hits

    def test_padded_batches_come_back(self):
        def pad(b): m = max(len(x) for x,_ in b); return [(F.pad(x, (0, m-len(x)), value=1.), y) for x,y in b]
        class Ragged(Blobs):
            def __getitem__(self, i): return torch.ones(1+i%5),torch.tensor(i)
        dls,seen = loaders(Ragged(), before_batch=pad),[]
        learn = learner(dls, Teacher())
        learn.training = True
        def teacher(x, **_): seen.append(x); return x.sum(1, keepdim=True),{}
        teacher.models = []
        with Replay(k=1).attach(learn, teacher) as cache:
            for _ in range(2):
                for x,_ in dls.train: assert torch.equal(cache.ask(x)[0], x.sum(1, keepdim=True))
        assert len(seen)==6


def fill(path, **kw): train(loaders(), Teacher(), TeacherCache(path, dtype=torch.float32, **kw), n=1)

def alone(f, *args):
    torch.set_num_threads(1) # OpenMP's threads do not survive a fork
    f(*args)

def in_process(f, *args):
    p = get_context('fork').Process(target=alone, args=(f, *args))
    p.start()
    return p

class TestFile:
    def again(self, path, n_asked, words=None):
        "Train on the file: about `n_asked` samples are asked again (their batches are), and the weights are right"
        teacher = Teacher()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            weights = train(loaders(), teacher, TeacherCache(path, dtype=torch.float32), n=2)
        assert n_asked<=sum(teacher.seen)<=min(BS*n_asked, N)
        assert not words or any(words in str(o.message) for o in said)
        assert torch.equal(weights, train(loaders(), Teacher(), n=2))

    def test_killed_in_the_middle_of_a_write_then_resumed(self, path):
        def die():
            class Torn:
                def __init__(self, f): self.f,self.n = f,0
                def __getattr__(self, k): return getattr(self.f, k)
                def write(self, b):
                    self.n += 1
                    if self.n<20: return self.f.write(b)
                    self.f.write(b[:len(b)//2])
                    os.kill(os.getpid(), signal.SIGKILL)
            class Dying(mod._Store):
                def __init__(self, *args): super().__init__(*args); self.out = Torn(self.out)
            mod._Store = Dying
            fill(path)
        p = in_process(die)
        p.join()
        assert p.exitcode==-signal.SIGKILL
        header = mod._read_header(path)
        rows = np.fromfile(path, np.uint8, offset=mod._offset(header)).reshape(N, -1)
        there = int((rows[:, :4].view('<u4')!=0).sum())
        assert 19<=there<N
        self.again(path, N-there+1, '1 damaged')
        self.again(path, 0)

    def test_a_flipped_byte_is_noticed_and_mended(self, path):
        fill(path)
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)
        self.again(path, 1, '1 damaged')
        self.again(path, 0)

    @pytest.mark.parametrize('keep', [-100, 4096+5, 4096, 2000, 10, 0])
    def test_a_truncated_file_is_rebuilt(self, path, keep):
        fill(path)
        row = (path.stat().st_size-4096)//N
        path.write_bytes(path.read_bytes()[:keep])
        self.again(path, -(-100//row) if keep<0 else N)
        self.again(path, 0)

    @pytest.mark.parametrize('content', [b'my thesis', b'fasterai teacher cache 1\n{"a":\n', b'fasterai teacher cache 2\n{}\n'])
    def test_what_is_not_ours_is_refused_and_kept(self, path, content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)): fill(path)
        assert path.read_bytes()==content

    @pytest.mark.parametrize('kw,words', [(dict(teacher=Teacher(seed=6)), 'another teacher'), (dict(dls=lambda: loaders(Blobs(40))), 'has 48 samples, the data 40'),
        (dict(dls=lambda: loaders(Blobs(seed=3))), 'do not look'), (dict(cache=dict(topk=2)), 'keeps'), (dict(cache=dict(maps=True), layers=['0']), 'feature maps are')])
    def test_a_foreign_cache_is_refused_with_the_reason(self, path, kw, words):
        fill(path)
        before = path.read_bytes()
        kw = {'teacher':Teacher(), 'dls':loaders, 'cache':{}, **kw}
        with pytest.raises(ValueError, match=words): train(kw.pop('dls')(), kw.pop('teacher'), TeacherCache(path, **{'dtype':torch.float32, **kw.pop('cache')}), **kw)
        assert path.read_bytes()==before

    def test_one_changed_sample_is_noticed(self, path):
        fill(path)
        ds = Blobs()
        ds.x[5] += 0.1
        with pytest.warns(UserWarning, match='sample 5 is not the input'): weights = train(loaders(ds), Teacher(), TeacherCache(path, dtype=torch.float32))
        assert torch.allclose(weights, train(loaders(ds), Teacher()), atol=1e-6)

    def goes_on(self, words, cache, dls=None, teacher=None):
        teacher = teacher or Teacher()
        with pytest.warns(UserWarning, match=words): weights = train(dls or loaders(), teacher, cache)
        assert torch.equal(weights, train(loaders(), Teacher(scale=teacher.scale)))

    def test_a_disk_too_small(self, path, monkeypatch):
        monkeypatch.setattr(mod.shutil, 'disk_usage', lambda p: type('', (), dict(free=100)))
        self.goes_on('needs 5.25 kB, 100 B are free.*goes on without', TeacherCache(path))
        assert not list(path.parent.iterdir())

    def test_a_disk_that_fills_up(self, path, monkeypatch):
        class Full(mod._Store):
            def __init__(self, *args):
                super().__init__(*args)
                out,self.out = self.out,type('Full', (), dict(seek=self.out.seek, close=self.out.close, write=lambda s, b: out.write(b[:20])))()
        monkeypatch.setattr(mod, '_Store', Full)
        self.goes_on('the disk is full.*goes on without', TeacherCache(path))

    def test_a_place_where_nothing_can_be_made(self): self.goes_on('cannot (open|write).*goes on without', TeacherCache('/dev/null/teacher.cache'))

    def test_read_only(self, path, monkeypatch):
        fill(path)
        def no_writing(file, mode='r', **kw):
            if '+' in mode: raise OSError(30, 'Read-only file system')
            return open(file, mode, **kw)
        monkeypatch.setattr(mod, 'open', no_writing, raising=False)
        self.again(path, 0)
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)
        self.goes_on('Read-only', TeacherCache(path, dtype=torch.float32))

    def test_answers_too_large_for_half_precision(self): self.goes_on('say dtype=torch.float32', TeacherCache(), teacher=Teacher(scale=1e6))

    def test_a_teacher_that_says_nan(self):
        with pytest.warns(UserWarning, match='NaN'): train(loaders(), Teacher(scale=float('nan')), TeacherCache())

    def test_processes_share_a_file(self, path):
        ps = [in_process(fill, path) for _ in range(2)]
        for p in ps: p.join(); assert p.exitcode==0
        self.again(path, 0)

    def test_ranks_share_a_file(self, path, monkeypatch):
        dist = pytest.importorskip('fastai.distributed')
        monkeypatch.setattr(dist.DistributedDL, '_broadcast', lambda self, t, rank: list(t))
        def rank(r, cache, seed):
            dls,teacher = loaders(Blobs(46, jitter=0.5*isinstance(cache, Replay)), bs=8, shuffle=True, num_workers=0),Teacher()
            learn,n = learner(dls, teacher),0
            dls.loaders[0] = dist.DistributedDL(dls.train, rank=r, world_size=2)
            learn.training = True
            with cache.attach(learn, teacher):
                for epoch in range(2):
                    for i in range(2): dls.train.dl.rng.seed(seed+epoch)
                    for x,_ in dls.train:
                        assert torch.allclose(cache.ask(x)[0], teacher(x)[0], atol=1e-6)
                        n += len(x)
            return n,cache.hits
        f32 = dict(dtype=torch.float32)
        assert rank(0, TeacherCache(path, **f32), 1)[0]==46 and rank(1, TeacherCache(path, **f32), 1)[0]==46
        assert rank(0, TeacherCache(path, **f32), 7)==(46, 46)
        path.unlink()
        assert [rank(r, Replay(k=1, path=path, **f32), 1) for r in (0, 1)]==[(46, 23)]*2
        assert [rank(r, Replay(k=1, path=path, **f32), 1) for r in (0, 1)]==[(46, 46)]*2
