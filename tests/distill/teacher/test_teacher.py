"What Teacher takes and says, and that a call leaves nothing behind"
import pickle
from copy import deepcopy
from operator import itemgetter

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastcore.basics import noop
from torch import nn

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import FitNet, SoftTarget
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import Recording, TeacherCache
from fasterai.distill.teacher.teacher import Teacher, as_teacher
from helpers import data, learner
from teacher_nets import assert_same_state, count_calls, each_mode, make_net, net, plain, rel_err, seed, state, x


def test_an_interrupt_leaves_modes_hooks_autocast_and_random_numbers_as_they_were(net, x):
    class Interrupted(nn.Module):
        def forward(self, x): torch.rand(1); raise KeyboardInterrupt
    net[8] = Interrupted()
    for opts in ({}, dict(dtype='bf16')):
        before,rng = state(net),torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt): Teacher(net, **opts)(x, layers=['3'])
        assert_same_state(state(net), before)
        assert torch.equal(rng, torch.get_rng_state())
        assert not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()

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

# Inputs and outputs

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
    with pytest.raises(ValueError, match='teacher Sequential gives NaN or inf on its first batch, in its logits'):
        Teacher(broken)(x)
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
    (dict(models=[]), ValueError, 'models is empty'), (dict(models=nn.Linear), TypeError, 'call it to make one'),
    (dict(models='resnet18'), TypeError, "got 'resnet18'"),
    (dict(dtype='bf61'), ValueError, "unknown dtype 'bf61'.*'bf16'"),
    (dict(dtype=torch.int8), ValueError, "unknown dtype 'int8'"),
    (dict(weights=[1, 2]), ValueError, 'weights must be 1 positive'), (dict(weights=[0]), ValueError, 'positive'),
    (dict(tfms=[None]*2), ValueError, 'tfms has 2 entries for 1'),
    (dict(weights=[float('nan')]), ValueError, 'positive'), (dict(weights=[torch.inf]), ValueError, 'positive'),
    (dict(models=[Teacher(nn.Linear(2, 2))]), TypeError, 'a teacher goes alone'),
    (dict(select='logits'), TypeError, "select must be a function .* got 'logits'"),
    (dict(tfms=3), TypeError, 'tfms must be a function .* got 3'),
    (dict(normalize=(.5, [.2, 0.])), ValueError, r'std must be above 0, got \[0.2, 0.0\]')])
def test_bad_arguments(net, args, error, match):
    with pytest.raises(error, match=match): Teacher(**{'models': net, **args})

def test_an_unknown_layer(net, x):
    before = state(net)
    for opts,logits in (({}, True), ({}, False), (dict(compile=True), True), (dict(dtype='bf16', fuse=True), False)):
        with pytest.raises(ValueError, match="unknown layer of the teacher '3.bn3'.*'3.bn2'"):
            Teacher(net, **opts)(x, layers=['3.bn3'], logits=logits)
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
    Learner(dls, student, loss_func=CrossEntropyLossFlat(),
            cbs=KnowledgeDistillationCallback(teacher, loss, layers, layers)).fit(1, 1e-2)
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
    # four steps, the first batch's included, and none of them runs to the end
    assert ran.count('1')==4 and ran.count('2')==ran.count('5')==0
    off()
    assert_same_state(state(net), before)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('opts,tol',
                         [({}, 1e-4), (dict(dtype='bf16', channels_last=True, fuse=True), 0.02),
                          (dict(dtype='fp16'), 0.003), (dict(dtype='auto'), 0.03)])
def test_it_follows_the_batch_to_its_device(net, x, opts, tol):
    ref,rng = plain(net, x),torch.cuda.get_rng_state()
    pred,fm = Teacher(net, **opts)(x.cuda(), layers=['3'])
    assert pred.is_cuda and fm['3'].is_cuda
    assert rel_err(pred.cpu(), ref)<tol
    assert torch.equal(rng, torch.cuda.get_rng_state())
    assert next(net.parameters()).is_cuda==(not opts)

# Beginning and end of a fit

class Cache:
    "Stands for a `TeacherCache`: notes what it is asked, and asks the teacher itself"
    def __init__(self): self.log,self.teacher = [],None
    def attach(self, learn, teacher, layers, logits):
        self.log.append(('attach', layers, logits))
        self.teacher,self.question = teacher,dict(layers=layers, logits=logits)
    def ask(self, *xb):
        self.log.append('ask')
        return self.teacher.compute(*xb, **self.question)
    def detach(self): self.log.append('detach')

@pytest.fixture
def recorded(net, monkeypatch):
    from fasterai.distill.teacher import teacher as room
    monkeypatch.setattr(room, 'as_cache', lambda cache: cache)
    return Teacher(net, cache=Cache())

def test_a_cache_is_asked_between_begin_and_end_for_just_that_question(recorded, net, x):
    log,want = recorded.cache.log,plain(net, x)
    assert torch.equal(recorded(x, layers='3')[0], want) and log==[]
    recorded.begin(learner(make_net()), layers=['3'])
    assert torch.equal(recorded(x, layers=['3'])[0], want) and log==[('attach', ('3',), True), 'ask']
    recorded(x), recorded(x, layers=['3'], logits=False), recorded.compute(x, layers=['3'])
    assert log[2:]==[]                                        # other questions, and one past the cache
    recorded.end(), recorded.end()
    assert log[2:]==['detach'] and torch.equal(recorded(x, layers='3')[0], want) and log[3:]==[]

