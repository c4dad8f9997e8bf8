"Losses on embeddings, and RLD: golden numbers, plain loops, gradients, what is masked, what is refused"
import math
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.distill.loss.embeddings import Affinity, Cosine, Embedding, NoTask, Projected, Queue
from fasterai.distill.loss.refined import RLD
from test_losses import DTYPES, NoSync, finite, randn

# Computed by a program of its own, in float64
S = [[-0.4558, -0.2899, 0.5755, -0.614], [-0.7886, 0.5191, 0.2931, 0.1506], [0.0006, -0.6814, -0.5817, -0.4442]]
T = [[-0.3517, 0.3581, -0.0011, 0.8649], [0.1133, 0.3708, -0.5814, -0.7153], [-0.0269, -0.7448, -0.0816, 0.6618]]
PAST = [[-0.0097, -0.4141, -0.2257, 0.8817], [-0.623, 0.3916, -0.6689, 0.1053], [-0.3621, 0.8979, 0.0585, 0.2435],
        [-0.0317, 0.1586, 0.2437, -0.9563], [-0.8536, -0.4783, -0.0142, -0.2061], [-0.5391, -0.1043, -0.7413, 0.386]]
IMAGE_S = [[-0.929, -0.0185, -0.3697], [-0.701, 0.6757, -0.2281], [-0.4233, 0.5805, -0.6955], [-0.836, 0.0795, 0.543]]
TEXT_S = [[-0.2254, 0.087, 0.9704], [-0.9967, 0.0732, -0.0352], [-0.2973, -0.9087, -0.293], [0.9582, -0.1872, -0.2163]]
IMAGE_T = [[0.3732, -0.9115, 0.1727], [-0.8976, 0.0193, 0.4403], [0.8473, 0.437, -0.3017], [0.693, -0.198, 0.6932]]
TEXT_T = [[0.0862, 0.4887, -0.8682], [-0.237, 0.3735, 0.8969], [-0.2311, 0.3214, -0.9183], [-0.385, -0.5066, -0.7715]]
RLD_S = [[1.6986, -2.2455, 2.2862, 1.35, -0.9297], [2.1235, 2.8599, -1.3308, -1.969, -2.0793],
         [-1.1565, 0.1889, 2.2352, -0.7543, -2.1611], [0.1222, 2.4749, -0.6563, 1.2922, -0.4827]]
RLD_T = [[1.6813, -2.7143, 2.5739, 1.147, 1.1589], [-0.0552, -0.7631, -0.6176, 2.7755, 3.433],
         [2.1088, -1.1267, 0.8923, 3.9988, 0.478], [2.0188, -0.4428, -1.2027, -1.2844, -0.1673]]


def f64(rows): return torch.tensor(rows, dtype=torch.float64)
def close(got, want, tol=1e-9): assert math.isclose(got.item(), want, rel_tol=tol, abs_tol=tol/100), (got.item(), want)


def test_golden():
    close(Cosine(f64(S), f64(T)), 1.129741389775513)
    close(Cosine(f64(S), f64(T), smooth=0.1), 1.044008224756295)
    pairs = [torch.stack([f64(a), f64(b)], 1) for a,b in ((IMAGE_S, TEXT_S), (IMAGE_T, TEXT_T))]
    close(Embedding(*pairs), 1.4357637666666665/2, 1e-4) # rounded as below; images and texts are added there
    close(Affinity(*pairs, T=1/10, T_teacher=1/20), 6.618585256404485, 1e-4)


def test_golden_queue():
    queue = Queue(size=6, T=0.07).build(f64(S), f64(T)).eval()
    queue.past,queue.filled = F.normalize(f64(PAST)),torch.ones(6, dtype=torch.bool)
    close(queue(f64(S), f64(T)), 10.218051745900214, 1e-5) # rounded after they had been scaled to length 1


def test_golden_rld():
    y = torch.tensor([1, 0, 4, 2])
    rld = partial(RLD, f64(RLD_S), f64(RLD_T), y, T=4, T_alpha=4)
    close(rld(alpha=1, beta=0), 1.8743639129962104)
    close(rld(alpha=0, beta=1), 0.5641745041069786)
    close(rld(alpha=1, beta=8), 6.387759945852039)


