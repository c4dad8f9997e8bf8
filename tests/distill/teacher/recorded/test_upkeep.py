"A recording that is checked, described, merged, and planned on paper"
import os, shutil

import numpy as np
import pytest
import torch
from fastai.data.core import TfmdDL
from torch import nn

from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.layout import Layout, shards_for
from fasterai.distill.teacher.recorded.paper import plan_recording, row_bytes
from fasterai.distill.teacher.recorded.recorded import Recording
from fasterai.distill.teacher.recorded.shards import Manifest
from fasterai.distill.teacher.recorded.upkeep import check_recording, describe_recording, info_text, merge_recordings
from fasterai.distill.teacher.teacher import Teacher as Asked
from recording import BS, N, Blobs, Teacher, loaders, train

fp32 = dict(dtype=torch.float32)


@pytest.fixture
def path(tmp_path):
    for i in range(2): record(Teacher(), loaders().train, tmp_path/'a', part=(i, 2), **fp32)
    return tmp_path/'a'


class TestCheck:
    def test_whole(self, path):
        check = check_recording(path)
        assert (check.ok, check.whole, check.planned)==(True, N, N) and 'all is well' in str(check)

    def test_a_hole_a_flipped_byte_and_a_stranger(self, path):
        (path/'shard-00000').unlink()
        data = bytearray((path/'shard-00001').read_bytes())
        data[-5] ^= 1
        (path/'shard-00001').write_bytes(data)
        os.truncate(path/'shard-00002', 4200)
        shutil.copy(path/'shard-00003', path/'shard-00099')
        check = check_recording(path)
        assert (check.ok, check.holes, check.damaged, check.whole)==(False, 2*BS, 1, N-2*BS-1)
        assert ['shard-00001: 1 rows' in str(check), 'shard-00002 was cut short' in str(check),
                'shard-00099: there is no such shard' in str(check)]==[True]*3

    def test_a_shard_that_is_there_twice(self, path):
        shutil.copy(path/'shard-00003', path/'shard-00003.part')
        assert check_recording(path).doubles==BS and not check_recording(path).ok


class TestMerge:
    def test_one_file_of_many_trains_as_they_do(self, path):
        assert merge_recordings(path, path.parent/'b').ok
        assert sorted(o.name for o in (path.parent/'b').iterdir())==['shard-00000', 'teacher.recording']
        assert torch.equal(train(loaders(), None, Recording(path.parent/'b')), train(loaders(), Teacher()))

    def test_halves_from_two_machines(self, tmp_path):
        for i in range(2): record(Teacher(), loaders().train, tmp_path/str(i), part=(i, 2), **fp32)
        assert not check_recording(tmp_path/'0').ok
        assert merge_recordings([tmp_path/'0', tmp_path/'1'], tmp_path/'both').ok
        assert torch.equal(train(loaders(), None, Recording(tmp_path/'both')), train(loaders(), Teacher()))

    def test_with_views(self, tmp_path):
        def dls(): return loaders(Blobs(N-3, jitter=1.), bs=BS, shuffle=True, num_workers=0, drop_last=True)
        record(Teacher(), dls().train, tmp_path/'a', views=2, **fp32)
        assert merge_recordings(tmp_path/'a', tmp_path/'b').ok
        cache = Recording(tmp_path/'b')
        train(dls(), None, cache, n=2)
        assert cache.asked==0

    def test_others_are_refused(self, path):
        record(Teacher(seed=6), loaders().train, path.parent/'b', **fp32)
        with pytest.raises(ValueError, match='b is another recording than .*a: another teacher'):
            merge_recordings([path, path.parent/'b'], path.parent/'c')
        with pytest.raises(ValueError, match='a recording in .*a already'): merge_recordings(path, path)
        assert not (path.parent/'c').exists()


