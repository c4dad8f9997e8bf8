"A generator in the loop: what it is judged by, who gets gradients, and what is left when it is over"
import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import SuggestionMethod
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastcore.basics import noop
from torch import nn

from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.data_free import WAYS, DataFreeDistillation, PictureLoss, data_free_learner
from fasterai.distill.methods.dream import Still
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from helpers import Boom, data, flags, learner, n_hooks, net, same, state


size = 3,8,8
teacher = partial(net, width=8, seed=1)

def free_learner(t, s=None, method='fast', **kwargs):
    learn = data_free_learner(t, s or net(), size, method, **{**dict(bs=8, n_batches=6, nz=4), **kwargs})
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


@pytest.mark.parametrize('method', WAYS)
def test_student_learns_and_teacher_is_as_it_was(method):
    t = teacher().train()
    before = state(t),flags(t)
    learn = free_learner(t, method=method)
    first = state(learn.model),copy.deepcopy(learn.imagine.generator.state_dict())
    learn.fit(1, 1e-2)
    assert same(before[0], state(t)) and flags(t)==before[1]
    assert not n_hooks(t, learn.model, learn.imagine.judge.still.net)
    assert not same(first[0], state(learn.model))
    assert not same(first[1], learn.imagine.generator.state_dict())
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters())) # the generator is not among them


def test_the_loss_is_the_sum_of_its_terms():
    t,s = teacher().eval(),net().eval()
    x,y = torch.randn(8, *size),torch.arange(8)%3
    zt,zs = t(x),s(x)
    kl = F.kl_div(zs.log_softmax(1), zt.softmax(1), reduction='none').sum(1)
    zskt = PictureLoss(Still(t), WAYS['zskt'])(x, None, s, 1.)
    assert torch.allclose(zskt, -kl.mean(), atol=1e-6)
    h = t[:-1](x)
    p = zt.softmax(1).mean(0)
    dafl = PictureLoss(Still(t), WAYS['dafl'])(x, None, s, 0.)
    by_hand = F.cross_entropy(zt, zt.argmax(1)) + 20*(p*p.log()).sum() - 0.001*h.abs().mean()
    assert torch.allclose(dafl, by_hand, atol=1e-5)
    a = t[0][0](x)
    b = t[1][0](t[0](x))
    bn = sum((h.mean([0, 2, 3])-m.running_mean).norm() + (h.var([0, 2, 3], correction=0)-m.running_var).norm()
             for h,m in ((a, t[0][1]), (b, t[1][1])))
    agreed = zt.argmax(1)==zs.argmax(1)
    fast = PictureLoss(Still(t), WAYS['fast'])(x, y, s, 1.1)
    assert torch.allclose(fast, 0.4*F.cross_entropy(zt, y) + 10*bn - 1.1*(kl*agreed).mean(), atol=1e-4)


def test_no_gradient_and_no_statistics_from_the_generators_steps():
    "Between two batches the student is untouched by what the generator learns from it"
    learn = free_learner(teacher(), method='dfq')
    seen = []
    def spy(f, *args):
        before = state(learn.model),flags(learn.model),[p.grad for p in learn.model.parameters()]
        f(*args)
        grads = [p.grad for p in learn.model.parameters()]
        assert same(before[0], state(learn.model)) and before[1]==flags(learn.model)
        seen.append(all(a is b for a,b in zip(before[2], grads)))
    learn.imagine._learn_to_imagine = partial(spy, learn.imagine._learn_to_imagine)
    learn.fit(1, 1e-2)
    assert seen==[True]*6


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('out of memory')], ids=repr)
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_step'])
def test_nothing_is_left_behind(event, exc):
    t = teacher().train()
    before = state(t),flags(t)
    learn = free_learner(t)
    with pytest.raises(type(exc)): learn.fit(1, cbs=Boom(event, exc, at=2))
    assert same(before[0], state(t)) and flags(t)==before[1] and not n_hooks(t, learn.model)
    assert all(p.grad is None for p in t.parameters())
    learn.fit(1) # and it goes on


def test_a_search_for_the_rate_leaves_the_generator():
    learn = free_learner(teacher())
    learn.fit(1)
    was = copy.deepcopy(learn.imagine.generator.state_dict())
    pool = len(learn.imagine.pool)
    learn.lr_find(num_it=24, show_plot=False, suggest_funcs=(SuggestionMethod.Steep,))
    assert same(was, learn.imagine.generator.state_dict()) and len(learn.imagine.pool)==pool


def test_pool_is_bounded_and_adv_waits():
    learn = free_learner(teacher(), way=dict(pool=2, every=1, warm=1., adv=5.))
    asked = []
    judge = learn.imagine.judge
    learn.imagine.judge = lambda x, y, student, adv: asked.append(adv) or judge(x, y, student, adv)
    learn.imagine.judge.way,learn.imagine.judge.still = judge.way,judge.still
    learn.fit(1)
    assert len(learn.imagine.pool)==2 and set(asked)=={0.}


def test_validation_is_of_real_images_or_none():
    valid = data(16).valid
    learn = free_learner(teacher(), valid=valid, metrics=accuracy)
    learn.fit(1, 1e-2)
    assert learn.validate()[1]==pytest.approx(accuracy(*learn.get_preds(dl=valid)).item())
    free_learner(teacher(), metrics=accuracy).fit(1)


