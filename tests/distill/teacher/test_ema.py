"The average that follows the student: exactly, after real steps only, and as part of every way to fit"
import copy, pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import CancelBatchException, CancelFitException, CancelStepException, Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import Learner  # noqa: F401  with `lr_find` and `fine_tune`
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import Attention, FitNet, SoftTarget
from fasterai.distill.teacher.following import EMA, average_of, fitted_decay, step_towards
from helpers import Boom, data, flags, learner, n_hooks, net, same, state

values = [1., 0.5, -0.25, 2., 1.5]
warm = [1., 0.75, 0.4166666666666667, 0.8125, 0.95]
plain = [1., 0.95, 0.83, 0.947, 1.0023]


def close(a, b, tol=1e-6):
    "Parameters and buffers"
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=tol) for k in a)


class Number(nn.Module):
    "A network of one number, which is also its running statistic"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer('stat', torch.zeros(1, dtype=torch.float64))
        self.register_buffer('count', torch.zeros((), dtype=torch.long))
    def be(self, v, i): self.w.data.fill_(v); self.stat.fill_(v); self.count.fill_(i)
    def forward(self, x): return x*self.w


@pytest.mark.parametrize('is_warm,want', [(True, warm), (False, plain)])
@pytest.mark.parametrize('buffers', ['copy', 'average'])
def test_golden_averages(is_warm, want, buffers):
    student = Number()
    student.be(values[0], 0)
    averaged,got,stats = average_of(student, buffers),[values[0]],[values[0]]
    for i,v in enumerate(values[1:], 1):
        student.be(v, i)
        step_towards(averaged, student, 0.9, is_warm)
        got.append(averaged.module.w.item())
        stats.append(averaged.module.stat.item())
        assert averaged.module.count==i # counts are copied
    assert got==pytest.approx(want, abs=1e-12)
    assert stats==pytest.approx(want if buffers=='average' else values, abs=1e-12)


