"Born again: what a generation learns, the honest table, finished work on disk, and nothing left behind"
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import get_random_states, set_seed
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Logits, SoftTarget
from fasterai.distill.methods import chain
from fasterai.distill.methods.generations import born_again
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from helpers import Boom, data, n_hooks, net as fixed_net, same, state


def random_net(width=3):
    block = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

def make(net=random_net, dls=None, **kwargs):
    kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD, lr=.1) | kwargs
    return Learner(dls or data(), net(), **kwargs)

def plain_fit(learn, epochs, cbs): learn.fit(epochs, cbs=cbs)

run = partial(born_again, epochs=2, fit=plain_fit, progress=False)


def by_hand(seed, teacher=None, w=.5, T=1, epochs=2):
    "The same training without fastai's loop and without the library's"
    set_seed(seed)
    learn = make()
    same_start(learn.dls, seed)
    net = learn.model.train()
    for _ in range(epochs):
        for x,y in learn.dls.train:
            out = net(x)
            loss = F.cross_entropy(out, y)
            if teacher is not None:
                with torch.no_grad(): p = F.softmax(teacher(x)/T, 1)
                kl = (p*(p.log()-F.log_softmax(out/T, 1))).sum(1).mean()
                loss = (1-w)*loss + w*T**2*kl
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p,g in zip(net.parameters(), grads): p -= .1*g
    return net.eval()

def close(a, b, tol=1e-6):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=tol, rtol=0) for k in a)


@pytest.mark.parametrize('T', [1, 4])
def test_generations_are_a_hand_written_loop(T):
    nets = run(make, 2, loss=partial(SoftTarget, T=T), alone=False)
    teacher = None
    for k,learn in enumerate(nets):
        teacher = by_hand(k, teacher, T=T)
        assert close(learn.model, teacher), k


def test_as_many_alone_from_the_same_starts():
    nets = run(make, 2)
    assert len(nets.alone)==2
    for k,learn in enumerate(nets.alone, 1): assert close(learn.model, by_hand(k))
    assert not close(nets.alone[0].model, nets[1].model)


def test_weight_0_is_training_alone_bit_for_bit():
    nets = run(make, 2, weight=0.)
    for a,b in zip(nets[1:], nets.alone): assert same(state(a.model), state(b.model))


def test_the_teaching_generation_stays_as_it_was():
    first = run(make, 1, alone=False)[0]
    nets = run(make, 2, alone=False)
    assert same(state(first.model), state(nets[0].model))
    assert all(p.requires_grad for learn in nets for p in learn.model.parameters())
    assert not n_hooks(*(learn.model for learn in nets))
    assert not any(isinstance(cb, KnowledgeDistillationCallback) for learn in nets for cb in learn.cbs)


def test_the_table_is_that_of_the_networks():
    nets = run(make, 2)
    t = nets.table.set_index('network')
    assert list(t.networks)==[1, 1, 1, 3, 1, 3]
    x,y = (torch.cat(o) for o in zip(*nets[0].dls.valid))
    def numbers(*learners):
        p = sum(o.model.eval()(x).softmax(1) for o in learners).detach()/len(learners)
        return float(F.nll_loss(p.log(), y)),float((p.argmax(1)==y).float().mean())
    def row(name): return tuple(t.loc[name, ['valid_loss', 'accuracy']])
    solo = [nets[0], *nets.alone]
    for k,learn in enumerate(nets): assert row(f'generation {k}')==pytest.approx(numbers(learn), abs=1e-5)
    assert row('ensemble of 3 generations')==pytest.approx(numbers(*nets), abs=1e-5)
    assert row('ensemble of 3 alone')==pytest.approx(numbers(*solo), abs=1e-5)
    means = [sum(o)/3 for o in zip(*map(numbers, solo))]
    assert row('3 alone, their mean')==pytest.approx(means, abs=1e-5)
    assert isinstance(nets.ensemble, Teacher) and len(nets.ensemble.models)==3
    assert 'ensemble of 3 alone' in nets._repr_html_() and 'generation 2' in repr(nets)


def test_seeds_and_streams():
    set_seed(5)
    before = get_random_states()
    nets,others = run(make, 1, alone=False),run(make, 1, alone=False, seed=1)
    after = get_random_states()
    assert torch.equal(before['torch_state'], after['torch_state'])
    assert before['random_state']==after['random_state']
    starts = [state(o.model) for o in (*nets, *others)]
    assert not any(same(a, b) for i,a in enumerate(starts) for b in starts[:i])


def test_equal_starts_are_refused_and_pretrained_ones_said(capsys):
    fits = []
    def fit(*args): fits.append(args)
    with pytest.raises(ValueError, match='from the same weights'): run(partial(make, fixed_net), fit=fit)
    once = make()
    with pytest.raises(ValueError, match='the same network twice'): run(lambda: once, fit=fit)
    with pytest.raises(TypeError, match='must give a Learner'): run(random_net, fit=fit)
    assert not fits and not capsys.readouterr().out
    body = random_net(6)[0]
    def pretrained():
        learn = make(partial(random_net, 6))
        learn.model[0].load_state_dict(body.state_dict())
        return learn
    run(pretrained, 1, alone=False)
    conv,head = 6*28,7*3
    assert f'{conv/(conv+head):.0%} of the weights start alike' in capsys.readouterr().out


