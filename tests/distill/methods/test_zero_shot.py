"A student with text embeddings where its head would be"
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.zero_shot import ZeroShot
from helpers import data, learner, net

texts = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def student(): return net()[:-1]


def test_logits_are_scaled_cosines():
    body,x = student().eval(),torch.randn(5, 3, 8, 8)
    got = ZeroShot(body, 5*texts, scale=20)(x)
    torch.testing.assert_close(got, 20*F.cosine_similarity(body(x)[:, None], texts[None], dim=-1))


def test_half_precision_is_no_matter():
    class Half(nn.Module):
        def forward(self, x): return x.bfloat16(), 'more'
    x = torch.randn(4, 8)
    want = ZeroShot(nn.Identity(), texts)(x.bfloat16().float())
    for got in (ZeroShot(Half(), texts)(x), ZeroShot(nn.Identity(), texts.half()).float()(x.bfloat16())):
        assert got.dtype==torch.float32
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(ZeroShot(Half(), texts)(x), want)


def test_it_is_a_classifier_for_everything_that_takes_one():
    torch.manual_seed(0)
    zero = ZeroShot(student(), texts, scale=10)
    learn = learner(zero, data(y=torch.arange(32)%3))
    assert learn.get_preds()[0].shape==(32, 3)
    was = zero.texts.clone()
    learn.fit(1)
    assert torch.equal(zero.texts, was) and not any('texts' in n for n,_ in zero.named_parameters())
    again = pickle.loads(pickle.dumps(zero.eval()))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), zero(x)) and 'texts' in zero.state_dict()
    other = ZeroShot(student(), torch.randn(3, 8), scale=10).eval()
    other.load_state_dict(copy.deepcopy(zero.state_dict()))
    assert torch.equal(other(x), zero(x)) and SoftTarget(other(x), zero(x))==0


@pytest.mark.parametrize('bad,said', [
    (texts[0], r'got \(8,\)'), (texts[:1], 'two classes'), (torch.randn(3, 4, 8), 'mean over several prompts'),
    (torch.cat([texts, 0*texts[:1]]), r'classes \[3\] are 0 or infinite'),
    (texts.masked_fill(texts>0, float('nan')), '0 or infinite')])
def test_texts_are_checked(bad, said):
    with pytest.raises(ValueError, match=said): ZeroShot(student(), bad)


def test_other_bad_input():
    with pytest.raises(TypeError, match='must be a tensor'): ZeroShot(student(), [[1., 2.]])
    for scale in (0, -1, float('inf'), float('nan')):
        with pytest.raises(ValueError, match='scale must be positive'): ZeroShot(student(), texts, scale=scale)
    with pytest.raises(ValueError, match=r'\(2, 8\) and the texts. \(3, 5\).*loss.projection'):
        ZeroShot(student(), texts[:, :5])(torch.randn(2, 3, 8, 8))
