"Batches of rows with labels and of rows without"
from pathlib import Path

import fastai.callback.schedule
import fastai.vision.data
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize, get_image_files
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import RandomResizedCrop, Resize, aug_transforms
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.core.rows import as_in_validation
from fasterai.core.seeds import same_start
from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.methods.pseudo_labels import pseudo_labels
from fasterai.data.unlabelled import UNLABELLED, UnlabelledDL, labelled_part, mix_unlabelled

others = range(700, 1797)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Grey images, the brighter the later: eight each of two classes, twenty without"
    d = tmp_path_factory.mktemp('images')
    for i,kind in enumerate(['train/one']*8 + ['train/two']*8 + ['valid/one']*4 + ['valid/two']*4 + ['unlabelled']*20):
        (d/kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 12, 3), 4*i, dtype=np.uint8)).save(d/kind/f'{i}.png')
    return d


def images(folder, **kwargs):
    kwargs = dict(bs=4, num_workers=0, device='cpu', item_tfms=Resize(12)) | kwargs
    return ImageDataLoaders.from_folder(folder, **kwargs)


@pytest.mark.parametrize('bs, ratio, drop_last, sizes', [
    (64, 4, True, [320]), (40, 4, False, [200, 200, 100]), (30, 0.5, False, [45, 45, 45, 15]), (100, 1, True, [200])])
def test_an_epoch_is_the_labelled_set(bs, ratio, drop_last, sizes):
    dls = digits_dls(n_train=100, bs=bs)
    dls.train = dls.train.new(drop_last=drop_last)
    mixed = mix_unlabelled(dls, others, ratio)
    batches = list(mixed.train)
    assert [len(y) for _,y in batches]==sizes and len(mixed.train)==len(dls.train)==len(sizes)
    for _,y in batches:
        n = round(len(y)/(1+ratio))
        assert (y[:n]>=0).all() and (y[n:]==UNLABELLED).all() and type(y) is type(next(iter(dls.train))[1])
    assert mixed.valid is dls.valid and len(dls.train_ds)==100


def test_both_sides_are_shuffled_and_none_is_there_twice_before_all_were():
    train = mix_unlabelled(digits_dls(n_train=100, bs=50), range(700, 730), ratio=1).train
    rows = [train.get_idxs() for _ in range(2)]
    for r in rows:
        own,more = [i for i in r if i<100],[i for i in r if i>=100]
        assert sorted(own)==list(range(100)) and len(more)==100 and set(more)=={*range(100, 130)}
        assert sorted(more[:30])==sorted(more[30:60])==list(range(100, 130))
    assert rows[0]!=rows[1]


def test_the_same_start_gives_the_same_batches():
    dls = mix_unlabelled(digits_dls(n_train=100), others)
    def batch(seed):
        same_start(dls, seed)
        return dls.one_batch()[0]
    assert torch.equal(batch(1), batch(1)) and not torch.equal(batch(1), batch(2))


def test_the_task_s_loss_and_its_gradient_are_those_of_labelled_rows():
    x,y = mix_unlabelled(digits_dls(n_train=100), others).one_batch()
    z = torch.randn(len(y), 10, requires_grad=True)
    loss = CrossEntropyLossFlat(ignore_index=-100)(z, y)
    loss.backward()
    torch.testing.assert_close(torch.Tensor(loss), F.cross_entropy(z[:64], torch.Tensor(y[:64]).long()))
    assert z.grad[:64].abs().sum()>0 and not z.grad[64:].any()


def test_files_in_folders(folder):
    dls = images(folder, batch_tfms=aug_transforms())
    files = get_image_files(folder/'unlabelled')
    mixed = mix_unlabelled(dls, files, ratio=2)
    x,y = mixed.one_batch()
    assert type(mixed) is type(dls) and x.shape==(12, 3, 12, 12) and list(mixed.vocab)==['one', 'two'] and mixed.c==2
    assert type(x).__name__=='TensorImage' and (y[4:]==UNLABELLED).all()
    shown = mixed.train._pre_show_batch((x, y), max_n=12)[2]
    assert [str(o[1]) for o in shown[4:]]==['?']*8 and {str(o[1]) for o in shown[:4]}<={'one', 'two'}


def test_images_without_labels_are_augmented_as_those_of_the_training(folder):
    "Crops of a ramp differ from one time to the next, in training only"
    class Crop(RandomResizedCrop): pass
    dls = images(folder, item_tfms=Crop(8, min_scale=0.2))
    ramp = folder/'ramp.png'
    Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).convert('RGB').save(ramp)
    mixed = mix_unlabelled(dls, [ramp], ratio=1)
    seen = [mixed.train.do_item(16)[0] for _ in range(8)]
    assert len({o.tobytes() if hasattr(o, 'tobytes') else o.numpy().tobytes() for o in seen})>1
    with as_in_validation(mixed.train_ds): still = [mixed.train_ds[16][0] for _ in range(4)]
    assert len({np.asarray(o).tobytes() for o in still})==1 and mixed.train_ds.inputs.split_idx==0
    ramp.unlink()


