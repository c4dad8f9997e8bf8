"What both Learners know: classes in another order, another normalisation, other words and channels, mapped or refused"
from types import SimpleNamespace as NS

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize, ToTensor
from fastai.losses import BCEWithLogitsLossFlat
from fastai.torch_basics import Transform
from fastai.torch_core import TensorBase
from fastai.vision.augment import CropPad, RandomResizedCrop, RandomResizedCropGPU, Resize
from fastai.vision.core import PILImage, TensorImage, TensorMask
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import FitNet, Logits
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.teacher.facts import agree, facts_of, other_channels
from fasterai.distill.teacher.loaders import statistics_of
from fasterai.distill.teacher.teacher import Renormalize, Teacher
from helpers import learner


def images(vocab, mean=None, names=None, n=12):
    "DataLoaders of noise named after `names`, whose classes are numbered as in `vocab`"
    g = torch.Generator().manual_seed(0)
    names = names or vocab
    items = [(torch.randn(3, 4, 4, generator=g), names[i%len(names)]) for i in range(n)]
    ds = Datasets(range(n), tfms=[[lambda i: TensorImage(items[i][0])],
                                  [lambda i: items[i][1], Categorize(vocab=vocab, sort=False)]],
                  splits=[list(range(n))]*2)
    tfms = None if mean is None else [Normalize.from_stats([mean]*3, [0.5]*3, cuda=False)]
    return ds.dataloaders(bs=4, shuffle=False, num_workers=0, after_batch=tfms, device='cpu')


def model(c, seed=0): # of three channels of 16
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, c))


def heard(teacher, dls, c=3, also=(), **kw):
    "What the loss hears of `teacher`, and the batches that the student saw"
    seen = []
    def loss(pred, teacher_pred):
        seen.append((learn.xb[0].as_subclass(torch.Tensor), teacher_pred)); return F.mse_loss(pred, teacher_pred)
    learn = learner(model(c), dls)
    learn.fit(1, cbs=[KD(teacher, loss, **kw), *also])
    return seen


@pytest.mark.parametrize('theirs', [list('cab'), list('dcab')], ids=['another order', 'one class more'])
def test_classes_are_put_in_the_students_order(theirs, capsys):
    net = model(len(theirs), 1)
    teacher = learner(net, images(theirs, names='abc'))
    for x,z in heard(teacher, images(list('abc'))):
        torch.testing.assert_close(z, net(x)[:, [theirs.index(o) for o in 'abc']])
    assert "student's order" in capsys.readouterr().out
    both = Teacher([teacher, model(3, 2)])
    kd = KD(both, Logits)
    learner(model(3), images(list('abc'))).fit(1, cbs=kd)
    assert "student's order" in repr(both)


@pytest.mark.parametrize('flat', [False, True])
def test_one_logit_of_two_classes_changes_its_sign(flat):
    def one(seed): return nn.Sequential(model(1, seed), nn.Flatten(0)) if flat else model(1, seed)
    net,loss_func,seen = one(1),BCEWithLogitsLossFlat(),[]
    teacher = learner(net, images(list('ba'), names='ab'), loss_func=loss_func)
    def loss(pred, teacher_pred):
        seen.append((learn.x.as_subclass(torch.Tensor), teacher_pred)); return F.mse_loss(pred, teacher_pred)
    learn = learner(one(0), images(list('ab')), loss_func=loss_func)
    learn.fit(1, cbs=KD(teacher, loss))
    for x,z in seen: torch.testing.assert_close(z, -net(x))


def test_of_a_bare_network_nothing_is_known_and_nothing_is_said(capsys):
    dls = images(list('abc'), mean=0.5)
    heard(model(3, 1), dls)
    assert 'normalised' not in capsys.readouterr().out
    heard(learner(model(3, 1), images(list('abc'))), dls)
    assert "the teacher's data was not" in capsys.readouterr().out


