"Examples: chosen as herding says, kept, joined, and classified by"
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.text.data import SortedDL
from torch.utils.data import Subset

from fasterai.distill.methods.continual import grow_head
from fasterai.distill.methods.exemplars import Exemplars, features_of, herd, nearest_mean
from classes import Gone, named
from helpers import data, flags, learner, n_hooks, net, same, state


def test_herding_is_the_slow_one():
    torch.manual_seed(0)
    f = torch.randn(20, 4)
    picked = []
    for k in range(1, 8):
        left = [i for i in range(20) if i not in picked]
        picked.append(min(left, key=lambda i: (f.mean(0)-f[[*picked, i]].sum(0)/k).norm()))
    assert herd(f, 7)==picked and sorted(herd(f, 99))==list(range(20))


def test_examples_are_kept_shrink_and_join():
    learn = learner(net(c=2), named(['b', 'a']))
    before,mode = state(learn.model),flags(learn.model.train())
    memory = Exemplars(total=8).add(learn)
    assert {c:len(rows) for c,rows in memory.rows.items()}=={0: 4, 1: 4}
    assert same(state(learn.model), before) and flags(learn.model)==mode and not n_hooks(learn.model)
    f,y = features_of(learn)
    assert f.shape==(24, 8) and torch.allclose(f.norm(dim=1), torch.ones(24)) and y.tolist()==[0, 1]*12
    first = {c:[r[0] for r in rows] for c,rows in memory.rows.items()}
    own = (y==1).nonzero().flatten()
    want = [learn.dls.train_ds[i][0] for i in own[herd(f[own], 4)].tolist()]
    assert all(torch.equal(a, b) for a,b in zip(first[1], want))

    dls = named(['b', 'a', 'c'], ['c'], seed=1)
    joined = memory.join(dls)
    assert len(joined.train_ds)==32 and len(dls.train_ds)==24 and joined.valid is dls.valid
    labels = torch.cat([y for _,y in joined.train])
    assert sorted(labels.tolist())==[0]*4+[1]*4+[2]*24
    grow_head(learn, dls)
    memory.add(learn)
    assert {c:len(rows) for c,rows in memory.rows.items()}=={0: 2, 1: 2, 2: 2}
    assert torch.equal(memory.rows[1][0][0], first[1][0])
    with pytest.raises(ValueError, match='in their order'): memory.join(named(['a', 'b', 'c']))
    for bad in dict(), dict(n=2, total=4), dict(n=0):
        with pytest.raises(ValueError, match='takes n'): Exemplars(**bad)
    with pytest.raises(ValueError, match='`add` comes first'): Exemplars(2).join(dls)


def test_nearest_mean():
    learn = learner(net(c=2), named(['b', 'a']), metrics=accuracy)
    memory = Exemplars(5).add(learn)
    before = state(learn.model)
    ncm = nearest_mean(learn, memory)
    f,y = features_of(learn)
    mine = {c:torch.stack([f[i] for i in (y==c).nonzero().flatten()[herd(f[y==c], 5)]]).mean(0) for c in (0, 1)}
    means = F.normalize(torch.stack([mine[0], mine[1]]), dim=1)
    with ncm.no_bar(): preds = ncm.get_preds(dl=learn.dls.valid)[0]
    want = -torch.cdist(f, means).square()
    assert (preds.argmax(1)==want.argmax(1)).all()
    assert ncm.model.model is not learn.model and same(state(learn.model), before)
    with pytest.raises(ValueError, match='column 2'):
        grow_head(learn, named(['b', 'a', 'c'], ['c']))
        nearest_mean(learn, memory)


def test_labels_in_a_column_are_those_of_the_rows_and_ignored_ones_are_of_no_class():
    y = torch.arange(24)%4
    x = y.float().view(-1, 1, 1, 1)+torch.randn(24, 3, 8, 8)*.01
    def kept(y):
        dls = data(24, y=y)
        dls.train_ds.tensors = dls.valid_ds.tensors = (x, y)
        return Exemplars(n=4).add(learner(net(c=3), dls, loss_func=CrossEntropyLossFlat(ignore_index=3)))
    for memory in kept(y),kept(y[:, None]):
        means = {c:[round(r[0].mean().item()) for r in rows] for c,rows in memory.rows.items()}
        assert means=={c:[c]*4 for c in range(3)}
    for bad in y.float(),torch.stack([y, y], 1):
        with pytest.raises(ValueError, match='one class for each sample.*pass a dataset'): kept(bad)


def test_examples_and_features_are_without_augmentation():
    still,moved = (learner(net(c=3), named('abc', tfms=o)) for o in ([], [Gone()]))
    assert not moved.dls.train_ds[0][0].any()
    for a,b in zip(features_of(still), features_of(moved)): assert torch.equal(a, b)
    assert torch.equal(features_of(moved, Subset(moved.dls.train_ds, range(5)))[0], features_of(still)[0][:5])
    a,b = (Exemplars(n=2).add(o) for o in (still, moved))
    for c in range(3): assert all(torch.equal(x, z) for (x,),(z,) in zip(a.rows[c], b.rows[c]))
    assert not moved.dls.train_ds[0][0].any()


def test_a_memory_of_another_order_of_classes_is_refused():
    learn = learner(net(c=3), named('abc'))
    memory = Exemplars(n=2).add(learn)
    with pytest.raises(ValueError, match="column 0 is 'a' and would become 'c'"):
        nearest_mean(learner(learn.model, named('cab')), memory)


def test_a_loader_that_sorts_its_rows_keeps_them_in_their_order_here():
    learn = learner(net(c=2), named(['b', 'a']))
    f,y = features_of(learn)
    learn.dls.loaders[1] = SortedDL(learn.dls.valid_ds, sort_func=lambda o: o[0].sum().item(), bs=8, num_workers=0)
    again = features_of(learn)
    assert torch.allclose(again[0], f) and again[1].tolist()==y.tolist()==[0, 1]*12
    memory = Exemplars(4).add(learn)
    kept = [r[0] for r in memory.rows[1]]
    assert all(any(torch.equal(x, learn.dls.train_ds[i][0]) for i in range(1, 24, 2)) for x in kept)
