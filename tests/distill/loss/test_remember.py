"Losses against forgetting: the golden numbers, and what they leave alone"
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fasterai.distill.loss.remember import ICaRL, LessForget, LwF, PooledOutput, old_columns, weight_by_classes
from fasterai.distill.loss.terms import Term

f64 = torch.float64
old = torch.tensor([[-0.1039, -0.2224, 2.0836, -2.5135], [1.4908, -3.4221, -0.4117, -0.4691],
                    [2.2563, -0.0253, -1.2264, 2.7474]], dtype=f64)
new = torch.tensor([[-0.1839, -2.9267, 2.1636, -0.4787, -0.9823, -2.0045],
                    [1.8376, -2.2073, 1.253, -1.123, 0.0577, -0.4615],
                    [1.1755, 1.5046, -2.117, 2.1119, 1.4955, 2.1294]], dtype=f64)
f_old = torch.tensor([[0.667, 0.0258, -0.7776, 0.9486, 0.7017], [-1.0511, -0.3675, -1.1375, -1.3221, 1.7723],
                      [-0.3475, 0.6701, 0.3223, 0.0603, -1.0435]], dtype=f64)
f_new = torch.tensor([[1.3292, -0.77, -0.3163, -0.9908, -1.0708], [-1.4387, 0.5644, 0.2957, -1.6264, 0.2196],
                      [0.6788, 1.8893, 0.9615, 0.104, -0.4812]], dtype=f64)
m_old = torch.tensor([[[[0.2283, 1.0269, -0.8396, -0.5912], [-0.9569, -0.2223, -0.6199, 1.8379]],
                       [[-2.0532, 0.8686, -0.9207, -0.2323], [2.153, -1.3347, 0.0764, -1.2461]],
                       [[1.2023, -1.0499, 1.0566, -0.4197], [2.2948, -2.5945, 2.8228, 0.6809]]],
                      [[[-1.5777, -1.9763, 0.5333, -0.2909], [-0.5135, 1.9826, 0.226, -1.8399]],
                       [[1.6077, 0.3883, 0.3997, 0.4055], [0.217, -0.6334, 0.2466, -1.9395]],
                       [[0.1141, -1.8853, 0.2431, -0.7055], [0.3646, -0.503, -0.2258, -0.5655]]]], dtype=f64)
m_new = torch.tensor([[[[0.196, -1.9412, 0.7138, 0.6621], [-0.2289, 0.2718, -0.0291, -1.7596]],
                       [[-0.7943, 0.6226, 0.1593, -1.3143], [0.9563, -0.7961, -0.9252, -1.032]],
                       [[-0.5843, 2.7459, 0.4976, 2.0881], [0.0688, 0.2736, -0.9699, 1.0435]]],
                      [[[1.4584, 0.5826, 0.6395, 0.2136], [0.3016, 0.8103, 1.0333, -1.1565]],
                       [[-0.6405, -0.3823, -1.9238, 1.4791], [1.1326, 0.1931, -0.2663, -0.7374]],
                       [[0.291, 0.4135, -0.3855, -0.2534], [0.5832, -0.724, 0.0525, -1.3649]]]], dtype=f64)


def test_golden_numbers():
    assert LwF(new, old).item()==pytest.approx(4*0.10930537236752014, abs=1e-9)
    assert LessForget([f_new], [f_old]).item()==pytest.approx(0.6654765541529446, abs=1e-9)
    assert weight_by_classes(5, 50, 10)==pytest.approx(11.180339887498949)
    assert PooledOutput([m_new], [m_old]).item()==pytest.approx(0.8997296150902783, abs=1e-9)
    assert PooledOutput([f_new], [f_old]).item()==pytest.approx(1.1153185911638537, abs=1e-9)


def test_lwf_is_the_papers_cross_entropy_in_its_gradient():
    a,b = (new.clone().requires_grad_() for _ in range(2))
    LwF(a, old).backward()
    p,q = ((x.softmax(1)**.5) for x in (old, b[:, :4]))
    p,q = (x/x.sum(1, keepdim=True) for x in (p, q))
    ce = -(p*q.log()).sum(1).mean()
    assert ce.item()==pytest.approx(1.2370317920782814, abs=1e-9)
    ce.backward()
    torch.testing.assert_close(a.grad, 4*b.grad)


