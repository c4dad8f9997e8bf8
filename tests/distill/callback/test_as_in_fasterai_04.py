"What users of fasterai 0.4 type keeps working; what differs on purpose is refused in words"
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from fasterai.core.schedule import Schedule, cos
from fasterai.distill.all import *
from helpers import learner, net
from kd_helpers import KD, layers, teacher


def test_layers_with_their_representations():
    model = net()
    described = get_model_layers(model, get_layer_repr=True)
    assert list(described)==get_model_layers(model)==get_model_layers(model, False)
    assert described['0.0']==repr(model[0][0]) and described['4']=='Linear(in_features=8, out_features=3, bias=True)'


def test_layers_can_be_read_again():
    kd = KD(teacher(), FitNet, **layers)
    assert kd.activations_student==['0', '1'] and kd.activations_teacher==['0', '1']
    kd = KD(teacher(), FitNet, '1', '0')
    assert (kd.activations_student, kd.activations_teacher)==(['1'], ['0'])
    kd = KD(teacher(), SoftTarget)
    assert kd.activations_student is None and kd.activations_teacher is None
    kd.activations_student, kd.current_weight  # and again: reading changes nothing
    assert kd.log is None


class Weights(Callback):
    "The weight in force at each step, as other callbacks see it"
    def __init__(self, kd): self.kd,self.seen = kd,[]
    def after_loss(self):
        if self.training: self.seen.append(self.kd.current_weight)


@pytest.mark.parametrize('schedule', [None, cos, Schedule(cos.sched_func, start_pct=0.5)])
def test_weight_in_force(schedule):
    kd = KD(teacher(), SoftTarget, weight=0.8, schedule=schedule)
    assert kd.current_weight==0.8
    looks = Weights(kd)
    learner().fit(2, cbs=[kd, looks])
    want = [0.8 if schedule is None else 0.8*schedule.progress(i/8) for i in range(8)]
    assert looks.seen==pytest.approx(want) and kd.current_weight==pytest.approx(want[-1])
    assert looks.seen==pytest.approx(kd.log.history.weight.tolist())


def test_a_callback_without_a_teacher_has_no_weight():
    learn = learner(cbs=KD(teacher(), SoftTarget, weight=0.8))
    import pickle
    kd = pickle.loads(pickle.dumps(learn.cbs[-1]))
    assert (kd.current_weight, kd.activations_student, kd.activations_teacher)==(0., None, None)


def test_by_position_as_there():
    kd = KnowledgeDistillationCallback(teacher(), Attention, ['0', '1'], ['0', '1'], 0.9, cos)
    assert kd.equation()=='(1-w)*task + w*Attention(p=2), w = 0.9*cos(t)'
    learner().fit(1, cbs=kd)


def test_losses_by_their_names_there():
    s,t,y = torch.randn(4, 3),torch.randn(4, 3),torch.tensor([0, 1, 2, 0])
    maps = dict(fm_s=dict(a=torch.randn(4, 3, 2, 2)), fm_t=dict(b=torch.randn(4, 3, 2, 2)))
    everything = dict(pred=s, teacher_pred=t, target=y, **maps)
    for f in (SoftTarget, Logits, Mutual, DecoupledKD, Attention, ActivationBoundaries, FitNet, Similarity):
        assert f(**everything).ndim==0, f.__name__
    assert DecoupledKD(s, t, T=4, alpha=1., beta=8., target=y, normalize=True).ndim==0


def test_on_purpose_a_misspelt_layer_is_an_error_and_not_none():
    with pytest.raises(ValueError, match="unknown layer 'layer9'"): get_module_by_name(nn.Sequential(), 'layer9')


def test_on_purpose_a_misspelt_keyword_is_an_error():
    with pytest.raises(TypeError, match='temperature'): SoftTarget(torch.ones(2, 2), torch.ones(2, 2), temperature=4)
