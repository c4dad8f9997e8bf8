"Loaders that are PyTorch's own: they do where nothing has to be added, and are refused by name elsewhere"
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from fasterai.core.task import loader_like
from fasterai.distill.all import *
from fasterai.distill.ship.halving import split_training
from fasterai.distill.ship.quantize import calibration_batches
from helpers import learner, net

x,y = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0)),torch.arange(48)%3
ds = TensorDataset(x, y)
def plain(): return DataLoaders(DataLoader(ds, 8, shuffle=True), DataLoader(ds, 8))


def test_another_loader_keeps_the_order_of_the_first():
    drawn = WeightedRandomSampler([0.]*47+[1.], 48)
    dl = DataLoader(ds, batch_sampler=None, batch_size=8, sampler=drawn)
    assert all((b[1]==y[47]).all() for b in loader_like(dl)) and len(loader_like(dl, bs=6))==8
    assert torch.cat([b[1] for b in loader_like(dl, shuffle=False)]).equal(y)
    rows = torch.cat([b[0] for b in loader_like(DataLoader(ds, 8, shuffle=True), TensorDataset(torch.arange(48)))])
    assert not rows.equal(torch.arange(48)) and rows.sort().values.equal(torch.arange(48))

def test_a_stream_has_no_order_to_change():
    class Stream(IterableDataset):
        def __iter__(self): return iter(range(5))
    assert [b.tolist() for b in loader_like(DataLoader(Stream(), 2), shuffle=True)]==[[0, 1], [2, 3], [4]]

def test_plain_loaders_do_for_what_adds_no_rows():
    learn = learner(net(c=3), plain())
    fastai = learner(learn.model, DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0))
    assert knn_accuracy(learn, k=3)==knn_accuracy(fastai, k=3) and linear_probe(learn)==linear_probe(fastai)
    kept = [Exemplars(12) for _ in range(2)]
    for memory,l in zip(kept, (learn, fastai)): memory.add(l)
    assert len(kept[0])==36
    for c in range(3): assert all(torch.equal(a[0], b[0]) for a,b in zip(kept[0].rows[c], kept[1].rows[c]))

@pytest.mark.parametrize('who,ask', [
    ('adapt', lambda l: adapt(l, ds)), ('adapt', lambda l: adapt(l, l.dls.valid)),
    ('pseudo_labels', lambda l: pseudo_labels(l, list(x))), ('a search', lambda l: split_training(l.dls)),
    ('Exemplars', lambda l: Exemplars(6).add(l).join(l.dls)), ('mix', lambda l: mix_unlabelled(l.dls, list(x)))],
    ids=['adapt', 'adapt to a loader', 'pseudo_labels', 'search', 'exemplars', 'mix'])
def test_elsewhere_they_are_refused_by_name(who, ask):
    with pytest.raises(TypeError, match=f'{who}.*fastai.*got .*DataLoader' if who!='mix' else 'TfmdDL.*got DataLoader'):
        ask(learner(net(c=3), plain()))

def test_they_are_not_recorded(tmp_path):
    with pytest.raises(TypeError, match='give `DataLoaders` a fastai TfmdDL'):
        record(net(c=3), plain(), tmp_path, views=1)

def test_batches_made_in_a_way_of_its_own_stay_as_they_are():
    buckets = [[0, 3], [1, 2, 4]]
    own = DataLoader(ds, batch_sampler=buckets)
    assert loader_like(own, shuffle=True) is own and loader_like(buckets, shuffle=True) is buckets
    with pytest.raises(TypeError, match='in a way of its own.*TfmdDL'): loader_like(own, ds, shuffle=True)

def test_any_label_is_a_class_to_a_probe_but_the_ignored_one():
    dls = DataLoaders(*[DataLoader(TensorDataset(x, o), 8) for o in (y-1, y-1)])
    learn = learner(net(c=3), dls, loss_func=lambda p, y: p.square().mean())
    same = learner(learn.model, plain())
    assert knn_accuracy(learn, k=3)==knn_accuracy(same, k=3)

def test_a_stream_of_fastai_is_calibrated_on_as_it_comes():
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(x, y))
    stream = FastaiLoader(Stream(), bs=16, num_workers=0, indexed=False)
    learn = learner(net(c=3), DataLoaders(stream, stream))
    (first,), = calibration_batches(learn, 1, least=16)
    assert torch.equal(first, x[:16])
