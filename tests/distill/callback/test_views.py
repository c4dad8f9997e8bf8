"Who sees what: the student its part, the teacher the whole batch, in training, validation and inference"
import io
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelTrainException
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.tabular.core import Categorify
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.model import TabularModel, get_emb_sz
from fastai.vision.augment import FlipItem, RandomResizedCrop, aug_transforms
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageBlock
from torch import nn

from fasterai.core.task import full_inputs
from fasterai.distill.layers.matching import match_feature_layers
from fasterai.distill.losses import *
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.study.compare import compare
from fasterai.distill.study.experiment import Experiment
from fasterai.distill.study.pictures import plot_similarity
from fasterai.distill.study.sweep import sweep
from fasterai.distill.teacher.recorded.recorded import Replay, TeacherCache
from fasterai.distill.teacher.teacher import Teacher, resize_batch
from fasterai.distill.training.views import StudentSees
from helpers import Boom, data, learner, net, same, state
from kd_helpers import KD, teacher

smaller = partial(resize_batch, size=4)
def first(a, b): return a
def second(a, b): return b
def grey(x): return x.mean(1, keepdim=True)


class Spy(nn.Module):
    "Notes the shapes of what its network is shown, by its mode"
    def __init__(self, net):
        super().__init__()
        self.net,self.seen = net,[]
    def forward(self, *xb):
        self.seen.append((self.training, *(tuple(x.shape[1:]) for x in xb)))
        return self.net(*xb)
    @property
    def shapes(self): return {o[1:] for o in self.seen}


class OfTwo(nn.Module):
    "A network of two inputs, which looks at both"
    def __init__(self):
        super().__init__()
        self.a,self.b = net(3, c=2),net(3, c=2, seed=1)
    def forward(self, a, b): return self.a(a)+self.b(b.expand(-1, 3, -1, -1))


def picture(i): return (np.random.default_rng(i).random((8, 8, 3))*255).astype(np.uint8)

def two_views(item_tfms=None, batch_tfms=None, n=16, bs=4):
    "Colour and grey of one picture, with a label"
    block = DataBlock((ImageBlock, ImageBlock(PILImageBW), CategoryBlock), n_inp=2,
                      getters=[picture, lambda i: np.array(PILImage.create(picture(i)).convert('L')), lambda i: i%2],
                      splitter=IndexSplitter(range(n-bs, n)), item_tfms=item_tfms, batch_tfms=batch_tfms)
    return block.dataloaders(list(range(n)), bs=bs, num_workers=0, device='cpu')

def grey_net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


@pytest.mark.parametrize('f, seen', [(0, (3, 8, 8)), (1, (1, 8, 8)), (-1, (1, 8, 8)), (slice(1, 2), (1, 8, 8)),
                                     (second, (1, 8, 8)), (lambda a, b: [smaller(b)], (1, 4, 4))])
def test_the_student_sees_its_part_and_the_teacher_the_whole_batch_everywhere(f, seen):
    dls = two_views()
    student,t = Spy(nn.Sequential(nn.Flatten(), nn.LazyLinear(2))),Spy(OfTwo())
    student.net(torch.zeros(1, *seen))
    learn = learner(student, dls, StudentSees(f), metrics=accuracy)
    learn.fit(1, cbs=KD(t, valid=True))
    assert {o[0] for o in student.seen}=={True, False} and student.shapes=={(seen,)}
    assert t.shapes=={((3, 8, 8), (1, 8, 8))} and len(t.seen)==len(dls.train)+len(dls.valid)
    t.seen.clear()
    learn.validate(), learn.get_preds(), learn.predict(3), learn.show_results(show=False)
    assert student.shapes=={(seen,)} and not t.seen
    assert learn.student_sees.full_xb is None and not hasattr(learn, 'full_xb')


def test_tfms_pick_what_the_teacher_sees():
    t = Spy(net(4, c=2))
    learner(grey_net(), two_views(), StudentSees(1)).fit(1, cbs=KD(Teacher(t, tfms=first)))
    assert t.shapes=={((3, 8, 8),)}
    with pytest.raises(TypeError, match='the batch has 2 inputs, .* takes another number: pass Teacher'):
        learner(grey_net(), two_views(), StudentSees(1)).fit(1, cbs=KD(net(4, c=2)))


