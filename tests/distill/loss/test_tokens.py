"Language models: divergences, padding and the teacher's likeliest tokens, by golden numbers"
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.loss.tokens import KINDS, TokenKD
from helpers import learner

# Computed in float64 by a slow and literal program, and by a second one
student = torch.tensor([[-3.7795, -0.8272, -1.5321, -1.8483, -2.8432, 1.6105, 2.2977],
                        [2.3389, -1.604, 1.445, 0.106, -2.363, -1.3523, -0.3325],
                        [0.9349, 0.6674, -1.6993, 0.1374, 0.0372, 2.6311, 2.3295],
                        [-0.6807, 0.1125, 0.4518, -0.7512, 1.1066, -2.7418, 1.9653],
                        [0.5774, -3.1946, -0.6741, -1.6336, 2.1594, 0.8583, -2.4961]], dtype=torch.float64)
teacher = torch.tensor([[1.3528, 3.0422, -1.0238, 2.3004, -1.1814, -1.5375, -0.67],
                        [0.186, -2.7551, 0.4558, -1.1803, -2.5939, -3.1961, -0.5948],
                        [-2.9031, -0.3997, -1.1055, 3.9169, -3.4097, 1.8269, -1.3838],
                        [-1.3431, 1.089, 4.4746, 0.3135, -3.2404, -0.9919, -2.0444],
                        [-4.3943, -0.5053, -2.1249, 3.6854, -1.0376, -2.1908, 2.8304]], dtype=torch.float64)
mask = torch.tensor([1, 1, 0, 1, 0])
golden = dict(forward=1.7435415847997737, reverse=2.691093841958375, jsd=0.351106365198344,
              skew=1.1483959378199324, skew_reverse=1.2154134662091032, tvd=0.6861129372314361)


def kd(mask=mask, **kwargs):
    "As texts of one token each"
    return TokenKD(student, teacher, mask=mask, **kwargs).item()


@pytest.mark.parametrize('kind', KINDS)
def test_golden(kind): assert kd(kind=kind)==pytest.approx(golden[kind], abs=1e-9)


def test_golden_of_more_settings():
    assert kd(kind='jsd', beta=0.1)==pytest.approx(0.13837442540294262, abs=1e-9)
    assert kd(topk=3)==pytest.approx(1.716716845764802, abs=1e-9)
    assert kd(topk=3, rest=False)==pytest.approx(0.26789842967756705, abs=1e-9)
    assert kd(T=2)==pytest.approx(2.7361469440317046, abs=1e-9)


def test_all_of_the_teacher_s_classes_are_no_top_k():
    for k in (7, 100): assert kd(topk=k)==kd() and kd(topk=k, rest=False)==kd()
    assert kd(topk=6)==pytest.approx(kd(), abs=1e-9) # the rest is one class then


def test_a_text_of_several_tokens_is_as_many_of_one():
    s,t = student.reshape(1, 5, 7),teacher.reshape(1, 5, 7)
    for kind in KINDS: assert TokenKD(s, t, kind, mask=mask[None]).item()==pytest.approx(golden[kind], rel=1e-5)
    assert TokenKD(s.mT, t.mT, axis=1, mask=mask[None]).item()==pytest.approx(golden['forward'], rel=1e-5)


def test_the_mean_is_over_tokens_and_labels_of_minus_100_are_padding():
    s,t = student.expand(3, 5, 7),teacher.expand(3, 5, 7)
    labels = torch.where(mask>0, 4, -100).expand(3, 5)
    assert TokenKD(s, t, target=labels).item()==pytest.approx(golden['forward'], rel=1e-5)
    assert TokenKD(s, t, target=labels, ignore_index=None).item()==pytest.approx(kd(mask=None), rel=1e-5)
    assert TokenKD(s, t, target=labels.fill_diagonal_(-100)*0-100)==0 # nothing counts


