"Losses of dense prediction by golden numbers; gradients reach the student alone; it trains in a Learner"
from functools import partial

import pytest
import torch
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.dense import CIRKD, IFVD, PKD
from helpers import block, data, learner, net


s = torch.tensor([[[[0.851, 0.1778], [-0.853, -0.4439]], [[-0.2029, 1.1005], [-3.0351, -0.4146]],
                   [[-1.3431, -0.7732], [-1.6752, 0.8053]]],
                  [[[-0.4949, -0.5039], [-0.5962, 0.3745]], [[0.4132, -0.1836], [0.652, 1.0747]],
                   [[-1.2852, -1.2612], [3.0898, -1.238]]]])
t = torch.tensor([[[[-0.4306, -1.1939], [-0.4443, 0.4894]], [[-0.4516, 0.5857], [1.1773, -0.965]],
                   [[0.2183, -0.8661], [-0.323, 1.4129]]],
                  [[[-0.7127, -1.3622], [-1.706, 0.5574]], [[-0.0725, -0.1907], [1.1617, -1.4821]],
                   [[-0.1607, 0.2745], [-0.3737, 0.6735]]]])
y = torch.tensor([[[0, 1], [1, 0]], [[2, 2], [0, 255]]])
losses = dict(PKD=(PKD, 0.8881581137867749), CIRKD=(CIRKD, 4.737538361283077),
              IFVD=(partial(IFVD, target=y, ignore_index=255), 0.3616134014429462))

@pytest.mark.parametrize('name', losses)
def test_golden(name):
    loss,expected = losses[name]
    assert loss([s], [t]).item()==pytest.approx(expected, rel=1e-5)
    assert loss([s.contiguous(memory_format=torch.channels_last)], [t]).item()==pytest.approx(expected, rel=1e-5)
    assert loss([s, s], [t, t], layer_weights=[1, 2]).item()==pytest.approx(3*expected, rel=1e-5)


@pytest.mark.parametrize('name', losses)
def test_gradients_reach_the_student_alone_under_autocast_too(name):
    a,b = s.clone().requires_grad_(),t.clone().requires_grad_()
    loss = losses[name][0]
    with torch.autocast('cpu', torch.bfloat16): found = loss([a], [b])
    found.backward()
    assert found.item()==pytest.approx(losses[name][1], rel=1e-5)
    assert a.grad.isfinite().all() and a.grad.abs().sum()>0 and b.grad is None


@pytest.mark.parametrize('name', losses)
def test_empty_and_constant_maps_have_finite_gradients(name):
    a = torch.zeros(2, 3, 2, 2, requires_grad=True)
    losses[name][0]([a], [t]).backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize('loss', [PKD, CIRKD])
def test_in_a_learner(loss):
    teacher = net(width=4, seed=1)
    learn = learner(cbs=KnowledgeDistillationCallback(teacher, loss, '0', '0', weight=1., task_weight=1.))
    learn.fit(1)
    assert learn.knowledge_distillation.log.history.distill_loss.gt(0).all()


def test_ifvd_takes_the_tasks_labels():
    dense = nn.Sequential(block(3, 4), nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=2))
    teacher = nn.Sequential(block(3, 6), nn.Conv2d(6, 3, 1), nn.Upsample(scale_factor=2))
    labels = torch.randint(3, (32, 8, 8))
    from fastai.losses import CrossEntropyLossFlat
    kd = KnowledgeDistillationCallback(teacher, IFVD, '0', '0', weight=1., adapters=None)
    learner(dense, data(y=labels), kd, loss_func=CrossEntropyLossFlat(axis=1)).fit(1)
    assert kd.log.history.distill_loss.min()>0


def test_a_single_value_of_each_channel_has_no_deviation():
    s,t = torch.randn(1, 4, 1, 1, requires_grad=True),torch.randn(1, 4, 1, 1)
    loss = PKD([s], [t])
    loss.backward()
    assert loss.item()==0 and s.grad.eq(0).all()
    s,t = torch.randn(2, 4, 1, 1),torch.randn(2, 4, 1, 1)
    def standard(x): return (x-x.mean(0))/(x.std(0)+1e-6)
    assert PKD([s], [t]).item()==pytest.approx((standard(s)-standard(t)).square().mean().item()/2, rel=1e-6)
