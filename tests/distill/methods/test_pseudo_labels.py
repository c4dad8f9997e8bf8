"Labels that a network gives, and networks that learn from them"
from functools import partial

import pandas as pd
import pytest
import torch
import fastai.callback.data  # noqa: F401 (gives Datasets `weighted_dataloaders`)
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize, ItemGetter
from fastai.learner import Learner
from fastai.losses import (
    BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat, MSELossFlat)
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularPandas, tabular_learner
from fastai.text.data import Numericalize
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.core.seeds import same_start
from fasterai.data.digits import digits_dls, digits_net
from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.methods.adapt import adapt
from fasterai.distill.methods.columns import OneHotBCE
from fasterai.distill.methods.exemplars import Exemplars
from fasterai.distill.methods.noisy_student import noisy_student
from fasterai.distill.methods.pseudo_labels import pseudo_labels
from fasterai.distill.study.one_run import fit_one_cycle, quiet
from helpers import data, learner, net, same, state

others = range(700, 1000)


def make(width, **kwargs):
    kwargs = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=1e-2) | kwargs
    return lambda dls: Learner(dls, digits_net(width), **kwargs)


@pytest.fixture(scope='module')
def trained():
    set_seed(0)
    learn = make(8)(digits_dls(n_train=100))
    with quiet(learn): learn.fit_one_cycle(30, 3e-2)
    return learn


def labels_of(learn, items=others, **kwargs):
    with quiet(learn): return pseudo_labels(learn, items, **kwargs)


def test_labels_are_what_the_network_says_of_clean_images(trained):
    x = torch.stack([trained.dls.train_ds.tls[0].tfms(i) for i in others]).as_subclass(torch.Tensor)
    with torch.no_grad(): p = trained.model.eval()(x.to(trained.dls.device)).softmax(1).cpu()
    found = labels_of(trained)
    torch.testing.assert_close(found.probs, p, rtol=1e-4, atol=1e-5)
    assert found.items==list(others) and found.labels.tolist()==p.argmax(1).tolist()
    assert found.frame.columns.tolist()==['item', 'label', 'confidence'] and len(found.frame)==300


def test_a_threshold_leaves_out_what_is_unsure(trained):
    found,sure = labels_of(trained),labels_of(trained, threshold=0.9)
    assert sure.items==[i for i,c in zip(found.items, found.confidence) if c>=0.9] and 0<len(sure)<len(found)
    with pytest.raises(ValueError, match='no item reaches the threshold of 1'): labels_of(trained, threshold=1.)
    with pytest.raises(ValueError, match='a probability'): labels_of(trained, threshold=90)


def test_balanced_classes_are_equally_many_and_the_surest_come_first(trained):
    found,even = labels_of(trained),labels_of(trained, balance=True)
    counts = even.labels.bincount()
    assert counts.tolist()==[30]*10
    for c in range(10):
        mine = found.confidence[found.labels==c].sort(descending=True).values
        kept = even.confidence[even.labels==c]
        assert kept.max()==mine[0] and kept.min()>=(mine[29] if len(mine)>=30 else mine[-1])


@pytest.mark.parametrize('soft', [False, True])
def test_data_of_both_kinds(trained, soft):
    found = labels_of(trained, soft=soft)
    dls = found.dls()
    assert len(dls.train_ds)==400 and dls.valid is trained.dls.valid and dls.c==10
    y = dls.train_ds[100][-1]
    if soft: torch.testing.assert_close(torch.Tensor(y), found.probs[0])
    else: assert int(y)==found.labels[0]
    assert type(y) is type(trained.dls.train_ds[0][-1])
    known = dls.train_ds[0][-1]
    assert int(known.argmax() if soft else known)==int(trained.dls.train_ds[0][-1])
    shown = dls.train._pre_show_batch(dls.one_batch(), max_n=3)[2]
    assert all(str(o[-1]).isdigit() for o in shown)
    student = Learner(dls, digits_net(4), metrics=accuracy)
    with quiet(student): student.fit(1, 1e-2)
    assert student.recorder.losses[0]>0


