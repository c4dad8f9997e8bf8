"torchvision's detectors in a Learner: pictures of many sizes, without boxes, their losses in validation, and PKD"
import pickle
import random
import warnings
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import SGD
from fastcore.basics import noop
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from fasterai.data.scenes import digit_scenes, scenes_detector
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.loss.dense import PKD
from fasterai.distill.losses import SoftTarget
from fasterai.distill.ship.quantize import calibration_batches
from fasterai.distill.study.advice import suggest_weights
from fasterai.distill.study.compare import compare
from fasterai.distill.study.teacher_numbers import measure_teacher
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.recorded import TeacherCache
from fasterai.distill.methods.detection import (LossesInValidation, MeanAveragePrecision, detect, detection_dls,
    detection_loss, detector_learner)
from fasterai.distill.teacher.teacher import Teacher
from helpers import Boom, flags, n_hooks, same, state

levels = [f'backbone.fpn[{i}]' for i in range(3)]


def fcos(width=2, size=64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return scenes_detector(width, size)

def boxed(kind, width=2, seed=0):
    "The same backbone in another kind of detector"
    boxes = AnchorGenerator(((12,), (20,), (32,), (48,)), ((1.,),)*4)
    sizes = dict(min_size=64, max_size=64, image_mean=[0.2], image_std=[0.3])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = scenes_detector(width).backbone
        if kind=='retina': return RetinaNet(backbone, 11, anchor_generator=boxes, **sizes)
        few = {f'rpn_{n}_nms_top_n_{m}': 20 for n in ('pre', 'post') for m in ('train', 'test')}
        return FasterRCNN(backbone, rpn_anchor_generator=boxes, box_roi_pool=MultiScaleRoIAlign(['0', '1', '2'], 3, 2),
                          box_head=TwoMLPHead(32*9, 16), box_predictor=FastRCNNPredictor(16, 11), **few, **sizes)

def data(train=None, n=8, bs=4):
    train = digit_scenes(n) if train is None else train
    dls = detection_dls(train, digit_scenes(4, valid=True), bs=bs, device='cpu')
    for dl in dls.loaders: dl.rng = random.Random(0)
    return dls

def learner(model=None, dls=None, cbs=None, **kwargs):
    dls,model = data() if dls is None else dls,fcos() if model is None else model
    learn = detector_learner(dls, model, cbs=cbs, lr=1e-3, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def taught(teacher=None, layers=levels, teachers=None, **kwargs):
    teacher = fcos(4, seed=1) if teacher is None else teacher
    return KD(teacher, PKD, layers, teachers or layers, **{'weight': 1., 'task_weight': 1., **kwargs})

empty = torch.rand(1, 64, 64),dict(boxes=[], labels=[])


def test_the_training_is_that_of_a_loop_by_hand():
    torch.manual_seed(0)
    learn = learner(opt_func=SGD)
    other,batches = fcos(),[]
    class Keep(Callback):
        def after_batch(self): batches.append((self.xb, self.loss.item())) if self.training else None
    learn.fit(1, lr=0.01, cbs=Keep())
    opt = torch.optim.SGD(other.parameters(), 0.01)
    for (images,targets),loss in batches:
        found = sum(other(images, targets).values())
        assert found.item()==pytest.approx(loss, rel=1e-6)
        opt.zero_grad(), found.backward(), opt.step()
    for k,v in other.state_dict().items(): assert torch.allclose(v, learn.model.state_dict()[k], atol=1e-6)


@pytest.mark.parametrize('kind', ['fcos', 'retina', 'rcnn'])
def test_each_kind_is_distilled_judged_and_left_as_it_was(kind):
    make = fcos if kind=='fcos' else partial(boxed, kind)
    teacher = make(4, seed=1)
    before,modes = state(teacher),flags(teacher)
    learn = learner(make(), cbs=(kd := taught(teacher)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', 'lr_scheduler|.*deprecat.*')
        learn.fit(2)
    assert kd.log.history.distill_loss.gt(0).all()
    assert same(before, state(teacher)) and modes==flags(teacher)
    assert not n_hooks(learn.model, teacher)
    for row in learn.recorder.values: assert all(v==v and v>=0 for v in row)
    assert learn.validate()==learn.validate()


def test_validation_is_in_evaluation_but_for_the_losses():
    learn = learner(boxed('rcnn'))
    before,seen = state(learn.model),[]
    class Look(Callback):
        order = -1
        def before_batch(self): self.stream = torch.get_rng_state()
        def after_pred(self): seen.append((self.pred.keys(), self.model.transform.training))
        def after_loss(self): assert torch.equal(self.stream, torch.get_rng_state())
    learn.validate(cbs=Look())
    assert same(before, state(learn.model))
    assert all({'loss_classifier', 'loss_objectness'}<=k and not t for k,t in seen)
    assert not any(m.training for m in learn.model.modules())


def test_pictures_of_many_sizes_and_without_boxes():
    train = digit_scenes(3) + digit_scenes(2, size=80) + [empty, (torch.rand(1, 48, 70), empty[1])]
    learn = learner(dls=data(train, bs=3), cbs=taught())
    learn.fit(2)
    assert all(v==v for row in learn.recorder.values for v in row)
    learn = learner(dls=data([empty]*4, bs=2), cbs=taught())
    learn.fit(1)
    assert all(v==v for v in learn.recorder.values[0])


def test_nothing_to_be_found_is_not_a_precision_of_minus_one():
    dls = detection_dls(digit_scenes(4), [empty]*2, bs=2, device='cpu')
    learn = learner(dls=dls)
    loss,found = learn.validate()
    assert loss>=0 and found!=found


def test_precision_is_that_of_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision as Theirs
    learn = learner(metrics=[MeanAveragePrecision('map_50'), MeanAveragePrecision()])
    valid = digit_scenes(4, valid=True)
    theirs = Theirs()
    theirs.update(detect(learn.model, [x for x,_ in valid]), [t for _,t in valid])
    want = theirs.compute()
    assert list(learn.validate()[1:])==pytest.approx([want['map_50'].item(), want['map'].item()])
    assert [m.name for m in learn.metrics]==['map_50', 'map']


def test_a_target_that_is_none():
    for bad,message in [((torch.rand(1, 8, 8), 3), 'item .: a target is a dict'),
                        ((torch.rand(1, 8, 8), dict(boxes=[])), 'without labels'),
                        ((torch.rand(1, 8, 8), dict(boxes=[[0, 0, 1, 1]], labels=[1, 2])), r'got \(1, 4\) and \(2,\)'),
                        ((torch.rand(8, 8), empty[1]), r'item .: an image is .*\(8, 8\)'),
                        ((torch.zeros(1, 8, 8, dtype=torch.uint8), empty[1]), 'uint8')]:
        with pytest.raises(ValueError, match=message): detection_dls([bad]*2, [bad], bs=2).one_batch()


def test_without_the_callback_the_validation_says_what_is_missing():
    learn = learner()
    learn.remove_cb(LossesInValidation)
    with pytest.raises(TypeError, match='LossesInValidation'): learn.validate()


@pytest.mark.parametrize('layers,teachers,message', [
    (['backbone.fpn[4]'], ['backbone.fpn[3]'], "'backbone.fpn[4]': backbone.fpn gives 4, '0', '1', '2', 'pool'"),
    (['backbone.fpn[0]'], ["backbone.fpn['p5']"], "layer of the teacher"),
    (['backbone.fpn[0'], ['backbone.fpn[0]'], "did you mean 'backbone.fpn[0]'"),
    (['backbone.fpn[0]'], ['backbone.fpn[0'], "did you mean 'backbone.fpn[0]'")])
def test_levels_that_are_not_there(layers, teachers, message):
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError) as e: learn.fit(1, cbs=taught(layers=layers, teachers=teachers))
    assert message in str(e.value)
    assert same(before, state(learn.model)) and not n_hooks(learn.model)


def test_the_teacher_stops_after_the_pyramid():
    teacher,ran = fcos(4, seed=1),[]
    teacher.head.register_forward_hook(lambda *_: ran.append(1))
    learner(cbs=taught(teacher)).fit(1)
    assert not ran


def test_a_teacher_of_other_size_and_channels():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.fpn = nn.Conv2d(1, 24, 3, 4)
        def forward(self, images, targets=None): return self.fpn(torch.stack(list(images)))
    kd = taught(Wide(), ['backbone.fpn[0]'], ['fpn'])
    learner(cbs=kd).fit(1)
    assert kd.learned['adapters'].mods[0].project[0].weight.shape==(24, 32, 1, 1)
    learner(cbs=taught(fcos(4, size=96))).fit(1)


def test_logits_are_refused_with_the_reason():
    with pytest.raises(TypeError, match='tensor of logits.*select'): learner(cbs=KD(fcos(4), SoftTarget)).fit(1)


def test_a_teacher_in_half_precision():
    kd = taught(Teacher(fcos(4, seed=1), dtype='bf16'))
    learner(cbs=kd).fit(1)
    assert kd.log.history.distill_loss.gt(0).all()
    with pytest.raises(TypeError, match='logits'): # by which 'auto' judges
        learner(cbs=taught(Teacher(fcos(4, seed=1), dtype='auto'))).fit(1)


def test_under_autocast():
    class Autocast(Callback):
        order = 1
        def before_batch(self):
            self.around = torch.autocast('cpu', torch.bfloat16)
            self.around.__enter__()
        def after_pred(self): self.around.__exit__(None, None, None)
    kd = taught()
    learn = learner(cbs=kd)
    learn.fit(1, cbs=Autocast())
    assert kd.log.history.distill_loss.gt(0).all() and kd.log.history.task_loss.gt(0).all()


def test_nothing_is_left_after_an_exception_and_a_learner_pickles():
    teacher = fcos(4, seed=1)
    learn = learner()
    modes = flags(teacher)
    for event in ('after_pred', 'after_loss', 'before_validate'):
        boom = Boom(event, KeyboardInterrupt(), at=0)
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[taught(teacher), boom])
        assert not n_hooks(learn.model, teacher) and modes==flags(teacher)
    new = pickle.loads(pickle.dumps(learn))
    assert list(new.validate())==pytest.approx(list(learn.validate()))


def test_weight_0_is_plain_training():
    def run(cbs):
        torch.manual_seed(0)
        learn = learner()
        learn.fit(1, cbs=cbs)
        return state(learn.model)
    assert same(run(None), run(taught(weight=0.)))


def test_lr_find_restores():
    learn = learner(cbs=taught())
    before = state(learn.model)
    import fastai.callback.schedule
    learn.lr_find(num_it=3, suggest_funcs=None, show_plot=False)
    assert same(before, state(learn.model))


def test_without_torchmetrics(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'torchmetrics.detection', None)
    with pytest.raises(ImportError, match='pip install torchmetrics pycocotools'): MeanAveragePrecision()
    assert detection_loss(dict(a=torch.ones(()), b=torch.ones(())))==2


def test_scenes_come_from_their_seed_and_never_overlap():
    a,b = digit_scenes(5, seed=1),digit_scenes(5, seed=1)
    assert all(torch.equal(x, y) for (x,_),(y,_) in zip(a, b))
    assert not torch.equal(a[0][0], digit_scenes(5, seed=1, valid=True)[0][0])
    for x,t in a: assert 1<=len(t['boxes'])<=4 and t['boxes'].max()<=64 and t['labels'].min()>=1
    with pytest.raises(ValueError, match='32 or more'): digit_scenes(1, size=8)


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('out of memory'), CancelValidException()], ids=repr)
def test_a_validation_that_ends_badly_leaves_mode_and_random_numbers(exc):
    class Bad(Callback):
        order = 99
        def before_batch(self): self.model.forward = self.fail
        def fail(self, *_):
            del self.model.forward
            assert torch.initial_seed()==0 and self.model.training
            raise exc
    learn,drawn = learner(metrics=None),[]
    for cbs in None,Bad():
        torch.manual_seed(7)
        try: learn.validate(cbs=cbs)
        except (KeyboardInterrupt, RuntimeError): pass
        drawn.append(torch.rand(2))
        assert not any(m.training for m in learn.model.modules())
        assert 'boxes' in learn.model([digit_scenes(1)[0][0]])[0]
    assert torch.equal(*drawn)

