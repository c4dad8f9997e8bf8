"Folding is exact, casting leaves what must not be cast, and a copy takes over new values"
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fasterai.distill.teacher.frozen import bare_copy, refresh_copy, twin
from fasterai.distill.teacher.teacher import Teacher, fold_batchnorms, frozen_copy
from teacher_nets import make_net, net, plain, plain_maps, rel_err, seed, x


def test_fold_is_exact_and_leaves_what_it_must(net, x):
    folded = deepcopy(net)
    assert fold_batchnorms(folded)==['0', '3.conv1', '3.conv2', '4.conv1', '4.conv2']
    assert rel_err(folded(x), plain(net, x))<1e-6
    assert [n for n,_ in folded.named_modules()]==[n for n,_ in net.named_modules()]

def test_fold_leaves_convolutions_with_other_readers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice,self.read,self.named = [nn.Conv2d(3, 3, 1) for _ in range(3)]
            self.again,(self.bn1,self.bn2,self.bn3,self.bn4) = self.named,[nn.BatchNorm2d(3) for _ in range(4)]
            self.normed,self.bn5 = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),nn.BatchNorm2d(3)
        def forward(self, x):
            y = self.bn2(self.twice(self.bn1(self.twice(x))))
            z = self.read(y)
            return self.bn5(self.normed(self.bn4(self.again(self.bn3(z)+z))))
    net,x = Net().eval(),torch.randn(2, 3, 4, 4)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.running_var, .5, 2)
    ref = net(x)
    assert fold_batchnorms(net)==[] and torch.equal(net(x), ref)

def test_a_captured_convolution_is_unfolded_when_it_is_asked_for(net, x):
    teacher = Teacher(net, fuse=True)
    teacher(x)
    assert '3.conv1' in teacher.nets[0].folded and '5 BatchNorms folded' in repr(teacher)
    fm = teacher(x, layers=['3.conv1:input', '3.conv1', '3.bn1'])[1]
    want = plain_maps(net, x, ['2', '3.conv1', '3.bn1'])
    assert '3.conv1' not in teacher.nets[0].folded and '4.conv1' in teacher.nets[0].folded
    assert all(rel_err(a, b)<1e-5 for a,b in zip(fm.values(), want.values()))

def test_what_fx_cannot_trace_is_left_unfolded_and_said_so(x):
    class Dynamic(nn.Sequential):
        def forward(self, x): return super().forward(x if x.sum()>0 else -x)
    net = Dynamic(*make_net())
    with pytest.warns(UserWarning, match='BatchNorms were not folded.*Dynamic'): pred = Teacher(net, fuse=True)(x)[0]
    assert torch.equal(pred, plain(net, x))

def test_norms_and_vectors_stay_in_fp32(net):
    half = frozen_copy(net, torch.bfloat16, channels_last=True)
    assert half[1].running_var.dtype==half[1].weight.dtype==torch.float32 and half[8].bias.dtype==torch.bfloat16
    assert half[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in half.parameters())

@pytest.mark.parametrize('made', [
    parametrizations.orthogonal, parametrizations.spectral_norm, parametrizations.weight_norm,
    nn.utils.spectral_norm, nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, 'weight', .5)])
def test_what_a_weight_is_computed_from_stays_in_fp32(made, x):
    torch.manual_seed(0)
    net = nn.Sequential(made(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad(): want = net.eval()(x)
    assert 0<rel_err(Teacher(net, dtype='bf16')(x)[0], want)<.03

def test_transformers_in_half_precision():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Embedding(11, 16), layer, nn.Linear(16, 3))
    ids = torch.randint(0, 11, (4, 6))
    pred,fm = Teacher(net, dtype='bf16')(ids, layers=['1'])
    assert 0<rel_err(pred, plain(net, ids))<0.03 and fm['1'].shape==(4, 6, 16)

def test_the_copy_says_which_batchnorm_went_into_which_convolution(net):
    copy = frozen_copy(net, fuse=True, keep=['3.conv1'])
    assert copy.folded=={'0': '1', '3.conv2': '3.bn2', '4.conv1': '4.bn1', '4.conv2': '4.bn2'}
    assert isinstance(copy[1], nn.Identity) and isinstance(copy[3].bn1, nn.BatchNorm2d)

@pytest.mark.parametrize('opts,tol',
                         [(dict(fuse=True), 1e-6), (dict(channels_last=True), 1e-6), (dict(dtype=torch.float16), 0.003),
                                      (dict(dtype=torch.bfloat16, fuse=True, channels_last=True), 0.02)])
def test_a_refreshed_copy_is_as_a_new_one(net, x, opts, tol):
    copy = frozen_copy(net, **opts)
    where = [t.data_ptr() for t in copy.state_dict().values()]
    net.load_state_dict(make_net().state_dict())
    net[1].running_var.mul_(3)
    refresh_copy(copy, net)
    anew = frozen_copy(net, **opts)
    assert all(torch.allclose(a, b, atol=1e-6) and a.dtype==b.dtype and a.stride()==b.stride()
               for a,b in zip(copy.state_dict().values(), anew.state_dict().values()))
    assert [t.data_ptr() for t in copy.state_dict().values()]==where          # in place

def test_a_twin_shares_tensors_and_no_hooks_or_modes(net, x):
    other = twin(net)
    assert all(a is b for a,b in zip(other.parameters(), net.parameters()))
    assert all(a is b for a,b in zip(other.buffers(), net.buffers()))
    assert not other.training and net.training and not set(other.modules()) & set(net.modules())

def test_a_copy_leaves_graphs_behind_and_shares_what_was_shared():
    net = nn.Linear(3, 2)
    out = net(torch.ones(1, 3))
    net.kept = [out, out]
    copy = bare_copy(net)
    assert copy.kept[0] is copy.kept[1] and copy.kept[0] is not out
    assert torch.equal(copy.kept[0], out) and not copy.kept[0].requires_grad and copy.weight.requires_grad
