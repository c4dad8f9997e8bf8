"What a teacher is: anything with `answer`; and which weights it may share with the student"
from copy import deepcopy

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.study.one_run import fresh_callback
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


# An object of one's own that learns

class Learns:
    "Twice the inputs by a factor that learns, and a note of what it was asked for"
    always,anywhere,average = True,False,'none'
    def __init__(self): self.learns,self.told = nn.Linear(2, 2, bias=False),[]
    def answer(self, x):
        with torch.enable_grad(): self.said = self.learns(x)
        return self.said
    def own_loss(self): self.told.append('own_loss'); return self.said.square().mean()
    def reset(self): self.told.append('reset')
    def another(self): return Learns()

def test_all_that_an_object_has_of_the_protocol_is_used():
    own,plain_one = as_teacher(Learns()),as_teacher(Says(logits))
    assert (own.learns, own.always, own.anywhere, own.average)==(own.source.learns, True, False, 'none')
    assert not own(torch.ones(3, 2))[0].requires_grad
    assert own.own_loss('learn').requires_grad and own.reset() is None and own.source.told==['own_loss', 'reset']
    other = own.another()
    assert type(other) is AdaptedTeacher and other.source is not own.source
    assert (plain_one.learns, plain_one.always, plain_one.anywhere, plain_one.ahead)==(None, False, True, None)
    assert plain_one.own_loss('learn') is None and plain_one.reset() is None and plain_one.another() is plain_one

def test_an_object_learns_in_a_fit():
    torch.manual_seed(0)
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long)) for _ in range(3)]
    mine = Learns()
    kd = KnowledgeDistillationCallback(mine, weight=0.5)
    learn = Learner(DataLoaders(batches, batches), nn.Linear(2, 2), nn.CrossEntropyLoss(), opt_func=SGD, cbs=kd)
    before = mine.learns.weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=0.1)
    assert mine.told.count('own_loss')==3
    w = before.clone().requires_grad_()
    for xb,_ in batches: # SGD on its own loss alone: the student's does not reach it
        g, = torch.autograd.grad((xb@w.T).square().mean(), w)
        w = (w-0.1*g).detach().requires_grad_()
    assert torch.allclose(mine.learns.weight, w, atol=1e-6) and not torch.allclose(w, before, atol=1e-3)
    assert kd.replace().teacher.source is not mine and fresh_callback(dict(teacher=mine)).teacher.source is not mine
