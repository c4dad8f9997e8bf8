"Losses on the answers of several networks: their numbers, their gradients, and what they refuse"
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fasterai.distill.loss.several import ConfidentTeachers, DeepMutualLearning, several
from fasterai.distill.loss.terms import Term
from fasterai.distill.losses import DecoupledKD, FitNet, Logits, SoftTarget
from fasterai.distill.loss.catalogue import available_losses, loss_by_name

f64 = partial(torch.tensor, dtype=torch.float64)
logits = f64([
    [[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381], [-0.4987, 2.9242, -4.1203]],
    [[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159], [-1.818, 1.1029, 4.5844]],
    [[3.5773, 0.873, 0.193], [-3.727, -0.5548, -0.7095], [-0.1655, -1.254, -0.0876], [-0.9544, -2.6277, 1.7692]]])
student = f64([[-1.3599, -1.2354, 0.0599], [-1.6546, 0.0237, -0.0341], [-1.1939, -2.1019, 0.3684],
               [1.4954, 0.2827, -1.5993]])
y = torch.tensor([0, 2, 1, 1])

def close(a, b, tol=1e-9): assert torch.allclose(torch.as_tensor(a).double(), f64(b), rtol=tol, atol=tol), (a, b)
def others(i): return torch.stack([z for j,z in enumerate(logits) if j!=i])


# Against numbers that were computed elsewhere

golden = {(2, 1.): [6.113121426031059, 6.07661495238076],
          (3, 1.): [5.7138692131527, 5.565265087213226, 3.2342148285200376],
          (2, 3.): [8.702976812951903, 8.78925839008231],
          (3, 3.): [7.717679496038907, 7.511818478188587, 4.94344277297623]}

@pytest.mark.parametrize('K,T', golden, ids=str)
def test_deep_mutual_learning(K, T):
    total,losses = DeepMutualLearning(K, T)(list(logits[:K]), y)
    close(torch.stack(losses), golden[K, T])
    close(total, sum(golden[K, T]))

def test_the_authors_sum_over_the_others_is_a_weight_of_2_for_three():
    mutual = several(SoftTarget)
    losses = [F.cross_entropy(z, y) + 2*mutual(z, others(i), T=1) for i,z in enumerate(logits)]
    close(torch.stack(losses), [8.555706098028987, 7.835214089223611, 4.634640196649968])

kdcl = dict(mean=[1.6472635825397401, 1.579239068519078, 0.8541517915637952],
            min=[1.7791894163552482, 3.8155394850042867, 1.974145514630511])

@pytest.mark.parametrize('how', kdcl)
def test_one_target_for_all(how):
    loss = several(partial(SoftTarget, T=2), how)
    close(torch.stack([loss(pred=z, teacher_pred=others(i), target=y) for i,z in enumerate(logits)]), kdcl[how])

def test_confident_teachers(): close(ConfidentTeachers(student, logits, y, T=4), 2.8645237553848206)


# Gradients

def test_no_gradient_reaches_those_who_teach():
    zs = [z.clone().requires_grad_() for z in logits]
    total,losses = DeepMutualLearning(3, 3.)(zs, y)
    for z,g,loss in zip(zs, torch.autograd.grad(total, zs, retain_graph=True), losses):
        assert torch.equal(g, torch.autograd.grad(loss, z, retain_graph=True)[0])

@pytest.mark.parametrize('loss', [ConfidentTeachers, *(several(SoftTarget, o) for o in ('each', 'mean', 'min'))])
def test_of_a_stack_none_is_taught(loss):
    s,t = student.clone().requires_grad_(),logits.clone().requires_grad_()
    loss(pred=s, teacher_pred=t, target=y).backward()
    assert t.grad is None and s.grad.norm()>0

def test_the_student_s_own_share_of_the_target_has_no_gradient():
    s = student.clone().requires_grad_()
    several(SoftTarget, 'mean')(s, logits).backward()
    r = student.clone().requires_grad_()
    SoftTarget(r, (student+logits.sum(0))/4).backward()
    close(s.grad, r.grad.tolist())