def test_soft_labels_have_the_loss_of_their_probabilities(trained):
    dls = labels_of(trained, soft=True).dls()
    student = Learner(dls, digits_net(4))
    x,y = dls.one_batch()
    z = student.model.eval()(x)
    want = -(torch.Tensor(y)*torch.Tensor(z).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(torch.Tensor(student.loss_func(z, y)), want)


def test_rows_of_tensors():
    learn = learner()
    found = labels_of(learn, torch.randn(12, 3, 8, 8))
    dls = found.dls()
    assert len(dls.train_ds)==44 and dls.one_batch()[1].dtype==torch.int64
    learner(dls=dls).fit(1)


def test_only_labelled_rows_are_taken_for_labelled(trained):
    assert len(labels_of(trained).dls(mix_unlabelled(trained.dls, others)).train_ds)==400
    assert len(labels_of(trained).dls(labels_of(trained).dls()).train_ds)==400


def test_what_does_not_go_is_refused(trained):
    other = data()
    other.vocab = ['a', 'b', 'c']
    with pytest.raises(ValueError, match=r"those of base are \['a', 'b', 'c'\]"): labels_of(trained).dls(other)
    numbers = learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), data(y=torch.rand(32)), loss_func=MSELossFlat())
    with pytest.raises(ValueError, match=r'shape \(4, 1\)'): labels_of(numbers, torch.randn(4, 3, 8, 8))


# --- noisy student ------------------------------------------------------------

def noisy(makers, **kwargs):
    return noisy_student(makers, digits_dls(n_train=100), others, **{'epochs': 2, 'progress': False, **kwargs})


def test_trains_as_the_same_steps_by_hand():
    found = noisy([make(8), make(4)], epochs=[3, 2], threshold=0.1)
    teacher = None
    for width,epochs in ((8, 3), (4, 2)):
        dls = digits_dls(n_train=100) if teacher is None else labels_of(teacher, threshold=0.1).dls()
        set_seed(0)
        learn = make(width)(dls)
        same_start(learn.dls, 0)
        with quiet(learn): fit_one_cycle(learn, epochs)
        teacher = learn
    assert same(state(found.student.model), state(learn.model))
    assert found.table.epochs.tolist()==[3, 2] and len(found.learners)==2 and found.table.pseudo[1]<=300
    assert found.table.columns.tolist()==['network', 'epochs', 'images', 'pseudo', 'confidence', 'valid_loss',
                                          'accuracy', 'seconds']


def test_resumed_is_uninterrupted_and_other_settings_are_refused(tmp_path):
    calls = []
    def fit(learn, epochs):
        calls.append(epochs)
        if len(calls)==3: raise KeyboardInterrupt
        fit_one_cycle(learn, epochs)
    run = partial(noisy, make(4), rounds=2)
    want = run()
    with pytest.raises(KeyboardInterrupt): run(fit=fit, path=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir())==['network_0.pth', 'network_1.pth']
    calls.clear()
    found = run(fit=fit, path=tmp_path)
    assert len(calls)==1 and same(state(want.student.model), state(found.student.model))
    assert found.table.drop(columns='seconds').equals(want.table.drop(columns='seconds'))
    for other in dict(threshold=0.5), dict(epochs=1), dict(seed=1):
        with pytest.raises(ValueError, match='other settings'): run(fit=fit, path=tmp_path, **other)
    with pytest.raises(ValueError, match='other settings'): noisy(make(8), rounds=2, fit=fit, path=tmp_path)
    with pytest.raises(ValueError, match='other settings'): run(path=tmp_path)


def test_files_are_written_whole_and_those_cut_are_named(tmp_path):
    precious,folder = tmp_path/'precious',tmp_path/'networks'
    precious.write_text('mine')
    folder.mkdir()
    (folder/'network_0.part').symlink_to(precious)
    run = partial(noisy, make(4), rounds=1, epochs=1, path=folder)
    run()
    assert precious.read_text()=='mine'
    assert sorted(f.name for f in folder.iterdir())==['network_0.part', 'network_0.pth', 'network_1.pth']
    file = folder/'network_0.pth'
    for raw in (file.read_bytes()[:500], b'', b'text'):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match="network_0.pth' is no finished network"): run()
        assert file.read_bytes()==raw
    torch.save({'a':1}, file)
    with pytest.raises(ValueError, match="network_0.pth' is no finished network, KeyError"): run()


def test_the_random_streams_go_on_as_if_nothing_had_been():
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    noisy(make(4), rounds=1, epochs=1)
    assert torch.equal(rng, torch.get_rng_state())