def test_other_tasks():
    x = torch.randn(16, 4)
    def dls(y): return DataLoaders(*[TfmdDL(TensorDataset(x, y), bs=8, shuffle=True, num_workers=0)]*2, device='cpu')
    def linear(): return nn.Linear(4, 3)
    numbers,labels = x[:, :3],(x[:, :3]>0).float()
    for y,loss_func,loss in ((numbers, MSELossFlat(), Logits), (labels, BCEWithLogitsLossFlat(), 'BinaryKD')):
        nets = run(partial(make, linear, dls(y), loss_func=loss_func, metrics=[]), 1, loss=loss)
        out = torch.stack([o.model(x) for o in nets]).detach()
        if loss is Logits: p = out.mean(0)
        else: p = out.sigmoid().mean(0).logit()
        assert nets.table.valid_loss[2]==pytest.approx(float(loss_func(p, y)), abs=1e-5)
    def own_loss(pred, y): return F.cross_entropy(pred, y)
    with pytest.raises(ValueError, match="average='softmax'"): run(partial(make, loss_func=own_loss), 1)
    assert len(run(partial(make, loss_func=own_loss), 1, average='softmax').table)==5


def test_a_generation_is_shown_what_it_was_trained_on():
    def crop(x): return x[..., :4, :4]
    def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    nets = run(lambda: make(flat, cbs=StudentSees(crop)), 1)
    x,y = (torch.cat(o) for o in zip(*nets[0].dls.valid))
    p = sum(o.model(crop(x)).softmax(1) for o in nets)
    assert nets.table.accuracy[2]==pytest.approx(float((p.argmax(1)==y).float().mean()))


# Finished work is on disk

class Stops(Exception): pass

def without_times(nets): return nets.table.drop(columns='seconds')


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), Stops()], ids=['ctrl-c', 'error'])
def test_resumed_is_uninterrupted(tmp_path, exc):
    whole = run(make, 2)
    class Fit:
        "Breaks off in its `at`th training; the fingerprint of one that does not is the same"
        def __call__(self, learn, epochs, cbs):
            fits.append(learn)
            learn.fit(epochs, cbs=[*([cbs] if cbs else []), *([Boom('after_pred', exc)] if len(fits)==at else [])])
    fits,at = [],3
    before = get_random_states()['torch_state']
    with pytest.raises(type(exc)): run(make, 2, path=tmp_path, fit=Fit())
    assert torch.equal(before, get_random_states()['torch_state'])
    broken = fits[-1]
    assert not n_hooks(broken.model) and len(broken.cbs)==len(make().cbs) and len(broken.metrics)==1
    assert sorted(f.name[:12] for f in tmp_path.iterdir())==['generation-0', 'generation-1']
    fits,at = [],0
    nets = run(make, 2, path=tmp_path, fit=Fit())
    assert len(fits)==3 and without_times(nets).equals(without_times(whole))
    assert all(same(state(a.model), state(b.model)) for a,b in zip([*nets, *nets.alone], [*whole, *whole.alone]))
    fits,at = [],0
    again = run(make, 2, path=tmp_path, fit=Fit())
    assert not fits and again.table.equals(nets.table)
    assert len(run(make, 3, path=tmp_path, fit=Fit(), alone=False))==4 and len(fits)==1


def test_files_of_other_trainings_are_not_taken_and_stay(tmp_path):
    def again(**kw):
        fits,before = [],set(tmp_path.iterdir())
        class Fit:
            def __call__(self, learn, epochs, cbs):
                fits.append(learn)
                learn.fit(epochs, cbs=cbs)
        run(**{**dict(make_learner=make, generations=1, alone=False, path=tmp_path, fit=Fit()), **kw})
        assert before<=set(tmp_path.iterdir())
        return len(fits)
    assert again()==2 and again()==0
    for kw in (dict(weight=.4), dict(loss=partial(SoftTarget, T=2)), dict(schedule='cos')):
        assert again(**kw)==1 and again(**kw)==0 # the first generation is the same
    for kw in (dict(epochs=1), dict(lr=.2), dict(seed=1), dict(make_learner=partial(make, dls=data(bs=4))),
               dict(make_learner=partial(make, partial(random_net, 4)))):
        assert again(**kw)==2 and again(**kw)==0, kw


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def half(state, f):
        f.write(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(chain.torch, 'save', half)
    with pytest.raises(KeyboardInterrupt): run(make, 1, path=tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    run(make, 1, path=tmp_path, alone=False)
    for f in tmp_path.iterdir(): f.write_bytes(b'half')
    with pytest.raises(ValueError, match='no finished training, remove it'): run(make, 1, path=tmp_path, alone=False)


def test_files_hold_nothing_that_runs(tmp_path):
    run(make, 1, path=tmp_path, alone=False)
    for f in tmp_path.iterdir():
        assert set(torch.load(f, weights_only=True))=={'model', 'seconds'} and f.stat().st_mode & 0o777==0o644


def test_bad_arguments():
    with pytest.raises(ValueError, match='generations must be at least 1'): run(make, 0)
    for n in (0, True, 2.): # True is no number of epochs
        with pytest.raises(ValueError, match='epochs must be a whole number from 1 on'): run(make, 1, epochs=n)
    assert chain.OneByOne(np.int64(5)).epochs==5
    fits = []
    def fit(*args): fits.append(args)
    with pytest.raises(TypeError, match='wieght'): run(make, 1, wieght=.3, fit=fit)
    assert not fits
