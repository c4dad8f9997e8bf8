"Assistants: an ordinary distillation for each link, and the student's controls from the same start"
from functools import partial

import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn

from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.assistants import assistants
from fasterai.distill.study.one_run import quiet
from fasterai.distill.teacher.teacher import Teacher
from helpers import Boom, data, flags, n_hooks, net, same, state


def sized(width):
    block = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

def make(o):
    model = o if isinstance(o, nn.Module) else sized(o)
    return Learner(data(), model, CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD, lr=.1)

def plain_fit(learn, epochs, cbs): learn.fit(epochs, cbs=cbs)

kd = dict(loss=partial(SoftTarget, T=2), weight=.7)
run = partial(assistants, epochs=2, fit=plain_fit, progress=False, **kd)


def by_hand(o, seed, teacher):
    "An ordinary training with the callback"
    set_seed(seed)
    learn = make(o)
    same_start(learn.dls, seed)
    with quiet(learn): learn.fit(2, cbs=None if teacher is None else KnowledgeDistillationCallback(teacher, **kd))
    return learn.model


def test_each_link_is_an_ordinary_distillation():
    t = net(8)
    before = state(t),flags(t)
    chain = run(make, [5, 4, 3], t)
    five = by_hand(5, 2, t)
    four = by_hand(4, 1, five)
    expected = [five, four, by_hand(3, 0, four), by_hand(3, 0, t), by_hand(3, 0, None)]
    for learn,model in zip([*chain, *chain.alone], expected): assert same(state(learn.model), state(model))
    assert len(chain)==3 and len(chain.alone)==2
    assert same(state(t), before[0]) and flags(t)==before[1] and not n_hooks(t)
    assert list(chain.table.params)==[sum(p.numel() for p in o.parameters()) for o in (t, *expected)]
    assert list(chain.table.what)==['', '5', '4', '3', '3', '3']


def test_an_ensemble_teaches_and_its_row_is_its_own():
    t = Teacher([net(8), net(6, seed=1)])
    chain = run(make, [4, 3], t, controls=False)
    x,y = (torch.cat(o) for o in zip(*chain[0].dls.valid))
    right = (t.answer(x)[0].argmax(1)==y).float().mean()
    assert chain.table.accuracy[0]==pytest.approx(float(right)) and list(chain.table.network)==[
        'teacher', 'assistant 1', 'student']


def test_networks_of_the_list_are_copied():
    nets = [sized(4), sized(3)]
    before = [state(o) for o in nets]
    chain = run(make, nets, net(8))
    assert all(same(a, state(o)) for a,o in zip(before, nets))
    assert list(chain.table.what[1:])==['Sequential']*4
    assert not same(state(chain[-1].model), before[1])


def test_chains_share_their_controls_on_disk(tmp_path):
    t,fits = net(8),[]
    class Fit:
        def __call__(self, learn, epochs, cbs):
            fits.append(learn)
            learn.fit(epochs, cbs=cbs)
    first = run(make, [5, 3], t, path=tmp_path, fit=Fit())
    assert len(fits)==4
    other = run(make, [4, 3], t, path=tmp_path, fit=Fit())
    assert len(fits)==6
    assert all(same(state(a.model), state(b.model)) for a,b in zip(first.alone, other.alone))
    assert run(make, [5, 3], t, path=tmp_path, fit=Fit()).table.equals(first.table) and len(fits)==6
    run(make, [5, 3], net(8, seed=1), path=tmp_path, fit=Fit()) # another teacher: all but the student alone
    assert len(fits)==9


def test_nothing_left_behind_after_ctrl_c():
    t,made = net(8),[]
    def noted(width):
        made.append(make(width))
        return made[-1]
    def fit(learn, epochs, cbs): learn.fit(epochs, cbs=[cbs, Boom('after_loss', KeyboardInterrupt())])
    before = state(t),flags(t)
    with pytest.raises(KeyboardInterrupt): run(noted, [4, 3], t, fit=fit)
    assert same(state(t), before[0]) and flags(t)==before[1]
    assert not n_hooks(t, *(o.model for o in made))
    assert all(len(o.cbs)==len(make(3).cbs) and len(o.metrics)==1 for o in made)


def test_what_is_no_sequence():
    with pytest.raises(ValueError, match='an assistant and the student'): run(make, [3], net(8))
    with pytest.raises(ValueError, match='an assistant and the student'): run(make, sized(3), net(8))
    one = make(3)
    with pytest.raises(ValueError, match='the same network twice'): run(lambda o: one, [4, 3], net(8))