def test_it_is_the_training_that_one_would_write_by_hand():
    t = teacher().eval()
    by_hand = net()
    opt = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    learn = learner(cbs=StudentSees(smaller), wd=0.)
    batches = []
    def note(cb): batches.append((full_inputs(cb.learn)[0].clone(), cb.y.clone()))
    class Note(StudentSees):
        order = StudentSees.order+1
        def __init__(self): super().__init__(lambda x: x, training=True)
        def after_pred(self): note(self)
    learn.fit(1, cbs=[Note(), KD(t, partial(SoftTarget, T=4), weight=0.7)])
    by_hand.train()
    for x,y in batches:
        assert x.shape[-1]==8
        out = by_hand(smaller(x))
        (0.3*F.cross_entropy(out, y) + 0.7*SoftTarget(out, t(x), T=4)).backward()
        opt.step(), opt.zero_grad()
    for a,b in zip(learn.model.parameters(), by_hand.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_weight_of_0_is_the_training_alone_bit_for_bit():
    found = []
    for cbs in [], [KD(teacher(), weight=0.)]:
        learn = learner(cbs=StudentSees(smaller))
        learn.fit(2, cbs=cbs)
        found.append(state(learn.model))
    assert same(*found)


def test_both_sides_see_what_mixup_has_mixed():
    seen = []
    t = teacher()
    t.register_forward_pre_hook(lambda m, xb: seen.append(xb[0].clone()))
    learn = learner(cbs=[MixUp(), StudentSees(smaller)])
    learn.model.register_forward_pre_hook(lambda m, xb: seen.append(xb[0].clone()) if m.training else None)
    learn.fit(1, cbs=KD(t))
    for of_student,of_teacher in zip(seen[::2], seen[1::2]): torch.testing.assert_close(smaller(of_teacher), of_student)
    known = torch.cat([b[0] for b in learn.dls.train])
    assert not all((known==x).all((1, 2, 3)).any() for x in seen[1])


@pytest.mark.parametrize('mixer', [MixUp, CutMix])
def test_several_inputs_with_a_mixer_are_refused_before_anything_is_mixed(mixer):
    learn = learner(grey_net(), two_views(), [StudentSees(1), mixer()])
    old = learn.loss_func
    with pytest.raises(ValueError, match='mixes one input, and the batch has 2.*take .* out'): learn.fit(1)
    assert learn.loss_func is old


luma = torch.tensor([.299, .587, .114]).view(1, 3, 1, 1)

@pytest.mark.parametrize('where, tfms', [('batch_tfms', aug_transforms(max_lighting=0, max_rotate=20)),
                                         ('item_tfms', [FlipItem(p=0.5)])])
def test_fastais_transforms_change_all_views_of_a_sample_alike(where, tfms):
    batches = list(two_views(**{where: tfms}).train)+list(two_views(**{where: tfms}).train)
    for rgb,bw,_ in batches: assert ((rgb*luma).sum(1, keepdim=True)-bw).as_subclass(torch.Tensor).abs().max()<5/255
    seen = torch.cat([b[0].as_subclass(torch.Tensor) for b in batches])
    plain = torch.stack([torch.tensor(picture(i)).permute(2, 0, 1)/255 for i in range(16)])
    changed = sum(not (plain-x).abs().amax((1, 2, 3)).lt(1/255).any() for x in seen)
    assert 0<changed and (changed<len(seen) or where=='batch_tfms')


def test_views_with_random_numbers_of_their_own_are_refused_unless_allowed():
    dls = two_views()
    dls.train.dataset.tls[1].tfms.add(FlipItem())
    with pytest.raises(ValueError, match='FlipItem draws random numbers for one input alone.*item_tfms or batch_tfms'):
        learner(grey_net(), dls, StudentSees(1)).fit(1)
    learner(grey_net(), dls, StudentSees(1, paired=False)).fit(1)
    dls = two_views(item_tfms=RandomResizedCrop(8))
    learner(grey_net(), dls, StudentSees(1)).fit(1)


@pytest.mark.parametrize('f, msg', [
    (2, r'StudentSees\(2\): the batch has 2 inputs, numbered from 0'),
    (slice(2, None), 'leaves nothing of the batch'),
    (lambda a, b: b[:1], 'the same samples as the batch')])
def test_what_is_no_view_of_the_batch_is_refused(f, msg):
    learn = learner(grey_net(), two_views(), StudentSees(f))
    with pytest.raises(ValueError, match=msg): learn.fit(1)
    assert not [cb for cb in learn.cbs if isinstance(cb, KD)]
    with pytest.raises(TypeError, match='must be a function of the inputs, a number or a slice'): StudentSees('grey')


@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_step'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('out of memory'), CancelBatchException()],
                         ids=lambda e: type(e).__name__)
