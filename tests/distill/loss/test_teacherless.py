"Losses that need no teacher, against numbers of a slow reference in float64"
import pytest
import torch
import torch.nn.functional as F

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.teacherless import ClassMates, VirtualTeacher, partners
from fasterai.distill.losses import SoftTarget
from helpers import learner


logits = torch.tensor([[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381],
                       [-0.4987, 2.9242, -4.1203]], dtype=torch.float64)
mates = torch.tensor([[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159],
                      [-1.818, 1.1029, 4.5844]], dtype=torch.float64)
target = torch.tensor([0, 2, 1, 1])
task = F.cross_entropy(logits, target)


def test_class_mates_has_the_reference_s_value():
    kd = 6.148172422678121
    back = SoftTarget(mates, logits, T=4)   # the partner learns too, here
    in_pairs = torch.arange(4).repeat(2)    # row i's partner is row 4+i
    torch.testing.assert_close(2*ClassMates(torch.cat([logits, mates]), in_pairs, T=4)-back, torch.tensor(kd).double())
    torch.testing.assert_close(task+kd, torch.tensor(9.020204750954534).double())


@pytest.mark.parametrize('hypers, kd, total', [
    ({}, 5.732888532745023, 3.1581179487232736),
    (dict(as_run=True), 0.6808614300810799, 2.6529152384568793)], ids=['formula', 'as_run'])
def test_the_virtual_teacher_has_the_reference_s_value(hypers, kd, total):
    found = VirtualTeacher(logits, target, T=20, p=0.99, **hypers)
    torch.testing.assert_close(found, torch.tensor(kd).double())
    torch.testing.assert_close(0.9*task+0.1*found, torch.tensor(total).double())


def test_partners_against_a_loop():
    y = torch.randint(6, (50,), generator=torch.Generator().manual_seed(0))
    for i,j in enumerate(partners(y).tolist()):
        same = [k for k in range(50) if y[k]==y[i]]
        assert j==same[(same.index(i)+1)%len(same)]


def test_rows_that_do_not_count_teach_nobody():
    y = torch.tensor([1, -100, 1, 1, 0])
    z = torch.randn(5, 3, requires_grad=True)
    ClassMates(z, y, ignore_index=-100, mask=torch.tensor([1, 1, 0, 1, 1])).backward()
    assert z.grad.abs().sum(1).ne(0).tolist()==[True, False, False, True, False]
    only = ClassMates(z[[0, 3]], y[[0, 3]])
    torch.testing.assert_close(ClassMates(z, y, ignore_index=-100, mask=torch.tensor([1, 1, 0, 1, 1])), only)
    dense = torch.randn(2, 3, 4)
    labels = torch.tensor([[0, 1, -100, 2], [2, -100, 1, 0]])
    keep = labels!=-100
    flat = VirtualTeacher(dense.movedim(1, -1)[keep], labels[keep])
    torch.testing.assert_close(VirtualTeacher(dense, labels, ignore_index=-100), flat)


def test_no_teacher_is_needed():
    learn = learner()
    kd = KnowledgeDistillationCallback(None, {ClassMates: 1, VirtualTeacher: 0.1}, task_weight=1.)
    learn.fit(1, cbs=kd)
    assert kd.log.history.notna().all().all()


def test_half_precision():
    for f in ClassMates, VirtualTeacher:
        torch.testing.assert_close(f(logits.half(), target), f(logits, target).float(), rtol=1e-3, atol=1e-3)
