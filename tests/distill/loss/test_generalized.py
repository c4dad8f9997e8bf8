"Generalized distillation: the teacher's soft labels at T, the student at 1, no T squared"
import pytest
import torch
import torch.nn.functional as F

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.generalized import GeneralizedDistillation
from fasterai.distill.losses import SoftTarget
from helpers import learner, net

student = [[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381],
           [-0.4987, 2.9242, -4.1203]]
teacher = [[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159],
           [-1.818, 1.1029, 4.5844]]
z,t = (torch.tensor(o, dtype=torch.float64) for o in (student, teacher))
y,T,lam,whole = torch.tensor([0, 2, 1, 1]),2.,0.5,3.162327313985113 # lambda and the loss of the paper's equation 2


def test_the_papers_loss():
    soft = (t/T).softmax(1)
    entropy = -(soft*soft.log()).sum(1).mean()
    found = (1-lam)*F.cross_entropy(z, y) + lam*(GeneralizedDistillation(z, t, T=T)+entropy)
    torch.testing.assert_close(found.item(), whole, atol=1e-12, rtol=0)


def test_the_gradient_is_that_of_the_cross_entropy_and_none_reaches_the_teacher():
    a,b = z.clone().requires_grad_(),t.clone().requires_grad_()
    GeneralizedDistillation(a, b, T=T).backward()
    torch.testing.assert_close(a.grad, (z.softmax(1)-(t/T).softmax(1))/len(z))
    assert b.grad is None


def test_it_is_soft_target_at_1_and_refuses_as_that_does():
    torch.testing.assert_close(GeneralizedDistillation(z, t, T=1), SoftTarget(z, t, T=1))
    with pytest.raises(ValueError, match='T must be positive'): GeneralizedDistillation(z, t, T=0)
    with pytest.raises(ValueError, match='same shape'): GeneralizedDistillation(z, t[:, :2])
    with pytest.raises(TypeError, match="did you mean 'T'"): GeneralizedDistillation(z, t, t=2)


def test_positions_that_do_not_count():
    keep = torch.tensor([True, True, False, True])
    torch.testing.assert_close(GeneralizedDistillation(z, t, mask=keep), GeneralizedDistillation(z[keep], t[keep]))
    torch.testing.assert_close(GeneralizedDistillation(z, t, target=y, ignore_index=1),
                               GeneralizedDistillation(z[:2], t[:2]))


def test_in_a_fit():
    learn = learner()
    kd = KnowledgeDistillationCallback(net(8, seed=1), GeneralizedDistillation, weight=0.5)
    learn.fit(1, cbs=kd)
    assert kd.log.history.distill_loss.min()>0
