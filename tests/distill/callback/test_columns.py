"What is shown and logged: columns, means, and a validation loss that stays the task's"
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from torch import nn

from fasterai.distill.losses import *
from helpers import GradsAt, data, learner, same, state
from kd_helpers import KD, teacher, layers


def test_several_losses_have_a_column_each():
    learn = learner()
    kd = KD(teacher(), [SoftTarget, partial(SoftTarget, T=2), Logits])
    learn.fit(1, cbs=kd)
    assert learn.recorder.metric_names[3:-1]==['task_loss','SoftTarget_loss','SoftTarget_2_loss','Logits_loss']
    assert len({round(v, 6) for v in learn.recorder.values[0][2:]})==4


def test_a_loss_called_as_a_column_of_the_table_has_one_of_its_own():
    def task(pred, teacher_pred): return 100+F.mse_loss(pred, teacher_pred)
    def valid(pred, teacher_pred): return 100+F.mse_loss(pred, teacher_pred)
    learn = learner()
    kd = KD(teacher(), [task, valid])
    learn.fit(1, cbs=kd)
    assert learn.recorder.metric_names[3:-1]==['task_loss', 'task_loss_2', 'valid_loss_2']
    assert [v>99 for v in learn.recorder.values[0][1:]]==[False, False, True, True]
    assert (kd.log.history.task_loss<99).all()


def test_a_task_loss_that_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match=r"task's loss must be one number, got \(8,\).*reduction='none'"):
        learner(loss_func=nn.CrossEntropyLoss(reduction='none')).fit(1, cbs=KD(teacher()))


def test_columns_hold_the_means_of_the_epoch_and_go_with_the_fit():
    learn = learner()
    kd = KD(teacher())
    learn.fit(2, cbs=kd)
    assert learn.recorder.metric_names[-3:]==['task_loss','distill_loss','time']
    rec = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    last = kd.log.history.tail(len(learn.dls.train))
    assert rec['task_loss']==pytest.approx(last.task_loss.mean(), rel=1e-5)
    assert rec['distill_loss']==pytest.approx(last.distill_loss.mean(), rel=1e-5)
    assert len(learn.metrics)==0
    learn.fit(1)
    assert 'distill_loss' not in learn.recorder.metric_names


def test_valid_loss_and_inference_are_the_students_own():
    learn = learner()
    learn.fit(1, cbs=KD(teacher()))
    valid = learn.recorder.values[-1][1]
    z,y = zip(*[(learn.model(x),y) for x,y in learn.dls.valid])
    assert valid==pytest.approx(F.cross_entropy(torch.cat(z), torch.cat(y)).item(), rel=1e-5)
    kept = learner(learn.model, cbs=KD(teacher()))
    assert list(kept.validate())==pytest.approx([valid], rel=1e-5)
    losses = kept.get_preds(with_loss=True)[2]
    assert losses.mean().item()==pytest.approx(valid, rel=1e-5)


def test_valid_true_fills_a_column_and_leaves_valid_loss():
    a,b = learner(),learner()
    a.fit(1, cbs=KD(teacher()))
    b.fit(1, cbs=KD(teacher(), valid=True))
    names = b.recorder.metric_names
    assert names[-2]=='valid_distill_loss' and b.recorder.values[0][1]==a.recorder.values[0][1]
    t = teacher().eval()
    d = torch.stack([SoftTarget(b.model(x), t(x)) for x,_ in b.dls.valid]).mean().item()
    assert b.recorder.values[0][names.index('valid_distill_loss')-1]==pytest.approx(d, rel=1e-4)


def test_with_metrics_of_both_phases_each_loss_has_one_column_of_each():
    learn = learner()
    learn.recorder.train_metrics = True
    kd = KD(teacher(), valid=True)
    learn.fit(1, cbs=kd)
    assert learn.recorder.metric_names[1:-1]==[f'{p}_{k}' for p in ('train', 'valid') for k in
                                               ('loss', 'task_loss', 'distill_loss')]
    assert learn.recorder.values[0][5]==pytest.approx(kd.log.means[False]['distill_loss'], rel=1e-6)


def test_trackers_follow_the_task_loss(tmp_path):
    learn = learner(path=tmp_path)
    saves = SaveModelCallback(with_opt=True, fname='best')
    learn.fit(3, cbs=[KD(teacher(), FitNet, **layers, weight=0.9), saves, EarlyStoppingCallback(patience=2)])
    at = learn.recorder.metric_names.index('valid_loss')-1
    assert saves.best==min(row[at] for row in learn.recorder.values)
    fresh = learner(path=tmp_path)
    fresh.create_opt()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Could not load the optimizer')
        fresh.load('best', with_opt=True) # written while adapters were in the optimizer
    fresh.fit(1)


def test_a_last_batch_of_one():
    learn = learner(dls=data(n=9, bs=8), model=nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    learn.dls.train.drop_last = False
    kd = KD(teacher())
    learn.fit(1, cbs=kd)
    assert len(kd.log.history)==2


def test_validation_teaches_adapters_nothing():
    learn,seen = learner(),[]
    kd = KD(teacher(), FitNet, **layers, valid=True)
    class See(GradsAt):
        def before_fit(self): pass
        def before_step(self): pass
        def after_train(self): seen.append(state(kd.learned))
        def after_validate(self): seen.append(state(kd.learned))
    learn.fit(1, cbs=[kd, See()])
    assert same(*seen) and len(seen[0])


def test_means_of_an_epoch_without_distillation_are_not_those_of_another():
    learn = learner()
    learn.fit(2, cbs=KD(teacher(), end_pct=0.5, valid=True))
    i = learn.recorder.metric_names.index('valid_distill_loss')-1
    first,last = (o[i] for o in learn.recorder.values)
    assert first>0 and last!=last # NaN
