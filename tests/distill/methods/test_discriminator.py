"A discriminator: the golden numbers, and an optimizer that is its own"
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.callback.core import CancelFitException
from fastai.callback.schedule import *  # noqa: F403 (gives Learner `lr_find`)
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.discriminator import Discriminator, MapDiscriminator, discriminator_loss, student_loss
from helpers import Boom, data, flags, learner, n_hooks, net, same, state

KD = KnowledgeDistillationCallback
teacher = partial(net, width=8, seed=1)
layers = dict(activations_student=['1'], activations_teacher=['1'])


def test_golden():
    t = torch.tensor([-0.4148, -0.3334, 0.0811, -0.791, -0.2186], dtype=torch.float64)
    s = torch.tensor([-0.3489, 0.9837, 0.5809, 0.0703, 0.7775], dtype=torch.float64)
    want = dict(vanilla=(1.8334517653807154, 0.5362903435048193), hinge=(2.74804, -0.4127), wgan=(0.74804, -0.4127))
    for game,(d,g) in want.items():
        assert discriminator_loss(t, s, game).item()==pytest.approx(d, abs=1e-9)
        assert student_loss(s, game).item()==pytest.approx(g, abs=1e-9)
    for game in want: assert discriminator_loss(1e4*t, -1e4*s, game).isfinite()


@pytest.mark.parametrize('game', ['hinge', 'vanilla', 'wgan'])
def test_the_student_gets_a_gradient_and_nobody_else(game):
    torch.manual_seed(0)
    s,t = torch.randn(6, 4, requires_grad=True),torch.randn(6, 4, requires_grad=True)
    d = Discriminator(loss=game).build(s, t)
    before = state(d)
    d(s, t).backward()
    assert s.grad.abs().sum()>0 and t.grad is None and all(p.grad is None for p in d.parameters())
    assert not any(p.requires_grad for p in d.parameters())
    assert not same(before, state(d)) and d.judges[0].steps==1
    d.eval()
    before = state(d)
    d(s, t)
    assert same(before, state(d))


def test_the_game_is_the_one_written_by_hand():
    torch.manual_seed(0)
    d = Discriminator(lr=1e-2, hidden=8)
    d.build(torch.randn(2, 4), torch.randn(2, 4))
    judge = deepcopy(d.judges[0].net).requires_grad_(True)
    opt = torch.optim.Adam(judge.parameters(), lr=1e-2, betas=(.5, .9))
    for _ in range(3):
        s,t = torch.randn(2, 6, 4)
        got = d(s, t)
        opt.zero_grad()
        ((1-judge(t)).relu().mean()+(1+judge(s)).relu().mean()).backward()
        opt.step()
        torch.testing.assert_close(got, -judge(s).mean().detach(), atol=1e-6, rtol=1e-5)


def test_wgan_penalty_is_0_for_a_slope_of_1():
    from fasterai.distill.methods.discriminator import _penalty
    x = torch.randn(2, 5, 3)
    for slope,want in (1., 0.), (3., 4.):
        assert _penalty(lambda x: slope*x[..., :1], *x).item()==pytest.approx(want, abs=1e-5)


def test_tokens_pixels_and_maps():
    s,t = torch.randn(2, 3, 5, 4, 4)
    for on,args in ('logits', (s, t)), ('maps', ({'a': s}, {'b': t})):
        d = Discriminator(on).build(*args)
        assert d(*args).ndim==0 and d.judges[0].net[0].in_features==5
    d = Discriminator().eval()
    a = d(s, t)
    torch.testing.assert_close(d(s.movedim(1, -1), t.movedim(1, -1), axis=-1), a)


@pytest.mark.parametrize('on', ['logits', 'maps'])
def test_in_a_training(on):
    t,learn = teacher(),learner(net(width=4))
    before = state(t),flags(t)
    kd = KD(t, {SoftTarget: 1., Discriminator(on): .1}, **(layers if on=='maps' else {}), weight=.5)
    learn.fit(2, cbs=kd)
    d = kd.terms[1].base
    assert d.judges[0].steps==2*len(learn.dls.train)
    assert len({id(p) for p in learn.opt.param_lists[-1]})==len(list(learn.model.parameters()))
    assert same(state(t), before[0]) and flags(t)==before[1] and not n_hooks(learn.model, t)
    assert all(p.isfinite().all() for p in learn.model.parameters()) and 'Discriminator' in str(list(kd.learned))
    pickle.loads(pickle.dumps(d))


