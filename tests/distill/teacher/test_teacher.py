"A teacher's answers in every mode against the plain fp32 forward, and that a call leaves nothing behind"
import pickle
from copy import deepcopy
from functools import partial
from operator import itemgetter

import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage, set_seed
from torch import nn

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.teacher import teacher as teacher_module
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import FitNet, SoftTarget
from fasterai.distill.teacher.teacher import Renormalize, Teacher, as_teacher, ensemble_logits, fold_batchnorms, frozen_copy, resize_batch


class Block(nn.Module):
    "A residual block with one in-place ReLU that runs twice, as torchvision's"
    def __init__(self, c):
        super().__init__()
        self.conv1,self.bn1,self.relu = nn.Conv2d(c, c, 3, padding=1, bias=False),nn.BatchNorm2d(c),nn.ReLU(inplace=True)
        self.conv2,self.bn2 = nn.Conv2d(c, c, 3, padding=1),nn.BatchNorm2d(c)

    def forward(self, x): return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

def make_net(c_out=5, head=None):
    "Stem, two blocks, head; BatchNorms that do something; dropout; in train mode but for one part"
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Block(8), Block(8),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), head or nn.Linear(8, c_out))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.5, .5), m.running_var.uniform_(.5, 2), nn.init.uniform_(m.weight, .5, 2)
    net[4].eval()
    return net

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture
def net(): return make_net()

@pytest.fixture
def x(): return torch.randn(16, 3, 12, 12)

@torch.no_grad()
def plain(net, x):
    "The slow reference: a copy in eval mode, in fp32"
    return deepcopy(net).eval()(x)

@torch.no_grad()
def plain_maps(net, x, names):
    net,maps = deepcopy(net).eval(),{}
    for n in names: net.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: maps.__setitem__(n, o.clone()))
    net(x)
    return {n:maps[n] for n in names}

def rel_err(a, b): return ((a.float()-b).norm()/b.norm()).item()

def state(net):
    "Everything that a call could leave behind in a module"
    return ({k:v.clone() for k,v in net.state_dict().items()}, [m.training for m in net.modules()],
            [(p.requires_grad, p.grad, p.dtype, p.stride(), p.data_ptr(), p._version) for p in net.parameters()],
            [b._version for b in net.buffers()], [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in net.modules()])

def assert_same_state(a, b):
    assert a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1:]==b[1:]

def count_calls(net):
    "A list that grows by the name of each module that runs, and a function that takes the hooks off"
    ran = []
    hs = [m.register_forward_pre_hook(lambda m, i, n=n: ran.append(n)) for n,m in net.named_modules()]
    return ran, lambda: [h.remove() for h in hs]

modes = {'as it is': ({}, 0), 'fp32': (dict(dtype='fp32'), 0), 'channels_last': (dict(channels_last=True), 1e-5), 'fused': (dict(fuse=True), 1e-5),
         'fused channels_last': (dict(fuse=True, channels_last=True), 1e-5), 'bf16': (dict(dtype='bf16'), 0.02), 'fp16': (dict(dtype='fp16'), 0.003),
         'bf16 channels_last fused': (dict(dtype=torch.bfloat16, channels_last=True, fuse=True), 0.02), 'auto': (dict(dtype='auto'), 0.03),
         'compiled': (dict(compile=dict(backend='eager')), 1e-6), 'bf16 compiled': (dict(dtype='bf16', fuse=True, compile=dict(backend='eager')), 0.02)}

each_mode = pytest.mark.parametrize('opts,tol', modes.values(), ids=modes)


@each_mode
def test_answers_are_those_of_the_plain_forward(net, x, opts, tol):
    layers,before = ['3', '0', '4.bn1', '1'],state(net)
    teacher = Teacher(net, **opts)
    for batch in (x, torch.randn_like(x), x[:1]):
        pred,fm = teacher(batch, layers=layers)
        want = plain_maps(net, batch, layers)
        assert pred.dtype==torch.float32 and not pred.requires_grad and rel_err(pred, plain(net, batch))<=tol
        assert list(fm)==layers and not any(o.requires_grad for o in fm.values())
        for n in layers: assert rel_err(fm[n], want[n])<=tol, n
    assert_same_state(state(net), before)

