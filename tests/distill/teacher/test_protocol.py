"What a teacher is: anything with `answer`; and which weights it may share with the student"
from copy import deepcopy

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from fasterai.distill.teacher.protocol import AdaptedTeacher, BaseTeacher, shared_with
from fasterai.distill.teacher.teacher import Teacher, as_teacher
from teacher_nets import make_net, net, plain, seed, x


class Says:
    "Answers with `out`, and notes what it is told"
    def __init__(self, out): self.out,self.told = out,[]
    def answer(self, *xb): return self.out

logits = torch.tensor([[1., 2.]], dtype=torch.float64, requires_grad=True)

@pytest.mark.parametrize('out', [logits, (logits, {}), (logits, 'hidden state'), [logits]])
def test_forms_of_an_answer(out):
    pred,maps = as_teacher(Says(out))(torch.ones(1, 3))
    assert pred.dtype==torch.float32 and not pred.requires_grad and pred.tolist()==[[1., 2.]] and maps=={}

def test_keywords_are_passed_by_signature(x):
    class Layers:
        def answer(self, *xb, layers): self.asked = layers; return xb[0], {n:xb[0]*i for i,n in enumerate('cba')}
    class Logits:
        def answer(self, x, logits=True): self.asked = logits; return x if logits else None
    class All:
        def answer(self, *xb, **kwargs): self.asked = kwargs; return xb[0], {'a': xb[0]}
    a,b,c = map(as_teacher, (Layers(), Logits(), All()))
    pred,maps = a(x, layers=['a', 'c'])
    assert list(maps)==['a', 'c'] and maps['a'].equal(2*x) and a.source.asked==('a', 'c')
    assert b(x, logits=False)==(None, {}) and b.source.asked is False
    assert c(x, layers='a', logits=False)[0] is None and c.source.asked==dict(layers=('a',), logits=False)

def test_maps_that_it_does_not_give_are_missed_by_name(x):
    with pytest.raises(ValueError,
                       match=r"teacher's layers 3, and the answer of Says has no such feature maps; it gives none"):
        as_teacher(Says(x))(x, layers=['3'])
    with pytest.raises(ValueError, match=r"it gives \['1'\]"): as_teacher(Says((x, {'1': x})))(x, layers=['1', '3'])

def test_an_answer_without_logits_is_refused():
    with pytest.raises(TypeError, match="the teacher must return a tensor of logits.*got a dict with keys"):
        as_teacher(Says({'a': 1}))(torch.ones(1))

def test_the_fit_is_told_to_those_who_listen():
    told = []
    class Listens(Says):
        def begin(self, learn): told.append(('begin', learn))
        def after_step(self): told.append('step')
        def end(self): told.append('end')
    for teacher in map(as_teacher, (Listens(logits), Says(logits))):
        teacher.begin('learn', layers=['a'], logits=False), teacher.after_step('learn'), teacher.end(), teacher.end()
    assert told==[('begin', 'learn'), 'step', 'end', 'end']

def test_it_answers_under_no_grad(x):
    class Nets:
        def __init__(self): self.models,self.axis = [make_net()],-1
        def answer(self, x): self.grad = torch.is_grad_enabled(); return self.models[0](x)
    teacher = as_teacher(Nets())
    assert not teacher(x)[0].requires_grad and teacher.source.grad is False
    assert (teacher.models, teacher.axis, teacher.average)==(teacher.source.models, -1, None)

def test_what_becomes_what(net):
    class Own(BaseTeacher):
        def answer(self, *xb, layers=(), logits=True): return xb[0], {}
    class WithModel:
        "Has a `model`, as a Learner has, but speaks for itself"
        model = net
        def answer(self, x): return 2*x
    class Answers(nn.Linear):
        def answer(self, question): raise AssertionError("a method of the network, not a teacher's")
    own,learn = Own(),Learner(DataLoaders([], []), net, loss_func=nn.MSELoss())
    assert as_teacher(own) is own and as_teacher(own)(1)==(1, {})
    assert isinstance(as_teacher(WithModel()), AdaptedTeacher)
    for o in (net, learn, [net, learn], nn.ModuleList([net]), Answers(2, 2)): assert isinstance(as_teacher(o), Teacher)
    with pytest.raises(TypeError, match='call it to make one'): as_teacher(Says)
    with pytest.raises(TypeError, match="got 'resnet18'"): as_teacher('resnet18')
    with pytest.raises(NotImplementedError, match='BaseTeacher is a teacher without `answer`'): BaseTeacher().answer()


# Shared weights

def test_parameters_in_one_memory():
    student,teacher = make_net(),make_net()
    assert shared_with(student, [teacher])==[]
    teacher.load_state_dict(student.state_dict(), assign=True)
    names = shared_with(student, [teacher])
    assert set(names)>={'0.weight', '3.conv1.weight', '1.running_mean', '8.bias', '3.bn1.num_batches_tracked'}
    assert shared_with(student, [make_net(), teacher])==[f'1.{n}' for n in names]
    assert '4.bn1.running_mean' not in names and '4.bn1.weight' in names          # this part is in eval mode
    student.requires_grad_(False).eval()
    assert shared_with(student, [teacher])==[]

def test_a_view_of_the_same_memory_counts():
    student,teacher = nn.Linear(4, 3),nn.Linear(4, 3)
    teacher.weight.data = student.weight.data.view(3, 4)[:]
    assert shared_with(student, [teacher])==['weight']
    tied = nn.Sequential(teacher, teacher)
    assert shared_with(student, [tied])==['0.weight', '1.weight']

def test_a_frozen_head_or_base_may_be_shared():
    teacher = make_net().eval().requires_grad_(False)
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), teacher[8])
    assert shared_with(student.train(), [teacher])==[]
    lora = nn.Sequential(teacher, nn.Linear(5, 5))
    assert shared_with(lora.eval(), [teacher])==[]
    names = set(n.rpartition('.')[2] for n in shared_with(lora.train(), [teacher]))
    assert names=={'running_mean', 'running_var', 'num_batches_tracked'}

def test_constants_among_the_buffers_may_be_shared():
    class Embeds(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer('positions', torch.arange(4))
            self.register_buffer('angles', torch.rand(4), persistent=False)
            self.register_buffer('average', torch.zeros(4))
    base = Embeds().requires_grad_(False)
    assert shared_with(nn.Sequential(base, nn.Linear(4, 2)).train(), [base])==['average']