@pytest.mark.parametrize('dtype,ulp', [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize('buffers', ['copy', 'average'])
def test_small_steps_of_a_student_in_16_bits_count(dtype, ulp, buffers):
    "Against the same in float64; kept in 16 bits, an average of decay .999 stands still, or rounds at random"
    g,start = torch.Generator().manual_seed(1),nn.BatchNorm1d(16, dtype=dtype)
    student = copy.deepcopy(start)
    averaged,want = average_of(student, buffers),torch.cat([student.weight.detach(), student.running_mean]).double()
    for _ in range(200):
        for p in (student.weight.data, student.running_mean): p += (.01*torch.rand(16, generator=g)).to(dtype)
        step_towards(averaged, student, 0.999, warm=False)
        now = torch.cat([student.weight.detach(), student.running_mean]).double()
        want = .999*want + .001*now
    got = torch.cat([averaged.module.weight.detach(), averaged.module.running_mean]).double()
    if buffers=='copy': want[16:] = now[16:]
    assert averaged.module.weight.dtype==dtype and (want[:16]-1).min()>.05
    assert ((got-want).abs()<=.51*ulp*2*want.abs()+1e-6).all()
    averaged.module.weight.data.fill_(3.) # by hand: it goes on from there
    step_towards(averaged, student, 0.5, warm=False)
    half = 1.5+.5*student.weight.detach().double()
    assert torch.allclose(averaged.module.weight.detach().double(), half, atol=4*ulp)


def test_a_student_that_is_cast_on_the_way_is_followed():
    for a,b in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        student = nn.Linear(4, 4, dtype=a)
        averaged = average_of(student)
        want = .75*student.weight.detach().double()
        student.to(b).weight.data *= 2
        step_towards(averaged, student, 0.75, warm=False)
        want += .25*student.weight.detach().double()
        assert averaged.module.weight.dtype==a and (averaged.module.weight-want).abs().max()<4e-3


def moved(student, steps=5):
    "Its average after small steps, and the same in float64"
    averaged,want = average_of(student),student.weight.detach().double()
    return _more(averaged, student, want, steps)

def _more(averaged, student, want, steps=5, decay=0.99):
    for _ in range(steps):
        with torch.no_grad(): student.weight += 0.02
        step_towards(averaged, student, decay, warm=False)
        want = decay*want.cpu() + (1-decay)*student.weight.detach().double().cpu()
    return averaged,want

def fine(averaged, i=0):
    "What it is of, in float64"
    return averaged.module.weight.detach().double().cpu() + averaged.state_dict()[f'rest_{i}'].double().cpu()


def test_files_of_an_average_in_16_bits_and_in_32_and_of_before_load_into_each_other():
    ones = {dtype:nn.Linear(4, 4, bias=False, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    for a in ones.values(): a.weight.data.fill_(1.)
    saved = {dtype:moved(copy.deepcopy(o))[0].state_dict() for dtype,o in ones.items()}
    saved['before'] = {k:v for k,v in saved[torch.bfloat16].items() if k in ('n_averaged', 'module.weight')}
    assert ['rest_0' in o for o in saved.values()]==[True, True, False, False]
    for file in saved.values():
        keys = [*file]
        for dtype,student in ones.items():
            averaged,_ = moved(copy.deepcopy(student), 3)
            averaged.load_state_dict(file)
            assert [*file]==keys and averaged.n_averaged==6
            rest = averaged.state_dict().get('rest_0')
            assert (rest is not None)==('rest_0' in file and dtype!=torch.float32)
            if rest is not None: assert torch.equal(rest, file['rest_0']) and rest is not file['rest_0']
            start = averaged.module.weight.detach().double() + (0 if rest is None else rest.double())
            averaged,want = _more(averaged, copy.deepcopy(student), start)
            got = averaged.module.weight.double() if dtype==torch.float32 else fine(averaged)
            assert torch.allclose(got, want, rtol=0, atol=1e-6)
    both = average_of(nn.BatchNorm1d(4, dtype=torch.bfloat16), 'average')
    step_towards(both, nn.BatchNorm1d(4, dtype=torch.bfloat16), 0.9)
    copied = average_of(nn.BatchNorm1d(4, dtype=torch.bfloat16))
    copied.load_state_dict(both.state_dict())
    assert [[k for k in o.state_dict() if 'rest' in k] for o in (both, copied)]==[
        ['rest_0', 'rest_1', 'rest_2', 'rest_3'], ['rest_0', 'rest_1']]


@pytest.mark.parametrize('was,now', [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
                                     (torch.float32, torch.bfloat16)], ids=str)
def test_a_callback_goes_on_from_a_file_of_before_and_of_another_dtype(was, now):
    def fit(dtype, state=None):
        class Cast(Callback):
            order = -50
            def before_batch(self): self.learn.xb = tuple(x.to(dtype) for x in self.xb)
        learn,kd = learner(net().to(dtype), cbs=Cast()),callback(EMA(0.9))
        if state is not None: kd.load_learned(state)
        learn.fit(1, cbs=kd)
        return kd
    state = fit(was).learned.state_dict()
    if was==now: state = {k:v for k,v in state.items() if '.module.' in k or 'n_averaged' in k}
    kd = fit(now, state)
    assert kd.teacher._n==9 and {p.dtype for p in kd.teacher.model.parameters()}=={now}


def test_an_average_in_16_bits_that_is_moved_or_cast_alone_goes_on():
    "As a teacher that goes to the student's device; the meta device stands for another one"
    student = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    averaged,_ = moved(student)
    there,elsewhere = copy.deepcopy(averaged),copy.deepcopy(student).to('meta')
    there.module.to('meta')
    step_towards(there, elsewhere, 0.9)
    assert there.n_averaged==7 and {o.device.type for o in (there.module.weight, there.rest_0)}=={'meta'}
    for cast in (lambda o: o.half(), lambda o: o.module.half()):
        other,copied = copy.deepcopy(averaged),copy.deepcopy(student).half()
        cast(other)
        other,want = _more(other, copied, other.module.weight.detach().double() + other.rest_0.double())
        assert other.module.weight.dtype==torch.float16 and (fine(other)-want).abs().max()<1e-6
    averaged.module.float()
    step_towards(averaged, student.float(), 0.9)
    assert [*averaged.state_dict()]==['n_averaged', 'module.weight'] # nothing is lost in 32


def test_only_what_is_averaged_and_trains_in_16_bits_has_a_rest():
    layers = [nn.Linear(2, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False), nn.Linear(2, 2, bias=False),
              nn.BatchNorm1d(2, dtype=torch.bfloat16)]
    for buffers,want in [('copy', [2, 3]), ('average', [2, 3, 4, 5])]:
        student = copy.deepcopy(nn.Sequential(*layers))
        averaged = average_of(student, buffers)
        def places(): return [int(k[5:]) for k in averaged.state_dict() if 'rest' in k]
        assert places()==[]
        step_towards(averaged, student, 0.9)
        assert places()==want
        student[0].requires_grad_() # unfrozen on the way, and frozen again: it goes on
        step_towards(averaged, student, 0.9)
        with torch.no_grad(): student[0].weight += 1
        start = averaged.module[0].weight.detach().clone()
        for on in (True, False):
            student[0].requires_grad_(on)
            step_towards(averaged, student, 0.5, warm=False)
        assert sorted(places())==[0, *want]
        assert torch.allclose(averaged.module[0].weight, start+0.75, atol=2**-7)


def test_a_step_of_16_bits_asks_for_the_tensors_together():
    "Of a hundred more parameters each costs few calls more, and of 32 bits only those that PyTorch makes"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.n += 1
            return f(*args, **(kwargs or {}))
    def calls(n, dtype):
        student = nn.Sequential(*(nn.Linear(2, 2, bias=False, dtype=dtype) for _ in range(n)))
        averaged = average_of(student)
        for _ in range(2): # the first makes the rests
            with Count() as count: step_towards(averaged, student, 0.9)
        return count.n
    more = {dtype:(calls(110, dtype)-calls(10, dtype))/100 for dtype in (torch.float32, torch.bfloat16)}
    assert more=={torch.float32: 0, torch.bfloat16: 2} # two empty tensors


def by_hand(model, steps, decay, is_warm=True, buffers='copy', T=4., lr=0.05, mode='eval'):
    "Student and average after SGD on cross-entropy and T² times the KL divergence to the average"
    model,average = copy.deepcopy(model).train(),copy.deepcopy(model).eval()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    dls,done = learner(model).dls,0
    while done<steps:
        for x,y in dls.train:
            z = model(x)
            with torch.no_grad(): zt = copy.deepcopy(average).train(mode=='train')(x)
            kl = F.kl_div(F.log_softmax(z/T, 1), F.log_softmax(zt/T, 1), reduction='batchmean', log_target=True)
            opt.zero_grad()
            (F.cross_entropy(z, y) + T**2*kl).backward()
            opt.step()
            done += 1
            m = min(done/(done+1), decay) if is_warm else decay
            with torch.no_grad():
                for a,p in zip(average.parameters(), model.parameters()): a.mul_(m).add_(p, alpha=1-m)
                for a,b in zip(average.buffers(), model.buffers()):
                    if buffers=='average' and b.is_floating_point(): a.mul_(m).add_(b, alpha=1-m)
                    else: a.copy_(b)
            if done==steps: break
    return model,average


def callback(ema=None, **kwargs):
    "Cross-entropy, and the divergence times the square of the temperature"
    weights = dict(weight=1., task_weight=1.)
    return KD(EMA() if ema is None else ema, partial(SoftTarget, T=4), **{**weights, **kwargs})


class Stop(Callback):
    "Ends the training after `n` steps"
    order = 99
    def __init__(self, n): self.n = n
    def after_step(self):
        self.n -= 1
        if self.n==0: raise CancelFitException()


@pytest.mark.parametrize('args', [dict(decay=0.8), dict(decay=0.8, warm=False), dict(decay=0.7, buffers='average')],
                         ids=str)
def test_ten_steps_are_those_of_a_loop_by_hand(args):
    model = net()
    learn,kd = learner(copy.deepcopy(model), wd=0.),callback(EMA(**args))
    learn.fit(3, cbs=[kd, Stop(10)])
    want,average = by_hand(model, 10, args['decay'], args.get('warm', True), args.get('buffers', 'copy'))
    assert close(learn.model, want) and close(kd.teacher.model, average)


def test_the_divergence_is_times_the_square_of_the_temperature():
    learn,kd = learner(),callback(EMA(0.9))
    learn.fit(1, cbs=kd)
    x,y = learn.dls.valid.one_batch()
    learn.model.eval()
    task,parts = kd.terms_on(learn, (x,), (y,))
    z,zt = learn.model(x).double(),kd.teacher.model(x).double()
    kl = F.kl_div(F.log_softmax(z/4, 1), F.softmax(zt/4, 1), reduction='batchmean')
    torch.testing.assert_close(parts['SoftTarget'].double(), 16*kl, rtol=1e-3, atol=1e-6)
    assert kd.equation()=='1*task + 1*SoftTarget(T=4)'


def test_a_weight_of_0_is_plain_training_bit_for_bit():
    def run(cbs):
        torch.manual_seed(0)
        learn = learner(net(head=[nn.Dropout(0.5)]), opt_func=Adam)
        learn.fit(2, cbs=cbs)
        return state(learn.model)
    kd = KD(EMA(), weight=0.)
    a = run(kd)
    assert same(a, run(None)) and kd.teacher._n==9 and not same(a, state(kd.teacher.model))


def test_the_average_is_a_network_of_its_own():
    learn,kd = learner(),callback()
    learn.fit(1, cbs=kd)
    m = kd.teacher.model
    assert type(m) is type(learn.model) and not any(o.training for o in m.modules())
    assert all(p.requires_grad and p.grad is None for p in m.parameters()) and not n_hooks(m)
    mine,others = ({p.data_ptr() for p in o.state_dict().values()} for o in (m, learn.model))
    assert not mine & others
    before = state(m)
    learn.fit(1)
    assert same(before, state(m)) # it follows in fits of its callback only
    other = learner(m)
    other.fit(1)                   # and trains on by itself
    assert not same(before, state(m))
    pickle.dumps(m)


def test_no_gradient_reaches_it_and_no_optimizer_has_it():
    seen = []
    class Look(Callback):
        order = 99
        def before_step(self):
            ours = {id(p) for p in kd.teacher.model.parameters()}
            seen.append((any(p.grad is not None or p.requires_grad for p in kd.teacher.model.parameters()),
                         any(id(p) in ours for ps in self.learn.opt.param_lists for p in ps),
                         kd.teacher.model.training))
    kd = callback()
    learner().fit(2, cbs=[kd, Look()])
    assert len(seen)==8 and not any(any(o) for o in seen)


# --- the number of steps ------------------------------------------------------

def test_the_decay_is_fitted_to_the_fit_and_said_once(capsys):
    assert fitted_decay(120)==pytest.approx(1-10/120)
    learn,kd = learner(dls=data(n=320)),callback()
    learn.logger = print
    for _ in range(2): learn.fit(4, 0., cbs=[kd, Stop(2)])
    assert kd.teacher.in_force==fitted_decay(160)==0.9375
    said = [o for o in capsys.readouterr().out.split('\n') if o.startswith('EMA')]
    assert said==['EMA: decay 0.938, fitted to 160 steps']
    assert kd.teacher.decay is None and callback(EMA(0.5)).teacher.in_force==0.5


def test_accumulated_gradients_move_it_once_a_real_step(capsys):
    learn,kd = learner(dls=data(n=64, bs=4)),callback()
    steps = []
    class Count(Callback):
        def after_step(self): steps.append(1)
    learn.logger = print
    learn.fit(1, cbs=[kd, GradientAccumulation(8), Count()])
    assert len(steps)==8 and kd.teacher._n==9 and 'fitted to 8 steps' in capsys.readouterr().out


def test_a_step_that_is_left_out_does_not_move_it():
    class Overflow(Callback):
        "As fastai's `MixedPrecision` does when gradients are not finite"
        order = 50
        def before_step(self):
            if self.learn.iter%2: raise CancelStepException()
    learn,kd,second = learner(),callback(),KD(EMA(0.5), weight=0.)
    learn.fit(2, cbs=[kd, second, Overflow()])
    assert kd.teacher._n==second.teacher._n==5
    learn,kd = learner(),callback()
    learn.fit(1, cbs=[kd, Boom('before_step', CancelBatchException(), at=0)])
    assert kd.teacher._n==1


# --- ways to fit --------------------------------------------------------------

def test_lr_find_leaves_no_trace(tmp_path):
    def run(find):
        learn,kd = learner(opt_func=Adam, path=tmp_path),callback(EMA(0.9))
        learn.add_cb(kd)
        for i in range(2):
            if find:
                was = [copy.deepcopy(dl.rng) for dl in learn.dls.loaders]
                learn.lr_find(num_it=8, start_lr=1e-3, end_lr=10, stop_div=False, show_plot=False)
                for dl,rng in zip(learn.dls.loaders, was): dl.rng = rng
            learn.fit(1, 0.01)
        return learn.model,kd.teacher
    (a,ta),(b,tb) = run(False),run(True)
    assert same(state(a), state(b)) and same(state(ta.model), state(tb.model)) and ta._n==tb._n==9


def test_another_start_of_the_same_model_after_lr_find_begins_there(tmp_path):
    learn,kd = learner(path=tmp_path),callback(EMA(0.9))
    learn.add_cb(kd)
    learn.lr_find(num_it=6, show_plot=False)
    learn.model.load_state_dict(net(seed=7).state_dict())
    learn.fit(1, 0.)
    assert torch.equal(learn.model[0][0].weight, kd.teacher.model[0][0].weight)


def test_lr_find_within_a_fit_gives_it_back(tmp_path):
    class Find(Callback):
        order = 70
        def after_epoch(self):
            learn = self.learn
            if learn.epoch or not self.on: return
            self.on = False
            was = [copy.deepcopy(dl.rng) for dl in learn.dls.loaders]
            learn.lr_find(num_it=6, show_plot=False)
            for dl,rng in zip(learn.dls.loaders, was): dl.rng = rng
            learn.opt.set_hypers(lr=0.01)
    def run(on):
        find = Find()
        find.on = on
        learn,kd = learner(path=tmp_path),callback(EMA(0.9))
        learn.fit(2, 0.01, cbs=[kd, find])
        return state(kd.teacher.model),int(kd.teacher._n)
    (a,n),(b,m) = run(False),run(True)
    assert n==m==9 and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_fine_tune_is_one_average():
    learn,kd = learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())]),callback()
    seen = []
    class Models(Callback):
        def after_epoch(self): seen.append(kd.teacher.model)
    learn.fine_tune(2, 0.01, cbs=[kd, Models()])
    assert len(seen)==3 and seen[0] is seen[-1] and kd.teacher._n==13
    assert all(p.requires_grad for p in kd.teacher.model.parameters())


def test_a_fit_within_a_fit_moves_the_same_average():
    learn,kd = learner(),callback()
    class Inner(Callback):
        order = 70
        def after_epoch(self):
            if self.learn.epoch==0 and not vars(self).get('done'):
                self.done = True
                self.learn.fit(1)
    learn.add_cb(kd)
    learn.fit(1, cbs=Inner())
    assert kd.teacher._n==9 and kd.teacher.learn is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_resumed_is_uninterrupted(tmp_path, dtype):
    "In 16 bits to the bit, since the average is saved in 32 too"
    def start():
        return learner(net().to(dtype), opt_func=Adam, path=tmp_path, cbs=Cast(dtype)),callback(EMA())
    class Cast(Callback):
        order = -50
        def __init__(self, dtype): self.dtype = dtype
        def before_batch(self): self.learn.xb = tuple(x.to(self.dtype) for x in self.xb)
    class Order(Callback):
        "Each epoch's order depends on its number alone"
        order = -60
        def before_train(self): self.learn.dls.train.rng.seed(self.learn.epoch)
    learn,kd = start()
    learn.fit(4, 0.01, cbs=[kd, Order()])
    half,kd1 = start()
    class Checkpoint(Callback):
        order = 80
        def after_epoch(self):
            if self.learn.epoch!=1: return
            self.learn.save('half')
            torch.save(kd1.learned.state_dict(), tmp_path/'kd.pth')
            raise CancelFitException()
    half.fit(4, 0.01, cbs=[kd1, Order(), Checkpoint()])
    rest,kd2 = start()
    rest.create_opt()
    rest.load('half')
    kd2.load_learned(torch.load(tmp_path/'kd.pth'))
    rest.fit(4, 0.01, start_epoch=2, cbs=[kd2, Order()])
    assert close(rest.model, learn.model, 1e-7) and close(kd2.teacher.model, kd.teacher.model, 1e-7)
    assert kd2.teacher._n==kd.teacher._n==17


def test_a_copied_learner_goes_on_with_its_own_average():
    kd = callback(EMA(0.9))
    learn = learner(opt_func=Adam, cbs=kd)
    learn.fit(1)
    other = copy.deepcopy(learn)
    own = other.cbs[-1]
    assert own.teacher is not kd.teacher and own.teacher.model is None # until it is asked
    learn.fit(1)
    assert own.teacher.averaged is None
    other.fit(1)
    assert close(kd.teacher.model, own.teacher.model) and own.teacher._n==9
    fresh = kd.replace(weight=0.5)
    assert fresh.teacher.model is None and fresh.teacher.decay==0.9


def test_copies_and_pickles_of_the_teacher_itself():
    kd = callback()
    learner().fit(1, cbs=kd)
    for other in (copy.deepcopy(kd.teacher), pickle.loads(pickle.dumps(kd.teacher))):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(other(x)[0], kd.teacher(x)[0])
        assert other.student is None and other.model is not kd.teacher.model
        assert {id(m) for m in other.models}=={id(m) for m in other.voice.models}


def test_another_student_begins_anew_and_a_second_fit_at_once_is_refused():
    ema = EMA(0.9)
    kd = callback(ema)
    learner().fit(1, cbs=kd)
    first = ema.model
    learner(net(seed=3)).fit(1, cbs=kd)
    assert ema.model is not first and ema._n==5
    with pytest.raises(ValueError, match='one for each callback'):
        learner().fit(1, cbs=[callback(ema), callback(ema)])
    assert ema.learn is None
    learner().fit(1, cbs=callback(ema))


def test_a_student_swapped_in_the_middle_is_followed():
    class Swap(Callback):
        order = 20
        def after_epoch(self):
            if self.learn.epoch: return
            self.learn.model = net(seed=7)
            self.learn.create_opt()
    learn,kd = learner(),callback()
    learn.fit(2, cbs=[kd, Swap()])
    assert kd.teacher.student is learn.model and kd.teacher._n==4 # three more steps


@pytest.mark.parametrize('grown', [nn.BatchNorm2d(4), nn.Identity()], ids=['tensors', 'none'])
def test_a_student_that_gains_a_layer_in_the_middle_is_followed_from_there(grown):
    class Grow(Callback):
        order = 20
        def after_epoch(self):
            if self.learn.epoch: return
            self.learn.model[0] = nn.Sequential(*self.learn.model[0], grown)
            self.learn.create_opt()
            self.learn.opt.set_hypers(lr=.01)
    learn,kd = learner(),callback()
    learn.fit(2, cbs=[kd, Grow()])
    own = kd.teacher.model.state_dict()
    assert [*own]==[*learn.model.state_dict()] or not [*grown.parameters()]
    assert kd.teacher._n==(4 if [*grown.parameters()] else 9)


@pytest.mark.parametrize('persistent', [True, False])
def test_a_buffer_that_changes_its_shape_is_the_students_and_the_average_goes_on(persistent):
    class Seen(nn.Module):
        "Keeps what it said last, of a smaller batch at the end of an epoch"
        def __init__(self):
            super().__init__()
            self.net = net(4)
            self.register_buffer('said', torch.zeros(1, 3), persistent=persistent)
        def forward(self, x):
            self.said = self.net(x).detach()
            return self.net(x)
    kd = KD(EMA(), SoftTarget)
    learn = learner(Seen(), data(n=20))
    learn.fit(2, cbs=kd)
    ema = kd.teacher
    assert int(ema.averaged.n_averaged)==1+2*len(learn.dls.train)==7
    assert not close(ema.model.net, learn.model.net, tol=1e-4)


def test_the_best_epoch_is_loaded_and_the_average_is_left_alone(tmp_path):
    learn,kd = learner(metrics=accuracy, path=tmp_path),callback()
    learn.fit(3, cbs=[kd, SaveModelCallback(monitor='accuracy')])
    assert kd.teacher._n==13


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('out of memory')], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_step', 'after_step', 'before_validate'])
def test_clean_after_an_exception(event, exc):
    learn,kd = learner(),KD(EMA(), {SoftTarget: 1, FitNet: 1}, '0', '0')
    with pytest.raises(type(exc)): learn.fit(2, cbs=[kd, Boom(event, exc, at=0, order=20)])
    assert kd.session is None and kd.teacher.learn is None and kd.teacher.voice.fits==[]
    assert not n_hooks(learn.model, kd.teacher.model) and not flags(kd.teacher.model)[0].count(True)
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters())) and len(learn.metrics)==0
    learn.fit(1, cbs=kd)


