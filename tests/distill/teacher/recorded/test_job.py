"Recorded by any number of jobs, killed or not, is recorded by one: none lost, none doubled, the same student"
import json, os, random, signal, time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import lr_find  # patches Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Brightness

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.teacher.recorded import store
from fasterai.distill.teacher.recorded.job import Report, this_part
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import RecordedTeacher, Recording, Replay, TeacherCache
from fasterai.distill.teacher.recorded.shards import Manifest, Shards, pieces_of
from fasterai.distill.teacher.recorded.upkeep import check_recording
from fasterai.distill.teacher.teacher import Teacher as Frozen
from recording import BS, N, PROBE, Blobs, Teacher, in_process, learner, loaders, state, train

fp32 = dict(dtype=torch.float32)
def twice(x): return x*2 if x.is_floating_point() else x


@pytest.fixture
def path(tmp_path): return tmp_path/'answers'

def part_of(path, i, n, **kw): record(Teacher(), loaders(**kw).train, path, part=(i, n), **fp32)

def rows_of(path):
    "Every row of the folder"
    manifest = Manifest.at(path)
    shards = Shards(manifest, pieces_of(manifest))
    rec,_ = shards.raw_rows(np.arange(shards.n))
    shards.close()
    return rec


class TestTraining:
    def test_by_two_jobs_by_one_and_beside_the_student(self, tmp_path):
        for p in [in_process(part_of, tmp_path/'two', i, 2) for i in range(2)]: p.join(); assert p.exitcode==0
        record(Teacher(), loaders().train, tmp_path/'one', **fp32)
        plain = train(loaders(), Teacher(), n=4) # 24 steps
        for folder in 'two','one':
            cache = Recording(tmp_path/folder)
            assert torch.equal(train(loaders(), None, cache, n=4), plain)
            assert (cache.hits, cache.asked)==(4*N, 0)

    def test_a_teacher_is_asked_no_more_than_once_about_a_sample(self, path):
        teacher = Teacher()
        record(teacher, loaders().train, path)
        assert teacher.seen==[PROBE]+[BS]*(N//BS)
        record(teacher, loaders().train, path)
        assert teacher.seen[N//BS+1:]==[PROBE]

    @pytest.mark.parametrize('n', [N, N-3])
    @pytest.mark.parametrize('drop_last', [False, True])
    def test_views(self, path, n, drop_last):
        def dls(): return loaders(Blobs(n, jitter=0.5), bs=BS, shuffle=True, num_workers=0, drop_last=drop_last,
                                  after_batch=[Brightness(p=0.5)])
        for i in range(3): record(Teacher(), dls().train, path, views=2, part=(i, 3), **fp32)
        assert check_recording(path).ok
        cache = Recording(path)
        replayed = train(dls(), Teacher(), Replay(k=2, dtype=torch.float32), n=4)
        assert torch.equal(train(dls(), None, cache, n=4), replayed)
        assert cache.asked==0 and cache.k==2

    @pytest.mark.parametrize('n_workers', [0, 2])
    def test_views_of_a_training_on_two_processes(self, path, monkeypatch, n_workers):
        distributed = pytest.importorskip('fastai.distributed')
        monkeypatch.setattr(distributed.DistributedDL, '_broadcast', lambda self, t, rank: t)
        def dls(): return loaders(Blobs(jitter=0.5), bs=5, shuffle=True, num_workers=n_workers)
        record(Teacher(), dls().train, path, views=2, processes=2, part=(0, 1), **fp32)
        monkeypatch.setenv('WORLD_SIZE', '2')
        for rank in '0', '1':
            monkeypatch.setenv('RANK', rank)
            both,cache = dls(),Recording(path)
            both.loaders[0] = distributed.DistributedDL(both.train, int(rank), 2)
            both.train.rng = random.Random(0)
            learn = learner(both, None)
            learn.training = True
            with cache.attach(learn, None):
                for _ in range(2): assert len([cache.ask(x) for x,_ in both.train])==5
            assert (cache.hits, cache.asked)==(N, 0)
        monkeypatch.setenv('WORLD_SIZE', '1')
        with pytest.raises(ValueError, match=r'batches .* are \[5, False, 2\], here \[5, False, 1\]'):
            train(dls(), None, Recording(path), n=1)

    def test_by_the_callback(self, path):
        from helpers import data, learner, net
        def fit(teacher):
            kd = KnowledgeDistillationCallback(teacher, 'SoftTarget')
            learn = learner(net(2), data(n=80), loss_func=CrossEntropyLossFlat())
            learn.fit(2, cbs=kd) # 20 steps
            return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
        teacher = net(8, seed=3).eval()
        for i in range(2): record(teacher, data(n=80).train, path, part=(i, 2), **fp32)
        plain,recorded = fit(teacher),RecordedTeacher(path)
        assert torch.equal(fit(recorded), plain) and recorded.cache.hits==160
        live = Frozen(teacher, cache=path)
        assert torch.equal(fit(live), plain) and isinstance(live.cache, Recording) and live.cache.asked==0
        learn = learner(net(2), data(n=80), cbs=KnowledgeDistillationCallback(recorded, 'SoftTarget'))
        learn.lr_find(show_plot=False, num_it=8, suggest_funcs=())
        assert recorded.cache.trace is None and recorded.fits==0
        learn = learner(net(2), data(n=80), cbs=KnowledgeDistillationCallback(recorded, 'SoftTarget', valid=True))
        with pytest.raises(ValueError, match='no answer to a batch of the validation'): learn.fit(1)

    @pytest.mark.parametrize('same_data', [True, False])
    def test_in_a_fit_within_a_fit(self, path, same_data):
        from helpers import data, learner, net
        teacher,dls,sums = net(8, seed=3).eval(),data(),[]
        record(teacher, dls.train, path, maps=['3'], **fp32)
        recorded = RecordedTeacher(path)
        def maps(fm_t): return (fm_t['3'].sum()-sums[-1]).abs()
        def logits(pred, teacher_pred): return F.mse_loss(pred, teacher_pred)
        class Within(Callback):
            def before_batch(self): sums.append(teacher[:4](self.x).sum().detach())
            def after_batch(self):
                if not self.training or self.train_iter!=3: return
                inner = learner(net(2), dls if same_data else data())
                with pytest.raises(ValueError, match='the losses need 4'): inner.fit(1, cbs=kd('4'))
                inner.fit(1, cbs=KnowledgeDistillationCallback(recorded, logits))
        def kd(layer): return KnowledgeDistillationCallback(recorded, maps, activations_student='3',
                                                            activations_teacher=layer)
        cbs = [KnowledgeDistillationCallback(recorded, logits), kd('3'), Within()]
        learner(net(2), dls).fit(2, cbs=cbs)
        assert cbs[1].log.history.distill_loss.abs().max()<1e-4 and recorded.fits==0
        assert recorded.cache.trace is None and recorded.cache.hits==(2*64 if not same_data else 2*64+32)

    def test_some_of_the_maps(self, path):
        record(Teacher(), loaders().train, path, maps=['0', '2'], **fp32)
        plain = train(loaders(), Teacher(), layers=['2'])
        assert torch.equal(train(loaders(), None, Recording(path), layers=['2']), plain)
        with pytest.raises(ValueError, match='the losses need 4, and .* holds 0, 2, logits'):
            train(loaders(), None, Recording(path), layers=['4'])


class TestClasses:
    def heard(self, teacher, classes, **kw):
        "What a loss hears, and what `net` says; the student's classes are `classes`"
        from helpers import data, learner, net
        dls,pairs = data(c=len(classes)),[]
        dls.vocab = list(classes)
        def loss(pred, teacher_pred):
            pairs.append((teacher_pred, self.net(learn.xb[0]).detach()))
            return F.mse_loss(pred, teacher_pred)
        learn = learner(net(2, len(classes)), dls)
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, loss, **kw))
        return map(torch.cat, zip(*pairs))

    @pytest.fixture
    def source(self):
        "A Learner whose classes are c, a, b"
        from helpers import data, learner, net
        self.net,dls = net(8, seed=3).eval(),data()
        dls.vocab = list('cab')
        return learner(self.net, dls)

    @pytest.mark.parametrize('topk', [None, 2])
    def test_in_another_order(self, path, source, topk, capsys):
        record(source, source, path, topk=topk, **fp32)
        assert Manifest.at(path).header['names']==list('cab')
        for teacher in RecordedTeacher(path),Frozen(source, cache=path):
            heard,said = self.heard(teacher, 'abc')
            assert "put in the student's order" in capsys.readouterr().out and teacher.cache.hits==32
            if topk: assert torch.equal(heard.argmax(1), said[:, [1, 2, 0]].argmax(1))
            else: assert torch.equal(heard, said[:, [1, 2, 0]])
        heard,said = self.heard(RecordedTeacher(path), 'ba')
        assert topk or torch.equal(heard, said[:, [2, 1]])
        with pytest.raises(ValueError, match='of which the student knows 2, so the teacher cannot be compared'):
            self.heard(Frozen(source, cache=path), 'ba')
        with pytest.raises(ValueError, match="does not know the student's 'x'"):
            self.heard(RecordedTeacher(path), 'abx')

    def test_one_logit_of_two_changes_its_sign(self, path):
        from helpers import data, learner, net
        def of(model, classes):
            dls = data(y=(torch.arange(32)%2).float()[:, None])
            dls.vocab = list(classes)
            return learner(model, dls, loss_func=nn.BCEWithLogitsLoss())
        t = net(4, 1, 3).eval()
        record(t, of(t, 'ba'), path, **fp32)
        for classes,sign in ('ab', -1), ('ba', 1):
            pairs = []
            def loss(pred, teacher_pred):
                pairs.append((teacher_pred, sign*t(learn.xb[0]).detach()))
                return F.mse_loss(pred, teacher_pred)
            learn = of(net(4, 1), classes)
            learn.fit(1, cbs=KnowledgeDistillationCallback(RecordedTeacher(path), loss))
            for heard,want in pairs: torch.testing.assert_close(heard, want)

    def test_of_no_matter_or_unknown(self, path, source):
        from helpers import learner, net
        record(source, source, path, maps=['3'])
        source.dls.vocab = list('xyz')
        def feature(fm_t): return fm_t['3'].mean()
        kd = KnowledgeDistillationCallback(RecordedTeacher(path), feature, activations_student='3',
                                           activations_teacher='3')
        learner(net(2), source.dls).fit(1, cbs=kd)
        with pytest.raises(ValueError, match='in the order of the logits, are .*c.* here .*x'):
            record(self.net, source, path, maps=['3'])
        record(self.net, source.dls.train, path, maps=['3']) # of a DataLoader alone the classes are not known
        record(self.net, source.dls.train, path.with_name('other'), **fp32)
        assert Manifest.at(path.with_name('other')).header['names'] is None
        heard,said = self.heard(RecordedTeacher(path.with_name('other')), 'abc')
        assert torch.equal(heard, said)
        record(self.net, source, path.with_name('other'), **fp32)


