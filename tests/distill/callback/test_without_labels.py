"A Learner without labels, taught by embeddings: what trains, is asked once, is saved, and is left behind"
import copy
import random
from functools import partial

import fastai.callback.schedule # gives Learner `lr_find`
import pytest
import torch
from fastai.callback.core import CancelFitException
from fastai.data.core import DataLoaders, TfmdDL
from torch import nn

from fasterai.distill.loss.embeddings import Affinity, Cosine, Embedding, NoTask, Projected, Queue
from fasterai.distill.methods.fixmatch import fixmatch
from fasterai.distill.teacher.recorded.recorded import Replay
from fasterai.distill.teacher.teacher import Teacher
from helpers import Boom, CPUMixedPrecision, data, flags, learner, n_hooks, net, same, state
from kd_helpers import KD


class Pictures(torch.utils.data.Dataset):
    "Noise without labels"
    n_inp = 1
    def __init__(self, n=32, jitter=0.):
        self.x,self.jitter = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)),jitter
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return (self.x[i]+self.jitter*torch.randn(1),)


def unlabelled(**kwargs):
    dls = [TfmdDL(Pictures(**kwargs), bs=8, shuffle=s, num_workers=0) for s in (True, False)]
    return DataLoaders(*dls, device='cpu')


def body(width=4, seed=0): return net(width, seed=seed)[:-1]
def teacher(width=4): return body(width, seed=1)
def learn_from(dls=None, model=None, cbs=None): return learner(model or body(), dls or unlabelled(), cbs, NoTask)


LOSSES = [Cosine, Embedding, Affinity, Queue(size=24), Projected(Cosine), 'Cosine', 'Embedding', 'Affinity', 'Queue']


@pytest.mark.parametrize('loss', LOSSES, ids=lambda o: getattr(o, '__name__', type(o).__name__))
def test_a_student_trains_without_labels(loss):
    t = teacher().train()
    before = state(t),flags(t)
    learn = learn_from()
    first = state(learn.model)
    kd = KD(t, copy.deepcopy(loss), valid=True)
    learn.fit(6, cbs=kd)
    losses = kd.log.history.distill_loss
    assert losses.notna().all() and losses[-4:].mean()<losses[:4].mean() and kd.log.history.task_loss.isna().all()
    assert not same(first, state(learn.model))
    assert same(before[0], state(t)) and flags(t)==before[1] and not n_hooks(t, learn.model)
    assert learn.recorder.metric_names[-2]=='valid_distill_loss'
    assert learn.recorder.values[-1][-1]<learn.recorder.values[0][-1]