def test_the_same_classes_are_left_alone_and_nothing_is_said(capsys):
    net = model(3, 1)
    for x,z in heard(learner(net, images(list('abc'))), images(list('abc'))): torch.testing.assert_close(z, net(x))
    assert capsys.readouterr().out==''


def test_callbacks_of_the_teachers_learner_that_are_not_called_are_said(capsys):
    "Those that the student's Learner has too act on the batch that both see"
    class Tenth(Callback):
        def before_batch(self): self.learn.xb = tuple(x/10 for x in self.xb)
    class InTraining(Tenth): run_valid = False
    dls = images(list('abc'))
    teacher = learner(model(3, 1), dls, cbs=[Tenth(), InTraining()])
    heard(teacher, dls)
    said = capsys.readouterr().out
    assert "Tenth.before_batch of its Learner's callbacks" in said and 'InTraining' not in said
    heard(teacher, dls, also=[Tenth()])
    heard(Teacher(teacher, tfms=lambda x: x/10), dls)
    assert 'callbacks' not in capsys.readouterr().out


def test_other_classes_are_no_matter_where_no_loss_looks_at_logits():
    net,xyz,abc = model(3, 1),list('xyz'),images(list('abc'))
    teacher,learn = Teacher(learner(net, images(xyz))),learner(model(3), abc)
    def feature(teacher): return KD(teacher, FitNet, activations_student='1', activations_teacher='1')
    kd = feature(teacher)
    learn.fit(1, cbs=kd)
    assert len(kd.log.history)==3
    for kd in (KD(teacher, Logits), KD(teacher, [FitNet, Logits], activations_student='1', activations_teacher='1')):
        with pytest.raises(ValueError, match="classes: the teacher does not know the student's 'a', 'b', 'c'"):
            learn.fit(1, cbs=kd)
    notes = suggest_weights(learn, feature(teacher)).notes # its logits are about other things
    assert not [o for o in notes if 'no better' in o]
    cab = Teacher(learner(net, images(list('cab'), names='abc')))
    for x,z in heard(cab, abc, also=[feature(cab)]): torch.testing.assert_close(z, net(x)[:, [1, 2, 0]])


def test_a_map_that_is_the_output_keeps_the_teachers_order_and_says_so(capsys):
    teacher = learner(model(3, 1), images(list('cab'), names='abc'))
    for layer,said in ('', "map of '' has a channel"), ('1', "map of '1' has a channel"), ('0', ''):
        kd = KD(teacher, FitNet, activations_student=layer, activations_teacher=layer)
        learner(model(3), images(list('abc'))).fit(2, cbs=kd)
        out = capsys.readouterr().out
        assert said in out and out.count('has a channel for each class')==bool(said)


class Aux(nn.Module):
    "A head before the body, and one beside it in a block"
    def __init__(self, seed=0):
        super().__init__()
        self.head,self.body,self.aux = nn.Linear(5, 3),model(5, seed),nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    def forward(self, x): x = self.body(x); self.aux(x); return self.head(x)

@pytest.mark.parametrize('layer,said', [('aux', True), ('aux.0', True), ('head', True), ('body', False)])
def test_a_head_beside_the_output_keeps_the_teachers_order_and_says_so(layer, said, capsys):
    teacher = learner(Aux(1), images(list('cab'), names='abc'))
    learner(Aux(), images(list('abc'))).fit(2, cbs=KD(teacher, FitNet, layer, layer))
    out = capsys.readouterr().out
    assert out.count(f"the map of '{layer}' has a channel for each class")==said
    learner(Aux(), images(list('cab'))).fit(1, cbs=KD(teacher, FitNet, layer, layer))
    assert 'channel' not in capsys.readouterr().out


def test_a_hidden_layer_as_wide_as_there_are_classes_is_no_head(capsys):
    def net(seed):
        torch.manual_seed(seed)
        wide = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        return nn.Sequential(wide, nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 3), nn.Linear(3, 3))
    teacher = learner(net(1), images(list('cab'), names='abc'))
    for layer in '0','0.0','1','3','4':
        learner(net(0), images(list('abc'))).fit(1, cbs=KD(teacher, FitNet, layer, layer))
        assert ('channel' in capsys.readouterr().out)==(layer=='4')


