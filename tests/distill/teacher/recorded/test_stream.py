"Samples of a stream, known by their keys: in any order, from any archive, by any number of jobs"
import os, pickle

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_basics import ItemTransform
from torch.utils.data import IterableDataset

from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import Recording
from fasterai.distill.teacher.recorded.upkeep import check_recording, describe_recording, merge_recordings
from recording import BS, N, Blobs, Teacher, loaders, train

fp32 = dict(dtype=torch.float32)


@pytest.fixture
def path(tmp_path): return tmp_path/'answers'


class Archive(IterableDataset):
    "Samples as WebDataset gives them; `order` is that of their numbers"
    def __init__(self, order=range(N), seed=0):
        self.x = Blobs(seed=seed).x
        self.order = order
    def __iter__(self):
        for i in self.order: yield {'__key__':f'shard/{i:04d}', 'img':self.x[i], 'cls':torch.tensor(i%4)}

class Tuples(Archive):
    def __iter__(self):
        for o in super().__iter__(): yield o['__key__'],o['img'],o['cls']

def streams(*args, cls=Archive, tfm=lambda o: (o['img'], o['cls']), **kw):
    ds = cls(*args)
    dl = TfmdDL(ds, **{**dict(bs=BS, num_workers=0, device='cpu', after_item=tfm, n=len(ds.order)), **kw})
    dl._n_inp = 1 # else fastai draws a sample to find out, which the epoch then lacks
    return DataLoaders(dl, loaders().valid, device='cpu')


def test_the_weights_are_those_of_a_training_beside_the_teacher(path):
    for i in range(2): record(Teacher(), streams().train, path, part=(i, 2), **fp32)
    check = check_recording(path)
    assert check.ok and check.whole==N
    shuffled = np.random.default_rng(0).permutation(N).tolist()
    plain = train(streams(shuffled), Teacher(), n=4)
    for teacher in None,Teacher():
        cache = Recording(path)
        assert torch.equal(train(streams(shuffled), teacher, cache, n=4), plain) and (cache.hits, cache.asked)==(4*N, 0)

def test_texts_that_come_first_and_keys_of_ones_own(path):
    record(Teacher(), streams(cls=Tuples, tfm=ItemTransform(lambda o: o[1:])).train, path, **fp32)
    cache = Recording(path)
    train(streams(), None, cache, n=1)
    assert cache.hits==N
    def number(o): return int(o['__key__'][-4:])
    record(Teacher(), streams().train, path.parent/'b', key=number, **fp32)
    train(streams(), None, Recording(path.parent/'b', key=number), n=1)
    with pytest.raises(ValueError, match='has no answer to this batch .8 samples of a stream'):
        train(streams(), None, Recording(path.parent/'b'), n=1)
    with pytest.raises(TypeError, match='give key='): record(Teacher(), streams(tfm=None, cls=Nameless).train, path)

class Nameless(Archive):
    def __iter__(self):
        for o in super().__iter__(): yield o['img'],o['cls']

def test_only_what_is_missing_is_asked_about(path):
    record(Teacher(), streams(range(20)).train, path, part=(0, 1), **fp32)
    teacher = Teacher()
    reports = [record(teacher, streams().train, path, part=(i, 3), **fp32) for i in range(3)]
    assert sum(o.asked for o in reports)==N-20 and sum(o.found for o in reports)==20 and check_recording(path).ok
    with pytest.raises(ValueError, match='views: the samples of a stream have one view'):
        record(teacher, streams().train, path, views=2)

def test_a_data_set_that_each_process_has_a_share_of(path):
    for i in range(2): record(Teacher(), streams(range(i, N, 2)).train, path, part=(i, 2), split=False, **fp32)
    assert check_recording(path).whole==N

def test_workers_that_all_draw_the_same(path):
    report = record(Teacher(), streams(range(20), n=None, num_workers=2).train, path, **fp32)
    assert report.asked==20 and check_recording(path).doubles==0

def test_a_log_that_was_cut_goes_on(path):
    record(Teacher(), streams().train, path, **fp32)
    file = path/'keys-0000-of-0001'
    os.truncate(file, file.stat().st_size-100)
    report = record(Teacher(), streams().train, path, **fp32)
    assert 0<report.asked<4 and check_recording(path).whole==N

def test_others_are_refused(path):
    record(Teacher(), streams().train, path, **fp32)
    with pytest.raises(ValueError, match='its teacher is'): record(Other(), streams().train, path, **fp32)
    with pytest.raises(ValueError, match='another teacher, or other weights of it: .*lies elsewhere'):
        train(streams(), Teacher(seed=6), Recording(path))
    with pytest.raises(ValueError, match='a sample of the stream is not the input'):
        train(streams(range(N), 1), None, Recording(path))
    with pytest.raises(TypeError, match='known by the keys of a stream, and this Blobs has indices'):
        train(loaders(), None, Recording(path))
    with pytest.raises(ValueError, match='it is recorded by keys, here by indices'):
        record(Teacher(), loaders().train, path, **fp32)

class Other(Teacher):
    def __init__(self): super().__init__(seed=6)

def test_a_random_stream_is_noticed(path):
    def noisy(o): return o['img']+torch.rand(1),o['cls']
    with pytest.raises(ValueError, match='drawn twice, gave different inputs'):
        record(Teacher(), streams(tfm=noisy).train, path)

def test_merged_and_described(path):
    for i in range(2): record(Teacher(), streams().train, path, part=(i, 2), **fp32)
    record(Teacher(), streams(range(10)).train, path.parent/'b', **fp32)
    merged = merge_recordings([path, path.parent/'b'], path.parent/'c')
    assert merged.ok and merged.whole==N
    cache = pickle.loads(pickle.dumps(Recording(path.parent/'c')))
    train(streams(), None, cache, n=1)
    assert cache.hits==N and describe_recording(path)['known by']=='the key of each sample'