def test_after_an_exception_a_fit_without_the_view_asks_about_its_own_batch(event, exc):
    t = Spy(teacher())
    learn = learner(cbs=StudentSees(smaller))
    try: learn.fit(1, cbs=[KD(t), Boom(event, exc, order=20)])
    except (KeyboardInterrupt, RuntimeError): pass
    learn.remove_cb(StudentSees)
    learn.add_cb(StudentSees(lambda x: x[..., :6, :6]))
    t.seen.clear()
    learn.fit(1, cbs=KD(t))
    assert t.shapes=={((3, 8, 8),)}
    learn.remove_cb(StudentSees)
    learn.fit(1, cbs=KD(t))
    assert full_inputs(learn) is learn.xb


def test_one_view_of_another():
    student,t = Spy(nn.Sequential(nn.Flatten(), nn.Linear(16, 2))),Spy(OfTwo())
    learner(student, two_views(), [StudentSees(1), StudentSees(smaller)]).fit(1, cbs=KD(t))
    assert student.shapes=={((1, 4, 4),)} and t.shapes=={((3, 8, 8), (1, 8, 8))}


def test_a_view_of_the_training_alone():
    student,t = Spy(net()),Spy(teacher())
    learner(student, cbs=StudentSees(smaller, training=True)).fit(1, cbs=KD(t, valid=True))
    assert {o[1:] for o in student.seen if o[0]}=={((3, 4, 4),)}
    assert {o[1:] for o in student.seen if not o[0]}=={((3, 8, 8),)}
    assert t.shapes=={((3, 8, 8),)}


def test_an_exported_student_sees_as_it_has_learned(tmp_path):
    dls = two_views()
    learn = Learner(dls, grey_net(), path=tmp_path, cbs=StudentSees(1))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KD(Teacher(net(4, c=2), tfms=first)))
    before = learn.predict(3)[2]
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    with loaded.no_bar(): torch.testing.assert_close(loaded.predict(3)[2], before)
    assert repr(loaded.student_sees)=='StudentSees(1)'
    torch.save(learn.student_sees.view, io.BytesIO())


def test_terms_and_weights_are_those_of_the_training():
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), cbs=StudentSees(smaller), metrics=accuracy)
    t = Spy(teacher())
    kd = KD(t, {SoftTarget:1, Logits:1})
    x,y = learn.dls.one_batch()
    _,parts = kd.terms_on(learn, (x,), (y,))
    torch.testing.assert_close(parts['Logits'], F.mse_loss(learn.model(smaller(x)), t.net.eval()(x)))
    advice = suggest_weights(learn, kd, n_batches=2)
    assert advice.table.gradient.gt(0).all() and t.shapes=={((3, 8, 8),)}


def test_layers_are_matched_on_what_each_side_sees():
    dls = data()
    student = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    learn = learner(student, dls, StudentSees(grey))
    found = match_feature_layers(learn, teacher(), dls.one_batch()[0])
    assert len(found['student'])==2 and found['teacher']==['0', '1']
    learn.fit(1, cbs=KD(teacher(), FitNet, found['student'], found['teacher']))


@pytest.mark.parametrize('cache', [TeacherCache, partial(Replay, k=2)])
def test_answers_are_recorded_by_the_whole_batch(cache):
    found = []
    for c in None, cache():
        t = Spy(teacher())
        learn = learner(cbs=StudentSees(lambda x: torch.zeros_like(x)+x.mean((1, 2, 3), keepdim=True)))
        learn.fit(3, cbs=KD(Teacher(t, cache=c), weight=0.9))
        found.append(learn.model)
    n = sum(1 for _ in learn.dls.train)*8
    assert c.hits==(3-(c.k or 1))*n and t.shapes=={((3, 8, 8),)}
    if c.k is None:
        for a,b in zip(*[m.parameters() for m in found]): torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