@pytest.mark.parametrize('n,names', [(3, 'cabd'), (5, 'cab')])
def test_a_name_for_each_logit(n, names, recwarn):
    with pytest.raises(ValueError, match=f"classes: the teacher's are {len(names)} by name, and it gives {n} logits"):
        heard(Teacher(model(n, 1), classes=names), images(list('abc')))
    with pytest.raises(ValueError, match="and 'a' is named twice"): Teacher(model(n), classes=[*names, 'a'])
    with pytest.raises(ValueError, match='classes: .*3 by name, and it gives 5'):
        heard(learner(model(5, 1), images(list('cab'), names='abc')), images(list('abc')))


def test_a_select_or_facts_by_hand_decide():
    net = model(3, 1)
    teacher = learner(net, images(list('cab'), names='abc'))
    for x,z in heard(Teacher(teacher, select=lambda z: z.flip(1)), images(list('abc'))):
        torch.testing.assert_close(z, net(x).flip(1))
    for x,z in heard(Teacher(net, classes='cab'), images(list('abc'))):
        torch.testing.assert_close(z, net(x)[:, [1, 2, 0]])


def test_a_class_that_the_teacher_does_not_know_is_refused():
    teacher = learner(model(3, 1), images(list('abx')))
    with pytest.raises(ValueError, match="does not know the student's 'c'"): heard(teacher, images(list('abc')))


@pytest.mark.parametrize('by_hand', [False, True])
def test_another_normalisation_is_undone(by_hand):
    net = model(3, 1)
    teacher = learner(net, images(list('abc'), mean=0.2))
    if by_hand: teacher = Teacher(net, normalize=([0.2]*3, [0.5]*3))
    for x,z in heard(teacher, images(list('abc'), mean=0.9)):
        torch.testing.assert_close(z, net((x*0.5+0.9-0.2)/0.5), rtol=1e-4, atol=1e-4)
    for x,z in heard(Teacher(teacher.models[0] if by_hand else teacher, tfms=lambda x: x),
                     images(list('abc'), mean=0.9)):
        torch.testing.assert_close(z, net(x))


def test_a_teacher_of_other_channels_says_so():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x,y = torch.randn(8, 1, 4, 4),torch.arange(8)%3
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x, y), bs=4, num_workers=0) for _ in range(2)],
                      device='cpu')
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match='1 channels.*expects 3.*tfms='): learner(student, dls).fit(1, cbs=KD(net))
    learner(student, dls).fit(1, cbs=KD(Teacher(net, tfms=lambda x: x.expand(-1, 3, -1, -1))))


@pytest.mark.parametrize('conv,grid', [(nn.Conv1d, [5]), (nn.Conv2d, [5, 5]), (nn.Conv3d, [5, 5, 5])])
def test_the_remedy_for_one_channel_fits_series_and_volumes(conv, grid):
    net,x = conv(3, 4, 2),torch.randn(2, 1, *grid)
    said = other_channels(net, (x,))
    remedy = eval(said.partition('tfms=')[2].rstrip(')') + ')')
    assert remedy(x).shape==(2, 3, *grid) and net(remedy(x)).shape[1]==4


def test_one_teacher_of_two_learners_keeps_each_ones_classes(capsys):
    net = model(3, 1)
    teacher,seen = Teacher(learner(net, images(list('cab'), names='abc'))),[]
    def loss(pred, teacher_pred): seen.append((learn.xb[0].as_subclass(torch.Tensor), teacher_pred)); return pred.mean()
    learn,other = learner(model(3), images(list('abc'))),learner(model(3), images(list('bca'), names='abc'))
    class Inner(Callback):
        def after_epoch(self): other.fit(1, cbs=KD(teacher, Logits))
    learn.fit(2, cbs=[KD(teacher, loss), Inner()])
    assert len(seen)==6
    for x,z in seen: torch.testing.assert_close(z, net(x)[:, [1, 2, 0]])


