"Training with recorded answers: the same weights, each sample asked once, and nothing left behind"
import pickle
import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import CutMix
from fastai.callback.schedule import lr_find  # patches Learner
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.torch_core import TensorImage
from torch import nn

from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import Recording, Replay, TeacherCache
from fasterai.distill.teacher.teacher import Teacher as Frozen
from recording import BS, N, PROBE, Blobs, Teacher, learner, loaders, state, train

def tokens(x, **_):
    "Three positions of eight classes"
    return 3*x.as_subclass(torch.Tensor).flatten(1)[:, :24].view(-1, 3, 8),{}

class TestTraining:
    def test_same_weights_as_without_it(self):
        teacher = Teacher()
        plain = train(loaders(), teacher, n=4)
        asked,cache = Teacher(),TeacherCache(dtype=torch.float32)
        assert torch.equal(train(loaders(), asked, cache, n=4),
                           plain) and sum(asked.seen)==N+PROBE and (cache.asked, cache.hits)==(N, 3*N)
        assert (train(loaders(), Teacher(), TeacherCache(), n=4)-plain).abs().max()<1e-3

    def test_what_a_dropped_end_left_out_is_asked_in_one_batch(self):
        dls,teacher = loaders(Blobs(45), bs=8, shuffle=True, drop_last=True, num_workers=0),Teacher()
        weights = train(dls, teacher, TeacherCache(dtype=torch.float32), n=8)
        plain = train(loaders(Blobs(45), bs=8, shuffle=True, drop_last=True, num_workers=0), Teacher(), n=8)
        assert teacher.seen==[PROBE]+[8]*6 and torch.equal(weights, plain)

    def test_what_was_not_drawn_with_replacement_is_asked_at_once(self):
        dls,teacher = loaders(cls=WeightedDL),Teacher()
        np.random.seed(0)
        weights = train(dls, teacher, TeacherCache(dtype=torch.float32), n=4)
        first = teacher.seen[1:7]
        rest = sum(teacher.seen[7:])
        assert first==[8]*6 and 0<rest<N
        np.random.seed(0)
        assert torch.equal(weights, train(loaders(cls=WeightedDL), Teacher(), n=4))

    def test_feature_maps(self):
        plain = train(loaders(), Teacher(), layers=['0', '2'])
        teacher,cache = Teacher(),TeacherCache(maps=True, dtype=torch.float32)
        assert torch.equal(train(loaders(), teacher, cache, layers=['0', '2']), plain) and sum(teacher.seen)==N+PROBE

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

    def test_top_k_of_classes_that_stand_last(self, tmp_path):
        cache,learn,dls = TeacherCache(topk=3),learner(loaders(), Teacher()),loaders()
        learn.training = True
        def check(p, q):
            top = p.topk(3, 2).indices
            assert torch.allclose(q.gather(2, top), p.gather(2, top), rtol=2e-3) and p.shape==q.shape
        with cache.attach(learn, tokens):
            for _ in range(2):
                for x,_ in learn.dls.train: pred,_ = cache.ask(x)
            assert cache.hits==N
            check(tokens(x)[0].softmax(2), pred.softmax(2))
        assert record(tokens, learn, tmp_path/'whole', topk=3, T=1.).errors[0][0]<.5
        with Recording(tmp_path/'whole').attach(learn, None) as cache:
            for x,_ in learn.dls.train: check(tokens(x)[0].softmax(2), cache.ask(x)[0].softmax(2))
        record(tokens, dls.train, tmp_path/'unknown', topk=2) # who knows where the classes are?
        with pytest.raises(ValueError, match='classes on axis 1, and here they are on axis 2.*with the training'):
            Recording(tmp_path/'unknown').attach(learner(dls, Teacher()), None)
        assert Recording(tmp_path/'unknown', axis=1).attach(learner(dls, Teacher()), None).detach() is None

    @pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), MSELossFlat()])
    def test_top_k_of_what_is_no_softmax(self, loss, tmp_path):
        learn,teacher = learner(loaders(), Teacher(classes=6)),Teacher(classes=6)
        learn.loss_func = loss
        with pytest.raises(ValueError, match="topk=3 .*average='(sigmoid|none)'.*say topk=None"):
            TeacherCache(topk=3).attach(learn, teacher)
        with pytest.raises(ValueError, match='topk=3'): record(teacher, learn, tmp_path/'a', topk=3)
        record(teacher, learn.dls.train, tmp_path/'b', topk=3)
        with pytest.raises(ValueError, match='topk=3'): Recording(tmp_path/'b').attach(learn, None)
        assert TeacherCache().attach(learn, teacher).detach() is None
        teacher.average = 'softmax' # as it is, whatever the task
        assert TeacherCache(topk=3).attach(learn, teacher).detach() is None

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
        assert sum(teacher.seen)==N+3*PROBE and cache.asked==N and cache.hits>=N+8

    def test_a_temporary_cache_starts_anew_with_another_teacher(self):
        cache = TeacherCache()
        train(loaders(), Teacher(), cache)
        other = Teacher(seed=6)
        cached = train(loaders(), other, cache)
        plain = train(loaders(), Teacher(seed=6))
        assert (cached-plain).abs().max()<1e-3
        assert other.seen[:7]==[PROBE]+[BS]*6
        assert sum(other.seen)==N+PROBE

    def test_what_is_random_once_in_a_while_is_noticed(self):
        class Rarely(Blobs):
            def __getitem__(self, i):
                return TensorImage(self.x[i]*(1.1 if i==7 and random.random()<0.5 else 1.)),torch.tensor(0)
        cache = TeacherCache(dtype=torch.float32)
        with pytest.warns(UserWarning, match=r'sample 7 is not the input.*asked again') as said:
            weights = train(loaders(Rarely()), Teacher(), cache, n=6)
        assert len([o for o in said if 'sample 7' in str(o.message)])==1 and cache.off is None
        assert N<cache.asked<=N+5*BS and cache.asked+cache.hits==6*N
        assert torch.equal(weights, train(loaders(Rarely()), Teacher(), n=6))

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
        with Replay(k=3, seed=4, topk=2).attach(learner(loaders(), Teacher()), Teacher()) as cache:
            copy = pickle.loads(pickle.dumps(cache))
        assert (copy.k, copy.seed, copy.topk, copy.trace)==(3, 4, 2, None)

    def test_a_fit_within_a_fit(self):
        class Within(Callback):
            order = 70
            def __init__(self, cache, teacher):
                self.cache = cache
                self.teacher = teacher
            def after_train(self):
                if self.epoch!=1: return
                cache = self.cache and self.cache.attach(self.learn, self.teacher)
                for x,_ in self.dls.train: cache and cache.ask(x)
                if cache: cache.detach()
        dls,teacher,cache = loaders(),Teacher(),TeacherCache(dtype=torch.float32)
        before = state(dls.train)
        weights = train(dls, teacher, cache, n=4, cbs=[Within(cache, teacher)])
        assert (cache.asked, cache.hits)==(N, 4*N) and sum(teacher.seen)==N+PROBE and state(dls.train)==before
        assert torch.equal(weights, train(loaders(), Teacher(), n=4, cbs=[Within(None, None)]))

    def test_attaching_again_is_counted(self):
        dls,teacher = loaders(),Teacher()
        before,learn,cache = state(dls.train),learner(dls, teacher),TeacherCache()
        cache.attach(learn, teacher); trace = cache.trace
        cache.attach(learn, teacher)
        assert cache.trace is trace and teacher.seen==[PROBE]
        cache.detach()
        assert cache.trace is trace and state(dls.train)!=before
        cache.attach(learn, other:=Teacher(seed=6))                  # another one is another attachment
        assert cache.trace is not trace and other.seen==[PROBE]
        cache.detach()
        assert cache.trace is None and state(dls.train)==before

    def test_nested_inputs(self):
        class Dicts(Blobs):
            def __getitem__(self, i): return {'x':self.x[i], 'none':None, 'name':f'sample {i}'},torch.tensor(i%4)
        def collate(items):
            xs = torch.stack([o[0]['x'] for o in items])
            return {'x':xs, 'none':None, 'name':[o[0]['name'] for o in items]},torch.stack([o[1] for o in items])
        class Reads(Teacher):
            def __call__(self, b, **kw): return super().__call__(b['x'], **kw)
        dls,teacher,cache = loaders(Dicts(), bs=8, shuffle=True, num_workers=0,
                                    create_batch=collate),Reads(),TeacherCache(dtype=torch.float32)
        learn = learner(dls, teacher)
        learn.training = True
        with cache.attach(learn, teacher):
            for _ in range(3):
                for b,_ in dls.train: assert torch.equal(cache.ask(b)[0], teacher(b)[0])
        assert (cache.asked, cache.hits)==(N, 2*N)

    def test_compute_is_asked_where_there_is_one(self):
        class Own(Teacher):
            def __call__(self, *xb, **kw): raise AssertionError('the cache asks itself')
            def compute(self, *xb, **kw): return Teacher.__call__(self, *xb, **kw)
        learn,teacher,cache = learner(loaders(), Teacher()),Own(),TeacherCache()
        learn.training = True
        with cache.attach(learn, teacher):
            for x,_ in learn.dls.train: cache.ask(x)
        assert cache.asked==N and sum(teacher.seen)==N+PROBE