def test_a_learner_with_a_view_is_a_teacher_with_that_view():
    t = Spy(net(8, seed=1))
    poor = learner(t, cbs=StudentSees(smaller))
    learner().fit(1, cbs=KD(poor))
    assert t.shapes=={((3, 4, 4),)}
    t.seen.clear()
    learner().fit(1, cbs=KD(Teacher(poor, tfms=lambda x: x)))
    learner().fit(1, cbs=KD(Teacher(poor, size=6)))
    assert t.shapes=={((3, 8, 8),), ((3, 4, 4),)}
    with pytest.raises(ValueError, match='size: tfms= is given'): Teacher(poor, tfms=smaller, size=6)


def test_comparisons_and_pictures_show_each_side_its_own():
    dls = data()
    student = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    learn,big = learner(student, dls, StudentSees(smaller), metrics=accuracy),learner(teacher(), dls, metrics=accuracy)
    table = compare(dict(teacher=big, alone=learn), n_boot=20, min_time=0.01)
    assert table.macs['alone']==144
    plot_similarity(learn, teacher())


def test_experiments_and_sweeps_with_a_poorer_student(tmp_path):
    dls = data()
    dls.c = 3
    def student(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    loss = CrossEntropyLossFlat()
    exp = Experiment(dls, teacher(), student, loss_func=loss, cbs=[StudentSees(smaller)]).run(1, 2)
    assert len(exp.runs)==2 and exp.table().shape[0]==3
    assert exp.learners()['alone'].student_sees is not exp.learners()['distilled'].student_sees
    def make(): return learner(student(), dls, StudentSees(smaller), metrics=accuracy)
    t = Spy(teacher())
    found = sweep(make, t, {'T': [1, 4]}, epochs=1, seeds=[0], progress=False)
    assert len(found.runs)==4 and t.shapes=={((3, 8, 8),)}


def test_two_views_of_one_kind_are_two_settings_of_a_study():
    from fasterai.distill.study.setting import learner_text
    texts = {learner_text(learner(cbs=StudentSees(f))) for f in (0, 1, slice(1), slice(2), smaller, grey)}
    assert len(texts)==6


def test_lr_find_with_a_view():
    import fastai.callback.schedule  # noqa: F401 (gives Learner `lr_find`)
    learn = learner(cbs=StudentSees(smaller))
    t,before = Spy(teacher()),state(learn.model)
    learn.add_cb(KD(t))
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False)
    assert same(before, state(learn.model)) and t.shapes=={((3, 8, 8),)}


def test_a_table_whose_privileged_columns_the_student_will_not_have():
    g = np.random.default_rng(0)
    df = pd.DataFrame(dict(kind=g.choice(list('ab'), 64), later=g.choice(list('xyz'), 64), size=g.random(64),
                           outcome=g.random(64), label=g.choice(['no', 'yes'], 64)))
    def table(df, cats, conts):
        return TabularDataLoaders.from_df(df, '.', [Categorify, Normalize], cats, conts, 'label', bs=16,
                                          y_block=CategoryBlock(), valid_idx=range(48, 64), num_workers=0, device='cpu')
    dls = table(df, ['kind', 'later'], ['size', 'outcome'])
    def at_hand(cat, cont): return cat[:, :1],cont[:, :1]
    sizes = get_emb_sz(dls.train_ds)
    t,student = Spy(TabularModel(sizes, 2, 2, [8])),Spy(TabularModel(sizes[:1], 1, 2, [8]))
    learn = learner(student, dls, StudentSees(at_hand))
    learn.fit(1, cbs=KD(t))
    assert t.shapes=={((2,), (2,))} and student.shapes=={((1,), (1,))}
    own = table(df[['kind', 'size', 'label']], ['kind'], ['size']) # where the student is to work
    preds = [learner(student, o, cbs).get_preds()[0] for o,cbs in ((dls, StudentSees(at_hand)), (own, None))]
    torch.testing.assert_close(*preds)


def test_after_a_cancelled_batch_the_validation_asks_about_its_own():
    class Cancel(Callback):
        order = 60
        def after_loss(self):
            if self.training and self.train_iter==1: raise CancelTrainException()
    found = []
    for boom in [], [Cancel()]:
        t = Spy(teacher())
        t.xs = []
        t.register_forward_pre_hook(lambda m, xb: m.xs.append(xb[0].clone()))
        learn = learner(cbs=StudentSees(smaller, training=True))
        learn.fit(1, cbs=[KD(t, valid=True), *boom])
        found.append(t.xs[-4:])
    for a,b in zip(*found): assert a.equal(b)
