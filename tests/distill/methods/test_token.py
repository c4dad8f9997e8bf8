"Distillation tokens: who learns from whom, by golden numbers and by hand; and the model is as it was, however it ends"
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.metrics import accuracy
from torch import nn

from fasterai.distill.losses import HardTarget
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.methods.token import TokenDistillation, two_heads
from helpers import Boom, GradsAt, data, learner, n_hooks, net, same, state


class TwoHeads(nn.Module):
    "A small network as timm's distilled transformers are: two heads in training, if asked, else their mean"
    def __init__(self, width=4, c=3, seed=0):
        super().__init__()
        self.body = net(width, head=(nn.Identity(),), seed=seed)[:-1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head,self.head_dist = nn.Linear(2*width, c),nn.Linear(2*width, c)
        self.distilled_training = False

    def set_distilled_training(self, enable=True): self.distilled_training = enable

    def forward(self, x):
        h = self.body(x)
        cls,dist = self.head(h),self.head_dist(h)
        return (cls, dist) if self.distilled_training and self.training else (cls+dist)/2


teacher = partial(net, width=8, seed=1)


class Given(nn.Module):
    "Heads that say what they are told"
    def __init__(self, cls, dist):
        super().__init__()
        self.cls,self.dist = nn.Parameter(cls),nn.Parameter(dist)
        self.distilled_training = False
    def set_distilled_training(self, enable=True): self.distilled_training = enable
    def forward(self, x):
        return (self.cls, self.dist) if self.distilled_training and self.training else (self.cls+self.dist)/2


class Says:
    def __init__(self, z): self.z = z
    def answer(self, *xb): return self.z


def test_golden():
    "Computed in float64 by a slow and literal program, and by a second one"
    cls = torch.tensor([[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381],
                        [-0.4987, 2.9242, -4.1203]])
    dist = torch.tensor([[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159],
                         [-1.818, 1.1029, 4.5844]])
    z = torch.tensor([[3.5773, 0.873, 0.193], [-3.727, -0.5548, -0.7095], [-0.1655, -1.254, -0.0876],
                      [-0.9544, -2.6277, 1.7692]])
    y = torch.tensor([0, 2, 1, 1])
    learn = learner(Given(cls, dist), loss_func=F.cross_entropy)
    for kind,want in (('hard', 2.839574206739626), ('soft', 2.9055474046842185)):
        kd = TokenDistillation(Says(z), kind)
        task,parts = kd.terms_on(learn, (torch.zeros(4, 1),), (y,))
        assert (0.5*task+0.5*sum(parts.values())).item()==pytest.approx(want, rel=1e-6)
    predicted = learn.model.eval()(torch.zeros(4, 1))
    assert predicted[0].tolist()==pytest.approx([1.2076, -0.668, -2.66435], abs=1e-6)


@pytest.mark.parametrize('kind', ['hard', 'soft'])
def test_equals_a_hand_written_loop(kind):
    t,by_hand = teacher().eval(),TwoHeads()
    learn = learner(TwoHeads(), loss_func=F.cross_entropy)
    opt = torch.optim.SGD(by_hand.parameters(), 0.05)
    by_hand.set_distilled_training()
    seen = []
    learn.fit(2, cbs=[TokenDistillation(t, kind, weight=0.3), Keep(seen)])
    for x,y in seen:
        by_hand.train()
        cls,dist = by_hand(x)
        z = t(x).detach()
        hard = F.cross_entropy(dist, z.argmax(1))
        soft = 9*F.kl_div((dist/3).log_softmax(1), (z/3).softmax(1), reduction='batchmean')
        loss = 0.7*F.cross_entropy(cls, y) + 0.3*(hard if kind=='hard' else soft)
        opt.zero_grad()
        loss.backward()
        opt.step()
    for a,b in zip(learn.model.parameters(), by_hand.parameters()): assert torch.allclose(a, b, atol=1e-6)


class Keep(Callback):
    def __init__(self, seen): self.seen = seen
    def before_batch(self):
        if self.training: self.seen.append((self.x.clone(), self.y.clone()))


def test_the_heads_learn_from_one_side_each():
    learn = learner(TwoHeads())
    heads = learn.model.head.weight,learn.model.head_dist.weight
    for w,task,moved in ((1., 0., [False, True]), (1e-9, 1., [True, False])):
        before = [p.detach().clone() for p in heads]
        learn.fit(1, lr=0.1, cbs=TokenDistillation(teacher(), weight=w, task_weight=task))
        assert [(p-b).abs().max().item()>1e-6 for p,b in zip(heads, before)]==moved


def test_weight_zero_is_plain_training_bit_for_bit():
    plain,taught = learner(TwoHeads()),learner(TwoHeads())
    plain.fit(2)
    taught.fit(2, cbs=TokenDistillation(teacher(), weight=0))
    assert same(state(plain.model), state(taught.model))


def test_metrics_and_predictions_are_those_of_both_heads():
    learn = learner(TwoHeads(), metrics=accuracy)
    learn.fit(1, cbs=TokenDistillation(teacher()))
    preds,y = learn.get_preds()
    learn.model.eval()
    x = torch.cat([b[0] for b in learn.dls.valid])
    h = learn.model.body(x)
    assert torch.allclose(preds, ((learn.model.head(h)+learn.model.head_dist(h))/2).softmax(1), atol=1e-6)
    assert learn.validate()[1]==pytest.approx((preds.argmax(1)==y).float().mean().item())


def test_with_mixup_and_valid():
    learn = learner(TwoHeads(), cbs=MixUp(0.4))
    kd = TokenDistillation(teacher(), 'soft', valid=True)
    learn.fit(2, cbs=kd)
    assert not learn.model.distilled_training and all(v==v for v in learn.recorder.values[-1])


@pytest.mark.parametrize('was', [False, True])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_step',
                                   'before_validate'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('no'), CancelFitException()])