def test_codes_of_masks_words_and_several_targets_are_told_apart():
    def datasets(*vocabs): return NS(tls=[NS(vocab=v) if v else NS() for v in vocabs])
    def facts(ds, n_inp=1, **tfms): return facts_of(NS(dls=NS(loaders=[NS(dataset=ds)], n_inp=n_inp, **tfms)))
    assert facts(datasets(None, ['a', 'b'])).classes==('a', 'b')
    assert facts(datasets(None, ['a', 'b'], ['x', 'y'])).classes is None # which head is meant?
    assert facts(datasets(['the', 'a'])).words==('the', 'a') and facts(datasets(['the', 'a'])).classes is None
    codes = NS(fs=[NS(codes=['sky', 'road'])])
    assert facts(datasets(None, None), after_item=codes).classes==('sky', 'road')


def test_every_image_of_a_batch_is_normalised_anew():
    from fasterai.distill.teacher.facts import Facts, agree
    stats = [Facts(normalize=(torch.full((1, 3, 1, 1), m), torch.ones(1, 3, 1, 1))) for m in (0.2, 0.9)]
    a,b,table = torch.rand(2, 3, 4, 4),torch.rand(2, 3, 4, 4),torch.rand(2, 5)
    x,y,z = agree(*stats).tfm(a, b, table)
    torch.testing.assert_close(x, a+0.7)
    torch.testing.assert_close(y, b+0.7)
    assert z is table


def in_a_row(*fs):
    dls = images(list('abc'))
    dls.add_tfms(list(fs), 'after_batch')
    return dls

def norm(mean, std): return Normalize.from_stats(mean, std, cuda=False)

def test_normalisations_in_a_row_are_one():
    "On either side"
    net,a,b = model(3, 1),norm([.5]*3, [.2]*3),norm([.1, .2, .3], [3.]*3)
    then = torch.tensor([.1, .2, .3]).view(3, 1, 1)
    for x,z in heard(learner(net, in_a_row(a, b)), in_a_row(a)): torch.testing.assert_close(z, net((x-then)/3))
    for x,z in heard(learner(net, in_a_row(a)), in_a_row(a, b)): torch.testing.assert_close(z, net(x*3+then))
    for x,z in heard(learner(net, in_a_row(a, b)), in_a_row(norm([.5]*3, [.6]*3))):
        torch.testing.assert_close(z, net(x-then/3))
    for x,z in heard(Teacher(net, normalize=in_a_row(a, b)), in_a_row(a)):
        torch.testing.assert_close(z, net((x-then)/3))