def test_an_exported_learner_has_no_images_and_predicts(folder, tmp_path):
    mixed = mix_unlabelled(images(folder), get_image_files(folder/'unlabelled'), ratio=1)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    learn = Learner(mixed, net, metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.export()
        assert b'unlabelled/' not in (tmp_path/'export.pkl').read_bytes()
        again = load_learner(tmp_path/'export.pkl')
        with again.no_bar(): assert again.predict(get_image_files(folder/'unlabelled')[0])[0] in ('one', 'two')
        preds,targs = learn.get_preds(ds_idx=0)
    assert len(preds)==16 and (targs>=0).all()


def test_workers_give_the_same_kind_of_batch():
    dls = digits_dls(n_train=100, bs=25)
    dls.train = dls.train.new(num_workers=1)
    ys = [y for _,y in mix_unlabelled(dls, others, 1).train]
    assert [len(y) for y in ys]==[50]*4 and all((y[:25]>=0).all() and (y[25:]<0).all() for y in ys)


def test_rows_of_tensors():
    train,valid = (TfmdDL(TensorDataset(torch.randn(8, 3), torch.randn(8, 2), torch.arange(8)), bs=4, num_workers=0)
                   for _ in range(2))
    items = TensorDataset(torch.randn(5, 3), torch.randn(5, 2))
    a,b,y = mix_unlabelled(DataLoaders(train, valid), items, ratio=1).one_batch()
    assert a.shape==(8, 3) and b.shape==(8, 2) and y.tolist()[4:]==[-100]*4


def loader(*tensors, **kwargs):
    return DataLoaders(TfmdDL(TensorDataset(*tensors), **dict(bs=4, num_workers=0) | kwargs))


x = torch.randn(8, 3)


@pytest.mark.parametrize('dls, items, ratio, error, match', [
    (loader(x, torch.ones(8, 2)), x, 1, ValueError, r'one class number a row as label, got Tensor\(2,\)'),
    (loader(x, torch.rand(8)), x, 1, ValueError, 'one class number'),
    (loader(x, torch.ones(8, dtype=torch.uint8)), x, 1, ValueError, 'one class number'),
    (loader(x, torch.arange(8)), [], 1, ValueError, 'items is empty'),
    (loader(x, torch.arange(8)), 'folder', 1, TypeError, 'get_image_files'),
    (loader(x, torch.arange(8)), Path('.'), 1, TypeError, 'get_image_files'),
    (loader(x, torch.arange(8)), x, 0, ValueError, 'ratio must add rows'),
    (loader(x, torch.arange(8)), x, 0.1, ValueError, 'ratio must add rows'),
    (loader(x, torch.arange(8), bs=16, drop_last=True), x, 1, ValueError, 'make no batch of 16')])
def test_what_does_not_go_is_refused(dls, items, ratio, error, match):
    with pytest.raises(error, match=match): mix_unlabelled(dls, items, ratio)


def test_only_once():
    mixed = mix_unlabelled(loader(x, torch.arange(8)), x, 1)
    with pytest.raises(ValueError, match='already'): mix_unlabelled(mixed, x)
    assert isinstance(mixed.train, UnlabelledDL) and not isinstance(labelled_part(mixed).train, UnlabelledDL)


def test_labels_of_numpy():
    class Items:
        "As many data sets have it: an array of labels"
        y = np.arange(8)%3
        def __len__(self): return 8
        def __getitem__(self, i): return torch.ones(6),self.y[i]
    dls = DataLoaders(*[TfmdDL(Items(), 4, num_workers=0, n_inp=1) for _ in range(2)])
    y = mix_unlabelled(dls, [torch.zeros(6)]*5, 1).train.one_batch()[1]
    assert y.tolist()==[0, 1, 2, 0]+4*[UNLABELLED]


def test_rows_are_added_to_data_that_have_been_extended_before(folder):
    dls = images(folder)
    files = get_image_files(folder/'unlabelled')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), CrossEntropyLossFlat())
    with learn.no_bar(): more = pseudo_labels(learn, files[:6]).dls()
    x,y = mix_unlabelled(more, files[6:], ratio=1).train.one_batch()
    assert x.shape==(8, 3, 12, 12) and (y==UNLABELLED).sum()==4


def test_items_may_be_rows_of_a_data_frame_where_the_data_are():
    df = pd.DataFrame(dict(a=np.arange(24.), b=1., y=[f'class {i%3}' for i in range(24)]))
    def inputs(row): return torch.tensor([row['a'], row['b']], dtype=torch.float32)
    tfms = [[inputs], [lambda row: row['y'], Categorize()]]
    dls = Datasets(df, tfms, splits=[list(range(16)), list(range(16, 24))]).dataloaders(bs=8, num_workers=0)
    mixed = mix_unlabelled(dls, df.iloc[16:])
    seen = torch.cat([xb[yb==UNLABELLED] for xb,yb in mixed.train])[:, 0]
    assert {*seen.tolist()}=={*map(float, range(16, 24))}
    net = nn.Linear(2, 3)
    labels = pseudo_labels(Learner(dls, net, CrossEntropyLossFlat()), df.iloc[16:])
    want = net(torch.tensor([[a, 1.] for a in range(16, 24)])).softmax(1)
    torch.testing.assert_close(labels.probs, want)
    with pytest.raises(ValueError, match='items is empty'): mix_unlabelled(dls, df.iloc[:0])
