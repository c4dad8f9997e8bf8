"The accuracy benchmark: its networks, its data, its runs, and its statistics"
import os, signal, subprocess, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.study.summary import differences

root = Path(__file__).parent.parent
sys.path.append(str(root/'benchmarks'))
import accuracy, accuracy_table, cifar_nets, overview
from settings import SETTINGS, ShiftFlip


@pytest.mark.parametrize('net,params',
                         [(cifar_nets.resnet(20, 100), 278324), (cifar_nets.resnet(56, 100), 861620),
                          (cifar_nets.resnet(8, 100, 4), 1233540), (cifar_nets.resnet(32, 100, 4), 7433860),
    (cifar_nets.wrn(16, 2, 100), 703284), (cifar_nets.wrn(40, 2, 100), 2255156), (cifar_nets.vgg13(100), 9462180),
    (cifar_nets.mobilenetv2(100), 812836)])
def test_networks_have_the_sizes_of_the_literature(net, params):
    assert sum(p.numel() for p in net.parameters())==params
    assert net(torch.randn(2, 3, 32, 32)).shape==(2, 100)


@pytest.mark.parametrize('net,sizes',
                         [(cifar_nets.resnet(8), (32, 16, 8)), (cifar_nets.wrn(16, 2), (32, 16, 8)),
                          (cifar_nets.vgg13(), (32, 16, 8, 4, 4)), (cifar_nets.mobilenetv2(), (16, 8, 4, 2))])
def test_stages_have_the_sizes_of_the_literature(net, sizes):
    x,seen = net.stem(torch.randn(2, 3, 32, 32)),[]
    for stage in net.stages: x = stage(x); seen.append(x.shape[-1])
    assert tuple(seen)==sizes


def test_shift_and_flip_are_crops_of_the_padded_image():
    x,y = torch.randn(64, 3, 6, 6),torch.arange(64)
    torch.manual_seed(0)
    out,kept = ShiftFlip(2)((x, y))
    assert kept is y and out.shape==x.shape
    padded,seen = torch.nn.functional.pad(x, [2]*4),set()
    for a,p in zip(out, padded):
        crops = {(i, j, flip): p[:, i:i+6, j:j+6].flip(2) if flip else p[:, i:i+6, j:j+6] for i in range(5)
                 for j in range(5) for flip in (False, True)}
        where = [k for k,c in crops.items() if torch.equal(a, c)]
        assert len(where)==1
        seen.add(where[0])
    assert {o[0] for o in seen}=={o[1] for o in seen}=={0, 1, 2, 3, 4} and {o[2] for o in seen}=={False, True}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder in which every setting finds two classes of eight images"
    home,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i in range(16):
        im = Image.fromarray(rng.integers(0, 255, (40, 48, 3)).astype(np.uint8))
        places = [home/'pets96'/'images'/f"{('Birman', 'beagle')[i%2]}_{i}.jpg"]
        places += [home/d/side/str(i%2)/f'{i}.png'
                   for d,valid in (('cifar10_small', 'test'), ('cifar100', 'test'), ('imagenette2sq_96', 'val'))
                   for side in ('train', valid)]
        for f in places: f.parent.mkdir(parents=True, exist_ok=True); im.save(f)
    return home


# of photographs each set of images and each student once
same_pieces = 'imagenette_resnet18', 'catdog_mobilenet', 'breeds_resnet18'

@pytest.mark.parametrize('name', [o for o in SETTINGS if o not in same_pieces])
def test_every_setting_trains_with_the_losses_that_need_its_layers(name, images, tmp_path):
    s = SETTINGS[name]
    if s.folder: s = replace(s, data=partial(s.data, bs=4))
    s = replace(s, teacher_epochs=1, teacher_size=s.teacher_size and 64)
    dls = s.data(images/s.folder, device=torch.device('cpu'))
    teacher,_ = accuracy.trained_teacher(s, dls, tmp_path/'t.pth')
    again,_ = accuracy.trained_teacher(s, dls, tmp_path/'t.pth')
    assert all(torch.equal(a, b) for a,b in zip(teacher.state_dict().values(), again.state_dict().values()))
    recipes = accuracy.recipes(s)
    assert set(accuracy.SEEDS_LOSSES)<set(recipes)
    for loss in ('Attention', 'FitNet', 'ActivationBoundaries'):
        r = accuracy.run(s, dls, teacher, recipes[loss], 1, 0)
        assert 0<=r['accuracy']<=r['best']<=100, loss
        assert np.isfinite(r['task_loss']) and r['distill_loss']>0, loss
        assert r['seconds']>0, loss