def bytes_of(*tfms, n=8):
    "DataLoaders of pictures"
    x = torch.randint(256, (n, 4, 4, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    ds = Datasets(range(n), tfms=[[lambda i: PILImage.create(x[i])],
                                  [lambda i: 'abc'[i%3], Categorize(vocab=list('abc'))]], splits=[list(range(n))]*2)
    return ds.dataloaders(bs=4, shuffle=False, num_workers=0, after_item=[ToTensor()], after_batch=list(tfms),
                          device='cpu')

def told(dls):
    "Mean and standard deviation of the first channel, as the facts have them; `normalize=` reads the same"
    stats = facts_of(NS(dls=dls)).normalize
    for a,b in zip(stats or statistics_of(None), statistics_of(dls)): torch.testing.assert_close(a, b)
    return None if stats is None else pytest.approx([o.flatten()[0].item() for o in stats])

def test_what_bytes_are_divided_by_counts(capsys):
    net,ints,a = model(3, 1),IntToFloatTensor(div=1.),norm([.5]*3, [.2]*3)
    theirs = bytes_of(ints, norm([255.]*3, [51.]*3))
    for teacher in learner(net, theirs),Teacher(net, normalize=theirs):
        for x,z in heard(teacher, bytes_of(IntToFloatTensor(), a)):
            torch.testing.assert_close(z, net(((x*.2+.5)*255-255)/51), rtol=1e-4, atol=1e-4)
    for x,z in heard(learner(net, bytes_of(ints)), bytes_of(IntToFloatTensor())):
        torch.testing.assert_close(z, net(x*255), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    heard(learner(net, bytes_of(IntToFloatTensor())), bytes_of(ints))
    assert 'normalised or scaled' in capsys.readouterr().out

def test_of_what_is_not_sure_the_first_normalize_alone_counts():
    class ByDiv(IntToFloatTensor):
        def encodes(self, x:TensorImage): return x.float()/255
    class Half(Transform):
        order = 5
        def encodes(self, x:TensorImage): return x.float()/255
    class NormDepth(Normalize): pass
    def of_split(f, i): f.split_idx = i; return f
    def typed(b): return TensorImage(b[0]),TensorBase(b[1]),b[2]
    one,a,b = IntToFloatTensor(div=1.),norm([.5]*3, [.2]*3),norm([.1]*3, [3.]*3)
    assert told(bytes_of(one, a))==[.5/255, .2/255]
    assert told(bytes_of(IntToFloatTensor(), a, b))==[.52, .6]
    assert told(in_a_row(one, a))==[.5, .2] and told(in_a_row(one)) is None # floats, 0 to 1 already
    assert told(bytes_of(ByDiv(div=1.), a))==[.5, .2]
    assert told(bytes_of(Half(), one, a))==[.5, .2]
    for i in (0, 1): assert told(bytes_of(IntToFloatTensor(), a, of_split(norm([.1]*3, [3.]*3), i)))==[.5, .2]
    x,y = torch.rand(8, 3, 4, 4),torch.arange(8)%3
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x, x, y), bs=4, num_workers=0,
                               after_batch=[typed, a, NormDepth.from_stats([.1]*3, [3.]*3, cuda=False)])]*2)
    assert told(dls)==[.5, .2] # of which input is the second?


def test_one_number_is_the_same_for_each_channel(capsys):
    net = model(3, 1)
    for theirs,ours in ((.5, .2), ([.5]*3, [.2]*3)), (([.5]*3, [.2]*3), (.5, .2)):
        for x,z in heard(Teacher(net, normalize=theirs), _normalised(ours)): torch.testing.assert_close(z, net(x))
        assert 'normalised' not in capsys.readouterr().out


def of_types(*kinds, mean, shape=(3, 4, 4), ndim=4):
    "DataLoaders of noise, an input for each type, normalised as fastai does"
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(8, *shape, generator=g) for _ in kinds]
    def items(x, kind): return [lambda i: x[i] if kind is torch.Tensor else kind(x[i])]
    ds = Datasets(range(8), tfms=[*map(items, xs, kinds), [lambda i: 'abc'[i%3], Categorize(vocab=list('abc'))]],
                  splits=[list(range(8))]*2, n_inp=len(kinds))
    stats = Normalize.from_stats([mean]*3, [.5]*3, ndim=ndim, cuda=False)
    return ds.dataloaders(bs=4, shuffle=False, num_workers=0, after_batch=[stats], device='cpu')


@pytest.mark.parametrize('kinds,changed', [((TensorImage, TensorBase), [True, False]), ((torch.Tensor,), [False]),
                                           ((TensorMask, TensorImage), [False, True])])
def test_what_the_students_data_do_not_normalise_is_left_alone(kinds, changed):
    class Inputs(nn.Module):
        def __init__(self): super().__init__(); self.w,self.xs = nn.Linear(1, 3),[]
        def forward(self, *xs): self.xs = xs; return self.w(xs[0].flatten(1)[:, :1])
    t,s = Inputs(),Inputs()
    learner(s, of_types(*kinds, mean=.9)).fit(1, cbs=KD(learner(t, of_types(*kinds, mean=.2)), Logits, valid=True))
    for a,b,was in zip(s.xs, t.xs, changed): torch.testing.assert_close(b, a+1.4 if was else a)


