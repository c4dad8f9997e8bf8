"Comparisons and pictures: numbers of constructed predictions, every kind of learner, and nothing left behind"
import re
from copy import deepcopy
from functools import partial

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import CategoryMap, Normalize
from fastai.learner import AvgMetric, Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import DiceMulti, F1Score, R2Score, RocAucBinary, accuracy, accuracy_multi, error_rate, mse
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.data.digits import digits_dls, digits_net
from fasterai.core.stats import mcnemar
from fasterai.distill.study.compare import (Comparison, attention_map, compare, plot_attention, plot_compare,
                                            plot_similarity, plot_soft_targets)
from fasterai.distill.study.report import save_report
from fasterai.distill.teacher.teacher import Teacher
from classes import named
from helpers import net

N = 60

class Given(nn.Module):
    "Answers what it was told: the input is the sample's number"
    def __init__(self, out): super().__init__(); self.out = nn.Parameter(out)
    def forward(self, i): return self.out[i.long()]

def _dls(y, bs=16, **kw):
    ds = TensorDataset(torch.arange(len(y)).float(), y)
    return DataLoaders(*(TfmdDL(ds, bs=bs, shuffle=s, num_workers=0, **kw) for s in (True, False)), device='cpu')

def _given(out, y, loss_func=None, metrics=accuracy, dls=None):
    return Learner(dls or _dls(y), Given(out), loss_func=loss_func or CrossEntropyLossFlat(), metrics=metrics)

def _logits_with(right, y, c=4, sure=3.):
    "Logits that name the label where `right`, the next class elsewhere"
    z = torch.zeros(len(y), c)
    z[torch.arange(len(y)), torch.where(right, y, (y+1)%c)] = sure
    return z

@pytest.fixture
def y(): return torch.arange(N)%4

@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

# --- numbers

def test_accuracy_difference_and_mcnemar(y):
    a,b = torch.arange(N)<40,(torch.arange(N)>=4)&(torch.arange(N)<52)
    t = compare(dict(alone=_given(_logits_with(a, y), y), other=_given(_logits_with(b, y), y)), cost=False)
    assert t.accuracy['alone']==pytest.approx(40/N) and t.accuracy['other']==pytest.approx(48/N)
    assert t.accuracy_diff['other']==pytest.approx(8/N) and t.accuracy_p['other']==pytest.approx(mcnemar(b, a))
    assert t.accuracy_diff['alone']==0 and t.accuracy_p['alone']==1

def test_interval_is_the_binomial_one(y):
    "The bootstrap of a share is a binomial: its standard deviation is known"
    right = torch.arange(N)<45
    t = compare(dict(a=_given(_logits_with(right, y), y)), cost=False, n_boot=4000).loc['a']
    sd = (0.75*0.25/N)**0.5
    assert t.accuracy_lo==pytest.approx(0.75-1.96*sd, abs=0.02) and t.accuracy_hi==pytest.approx(0.75+1.96*sd, abs=0.02)

def test_value_is_fastais_for_uneven_batches():
    learn = Learner(digits_dls(100, n_valid=70, device='cpu'), digits_net(4),
                    metrics=[accuracy, error_rate, F1Score(average='macro')])
    with learn.no_bar(), learn.no_logging(): _,acc,err,f1 = learn.validate()
    t = compare(dict(a=learn), cost=False, n_boot=20).loc['a']
    assert (t.accuracy, t.error_rate, t.f1_score)==pytest.approx((acc, err, f1))

def test_agreement_kl_and_calibration_by_hand(y):
    right = torch.arange(N)<45
    s,te = _logits_with(right, y, sure=2.),_logits_with(torch.arange(N)>=0, y, sure=5.)
    t = compare(dict(teacher=_given(te, y), student=_given(s, y)), cost=False)
    p,q = te.softmax(1),s.softmax(1)
    by_loop = sum(float(p[i, c])*(np.log(float(p[i, c]))-np.log(float(q[i, c]))) for i in range(N) for c in range(4))/N
    assert t.agreement['student']==0.75 and t.kl['student']==pytest.approx(by_loop, rel=1e-5)
    conf = float(q.max())
    assert t.ece['student']==pytest.approx(abs(0.75-conf), abs=1e-6)
    assert t.agreement['teacher']==1 and t.kl['teacher']==pytest.approx(0, abs=1e-7)

