"Copies notice that their source has changed, however it changed, and an unchanged one costs next to nothing"
from copy import deepcopy

import pytest
import torch
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.teacher.weights import WeightWatch
from helpers import learner
from teacher_nets import make_net, net, plain, rel_err, seed, x

copies = {'bf16': (dict(dtype='bf16'), 0.02), 'fused': (dict(fuse=True), 1e-5),
          'channels_last': (dict(channels_last=True), 1e-5),
          'auto': (dict(dtype='auto'), 0.03), 'compiled': (dict(compile=dict(backend='eager')), 1e-6),
          'all': (dict(dtype='bf16', fuse=True, channels_last=True, compile=dict(backend='eager')), 0.02)}

def step(net, x):
    opt = torch.optim.SGD(net.parameters(), lr=.5)
    net(x).square().mean().backward()
    opt.step(), opt.zero_grad()
def sees_batches(net, x):
    with torch.no_grad(): net.train()(5*x+3)
def load(net, x): net.load_state_dict(make_net().state_dict())
def assign(net, x): net.load_state_dict(make_net().state_dict(), assign=True)
@torch.no_grad()
def average(net, x):
    for a,b in zip(net.parameters(), make_net().parameters()): a.lerp_(b, .5)
def average_data(net, x):
    for a,b in zip(net.parameters(), make_net().parameters()): a.data.mul_(.5).add_(b.data, alpha=.5)
def other_data(net, x):
    for a,b in zip(net.parameters(), make_net().parameters()): a.data = b.data
def other_head(net, x): net[8] = nn.Linear(8, 5)
def other_parameter(net, x): net[8].weight = nn.Parameter(torch.randn(5, 8))
def norms_by_hand(net, x): net[1].running_mean.data.add_(2), net[1].running_var.data.mul_(3)

changes = [step, sees_batches, load, assign, average, average_data, other_data, other_head, other_parameter]

@pytest.mark.parametrize('change', changes)
@pytest.mark.parametrize('opts,tol', copies.values(), ids=copies)
def test_from_one_batch_to_the_next(net, x, opts, tol, change):
    net.train()
    teacher = Teacher(net, **opts)
    assert rel_err(teacher(x)[0], plain(net, x))<=tol
    was = plain(net, x)
    for _ in range(2):
        change(net, x)
        assert rel_err(was, plain(net, x))>0.03               # it matters
        assert rel_err(teacher(x)[0], plain(net, x))<=tol
        was = plain(net, x)

@pytest.mark.parametrize('opts,tol', copies.values(), ids=copies)
def test_maps_and_unfolded_convolutions_follow(net, x, opts, tol):
    teacher = Teacher(net, **opts)
    for change in (step, load, sees_batches, other_head):
        maps = teacher(x, layers=['3.conv1', '1'])[1]
        change(net, x)
        maps = teacher(x, layers=['3.conv1', '1'])[1]
        ref = deepcopy(net).eval()
        with torch.no_grad(): want = ref[1](ref[0](x)).relu()   # the next layer is in place on it
        assert rel_err(maps['1'].relu(), want)<=max(tol, 1e-6)
        with torch.no_grad(): assert rel_err(maps['3.conv1'], ref[3].conv1(want))<=max(tol, 1e-5)

@pytest.mark.parametrize('change', [norms_by_hand, *changes])
def test_from_one_fit_to_the_next(net, x, change):
    teacher = Teacher(net, fuse=True)
    for _ in range(2):
        teacher.begin(learner(make_net()))
        assert rel_err(teacher(x)[0], plain(net, x))<1e-5
        teacher.end()
        change(net, x)

def test_a_single_number_is_found_when_a_fit_begins(net, x):
    teacher = Teacher(net, fuse=True)
    teacher.begin(learner(make_net()))
    teacher(x)
    net[4].conv2.weight.data[5,5,1,1] += 100
    teacher.begin(learner(make_net()))
    assert rel_err(teacher(x)[0], plain(net, x))<1e-5

def test_without_a_change_nothing_is_made_anew(net, x):
    teacher = Teacher(net, dtype='bf16', fuse=True)
    teacher.begin(learner(make_net()))
    teacher(x)
    one = teacher.nets[0]
    copy,engines,made_from = one.copy,dict(one.engines),one.made_from
    values = [t._version for t in copy.state_dict().values()]
    for _ in range(3): teacher(x)
    plain(net, x)
    teacher.begin(learner(make_net()))
    teacher(x)
    assert one.copy is copy and one.engines==engines and one.made_from==made_from
    assert [t._version for t in copy.state_dict().values()]==values

def test_compiled_code_survives_new_values(net, x):
    calls = []
    def backend(gm, inputs): calls.append(gm); return gm
    teacher = Teacher(net, fuse=True, compile=dict(backend=backend))
    for change in (load, step, average_data):
        teacher(x)
        change(net, x)
        assert rel_err(teacher(x)[0], plain(net, x))<1e-5
    assert len(calls)==1

def test_the_trial_is_not_repeated_for_new_values(net, x, capsys):
    teacher = Teacher(net, dtype='auto')
    for change in (load, step):
        teacher(x)
        change(net, x)
    teacher(x)
    assert capsys.readouterr().out.count('teacher Sequential')==1

def test_version(net, x):
    teacher = Teacher([net, make_net()], average='softmax')
    first = teacher.version()
    for _ in range(3): teacher(x)
    assert teacher.version()==first and len(first)==2
    seen = {first}
    for change in (step, load, average_data, other_head):
        change(net, x)
        seen.add(v := teacher.version())
        assert v[1]==first[1] and teacher.version()==v
    assert len(seen)==5

def test_a_mean_teacher_in_a_fit(x):
    """The teacher is the student's average, taken after each step

    A folded copy gives the losses that the module itself gives"""
    from fastai.callback.core import Callback
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
    class Averages(Callback):
        order = 70
        def __init__(self, net): self.net = net
        def after_batch(self):
            if not self.training: return
            for a,b in zip(self.net.parameters(), self.model.parameters()): a.data.lerp_(b.data, .5)
            for a,b in zip(self.net.buffers(), self.model.buffers()): a.copy_(b)
    def losses(**how):
        torch.manual_seed(0)
        student = make_net(3)
        average = deepcopy(student).eval()
        kd = KnowledgeDistillationCallback(Teacher(average, **how))
        learner(student, cbs=[kd, Averages(average)], lr=.5).fit(3)
        return kd.log.history.distill_loss.values
    import numpy as np
    own,fused = losses(),losses(fuse=True)
    assert np.allclose(own, fused, atol=1e-4) and own.max()>1e-3


# The watch itself

def test_inference_tensors_and_tied_weights_are_watched():
    with torch.inference_mode(): net = nn.Linear(3, 3)
    watch = WeightWatch(nn.Sequential(net, net))
    first = watch.look(full=True)
    assert watch.look()==watch.look(full=True)==first
    with torch.inference_mode(): net.weight.add_(1)
    assert watch.look()==first+1

@pytest.mark.parametrize('dtype',
                         [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool])
def test_every_kind_of_number_has_a_sum(dtype):
    net = nn.Module()
    net.register_buffer('b', torch.ones(40, 5).to(dtype))
    watch = WeightWatch(net)
    first = watch.look(full=True)
    net.b.data[30,2] = 0
    assert watch.look()==first and watch.look(full=True)==first+1

def test_a_network_without_weights():
    watch = WeightWatch(nn.Flatten())
    assert watch.look(full=True)==watch.look()==watch.look(full=True)==0