# Shapes

def test_classes_on_the_last_axis_labels_to_ignore_and_a_mask():
    s,t = torch.randn(2, 5, 3),torch.randn(4, 2, 5, 3)
    target = torch.randint(3, (2, 5))
    for loss in (ConfidentTeachers, *(several(SoftTarget, o) for o in ('each', 'mean', 'min'))):
        def at(s, t, y, **kw): return loss(pred=s, teacher_pred=t, target=y, **kw)
        whole = at(s, t, target, axis=-1)
        close(at(s.mT, t.mT, target, axis=1), whole.item(), 1e-5)
        some = target.clone()
        some[:, 3:] = -100
        part = at(s[:, :3], t[:, :, :3], target[:, :3], axis=-1).item()
        close(at(s, t, some, axis=-1, ignore_index=-100), part, 1e-5)
        close(at(s, t, target, axis=-1, mask=some!=-100), part, 1e-5)

def test_shares_of_the_classes_in_place_of_labels():
    soft = F.one_hot(y, 3).double()
    for loss in (ConfidentTeachers, several(SoftTarget, 'min')):
        close(loss(student, logits, target=soft), loss(student, logits, target=y).item())
        mixed = loss(student, logits, target=soft.lerp(soft.roll(1, 0), .3))
        assert mixed.isfinite() and mixed!=loss(student, logits, target=y)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        s,t = student.to(dtype),logits.to(dtype)
        got = ConfidentTeachers(s, t, y),several(SoftTarget)(s, t)
    assert all(o.dtype==torch.float32 for o in got)

def test_terms_read_their_needs_and_hyper_parameters():
    each,least = Term(several(partial(SoftTarget, T=3))),Term(several(partial(Logits), 'min'))
    assert each.name=='SoftTarget' and each.hypers['T']==3 and repr(each)=='SoftTarget(T=3)'
    assert each.required=={'pred', 'teacher_pred'} and least.required=={'pred', 'teacher_pred', 'target'}
    assert 'axis' in each.from_task and 'axis' in least.from_task
    assert 'axis' not in Term(several(partial(SoftTarget, axis=-1))).from_task
    with pytest.raises(TypeError, match="did you mean 'T'"): Term(several(partial(SoftTarget, t=3)))

def test_a_function_of_one_s_own():
    def own(pred, teacher_pred, scale=2.): return scale*(pred-teacher_pred).abs().mean()
    for how in ('each', 'mean', 'min'):
        assert Term(several(own, how))(dict(pred=student, teacher_pred=logits, target=y), axis=1).ndim==0


# What is refused

@pytest.mark.parametrize('name', available_losses('prediction'))
def test_a_loss_of_one_teacher_says_what_takes_a_stack(name):
    with pytest.raises(ValueError, match=r'3 teachers, one behind the other.*several\(loss\)'):
        Term(loss_by_name(name))(dict(pred=student, teacher_pred=logits, target=y))

def test_a_loss_of_several_says_who_gives_a_stack():
    for loss in (ConfidentTeachers, several(SoftTarget)):
        with pytest.raises(ValueError, match="average='stack'"): loss(pred=student, teacher_pred=student, target=y)

def test_other_refusals():
    with pytest.raises(TypeError, match='compares pred and teacher_pred'): several(FitNet)
    with pytest.raises(ValueError, match='2 or more'): DeepMutualLearning(1)
    with pytest.raises(ValueError, match='T must be positive'): DeepMutualLearning(2, 0.)
    with pytest.raises(ValueError, match='need the logits of 2 students, got 3'): DeepMutualLearning()(list(logits), y)
    with pytest.raises(TypeError, match='class indices'): several(SoftTarget, 'min')(student, logits)
    assert several(DecoupledKD)(student, logits, y).isfinite()