def test_an_answer_that_depends_on_its_batch(tmp_path):
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(64, 4))
    learn,teacher = learner(loaders(), None),Frozen(net)
    for dtype in torch.float32,torch.float16:
        with pytest.raises(ValueError, match='cache: 1 of the teacher Sequential keeps no running.*cache=Replay'):
            TeacherCache(dtype=dtype).attach(learn, teacher)
    with pytest.raises(ValueError, match='recording: 1 of the teacher .* views=8, which keeps'):
        record(net, learn, tmp_path)
    learn.training = True
    with Replay(k=1, dtype=torch.float32).attach(learn, teacher) as cache: # the batches are kept together
        for _ in range(2):
            for x,_ in learn.dls.train: assert torch.allclose(cache.ask(x)[0], net.eval()(x), atol=1e-6)
        assert cache.hits==N
    assert TeacherCache().attach(learn, Frozen(nn.Sequential(net[0], nn.BatchNorm2d(4), *net[2:]))).detach() is None

class TestWeightsThatChange:
    def change(self, teacher, how):
        class Change(Callback):
            def after_batch(self):
                if self.training and self.epoch==1 and self.iter==2: how(teacher)
        return Change()

    def test_a_teacher_that_is_trained_meanwhile(self):
        how = lambda t: [p.detach().mul_(1.1) for p in t.models[0].parameters()]
        teacher,other,cache = Teacher(),Teacher(),TeacherCache(dtype=torch.float32)
        with pytest.warns(UserWarning, match="weights have changed.*goes on without"):
            weights = train(loaders(), teacher, cache, n=3, cbs=[self.change(teacher, how)])
        assert torch.equal(weights, train(loaders(), other, n=3, cbs=[self.change(other, how)]))
        assert (cache.asked, cache.hits)==(N, 3*BS)

    def test_a_teacher_that_tells_its_version(self):
        class Versioned(Teacher):
            n = 0
            def version(self): return self.n
        def how(t): t.n += 1; t.scale = 2.
        teacher,other,cache = Versioned(),Versioned(),TeacherCache(dtype=torch.float32)
        with pytest.warns(UserWarning, match="weights have changed"):
            weights = train(loaders(), teacher, cache, n=3, cbs=[self.change(teacher, how)])
        assert torch.equal(weights, train(loaders(), other, n=3, cbs=[self.change(other, how)]))

    def test_the_next_fit_has_the_new_weights(self):
        teacher,cache = Teacher(),TeacherCache(dtype=torch.float32)
        train(loaders(), teacher, cache)
        teacher.models[0][0].bias.data += 1.
        assert torch.equal(train(loaders(), teacher, cache), train(loaders(), teacher)) and cache.asked==2*N