# --- what it says, and of whom ------------------------------------------------

def test_feature_maps_of_the_average():
    learn,kd = learner(),KD(EMA(0.9), Attention, ['0', '1'], ['0', '1'], weight=1., task_weight=1.)
    learn.fit(1, cbs=kd)
    x = torch.randn(2, 3, 8, 8)
    pred,maps = kd.teacher(x, layers=('0', '1'), logits=False)
    assert pred is None and [*maps]==['0', '1'] and torch.equal(maps['0'], kd.teacher.model[0](x).detach())
    assert kd.log.history.distill_loss.iloc[-1]>0 and not n_hooks(kd.teacher.model)


def test_its_own_view_of_the_batch_and_its_own_logits():
    seen = []
    def half(x):
        seen.append(x.shape[-1])
        return x[..., ::2, ::2]
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return {'size': x.shape[-1], 'z': self.net(x)}
    def logits(o): return o['z']
    class CE(nn.Module):
        def forward(self, pred, y): return F.cross_entropy(pred['z'], y)
    kd = callback(EMA(tfms=half, select=logits), select=logits)
    learner(Pair(), loss_func=CE()).fit(1, cbs=kd)
    assert len(seen)==4 and set(seen)=={8}
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(kd.teacher(x)[0], kd.teacher.model(x[..., ::2, ::2])['z'].detach())