def test_same_draws_for_every_learner(y):
    z = torch.randn(N, 4)
    t = compare(dict(alone=_given(z, y, metrics=[accuracy, F1Score(average='macro')]),
                     same=_given(2*z, y, metrics=[accuracy, F1Score(average='macro')])), cost=False, n_boot=50)
    assert t.f1_score_diff_lo['same']==t.f1_score_diff_hi['same']==0

def test_metrics_that_fail_on_some_draws(y):
    two = (torch.arange(N)<2).long() # some draws have one class only, of which the area under the curve is undefined
    t = compare(dict(a=_given(torch.randn(N, 2), two, metrics=RocAucBinary())), cost=False, n_boot=60).loc['a']
    assert 0<=t.roc_auc_score_lo<=t.roc_auc_score_hi<=1

# --- kinds of learners

def _two(a, b, **kw): return compare(dict(teacher=a, alone=b), n_boot=30, min_time=0.01, **kw)

def test_regression():
    y = torch.randn(N)
    def learn(noise): return _given((y+noise)[:, None], y, MSELossFlat(), [mse, R2Score()])
    t = _two(learn(0.1*torch.ones(N)), learn(torch.full((N,), 0.3)))
    assert t.mse['alone']==pytest.approx(0.09, rel=1e-4) and t.rmse_to_teacher['alone']==pytest.approx(0.2, rel=1e-4)
    assert 'ece' not in t and 'agreement' not in t and t.r2_score['teacher']>t.r2_score['alone']

def test_several_labels():
    y = (torch.rand(N, 5)>0.5).float()
    t = _two(_given(4*y-2, y, BCEWithLogitsLossFlat(), accuracy_multi),
             _given(2-4*y, y, BCEWithLogitsLossFlat(), accuracy_multi))
    assert t.accuracy_multi.tolist()==[1, 0] and t.agreement['alone']==0
    p = torch.sigmoid(torch.tensor(2.)).item()
    assert t.kl['alone']==pytest.approx((2*p-1)*np.log(p/(1-p)), rel=1e-4)

def _pixel_acc(inp, targ): return (inp.argmax(1)==targ).float().mean()

def _foreground(inp, targ): return (inp.argmax(1)==targ)[targ>0].float().mean()

def test_segmentation():
    x,y = torch.randn(12, 3, 8, 8),torch.randint(0, 3, (12, 8, 8))
    y[:, 0] = 255
    dls = DataLoaders(*[TfmdDL(TensorDataset(x, y), bs=5, num_workers=0)]*2, device='cpu')
    def learn():
        return Learner(dls, nn.Conv2d(3, 3, 3, padding=1), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255),
                       metrics=[DiceMulti(), _pixel_acc, _foreground])
    a,b = learn(),learn()
    t = _two(a, b)
    same = (a.model(x).argmax(1)==b.model(x).argmax(1))[y!=255].float().mean()
    assert t.agreement['alone']==pytest.approx(same.item()) and t.macs['alone']==64*27*3
    assert (t.dice_multi_lo<=t.dice_multi).all() and (t.dice_multi<=t.dice_multi_hi).all()
    assert t._foreground['alone']==pytest.approx(_foreground(b.model(x), y).item())

def test_tabular():
    from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.choice(list('xyz'), 80), b=rng.normal(size=80), y=rng.choice(['no', 'yes'], 80)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names='a', cont_names='b', y_names='y', bs=16,
                                     valid_idx=list(range(50, 80)), device='cpu')
    t = _two(*(tabular_learner(dls, layers=[n], metrics=accuracy) for n in (16, 4)))
    assert t.params['alone']<t.params['teacher'] and t.throughput.gt(0).all() and 0<=t.ece['alone']<=1