def test_a_second_begin_asks_directly_and_the_first_goes_on(recorded, x):
    "In another Learner, or with another question; the cache stays with the first"
    first,log = learner(make_net()),recorded.cache.log
    recorded.begin(first)
    for other,kw in (first, dict(layers=['1'], logits=False)), (learner(make_net()), {}):
        recorded.begin(other, **kw)
        recorded(x, **kw)
        assert log==[('attach', (), True)]
        if other is first: recorded(x) # the first question, from the cache
        recorded.end()
        assert log.pop()=='ask' if other is first else log==[('attach', (), True)]
    recorded(x), recorded.end(), recorded.end()
    assert log==[('attach', (), True), 'ask', 'detach']

def test_a_second_begin_with_the_same_question_shares_the_cache(recorded, x):
    first,log = learner(make_net()),recorded.cache.log
    recorded.begin(first), recorded.begin(first)
    recorded(x), recorded.end(), recorded(x), recorded.end()
    assert log==[('attach', (), True)]*2+['ask', 'detach', 'ask', 'detach']

class Asks(Callback):
    "Asks a teacher for each training batch, as a distillation does, and compares with `net`"
    def __init__(self, teacher, net, after=noop): self.teacher,self.net,self.after,self.worst = teacher,net,after,0.
    def before_train(self): self.teacher.begin(self.learn) if self.epoch==0 else None
    def after_batch(self):
        if not self.training: return
        self.worst = max(self.worst, rel_err(self.teacher.answer(*self.xb)[0], plain(self.net, self.x)))
        self.teacher.after_step(self.learn), self.after(self)
    def after_fit(self): self.teacher.end()

def test_a_recorded_teacher_in_a_fit():
    pytest.importorskip('fasterai.distill.teacher.recorded.recorder')
    net = make_net(3)
    teacher = Teacher(net, cache=TeacherCache(dtype=torch.float32))
    asks = Asks(teacher, net)
    learn = learner(make_net(3), data(32, 8), cbs=asks)
    learn.fit(3)
    assert asks.worst<1e-6 and teacher.cache.hits==64 and not teacher.fits
    def train_the_teacher(cb):
        with torch.no_grad(): net[8].bias.add_(.1)
    asks.after = train_the_teacher
    with pytest.warns(UserWarning, match='weights have changed'): learn.fit(2)
    assert asks.worst<1e-6

@pytest.mark.parametrize('how', ['', 'fp16', 'path'])
def test_a_recorded_teacher_of_two_callbacks_and_of_a_question_between(how, tmp_path, recwarn):
    net,KD = make_net(3),KnowledgeDistillationCallback
    def another(): return learner(make_net(3), data(32, 8))
    if how=='path': record(net, another(), tmp_path)
    cache = Recording(tmp_path) if how=='path' else TeacherCache()
    teacher = Teacher(net, dtype='fp16' if how=='fp16' else None, cache=cache)
    class Between(Callback):
        def after_batch(self):
            if not self.training or self.train_iter!=5: return
            suggest_weights(another(), KD(teacher, SoftTarget), n_batches=1)
            another().fit(1, cbs=KD(teacher, SoftTarget))
    another().fit(3, cbs=[KD(teacher, SoftTarget), KD(teacher, SoftTarget, weight=.1), Between()])
    asked = 0 if how=='path' else 32
    assert (cache.asked, cache.hits, cache.off)==(asked, 2*3*32-asked, None)
    assert not [o for o in recwarn if 'weights have changed' in str(o.message)]

def test_begin_without_a_cache_and_after_step_and_end_change_no_answer(net, x):
    teacher,before = Teacher(net),state(net)
    learn = learner(make_net())
    teacher.begin(learn, layers=['3'])
    teacher(x), teacher.after_step(learn), teacher.end(), teacher.end()
    assert torch.equal(teacher(x)[0], plain(net, x))
    assert_same_state(state(net), before)

def test_a_teacher_pickles_in_the_middle_of_a_fit(recorded, net, x):
    recorded.begin(learner(make_net()))
    recorded(x)
    recorded.cache.teacher = None
    other = pickle.loads(pickle.dumps(recorded))
    assert not other.fits and torch.equal(other(x)[0], plain(net, x))

def test_reset_reaches_the_state_of_a_network():
    class Counts(nn.Module):
        def __init__(self): super().__init__(); self.n = 0
        def reset(self): self.n = 0
        def forward(self, x): self.n += 1; return x*self.n
    teacher,x = Teacher([Counts(), nn.Identity()], average='none'),torch.ones(2, 3)
    assert [teacher(x)[0][0,0].item() for _ in range(2)]==[1., 1.5]
    teacher.reset()
    assert teacher(x)[0][0,0].item()==1.


# Teachers that stay where they are

class EightBit(nn.Sequential):
    def to(self, *args, **kwargs): raise ValueError("`.to` is not supported for `8-bit` models")

def test_a_teacher_that_cannot_be_moved_is_used_where_it_is(net, x):
    fixed = EightBit(*net)
    teacher = Teacher(fixed).to('cpu')
    teacher.begin(learner(make_net()))
    assert torch.equal(teacher(x)[0], plain(net, x))
    assert teacher.nets[0].home==torch.device('cpu')

def test_a_teacher_that_accelerate_has_placed(net, x):
    class Hook: pass
    net[3]._hf_hook = Hook()
    net.to = None                                          # calling it would fail
    teacher = Teacher(net)
    assert torch.equal(teacher(x)[0], plain(deepcopy(net), x)) and teacher.version()==(0,)
    maps = teacher(x, layers=['1'], logits=False)[1]       # runs to its end: hooks after the last layer must run
    assert list(maps)==['1']
    with pytest.raises(ValueError, match='accelerate has placed.*give Teacher no dtype'): Teacher(net, dtype='bf16')(x)