def test_student_and_teacher_see_what_they_have_learned_to_see():
    class OneChannel(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
        def forward(self, x):
            assert x.shape[1]==1
            return self.net(x.expand(-1, 3, -1, -1))
    t = Teacher(OneChannel(), tfms=lambda x: x[:, :1])
    learn = free_learner(t, OneChannel(), method='dfq', n_batches=2, cbs=StudentSees(lambda x: x[:, 1:2]))
    learn.fit(1)
    x,_ = learn.imagine.next_batch(4)
    kd = learn.knowledge_distillation_callback if hasattr(learn, 'knowledge_distillation_callback') else learn.cbs[-1]
    torch.testing.assert_close(kd.teacher(x)[0], learn.imagine.judge.still(x))


def test_exported_without_the_teacher(tmp_path):
    learn = free_learner(teacher())
    learn.fit(1)
    learn.path = tmp_path
    learn.export('student.pkl')
    found = torch.load(tmp_path/'student.pkl', weights_only=False)
    assert 'judge' not in vars(found.imagine)


def test_what_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match="no BatchNorm"): free_learner(flat)
    free_learner(flat, method='dafl').fit(1)
    with pytest.raises(ValueError, match='unknown method'): free_learner(teacher(), method='zkst')
    with pytest.raises(ValueError, match="unknown way 'step'; did you mean 'steps'"):
        free_learner(teacher(), way=dict(step=3))
    for wrong in dict(bs=0), dict(n_batches=2.), dict(nz=0):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number from 1 on"):
            free_learner(teacher(), **wrong)
    with pytest.raises(TypeError, match='student: expected a network, got Learner'):
        free_learner(teacher(), learner())
    with pytest.raises(ValueError, match='same shape, got .8, 4. and .8, 3.'):
        free_learner(teacher(), net(c=4), method='dfq').fit(1)
    no_head = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match='the last nn.Linear'): free_learner(no_head, method='dafl')


def test_the_surveys_class_moves_its_pixels_towards_certain_answers():
    t = teacher().train()
    with torch.no_grad(): t[-1].weight.mul_(30) # so that its answers differ
    before = state(t),flags(t)
    torch.manual_seed(0)
    made = DataFreeDistillation(t, [3, 8, 8], 3)
    x,z = made.generate_samples(batch_size=12, num_iterations=40, lr=0.1)
    assert x.shape==(12, *size) and z.shape==(12, 3) and -1<=x.min() and x.max()<=1
    assert same(before[0], state(t)) and flags(t)==before[1]
    assert F.cross_entropy(z, torch.arange(12)%3)<F.cross_entropy(t.eval()(torch.randn(12, *size)), torch.arange(12)%3)
    assert not x.requires_grad and SoftTarget(net()(x), z).isfinite()
    with pytest.raises(ValueError, match='num_classes is 5'): DataFreeDistillation(t, [3, 8, 8], 5)


def test_what_was_exported_predicts_and_trains_no_more(tmp_path):
    learn = free_learner(teacher(), method='dfq', n_batches=2)
    learn.fit(1)
    learn.path = tmp_path
    learn.export('m.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning) # it is our own pickle
        loaded = load_learner(tmp_path/'m.pkl')
    dl = data().valid
    assert torch.equal(loaded.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])
    with pytest.raises(ValueError, match='without its teacher'): loaded.fit(1)


class Survey(nn.Module):
    "As the survey's teacher: convolutions, dropout and no BatchNorm"
    def __init__(self):
        super().__init__()
        self.conv,self.fc,self.drop = nn.Conv2d(3, 8, 3, padding=1),nn.Linear(8*4*4, 3),nn.Dropout(0.5)
    def forward(self, x): return self.fc(self.drop(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)))


def test_the_surveys_class_does_without_batchnorm_and_says_so():
    torch.manual_seed(0)
    t = Survey().train()
    with torch.no_grad(): t.fc.weight.mul_(10) # so that its answers differ
    before = state(t),flags(t)
    with pytest.warns(UserWarning, match='the Survey has no BatchNorm.*by the classes alone') as told:
        made = DataFreeDistillation(t, [3, 8, 8], 3)
    assert told[0].filename==__file__ and made.bn==0
    x,z = made.generate_samples(batch_size=12, num_iterations=60, lr=0.1)
    assert -1<=x.min() and x.max()<=1 and x.std()>0.1
    torch.testing.assert_close(z, t.eval()(x).detach())
    assert z.argmax(1).tolist()==[i%3 for i in range(12)] and F.cross_entropy(z, torch.arange(12)%3)<0.1
    assert same(before[0], state(t)) and flags(t.train())==before[1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        DataFreeDistillation(t, [3, 8, 8], 3, bn=0) # it was said
        assert DataFreeDistillation(teacher(), size, 3).bn==10
    with pytest.raises(ValueError, match='no BatchNorm.*and bn=0 here'): DataFreeDistillation(t, [3, 8, 8], 3, bn=5)
    with pytest.raises(ValueError, match=r'no BatchNorm.*and way=dict\(bn=0\) here'): free_learner(t)
    free_learner(t, method='dfq', way=dict(bn=0)).fit(1)