@pytest.mark.parametrize('loss', [LwF, ICaRL])
def test_old_columns_alone_get_a_gradient_and_the_teacher_none(loss):
    s,t = new.clone().requires_grad_(),old.clone().requires_grad_()
    loss(s, t).backward()
    assert s.grad[:, :4].ne(0).all() and s.grad[:, 4:].eq(0).all() and t.grad is None


@pytest.mark.parametrize('loss, maps', [(LessForget, (f_new, f_old)), (LessForget, (m_new, m_old)),
                                        (PooledOutput, (m_new, m_old)), (PooledOutput, (f_new, f_old))])
def test_maps(loss, maps):
    s,t = (x.clone().requires_grad_() for x in maps)
    loss({'a': s}, {'b': t}).backward()
    assert s.grad.abs().sum()>0 and t.grad is None
    same = maps[1].clone().requires_grad_()
    value = loss([same], [maps[1]])
    value.backward()
    assert value.abs()<1e-12 and same.grad.abs().max()<1e-6 # where a training starts, and no NaN
    last = [x.to(memory_format=torch.channels_last) if x.ndim==4 else x for x in maps]
    torch.testing.assert_close(loss(last[:1], last[1:]), loss(maps[:1], maps[1:]))
    with pytest.raises(ValueError): loss([s[:, :2]], [t])


def test_pixels_tokens_padding_and_masks():
    s,t = torch.randn(2, 6, 4, 4),torch.randn(2, 3, 4, 4)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (s, t)]
    y = torch.randint(0, 2, (2, 4, 4))
    for loss in LwF,ICaRL:
        torch.testing.assert_close(loss(s, t), loss(*flat))
        torch.testing.assert_close(loss(s.movedim(1, -1), t.movedim(1, -1), axis=-1), loss(*flat))
        on = y.flatten()==1
        want = loss(*(x[on] for x in flat))
        torch.testing.assert_close(loss(s, t, target=y, ignore_index=0), want)
        torch.testing.assert_close(loss(s, t, mask=y), want)
    rows = torch.tensor([True, False])
    for loss in LessForget,PooledOutput:
        torch.testing.assert_close(loss([m_new], [m_old], mask=rows), loss([m_new[:1]], [m_old[:1]]))
        part = torch.tensor([[[1, 1, 0, 0]]*2]*2)
        cut = [x[..., :2] for x in (m_new, m_old)]
        torch.testing.assert_close(loss([m_new], [m_old], mask=part), loss(cut[:1], cut[1:]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    for loss,(s,t) in (LwF, (new, old)), (ICaRL, (new, old)):
        assert loss(s.to(dtype), t.to(dtype)).item()==pytest.approx(loss(s, t).item(), rel=.02, abs=.02)
        assert loss(1e4*s, -1e4*t).isfinite()
    with torch.autocast('cpu', dtype=torch.bfloat16): # of the losses' own sums nothing is in half precision
        assert PooledOutput([m_new.float()], [m_old.float()]).item()==pytest.approx(0.89973, abs=1e-5)


def test_errors_and_terms():
    with pytest.raises(ValueError, match='the first of the student'): LwF(old, new)
    with pytest.raises(ValueError, match='one logit'): LwF(new, old[:, :1])
    with pytest.raises(ValueError, match='T must be positive'): LwF(new, old, T=0)
    with pytest.raises(TypeError, match="did you mean 'T'"): Term(partial(LwF, t=2))
    assert old_columns(new, old)[0].shape==old.shape
    assert Term(LwF).required=={'pred', 'teacher_pred'} and Term(PooledOutput).same_shape


def test_icarl_is_its_half_of_the_golden_mean():
    want = 0.7229062271208755
    yes = F.one_hot(torch.tensor([4, 5, 4]), 6)[:, 4:].to(f64)
    of_new = F.binary_cross_entropy_with_logits(new[:, 4:], yes, reduction='none').sum(1).mean()/6
    assert (ICaRL(new, old)+of_new).item()==pytest.approx(want, abs=1e-9)