@each_mode
def test_early_answers_are_those_of_the_plain_forward(net, x, opts, tol):
    before,teacher = state(net),Teacher(net, **opts)
    with pytest.warns(UserWarning, match='compiled teacher does not stop early') if 'compile' in opts else pytest.MonkeyPatch.context():
        pred,fm = teacher(x, layers=['3', '1'], logits=False)
    want = plain_maps(net, x, ['3', '1'])
    assert pred is None or 'compile' in opts
    assert list(fm)==['3', '1'] and all(rel_err(fm[n], want[n])<=tol for n in want)
    assert_same_state(state(net), before)

def test_the_early_stop_runs_no_module_after_the_last_layer(net, x):
    teacher = Teacher(net)
    ran,off = count_calls(net)
    for logits in (False, False, True):
        ran.clear()
        teacher(x, layers=['3.bn2', '1'], logits=logits)
        early = ['', '0', '1', '2', '3', '3.conv1', '3.bn1', '3.relu', '3.conv2', '3.bn2']
        assert len(ran)==22 and ran[:10]==early if logits else ran==early
    off()
    assert teacher(x, logits=False)==(None, {})

def test_a_layer_that_runs_twice_is_read_at_the_end_and_said_so(net, x):
    teacher = Teacher(net)
    with pytest.warns(UserWarning, match="runs to its end.*exactly once: 3.relu"): fm = teacher(x, layers=['3.relu'], logits=False)[1]
    assert torch.equal(fm['3.relu'], plain_maps(net, x, ['3.relu'])['3.relu'])

def test_the_stop_passes_a_model_that_catches_exceptions(x):
    class Careful(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Flatten(),nn.LazyLinear(3)
        def forward(self, x):
            try: return self.b(self.a(x))
            except Exception: return self.b(torch.zeros(1, 432))
    net = Careful(); net(x)
    teacher = Teacher(net)
    teacher(x, layers=['a'], logits=False)
    ran,off = count_calls(net)
    assert torch.equal(teacher(x, layers=['a'], logits=False)[1]['a'], x.flatten(1)) and ran==['', 'a']

def test_an_interrupt_leaves_modes_hooks_autocast_and_random_numbers_as_they_were(net, x):
    class Interrupted(nn.Module):
        def forward(self, x): torch.rand(1); raise KeyboardInterrupt
    net[8] = Interrupted()
    for opts in ({}, dict(dtype='bf16')):
        before,rng = state(net),torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt): Teacher(net, **opts)(x, layers=['3'])
        assert_same_state(state(net), before)
        assert torch.equal(rng, torch.get_rng_state()) and not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()

def test_a_teacher_that_draws_random_numbers_takes_none_from_the_student(x):
    class Noisy(nn.Module):
        def forward(self, x): return F.dropout(x.mean((2, 3)), 0.5, training=True)
    rng,teacher = torch.get_rng_state(),Teacher(Noisy())
    assert teacher(x)[0].eq(0).any()
    assert torch.equal(rng, torch.get_rng_state())

def test_the_student_alone_gets_gradients(net, x):
    student = make_net()
    F.mse_loss(student(x), Teacher(net)(x)[0]).backward()
    assert all(p.grad is None for p in net.parameters()) and all(p.grad is not None for p in student.parameters())

def test_without_options_the_module_itself_runs_with_its_weights_of_today(net, x):
    teacher = Teacher(net)
    teacher(x)
    nn.init.constant_(net[8].bias, 7.)
    assert torch.equal(teacher(x)[0], plain(net, x)) and teacher.models[0] is net

def test_under_the_students_autocast(net, x):
    ref = plain(net, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        as_is,full,half = [Teacher(net, dtype=d)(x) for d in (None, 'fp32', 'fp16')]
        assert Teacher(net)(x, layers=['0'])[1]['0'].dtype==torch.bfloat16
        assert Teacher(net, dtype='fp16')(x, layers=['0'])[1]['0'].dtype==torch.float16
        assert torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu')==torch.bfloat16
    assert [o[0].dtype for o in (as_is, full, half)]==[torch.float32]*3
    assert torch.equal(full[0], ref) and 0<rel_err(as_is[0], ref)<0.02 and 0<rel_err(half[0], ref)<0.003

@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-6), (torch.bfloat16, 0.03)])
def test_a_model_in_another_precision_gets_its_inputs_in_it(net, x, dtype, tol):
    ref = plain(net, x)
    for opts in ({}, dict(dtype='fp32'), dict(dtype='auto')):
        pred = Teacher(deepcopy(net).to(dtype), **opts)(x)[0]
        assert pred.dtype==torch.float32 and rel_err(pred, ref)<(0.03 if 'auto' in opts.values() else tol)

