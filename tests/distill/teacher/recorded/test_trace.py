"Row numbers that ride along with their batch, and what has none"
import os
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.mixup import CutMix
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Brightness, Resize
from torch import nn

from fasterai.distill.teacher.recorded.recorded import Replay, TeacherCache
from fasterai.distill.teacher.recorded.replay import ViewTrace, dry_run
from fasterai.distill.teacher.recorded.trace import Trace, random_tfms
from recording import N, Blobs, Teacher, learner, loaders, state


class TestTrace:
    @pytest.mark.parametrize('cls,kw',
                             [(TfmdDL, {}), (TfmdDL, dict(drop_last=True)), (TfmdDL, dict(n=20)), (DataLoader, {}),
                              (PartialDL, dict(partial_n=20)),
                                        (WeightedDL, dict(wgts=np.arange(N)))])
    def test_rows_are_the_samples_of_the_batch(self, cls, kw):
        ds = Blobs(skip=(3,))
        dl = cls(ds, bs=7, shuffle=True, num_workers=0, **kw)
        before,trace,n = state(dl),Trace(dl),0
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
            trace = (ViewTrace(dl, k) if k else Trace(dl))
            seen[nw] = [(x, trace.rows.tolist()) for _ in range(2) for x,_ in dl]
            trace.close()
        assert all(torch.equal(a, b) and r==s for (a, r),(b, s) in zip(seen[0], seen[2]))

    def test_a_traced_loader_can_be_sent_to_a_spawned_worker(self):
        dl = TfmdDL(Blobs(jitter=1.), bs=2, num_workers=0)
        trace = ViewTrace(dl, 3, seed=1)
        dl.get_idxs()
        far = pickle.loads(pickle.dumps(dl))
        (x,_),rows = next(iter(far.create_batches([4, 5])))
        (y,_),_ = next(iter(dl.create_batches([4, 5])))
        assert rows.rows.tolist()==[4, 5] and torch.equal(x, y)
        trace.close()

    def test_a_new_loader_made_of_a_traced_one_is_plain(self):
        dl = TfmdDL(Blobs(), bs=2, num_workers=0)
        trace = ViewTrace(dl, 3)
        assert not {'do_item', 'do_batch', 'create_batches', 'get_idxs'} & dl.new().__dict__.keys()
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
            dry_run(cache.views, cache.trace, lambda b: b[:1])
        assert streams()==before

    def test_batches_of_a_view_do_not_depend_on_workers_or_skipped_items(self):
        ds,seen = Blobs(45, jitter=1., skip=(3, 17)),{}
        for nw in 0,1,3:
            dl = TfmdDL(ds, bs=7, shuffle=True, num_workers=nw)
            trace = ViewTrace(dl, 2)
            seen[nw] = [(x, trace.rows.tolist()) for _ in range(2) for x,_ in dl]
            trace.close()
        for nw in 1,3:
            assert all(torch.equal(a, b) and r==s for (a, r),(b, s) in zip(seen[0], seen[nw], strict=True))
        assert sum(len(r) for _,r in seen[0])==2*43

    def test_an_epoch_within_an_epoch_leaves_the_views_alone(self):
        dl = TfmdDL(Blobs(jitter=1.), bs=8, shuffle=True, num_workers=0)
        trace = ViewTrace(dl, 3)
        plain = [x.clone() for _ in range(3) for x,_ in dl]
        trace.passes,got = 0,[]
        for x,_ in dl:
            got.append(x.clone())
            if len(got)==2: inner = [x.clone() for x,_ in dl]
        assert all(map(torch.equal, got, plain[:6])) and all(map(torch.equal, inner, plain[6:12]))
        trace.close()


