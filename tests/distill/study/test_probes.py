"Neighbours and linear probes: what they say, of which data, and what they leave behind"
import numpy as np
import pytest
import torch
from fastai.data.core import Datasets
from fastai.losses import CrossEntropyLossFlat
from fasttransform import Transform
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fasterai.distill.loss.embeddings import NoTask
from fasterai.distill.study.probes import embeddings_of, knn_accuracy, linear_probe, probe_head
from fasterai.distill.training.views import StudentSees
from classes import named
from helpers import data, flags, learner, n_hooks, net, same, state


def embedder(**kwargs): return learner(net(**kwargs)[:-1], data(n=32, bs=8), loss_func=NoTask)
def raw(learn, dl):
    learn.model.eval()
    with torch.no_grad(): x = torch.cat([learn.model(b[0]) for b in dl]).numpy()
    learn.model.train()
    return x, torch.cat([b[1] for b in dl]).numpy()


def test_all_samples_in_their_own_order():
    learn = embedder()
    learn.dls.train.drop_last,learn.dls.train.bs = True,5
    x,y = embeddings_of(learn, learn.dls.train)
    want = raw(learn, learn.dls.valid)                              # the same samples, in order
    assert x.shape==(32, 8) and x.dtype==np.float32 and np.array_equal(y, want[1])
    np.testing.assert_allclose(x, want[0], rtol=1e-5, atol=1e-6)


def test_what_sklearn_says():
    learn = embedder()
    x,y = raw(learn, learn.dls.valid)
    assert knn_accuracy(learn, k=3)==KNeighborsClassifier(3, metric='cosine').fit(x, y).score(x, y)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=2, max_iter=1000)).fit(x, y)
    assert linear_probe(learn, C=2)==fitted.score(x, y)
    head = probe_head(learn, C=2)
    p = head(torch.tensor(x)).softmax(1)
    np.testing.assert_allclose(p.detach(), fitted.predict_proba(x), atol=1e-4)


def test_two_classes_and_classes_that_nobody_shows():
    learn = embedder()
    few = data(n=32, bs=8, y=torch.arange(32)%2*2)                  # of 3 classes 0 and 2
    x,y = raw(learn, few.valid)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
    head = probe_head(learn, few)
    assert head.out_features==3
    p = head(torch.tensor(x)).softmax(1).detach().numpy()
    np.testing.assert_allclose(p[:, [0, 2]], fitted.predict_proba(x), atol=1e-4)
    assert not p[:, 1].any() and linear_probe(learn, few)==fitted.score(x, y)


def test_nothing_is_left_behind():
    learn = embedder()
    was,modes = state(learn.model),flags(learn.model)
    torch.manual_seed(0)
    knn_accuracy(learn), linear_probe(learn)
    random = torch.randn(1)
    torch.manual_seed(0)
    assert torch.equal(random, torch.randn(1))
    assert same(was, state(learn.model)) and flags(learn.model)==modes and not n_hooks(learn.model)
    assert learn.opt is None and learn.dls.train.shuffle


def test_the_data_s_own_labels_or_others():
    learn = learner(net()[:-1], data(n=24, bs=8, y=torch.zeros(24).long()), loss_func=NoTask)
    with pytest.raises(ValueError, match=r'two classes or more, the labelled samples have \[0\]|two classes'):
        linear_probe(learn)
    assert 0<=linear_probe(learn, data())<=1 and 0<=knn_accuracy(learn, data(), k=1)<=1
    for bad in (torch.zeros(24, 3), torch.zeros(24, 3).long(), torch.zeros(24)):
        with pytest.raises(ValueError, match='one class for each sample.*pass labelled='):
            knn_accuracy(learn, data(n=24, y=bad))


@pytest.mark.parametrize('loss, ignored', [(NoTask, -100), (CrossEntropyLossFlat(ignore_index=255), 255)])
def test_rows_whose_label_is_ignored_are_left_out(loss, ignored):
    learn = embedder()
    learn.loss_func = loss
    x,y = raw(learn, learn.dls.valid)
    there = np.arange(32)%4!=0
    some = data(32, y=torch.tensor(np.where(there, y, ignored)))
    for dl in some.loaders: dl.dataset.tensors = (learn.dls.train_ds.tensors[0], dl.dataset.tensors[1])
    got = embeddings_of(learn, some.valid)
    np.testing.assert_allclose(got[0], x[there], rtol=1e-5, atol=1e-6)
    assert np.array_equal(got[1], y[there]) and probe_head(learn, some).out_features==3
    assert knn_accuracy(learn, some, k=3)==KNeighborsClassifier(3, metric='cosine').fit(*got).score(*got)
    none = data(8, y=torch.full((8,), ignored))
    with pytest.raises(ValueError, match='no sample has a label'): linear_probe(learn, none)


def test_no_augmentation_where_it_can_be_told():
    class Noise(Transform):
        split_idx = 0
        def encodes(self, x:torch.Tensor): return x+1
    x,y = torch.randn(20, 6),[i%2 for i in range(20)]
    dls = Datasets(range(20), [[lambda i: x[i], Noise()], [lambda i: y[i]]],
                   splits=[list(range(10)), list(range(10, 20))]).dataloaders(bs=4, num_workers=0, device='cpu')
    learn = learner(nn.Linear(6, 3), dls, loss_func=NoTask)
    got,_ = embeddings_of(learn, dls.train)
    np.testing.assert_allclose(got, learn.model(x[:10]).detach(), rtol=1e-5, atol=1e-6)
    assert dls.train_ds.split_idx==0


def test_labelled_samples_are_normalised_as_the_learner_s():
    learn = learner(dls=named('abc', std=.5))
    knn_accuracy(learn, named('cab', std=.5), k=3) # in whatever order
    with pytest.raises(ValueError, match='labelled: its pictures are not normalised'):
        knn_accuracy(learn, named('abc'), k=3)


def test_the_student_sees_what_its_callback_shows():
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(3*16, 5)), cbs=StudentSees(lambda x: x[..., ::2, ::2]),
                    loss_func=NoTask)
    assert embeddings_of(learn, learn.dls.valid)[0].shape==(32, 5)


def test_select():
    learn = learner(net()[:2], loss_func=NoTask)
    with pytest.raises(ValueError, match=r'must be \(B, D\), got \(8, 8, 2, 2\): pass select='): knn_accuracy(learn)
    pooled = dict(select=lambda o: o.mean((2, 3)))
    want = learner(net()[:4], loss_func=NoTask)
    assert linear_probe(learn, **pooled)==linear_probe(want)
    assert knn_accuracy(learn, k=3, **pooled)==knn_accuracy(want, k=3)
    for k in (0, 33):
        with pytest.raises(ValueError, match='k must be 1 to 32'): knn_accuracy(learn, k=k, **pooled)


def test_labels_below_0_have_no_row():
    learn = embedder()
    odd = data(24, y=torch.arange(24)%3-1)
    with pytest.raises(ValueError, match='from 0 on, and the labelled samples have -1'): linear_probe(learn, odd)
    assert knn_accuracy(learn, odd, k=3)==knn_accuracy(learn, data(24, y=torch.arange(24)%3), k=3)