# Plain loops

def length_one(x): return [v/math.sqrt(sum(o*o for o in x)) for v in x]
def dot(a, b): return sum(x*y for x,y in zip(a, b))
def softmax(z):
    e = [math.exp(v-max(z)) for v in z]
    return [v/sum(e) for v in e]
def kl(zt, zs): return sum(p*math.log(p/q) for p,q in zip(softmax(zt), softmax(zs)))
def mean(xs): return sum(xs)/len(xs)
def cosine(s, t): return mean([1-dot(length_one(a), length_one(b)) for a,b in zip(s, t)])
def embedding(s, t):
    return mean([(x-y)**2 for a,b in zip(s, t) for x,y in zip(length_one(a), length_one(b))])


def affinity(s, t, T=0.5, T_teacher=0.3):
    s,t = ([length_one(v) for v in x] for x in (s, t))
    def others(x, i, T): return [dot(x[i], v)/T for j,v in enumerate(x) if j!=i]
    return mean([kl(others(t, i, T_teacher), others(s, i, T)) for i in range(len(s))])


LOSSES = {'Cosine': (Cosine, cosine), 'Embedding': (Embedding, embedding),
          'Affinity': (partial(Affinity, T=0.5, T_teacher=0.3), affinity)}
every_loss = pytest.mark.parametrize('name', LOSSES)


@every_loss
@pytest.mark.parametrize('dtype', DTYPES)
def test_value(name, dtype):
    loss,slow = LOSSES[name]
    s,t = (randn(5, 7, seed=i, dtype=DTYPES[dtype][0]) for i in (1, 2))
    got,grad = finite(loss, s, t)
    close(got, slow(s.double().tolist(), t.double().tolist()), max(DTYPES[dtype][1], 1e-5 if dtype!='f64' else 0))
    assert got.dtype==(torch.float64 if dtype=='f64' else torch.float32) and grad.dtype==s.dtype


@every_loss
def test_gradient_and_who_learns(name):
    loss,s,t = LOSSES[name][0],randn(4, 5).requires_grad_(),randn(4, 5, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda s: loss(s, t), s)
    loss(s, t).backward()
    assert s.grad.any() and t.grad is None


@every_loss
def test_autocast_changes_nothing(name):
    loss,s,t = LOSSES[name][0],randn(4, 5).float(),randn(4, 5, seed=1).float()
    def value_and_grad(enabled):
        x = s.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled): value = loss(x, t)
        return value, torch.autograd.grad(value, x)[0]
    for a,b in zip(value_and_grad(False), value_and_grad(True)): assert torch.equal(a, b)


@every_loss
def test_a_mask_leaves_out(name):
    loss,s,t,mask = LOSSES[name][0],randn(6, 5),randn(6, 5, seed=1),torch.tensor([1, 0, 1, 1, 0, 1])
    on = mask>0
    got,grad = finite(loss, s, t, mask=mask)
    torch.testing.assert_close(got, loss(s[on], t[on]))
    assert not grad[~on].any() and grad[on].any()
    for junk in (7., math.nan):
        again,same = finite(loss, s.masked_fill(~on[:, None], junk), t.masked_fill(~on[:, None], -junk), mask=mask)
        assert torch.equal(again, got) and torch.equal(same, grad)
    value,grad = finite(loss, s, t, mask=mask*0)
    assert value==0 and not grad.any()
    with pytest.raises(ValueError, match='mask of shape'): loss(s, t, mask=mask[:3])


def test_tokens_and_pairs_have_masks_too():
    s,t,mask = randn(2, 3, 5),randn(2, 3, 5, seed=1),torch.tensor([[1, 1, 0], [1, 0, 0]])
    for loss in (Cosine, partial(Cosine, smooth=0.3), Embedding):
        torch.testing.assert_close(loss(s, t, mask=mask), loss(s[mask>0], t[mask>0]))
    s,t,mask = randn(4, 2, 5),randn(4, 2, 7, seed=1),torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(Affinity(s, t, mask=mask), Affinity(s[mask>0], t[mask>0]))


