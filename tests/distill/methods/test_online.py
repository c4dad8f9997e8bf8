"OnlineDistillation: an average by hand, with the loss of the textbook"
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.distill.methods.online import OnlineDistillation
from helpers import net, state


class Needs(nn.Module):
    "A network that is not made without arguments"
    def __init__(self, i, o, /): super().__init__(); self.bn,self.lin = nn.BatchNorm1d(i),nn.Linear(i, o)
    def forward(self, x): return self.lin(self.bn(x))


def test_signatures_are_the_promised_ones():
    def params(f): return {k:v.default for k,v in inspect.signature(f).parameters.items() if k!='self'}
    assert params(OnlineDistillation)==dict(momentum=0.999, temperature=4.0)
    assert [*params(OnlineDistillation.forward)]==['student_logits', 'teacher_logits', 'labels']
    assert len(params(OnlineDistillation.update_teacher))==1 and isinstance(OnlineDistillation(), nn.Module)


def test_the_average_is_the_golden_one():
    student,online,got = nn.Linear(1, 1, bias=False).double(),OnlineDistillation(momentum=0.9),[]
    for v in (1., 0.5, -0.25, 2., 1.5):
        student.weight.data.fill_(v)
        online.update_teacher(student)
        got.append(online.teacher_model.weight.item())
    assert got==pytest.approx([1., 0.75, 0.4166666666666667, 0.8125, 0.95], abs=1e-12)


def test_statistics_are_the_students_and_momentum_999_is_not_dead():
    torch.manual_seed(0)
    student,online = Needs(4, 3),OnlineDistillation()
    online.update_teacher(student)
    first = state(online.teacher_model)
    for _ in range(20):
        student(torch.randn(8, 4)+2)
        with torch.no_grad(): student.lin.weight.add_(0.1)
        online.update_teacher(student)
    assert torch.equal(online.teacher_model.bn.running_mean, student.bn.running_mean)
    moved = (online.teacher_model.lin.weight-first['lin.weight']).mean()
    assert moved.item()==pytest.approx(1., abs=1e-3) # of the student's 2: the plain mean
    assert not online.train().teacher_model.training and online.teacher_model is not student


@pytest.mark.parametrize('T', [1., 4.])
def test_the_loss_and_its_parts(T):
    torch.manual_seed(0)
    zs,zt = torch.randn(2, 6, 5, dtype=torch.float64)
    zs.requires_grad_(), zt.requires_grad_()
    y = torch.randint(5, (6,))
    total,said = OnlineDistillation(temperature=T)(zs, zt, y)
    kd = F.kl_div(F.log_softmax(zs/T, 1), F.softmax(zt/T, 1), reduction='batchmean')*T**2
    want = dict(ce=F.cross_entropy(zs, y).item(), kd=kd.item(), total=(F.cross_entropy(zs, y)+kd).item())
    assert said==pytest.approx(want, rel=1e-5) and [*said]==['ce', 'kd', 'total']
    assert all(type(v) is float for v in said.values()) and total.item()==said['total']
    total.backward()
    assert zt.grad is None and zs.grad.abs().sum()>0


def test_half_precision_and_what_cannot_be():
    online,student = OnlineDistillation(),net()
    online.update_teacher(student)
    x,y = torch.randn(4, 3, 8, 8),torch.tensor([0, 1, 2, 0])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        total,said = online(student(x), online.teacher_model(x), y)
    assert total.dtype==torch.float32 and not any(p.requires_grad for p in online.parameters())
    with pytest.raises(ValueError, match='momentum'): OnlineDistillation(momentum=2)
    with pytest.raises(ValueError, match='temperature'): OnlineDistillation(temperature=-1)
