"Adapters and learned losses: trained with the student, and no part of it"
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.optimizer import Adam, OptimWrapper, ranger
from torch import nn

from fasterai.distill.loss.learned import VID
from fasterai.distill.losses import *
from fasterai.distill.methods.exits import DeepSupervision
from fasterai.distill.methods.mutual import MutualLearning
from fasterai.distill.teacher.following import EMA
from helpers import GradsAt, block, data, learner, net, same, state
from kd_helpers import KD, teacher, layers


def test_adapters_are_clipped_too():
    learn,norms = learner(),[]
    kd = KD(teacher(), FitNet, **layers, weight=1000., task_weight=1.)
    class Norms(GradsAt):
        def before_fit(self): pass
        def before_step(self):
            norms.append([nn.utils.get_total_norm([p.grad for p in ps]).item()
                          for ps in (self.learn.model.parameters(), kd.learned.parameters())])
    learn.fit(1, cbs=[kd, GradientClip(0.1), Norms()])
    assert all(n<=0.1001 for o in norms for n in o) and max(n for o in norms for n in o)>0.09


@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['fastai','torch'])
@pytest.mark.parametrize('split', [False, True])
def test_adapters_train_with_the_students_optimizer_and_leave_it_as_it_was(opt, split):
    from fastai.torch_core import params
    kw = dict(splitter=lambda m: [params(m[:2]), params(m[2:])]) if split else {}
    learn = learner(opt_func=opt, **kw)
    learn.create_opt()
    sizes = [len(o) for o in learn.opt.param_lists]
    kd,first = KD(teacher(), FitNet, **layers),{}
    class First(GradsAt):
        order = 4
        def before_fit(self): self.lrs = []
        def before_step(self):
            if not first: first.update(state(kd.learned))
            self.lrs.append((self.learn.opt.hypers[-1]['lr'], len(self.learn.opt.param_lists[-1])-sizes[-1]))
    see = First()
    learn.fit_one_cycle(2, slice(1e-3, 1e-2), cbs=[kd, see])
    n = len(list(kd.learned.parameters()))
    assert n==6 and {o[1] for o in see.lrs}=={n} and len({o[0] for o in see.lrs})>3
    after = state(kd.learned)
    assert not [k for k,_ in kd.learned.named_parameters() if torch.equal(first[k], after[k])]
    assert [len(o) for o in learn.opt.param_lists]==sizes and all(p.grad is None for p in kd.learned.parameters())
    assert not any('adapter' in k for k in learn.model.state_dict())
    first.clear()
    learn.fit_one_cycle(1, 1e-3, cbs=[kd, see]) # a second fit goes on from there
    assert all(torch.equal(first[k], after[k]) for k,_ in kd.learned.named_parameters())


ones = Adam, partial(OptimWrapper, opt=torch.optim.Adam)
hands = lambda ps: Adam(ps, .01, mom=.9, sqr_mom=.99, eps=1e-5, wd=0.), lambda ps: torch.optim.Adam(ps, .01)

@pytest.mark.parametrize('opt,hand', [*zip(ones, hands)], ids=['fastai','torch'])
def test_two_fits_are_one_loop_with_one_state_of_the_optimizer(opt, hand, tmp_path):
    "Also with `lr_find` between; where `unfreeze` clears the student's states, the adapters' begin anew, too"
    def start():
        own = nn.Conv2d(4, 8, 1)
        with torch.no_grad():
            for p in own.parameters(): p.fill_(.1)
        kd = KD(teacher(), FitNet, '0', '0', adapters={'0': own})
        return learner(opt_func=opt, path=tmp_path, lr=.01, wd=0.),kd,own
    def step_by_hand(between):
        learn,kd,own = start()
        t,parts = teacher().eval(),[*learn.model.parameters(), *own.parameters()]
        adam = hand(parts)
        for i in range(2):
            if i and between=='unfreeze': adam = hand(parts)
            for x,y in learn.dls.train:
                h = learn.model.train()[0](x)
                with torch.no_grad(): ht = t[0](x)
                adam.zero_grad()
                (.5*F.cross_entropy(learn.model[1:](h), y) + .5*F.mse_loss(own(h), ht)).backward()
                adam.step()
        return parts
    for between in (None, 'lr_find', 'export', 'unfreeze'):
        learn,kd,_ = start()
        learn.fit(1, cbs=kd)
        if between=='unfreeze': learn.unfreeze()
        if between=='export': # it makes the optimizer anew, with its states
            states = learn.opt.state_dict()
            learn.create_opt()
            learn.opt.load_state_dict(states)
        if between=='lr_find':
            rng = learn.dls.train.rng.getstate()
            with learn.added_cbs(kd): learn.lr_find(num_it=5, stop_div=False, show_plot=False)
            learn.dls.train.rng.setstate(rng)
        learn.fit(1, cbs=kd)
        for p,q in zip([*learn.model.parameters(), *kd.learned.parameters()], step_by_hand(between), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda m: f'{between}: {m}')