@every_loss
def test_limits(name):
    loss,s,t = LOSSES[name][0],randn(5, 6).float(),randn(5, 6, seed=1).float()
    same,grad = finite(partial(Affinity, T=0.5) if name=='Affinity' else loss, s, s)
    assert same==0 and grad.abs().max()<1e-5
    torch.testing.assert_close(loss(1e3*s, 1e-3*t), loss(s, t))        # the length is nothing to them
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(s[order], t[order]), loss(s, t))
    for a,b in ((0*s, t), (s, 0*t), (0*s, 0*t)): finite(loss, a, b)       # dead ones
    for scale in (1e-4, 1e3): finite(loss, (scale*s).half(), (scale*t).half())
    value,_ = finite(loss, s[:1], t[:1])
    assert name!='Affinity' or value==0                                 # nobody to be near to
    with NoSync(): loss(s.requires_grad_(), t, mask=torch.ones(5)).backward()
    assert pickle.loads(pickle.dumps(loss))(s, t)==loss(s, t)


def test_a_turn_and_another_width_are_nothing_to_affinity():
    s = randn(6, 4)
    turn,_ = torch.linalg.qr(randn(4, 4, seed=3))
    close(Affinity(s@turn, s), 0, 1e-12)
    torch.testing.assert_close(Affinity(s, F.pad(s, (0, 3))), Affinity(s, s))


@pytest.mark.parametrize('loss,name', [(Cosine, 'Cosine'), (Embedding, 'Embedding'), (Queue(), 'Queue()')])
def test_another_width_is_refused_with_the_remedy(loss, name):
    with pytest.raises(ValueError) as e: loss(randn(4, 16), randn(4, 64))
    for part in (f'Projected({name})', 'nn.Linear(16, 64)', 'Affinity', '16 features', "teacher's 64"):
        assert part in str(e.value)


built = Projected(Cosine).build(randn(4, 5), randn(4, 5))

@pytest.mark.parametrize('loss', [Cosine, Embedding, Affinity, Queue(), built])
def test_other_shapes_are_refused(loss):
    x = randn(4, 5)
    with pytest.raises(ValueError, match='pool maps first'): loss(randn(4, 5, 2, 2), x)
    with pytest.raises(ValueError, match='pool maps first'): loss(x[:, 0], x[:, 0])
    with pytest.raises(ValueError, match=r'same samples, got pred \(3, 5\) and teacher_pred \(4, 5\)'): loss(x[:3], x)
    with pytest.raises(TypeError, match='teacher_pred must be a tensor, got NoneType'): loss(x, None)
    with pytest.raises(ValueError, match='empty'): loss(x[:0], x[:0])


def test_arguments_are_checked():
    x = randn(4, 5)
    with pytest.raises(ValueError, match='smooth must be a share'): Cosine(x, x, smooth=2)
    for bad in (dict(T=0), dict(T_teacher=-1)):
        with pytest.raises(ValueError, match='T must be positive'): Affinity(x, x, **bad)
        with pytest.raises(ValueError, match='T must be positive'): Queue(**bad)
    tokens = randn(4, 3, 5)
    with pytest.raises(ValueError, match=r'two embeddings of each \(B, 2, D\)'): Affinity(tokens, tokens)
    with pytest.raises(ValueError, match='size must be 1 or more'): Queue(size=0)


# The queue

def test_a_queue_by_hand():
    queue,past = Queue(size=7, T=0.3, T_teacher=0.2),[]
    for i in range(5):
        s,t = randn(3, 4, seed=i),randn(3, 4, seed=i+50)
        past = ([length_one(v) for v in t.tolist()]+past)[:7]
        def scores(x, T): return [dot(length_one(x), p)/T for p in past]
        want = mean([kl(scores(b, 0.2), scores(a, 0.3)) for a,b in zip(s.tolist(), t.tolist())])
        close(queue(s, t), want, 1e-5)                              # the queue is float32
    assert queue.filled.all() and queue.past.dtype==torch.float32


def test_a_queue_teaches_the_student_alone_and_waits_for_nothing():
    queue,s,t = Queue(size=8),randn(3, 4).requires_grad_(),randn(3, 4, seed=1).requires_grad_()
    with NoSync(): queue(s, t).backward()
    assert s.grad.isfinite().all() and s.grad.any() and t.grad is None and not queue.past.requires_grad
    with torch.autocast('cpu', torch.bfloat16): a = deepcopy(queue)(s.float(), t.float())
    assert a==deepcopy(queue)(s.float(), t.float()) and a.dtype==torch.float32


