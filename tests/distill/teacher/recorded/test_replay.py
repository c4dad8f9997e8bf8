"Views that come round, with the batches and the mixtures that they had"
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import CutMix
from fastai.vision.augment import Brightness

from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.teacher.recorded.recorded import Replay
from recording import N, PROBE, Blobs, Teacher, learner, loaders, train


@pytest.fixture
def path(tmp_path): return tmp_path/'teacher.cache'


class TestReplay:
    def dls(self, **kw):
        return loaders(Blobs(jitter=0.5),
                       **{**dict(bs=8, shuffle=True, num_workers=0, after_batch=[Brightness(p=0.5)]), **kw})

    def test_views_come_round_and_the_teacher_sees_each_once(self):
        class Record(Callback):
            order = 1
            def before_fit(self): self.xs = []
            def before_batch(self): self.xs.append(self.x.clone()) if self.training else None
        teacher,rec = Teacher(),Record()
        cached = train(self.dls(), teacher, Replay(k=2, dtype=torch.float32), n=5, cbs=[CutMix(), rec])
        assert sum(teacher.seen)==2*N+PROBE
        epochs = [torch.stack(rec.xs[i:i+6]) for i in range(0, 30, 6)]
        assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
        assert not torch.equal(epochs[0], epochs[1])
        class Asking(Replay):
            def ask(self, *xb): return self._recorder.ask_teacher(*xb)
        assert torch.equal(train(self.dls(), Teacher(), Asking(k=2), n=5, cbs=[CutMix()]), cached)

    def test_another_run_with_workers_finds_the_views(self, path):
        train(self.dls(), Teacher(), Replay(k=2, path=path), n=2)
        teacher = Teacher()
        train(self.dls(num_workers=2), teacher, cache:=Replay(k=2, path=path), n=2)
        assert teacher.seen==[PROBE] and (cache.asked, cache.hits)==(0, 2*N)

    def test_a_second_fit_goes_on_with_the_next_view(self):
        teacher,cache = Teacher(),Replay(k=2)
        learn = learner(self.dls(), teacher, cache)
        for i,n in enumerate((N, 2*N, 2*N, 2*N)):
            learn.fit(1)
            assert sum(teacher.seen)==n+(i+1)*PROBE and cache.asked==n

    def test_samples_drawn_with_replacement_come_back_too(self):
        teacher = Teacher()
        train(self.dls(cls=WeightedDL), teacher, Replay(k=2), n=4)
        assert sum(teacher.seen)==2*N+PROBE

    def test_samples_that_no_view_holds_are_said(self):
        dls = mix_unlabelled(self.dls(), Blobs(), ratio=0.25)
        with pytest.warns(UserWarning, match=r'Replay\(k=2\): the 2 epochs .* never be seen') as said:
            train(dls, Teacher(), Replay(k=2))
        n,of = map(int, re.search(r'hold (\d+) of (\d+)', ' '.join(str(o.message) for o in said)).groups())
        assert N+12<=n<=N+24 and of==2*N
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            train(dls, Teacher(), Replay(k=40))

    def test_another_seed_is_another_cache(self, path):
        train(self.dls(), Teacher(), Replay(k=2, path=path))
        with pytest.raises(ValueError, match=r'views \(number, seed\) are \[2, 0\], here \[2, 1\]'):
            train(self.dls(), Teacher(), Replay(k=2, seed=1, path=path))

    def test_other_batches_are_asked_anew(self, path):
        train(self.dls(), Teacher(), Replay(k=1, path=path), n=1)
        teacher = Teacher()
        train(self.dls(bs=6), teacher, Replay(k=1, path=path), n=1)
        assert sum(teacher.seen)==N+PROBE

    def test_eager_fills_all_views(self):
        teacher,cache = Teacher(),Replay(k=3, eager=True)
        train(self.dls(), teacher, cache, n=3)
        assert sum(teacher.seen)-PROBE==3*N==cache.hits

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
        assert len(seen)==7 and cache.hits==N