@pytest.mark.parametrize('shape', [(3, 16), (3, 4, 2, 2)])
def test_series_and_volumes_are_normalised_anew(shape):
    net,dls = model(3, 1),[of_types(TensorImage, mean=m, shape=shape, ndim=len(shape)+1) for m in (.2, .9)]
    for x,z in heard(learner(net, dls[0]), dls[1]): torch.testing.assert_close(z, net(x+1.4))
    for x,z in heard(Teacher(net, normalize=([.2]*3, [.5]*3)), dls[1]): torch.testing.assert_close(z, net(x+1.4))


def test_a_batch_without_images_cannot_be_normalised_anew():
    said = r'normalize: .*no images \(B, C, H, W\) of floating point, got torch.float32 \(4, 3, 16\): pass tfms='
    x,y = torch.rand(8, 3, 16),torch.arange(8)%3
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x, y), bs=4, num_workers=0)]*2, device='cpu')
    with pytest.raises(ValueError, match=said): heard(Teacher(model(3, 1), normalize=([.2]*3, [.5]*3)), dls)
    with pytest.raises(ValueError, match='have the shapes'):
        Renormalize(([.5]*3, [.5]*3), Normalize(torch.rand(1, 1, 1, 3), torch.rand(1, 1, 1, 3)))


def test_height_and_width_of_fastais_transforms():
    items,batch = [Resize((24, 32)), CropPad((24, 32)), RandomResizedCrop((24, 32))],RandomResizedCropGPU((24, 32))
    def size(**tfms): return facts_of(NS(dls=NS(loaders=[NS()], **{k:NS(fs=[f]) for k,f in tfms.items()}))).size
    assert [size(after_item=f) for f in items]==[(24, 32)]*3 and size(after_batch=batch)==(24, 32)