def in_order():
    dls = data()
    return DataLoaders(dls.valid, dls.valid)

def saved(learn, kd, path):
    learn.save(path/'student', with_opt=True)
    torch.save(kd.learned.state_dict(), path/'learned.pt')

class SavedHalfway(Callback):
    order = 100
    def __init__(self, kd, path): self.kd,self.path = kd,path
    def after_epoch(self):
        if self.epoch!=1: return
        saved(self.learn, self.kd, self.path)
        raise CancelFitException

@pytest.mark.parametrize('opt', ones, ids=['fastai','torch'])
@pytest.mark.parametrize('make', [lambda: KD(teacher(), FitNet, **layers), lambda: DeepSupervision(['0', '1']),
                                  lambda: MutualLearning(net(5, seed=2))], ids=['adapters', 'exits', 'peers'])
def test_a_saved_training_goes_on_as_one_that_never_stopped(make, opt, tmp_path):
    def start():
        torch.manual_seed(3) # for what is built on the first batch
        return learner(dls=in_order(), opt_func=opt, lr=.01)
    whole,all4 = start(),make()
    whole.fit(4, cbs=all4)
    def off(state, **how):
        learn,kd = start(),make()
        learn.load(tmp_path/'student', with_opt=True)
        kd.load_learned(state)
        learn.fit(cbs=kd, **how)
        ps,qs = ([*l.model.parameters(), *k.learned.parameters()] for l,k in ((whole, all4), (learn, kd)))
        return max((p-q).abs().max().item() for p,q in zip(ps, qs, strict=True))
    def load(): return torch.load(tmp_path/'learned.pt', weights_only=True)
    kd = make()
    start().fit(4, cbs=[kd, SavedHalfway(kd, tmp_path)])
    assert off(load(), n_epoch=4, start_epoch=2)<1e-6
    learn,kd = start(),make()
    learn.fit(2, cbs=kd)
    saved(learn, kd, tmp_path)
    assert off(load(), n_epoch=2)<1e-6
    assert off({k:v for k,v in load().items() if not k.startswith('optimizer.')}, n_epoch=2)>1e-3 # a file of before


@pytest.mark.parametrize('opt', ones, ids=['fastai','torch'])
def test_a_fit_that_goes_back_an_epoch_is_one_without_that_epoch(opt):
    class Back(Callback):
        order = 100
        def __init__(self, kd): self.kd = kd
        def after_epoch(self):
            parts = self.learn.model,self.learn.opt,self.kd.learned
            if self.epoch==0: self.was = [deepcopy(o.state_dict()) for o in parts]
            if self.epoch!=1: return
            for o in parts[:2]: o.load_state_dict(self.was.pop(0))
            self.kd.load_learned(self.was.pop())
    def trained(n, back):
        torch.manual_seed(3)
        learn,kd = learner(dls=in_order(), opt_func=opt, lr=.01),KD(teacher(), FitNet, **layers)
        learn.fit(n, cbs=[kd, Back(kd)] if back else kd)
        return [*learn.model.parameters(), *kd.learned.parameters()],learn.opt.state_dict()
    (ps,a),(qs,b) = trained(3, True),trained(2, False)
    for p,q in zip(ps, qs, strict=True): torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
    assert len(a['state'])==len(b['state'])


@pytest.mark.parametrize('make', [lambda: KD(teacher(), FitNet, **layers), lambda: MutualLearning(net(5, seed=2)),
                                  lambda: KD(EMA(.5), FitNet, **layers)], ids=['adapters', 'peers', 'average'])