def test_resumed_is_uninterrupted():
    def trained(epochs, state_of=None, model=None):
        learn = learner(model or net(width=4))
        kd = KD(teacher(), Discriminator(lr=1e-2), weight=.5)
        if state_of: kd.load_learned(state_of)
        torch.manual_seed(0)
        learn.fit(epochs, cbs=kd)
        return learn.model,kd.learned.state_dict()
    first,known = trained(1)
    known = deepcopy(known)
    _,resumed = trained(1, known, deepcopy(first))
    # by the judge's own hand: the same two epochs of batches with one callback
    learn,kd = learner(net(width=4)),KD(teacher(), Discriminator(lr=1e-2), weight=.5)
    torch.manual_seed(0)
    learn.fit(1, cbs=kd)
    again = learner(learn.model)
    torch.manual_seed(0)
    again.fit(1, cbs=kd)
    assert same(resumed, kd.learned.state_dict())


def test_lr_find_leaves_it_as_it_was():
    d = Discriminator()
    learn,kd = learner(),KD(teacher(), d, weight=.5)
    learn.fit(1, cbs=kd)
    before = deepcopy(kd.learned.state_dict())
    learn.add_cb(kd)
    learn.lr_find(num_it=4, show_plot=False)
    assert same(before, kd.learned.state_dict())


def test_weight_0_is_plain_training_bit_for_bit():
    a,b = learner(),learner()
    a.fit(2, cbs=KD(teacher(), Discriminator(), weight=0.))
    b.fit(2)
    assert same(state(a.model), state(b.model))


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('out of memory'), CancelFitException()],
                         ids=lambda e: type(e).__name__)
def test_nothing_is_left_behind(exc):
    t,learn = teacher(),learner()
    kd = KD(t, Discriminator(), weight=.5)
    try: learn.fit(1, cbs=[kd, Boom('after_loss', exc, order=20)])
    except (KeyboardInterrupt, RuntimeError): pass
    assert kd.session is None and not learn.metrics and not n_hooks(learn.model, t)
    assert not any(p.requires_grad for p in kd.learned.parameters())


def test_under_autocast():
    s,t = torch.randn(6, 4, requires_grad=True),torch.randn(6, 4)
    d = Discriminator().build(s, t)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert d(s, t).isfinite()


def test_refusals_and_names():
    for kw,what in (dict(on='logit'), "did you mean 'logits'"), (dict(loss='hing'), "did you mean 'hinge'"), \
                   (dict(lr=0), 'lr and steps'), (dict(steps=0), 'lr and steps'):
        with pytest.raises(ValueError, match=what): Discriminator(**kw)
    assert type(Discriminator('maps', steps=2)) is MapDiscriminator is type(deepcopy(Discriminator(on='maps')))
    with pytest.raises(ValueError, match='teacher is None'): KD(None, Discriminator())
    with pytest.raises(ValueError, match='compares feature maps'): KD(teacher(), Discriminator('maps'))
    with pytest.raises(ValueError, match='channel by channel'):
        Discriminator('maps').build({'a': torch.randn(2, 3, 4, 4)}, {'b': torch.randn(2, 5, 4, 4)})
    assert isinstance(Discriminator(), nn.Module) and 'hinge' in repr(Discriminator())


@pytest.mark.parametrize('play', [lambda z, loss: student_loss(z, loss), lambda z, loss: discriminator_loss(z, z, loss),
                                  lambda z, loss: Discriminator(loss=loss)])
def test_an_unknown_game_is_refused(play):
    with pytest.raises(ValueError, match="unknown loss 'vanila'.*vanilla"): play(torch.zeros(4), 'vanila')


@pytest.mark.parametrize('game', ['hinge', 'vanilla', 'wgan'])
def test_it_plays_in_the_student_s_precision_and_draws_nothing_of_its_stream(game):
    def trained(dtype, cbs=None):
        dls = data()
        for dl in dls.loaders: dl.dataset.tensors = dl.dataset.tensors[0].to(dtype),dl.dataset.tensors[1]
        learn = learner(net(head=(nn.Dropout(),)).to(dtype), dls)
        torch.manual_seed(3)
        learn.fit(1, cbs=cbs)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    for dtype in torch.float32, torch.float64:
        kd = KD(teacher().to(dtype), Discriminator(loss=game), weight=1e-12, task_weight=1.)
        torch.testing.assert_close(trained(dtype, kd), trained(dtype), atol=1e-6, rtol=0)
        assert kd.terms[0].base.judges[0].net[0].weight.dtype==dtype
