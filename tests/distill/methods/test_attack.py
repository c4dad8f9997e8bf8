"Attacks: where pictures may go, what the networks are left with, and training against loops written by hand"
import random
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from fasttransform import Transform
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.embeddings import Queue
from fasterai.distill.losses import BinaryKD, FitNet, Logits, SoftTarget
from fasterai.distill.methods.attack import Attack, pgd, pixel_space
from fasterai.distill.methods.discriminator import Discriminator
from fasterai.distill.training.views import StudentSees
from helpers import Boom, data, flags, learner, n_hooks, net, same, state

KD = KnowledgeDistillationCallback
teacher = partial(net, width=8, seed=1)
stats = [.4, .5, .6],[.2, .3, .25]
small = partial(Attack, eps=.1, steps=3, step=.05)
rslad = dict(T=1, weight=1., task_weight=0.)


def pixels(**kwargs):
    "Noise from 0 to 1, perhaps normalised afterwards"
    dls = data(y=torch.arange(32)%3, **kwargs)
    for dl in dls.loaders:
        x,y = dl.dataset.tensors
        dl.dataset.tensors = x.sigmoid(),y
    return dls

def pupil(cbs=None, normalize=False, **kwargs):
    learn = learner(dls=pixels(), cbs=cbs, **kwargs)
    if normalize: learn.dls.add_tfms([Images(), Normalize.from_stats(*stats, cuda=False)], 'after_batch')
    return learn

class Images(Transform):
    "Plain tensors as images, which `Normalize` knows"
    order = 98
    def encodes(self, x:torch.Tensor): return TensorImage(x) if x.ndim==4 else x


class See(Callback):
    "Keeps what the student is shown, and what it came from"
    order = 99
    def before_fit(self): self.seen = []
    def before_batch(self):
        attack = next((c for c in self.learn.cbs if isinstance(c, Attack)), None)
        self.seen.append((self.learn.xb[0].clone(), attack and attack.clean and attack.clean[0].clone()))


def test_one_step_golden():
    W = torch.tensor([[-0.4175, 0.706, 1.916], [-2.1418, 0.7191, 0.4671], [0.7667, 0.882, 0.8088],
                      [-0.9472, -0.129, -0.6309]], dtype=torch.float64)
    x = torch.tensor([[0.5056, 0.6112, 0.3883, 0.1882], [0.0403, 0.1215, 0.6904, 0.634]], dtype=torch.float64)
    y = torch.tensor([2, 0])
    def loss(x): return F.cross_entropy(x@W, y)
    adv = pgd(loss, x, eps=.06, step=.1, steps=1)
    want = torch.tensor([[0.4456, 0.6712, 0.4483, 0.2482], [0.1003, 0.1815, 0.7504, 0.694]], dtype=torch.float64)
    torch.testing.assert_close(adv, want)
    assert loss(x).item()==pytest.approx(1.1470937166553368) and loss(adv).item()==pytest.approx(1.3003440413177234)


@pytest.mark.parametrize('start', [None, 'noise'])
def test_the_box(start):
    torch.manual_seed(0)
    x,w = torch.rand(4, 3, 5, 5),torch.randn(75)
    x[0] = 0
    x[1] = 1
    start = None if start is None else x+torch.randn_like(x)
    adv = pgd(lambda x: (x.flatten(1)@w).square().sum(), x, .1, .04, 10, start)
    assert (adv-x).abs().max()<=.1+1e-6 and adv.min()>=0 and adv.max()<=1 and not adv.requires_grad


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('against', ['label', 'teacher', 'both'])
def test_pictures_stay_in_the_box_and_get_worse(normalize, against):
    t,see = teacher(),See()
    learn = pupil(normalize=normalize)
    learn.fit(1, cbs=[KD(t, SoftTarget, **rslad), Attack(.1, 5, against), see])
    mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in (stats if normalize else ([0.]*3, [1.]*3)))
    moved = 0
    train = [o for o in see.seen if o[1] is not None]
    assert len(train)==4 # validation is on clean pictures
    for adv,clean in train:
        adv,clean = (torch.Tensor(o)*std+mean for o in (adv, clean))
        assert (adv-clean).abs().max()<=.1+1e-5 and adv.min()>=-1e-5 and adv.max()<=1+1e-5
        moved += (adv-clean).abs().max().item()
    assert moved>.3


