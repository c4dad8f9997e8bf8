"""Text, tables, several labels, regression and segmentation

Each distils in a few lines, and the student comes closer to the teacher"""
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.rnn import rnn_cbs
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import RandomSplitter
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.tabular.core import Categorify, FillMissing, Normalize, TabularPandas
from fastai.tabular.learner import tabular_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from fastai.torch_core import set_seed
from fastcore.basics import noop, range_of
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import CWD, Attention, BinaryKD, Logits, Similarity, SoftTarget


def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def distils(student, teacher, loss, distance, epochs=8, lr=5e-3, **kw):
    "Train on the teacher's word alone, and see that the student comes closer to it on the validation set"
    kd = KnowledgeDistillationCallback(teacher, loss, weight=1., **kw)
    before = distance(student, teacher)
    quiet(student).fit(epochs, lr, cbs=kd)
    after = distance(student, teacher)
    assert after<0.8*before, (before, after)
    return kd


def gap(student, teacher, f=lambda z: z.softmax(-1)):
    "Mean absolute difference of what the two predict on the validation set"
    preds = [torch.cat([o if isinstance(o := m(*b[:student.dls.n_inp]), torch.Tensor) else o[0]
                        for b in student.dls.valid])
             for m in (student.model.eval(), teacher.eval()) for _ in [getattr(m, 'reset', noop)()]]
    return (f(preds[0])-f(preds[1])).abs().mean().item()


def dls_of(*ts, bs=16):
    return DataLoaders(*[TfmdDL(TensorDataset(*ts), bs=bs, num_workers=0) for _ in range(2)], device='cpu')


def test_text_awd_lstm_to_a_small_one():
    set_seed(0)
    x = torch.randint(2, 30, (64, 12))
    dls = dls_of(x, (x[:,:6]>15).sum(1).gt(3).long())
    def lstm(n, layers):
        config = dict(awd_lstm_clas_config, emb_sz=n, n_hid=n, n_layers=layers)
        return get_text_classifier(AWD_LSTM, 30, 2, config=config, drop_mult=0.1, seq_len=12, max_len=24)
    teacher = Learner(dls, lstm(24, 3), CrossEntropyLossFlat(), cbs=rnn_cbs())
    quiet(teacher).fit(8, 1e-2)
    student = Learner(dls, lstm(8, 1), CrossEntropyLossFlat(), cbs=rnn_cbs())
    distils(student, teacher.model, partial(SoftTarget, T=2), gap)
    quiet(student).fit(1, 1e-3, cbs=KnowledgeDistillationCallback(teacher, Similarity, '1.layers.0', '1.layers.0'))


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=200), b=rng.normal(size=200), k=rng.choice(list('xyz'), 200)))
    return df.assign(y=np.where(df.a+(df.k=='x')>0.3, 'yes', 'no'), v=(df.a-df.b).astype('float32'))


@pytest.mark.parametrize('y,loss,f', [('y', SoftTarget, lambda z: z.softmax(-1)), ('v', Logits, lambda z: z)],
                         ids=['classes','regression'])
def test_tabular(table, y, loss, f):
    set_seed(0)
    to = TabularPandas(table, [Categorify, FillMissing, Normalize], ['k'], ['a','b'], y,
                       splits=RandomSplitter(seed=0)(range_of(table)))
    dls = to.dataloaders(bs=32, device='cpu')
    teacher = quiet(tabular_learner(dls, layers=[64,32]))
    teacher.fit(8, 1e-2)
    distils(tabular_learner(dls, layers=[8]), teacher.model, loss, partial(gap, f=f), lr=1e-2)


def net(w):
    return torch.nn.Sequential(torch.nn.Conv2d(3, w, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2),
                               torch.nn.Flatten(), torch.nn.Linear(4*w, 4))

def test_several_labels():
    set_seed(0)
    x = torch.randn(64, 3, 8, 8)
    dls = dls_of(x, (x.mean((2,3))[:,[0,1,2,0]]>0).float())
    teacher = Learner(dls, net(32), BCEWithLogitsLossFlat(), opt_func=Adam)
    quiet(teacher).fit(8, 1e-2)
    distils(Learner(dls, net(4), BCEWithLogitsLossFlat()), teacher.model, BinaryKD, partial(gap, f=torch.sigmoid),
            lr=1e-2)


def test_segmentation_with_a_void_class():
    from fastai.vision.learner import create_unet_model
    set_seed(0)
    x = torch.randn(16, 3, 32, 32)
    y = (x.mean(1)>0).long()
    y[:, :4] = 255
    dls = dls_of(x, y, bs=8)
    unets = [create_unet_model(resnet18, 2, (32, 32), pretrained=False, n_in=3) for _ in range(2)]
    lf = CrossEntropyLossFlat(axis=1, ignore_index=255)
    dist = partial(gap, f=lambda z: z.softmax(1))
    distils(Learner(dls, unets[0], lf), unets[1], SoftTarget, dist, epochs=3, lr=2e-3)
    kd = KnowledgeDistillationCallback(unets[1], {CWD: 3, Attention: 1000}, 'layers.0.6', 'layers.0.6', weight=1,
                                       task_weight=1)
    quiet(Learner(dls, unets[0], lf)).fit(1, 1e-3, cbs=kd)
    assert np.isfinite(kd.log.history.values).all()
