"A student made of its teacher's layers: a copy, with contiguous names, that its library can build again"
import numpy as np
import pytest
import torch
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.keep_layers import keep_layers
from fasterai.distill.teacher.protocol import shared_with
from helpers import learner, same, state


def equal(a, b): return same(a.state_dict(), b.state_dict())


class Blocks(nn.Module):
    def __init__(self, n=4, d=6):
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(192, d))
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(nn.Linear(d, d) for _ in range(n))))
        self.head = nn.Linear(d, 3)
    def forward(self, x):
        x = self.stem(x)
        for f in self.encoder['layers']: x = x+f(x).relu()
        return self.head(x)


def test_a_deep_copy_of_the_layers_that_are_kept_under_contiguous_names():
    t = Blocks()
    before = state(t)
    s = keep_layers(t, 'encoder.layers', [0, 3])
    assert same(before, state(t)) and len(t.encoder['layers'])==4
    assert list(s.encoder['layers']._modules)==['0', '1'] and shared_with(s, [t])==[]
    for i,j in enumerate([0, 3]): assert equal(s.encoder['layers'][i], t.encoder['layers'][j])
    assert equal(s.stem, t.stem) and equal(s.head, t.head)
    x = torch.randn(2, 3, 8, 8)
    h = t.stem(x)
    for j in (0, 3): h = h+t.encoder['layers'][j](h).relu()
    assert torch.equal(s(x), t.head(h))


def test_numbers_from_the_end_and_another_order():
    t = Blocks()
    s = keep_layers(t, 'encoder.layers', [-1, 0])
    for i,j in enumerate([3, 0]): assert equal(s.encoder['layers'][i], t.encoder['layers'][j])
    assert equal(keep_layers(t, 'encoder.layers', iter(range(4))), t)


def test_a_wrapped_teacher_and_modes_are_as_they_were():
    t = Blocks().eval().requires_grad_(False)
    s = keep_layers(nn.DataParallel(t), 'encoder.layers', [1])
    assert type(s) is Blocks and not s.training and not any(p.requires_grad for p in s.parameters())


@pytest.mark.filterwarnings('ignore:.*weight_norm')
def test_weights_that_are_computed():
    t = Blocks()
    torch.nn.utils.weight_norm(t.head)
    x = torch.randn(2, 3, 8, 8)
    t(x).sum().backward()
    assert torch.equal(keep_layers(t, 'encoder.layers', range(4))(x), t(x))


def test_it_learns_from_its_teacher():
    t = Blocks().eval()
    learn = learner(keep_layers(t, 'encoder.layers', [0, 2]))
    before = state(t)
    learn.fit(1, cbs=KnowledgeDistillationCallback(t, SoftTarget))
    assert same(before, state(t))


@pytest.mark.parametrize('name, keep, exc, said', [
    ('encoder.layer', [0], ValueError, "did you mean 'encoder.layers'"),
    ('head', [0], ValueError, 'unknown list of layers'),
    ('encoder.layers', [4], ValueError, 'numbered from 0 to 3, got 4'),
    ('encoder.layers', [-5], ValueError, 'got -5'),
    ('encoder.layers', [0, -4], ValueError, 'different layers'),
    ('encoder.layers', [], ValueError, 'empty'),
    ('encoder.layers', 2, TypeError, 'numbers of layers'),
    ('encoder.layers', '02', TypeError, 'numbers of layers'),
    ('encoder.layers', [0.], TypeError, 'numbers of layers')])
def test_refused(name, keep, exc, said):
    with pytest.raises(exc, match=said): keep_layers(Blocks(), name, keep)


def test_timm():
    timm = pytest.importorskip('timm')
    small = dict(img_size=8, patch_size=4, embed_dim=12, num_heads=2)
    t = timm.models.vision_transformer.VisionTransformer(depth=4, **small)
    s = keep_layers(t, 'blocks', [0, 2])
    assert equal(s.blocks[1], t.blocks[2]) and s(torch.randn(2, 3, 8, 8)).shape==(2, 1000)
    timm.models.vision_transformer.VisionTransformer(depth=2, **small).load_state_dict(s.state_dict())