def test_the_loss_does_grow():
    learn = pupil(metrics=accuracy)
    learn.fit(3)
    torch.manual_seed(0)
    clean,attacked = learn.validate()[0],learn.validate(cbs=Attack(.1, 10))[0]
    assert attacked>clean+.03 and learn.validate()[0]==pytest.approx(clean)
    assert learn.validate(cbs=Attack(0., 10))[0]==pytest.approx(clean)


def kl(s, t): return F.kl_div(s.log_softmax(1), t.softmax(1), reduction='batchmean')

def adversarial(worse, x, noise, model):
    "PGD in its plainest form, on a model in evaluation mode"
    mode = model.training
    model.eval()
    adv = (x+noise).clamp(x-.1, x+.1).clamp(0, 1)
    for _ in range(3):
        adv.requires_grad_()
        grad, = torch.autograd.grad(worse(adv), adv)
        adv = torch.min(torch.max(adv.detach()+.05*grad.sign(), x-.1), x+.1).clamp(0, 1)
    model.train(mode)
    return adv

def hand(way, epochs=1):
    "Plain SGD, in the order of the Learner's batches"
    learn,t = pupil(),teacher().eval()
    s,opt = learn.model.train(),torch.optim.SGD(learn.model.parameters(), .05)
    torch.manual_seed(3)
    for _ in range(epochs):
        for x,y in learn.dls.train:
            way(s, t, torch.Tensor(x), y).backward()
            opt.step()
            opt.zero_grad()
    return state(s)

def ard(s, t, x, y):
    adv = adversarial(lambda a: F.cross_entropy(s(a), y), x, .1*(2*torch.rand_like(x)-1), s)
    with torch.no_grad(): zt = t(x)
    return 16*kl(s(adv)/4, zt/4)

def rslad_by_hand(s, t, x, y):
    with torch.no_grad(): zt = t(x)
    adv = adversarial(lambda a: kl(s(a), zt), x, .001*torch.randn_like(x), s)
    return 5/6*kl(s(adv), zt)+1/6*kl(s(x), zt)

def adaad(s, t, x, y):
    adv = adversarial(lambda a: kl(s(a), t(a)), x, .001*torch.randn_like(x), s)
    with torch.no_grad(): zt = t(adv)
    return kl(s(adv), zt)