def test_what_is_masked_is_no_part_of_the_queue():
    s,t,mask = randn(4, 5),randn(4, 5, seed=1),torch.tensor([1, 0, 1, 1])
    a,b = Queue(size=8),Queue(size=8)
    torch.testing.assert_close(a(s, t, mask=mask), b(s[mask>0], t[mask>0]))
    assert a.filled.sum()==3
    got,grad = finite(a, s, t, mask=mask)
    torch.testing.assert_close(got, b(s[mask>0], t[mask>0]))
    assert not grad[1].any()


def test_an_empty_queue_says_nothing_in_validation():
    queue = Queue(size=8).eval()
    value,_ = finite(queue, randn(3, 4), randn(3, 4, seed=1))
    assert value==0 and not queue.filled.any()
    with pytest.raises(ValueError, match='size=2 is less than a batch of 3'): Queue(size=2)(randn(3, 4), randn(3, 4))


def test_a_queue_is_saved_and_goes_on():
    a,b = Queue(size=8),Queue(size=8)
    for i in range(3): a(randn(3, 4, seed=i), randn(3, 4, seed=i+9))
    b.build(randn(1, 4), randn(1, 4)).load_state_dict(a.state_dict())
    s,t = randn(3, 4, seed=20),randn(3, 4, seed=21)
    assert a(s, t)==b(s, t) and deepcopy(a)(s, t)==a(s, t)


# Projections

def test_a_projection_is_made_once_without_touching_the_random_stream():
    torch.manual_seed(0)
    first = torch.randn(1)
    torch.manual_seed(0)
    loss = Projected(Cosine).build(randn(4, 3), randn(4, 6))
    assert torch.equal(torch.randn(1), first)
    p = loss.projection
    assert loss.build(randn(2, 3), randn(2, 6)) is loss and loss.projection is p
    with pytest.raises(ValueError, match=r'built for the widths \(3, 6\), got \(4, 6\)'): loss(randn(2, 4), randn(2, 6))
    with pytest.raises(RuntimeError, match='before the optimizer'): Projected(Cosine)(randn(2, 4), randn(2, 6))
    for bad in (Queue, 'Cosine', None):
        with pytest.raises(TypeError, match=r'such as Queue\(\)'): Projected(bad)


def gap(pred, teacher_pred): return (pred-teacher_pred).mean()

@pytest.mark.parametrize('inner', [Cosine, Embedding, Queue(size=9), gap])
def test_projected_is_the_loss_behind_the_map(inner):
    s,t = randn(4, 3).float().requires_grad_(),randn(4, 6, seed=1).float()
    loss = Projected(deepcopy(inner)).build(s, t)
    got = loss(s, t)
    torch.testing.assert_close(got, deepcopy(inner)(loss.projection(s), t))
    got.backward()
    assert s.grad.any() and loss.projection.weight.grad.any()
    with torch.autocast('cpu', torch.bfloat16): again = Projected(deepcopy(inner)).build(s, t).eval()
    again.projection = loss.projection
    with torch.autocast('cpu', torch.bfloat16): assert again(s, t).dtype==torch.float32


def test_projected_with_a_mask():
    s,t,mask = randn(4, 3),randn(4, 6, seed=1),torch.tensor([1, 0, 1, 1])
    loss = Projected(Cosine).build(s, t)
    torch.testing.assert_close(loss(s, t, mask=mask), loss(s[mask>0], t[mask>0]))


# No task

@pytest.mark.parametrize('out', [torch.full((3, 2), math.inf), torch.randn(3, 2, 4).half(), (torch.randn(3, 5), None)])
def test_no_task(out):
    z = (out[0] if isinstance(out, tuple) else out).requires_grad_()
    loss = NoTask(out, torch.arange(3))
    loss.backward()
    assert loss==0 and z.grad is not None and not z.grad.any()
    assert NoTask(out, reduction='none').tolist()==[0, 0, 0]
    assert pickle.loads(pickle.dumps(NoTask)) is NoTask
