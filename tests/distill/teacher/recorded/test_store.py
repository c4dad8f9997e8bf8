"The file of answers: kills, damage, full disks, forged headers, and files that are somebody else's"
import errno
import json
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from fasterai.distill.teacher.recorded import store
from fasterai.distill.teacher.recorded.recorded import Replay, TeacherCache
from fasterai.distill.teacher.recorded.store import magic
from recording import BS, N, PROBE, Blobs, Teacher, in_process, learner, loaders, train

START = 2*4096  # a page of header, a page of probe; then the rows


@pytest.fixture
def path(tmp_path): return tmp_path/'teacher.cache'


def fill(path, **kw): train(loaders(), Teacher(), TeacherCache(path, dtype=torch.float32, **kw), n=1)

class TestFile:
    def again(self, path, n_asked, words=None):
        "Train on the file: about `n_asked` samples are asked again (their batches are), and the weights are right"
        teacher,cache = Teacher(),TeacherCache(path, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            weights = train(loaders(), teacher, cache, n=2)
        assert n_asked<=cache.asked<=min(BS*n_asked, N) and sum(teacher.seen)==cache.asked+PROBE
        assert not words or any(words in str(o.message) for o in said)
        assert torch.equal(weights, train(loaders(), Teacher(), n=2))

    def test_killed_in_the_middle_of_a_write_then_resumed(self, path):
        def die():
            n,pwrite = [0],os.pwrite
            def torn(fd, b, place):
                n[0] += 1
                if n[0]<20: return pwrite(fd, b, place)
                pwrite(fd, bytes(b)[:b.size//2], place)
                os.kill(os.getpid(), signal.SIGKILL)
            os.pwrite = torn
            fill(path)
        p = in_process(die)
        p.join()
        assert p.exitcode==-signal.SIGKILL
        rows = np.fromfile(path, np.uint8, offset=START).reshape(N, -1)
        there = int((rows[:, :4].view('<u4')!=0).sum())
        assert 19<=there<N
        self.again(path, N-there+1, '1 damaged')
        self.again(path, 0)

    def test_a_flipped_byte_is_noticed_and_mended(self, path):
        fill(path)
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)
        self.again(path, 1, '1 damaged')
        self.again(path, 0)

    @pytest.mark.parametrize('keep', [-100, START+5, START, START-1, 4096+5, 4096, 2000, 500, 20, 10, 0])
    def test_a_truncated_file_is_rebuilt(self, path, keep):
        fill(path)
        row = (path.stat().st_size-START)//N
        path.write_bytes(path.read_bytes()[:keep])
        self.again(path, -(-100//row) if keep<0 else N)
        self.again(path, 0)

    @pytest.mark.parametrize('content',
                             [b'my thesis', b'fasterai', b'\x89', b'fasterai teacher cache 1\n{"a":1}\n',
                              magic+b'{"a":\n',
        magic+b'[]\n', magic+b'{}\n', magic+b'['*10**5+b'\n', magic+b' '*(1<<20), magic[:-2]+b'3\n{}\n'])
    def test_what_is_not_ours_is_refused_and_kept(self, path, content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)): fill(path)
        assert path.read_bytes()==content

    @pytest.mark.parametrize('kw,words',
                             [(dict(teacher=Teacher(seed=6)), 'another teacher'),
                              (dict(dls=lambda: loaders(Blobs(40))), 'has 48 samples, the data 40'),
        (dict(dls=lambda: loaders(Blobs(seed=3))), 'do not look'), (dict(cache=dict(topk=2)), 'keeps'),
        (dict(cache=dict(maps=True), layers=['0']), 'feature maps are')])
    def test_a_foreign_cache_is_refused_with_the_reason(self, path, kw, words):
        fill(path)
        before = path.read_bytes()
        kw = {'teacher':Teacher(), 'dls':loaders, 'cache':{}, **kw}
        with pytest.raises(ValueError, match=words):
            train(kw.pop('dls')(), kw.pop('teacher'), TeacherCache(path, **{'dtype':torch.float32, **kw.pop('cache')}),
                  **kw)
        assert path.read_bytes()==before

    def test_one_changed_sample_is_noticed(self, path):
        fill(path)
        ds = Blobs()
        ds.x[5, 0, 0, 0] = torch.nextafter(ds.x[5, 0, 0, 0], torch.tensor(9.))
        teacher,cache = Teacher(),TeacherCache(path, dtype=torch.float32)
        with pytest.warns(UserWarning, match='sample 5 is not the input'):
            weights = train(loaders(ds), teacher, cache, n=3)
        assert torch.equal(weights, train(loaders(ds), Teacher(), n=3))
        assert (cache.asked, cache.hits)==(BS, 3*N-BS)

    def goes_on(self, words, cache, dls=None, teacher=None):
        teacher = teacher or Teacher()
        with pytest.warns(UserWarning, match=words): weights = train(dls or loaders(), teacher, cache)
        assert torch.equal(weights, train(loaders(), Teacher(scale=teacher.scale)))

    def test_a_disk_too_small(self, path, monkeypatch):
        monkeypatch.setattr(store.shutil, 'disk_usage', lambda p: type('', (), dict(free=100)))
        self.goes_on('needs 9.73 kB, 100 B are free.*goes on without', TeacherCache(path))
        assert not list(path.parent.iterdir())

    def test_a_disk_that_fills_up(self, path, monkeypatch):
        pwrite = os.pwrite
        monkeypatch.setattr(store.os, 'pwrite', lambda fd, b, place: pwrite(fd, bytes(b)[:20], place))
        self.goes_on('the disk is full.*goes on without', TeacherCache(path))

    def test_room_that_cannot_be_reserved(self, path, monkeypatch):
        def full(fd, start, n): raise OSError(errno.ENOSPC, 'No space left on device')
        monkeypatch.setattr(store.os, 'posix_fallocate', full)
        self.goes_on('No space left.*goes on without', TeacherCache(path))
        assert not list(path.parent.iterdir())

    def test_a_place_where_nothing_can_be_made(self):
        self.goes_on('cannot (open|write).*goes on without', TeacherCache('/dev/null/teacher.cache'))

    def test_read_only(self, path, monkeypatch):
        fill(path)
        os_open = os.open
        def no_writing(file, flags, *args, **kw):
            if flags&os.O_RDWR: raise OSError(30, 'Read-only file system')
            return os_open(file, flags, *args, **kw)
        monkeypatch.setattr(store.os, 'open', no_writing)
        self.again(path, 0)
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)
        self.goes_on('Read-only', TeacherCache(path, dtype=torch.float32))

    def test_answers_too_large_for_half_precision(self):
        self.goes_on('say dtype=torch.float32', TeacherCache(), teacher=Teacher(scale=1e6))

    def test_a_teacher_that_says_nan(self):
        with pytest.warns(UserWarning, match='NaN'): train(loaders(), Teacher(scale=float('nan')), TeacherCache())

    def test_processes_share_a_file(self, path):
        ps = [in_process(fill, path) for _ in range(2)]
        for p in ps: p.join(); assert p.exitcode==0
        self.again(path, 0)

    def test_ranks_share_a_file(self, path, monkeypatch):
        dist = pytest.importorskip('fastai.distributed')
        monkeypatch.setattr(dist.DistributedDL, '_broadcast', lambda self, t, rank: list(t))
        def rank(r, cache, seed):
            dls,teacher = loaders(Blobs(46, jitter=0.5*isinstance(cache, Replay)), bs=8, shuffle=True,
                                  num_workers=0),Teacher()
            learn,n = learner(dls, teacher),0
            dls.loaders[0] = dist.DistributedDL(dls.train, rank=r, world_size=2)
            learn.training = True
            with cache.attach(learn, teacher):
                for epoch in range(2):
                    for i in range(2): dls.train.dl.rng.seed(seed+epoch)
                    for x,_ in dls.train:
                        assert torch.allclose(cache.ask(x)[0], teacher(x)[0], atol=1e-6)
                        n += len(x)
            return n,cache.hits
        f32 = dict(dtype=torch.float32)
        assert rank(0, TeacherCache(path, **f32), 1)[0]==46 and rank(1, TeacherCache(path, **f32), 1)[0]==46
        assert rank(0, TeacherCache(path, **f32), 7)==(46, 46)
        path.unlink()
        assert [rank(r, Replay(k=1, path=path, **f32), 1) for r in (0, 1)]==[(46, 23)]*2
        assert [rank(r, Replay(k=1, path=path, **f32), 1) for r in (0, 1)]==[(46, 46)]*2

    def test_a_link_without_a_target_is_refused_and_kept(self, path):
        path.symlink_to(path.parent/'away'/'answers')
        with pytest.raises(ValueError, match='which is not there'): fill(path)
        assert path.is_symlink() and list(path.parent.iterdir())==[path]

    def test_a_link_to_a_cache_is_followed(self, path):
        fill(path.parent/'elsewhere')
        path.symlink_to(path.parent/'elsewhere')
        self.again(path, 0)
        assert path.is_symlink()

    @pytest.mark.parametrize('what', ['/dev/zero', '/dev/null'])
    def test_a_device_is_refused(self, what):
        with pytest.raises(ValueError, match='not a file'): fill(what)

    def test_a_pipe_is_refused_without_waiting(self, path):
        os.mkfifo(path)
        with pytest.raises(ValueError, match='not a file'): fill(path)
        assert path.is_fifo()

    def test_a_folder_holds_the_file(self, tmp_path):
        fill(tmp_path)
        assert [o.name for o in tmp_path.iterdir()]==['teacher.cache']
        (tmp_path/'other'/'teacher.cache').mkdir(parents=True)
        with pytest.raises(ValueError, match='not a file'): fill(tmp_path/'other')

    def test_links_under_guessable_names_are_not_followed(self, path):
        precious = path.parent/'precious'
        precious.write_text('kept')
        names = [path.with_name(o) for o in (f'{path.name}.{os.getpid()}', f'{path.name}.tmp', f'.{path.name}.tmp',
                                             f'.{path.name}')]
        for o in names: o.symlink_to(precious)
        fill(path)
        assert precious.read_text()=='kept' and not path.is_symlink()
        assert {*path.parent.iterdir()}=={path, precious, *names}

    def test_a_file_that_is_cut_while_it_is_open(self, path):
        fill(path)
        learn,teacher,cache = learner(loaders(), Teacher()),Teacher(),TeacherCache(path, dtype=torch.float32)
        learn.training = True
        with cache.attach(learn, teacher):
            for i,(x,_) in enumerate(learn.dls.train):
                if i==2: os.truncate(path, 100)
                assert torch.equal(cache.ask(x)[0], teacher(x)[0])
        assert (cache.asked, cache.hits)==(N-2*BS, 2*BS)

    def test_rows_that_do_not_stay_in_memory(self, path, monkeypatch):
        monkeypatch.setattr(store, '_in_memory', 0)
        fill(path)
        self.again(path, 0)


class TestForged:
    "Headers and rows that somebody made up, or that a disk made of ours"
    def answers(self, path):
        "Every answer is the teacher's own; what was warned of"
        learn,teacher = learner(loaders(), Teacher()),Teacher()
        learn.training = True
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            with TeacherCache(path, dtype=torch.float32).attach(learn, teacher) as cache:
                for x,_ in learn.dls.train: assert torch.equal(cache.ask(x)[0], teacher(x)[0])
        return said

    def header(self, path, change):
        raw = path.read_bytes()
        line = raw[len(magic):raw.index(b'\n', len(magic))]
        line = change(json.loads(line)) if callable(change) else change
        head = magic+(line if isinstance(line, bytes) else json.dumps(line).encode())+b'\n'
        path.write_bytes(head+bytes(-len(head)%4096)+raw[4096:])
        return path.stat().st_size

    @pytest.mark.parametrize('changes',
                             [dict(rows=10**6), dict(rows=N-1), dict(rows=True), dict(rows='48'), dict(fields=[]),
                              dict(fields=[['other', 'float32', [4]]]),
        dict(fields=[['pred', 'object', [4]]]), dict(fields=[['pred', 'float32', [10**12]]]), dict(fields=None),
        dict(samples=-1), dict(views=[None, 0.5]), dict(layers=['0']),
        dict(classes=4), dict(probe=None), dict(probe={}), dict(probe=dict(block=0)),
        dict(keeps=[None, 'torch.float16'])])
    def test_a_changed_header_is_refused(self, path, changes):
        fill(path)
        size = self.header(path, lambda h: {**h, **changes})
        with pytest.raises(ValueError, match=f'{path} does not fit'): fill(path)
        assert path.stat().st_size==size

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_any_header_is_refused_or_right(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp('forged')/'answers'
        fill(path)
        value = st.recursive(st.none()|st.booleans()|st.integers()|st.floats()|st.text(max_size=5),
                             lambda o: st.lists(o, max_size=3)|st.dictionaries(st.text(max_size=3), o, max_size=3))
        names = st.sampled_from(['rows', 'fields', 'samples', 'views', 'keeps', 'layers', 'logits', 'classes', 'probe',
                                 'block'])
        changes = data.draw(st.dictionaries(names, value, min_size=1, max_size=3))
        size = self.header(path, lambda h: {**h, **changes})
        try: self.answers(path)
        except ValueError as e: assert str(path) in str(e)
        assert path.stat().st_size<=2*size

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_any_damage_is_refused_or_mended(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp('damaged')/'answers'
        fill(path)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            i = data.draw(st.integers(0, 700)|st.integers(START, len(raw)-1)|st.integers(0, len(raw)-1))
            raw[i] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[:data.draw(st.just(len(raw))|st.integers(0, len(raw)))])
        try: self.answers(path)
        except ValueError as e: assert str(path) in str(e)

    def test_rows_that_were_swapped(self, path):
        fill(path)
        raw = np.fromfile(path, np.uint8)
        rows = raw[START:].reshape(N, -1)
        rows[[3, 30]] = rows[[30, 3]]
        raw.tofile(path)
        assert any('damaged' in str(o.message) for o in self.answers(path))