def of_labels(s, t):
    p,q = t.sigmoid(),s.sigmoid()
    return (p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean()

bce = BCEWithLogitsLossFlat,BinaryKD,of_labels

@pytest.mark.parametrize('against', ['teacher', 'both'])
@pytest.mark.parametrize('c,loss_func,loss,far', [(1, *bce), (3, *bce), (2, MSELossFlat, Logits, F.mse_loss)],
                         ids=['one logit', 'labels', 'numbers'])
def test_an_attack_counts_as_the_task_does(c, loss_func, loss, far, against):
    dls = pixels()
    for dl in dls.loaders: dl.dataset.tensors = dl.dataset.tensors[0],(torch.arange(32*c).view(32, c)%2).float()
    learn,t,see = learner(net(c=c), dls, loss_func=loss_func()),net(8, c, seed=1).eval(),See()
    s = deepcopy(learn.model)
    learn.fit(1, cbs=[KD(t, loss), small(against=against, start=0.), see])
    adv,clean = see.seen[0]
    with torch.no_grad(): said = t(clean)
    want = adversarial(lambda a: far(s(a), said if against=='teacher' else t(a)), clean, 0., s)
    assert ((adv-want).abs()>1e-6).float().mean()<.01 # where the gradient is as good as 0, its sign is chance
    assert (adv-clean).abs().mean()>.06


def plain(s, t, x, y):
    adv = adversarial(lambda a: F.cross_entropy(s(a), y), x, .1*(2*torch.rand_like(x)-1), s)
    return .75*F.cross_entropy(s(adv), y)+.25*F.cross_entropy(s(x), y)


@pytest.mark.parametrize('way, cbs', [
    (ard, lambda t: [KD(t, SoftTarget, T=4, weight=1., task_weight=0.), small(against='label')]),
    (rslad_by_hand, lambda t: [KD(t, SoftTarget, **rslad), small(against='teacher', natural=1/6)]),
    (adaad, lambda t: [KD(t, SoftTarget, **rslad), small(against='both')]),
    (plain, lambda t: [small(natural=.25)])], ids=['ARD', 'RSLAD', 'AdaAD', 'PGD'])
def test_the_loop_written_by_hand(way, cbs):
    t = teacher().train()
    before = state(t),flags(t)
    learn = pupil()
    torch.manual_seed(3)
    learn.fit(1, cbs=cbs(t))
    want = hand(way)
    for k,v in state(learn.model).items(): torch.testing.assert_close(v, want[k], atol=1e-5, rtol=1e-4)
    assert same(state(t), before[0]) and flags(t)==before[1] and all(p.grad is None for p in t.parameters())


def test_golden_losses():
    adv,nat,t,t_adv = (torch.tensor(o, dtype=torch.float64) for o in (
        [[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381], [-0.4987, 2.9242, -4.1203]],
        [[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159], [-1.818, 1.1029, 4.5844]],
        [[3.5773, 0.873, 0.193], [-3.727, -0.5548, -0.7095], [-0.1655, -1.254, -0.0876], [-0.9544, -2.6277, 1.7692]],
        [[1.6905, -0.4659, 0.0328], [0.4075, -0.7889, 0.0021], [-0.0009, -1.7547, 1.0177], [0.6005, -0.6254, -0.1715]]))
    assert SoftTarget(adv, t, T=4).item()==pytest.approx(3.9918986170001456)
    assert (5/6*SoftTarget(adv, t, T=1)+1/6*SoftTarget(nat, t, T=1)).item()==pytest.approx(2.328587082805415)
    assert SoftTarget(adv, t_adv, T=1).item()==pytest.approx(1.9760663159413037)


def test_batchnorm_is_moved_by_the_training_alone():
    learn,counted = pupil(),pupil()
    learn.fit(1, cbs=small())
    counted.fit(1)
    for n in '0.1.num_batches_tracked','1.1.num_batches_tracked':
        assert state(learn.model)[n]==state(counted.model)[n]==4


def test_no_change_is_plain_training_bit_for_bit():
    a,b = pupil(),pupil()
    a.fit(2, cbs=Attack(0.))
    b.fit(2)
    assert same(state(a.model), state(b.model))


def test_the_teacher_sees_the_clean_batch_unless_both_move():
    for against,clean in ('label', True), ('teacher', True), ('both', False):
        asked = []
        t = teacher()
        t.register_forward_pre_hook(lambda m, args: asked.append(args[0].detach().clone()))
        see,learn = See(),pupil()
        learn.fit(1, cbs=[KD(t, SoftTarget, **rslad), small(against=against), see])
        adv,was = see.seen[0]
        assert not torch.equal(adv, was) and any(torch.equal(o, was if clean else adv) for o in asked)


def test_with_maps_views_and_accumulation():
    t,learn = teacher(),pupil(cbs=StudentSees(lambda x: x.flip(-1)))
    kd = KD(t, {SoftTarget: 1, FitNet: 1}, ['1'], ['1'], weight=.5)
    learn.fit(1, cbs=[kd, small(against='teacher', natural=.5), GradientAccumulation(16)])
    assert not n_hooks(learn.model, t) and kd.session is None and len(learn.cbs)==4
    assert all(p.isfinite().all() for p in learn.model.parameters())


excs = [KeyboardInterrupt(), RuntimeError('out of memory'), CancelFitException()]

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_step'])
@pytest.mark.parametrize('exc', excs, ids=lambda e: type(e).__name__)
def test_left_as_it_was(event, exc):
    t = teacher().train()
    before = state(t),flags(t)
    learn = pupil()
    attack,kd = small(against='both', natural=.2),KD(t, SoftTarget, **rslad)
    try: learn.fit(1, cbs=[kd, attack, Boom(event, exc, order=20)])
    except (KeyboardInterrupt, RuntimeError): pass
    assert same(state(t), before[0]) and flags(t)==before[1] and not n_hooks(learn.model, t)
    assert kd.session is None and not learn.metrics and not any(isinstance(c, Attack) for c in learn.cbs)
    assert all(p.grad is None for p in t.parameters())


def test_an_error_in_the_attack_leaves_the_modes():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net,self.n = net(),0
        def forward(self, x):
            self.n += not self.training
            if self.n==3 and not self.training: raise RuntimeError('out of memory')
            return self.net(x)
    learn = learner(Odd(), pixels())
    with pytest.raises(RuntimeError, match='out of memory'): learn.fit(1, cbs=small())
    assert learn.model.training and learn.model.net[0][1].training


@pytest.mark.parametrize('loss_func', [None, nn.MSELoss()])
def test_the_clean_share_of_data_without_labels(loss_func):
    "It is the teacher's loss alone; inputs that stand for labels are none"
    x = pixels().train_ds.tensors[0][:8]
    dls = DataLoaders(*[TfmdDL(TensorDataset(x), bs=8, num_workers=0)]*2, device='cpu')
    kd,see = KD(teacher(), SoftTarget, T=1),See()
    learn = learner(dls=dls, loss_func=loss_func, lr=0.)
    learn.fit(1, cbs=[kd, small(against='teacher', natural=.25), see])
    (adv,_),t,s = see.seen[0],teacher().eval(),net()
    with torch.no_grad(): changed,clean = (SoftTarget(s.train()(o), t(x), T=1).item() for o in (adv, x))
    assert abs(changed-clean)>1e-3*clean and kd.log.history.distill_loss[0]==pytest.approx(changed, rel=1e-4)
    assert learn.recorder.values[0][0]==pytest.approx(.5*(.75*changed+.25*clean), rel=1e-4)


def test_refusals():
    learn = learner() # noise below 0
    for n in 'eps','steps','step','natural':
        with pytest.raises(ValueError, match=n): Attack(**{n: -1})
    with pytest.raises(ValueError, match="did you mean 'teacher'"): Attack(against='teachr')
    with pytest.raises(ValueError, match='pixels from 0 to 1'): learn.fit(1, cbs=Attack())
    with pytest.raises(ValueError, match='needs a distillation'): pupil().fit(1, cbs=Attack(against='both'))
    with pytest.raises(ValueError, match='MixUp mixes pictures'): pupil().fit(1, cbs=[Attack(), MixUp()])
    with pytest.raises(ValueError, match='takes one network'):
        pupil().fit(1, cbs=[KD([teacher(), net(8)], SoftTarget), Attack(against='both')])
    with pytest.raises(ValueError, match="say what it is.*against='label'"):
        own = learner(net(c=1), pixels(), loss_func=lambda z, y: z.mean())
        own.fit(1, cbs=[KD(net(8, 1)), small(against='teacher')])
    with pytest.raises(ValueError, match=r'pictures \(B, C, H, W\)'): pixel_space(learn.dls, torch.rand(4, 3))
    assert 'against' in repr(Attack())


def test_predictions_under_attack_and_without_labels():
    learn = pupil()
    random.seed(0)
    torch.manual_seed(0)
    clean,y = learn.get_preds()
    attacked,_ = learn.get_preds(cbs=Attack(.1))
    assert not torch.allclose(clean, attacked) and torch.allclose(clean, learn.get_preds()[0])
    assert F.cross_entropy(attacked.log(), y)>F.cross_entropy(clean.log(), y)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('against', ['label', 'teacher', 'both'])
def test_networks_of_other_precisions(against, dtype):
    learn = learner(net().to(dtype), pixels())
    for dl in learn.dls.loaders: dl.dataset.tensors = dl.dataset.tensors[0].to(dtype),dl.dataset.tensors[1]
    see = See()
    learn.fit(1, cbs=[KD(teacher().to(dtype)), small(against=against, natural=.5), see])
    x,clean = see.seen[0]
    assert x.dtype==dtype and .09<(x-clean).abs().max()<.11


def test_the_clean_share_is_no_second_lesson_for_what_learns():
    learn = learner(dls=pixels())
    kd = KD(teacher(), [Discriminator(), Queue(64)], weight=.5)
    learn.fit(1, cbs=[kd, small(natural=.5)])
    judge,queue = (o.base for o in kd.terms)
    assert judge.judges[0].steps==len(learn.dls.train) and queue.filled.sum()==len(learn.dls.train_ds)==32