@pytest.mark.parametrize('name,dtype', [('breeds_resnet18', torch.bfloat16), ('breeds_mobilenet', torch.float32)])
def test_only_large_students_compute_in_bfloat16_on_a_cpu(name, dtype, images):
    s = SETTINGS[name]
    s,seen = replace(s, data=partial(s.data, bs=4)),set()
    dls = s.data(images/s.folder, device=torch.device('cpu'))
    learn = accuracy.learner(s, dls, s.student(dls.c), s.size)
    learn.model.register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    accuracy.fit(learn, 1)
    assert seen=={dtype} and learn.get_preds()[0].dtype==torch.float32 and not torch.is_autocast_enabled('cpu')
    assert all(p.dtype==torch.float32 for p in learn.model.parameters())
    assert accuracy.device_name(s, dls.device, 1)==('cpu, 1 threads' + (', bfloat16' if s.amp_on_cpu else ''))


@pytest.fixture(scope='module')
def photos(images):
    "A setting of photographs, its data and its teacher before any training"
    s = replace(SETTINGS['breeds_mobilenet'], views=2, epochs=2)
    s = replace(s, data=partial(s.data, bs=4))
    dls = s.data(images/s.folder, device=torch.device('cpu'))
    return s,dls,s.teacher(dls.c).eval()


def test_the_teacher_of_photographs_is_asked_once_about_each_view(photos, tmp_path):
    s,dls,net = photos
    asked = []
    hook = net.register_forward_hook(lambda m, x, out: asked.append(x[0].shape))
    teacher = accuracy.answers(s, dls, net, tmp_path)
    n = len(asked)
    for loss in ('SoftTarget', 'FitNet', 'Attention', *accuracy.LEARNED_LOSSES):
        r = accuracy.run(s, dls, teacher, accuracy.recipes(s)[loss], 2, 0)
        assert 0<=r['accuracy']<=100 and r['distill_loss']>0
    hook.remove()
    assert n==len(asked)>=s.views and {o[1:] for o in asked}=={(3, 192, 192)}
    assert {tuple(x.shape[-2:]) for x,_ in dls.train}=={(96, 96)}


def test_a_learned_loss_begins_anew_with_each_run():
    s = replace(SETTINGS['digits'], epochs=1)
    dls = s.data(None, device=torch.device('cpu'))
    study = accuracy.study(s, dls, s.teacher(dls.c).eval(), {'VID': accuracy.recipes(s)['VID']})
    first,again = (study.train('VID', 2, 0) for _ in range(2))
    for k in ('accuracy', 'task_loss', 'distill_loss'): assert first[k]==again[k], k


def test_suggested_weights_pull_as_hard_as_the_task(photos):
    s,dls,net = photos
    found = accuracy.suggested(s, dls, accuracy.answers(s, dls, net))
    assert list(found)==[f'{o}, suggested' for o in accuracy.SEEDS_LOSSES]
    assert all(r['weight']>0 and r['task_weight']==1 for r in found.values())
    same_start(dls, 0)
    learn = accuracy.learner(s, dls, s.student(dls.c), s.size)
    kd = KnowledgeDistillationCallback(accuracy.answers(s, dls, net), **found['Attention, suggested'])
    pull, = suggest_weights(learn, kd).table.pull.drop('task')
    assert pull==pytest.approx(1, rel=.1)