def test_hooks_stay_behind_and_what_shapes_the_weights_comes_along():
    with pytest.warns(FutureWarning): student = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    seen,learn = [],learner()
    student[1].register_forward_hook(lambda *_: seen.append(learn))
    x = torch.randn(4, 3)
    student(x).sum() # its weight has a graph now, which `deepcopy` refuses
    averaged = average_of(student)
    assert torch.allclose(averaged(x), student.eval()(x)) and len(seen)==2
    with torch.no_grad():
        for p in student.parameters(): p.add_(0.1)
    step_towards(averaged, student, 0.)
    assert torch.allclose(averaged(x), student(x)) and len(student[1]._forward_hooks)==1


def test_what_cannot_be_copied_or_asked_for_is_refused():
    with pytest.raises(ValueError, match='run a batch'): average_of(nn.Sequential(nn.LazyLinear(3)))
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            import threading
            self.lin,self.lock = nn.Linear(2, 2),threading.Lock()
    with pytest.raises(ValueError, match='a Locked, which cannot be copied'): average_of(Locked())
    placed = nn.Linear(2, 2)
    placed.hf_device_map = {}
    with pytest.raises(ValueError, match='accelerate'): average_of(placed)
    for bad in (dict(decay=-0.1), dict(decay=1.5), dict(decay=1, warm=False), dict(buffers='copied')):
        with pytest.raises(ValueError, match=[*bad][0]): EMA(**bad)
    with pytest.raises(ValueError, match='first fit'): EMA()(torch.ones(1))
    learn,kd = learner(),callback()
    learn.fit(1, cbs=kd)
    with pytest.raises(ValueError, match='share'): learner(kd.teacher.model).fit(1, cbs=kd)