def test_described(path):
    said = describe_recording(path)
    assert 'Sequential, weights ' in said['teacher'] and said['rows']=='48 of 40 B' and said['views']=='1'
    assert said['answers']=='4 logits' and said['dtype']=='float32' and said['files']=='6'
    assert said['data']=='Blobs in a TfmdDL, 48 samples' and len(info_text(said).splitlines())>=9
    (path/'shard-00003').rename(path/'shard-00003.part')
    assert describe_recording(path)['files']=='5, and 1 unfinished'


class TestLayout:
    @pytest.mark.parametrize('n,k,bs,drop_last,processes', [
        (48, None, 8, True, 1), (45, None, 8, False, 1), (5, 3, 8, False, 1),
        (45, 2, 8, False, 1), (45, 2, 8, True, 1), (45, 3, 7, False, 2), (46, 2, 5, True, 4), (47, 1, 4, False, 5)])
    @pytest.mark.parametrize('shards', [1, 3, 7])
    def test_each_row_of_the_plan_is_in_one_batch_and_one_shard(self, n, k, bs, drop_last, processes, shards):
        layout = Layout(n, k, bs, drop_last, processes, shards)
        planned = np.concatenate([layout.planned(i) for i in range(shards)])
        assert len(planned)==layout.rows==n*(k or 1) and layout.firsts[-1]==layout.rows
        seen = np.zeros(layout.rows, int)
        for i in range(shards):
            for a,b in zip(*layout.batches_of(i)):
                seen[a:b] += 1
                assert layout.firsts[i]<=a<b<=layout.firsts[i+1] and b-a<=bs
        assert (seen==planned).all()
        if not k or processes==1 and not drop_last: assert planned.all()

    def test_the_number_of_shards(self):
        big = Layout(14_200_000, 8, 64)
        assert [shards_for(big, 112, 1), shards_for(big, 43712, 8), shards_for(big, 112, 1000)]==[13, 512, 1000]
        assert shards_for(Layout(10, bs=64), 112, 4)==1


class TestPaper:
    @pytest.mark.parametrize('kw', [dict(topk=None), dict(topk=20), dict(topk=20, dtype=torch.float32)])
    def test_a_row_is_as_long_as_those_that_are_written(self, tmp_path, kw):
        record(Teacher(classes=1000), loaders().train, tmp_path, **kw)
        assert Manifest.at(tmp_path).row.itemsize==row_bytes(1000, **kw)

    def test_few_classes_have_no_twenty_likeliest(self):
        assert plan_recording(1000, 10).kept.tolist()==['all logits']
        with pytest.raises(ValueError, match='topk=20 leaves nothing out of 10 classes'):
            plan_recording(1000, 10, topk=20)

    def test_imagenet_21k(self):
        plan = plan_recording(14_200_000, 21_841, views=8, rows_per_second=500, gpus=(8,))
        assert plan['bytes a row'].tolist()==[43712, 112] and plan.rows.tolist()==[8*14_200_000]*2
        assert plan.GB.tolist()==[pytest.approx(8*14.2e6*43712/1e9, abs=.1), pytest.approx(8*14.2e6*112/1e9, abs=.1)]
        assert plan['hours on 8 GPUs'].tolist()==[pytest.approx(8*14.2e6/500/8/3600, abs=.1)]*2
        assert row_bytes(40_000, topk=20)==152 and row_bytes(10, maps={'a': (2, 3)})==24+20+12

def test_logits_of_tokens_are_described_by_their_shape(tmp_path):
    class OfTokens(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(4, 11)
        def forward(self, x): return self.l(x)
    samples = [(torch.randn(6, 4), torch.zeros(6, dtype=torch.long)) for _ in range(8)]
    dl = TfmdDL(samples, bs=4, shuffle=True, num_workers=0, device='cpu')
    record(Asked(OfTokens(), axis=-1), dl, tmp_path/'tokens')
    record(Teacher(classes=4), loaders().train, tmp_path/'rows')
    said = [describe_recording(tmp_path/o)['answers'] for o in ('tokens', 'rows')]
    assert said==['6x11 logits', '4 logits']