def test_the_loop_by_hand():
    "The same steps as a loop of a few lines, with a projection"
    t = teacher(8).eval()
    order = unlabelled().train
    order.rng = random.Random(0)
    batches = [b[0] for _ in range(2) for b in order]
    model = body()
    loss = Projected(Cosine).build(torch.zeros(1, 8), torch.zeros(1, 16))
    hand_model,hand_map = copy.deepcopy(model).train(),copy.deepcopy(loss.projection)
    opt = torch.optim.SGD([*hand_model.parameters(), *hand_map.parameters()], lr=0.05)
    for b in batches:
        with torch.no_grad(): target = t(b)
        (1-torch.cosine_similarity(hand_map(hand_model(b)), target)).mean().backward()
        opt.step(), opt.zero_grad()
    learn = learn_from(model=model, cbs=KD(t, loss, weight=1, task_weight=0))
    learn.fit(2, wd=0.)
    for by_hand,module in ((hand_model, model), (hand_map, loss.projection)):
        for a,b in zip(by_hand.parameters(), module.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_labels_that_only_measure_teach_nothing():
    "With `NoTask` another labelling is the same training; and weight 0 teaches nothing at all"
    def trained(y, weight=1.):
        learn = learner(body(), data(y=y), loss_func=NoTask)
        learn.fit(2, wd=0., cbs=KD(teacher(), Cosine, weight=weight, task_weight=1.))
        return state(learn.model)
    a,b = trained(torch.zeros(32).long()),trained(torch.arange(32)%3)
    assert same(a, b) and not same(a, state(body()))
    params = dict(body().named_parameters())
    assert all(torch.equal(v, params[k]) for k,v in trained(None, 0.).items() if k in params)


def test_another_width_is_refused_before_the_first_step():
    learn = learn_from()
    first = state(learn.model)
    said = r'Cosine: the student.s embeddings have 8 features and the teacher.s 16: take Projected\(Cosine\)'
    with pytest.raises(ValueError, match=said): learn.fit(1, cbs=KD(teacher(8), Cosine))
    assert same(first, state(learn.model))
    for loss in (Affinity, Projected(Queue(size=24))): learn_from().fit(1, cbs=KD(teacher(8), loss))


def test_embeddings_are_asked_once_and_kept():
    asked = []
    def spy(t):
        t.register_forward_hook(lambda m,i,o: asked.append(len(o)))
        return t
    def history(cache, **kwargs):
        asked.clear()
        learn,kd = learn_from(unlabelled(**kwargs)),KD(Teacher(spy(teacher()), cache=cache), Cosine)
        learn.fit(4, cbs=kd)
        return kd.log.history.distill_loss,sum(asked)
    (plain,n),(cached,m) = history(None),history(True)
    assert n==4*32 and m<2*32
    torch.testing.assert_close(*(torch.tensor(o.values) for o in (plain, cached)), rtol=1e-2, atol=1e-3) # kept in fp16
    views,m = history(Replay(k=2, dtype=torch.float32), jitter=0.5)
    assert m<3*32 and views.notna().all() and views.iloc[-4:].mean()<views.iloc[:4].mean()


def test_replayed_views_are_answered_as_they_are_seen():
    class Asking(Replay):
        def ask(self, *xb): return self._recorder.ask_teacher(*xb)
    def trained(cache):
        learn = learn_from(unlabelled(jitter=0.5))
        torch.manual_seed(0)
        learn.fit(4, cbs=KD(Teacher(teacher(), cache=cache), Projected(Queue(size=24))))
        return state(learn.model)
    assert same(trained(Replay(k=2, dtype=torch.float32)), trained(Asking(k=2, dtype=torch.float32)))


def test_the_queue_and_the_map_are_saved_and_a_resumed_training_goes_on():
    def start():
        torch.manual_seed(0)                                        # for the projection
        return learn_from(model=body()),KD(teacher(8), Projected(Queue(size=24)))
    whole,kd = start()
    whole.add_cb(kd)
    for _ in range(2): whole.fit(2)
    part,first = start()
    part.fit(2, cbs=first)
    saved = copy.deepcopy(part.model.state_dict()),copy.deepcopy(first.learned.state_dict())
    assert {'Projected.projection.weight', 'Projected.loss.past', 'Projected.loss.filled'}<=set(saved[1])
    assert not any('projection' in k for k in saved[0])
    other,second = start()
    other.dls.train.rng = part.dls.train.rng
    other.model.load_state_dict(saved[0])
    second.load_learned(saved[1])
    other.fit(2, cbs=second)
    assert same(state(other.model), state(whole.model)) and same(second.learned.state_dict(), kd.learned.state_dict())


def test_lr_find_puts_the_queue_back():
    learn,kd = learn_from(),KD(teacher(8), Projected(Queue(size=24)))
    learn.fit(1, cbs=kd)
    was = copy.deepcopy(kd.learned.state_dict())
    learn.add_cb(kd)
    learn.lr_find(num_it=20, show_plot=False)
    assert same(was, kd.learned.state_dict())


@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_step', 'after_validate'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt(), CancelFitException()], ids=lambda e: type(e).__name__)
def test_nothing_is_left_behind(event, exc):
    t = teacher(8)
    before = state(t),flags(t)
    kd = KD(t, Projected(Queue(size=24)))
    learn = learn_from(cbs=kd)
    try: learn.fit(2, cbs=Boom(event, exc, at=0 if event=='after_validate' else 2, order=20))
    except KeyboardInterrupt: pass
    assert same(before[0], state(t)) and flags(t)==before[1] and not n_hooks(t, learn.model)
    assert kd.session is None and len(learn.metrics)==0
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))


def test_under_autocast():
    kd = KD(teacher(8), Projected(Cosine))
    learn = learn_from(cbs=[kd, CPUMixedPrecision('bf16')])
    learn.fit(4)
    assert kd.log.history.distill_loss.iloc[-4:].mean()<kd.log.history.distill_loss.iloc[:4].mean()
    assert kd.learned['Projected'].projection.weight.dtype==torch.float32


def test_metrics_of_the_training_have_nothing_to_judge_by():
    learn = learner(body(), unlabelled(), [KD(teacher(), Cosine)], NoTask)
    learn.recorder.train_metrics = True
    with pytest.raises(ValueError, match='train_metrics=True: the training batches have no labels'): learn.fit(1)


def test_a_strong_view_says_what_it_needs():
    learn = learner(body(), unlabelled(), loss_func=NoTask)
    with pytest.raises(ValueError, match='the batches have no labels, by which it tells'):
        learn.fit(1, cbs=fixmatch(lambda x: x))