def test_shift():
    "Labels and mask say what stands at a position, and the logits before it foretell it"
    s,t = student[None],teacher[None]
    labels = torch.tensor([[-100, -100, 3, 2, -100]])
    at = torch.tensor([[0, 1, 1, 0]])
    same = TokenKD(s[:, :4], t[:, :4], mask=at)
    assert torch.equal(TokenKD(s, t, target=labels, shift=True), same)
    assert torch.equal(TokenKD(s, t, mask=torch.tensor([[1, 0, 1, 1, 0]]), shift=True), same)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('topk', [None, 2])
def test_gradients_reach_the_student_alone_and_padding_nobody(kind, topk):
    s,t = student.clone().requires_grad_(),teacher.clone().requires_grad_()
    TokenKD(s, t, kind, topk=topk, mask=mask).backward()
    assert t.grad is None
    assert s.grad[mask>0].abs().sum()>0 and not s.grad[mask==0].any() and s.grad.isfinite().all()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_computed_in_full(kind, dtype):
    s,t = student.to(dtype),teacher.to(dtype)
    want = TokenKD(s.double(), t.double(), kind)
    assert TokenKD(s, t, kind).item()==pytest.approx(want.item(), rel=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = TokenKD(s, t, kind)
    assert got.item()==pytest.approx(want.item(), rel=1e-5)


def test_equal_answers_cost_nothing_at_any_scale():
    for kind in KINDS: assert TokenKD(1e3*student, 1e3*student, kind).abs()<1e-6
    assert TokenKD(1e4*student, -1e4*student, 'reverse').isfinite()


class LM(nn.Module):
    "The smallest language model: each token foretells the next one"
    def __init__(self, d=8, c=12):
        super().__init__()
        self.emb,self.head = nn.Embedding(c, d),nn.Linear(d, c)
    def forward(self, x): return self.head(self.emb(x))


def test_in_a_training_on_texts_the_callback_takes_axis_and_labels_from_the_task():
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.losses import CrossEntropyLossFlat
    from torch.utils.data import TensorDataset
    g = torch.Generator().manual_seed(0)
    x = torch.randint(12, (16, 6), generator=g)
    y = torch.where(torch.rand(16, 6, generator=g)<0.4, -100, x)
    dls = DataLoaders(*[TfmdDL(TensorDataset(x, y), bs=4, num_workers=0) for _ in range(2)], device='cpu')
    torch.manual_seed(0)
    t,s = LM(16).eval(),LM()
    cb = KD(t, partial(TokenKD, kind='reverse'), weight=1, task_weight=0)
    learn = learner(s, dls, cbs=cb, loss_func=CrossEntropyLossFlat(axis=-1))
    _,parts = cb.terms_on(learn, (x,), (y,))
    keep = y!=-100
    p,q = s(x)[keep].log_softmax(-1),t(x)[keep].log_softmax(-1)
    want = F.kl_div(q, p, reduction='batchmean', log_target=True).item()
    assert parts['TokenKD'].item()==pytest.approx(want, rel=1e-5)
    learn.fit(8, lr=0.5)
    assert cb.terms_on(learn, (x,), (y,))[1]['TokenKD']<parts['TokenKD']


@pytest.mark.parametrize('kwargs, said', [
    (dict(kind='forwards'), "did you mean 'forward'"), (dict(beta=1.5), 'beta'), (dict(skew=0), 'skew'),
    (dict(topk=0), 'topk'), (dict(T=0), 'T must be positive'), (dict(shift=True), '(B, N, C)')])
def test_refused(kwargs, said):
    with pytest.raises(ValueError) as e: TokenKD(student, teacher, **kwargs)
    assert said in str(e.value)


def test_unequal_vocabularies_are_refused():
    with pytest.raises(ValueError, match='same shape'): TokenKD(student, teacher[:, :6])
    with pytest.raises(TypeError, match="did you mean 'topk'"): TokenKD(student, teacher, topK=3)