def test_text_of_different_lengths():
    from fastai.text.all import (AWD_LSTM, BaseTokenizer, CategoryBlock, ColReader, ColSplitter, DataBlock, TextBlock,
                                 awd_lstm_clas_config, text_classifier_learner)
    df = pd.DataFrame(dict(text=[' '.join(['good' if i%2 else 'bad']*(1+i%7)) for i in range(48)],
                           y=[i%2 for i in range(48)], is_valid=[i>=24 for i in range(48)]))
    block = DataBlock((TextBlock.from_df('text', tok=BaseTokenizer(), n_workers=1, min_freq=1), CategoryBlock),
                      get_x=ColReader('text'), get_y=ColReader('y'), splitter=ColSplitter())
    dls = block.dataloaders(df, bs=8, device='cpu', num_workers=0)
    def learn(n):
        return text_classifier_learner(dls, AWD_LSTM, pretrained=False, metrics=accuracy,
                                       config={**awd_lstm_clas_config, 'n_hid':n, 'emb_sz':8, 'n_layers':2})
    big,small = learn(24),learn(12)
    t = _two(big, small)
    with small.no_bar(), small.no_logging(): assert t.accuracy['alone']==pytest.approx(small.validate()[1])
    assert t.macs['alone']<t.macs['teacher']
    small.model.train()
    xb,yb = dls.train.one_batch()
    small.loss_func(small.model(xb)[0], yb).backward() # its recurrent state is no inference tensor

def test_bare_model_beside_a_learner(y):
    right = torch.arange(N)<30
    t = compare(dict(teacher=Given(_logits_with(right|True, y)), alone=_given(_logits_with(right, y), y)), cost=False)
    assert t.accuracy.tolist()==[1, 0.5]