@pytest.mark.parametrize('loss', ['alone', 'SoftTarget', 'FitNet', 'ActivationBoundaries'])
def test_all_students_of_a_seed_see_the_same(loss, images, monkeypatch):
    "The same first weights and the same augmented batches, whatever teaches; other ones for another seed"
    s = SETTINGS['cifar10_small']
    s = replace(s, data=partial(s.data, bs=4))
    def seen(loss, seed):
        dls,said = s.data(images/s.folder, device=torch.device('cpu')),[]
        teacher = s.teacher(dls.c)
        class Student(torch.nn.Module):
            def __init__(self, net):
                super().__init__(); self.net = net; said.append(sum(p.double().sum().item() for p in net.parameters()))
            def forward(self, x):
                if self.training: said.append(x.double().sum().item())
                return self.net(x)
        inner = replace(s, student=lambda c: Student(s.student(c)),
                        **{o: {f'net.{k}':v for k,v in getattr(s, o).items()} for o in ('stages', 'before')})
        accuracy.run(inner, dls, teacher, accuracy.recipes(inner)[loss], 2, seed)
        return said
    plain = seen('alone', 0)
    assert len(plain)==1+2*4 and len(set(plain))==len(plain)
    assert seen(loss, 0)==plain and seen(loss, 1)!=plain


@pytest.fixture
def one_thread():
    "So that a process gives what another one does"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def test_what_was_killed_is_resumed(tmp_path, one_thread):
    args = dict(seeds='0-1', epochs=8, only='alone,SoftTarget,Logits', models=tmp_path)
    run = partial(accuracy.main, 'digits', **args)
    run(out=tmp_path/'whole.csv')
    whole = pd.read_csv(tmp_path/'whole.csv')
    assert len(whole)==2*(3+2) and not whole.duplicated(['loss', 'epochs', 'seed']).any()
    part = tmp_path/'part.csv'
    options = [o for k,v in (args | dict(out=part)).items() for o in (f'--{k}', str(v))]
    killed = subprocess.Popen([sys.executable, root/'benchmarks'/'accuracy.py', 'digits', *options], cwd=tmp_path,
                              env={**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})
    while not part.exists() or part.read_text().count('\n')<3:
        time.sleep(0.05); assert killed.poll() is None
    killed.send_signal(signal.SIGKILL); killed.wait()
    with open(part, 'a') as f: f.write('digits,Log')
    before = part.read_text().splitlines()[:-1]
    assert len(before)<len(whole)
    run(out=part)
    assert part.read_text().splitlines()[:len(before)]==before
    whole,got = (pd.read_csv(f, dtype={'teacher': str}) for f in (tmp_path/'whole.csv', part))
    same = ['loss', 'epochs', 'seed', 'accuracy', 'best', 'task_loss', 'distill_loss', 'teacher']
    pd.testing.assert_frame_equal(got[same], whole[same])
    text = part.read_text().replace(got.teacher[0], '00000000')
    part.write_text(text)
    with pytest.raises(SystemExit, match='had another teacher'): run(out=part)
    assert part.read_text()==text


def _runs():
    alone,longer,kd = [60., 61, 62, 63, 64],[61., 63, 63, 64, 66],[62., 62, 65, 64, 67]
    rows = [dict(loss=loss, epochs=n, seed=i, accuracy=a, best=a+1, task_weight=1, weight=w, seconds=s,
                 teacher_accuracy=80., device='cpu')
            for loss,n,accs,w,s in (('alone', 10, alone, None, 10.), ('alone', 20, longer, None, 20.),
                                    ('SoftTarget', 10, kd, 0.9, 18.), ('Mutual', 10, alone, 1, 10.5))
            for i,a in enumerate(accs)]
    return pd.DataFrame(rows).sample(frac=1, random_state=0),map(np.array, (alone, longer, kd))