def test_a_state_to_load_is_kept_by_lr_find_and_by_a_copy(make, tmp_path):
    def start():
        torch.manual_seed(3)
        return learner(dls=in_order(), opt_func=Adam, lr=.01, path=tmp_path)
    learn,kd = start(),make()
    learn.fit(2, cbs=kd)
    saved(learn, kd, tmp_path)
    learn.fit(2, cbs=kd)
    again,new = start().load(tmp_path/'student', with_opt=True),make()
    new.load_learned(torch.load(tmp_path/'learned.pt', weights_only=True))
    with again.added_cbs(new): again.lr_find(num_it=4, stop_div=False, show_plot=False)
    again.fit(2, cbs=deepcopy(new))
    for p,q in zip(learn.model.parameters(), again.model.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_learned_losses_train():
    learn = learner(opt_func=Adam)
    vid = VID()
    kd = KD(teacher(), vid, **layers)
    learn.fit(1, cbs=kd)
    was = [p.detach().clone() for p in vid.parameters()]
    learn.fit(1, cbs=kd)
    assert len(was) and all(not torch.equal(a, b) for a,b in zip(was, vid.parameters()))


def test_lr_find_gives_adapters_and_learned_losses_back(tmp_path):
    vid = VID()
    for trained in (False, True):
        learn = learner(opt_func=Adam, path=tmp_path)
        kd = KD(teacher(), {FitNet: 1, vid: 1}, **layers)
        if trained: learn.fit(1, cbs=kd)
        before = state(kd.learned)
        if trained: learn.add_cb(kd)
        learn.lr_find(num_it=12, start_lr=1e-3, end_lr=1e3, stop_div=False, show_plot=False)
        if trained: assert same(before, state(kd.learned)) and len(before)
        learn.remove_cb(kd)
    fresh = VID()
    learn = learner(opt_func=Adam, path=tmp_path, cbs=KD(teacher(), fresh, **layers))
    learn.lr_find(num_it=12, start_lr=1e-3, end_lr=1e3, stop_div=False, show_plot=False)
    assert fresh.shapes is None and not list(fresh.parameters())


def test_sizes_that_alternate_keep_the_adapters_parameters():
    s = nn.Sequential(block(3, 4), block(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    learn = learner(s, opt_func=Adam)
    teachers_calls,steps = [],[]
    t = nn.Sequential(block(3, 8), nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten(), nn.Linear(16, 3))
    t.register_forward_hook(lambda *_: teachers_calls.append(1))
    kd = KD(t, FitNet, '1', '1')
    class Sizes(GradsAt):
        order = 0
        def before_fit(self): pass
        def before_batch(self):
            if self.learn.iter%2: self.learn.xb = (F.interpolate(self.learn.xb[0], size=12),)
        def before_step(self): pass
    class Steps(GradsAt):
        def before_fit(self): pass
        def before_step(self): pass
        def after_step(self): steps.append({self.learn.opt.state[p].get('step') for p in kd.learned.parameters()})
    learn.fit(2, cbs=[kd, Sizes(), Steps()])
    n = 2*len(learn.dls.train)
    assert steps==[{i+1} for i in range(n)] and len(teachers_calls)==0 # the teacher never runs further than its layer


def test_learned_weights_load_before_the_first_batch():
    a,b = KD(teacher(), FitNet, **layers),KD(teacher(), FitNet, **layers)
    learner(opt_func=Adam).fit(1, cbs=a)
    saved,seen = state(a.learned),[]
    b.load_learned(saved)
    class First(GradsAt):
        order = 4
        def before_fit(self): pass
        def before_step(self): seen.append(state(b.learned))
    learner(opt_func=Adam).fit(1, cbs=[b, First()])
    assert all(torch.equal(seen[0][k], saved[k]) for k,_ in b.learned.named_parameters())


def test_learned_weights_of_another_recipe_are_refused_once():
    "Before or after the first batch, and the callback is as good as before"
    kd = KD(teacher(), FitNet, **layers)
    kd.load_learned({'VID.log_scale': torch.zeros(1)})
    said = 'load_learned: the state is of VID, and what learns here is adapters'
    with pytest.raises(ValueError, match=said): learner().fit(1, cbs=kd)
    learner().fit(1, cbs=kd)
    with pytest.raises(ValueError, match='the state is of nothing'): kd.load_learned({})
    wider = KD(net(16, seed=1), FitNet, **layers)
    wider.load_learned(kd.learned.state_dict())
    with pytest.raises(ValueError, match="the state's adapters are of other sizes"): learner().fit(1, cbs=wider)


def test_lookahead_draws_the_adapters_of_a_fit_to_their_own_past(tmp_path):
    learn,norms = learner(opt_func=ranger, path=tmp_path),[] # it looks ahead every six steps
    learn.fit(2, cbs=KD(teacher(), FitNet, **layers))
    n = sum(1 for _ in learn.model.parameters())
    own = nn.Conv2d(4, 6, 1) # of another shape than the adapter before
    with torch.no_grad():
        for p in own.parameters(): p.zero_()
    kd = KD(net(width=6, seed=1), FitNet, '0', '0', adapters={'0': own})
    class Norms(GradsAt):
        def before_fit(self): pass
        def before_step(self): pass
        def after_step(self):
            norms.append(sum(p.norm().item() for p in own.parameters()))
            assert len(self.learn.opt.state_dict()['slow_weights'][0])==n
    learn.fit(2, 1e-9, cbs=[kd, Norms()])
    assert len(norms)==8 and max(norms)<1e-6
    assert len(learn.opt.slow_weights[0])==n