def test_two_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(2, 3)
        def forward(self, a, b): return self.l(a+b)
    ds = TensorDataset(torch.randn(20, 2), torch.randn(20, 2), torch.arange(20)%3)
    dls = DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0, n_inp=2)]*2, device='cpu')
    assert _two(*(Learner(dls, Two(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
                  for _ in range(2))).macs['alone']==6

def test_costs_are_of_one_batch_size(y):
    t = _two(*(_given(torch.randn(N, 4), y, dls=_dls(y, bs=bs)) for bs in (40, 8)))
    assert t.batch_size.tolist()==[8, 8] and t.peak_mb.nunique()==1

def test_on_a_test_set(y):
    other = torch.arange(20)%4
    learn = _given(_logits_with(torch.arange(N)<10, y), y)
    test = TfmdDL(TensorDataset(torch.arange(20).float(), other), bs=8, num_workers=0)
    assert compare(dict(a=learn), dl=test, cost=False).accuracy['a']==0.5

def test_a_test_set_of_other_classes_or_another_normalisation_is_refused():
    learn = Learner(named('abc', std=.5), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    def on(vocab='abc', std=.5): return compare(dict(a=learn), dl=named(vocab, std=std).valid, cost=False, n_boot=9)
    assert on().accuracy['a']==compare(dict(a=learn), cost=False, n_boot=9).accuracy['a']
    with pytest.raises(ValueError, match="dl: its classes are c, a, b, those of 'a' a, b, c"): on(vocab='cab')
    for std in None,.25:
        with pytest.raises(ValueError, match="those of .a. are normalised by .*: make it with Normalize.from_stats"):
            on(std=std)

def test_data_of_the_first_classes_and_tensors_normalised_by_hand_are_judged():
    learn = Learner(named('abc', std=.5), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    def on(dl): return compare(dict(a=learn), dl=dl, cost=False, n_boot=9).accuracy['a']
    old = named('ab', std=.5).valid
    assert on(old)==pytest.approx(learn.validate(dl=old)[1])
    xs,ys = (torch.cat([torch.Tensor(o) for o in os]) for os in zip(*learn.dls.valid))
    by_hand = TfmdDL(TensorDataset(xs, ys.long()), bs=8, num_workers=0)
    by_hand.vocab = learn.dls.vocab
    assert on(by_hand)==on(learn.dls.valid)

# --- nothing is left behind

def test_learners_are_untouched():
    set_seed(0)
    learn = Learner(digits_dls(64, n_valid=40, device='cpu'), digits_net(4), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.model[0].eval()
    weights,opt = deepcopy(learn.model.state_dict()),deepcopy(learn.opt.state_dict())
    modes,rng,metric = [m.training for m in learn.model.modules()],torch.get_rng_state(),learn.metrics[0]
    compare(dict(a=learn), n_boot=10, min_time=0.01)
    plot_soft_targets(learn, 0)
    plot_attention(learn, deepcopy(learn.model), [('0', '1')], [0])
    plot_similarity(learn, deepcopy(learn.model), items=8)
    assert all(torch.equal(v, weights[k]) for k,v in learn.model.state_dict().items())
    now = learn.opt.state_dict()
    assert all(torch.equal(a[k], b[k]) if isinstance(b[k], torch.Tensor) else a[k]==b[k]
               for a,b in zip(now['state'], opt['state']) for k in b)
    assert modes==[m.training for m in learn.model.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert learn.metrics[0] is metric
    assert not any(m._forward_hooks for m in learn.model.modules())

# --- bad input

def test_unlike_learners_are_refused(y):
    a = _given(torch.randn(N, 4), y)
    for other,match in ((_given(torch.randn(N, 4), (y+1)%4), 'different validation sets'),
                        (_given(torch.randn(40, 4), y[:40]), 'different validation sets'),
                        (_given(torch.randn(N, 5), y), 'different shapes'),
                        (_given(torch.randn(N, 4), y, metrics=error_rate),
                         "lacks the metric 'error_rate'|lacks the metric 'accuracy'"),
                        (_given(torch.randn(N, 4), y, metrics=None), "'b' lacks the metric 'accuracy', it has none")):
        with pytest.raises(ValueError, match=match): compare(dict(a=a, b=other), cost=False)

def test_different_classes_are_refused():
    a,b = digits_dls(50, 50, 'cpu', 30),digits_dls(50, 50, 'cpu', 30)
    b.valid.dataset.tls[1].tfms[1].vocab = CategoryMap(range(10), sort=False)
    b.valid.dataset.tls[1].tfms[1].vocab.items = [f'digit {i}' for i in range(10)]
    with pytest.raises(ValueError, match='know different classes'):
        compare({n:Learner(d, digits_net(4), metrics=accuracy) for n,d in dict(a=a, b=b).items()}, cost=False)

def test_learners_without_data_or_metrics(y):
    train_only = Learner(DataLoaders(_dls(y).train), Given(torch.randn(N, 4)), loss_func=CrossEntropyLossFlat(),
                         metrics=accuracy)
    with pytest.raises(ValueError, match="learner 'a' has no validation data"): compare(dict(a=train_only))
    with pytest.raises(ValueError, match='give `metrics`'): compare(dict(a=_given(torch.randn(N, 4), y, metrics=None)))
    unlabelled = TfmdDL(TensorDataset(torch.arange(4.)), bs=2, num_workers=0, n_inp=1)
    with pytest.raises(ValueError, match='no labels'): compare(dict(a=_given(torch.randn(N, 4), y)), dl=unlabelled)
    with pytest.raises(ValueError, match='learners is empty'): compare({})
    with pytest.raises(ValueError, match='^teacher: unknown learner, a Sequential; there is a$'):
        compare(dict(a=_given(torch.randn(N, 4), y)), nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="got str for 'b'"): compare(dict(a=_given(torch.randn(N, 4), y), b='model.pt'))
    with pytest.raises(ValueError, match='must be a single number'):
        compare(dict(a=_given(torch.randn(N, 4), y, metrics=AvgMetric(_per_class))), cost=False)

def _per_class(inp, targ): return torch.stack([(inp.argmax(1)==c).float().mean() for c in range(4)])

@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()])
def test_one_logit_is_no_softmax_of_one_class(loss):
    z = {n:torch.randn(N, 1) for n in ('teacher', 'student')}
    y = torch.arange(N)%2
    if not isinstance(loss, BCEWithLogitsLossFlat): y = y[:, None].float()
    found = compare({n:_given(o, y, loss_func=loss, metrics=mse) for n,o in z.items()}, cost=False)
    t,s = (torch.cat([0*o, o], 1).log_softmax(1) for o in z.values())
    agreed = (t.argmax(1)==s.argmax(1)).float().mean().item()
    assert found.agreement['student']==pytest.approx(agreed) and .2<agreed<.8
    assert found.kl['student']==pytest.approx((t.exp()*(t-s)).sum(1).mean().item(), rel=1e-5)

class Asymmetric(nn.Module):
    "A loss of one's own, of yes and no for each label"
    thresh = .3
    def forward(self, pred, y): return (pred.sigmoid()-y).square().mean()

def test_a_loss_of_ones_own_says_where_yes_begins():
    z = {n:torch.randn(N, 3) for n in ('teacher', 'student')}
    y = torch.ones(N, 3)
    found = compare({n:_given(o, y, loss_func=Asymmetric(), metrics=mse) for n,o in z.items()}, cost=False)
    t,s = (o.sigmoid()>.3 for o in z.values())
    assert found.agreement['student']==pytest.approx((t==s).float().mean().item())

def test_one_logit_a_pixel():
    z = {n:torch.randn(N, 1, 2, 4) for n in ('teacher', 'student')}
    y = torch.arange(N*8).reshape(N, 2, 4)%2
    learners = {n:_given(o, y, loss_func=BCEWithLogitsLossFlat(), metrics=mse) for n,o in z.items()}
    t,s = (o>0 for o in z.values())
    found = compare(learners, metrics=partial(accuracy_multi, thresh=.5), cost=False)
    assert found.agreement['student']==pytest.approx((t==s).float().mean().item())

def test_one_number_a_row_with_whole_targets_is_no_class():
    z = {n:torch.randn(N, 1) for n in ('teacher', 'student')}
    learners = {n:_given(o, torch.arange(N), loss_func=MSELossFlat(), metrics=mse) for n,o in z.items()}
    found = compare(learners, cost=False)
    off = (z['teacher']-z['student']).square().mean().sqrt().item()
    assert found.rmse_to_teacher['student']==pytest.approx(off) and 'ece' not in found

# --- pictures and pages

def test_soft_targets_flatten_with_the_temperature(y):
    z = torch.randn(N, 4)
    axs = plot_soft_targets(_given(z, y), 7, Ts=(1, 5))
    for ax,T in zip(axs, (1, 5)):
        assert [b.get_height() for b in ax.patches]==pytest.approx((z[7]/T).softmax(0).tolist(), abs=1e-6)

def test_only_the_likeliest_classes_are_drawn(y):
    z = torch.randn(N, 40)
    ax = plot_soft_targets(_given(z, y), 0, Ts=(1,), n=5)[0]
    assert [t.get_text() for t in ax.get_xticklabels()]==[str(int(i)) for i in z[0].topk(5).indices.sort().values]

def test_attention_map_by_loops():
    fm = torch.randn(2, 3, 4, 5)
    a = attention_map(fm)
    for b in range(2):
        slow = np.array([[sum(float(fm[b, c, i, j])**2 for c in range(3))/3 for j in range(5)] for i in range(4)])
        assert np.allclose(a[b], (slow-slow.min())/(slow.max()-slow.min()), atol=1e-5)

def test_vit_tokens_in_plot_attention():
    class ToTokens(nn.Module):
        def __init__(self):
            super().__init__(); self.tok,self.head = nn.Conv2d(1, 6, 2, 2),nn.Linear(6, 10); self.out = nn.Identity()
        def forward(self, x):
            t = self.tok(x).flatten(2).mT
            return self.head(self.out(torch.cat([t.mean(1, keepdim=True), t], 1))[:, 0])
    learn = Learner(digits_dls(50, 50, 'cpu', 30), digits_net(4))
    axs = plot_attention(learn, ToTokens(), {'1':'out'}, items=[3])
    assert axs.shape==(1, 3) and axs[0, 2].images[1].get_array().shape==(4, 4)

def test_similarity_rows_are_sorted_by_label_and_have_length_one():
    learn = Learner(digits_dls(50, 50, 'cpu', 30), digits_net(4))
    axs = plot_similarity(learn, digits_net(8), items=20)
    g = np.asarray(axs[0, 0].images[0].get_array())
    assert g.shape==(20, 20) and np.allclose((g**2).sum(1), 1, atol=1e-4)
    assert np.allclose(axs[0, 2].images[0].get_array(), np.abs(g-np.asarray(axs[0, 1].images[0].get_array())),
                       atol=1e-6)

def test_figures_suit_light_and_dark_pages(y):
    axs = plot_soft_targets(_given(torch.randn(N, 4), y), 0)
    f = axs[0].figure
    f.canvas.draw()
    rgba = np.asarray(f.canvas.buffer_rgba())
    assert (rgba[[0, 0, -1, -1], [0, -1, 0, -1], 3]==0).all() # transparent corners
    opaque = rgba[rgba[..., 3]==255][:, :3].astype(int)
    assert ((opaque.max(1)>40)&(opaque.min(1)<215)).mean()>0.99 # neither black nor white on either page

def test_plot_compare_needs_costs(y):
    t = compare(dict(teacher=_given(torch.randn(N, 4), y), b=_given(torch.randn(N, 4), y)), cost=False)
    with pytest.raises(ValueError, match='unknown cost'): plot_compare(t)

def test_the_page_is_self_contained(tmp_path, y):
    t = compare({'teacher':_given(torch.randn(N, 4), y), 'a <b>':_given(torch.randn(N, 4), y)}, min_time=0.01,
                n_boot=20)
    page = save_report(tmp_path/'out', t, {'Cost & gain':plot_compare(t)}, dict(seed=3, note='<script>'))
    text = page.read_text()
    assert '<script' not in text and not re.search(r'(?:src|href)="(?!data:)', text)
    assert 'a &lt;b&gt;' in text and 'Cost &amp; gain' in text
    back = pd.read_csv(tmp_path/'out'/'report.csv', index_col=0)
    assert back.accuracy.tolist()==t.accuracy.tolist() and (tmp_path/'out'/'cost___gain.png').read_bytes()[1:4]==b'PNG'
    for k in ('torch', 'fastai', 'fasterai', 'python'): assert f'<th>{k}</th>' in text

def test_table_is_a_dataframe(y):
    t = compare(dict(alone=_given(torch.randn(N, 4), y), b=_given(torch.randn(N, 4), y)), n_boot=20, min_time=0.01)
    assert isinstance(t, Comparison)
    assert t.to_csv() and 'accuracy vs alone' in t._repr_html_()
    assert type(t[['accuracy']]) is pd.DataFrame


def test_plots_show_the_teacher_what_a_fit_shows():
    def of(mean, std):
        dls = digits_dls(64, n_valid=40, device='cpu')
        for dl in dls.loaders: dl.after_batch.add(Normalize.from_stats([mean], [std], cuda=False))
        return Learner(dls, digits_net(4), metrics=accuracy)
    teacher,student,seen = of(.5, .1),of(0., 3.),[]
    hook = teacher.model.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    plot_attention(student, teacher, [('0', '1')], [0, 1])
    plot_similarity(student, teacher, items=2)
    hook.remove()
    want = (torch.stack([student.dls.valid_ds[i][0] for i in (0, 1)])-.5)/.1
    def plain(x): return x.as_subclass(torch.Tensor)
    for x in seen: torch.testing.assert_close(plain(x), plain(want), rtol=1e-4, atol=1e-4)

def test_maps_are_drawn_of_a_teacher_of_other_classes():
    student = Learner(digits_dls(64, n_valid=40, device='cpu'), digits_net(4), metrics=accuracy)
    teacher = Teacher(digits_net(4), classes=[f'class {i}' for i in range(10)])
    pairs = [('0', '1')]
    assert len(plot_attention(student, teacher, pairs, [0, 1]).flat)==6
    assert len(plot_similarity(student, teacher, pairs, items=4).flat)==3
    with pytest.raises(ValueError, match="does not know the student's"): plot_similarity(student, teacher, items=4)
