"What a loss may be called with: everything that a batch offers, and no misspelt hyper-parameter"
import copy
import inspect
import pickle
import sys
from functools import partial

import pytest
import torch
from fastcore.docments import docments
from torch import nn

import losses_reference as ref
from fasterai.distill import losses as L
from fasterai.distill.loss import learned
from fasterai.distill.loss.base import OUTPUTS, as_loss
from fasterai.distill.loss.learned import LearnedLoss
from fasterai.distill.loss.terms import Term
from fasterai.distill.losses import *

LEARNED = ['VID', 'CRD', 'ReviewKD', 'OFD']


@pytest.fixture
def offered():
    "All that a batch offers, for every loss"
    torch.manual_seed(0)
    maps = [{'a': torch.randn(4, 3, 4, 4), 'b': torch.randn(4, 5, 2, 2)} for _ in range(2)]
    return dict(pred=torch.randn(4, 5), teacher_pred=torch.randn(4, 5), fm_s=maps[0], fm_t=maps[1],
                target=torch.arange(4))


@pytest.mark.parametrize('name', available_losses())
def test_functions(name, offered):
    loss = getattr(L, name)
    needed = {k: offered[k] for k in catalogue[name].needs}
    assert loss(**offered)==loss(**needed)==loss(*needed.values())
    params = inspect.signature(loss).parameters
    hyper = next((k for k in params if k not in (*OUTPUTS, 'kwargs')), '')
    for call in (lambda: loss(**needed, **{hyper+'z': 1}), lambda: partial(loss, **{hyper+'z': 1})(**offered)):
        said = f"^{name}: unknown keyword '{hyper}z'; (did you mean|there is|there are none).*{hyper}"
        with pytest.raises(TypeError, match=said): call()
    if not hyper: return
    said = rf"^{name} is a function that compares .* not a class: .*partial\({name}, {hyper}=3\)"
    with pytest.raises(TypeError, match=said):
        loss(**{hyper: 3})
    with pytest.raises(TypeError, match=f"hand over {name} itself"): loss()


def test_the_case_that_was_silent():
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(TypeError, match="SoftTarget: unknown keyword 'temperature'; there is T, axis, ignore_index"):
        SoftTarget(s, t, temperature=1.)
    with pytest.raises(TypeError, match=r"SoftTarget is a function .*partial\(SoftTarget, T=4\)"): SoftTarget(T=4)
    with pytest.raises(TypeError, match="SoftTarget: unknown keyword 'temprature'"):
        standardize(SoftTarget)(s, t, temprature=1.)


@pytest.mark.parametrize('name', LEARNED)
def test_learned(name, offered):
    loss = getattr(learned, name)().build(**offered)
    want = loss(offered['fm_s'], offered['fm_t'], **({'target': offered['target']} if name=='CRD' else {}))
    torch.testing.assert_close(loss(**offered), want)
    with pytest.raises(TypeError, match=f"^{name}: unknown keyword 'taget'"):
        loss(offered['fm_s'], offered['fm_t'], taget=None)
    with pytest.raises(TypeError, match=f"^{name}: unknown keyword 'scael'"): loss.build(**offered, scael=1)


def test_a_learned_loss_of_one_s_own_decides_itself(offered):
    class Own(LearnedLoss):
        def make(self, fm_s, fm_t): self.w = nn.Parameter(torch.ones(()))
        def forward(self, fm_s, fm_t, target, **kwargs): return super().forward(fm_s, fm_t, target=target, **kwargs)
        def compute(self, fm_s, fm_t, target=None, **kwargs): return self.w*(target.sum()+kwargs.get('more', 0))
    assert Own().build(**offered)(**offered, more=1)==7
    assert Term(Own().build(**offered))(offered)==6


