"The logits of an ensemble are the logarithm of the averaged probabilities; what is averaged, the task says"
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from fastai.losses import BaseLoss, BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat

from fasterai.distill.teacher.teacher import Teacher, ensemble_logits
from teacher_nets import assert_same_state, count_calls, make_net, net, plain, plain_maps, seed, state, x


def test_ensemble_is_the_log_of_the_average_of_probabilities(x):
    nets,w = [make_net() for _ in range(3)],[1., 2., 5.]
    pred,fm = Teacher(nets, weights=w)(x, layers=['3'])
    probs = [plain(n, x).double().softmax(1) for n in nets]
    for i in range(len(x)):
        for c in range(5):
            mean = sum(wk*p[i,c] for wk,p in zip(w, probs))/sum(w)
            assert pred[i,c].item()==pytest.approx(torch.log(mean).item(), abs=1e-5)
    assert torch.equal(fm['3'], plain_maps(nets[0], x, ['3'])['3'])

def test_ensemble_stays_finite_where_probabilities_vanish():
    z = torch.tensor([[0., 500., 0.]])
    avg = ensemble_logits([z, z])
    assert torch.allclose(avg, z-500) and avg.isfinite().all()

def test_ensemble_over_pixels_and_of_one_column():
    a,b = torch.randn(2, 3, 4, 4),torch.randn(2, 3, 4, 4)
    assert torch.allclose(ensemble_logits([a, b]).exp(), (a.softmax(1)+b.softmax(1))/2)
    assert torch.allclose(ensemble_logits([a, b], axis=-1).exp(), (a.softmax(-1)+b.softmax(-1))/2)
    assert torch.equal(ensemble_logits([torch.tensor([[1.], [2.]]), torch.tensor([[3.], [6.]])]),
                       torch.tensor([[2.], [4.]]))
    assert torch.equal(ensemble_logits([torch.tensor([1., 2.]), torch.tensor([3., 6.])], [3, 1]),
                       torch.tensor([1.5, 3.]))

def test_only_the_first_of_an_ensemble_runs_for_maps(net, x):
    ran,off = count_calls(other := make_net())
    Teacher([net, other])(x, layers=['3'], logits=False)
    assert ran==[]

def test_an_ensemble_that_disagrees_is_refused_and_leaves_nothing(net, x):
    other,before = make_net(7),state(net)
    with pytest.raises(ValueError, match=r'agree in output shape, got \(16, 5\) and \(16, 7\)'):
        Teacher([net, other])(x)
    assert_same_state(state(net), before)

# In a fit

def learner(loss_func): return SimpleNamespace(model=nn.Linear(2, 2), loss_func=loss_func)

def softmax(zs, axis): return (sum(z.softmax(axis) for z in zs)/len(zs)).log()
def sigmoid(zs): return (sum(z.sigmoid() for z in zs)/len(zs)).logit()
def plain_mean(zs): return sum(zs)/len(zs)

tasks = [(CrossEntropyLossFlat(), lambda z: softmax(z, 1)), (nn.CrossEntropyLoss(), lambda z: softmax(z, 1)),
         (BCEWithLogitsLossFlat(), sigmoid),
         (MSELossFlat(), plain_mean), (nn.L1Loss(), plain_mean), (nn.PoissonNLLLoss(), plain_mean),
         (BCELossFlat(), plain_mean), (nn.BCELoss(), plain_mean)] # of probabilities

@pytest.mark.parametrize('loss_func,combined', tasks)
def test_the_task_says_what_is_averaged(x, loss_func, combined):
    nets = [make_net() for _ in range(3)]
    teacher = Teacher(nets)
    teacher.begin(learner(loss_func))
    assert torch.allclose(teacher(x)[0], combined([plain(n, x) for n in nets]), atol=1e-5)

def test_the_task_says_where_the_classes_are():
    class Tokens(nn.Module):
        def __init__(self): super().__init__(); self.emb = nn.Embedding(7, 4)
        def forward(self, ids): return self.emb(ids)
    nets,ids = [Tokens(), Tokens()],torch.randint(0, 7, (3, 5))
    zs = [n(ids).detach() for n in nets]
    teacher = Teacher(nets)
    # outside of a fit: the classes are on axis 1
    assert torch.allclose(teacher(ids)[0], softmax(zs, 1), atol=1e-5)
    teacher.begin(learner(CrossEntropyLossFlat()))                             # whose axis is -1
    assert torch.allclose(teacher(ids)[0], softmax(zs, -1), atol=1e-5)
    teacher.begin(learner(CrossEntropyLossFlat(axis=1)))                       # each fit asks its own task
    assert torch.allclose(teacher(ids)[0], softmax(zs, 1), atol=1e-5)

def test_what_the_user_says_goes_before_the_task(x):
    nets = [make_net(), make_net()]
    teacher = Teacher(nets, average='sigmoid', axis=1)
    for loss_func in (CrossEntropyLossFlat(), lambda pred, y: pred.mean()):
        teacher.begin(learner(loss_func))
        assert (teacher.average, teacher.axis)==('sigmoid', 1)
        assert torch.allclose(teacher(x)[0], sigmoid([plain(n, x) for n in nets]), atol=1e-4)

def test_a_task_that_does_not_say_is_asked_back_only_where_it_matters(x):
    def own_loss(pred, y): return pred.mean()
    for f in (own_loss, BaseLoss(nn.SoftMarginLoss, is_2d=False)): # the latter has an axis, and no class there
        with pytest.raises(ValueError,
                           match=r"average: the task's loss function does not say.*2 teachers are.*average='softmax'"):
            Teacher([make_net(), make_net()]).begin(learner(f))
    Teacher(make_net()).begin(learner(own_loss))
    Teacher([make_net(), make_net()]).begin(learner(own_loss), layers=['3'], logits=False)
    pred = Teacher([make_net(), make_net()])(x)[0]                             # outside of a fit: probabilities
    assert torch.allclose(pred.exp().sum(1), torch.ones(len(x)), atol=1e-5)
