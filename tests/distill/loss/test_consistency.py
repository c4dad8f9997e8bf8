"Consistency: the golden numbers, and what counts"
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fasterai.distill.loss.consistency import Consistency
from fasterai.distill.loss.terms import Term

f64 = torch.float64
weak = torch.tensor([[1.3237, -0.9926, 7.2923], [-0.7563, 0.3288, 4.7474], [-2.7277, -1.7749, 0.5628],
                     [-0.9896, -3.5783, -0.6146], [-1.0765, 1.8104, -4.9944], [-2.1005, 3.4542, 5.572]], dtype=f64)
strong = torch.tensor([[-0.9354, 2.187, 0.6535], [-2.6973, -7.4603, 2.7398], [3.3812, -4.5423, 4.9179],
                       [-1.2897, 7.8938, 1.8055], [-1.0076, 3.7132, 0.3334], [0.3875, 0.2284, -0.4654]], dtype=f64)
student = torch.tensor([[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381],
                        [-0.4987, 2.9242, -4.1203]], dtype=f64)
mean_teacher = torch.tensor([[-0.8335, -0.1125, -4.2724], [3.2805, -3.5869, -1.6835], [1.0058, -2.4906, -2.1159],
                             [-1.818, 1.1029, 4.5844]], dtype=f64)


def test_fixmatch():
    s,t = strong.clone().requires_grad_(),weak.clone().requires_grad_()
    loss = Consistency(s, t, threshold=0.9)
    assert loss.item()==pytest.approx(0.30182030468100246, abs=1e-9)
    loss.backward()
    assert s.grad.abs().sum(1).ne(0).tolist()==[True, True, False, False, True, False] and t.grad is None


@pytest.mark.parametrize('kind, want', [('mse', 0.38084185978187235), ('kl', 3.2410890977546467)])
def test_mean_teacher(kind, want):
    assert Consistency(student, mean_teacher, 0, kind).item()==pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize('threshold', [0, 0.5, 0.8, 0.95, 1])
@pytest.mark.parametrize('kind', ['label', 'mse', 'kl'])
def test_row_by_row(threshold, kind):
    torch.manual_seed(0)
    s,t = 2*torch.randn(2, 40, 5)
    total = 0
    for a,b in zip(s, t):
        p,q = b.softmax(0),a.softmax(0)
        if p.max()<threshold: continue
        total += {'label':-q[p.argmax()].log(), 'mse':((p-q)**2).mean(), 'kl':(p*(p/q).log()).sum()}[kind]
    torch.testing.assert_close(Consistency(s, t, threshold, kind), torch.as_tensor(total)/40, rtol=1e-4, atol=1e-6)


def test_pixels_and_tokens():
    s,t = 3*torch.randn(2, 2, 4, 3, 3)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 4) for x in (s, t)]
    torch.testing.assert_close(Consistency(s, t, 0.6), Consistency(*flat, 0.6))
    torch.testing.assert_close(Consistency(s.movedim(1, -1), t.movedim(1, -1), 0.6, axis=-1), Consistency(*flat, 0.6))


def test_padding_is_no_row_and_an_unsure_row_is():
    y = torch.tensor([0, 1, -1, 2, -1, 0])
    on = y>=0
    got = Consistency(strong, weak, 0.9, target=y, ignore_index=-1)
    torch.testing.assert_close(got, Consistency(strong[on], weak[on], 0.9))
    torch.testing.assert_close(Consistency(strong, weak, 0.9, mask=on), got)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    got = Consistency(strong.to(dtype), weak.to(dtype), 0.5)
    assert got.dtype==torch.float32
    torch.testing.assert_close(got, Consistency(strong.to(dtype).float(), weak.to(dtype).float(), 0.5))


def test_nothing_sure_is_0_with_a_graph():
    s = strong.clone().requires_grad_()
    loss = Consistency(s, 0*weak)
    loss.backward()
    assert loss.item()==0 and not s.grad.any()


def test_keywords():
    term = Term(partial(Consistency, threshold=0.8))
    assert repr(term)=='Consistency(threshold=0.8, kind=label)' and term.required=={'pred', 'teacher_pred'}
    with pytest.raises(ValueError, match='threshold must be a probability'): Consistency(strong, weak, 95)
    with pytest.raises(ValueError, match="kind 'hard'"): Consistency(strong, weak, kind='hard')
    with pytest.raises(ValueError, match='same shape'): Consistency(strong[:3], weak)
    with pytest.raises(TypeError, match=r'partial\(Consistency, threshold=0.9\)'): Consistency(threshold=0.9)