def test_statistics_against_known_answers():
    runs,(alone,longer,kd) = _runs()
    df = accuracy_table.table(runs).set_index(['loss', 'epochs'])
    r,m = df.loc['SoftTarget', 10],df.loc['Mutual', 10]
    assert list(df.index[:2])==[('SoftTarget', 10), ('alone', 20)]
    assert r.accuracy==64 and r.best==65
    assert r.sd==pytest.approx(np.std(kd, ddof=1)) and r.seeds==5
    assert r.time==pytest.approx(1.8)
    assert r.alone_epochs==20 and m.alone_epochs==10
    low,high = stats.t.interval(0.95, 4, kd.mean(), stats.sem(kd))
    assert (r.accuracy-r.ci, r.accuracy+r.ci)==pytest.approx((low, high))
    want = stats.ttest_rel(kd, alone)
    assert r.gain==2 and (r.gain_low, r.gain_high)==pytest.approx(tuple(want.confidence_interval()))
    # the better one of two p-values counts twice
    assert r.gain_p==pytest.approx(min(1, 2*want.pvalue)) and m.gain==0 and m.gain_p==1
    assert r.same_time==pytest.approx((kd-longer).mean())
    assert r.same_time_p==pytest.approx(2*stats.ttest_rel(kd, longer).pvalue)


def test_seeds_are_paired_by_number_and_lone_ones_left_out():
    a,b = pd.Series([5., 1, 9], index=[2, 0, 7]),pd.Series([0., 4, 3], index=[0, 2, 1])
    assert differences(a, b)[:2]==(1, 0) and differences(a, b[:1]) is None
    runs = _runs()[0]
    with pytest.raises(ValueError, match='two runs of Mutual, 10 epochs, seed 3'):
        accuracy_table.table(pd.concat([runs, runs.query("loss=='Mutual' and seed==3")]))
    with pytest.raises(ValueError, match='two seeds'): accuracy_table.table(runs.query('seed==0'))
    with pytest.raises(ValueError, match='no runs of `alone`'): accuracy_table.table(_runs()[0].query("loss!='alone'"))


def test_the_command_prints_and_draws(tmp_path):
    _runs()[0].to_csv(tmp_path/'accuracy-x.csv', index=False)
    out = subprocess.run([sys.executable, root/'benchmarks'/'accuracy_table.py', tmp_path/'accuracy-x.csv', '--only',
                          'SoftTarget', '--picture', tmp_path/'x.png'], env={**os.environ, 'PYTHONPATH': str(root)},
                          capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    assert '64.0 ± 2.6' in out.stdout and '+2.0 (' in out.stdout and 'teacher 80.0 %' in out.stdout
    assert 'Mutual' not in out.stdout and Image.open(tmp_path/'x.png').size[0]>500


@pytest.mark.parametrize('args,what',
                         [(dict(setting='digit'), "no 'digit'"), (dict(setting='digits', seeds='3-1'), "seeds.*'3-1'"),
                          (dict(setting='digits', only='Attentoin'), "no loss 'Attentoin'"),
                                       (dict(setting='catdog_resnet18', data=Path('nowhere')),
                                        "no folder 'pets96' in 'nowhere'")])
def test_misspelt_arguments_are_named(args, what):
    with pytest.raises(SystemExit, match=what): accuracy.main(**args)


def test_the_overview_is_the_paired_difference_of_each_study():
    rows = overview.overview()
    assert {o for o,_ in rows.index}==set(overview.STUDIES)
    text = rows.loc[('peers', 'two, T=3')]
    runs = pd.read_csv(root/'benchmarks'/'results'/'family-peers.csv').query('epochs==120')
    a,b = (100*runs[runs.arm.eq(o)].set_index('seed').accuracy.sort_index() for o in ('two, T=3', 'alone'))
    low,high = stats.ttest_rel(a, b).confidence_interval()
    assert text.points==f'{(a-b).mean():+.1f} ({low:+.1f} to {high:+.1f})' and text.judged=='better' and text.seeds==5
    assert [overview.judged(*o) for o in ((.1, 2), (-2, -.1), (0, 1), (-1, 1))]==['better', 'worse'] + ['not decided']*2