@pytest.mark.parametrize('name', available_losses())
def test_decorated_losses_are_still_functions(name):
    loss, source = getattr(L, name), inspect.getsource(getattr(L, name))
    assert source.startswith('@as_loss') and f'def {name}(' in source and '**kwargs' not in source
    assert loss.__name__==loss.__qualname__==name and loss.__module__.startswith('fasterai.distill.loss')
    for again in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), copy.copy(loss)): assert again is loss
    docs = docments(loss)
    assert all(v for k, v in docs.items() if k!='kwargs') and set(docs)>{'return', 'kwargs'}
    assert set(inspect.signature(partial(loss, axis=2) if 'axis' in docs else loss).parameters) | {'return'}==set(docs)


def test_a_wrong_call_is_python_s_own_error():
    s = torch.randn(3, 4)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'teacher_pred'"): SoftTarget(s)
    with pytest.raises(TypeError, match='multiple values'): SoftTarget(s, s, pred=s)
    with pytest.raises(TypeError, match='positional argument'): SoftTarget(s, s, 4, 1)


# A switch brings its own defaults

@pytest.mark.parametrize('given,T,gamma,alpha',
                         [({}, 1, 1.5, 1), (dict(T=4), 4, 1.5, 1), (dict(T=4, beta=8.), 4, 8, 1),
                          (dict(beta=3), 1, 3, 1),
                                                 (dict(alpha=0.5), 1, 1.5, 0.5)])
def test_normalize_has_the_defaults_of_nkd(given, T, gamma, alpha):
    g = torch.Generator().manual_seed(1)
    s, t = torch.randn(6, 5, generator=g).double(), torch.randn(6, 5, generator=g).double()
    y = torch.randint(0, 5, (6,), generator=g)
    want = ref.nkd(s.tolist(), t.tolist(), y.tolist(), T=T, gamma=gamma, alpha=alpha)
    for loss in (partial(DecoupledKD, normalize=True, **given), partial(partial(DecoupledKD, normalize=True), **given),
                 partial(partial(DecoupledKD, **given), normalize=True)):
        assert loss(s, t, y).item()==pytest.approx(want, rel=1e-12)
        assert loss(pred=s, teacher_pred=t, target=y, fm_s={}).item()==pytest.approx(want, rel=1e-12)
        term = Term(loss)
        assert (term.hypers['T'], term.hypers['beta'])==(T, gamma)
        assert term(dict(pred=s, teacher_pred=t, target=y)).item()==pytest.approx(want, rel=1e-12)
        assert term(dict(pred=s, teacher_pred=t, target=y), T=2).item()==pytest.approx(
            ref.nkd(s.tolist(), t.tolist(), y.tolist(), T=2, gamma=gamma, alpha=alpha), rel=1e-12)


def test_defaults_without_the_switch_and_by_position():
    s, t, y = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6)%5
    assert DecoupledKD(s, t, y)==DecoupledKD(s, t, y, normalize=False)==DecoupledKD(s, t, y, 4, 1., 8.)
    assert DecoupledKD(s, t, y, 4, 1., 8., True)==NKD(s, t, y, T=4, gamma=8)
    assert DecoupledKD(s, t, y, normalize=True)==NKD(s, t, y)
    assert standardize(DecoupledKD)(s, t, y, normalize=True)==standardize(NKD)(s, t, y)


def test_the_other_switches_share_their_defaults():
    s, t = torch.randn(6, 5), torch.randn(6, 5)
    assert TTM(s, t, weighted=True)==WTTM(s, t)


def test_the_wrapper_costs_next_to_nothing():
    "By the lines that run, since a clock would be noise"
    plain = lambda pred, teacher_pred, T=1: T
    wrapped, lines = as_loss(plain), []
    def trace(frame, event, arg):
        if event=='line': lines.append(frame.f_lineno)
        return trace
    for kw in ({}, dict(T=2)):
        lines.clear()
        sys.settrace(trace)
        try: wrapped(1, 2, **kw)
        finally: sys.settrace(None)
        assert len(lines)<=6, len(lines)