def test_bad_arguments():
    with pytest.raises(ValueError, match='which is 1 rounds'): noisy([make(4), make(4)], rounds=3)
    with pytest.raises(ValueError, match='a round or more'): noisy(make(4), rounds=0)
    with pytest.raises(ValueError, match='epochs must be one number, or 3'): noisy(make(4), rounds=2, epochs=[1, 1])
    with pytest.raises(ValueError, match='flatten=False'): noisy(make(4), rounds=1, epochs=1, soft=True)
    with pytest.raises(TypeError, match='must return a Learner'): noisy(lambda dls: digits_net(4), rounds=1)


def test_a_student_that_does_not_train_on_the_pseudo_labels_is_refused():
    own = data()
    def noisy(make): return noisy_student(make, own, torch.randn(5, 3, 8, 8), rounds=1, epochs=1, progress=False)
    with pytest.raises(ValueError, match='the pseudo labels: got a Learner with 32 training samples, expected 37'):
        noisy(lambda dls: learner(net(), own))
    by_4 = noisy(lambda dls: learner(net(), DataLoaders(*[dl.new(bs=4) for dl in dls.loaders])))
    assert by_4.table.images.tolist()==[32, 37]


@pytest.mark.parametrize('loss_func', [BCEWithLogitsLossFlat(), BCELossFlat(), MSELossFlat()])
def test_a_task_without_classes_is_refused(loss_func):
    learn = learner(net(), data(y=torch.rand(32, 3)), loss_func=loss_func)
    with pytest.raises(ValueError, match='pseudo labels are classes, one for each row'):
        pseudo_labels(learn, [(torch.randn(3, 8, 8),)]*4)


def test_one_class_a_row_by_a_loss_of_yes_and_no():
    learn = learner(net(), data(), loss_func=OneHotBCE())
    assert len(pseudo_labels(learn, [(torch.randn(3, 8, 8),)]*4))==4


def test_of_a_text_the_classes_are_named_and_not_its_words():
    words,names = ['xxunk', 'good', 'bad', 'film', 'the'],['neg', 'pos', 'neutral']
    texts = [(['the', w, 'film'], n) for w,n in zip(['bad', 'good', 'film'], names)]*8
    tfms = [[ItemGetter(0), Numericalize(vocab=words, min_freq=0)], [ItemGetter(1), Categorize(vocab=names)]]
    def dls(tfms): return Datasets(texts, tfms, splits=[range(18), range(18, 24)]).dataloaders(
        bs=6, num_workers=0, device='cpu')
    class Bag(nn.Module):
        def __init__(self): super().__init__(); self.e,self.h = nn.Embedding(8, 6),nn.Linear(6, 3)
        def forward(self, x): return self.h(self.e(x).mean(1))
    labels = pseudo_labels(learner(Bag(), dls(tfms)), texts[:6])
    assert set(labels.frame.label)<=set(names)
    other = dls([tfms[0], [ItemGetter(1), Categorize(vocab=names[::-1], sort=False)]])
    with pytest.raises(ValueError, match="of the classes \\['neg', 'neutral', 'pos'\\], those of base are "
                                         "\\['neutral'"): labels.dls(other)


def test_exemplars_are_no_guesses():
    learn = learner(dls=data(32))
    memory = Exemplars(n=2).add(learn)
    joined = memory.join(data(32))
    labels = pseudo_labels(learner(dls=joined), [joined.train_ds[i][:1] for i in range(3)])
    assert len(labels.dls().train_ds)==len(joined.train_ds)+3==32+len(memory)+3
    assert len(pseudo_labels(learner(dls=labels.dls()), labels.items).dls().train_ds)==32+len(memory)+3


def test_networks_of_other_items_are_refused(tmp_path):
    rows = [(torch.randn(1200),) for _ in range(8)] # whose text is abbreviated
    def make(dls): return learner(nn.Linear(1200, 3), dls)
    def data():
        dl = TfmdDL(TensorDataset(torch.ones(24, 1200), torch.arange(24)%3), bs=8, num_workers=0)
        return DataLoaders(dl, dl, device='cpu')
    def run(items): return noisy_student(make, data(), items, rounds=1, epochs=1, path=tmp_path, progress=False)
    first = run(rows)
    assert same(state(first.student.model), state(run([(x.clone(),) for x, in rows]).student.model))
    others = [(x.where(torch.arange(1200)!=600, 0.),) for x, in rows]
    with pytest.raises(ValueError, match='of other settings'): run(others)