def test_half_precision_and_wrappers():
    class OnCPU(MixedPrecision):
        "fastai's own is for CUDA"
        def before_fit(self):
            super().before_fit()
            self.autocast = torch.amp.autocast('cpu', dtype=torch.bfloat16)
    learn,kd = learner(cbs=OnCPU('bf16')),callback()
    learn.fit(1, cbs=kd)
    assert all(p.dtype==torch.float32 for p in kd.teacher.model.parameters()) and kd.teacher._n==5
    wrapped,kd = nn.DataParallel(net()),callback()
    learner(wrapped).fit(1, cbs=kd)
    assert type(kd.teacher.model) is nn.Sequential and kd.teacher._n==5


# --- in the student's mode ------------------------------------------------------

def test_in_train_mode_it_answers_by_the_batch_and_keeps_nothing():
    ema,seen = EMA(0.9, mode='train'),[]
    class Look(Callback):
        order = 99
        def after_batch(self):
            if not self.training: return
            before,modes = state(ema.model),flags(ema.model)
            (z,maps),stream = ema.answer(*self.xb, layers=['0']),torch.get_rng_state()
            by_hand = copy.deepcopy(ema.model).train()
            assert torch.equal(by_hand[0](self.x), maps['0']) and torch.equal(by_hand(self.x), z)
            assert not torch.allclose(ema.model(self.x), z) and not z.requires_grad
            assert same(before, state(ema.model)) and flags(ema.model)==modes and not n_hooks(ema.model)
            assert torch.equal(torch.get_rng_state(), stream)
            seen.append(z)
    learn = learner()
    learn.fit(2, cbs=[callback(ema), Look()])
    x = learn.dls.valid.one_batch()[0]
    assert len(seen)==8 and torch.equal(ema.answer(x)[0], ema.model(x)) # out of a fit in eval mode
    assert not any(m.training for m in ema.model.modules())