def test_fastai_tensors_and_channels_last_batches(net, x):
    pred,fm = Teacher(net)(TensorImage(x).contiguous(memory_format=torch.channels_last), layers='0')
    assert type(pred) is torch.Tensor and type(fm['0']) is torch.Tensor and rel_err(pred, plain(net, x))<1e-6


# Frozen copies

def test_fold_is_exact_and_leaves_what_it_must(net, x):
    folded = deepcopy(net)
    assert fold_batchnorms(folded)==['0', '3.conv1', '3.conv2', '4.conv1', '4.conv2']
    assert rel_err(folded(x), plain(net, x))<1e-6 and [n for n,_ in folded.named_modules()]==[n for n,_ in net.named_modules()]

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
    assert half[0].weight.is_contiguous(memory_format=torch.channels_last) and not any(p.requires_grad for p in half.parameters())

def test_transformers_in_half_precision():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Embedding(11, 16), layer, nn.Linear(16, 3))
    ids = torch.randint(0, 11, (4, 6))
    pred,fm = Teacher(net, dtype='bf16')(ids, layers=['1'])
    assert 0<rel_err(pred, plain(net, ids))<0.03 and fm['1'].shape==(4, 6, 16)


# The trial

def fake_clock(monkeypatch, fast):
    "A clock for which the formats in `fast` take half the time"
    def time(f, device): return 0.5 if f.args[2:] in fast else 1.
    monkeypatch.setattr(teacher_module, '_best_time', time)