class TestRefusals:
    def refused(self, error, words, dls, cache=None, cbs=()):
        learn,before = learner(dls, Teacher(), cbs=cbs),state(dls.train)
        with pytest.raises(error, match=words): (cache or TeacherCache()).attach(learn, Teacher())
        assert state(dls.train)==before

    def test_pytorch_loader(self):
        dls = DataLoaders(torch.utils.data.DataLoader(Blobs(), batch_size=8),
                          torch.utils.data.DataLoader(Blobs(), batch_size=8))
        learn = Learner(dls, nn.Linear(2, 2), nn.CrossEntropyLoss())
        with pytest.raises(TypeError, match='TfmdDL'): TeacherCache().attach(learn, Teacher())

    def test_iterable_dataset(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self): return iter(Blobs())
        self.refused(TypeError, 'iterable', loaders(Stream(), bs=4, num_workers=0))

    def test_ready_made_batches(self): self.refused(TypeError, 'bs=None', loaders(Blobs(), bs=None, num_workers=0))
    def test_random_items(self):
        self.refused(ValueError, r'something in the dataset.*Replay\(k=8\)', loaders(Blobs(jitter=0.1)))
    def test_random_transform(self):
        self.refused(ValueError, r'Brightness draw.*Replay\(k=8\)', loaders(after_batch=[Brightness()]))
    def test_cutmix(self): self.refused(ValueError, r'CutMix draw.*Replay\(k=8\)', loaders(), cbs=[CutMix()])
    def test_maps_that_nobody_asked_to_keep(self):
        with pytest.raises(ValueError, match='maps=True'):
            TeacherCache().attach(learner(loaders(), Teacher()), Teacher(), layers=['0'])

    @pytest.mark.parametrize('length', [lambda i: 1+i%5, lambda i: 5-i%5]) # a sample's; of the first least or most
    def test_padding_to_the_longest(self, length):
        def pad(b): m = max(len(x) for x,_ in b); return [(F.pad(x, (0, m-len(x)), value=1.), y) for x,y in b]
        class Ragged(Blobs):
            def __getitem__(self, i): return torch.ones(length(i)),torch.tensor(i)
        self.refused(ValueError, 'padding', loaders(Ragged(), before_batch=pad))

    @pytest.mark.parametrize('skip', [(3, 9), (15, 47)])
    def test_samples_that_are_skipped_are_not_looked_at(self, skip):
        with TeacherCache().attach(learner(loaders(Blobs(skip=skip)), Teacher()), Teacher()) as cache:
            xb = dry_run(cache.views, cache.trace, lambda b: b[:1])
        assert len(xb[0])==16-sum(o in cache.views.some_rows(48, 16) for o in skip)

    def test_what_a_batch_has_once_is_every_sample_s(self):
        def together(b):
            x = torch.stack([x for x,_ in b])
            return x,torch.arange(6)[None],torch.tensor([y for _,y in b])
        dls = loaders(create_batch=together, n_inp=2)
        with TeacherCache().attach(learner(dls, Teacher()), Teacher()) as cache:
            assert dry_run(cache.views, cache.trace, lambda b: b[:2])[1].shape==(1, 6)

    def test_a_generator_that_replay_cannot_set(self):
        class Own(Blobs):
            gen = torch.Generator()
            def __getitem__(self, i): return torch.randn(3, 6, 6, generator=self.gen),torch.tensor(0)
        self.refused(ValueError, 'generator of its own', loaders(Own()), Replay(k=2))

    def test_a_second_cache(self):
        dls = loaders()
        with TeacherCache().attach(learner(dls, Teacher()), Teacher()):
            self.refused(ValueError, 'another one is attached', dls)

    def test_processes_without_a_path(self, monkeypatch):
        monkeypatch.setenv('WORLD_SIZE', '2')
        self.refused(ValueError, 'give it a path', loaders())

    @pytest.mark.parametrize('kw,words',
                             [(dict(dtype=torch.bfloat16), 'float16 or torch.float32'), (dict(topk=0), 'at least 1')])
    def test_arguments(self, kw, words):
        with pytest.raises(ValueError, match=words): TeacherCache(**kw)

    def test_a_resize_is_judged_by_what_it_does(self):
        resize = Resize(4)
        assert random_tfms(TfmdDL(Blobs(), after_item=[resize], num_workers=0))==[]

    def test_an_input_without_bytes(self):
        class Odd(Blobs):
            def __getitem__(self, i): return {1, 2},self.x[i],torch.tensor(0)
        learn = learner(loaders(Odd(), bs=8, num_workers=0,
                                create_batch=lambda b: (b[0][0], torch.stack([o[1] for o in b]), torch.zeros(len(b)))),
                                Teacher())
        learn.dls.n_inp = 2
        with pytest.raises(TypeError, match='holds a set'): TeacherCache().attach(learn, Teacher())