def test_in_train_mode_a_frozen_module_stays_in_eval_mode_and_dropout_drops():
    class Freeze(Callback):
        order = 98
        def before_batch(self): self.learn.model[0].eval()
    class Look(Callback):
        order = 99
        def after_batch(self):
            if not self.training: return
            _,maps = ema.answer(*self.xb, layers=['0', '5'])
            assert torch.equal(maps['0'], ema.model[0](self.x))
            zeros.append((maps['5']==0).float().mean().item())
    ema,zeros = EMA(0.9, mode='train'),[]
    learner(net(head=[nn.Identity(), nn.Dropout(0.5)])).fit(1, cbs=[callback(ema), Freeze(), Look()])
    assert 0.3<sum(zeros)/len(zeros)<0.7


def test_in_train_mode_ten_steps_are_those_of_a_loop_by_hand():
    model = net()
    learn,kd = learner(copy.deepcopy(model), wd=0.),callback(EMA(0.8, mode='train'))
    learn.fit(3, cbs=[kd, Stop(10)])
    want,average = by_hand(model, 10, 0.8, mode='train')
    assert close(learn.model, want) and close(kd.teacher.model, average)
    other,_ = by_hand(model, 10, 0.8)
    assert not close(learn.model, other)


def test_mean_teacher_as_published():
    "Two views, rows without labels, the mean squared difference of probabilities: as a loop has it"
    from fastai.losses import CrossEntropyLossFlat
    from fasterai.data.unlabelled import mix_unlabelled
    from fasterai.distill.loss.consistency import Consistency
    loose = torch.randn(24, 3, 8, 8)
    dls = mix_unlabelled(data(n=16, bs=4), [(x,) for x in loose], ratio=2)
    seen = []
    class Look(Callback):
        order = 99
        def after_pred(self):
            if self.training: seen.append([o.detach().clone() for o in (self.x, self.pred, self.y)])
    kd = KD(EMA(0.9, tfms=lambda x: x.flip(-1), mode='train'), partial(Consistency, kind='mse', threshold=0), weight=3.,
            task_weight=1.)
    learn = learner(net(), dls=dls, loss_func=CrossEntropyLossFlat(ignore_index=-100))
    average = copy.deepcopy(learn.model).train()
    learn.fit(1, cbs=[kd, Look()])
    x,z,y = seen[0]
    assert len(x)==12 and (y==-100).sum()==8
    want = F.mse_loss(z.softmax(1), average(x.flip(-1)).detach().softmax(1))
    assert kd.log.history.distill_loss[0]==pytest.approx(want.item(), rel=1e-4)


def test_an_unknown_mode_and_what_is_handed_on():
    with pytest.raises(ValueError, match="unknown mode 'trian'; did you mean 'train'"): EMA(mode='trian')
    assert EMA(mode='train').another().mode=='train'
    assert 'mode' not in repr(EMA()) and "mode='train'" in repr(EMA(mode='train'))
    kd = callback(EMA(0.9, mode='train'))
    learner().fit(1, cbs=kd)
    for other in (copy.deepcopy(kd.teacher), pickle.loads(pickle.dumps(kd.teacher))):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(other(x)[0], kd.teacher(x)[0])
