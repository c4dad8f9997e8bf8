"fastai's experiment trackers get the columns of a distillation, and change nothing of it"
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastcore.basics import noop

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.losses import *
from helpers import learner, n_hooks, net, same, state
from kd_helpers import KD, layers, teacher


def _columns(learn): return learn.recorder.metric_names[1:-1]


def _fit(cbs=(), n=2, **kwargs):
    torch.manual_seed(0)
    learn = learner(metrics=accuracy)
    kd = KD(teacher(), [SoftTarget, Attention], **layers, **kwargs)
    learn.fit(n, cbs=[kd, *cbs])
    return learn,kd


class Columns(Callback):
    "The table's columns, while they are there"
    order = 60
    def before_fit(self): self.names = _columns(self.learn)


def _scalars(folder):
    "By name, what TensorBoard reads there"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {k:[o.value for o in events.Scalars(k)] for k in events.Tags()['scalars']}


@pytest.mark.parametrize('valid', [False, True])
def test_tensorboard(tmp_path, valid):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    tracker = TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)  # a trace moves BatchNorm's means
    columns = Columns()
    learn,kd = _fit([tracker, columns], valid=valid)
    plain,_ = _fit(valid=valid)
    assert same(state(learn.model), state(plain.model))
    got = _scalars(tmp_path)
    shown = [n for n in columns.names if n!='train_loss']
    assert {'task_loss', 'SoftTarget_loss', 'Attention_loss'} <= {*shown} and {*shown} <= {*got}
    assert ('valid_SoftTarget_loss' in shown)==valid
    for i,name in enumerate(columns.names[1:], 1):
        assert got[name]==pytest.approx([row[i] for row in learn.recorder.values], rel=1e-6), name
    assert n_hooks(learn.model, kd.teacher.models[0])==0


def _fit_digits(*cbs):
    torch.manual_seed(0)
    learn = Learner(digits_dls(100, bs=50, n_valid=50, device='cpu'), digits_net(4), opt_func=SGD, metrics=accuracy)
    kd = KD(digits_net(8), SoftTarget, valid=True)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.1, cbs=[kd, *cbs])
    return learn


@pytest.mark.filterwarnings('ignore')
def test_tensorboard_s_own_batch_is_no_lesson(tmp_path):
    "It traces the model before the training, and runs a batch after each validation"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = _fit_digits(TensorBoardCallback(tmp_path, n_preds=4))
    said = [row[-1] for row in learn.recorder.values]
    assert _scalars(tmp_path)['valid_distill_loss']==pytest.approx(said, rel=1e-6)
    assert n_hooks(learn.model)==0


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    from fastai.callback import wandb as tracker
    monkeypatch.setattr(tracker, '_format_config', noop)  # fails without any teacher too: fastai's issue 4173
    monkeypatch.setenv('WANDB_SILENT', 'true')
    run = wandb.init(mode='offline', dir=str(tmp_path), project='distilled')
    said,log = [],wandb.log
    monkeypatch.setattr(wandb, 'log', lambda d, **kw: (said.append(d), log(d, **kw)))
    try: learn = _fit_digits(tracker.WandbCallback(log_preds=False))
    finally: run.finish()
    for name,i in dict(valid_loss=1, task_loss=3, distill_loss=4, valid_distill_loss=5).items():
        assert [d[name] for d in said if name in d]==[row[i] for row in learn.recorder.values], name


def test_csv(tmp_path):
    import pandas as pd
    from fastai.callback.progress import CSVLogger
    torch.manual_seed(0)
    learn = learner(metrics=accuracy)
    learn.path = tmp_path
    learn.fit(2, cbs=[KD(teacher(), SoftTarget), CSVLogger()])
    table = pd.read_csv(tmp_path/'history.csv')
    assert list(table)[1:5]==['train_loss', 'valid_loss', 'accuracy', 'task_loss'] and 'distill_loss' in table