def test_what_needs_no_logits_is_advised_and_what_cannot_be_measured_is_no_number():
    learn = learner(metrics=[])
    advice = suggest_weights(learn, taught(), n_batches=1)
    assert advice.table.gradient['PKD']>0 and not any('no better' in o for o in advice.notes)
    assert advice['loss'][PKD]==pytest.approx(advice.table.suggested['PKD'])
    assert torch.tensor(measure_teacher(learn, fcos(4, seed=1))['valid_loss']).isnan()
    with pytest.raises(TypeError, match="learner 's': its predictions are no tensors"):
        compare({'s': learn}, metrics=MeanAveragePrecision(), cost=False)

def test_pictures_in_lists_are_counted_and_their_answers_are_not_recorded(tmp_path):
    learn = learner(metrics=[])
    for views in (None, 2):
        with pytest.raises(ValueError, match='recording: the first tensor of the inputs has . rows, and the batch 8 '):
            record(fcos(4), learn, tmp_path/'r', views=views, maps=['backbone'], logits=False)
    with pytest.raises(ValueError, match='cache: .* train with the teacher at hand'):
        learn.fit(1, cbs=taught(Teacher(fcos(4), cache=TeacherCache(maps=True))))
    with pytest.raises(ValueError, match='calibration needs at least 32 samples .*, got 8'): calibration_batches(learn)