class Slow(Teacher):
    def __call__(self, *xb, **kw):
        time.sleep(0.02)
        return super().__call__(*xb, **kw)

def many(n=5000): return loaders(Blobs(n), bs=64, shuffle=True, num_workers=0)

class TestKilled:
    def test_three_of_three_and_none_is_lost_or_doubled(self, path):
        def work(i): record(Slow(), many().train, path, part=(i, 3), **fp32)
        rng,killed = random.Random(0),0
        ps = {i: in_process(work, i) for i in range(3)}
        while killed<3 and any(p.is_alive() for p in ps.values()):
            i = rng.choice([i for i,p in ps.items() if p.is_alive()])
            while not (path/f'part-{i:04d}-of-0003.lock').exists(): time.sleep(0.005)
            time.sleep(0.05+0.05*rng.random())
            if not ps[i].is_alive(): continue
            os.kill(ps[i].pid, signal.SIGKILL)
            ps[i].join()
            killed += ps[i].exitcode==-signal.SIGKILL
            ps[i] = in_process(work, i)
        for p in ps.values(): p.join(); assert p.exitcode==0
        check = check_recording(path)
        assert killed==3 and check.ok and check.whole==5000
        said = Teacher()(many().train_ds.x.as_subclass(torch.Tensor))[0]
        assert np.allclose(rows_of(path)['pred'], said.numpy(), atol=1e-5)

    def test_within_a_row(self, path):
        def die():
            pwrite,n = os.pwrite,[0]
            def torn(fd, b, place):
                n[0] += 1
                if n[0]<4: return pwrite(fd, b, place)
                pwrite(fd, bytes(b)[:b.size//2+7], place)
                os.kill(os.getpid(), signal.SIGKILL)
            os.pwrite = torn
            part_of(path, 0, 1)
        p = in_process(die)
        p.join()
        assert p.exitcode==-signal.SIGKILL and check_recording(path).damaged==1
        report = record(Teacher(), loaders().train, path, **fp32)
        assert report.found==3*BS+BS//2 and check_recording(path).ok
        assert torch.equal(train(loaders(), None, Recording(path)), train(loaders(), Teacher()))

    def test_others_go_on(self, path):
        part_of(path, 0, 3)
        reports = [record(Teacher(), loaders().train, path, part=(i, 2), **fp32) for i in range(2)]
        assert sum(o.found for o in reports)==sum(N//6 for i in range(6) if i%3==0)
        assert sum(o.asked+o.found for o in reports)==N and check_recording(path).ok


def damage(file, at=-3):
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)

class TestRefused:
    @pytest.mark.parametrize('dls,teacher,kw,why', [
        (lambda: loaders(Blobs(40)), Teacher, {}, 'it has 48 samples, the data 40'),
        (lambda: loaders(Blobs(seed=3)), Teacher, {}, 'samples do not look as they did'),
        (lambda: loaders(after_batch=[twice]), Teacher, {}, 'samples do not look as they did'),
        (loaders, lambda: Teacher(seed=6), {}, 'another teacher, or other weights of this one'),
        (loaders, Teacher, dict(topk=2), r'keeps \(topk, dtype\) \[None, .*float32.*\], here \[2,'),
        (loaders, Teacher, dict(views=2), r'views \(number, seed\) are \[None, 0\], here \[2, 0\]'),
        (loaders, Teacher, dict(maps=['0']), r"feature maps are \[\], here \['0'\]")])
    def test_another_recording(self, path, dls, teacher, kw, why):
        part_of(path, 0, 2)
        before = {o.name: o.read_bytes() for o in path.iterdir()}
        with pytest.raises(ValueError, match=f'{path}/teacher.recording does not fit.*{why}'):
            record(teacher(), dls().train, path, part=(1, 2), **{**fp32, **kw})
        assert {o.name: o.read_bytes() for o in path.iterdir()}==before

    @pytest.mark.parametrize('dls,teacher,why', [
        (lambda: loaders(Blobs(40)), None, 'it has 48 samples, the data 40'),
        (lambda: loaders(Blobs(seed=3)), None, 'samples do not look as they did'),
        (lambda: loaders(after_batch=[twice]), None, 'samples do not look as they did'),
        (loaders, Teacher(seed=6), 'another teacher, or other weights of this one')])
    def test_another_training(self, path, dls, teacher, why):
        part_of(path, 0, 1)
        with pytest.raises(ValueError, match=f'{path}/teacher.recording does not fit: .*{why}'):
            train(dls(), teacher, Recording(path))

    def test_one_changed_sample(self, path):
        part_of(path, 0, 1)
        ds = Blobs()
        ds.x[5, 0, 0, 0] = torch.nextafter(ds.x[5, 0, 0, 0], torch.tensor(9.))
        with pytest.raises(ValueError, match='sample 5 is not the input that the teacher saw'):
            train(loaders(ds), None, Recording(path))
        with pytest.warns(UserWarning, match='sample 5 is not the input'):
            weights = train(loaders(ds), Teacher(), Recording(path))
        assert torch.equal(weights, train(loaders(ds), Teacher()))

    def test_other_batches_of_views(self, path):
        record(Teacher(), loaders(Blobs(jitter=1.)).train, path, views=2)
        with pytest.raises(ValueError, match=r'batches .* are \[8, False, 1\], here \[6, False, 1\]'):
            train(loaders(Blobs(jitter=1.), bs=6, shuffle=True, num_workers=0), None, Recording(path))

    def test_random_transforms_and_mixtures(self, path):
        with pytest.raises(ValueError, match='^recording: Brightness draw.*use views=8'):
            record(Teacher(), loaders(after_batch=[Brightness(p=0.5)]).train, path)
        with pytest.raises(ValueError, match='^recording: the same samples, drawn twice.*use views=8'):
            record(Teacher(), loaders(Blobs(jitter=1.)).train, path)
        assert not path.exists()
        record(Teacher(), loaders(Blobs(jitter=1.)).train, path, views=2)
        with pytest.raises(ValueError, match='not mixed by MixUp'):
            train(loaders(Blobs(jitter=1.)), None, Recording(path), cbs=[MixUp()])

    def test_a_shard_of_another_run(self, tmp_path):
        for name,seed in dict(a=5, b=6).items(): record(Teacher(seed), loaders().train, tmp_path/name, **fp32)
        os.replace(tmp_path/'b'/'shard-00002', tmp_path/'a'/'shard-00002')
        for f in (lambda: train(loaders(), None, Recording(tmp_path/'a')), lambda: part_of(tmp_path/'a', 0, 1)):
            with pytest.raises(ValueError, match='a/shard-00002 is a shard of another recording.*its teacher is'): f()
        assert 'shard of another recording' in check_recording(tmp_path/'a').wrong[0]

    def test_a_truncated_and_a_renamed_shard(self, path):
        part_of(path, 0, 1)
        os.truncate(path/'shard-00001', (path/'shard-00001').stat().st_size-10)
        for f in (lambda: train(loaders(), None, Recording(path)), lambda: part_of(path, 0, 1)):
            with pytest.raises(ValueError, match='shard-00001 was cut short by 10 B; delete it'): f()
        os.replace(path/'shard-00003', path/'shard-00001')
        with pytest.raises(ValueError, match='shard-00001 is shard-00003 by its header'): part_of(path, 0, 1)

    def test_a_corrupt_row(self, path):
        part_of(path, 0, 1)
        damage(path/'shard-00001')
        with pytest.warns(UserWarning, match='1 damaged rows in shard-00001'):
            with pytest.raises(ValueError, match='teacher.recording has no answer to this batch .sample 23 and 0 more'):
                train(loaders(), None, Recording(path))
        with pytest.warns(UserWarning, match='1 damaged rows in shard-00001'):
            weights = train(loaders(), Teacher(), Recording(path))
        assert torch.equal(weights, train(loaders(), Teacher()))

    @pytest.mark.parametrize('name,at', [('shard-00001', 100), ('teacher.recording', 100), ('teacher.recording', 4100)])
    def test_a_corrupt_header(self, path, name, at):
        part_of(path, 0, 1)
        damage(path/name, at)
        with pytest.raises(ValueError, match=f'{name}.* damaged'): train(loaders(), None, Recording(path))

    def test_two_processes_with_one_part(self, path):
        def work(): record(Slow(), many().train, path, part=(0, 2), **fp32)
        p = in_process(work)
        while not (path/'part-0000-of-0002.lock').exists(): time.sleep(0.005)
        time.sleep(0.02)
        with pytest.raises(ValueError, match=f'part 0 of 2 in {path} is being recorded by process {p.pid} on'):
            record(Teacher(), many().train, path, part=(0, 2), **fp32)
        with pytest.raises(ValueError, match='shard-0000. ?.*part is being written by another process.*part 0 of 1'):
            record(Teacher(), many().train, path, part=(0, 1), **fp32)
        p.kill()
        p.join()

    def test_a_folder_without_a_recording(self, tmp_path):
        with pytest.raises(ValueError, match='there is no recording in .*teacher.recording'): Recording(tmp_path)
        assert isinstance(Frozen(torch.nn.Linear(2, 2), cache=tmp_path).cache, type(tmp_path))

    def test_a_disk_too_small(self, path, monkeypatch):
        monkeypatch.setattr(store.shutil, 'disk_usage', lambda p: type('', (), dict(free=100)))
        with pytest.raises(OSError, match='100 B are free'): part_of(path, 0, 1)


class TestReport:
    def test_sizes_come_first_and_the_error_last(self, path, capsys):
        record(Teacher(classes=1000, scale=9.), loaders().train, path, topk=20, T=4., part=(0, 2))
        said = capsys.readouterr().out
        assert '48 rows of 112 B, 5.38 kB; part 0 of 2 has 24 rows, 2.69 kB, of which 0 are there' in said
        report = Report(**json.loads((path/'part-0000-of-0002.json').read_text()))
        p,q = (torch.tensor(report.errors[0]) for _ in range(2))
        assert 'soft target at T=4 is off by' in str(report) and 0<report.errors[0][0]<0.5
        rec,x = rows_of(path)[:BS],loaders().train_ds.x[:BS].as_subclass(torch.Tensor)
        cache = Recording(path)
        from fasterai.distill.teacher.recorded.codec import Codec
        kept = Codec(20).decode(rec, 1000, 'cpu')[0]
        pred = Teacher(classes=1000, scale=9.)(x)[0]
        off = ((kept/4).softmax(1)-(pred/4).softmax(1)).abs().sum(1)/2
        assert torch.allclose(p, torch.stack([off.mean(), off.max()]), atol=1e-4) and cache.topk==20

    def test_what_the_data_set_skips_is_noted(self, path):
        ds = Blobs(skip=(3, 17))
        report = record(Teacher(), loaders(ds).train, path, **fp32)
        check = check_recording(path)
        assert (report.skipped, check.skipped, check.holes, check.ok)==(2, 2, 0, True)
        cache = Recording(path)
        train(loaders(ds), None, cache, n=1)
        assert cache.asked==0

    def test_parts_by_the_environment(self, monkeypatch):
        assert this_part()==(0, 1)
        monkeypatch.setenv('RANK', '1'), monkeypatch.setenv('WORLD_SIZE', '3')
        assert this_part()==(1, 3) and this_part((0, 2))==(0, 2)
        for o in (2, 2), (-1, 2), (0, 0):
            with pytest.raises(ValueError, match='part must be'): this_part(o)

    def test_nothing_is_left_on_the_loader(self, path):
        dl = loaders().train
        before = state(dl)
        record(Teacher(), dl, path)
        assert state(dl)==before and len([*dl])==N//BS
        class Fails(Teacher):
            def __call__(self, *xb, **kw):
                if len(self.seen)>2: raise KeyboardInterrupt
                return super().__call__(*xb, **kw)
        with pytest.raises(KeyboardInterrupt): record(Fails(), dl, path.parent/'b')
        assert state(dl)==before and len([*dl])==N//BS
