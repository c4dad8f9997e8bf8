"A teacher of integers: close, frozen, following its source, and honest about what it cannot do"
import copy
import pickle
import warnings

import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import Attention
from fasterai.distill.teacher.teacher import Teacher

pytestmark = pytest.mark.skipif('x86' not in torch.backends.quantized.supported_engines
                                and 'qnnpack' not in torch.backends.quantized.supported_engines, reason='no kernels')


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = digits_net(16)
    x = digits_dls(n_train=256, bs=256).one_batch()[0]
    with torch.no_grad():
        for _ in range(20): net(x)  # statistics as training leaves them
    return net.eval()

@pytest.fixture(scope='module')
def xb(): return digits_dls(n_train=256, bs=256).one_batch()[0]


def off(z, ref): return ((z-ref).norm()/ref.norm()).item()


def test_close_to_the_source_which_stays_as_it_is(net, xb):
    before = copy.deepcopy(net.state_dict())
    t = Teacher(net, dtype='int8')
    z,ref = t.compute(xb)[0],net(xb.as_subclass(torch.Tensor))
    assert z.dtype==torch.float32 and 0<off(z, ref)<0.1 and (z.argmax(1)==ref.argmax(1)).float().mean()>0.9
    assert torch.equal(z, t.compute(xb)[0])  # ranges are those of the first batch, for good
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in before.items()) and not net.training
    assert 'int8' in repr(t)
    assert off(pickle.loads(pickle.dumps(t)).compute(xb)[0], ref)<0.1


def test_it_follows_its_source(net, xb):
    net = copy.deepcopy(net)
    t = Teacher(net, dtype='int8')
    t.compute(xb)
    with torch.no_grad(): net[-1].weight.mul_(-2)
    assert off(t.compute(xb)[0], net(xb.as_subclass(torch.Tensor)))<0.1


@pytest.mark.parametrize('options,said', [(dict(compile=True), 'leave out compile'),
                                          (dict(channels_last=True), 'channels_last')])
def test_refused(net, xb, options, said):
    with pytest.raises(ValueError, match=said): Teacher(net, dtype='int8', **options).compute(xb)


def test_maps_and_untraceable_networks_are_refused(net, xb):
    maps = "dtype='int8': the maps of 0"
    with pytest.raises(ValueError, match=maps): Teacher(net, dtype='int8').compute(xb, layers='0')
    class Branches(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(64, 10)
        def forward(self, x): return self.lin(x.flatten(1)) if x.sum()>0 else self.lin(-x.flatten(1))
    fx = 'torch.fx cannot follow Branches'
    with pytest.raises(ValueError, match=fx): Teacher(Branches(), dtype='int8').compute(xb)


def test_a_small_first_batch_is_warned_of(net, xb):
    with pytest.warns(UserWarning, match='8 samples tell little'): Teacher(net, dtype='int8').compute(xb[:8])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        Teacher(net, dtype='int8').compute(xb[:32])


def test_a_gpu_is_refused(net):
    there = Teacher(net, dtype='int8').nets[0]
    there.device = torch.device('cuda')
    with pytest.raises(ValueError, match='runs on a CPU, and the batch is on cuda'): there._of_integers((net[0],))


@pytest.mark.parametrize('cache', [None, True])
def test_in_a_training(net, cache):
    dls = digits_dls(n_train=128, bs=64)
    kd = KnowledgeDistillationCallback(Teacher(net, dtype='int8', cache=cache), weight=0.5)
    learn = Learner(dls, digits_net(4), CrossEntropyLossFlat(), cbs=kd)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert all(v==v and v>0 for v in learn.recorder.values[-1][:2])
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('ignore')
        feature = KnowledgeDistillationCallback(Teacher(net, dtype='int8'), Attention, ['1'], ['1'])
        with pytest.raises(ValueError, match='losses on feature maps'): learn.fit(1, cbs=feature)