def of_numbers():
    "`Datasets` of 24 numbers, three classes, no network"
    tfms = [[lambda i: torch.full((3, 8, 8), float(i))], [lambda i: 'abc'[i%3], Categorize(vocab=list('abc'))]]
    return Datasets(list(range(24)), tfms, splits=[list(range(24))]*2)


def rows_drawn(dls, times=10): return [i for _ in range(times) for i in dls.train.get_idxs()]


def test_rows_are_drawn_by_their_weights_after_rows_were_added_and_taken_away():
    dls = of_numbers().weighted_dataloaders([1.]*8+[0.]*16, bs=8, num_workers=0, device='cpu')
    learn = learner(dls=dls)
    labels = pseudo_labels(learn, list(range(4)))
    for joined,n in (labels.dls(), 4),(labels.dls(labels.dls()), 4),(Exemplars(n=1).add(learn).join(dls), 3):
        drawn = rows_drawn(joined, 20)
        assert not {*range(8, 24)} & {*drawn} and {*range(24, 24+n)}<={*drawn}
        assert joined.train.wgts[0]==pytest.approx(3*joined.train.wgts[-1]) # of 24, 8 count: a new one as the mean


def test_a_part_of_the_rows_is_drawn_after_rows_were_added():
    dls = of_numbers().partial_dataloaders(6, bs=3, num_workers=0, device='cpu')
    assert len(rows_drawn(pseudo_labels(learner(dls=dls), list(range(4))).dls(), 1))==6


@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropyFlat, FocalLossFlat, LabelSmoothingCrossEntropy])
def test_a_loss_of_labels_alone_is_refused_before_the_first_training(loss):
    trained = []
    def fit(learn, epochs, cbs=None): trained.append(learn)
    def run(make, soft=True): return noisy_student(make, of_numbers().dataloaders(bs=8, num_workers=0, device='cpu'),
                                                   range(24), rounds=1, soft=soft, fit=fit, progress=False)
    with pytest.raises(ValueError, match=f'{loss.__name__} takes for labels.*flatten=False'):
        run(lambda dls: learner(dls=dls, loss_func=loss()))
    assert not trained
    run(lambda dls: learner(dls=dls, loss_func=loss()), soft=False)
    run(lambda dls: learner(dls=dls, loss_func=CrossEntropyLossFlat(flatten=False)))
    run(lambda dls: Learner(dls, net()))
    run([lambda dls: learner(dls=dls, loss_func=loss()), lambda dls: Learner(dls, net())]) # the first has labels
    assert len(trained)==8


def test_items_are_looked_at_before_the_first_training():
    def make(dls): raise AssertionError
    for items,error in ('folder', TypeError),([], ValueError):
        with pytest.raises(error, match='items'): noisy_student(make, data(), items, progress=False)


def test_a_series_of_items_is_counted_from_its_first():
    learn = learner(dls=of_numbers().dataloaders(bs=8, num_workers=0, device='cpu'))
    s = pd.Series(range(24))
    assert pseudo_labels(learn, s[s%2==1]).items==list(range(1, 24, 2))


def tables():
    df = pd.DataFrame(dict(a=range(40), b=list('uv')*20, y=list('pqpp')*10))
    to = TabularPandas(df, [Categorify, Normalize], ['b'], ['a'], 'y', CategoryBlock(), splits=[list(range(32)),
                                                                                             list(range(32, 40))])
    return df,to.dataloaders(bs=16, num_workers=0, device='cpu')


@pytest.mark.parametrize('ask', [
    lambda l, df: pseudo_labels(l, df), lambda l, df: mix_unlabelled(l.dls, df), lambda l, df: Exemplars(n=2).add(l),
    lambda l, df: noisy_student(lambda dls: l, l.dls, df, progress=False), lambda l, df: pseudo_labels(learner(), df)])
def test_tables_are_refused_by_name(ask):
    df,dls = tables()
    with pytest.raises(TypeError, match='must have rows by number, and a table, a (TabularPandas|DataFrame), has none'):
        ask(tabular_learner(dls, layers=[4]), df)


def test_a_network_of_tables_adapts_to_a_table():
    df,dls = tables()
    learn = tabular_learner(dls, layers=[4])
    new = adapt(learn, df.assign(a=df.a+100), bs=40)
    assert new.model.bn_cont.running_mean>learn.model.bn_cont.running_mean+5