def test_the_model_is_as_it_was_after_an_exception(was, event, exc):
    learn = learner(TwoHeads())
    learn.model.set_distilled_training(was)
    kd = TokenDistillation(teacher())
    boom = Boom(event, exc, at=0 if 'valid' in event else 1, order=20)
    try: learn.fit(1, cbs=[kd, boom])
    except (KeyboardInterrupt, RuntimeError): pass
    assert boom.n>boom.at and learn.model.distilled_training is was
    assert kd.token is None and kd.session is None and len(learn.metrics)==0 and not n_hooks(learn.model)


def test_the_model_is_as_it_was_after_an_exception_in_its_forward():
    class Breaks(TwoHeads):
        def forward(self, x):
            if self.distilled_training: raise RuntimeError('out of memory')
            return super().forward(x)
    learn = learner(Breaks())
    with pytest.raises(RuntimeError, match='memory'): learn.fit(1, cbs=TokenDistillation(teacher()))
    assert not learn.model.distilled_training
    with pytest.raises(RuntimeError, match='memory'), two_heads(learn.model):
        learn.model.train()(torch.zeros(2, 3, 8, 8))
    assert not learn.model.distilled_training


def test_between_batches_and_outside_of_the_window_it_is_an_ordinary_model():
    flags = []
    class Look(Callback):
        order = 30
        def after_pred(self): flags.append((self.learn.model.distilled_training, isinstance(self.pred, torch.Tensor)))
    learn = learner(TwoHeads())
    learn.fit(2, cbs=[TokenDistillation(teacher(), end_pct=0.5), Look()])
    assert set(flags)=={(False, True)}


def test_lr_find_leaves_student_and_switch():
    import fastai.callback.schedule
    learn = learner(TwoHeads(), cbs=TokenDistillation(teacher()))
    before = state(learn.model)
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    assert same(before, state(learn.model)) and not learn.model.distilled_training


def test_copies_keep_kind_and_arguments():
    kd = TokenDistillation(teacher(), 'soft', T=2, weight=0.3, valid=True)
    for o in (kd.replace(), copy.deepcopy(kd), kd.replace(weight=0.3)):
        assert (o.kind, o.T, o.recipe.weight, o.recipe.valid, repr(o))==('soft', 2, 0.3, True, repr(kd))
    assert kd.replace(kind='hard').terms[0].base is HardTarget


def test_models_without_a_token_are_refused():
    with pytest.raises(ValueError, match='no distillation token.*deit_tiny_distilled'):
        learner().fit(1, cbs=TokenDistillation(teacher()))
    class OneHead(TwoHeads):
        def forward(self, x): return self.head(self.body(x))
    learn = learner(OneHead())
    with pytest.raises(ValueError, match='gives one tensor'): learn.fit(1, cbs=TokenDistillation(teacher()))
    assert not learn.model.distilled_training
    with pytest.raises(ValueError, match="did you mean 'soft'"): TokenDistillation(teacher(), 'sft')
    with pytest.raises(TypeError): TokenDistillation(teacher(), loss=HardTarget)


@pytest.mark.parametrize('name, kwargs', [
    ('deit_tiny_distilled_patch16_224', dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)),
    ('pit_ti_distilled_224', dict(img_size=32))])
def test_timm_s_distilled_models(name, kwargs):
    timm = pytest.importorskip('timm')
    model = timm.create_model(name, num_classes=3, **kwargs)
    size = kwargs['img_size']
    dls = data(n=8, bs=4)
    def resize(x): return F.interpolate(x, size)
    class Sized(Callback):
        def before_batch(self): self.learn.xb = (resize(self.x),)
    learn = learner(model, dls)
    before = state(model)
    learn.fit(1, cbs=[TokenDistillation(teacher(), weight=0.5), Sized()])
    assert not model.distilled_training and not torch.equal(before['head_dist.weight'], model.head_dist.weight)


def test_a_pit_without_the_token_is_refused():
    timm = pytest.importorskip('timm')
    model = timm.create_model('pit_ti_224', num_classes=3, img_size=32)
    with pytest.raises(ValueError, match='gives one tensor'), two_heads(model):
        TokenDistillation(teacher()).parts_of(learner(model), model.train()(torch.zeros(2, 3, 32, 32)))