def table(cats='uv', order='cd', conts='xz', shift=0., fill=0.):
    "With a missing number that `fill` stands for"
    import pandas as pd
    from fastai.tabular.core import Categorify, FillMissing, FillStrategy, Normalize as NormalizeTable, TabularPandas
    n = 4*len(cats)
    df = pd.DataFrame(dict(c=list(cats)*4, d=list('pq')*(n//2), e=list('rrst')*(n//4),
                           x=[float(i)+(shift or 0.) for i in range(n)], z=[float(i%3) for i in range(n)],
                           w=[1., 2.]*(n//2), y=['n', 'p']*(n//2)))
    df.loc[0, 'x'] = float('nan')
    procs = [Categorify, FillMissing(FillStrategy.constant, add_col=False, fill_vals={'x': fill})]
    if shift is not None: procs.append(NormalizeTable)
    to = TabularPandas(df, procs, list(order), list(conts), y_names='y', splits=[list(range(n))]*2)
    return to.dataloaders(bs=n, num_workers=0, shuffle=False, device='cpu')

def test_tables_that_number_or_normalise_otherwise_are_refused():
    def facts(**kw): return facts_of(NS(dls=table(**kw)))
    assert agree(facts(), facts()).lines==()
    plain = dict(shift=None)
    for one,other,name in [(facts(cats='vw'), facts(), 'c'), (facts(shift=5.), facts(), 'x'),
                           (facts(), facts(conts='z'), 'x')]:
        with pytest.raises(ValueError, match=f"no column like the teacher's '{name}'.*same procs"): agree(one, other)
        assert agree(one, other, tfm=False).tfm is None
    filled = agree(facts(**plain), facts(**plain, fill=5.))
    assert filled.tfm is None and filled.lines==('missing numbers were filled otherwise in its table: x by 0 (5 here)',)

@pytest.mark.parametrize('theirs,ours', [('cde xzw', 'dce xzw'), ('cde xzw', 'ced wxz'),
                                         ('c xz', 'dce xwz')])
def test_columns_are_put_in_the_teachers_order(theirs, ours, capsys):
    both = [table(order=o.split()[0], conts=o.split()[1]) for o in (theirs, ours)]
    (cats,conts,_),xb = (o.valid.one_batch() for o in both)
    agreed = agree(*(facts_of(NS(dls=o)) for o in both))
    assert [x.tolist() for x in agreed.tfm(*xb[:2])]==[cats.tolist(), conts.tolist()]
    assert len(agreed.lines)==1


@pytest.mark.parametrize('theirs,ours', [(([.2]*3, [.3]*3), ([.5], [.5])), (([.2], [.3]), ([.5]*3, [.5]*3)),
                                         ((.2, .3), (.5, .5)), (([.2], [.3]), None)])
def test_numbers_that_hold_for_any_channel(theirs, ours):
    net,dls = model(3, 1),images(list('abc'))
    if ours: dls = _normalised(ours)
    for x,z in heard(Teacher(net, normalize=theirs), dls):
        torch.testing.assert_close(z, net((x*(.5 if ours else 1)+(.5 if ours else 0)-.2)/.3))

def _normalised(stats):
    dls = images(list('abc'), mean=.5)
    for dl in dls.loaders:
        norm = next(f for f in dl.after_batch.fs if isinstance(f, Normalize))
        norm.mean,norm.std = (torch.as_tensor(o).view(1, -1, 1, 1) for o in stats)
    return dls

def test_statistics_of_other_channels():
    four = dict(normalize=([.5]*4, [.5]*4))
    with pytest.raises(ValueError, match='normalize: mean and std are of 4 channels, .* images of 3.*3 numbers each'):
        heard(Teacher(model(3, 1), **four), images(list('abc')))
    with pytest.raises(ValueError, match="the teacher's mean and std are of 4 channels, the student's of 3"):
        heard(Teacher(model(3, 1), **four), images(list('abc'), mean=.5))


def torchs(classes, mean, std=.5, names='abc'):
    "PyTorch's own loaders of a data set that says what torchvision's say"
    from torch.utils.data import DataLoader, Dataset, Subset
    from torchvision import transforms as T
    class Pictures(Dataset):
        def __init__(self):
            self.classes,self.transform = classes,T.Compose([T.Normalize([mean]*3, [std]*3)])
            self.x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        def __len__(self): return 8
        def __getitem__(self, i): return self.transform(self.x[i]),self.classes.index(names[i%3])
    return DataLoaders(*[DataLoader(Subset(Pictures(), range(8)), 4)]*2, device='cpu')

@pytest.mark.parametrize('fastais', [False, True], ids=["PyTorch's data", "fastai's data"])
def test_classes_and_normalisation_of_torchs_data_sets(fastais):
    net = model(3, 1)
    theirs = images(list('cab'), mean=.2, names='abc') if fastais else torchs(list('cab'), .2)
    for x,z in heard(learner(net, theirs), torchs(list('abc'), .6)):
        torch.testing.assert_close(z, net(x+(.6-.2)/.5)[:, [1, 2, 0]])

def test_what_a_torch_data_set_calls_otherwise_is_left_alone(capsys):
    "Other words for the classes, and a student whose data set does not say how it normalises"
    net = model(3, 1)
    for x,z in heard(learner(net, torchs(['Cat', 'Dog', 'Owl'], .2, names='Cat Dog Owl'.split())), images(list('abc'))):
        torch.testing.assert_close(z, net(x))
    assert "of the student's nothing is known" in capsys.readouterr().out
    known = Teacher(learner(net, torchs(list('abc'), .2)), normalize=([.2]*3, [.5]*3))
    for x,z in heard(known, images(list('abc'))): torch.testing.assert_close(z, net((x-.2)/.5))

def test_a_select_has_to_see_to_another_order(capsys):
    net = model(3, 1)
    teacher = Teacher(learner(net, images(list('cab'), names='abc')), select=lambda z: z)
    for x,z in heard(teacher, images(list('abc'))): torch.testing.assert_close(z, net(x))
    assert "are in another order, and select= has to see to that" in capsys.readouterr().out