@pytest.mark.parametrize('dtype,cl', [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_auto_takes_the_fastest(net, x, monkeypatch, capsys, dtype, cl):
    fake_clock(monkeypatch, [(dtype, cl)])
    teacher = Teacher(net, dtype='auto')
    teacher(x); teacher(x)
    assert teacher.nets[0].made==dict(dtype=dtype, channels_last=cl, fuse=True)
    said = capsys.readouterr().out
    assert said.count('\n')==1 and str(dtype)[6:] in said and '5 BatchNorms folded' in said and 'as it is 1000.0 ms' in said and ('channels_last' in said)==cl

def test_auto_takes_no_copy_where_nothing_is_faster(net, x, monkeypatch, capsys):
    fake_clock(monkeypatch, [])
    teacher = Teacher(net, dtype='auto')
    assert torch.equal(teacher(x)[0], plain(net, x)) and teacher.nets[0].net is net
    assert 'nothing safe is faster' in capsys.readouterr().out and 'as it is' in repr(teacher)

def test_auto_refuses_what_is_fast_and_wrong(x, monkeypatch):
    class Fine(nn.Module):
        "What it says is in what bf16 rounds away"
        def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(3, 8, 3),nn.Linear(8, 5)
        def forward(self, x):
            z = self.conv(x).mean((2, 3))
            return self.head(1000+z) - self.head(1000+0*z)
    fake_clock(monkeypatch, [(torch.bfloat16, c) for c in (False, True)])
    teacher = Teacher(Fine(), dtype='auto')
    teacher(x)
    assert teacher.nets[0].made.get('dtype') is None

def test_auto_skips_what_the_device_lacks(net, x, monkeypatch):
    fake_clock(monkeypatch, [(torch.bfloat16, True), (torch.float32, True)])
    net[8] = NoHalf()
    teacher = Teacher(net, dtype='auto')
    teacher(x)
    assert teacher.nets[0].made==dict(dtype=torch.float32, channels_last=True, fuse=True)

class NoHalf(nn.Module):
    "Stands for a kernel that a device lacks"
    def forward(self, x):
        if torch.is_autocast_enabled('cpu'): raise RuntimeError("\"op_cpu\" not implemented for 'BFloat16'")
        return x

def test_a_dtype_that_the_device_lacks(net, x):
    net[8] = NoHalf()
    with pytest.raises(ValueError, match="dtype=bfloat16: cpu cannot run the teacher Sequential.*dtype='auto'"): Teacher(net, dtype='bf16')(x)


# Compiled

def test_compiled_maps_are_those_of_their_own_batch(net, x):
    teacher = Teacher(net, compile=dict(backend='aot_eager'))
    for batch in (x, x+1):
        pred,fm = teacher(batch, layers=['2', '0', '1:input', '1'])    # '2' is in place on '1'
        assert rel_err(pred, plain(net, batch))<1e-5
        want = plain_maps(net, batch, ['2', '0', '1'])
        assert list(fm)==['2', '0', '1:input', '1'] and torch.equal(fm['1:input'], fm['0'])
        assert all(rel_err(fm[n], want[n])<1e-5 for n in want)
    assert teacher(x)[1]=={}

@pytest.mark.parametrize('in_place', [False, True])
def test_a_model_compiled_by_the_caller_is_still_looked_into(net, x, in_place):
    net.eval()
    compiled = net if in_place else torch.compile(net, backend='eager')
    if in_place: net.compile(backend='eager')
    with torch.no_grad(): compiled(x)
    teacher = Teacher(compiled)
    assert rel_err(teacher(x)[0], plain(net, x))<1e-6
    for batch in (x, x+1): assert rel_err(teacher(batch, layers=['3'])[1]['3'], plain_maps(net, batch, ['3'])['3'])<1e-6
    assert rel_err(Teacher(compiled, dtype='bf16')(x, layers=['3'])[0], plain(net, x))<0.02

def test_a_scripted_teacher(x):
    net = nn.Sequential(nn.Flatten(), nn.Linear(432, 3), nn.Dropout())
    scripted = torch.jit.script(net).train()
    assert torch.equal(Teacher(scripted)(x)[0], plain(net, x)) and scripted.training


# Ensembles

def test_ensemble_is_the_log_of_the_average_of_probabilities(x):
    nets,w = [make_net() for _ in range(3)],[1., 2., 5.]
    pred,fm = Teacher(nets, weights=w)(x, layers=['3'])
    probs = [plain(n, x).double().softmax(1) for n in nets]
    for i in range(len(x)):
        for c in range(5): assert pred[i,c].item()==pytest.approx(torch.log(sum(wk*p[i,c] for wk,p in zip(w, probs))/sum(w)).item(), abs=1e-5)
    assert torch.equal(fm['3'], plain_maps(nets[0], x, ['3'])['3'])

def test_ensemble_stays_finite_where_probabilities_vanish():
    z = torch.tensor([[0., 500., 0.]])
    avg = ensemble_logits([z, z])
    assert torch.allclose(avg, z-500) and avg.isfinite().all()

def test_ensemble_over_pixels_and_of_one_column():
    a,b = torch.randn(2, 3, 4, 4),torch.randn(2, 3, 4, 4)
    assert torch.allclose(ensemble_logits([a, b]).exp(), (a.softmax(1)+b.softmax(1))/2)
    assert torch.allclose(ensemble_logits([a, b], axis=-1).exp(), (a.softmax(-1)+b.softmax(-1))/2)
    assert torch.equal(ensemble_logits([torch.tensor([[1.], [2.]]), torch.tensor([[3.], [6.]])]), torch.tensor([[2.], [4.]]))
    assert torch.equal(ensemble_logits([torch.tensor([1., 2.]), torch.tensor([3., 6.])], [3, 1]), torch.tensor([1.5, 3.]))

@pytest.mark.parametrize('opts', [{}, dict(compile=dict(backend='eager'))])
def test_a_layer_asked_for_twice(net, x, opts):
    fm = Teacher(net, **opts)(x, layers=['3', '1', '3'])[1]
    assert list(fm)==['3', '1', '3#2'] and torch.equal(fm['3'], fm['3#2'])

def test_only_the_first_of_an_ensemble_runs_for_maps(net, x):
    ran,off = count_calls(other := make_net())
    Teacher([net, other])(x, layers=['3'], logits=False)
    assert ran==[]

def test_an_ensemble_that_disagrees_is_refused_and_leaves_nothing(net, x):
    other,before = make_net(7),state(net)
    with pytest.raises(ValueError, match=r'agree in output shape, got \(16, 5\) and \(16, 7\)'): Teacher([net, other])(x)
    assert_same_state(state(net), before)


# Inputs and outputs

def test_each_network_gets_its_own_transform(net, x):
    other = make_net()
    a,b = Teacher([net, other], tfms=[None, partial(resize_batch, size=(24, 18))]),Teacher([net, other], tfms=lambda x: x+1)
    want = lambda u,v: torch.log((plain(net, u).softmax(1)+plain(other, v).softmax(1))/2)
    small = F.interpolate(x, (24, 18), mode='bilinear', antialias=True)
    assert torch.allclose(a(x)[0], want(x, small), atol=1e-5) and torch.allclose(b(x)[0], want(x+1, x+1), atol=1e-5)

def test_renormalize_reads_the_dataloaders(x):
    def dls(m, s):
        dl = TfmdDL(list(torch.zeros(4, 3, 2, 2)), bs=2, num_workers=0, after_batch=[Normalize.from_stats(m, s, cuda=False)])
        return DataLoaders(dl, dl, device=torch.device('cpu'))
    ms,ss,mt,st = [.1, .2, .3],[.5, .6, .7],[.4, .5, .6],[.2, .3, .9]
    got = Renormalize(dls(ms, ss), dls(mt, st))(x)
    for c in range(3): assert torch.allclose(got[:,c], ((x[:,c]*ss[c]+ms[c])-mt[c])/st[c], atol=1e-5)
    assert torch.allclose(Renormalize(None, (mt, st))(x)[:,0], (x[:,0]-.4)/.2, atol=1e-5)
    assert torch.equal(Renormalize((ms, ss), (ms, ss))(x), x)

def test_a_learner_several_inputs_and_a_tuple_out():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(4, 3)
        def forward(self, x, y): return self.a(x)*y, x, y
    net,(x,y) = Two(),torch.randn(2, 5, 4)
    learn = Learner(DataLoaders([], []), net, loss_func=nn.MSELoss())
    assert torch.equal(Teacher(learn)(x, y[:,:3])[0], net.a(x)*y[:,:3]) and Teacher(learn).models==[net]

def test_a_dict_is_refused_with_the_remedy(x):
    class Dict(nn.Module):
        def forward(self, x): return {'logits': x.mean((2, 3)), 'loss': None}
    with pytest.raises(TypeError, match=r"got a dict with keys \['logits', 'loss'\]; pass select="): Teacher(Dict())(x)
    assert torch.equal(Teacher(Dict(), select=itemgetter('logits'))(x)[0], x.mean((2, 3)))

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_teacher_of_nan_is_refused_on_its_first_batch_only(net, x, bad):
    broken = deepcopy(net)
    nn.init.constant_(broken[8].bias, bad)
    before = state(broken)
    with pytest.raises(ValueError, match='teacher Sequential gives NaN or inf on its first batch, in its logits'): Teacher(broken)(x)
    with pytest.raises(ValueError, match='so does the batch itself'): Teacher(net)(x*float('nan'))
    assert not broken[8].bias.isfinite().any() and [m.training for m in broken.modules()]==before[1]
    teacher = Teacher(net)
    teacher(x)
    assert teacher(x*bad)[0].isnan().any()                             # no later step waits for the device

def test_masked_classes_are_no_error(x):
    class Masked(nn.Module):
        def forward(self, x): return x.mean((2, 3)).masked_fill(torch.tensor([True, False, False]), -torch.inf)
    assert Teacher(Masked())(x)[0][:,0].isneginf().all()

@pytest.mark.parametrize('args,error,match', [
    (dict(models=[]), ValueError, 'models is empty'), (dict(models=nn.Linear), TypeError, 'call it to make one'), (dict(models='resnet18'), TypeError, "got 'resnet18'"),
    (dict(dtype='bf61'), ValueError, "unknown dtype 'bf61'.*'bf16'"), (dict(dtype=torch.int8), ValueError, "unknown dtype 'int8'"),
    (dict(weights=[1, 2]), ValueError, 'weights must be 1 positive'), (dict(weights=[0]), ValueError, 'positive'), (dict(tfms=[None]*2), ValueError, 'tfms has 2 entries for 1')])
def test_bad_arguments(net, args, error, match):
    with pytest.raises(error, match=match): Teacher(**{'models': net, **args})

def test_an_unknown_layer(net, x):
    before = state(net)
    for opts,logits in (({}, True), ({}, False), (dict(compile=True), True), (dict(dtype='bf16', fuse=True), False)):
        with pytest.raises(ValueError, match="unknown layer of the teacher '3.bn3'.*'3.bn2'"): Teacher(net, **opts)(x, layers=['3.bn3'], logits=logits)
    assert_same_state(state(net), before)


# What it says, and what it becomes

def test_as_teacher(net):
    teacher = Teacher(net)
    assert as_teacher(teacher) is teacher and as_teacher(net, dtype='bf16').models==[net]

@each_mode
def test_it_pickles_without_its_copies(net, x, opts, tol):
    teacher = Teacher(net, **opts)
    teacher(x, layers=['3'])
    blob = pickle.dumps(teacher)
    assert len(blob)<len(pickle.dumps(net))+2000
    assert rel_err(pickle.loads(blob)(x)[0], plain(net, x))<=tol

def test_summary_counts_what_runs(net, x):
    student = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(432, 5))
    teacher,rng,before = Teacher([net, make_net()], weights=[2, 1]),torch.get_rng_state(),[state(net), state(student)]
    macs = 10*10*8*27 + 4*10*10*8*72 + 8*5
    assert f"{2*2*macs/1e9:.3g} GFLOPs a sample" in (said := teacher.summary(x, student=student))
    assert 'Sequential of 0.00' in said and 'weighted 2:1' in said and '% of the step' in said and 'as it is' in said
    assert f"{2*10*10*8*27/1e9:.3g} GFLOPs a sample" in teacher.summary(x, layers=['0'], logits=False)
    assert 'compiled' in repr(Teacher(net, compile=True)) and 'fastest safe format' in repr(Teacher(net, dtype='auto'))
    assert torch.equal(rng, torch.get_rng_state())
    for m,b in zip((net, student), before): assert_same_state(state(m), b)

def fit(teacher, loss=SoftTarget, layers=None):
    "A student after one epoch with `teacher`"
    set_seed(1)                                                              # weights and the order of samples
    dls,student = digits_dls(128, bs=32, device='cpu', n_valid=32),digits_net(4)
    Learner(dls, student, loss_func=CrossEntropyLossFlat(), cbs=KnowledgeDistillationCallback(teacher, loss, layers, layers)).fit(1, 1e-2)
    return torch.cat([p.detach().flatten() for p in student.parameters()])

@pytest.mark.filterwarnings('ignore')
def test_in_a_fit():
    net = digits_net(4)
    before = state(net)
    direct = fit(net)
    assert torch.equal(fit(Teacher(net)), direct)
    assert 0<rel_err(fit(Teacher(net, dtype='bf16', fuse=True)), direct)<0.05
    early,(ran,off) = fit(Teacher(net), FitNet, ['0', '1']),count_calls(net)
    assert torch.equal(fit(Teacher(net), FitNet, ['0', '1']), early)
    assert ran.count('1')==5 and ran.count('2')==ran.count('5')==1           # four steps; the trial of the first batch runs to the end
    off()
    assert_same_state(state(net), before)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('opts,tol', [({}, 1e-4), (dict(dtype='bf16', channels_last=True, fuse=True), 0.02), (dict(dtype='fp16'), 0.003), (dict(dtype='auto'), 0.03)])
def test_it_follows_the_batch_to_its_device(net, x, opts, tol):
    ref,rng = plain(net, x),torch.cuda.get_rng_state()
    pred,fm = Teacher(net, **opts)(x.cuda(), layers=['3'])
    assert pred.is_cuda and fm['3'].is_cuda and rel_err(pred.cpu(), ref)<tol and torch.equal(rng, torch.cuda.get_rng_state())
    assert next(net.parameters()).is_cuda==(not opts)