def test_torchvision():
    from torchvision.models import VisionTransformer
    def make(depth): return VisionTransformer(8, 4, depth, 2, 12, 24, num_classes=3)
    t = make(3)
    s = keep_layers(t, 'encoder.layers', [0, 2])
    make(2).load_state_dict(s.state_dict())
    assert list(s.encoder.layers._modules)==['encoder_layer_0', 'encoder_layer_1']


# Hugging Face

tiny = dict(vocab_size=50, num_hidden_layers=4, hidden_size=12, num_attention_heads=2, intermediate_size=12)


def test_hugging_face_builds_it_again_from_its_config():
    hf = pytest.importorskip('transformers')
    t = hf.BertForSequenceClassification(hf.BertConfig(**tiny, num_labels=3))
    s = keep_layers(t, 'bert.encoder.layer', [0, 3])
    assert (t.config.num_hidden_layers, s.config.num_hidden_layers, s.bert.config.num_hidden_layers)==(4, 2, 2)
    again = hf.BertForSequenceClassification(s.config)
    again.load_state_dict(s.state_dict())
    ids = torch.randint(50, (2, 7))
    assert torch.allclose(again.eval()(ids).logits, s.eval()(ids).logits)


def test_a_decoder_s_layers_know_their_numbers():
    hf = pytest.importorskip('transformers')
    few = dict(vocab_size=50, n_layer=4, n_embd=12, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    t = hf.GPT2LMHeadModel(hf.GPT2Config(**few)).eval()
    s = keep_layers(t, 'transformer.h', [1, 3])
    assert [b.attn.layer_idx for b in s.transformer.h]==[0, 1] and s.config.n_layer==2
    ids = torch.tensor([[3, 4]])
    def text(use_cache): return s.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use_cache, pad_token_id=0)
    assert torch.equal(text(True), text(False))


def test_lists_of_one_entry_per_layer_follow():
    hf = pytest.importorskip('transformers')
    if not hasattr(hf, 'ModernBertConfig'): pytest.skip('an old transformers')
    special = dict.fromkeys(('pad_token_id', 'bos_token_id', 'eos_token_id', 'cls_token_id', 'sep_token_id'), 0)
    t = hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**tiny, **special))
    s = keep_layers(t, 'model.layers', [0, 1, 3])
    if hasattr(t.config, 'layer_types'):
        assert s.config.layer_types==[t.config.layer_types[i] for i in (0, 1, 3)] and len(t.config.layer_types)==4
    type(t)(s.config).load_state_dict(s.state_dict())


@pytest.mark.parametrize('kind', ['t5', 'bart'])
@pytest.mark.parametrize('side', ['encoder', 'decoder'])
@pytest.mark.parametrize('other', [4, 3])
def test_of_encoder_and_decoder_the_right_number_is_told(kind, side, other, tmp_path):
    transformers = pytest.importorskip('transformers')
    n = {'encoder': 4, 'decoder': 4, {'encoder': 'decoder', 'decoder': 'encoder'}[side]: other}
    if kind=='t5':
        config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_heads=2,
                                       num_layers=n['encoder'], num_decoder_layers=n['decoder'])
        make,layers = transformers.T5ForConditionalGeneration,'{}.block'
    else:
        config = transformers.BartConfig(
            vocab_size=20, d_model=8, encoder_layers=n['encoder'], decoder_layers=n['decoder'], encoder_ffn_dim=8,
            decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2)
        make,layers = transformers.BartForConditionalGeneration,'model.{}.layers'
    small = keep_layers(make(config), layers.format(side), [0, 3]).eval()
    small.save_pretrained(tmp_path)
    again = make.from_pretrained(tmp_path).eval()
    for s in n: assert len(again.get_submodule(layers.format(s)))==(2 if s==side else n[s])
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(*(m(input_ids=ids, decoder_input_ids=ids).logits for m in (small, again)))


@pytest.mark.parametrize('keep', [np.arange(0, 4, 2), torch.tensor([0, 2]), iter([0, 2])], ids=type)
def test_numbers_of_any_kind(keep):
    t = Blocks()
    s = keep_layers(t, 'encoder.layers', keep)
    assert [equal(a, t.encoder['layers'][j]) for a,j in zip(s.encoder['layers'], (0, 2), strict=True)]==[True, True]
    with pytest.raises(TypeError, match='keep must be numbers'): keep_layers(t, 'encoder.layers', np.array([0., 2.]))
