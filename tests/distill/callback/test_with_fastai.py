"The rest of fastai: its other callbacks, losses, optimizers, ways to fit, to predict and to save"
import copy, pickle, warnings

import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.core.schedule import lin
from fasterai.distill.losses import *
from helpers import Boom, CPUMixedPrecision, GradsAt, data, learner, n_hooks, net, same, state
from kd_helpers import KD, teacher, layers


def test_lr_find_sees_the_full_weight_and_leaves_no_state(tmp_path):
    learn = learner(opt_func=Adam, path=tmp_path)
    kd = KD(teacher(), FitNet, weight=0.8, schedule=lin, **layers)
    before = state(learn.model)
    learn.add_cb(kd)
    learn.lr_find(num_it=8, show_plot=False)
    assert set(kd.log.history.weight)=={0.8}
    assert same(before, state(learn.model)) and not n_hooks(learn.model) and kd.session is None
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))


def test_gradient_accumulation_scales_both_terms():
    def grads(bs, cbs):
        learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), data(n=32, bs=bs), wd=0.)
        with torch.no_grad(): learn.model[1].weight.fill_(0.01); learn.model[1].bias.zero_()
        g = GradsAt()
        learn.fit(1, cbs=[KD(teacher(), weight=0.7), g, *cbs])
        return g.grads
    a,b = grads(32, []),grads(4, [GradientAccumulation(32)])
    assert len(a)==len(b)==1
    for x,y in zip(a[0], b[0]): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD, Attention, FitNet, Similarity, ActivationBoundaries])
def test_under_autocast(loss):
    learn = learner(cbs=CPUMixedPrecision('bf16'))
    t,seen = teacher(),[]
    def spy(pred=None, teacher_pred=None, fm_s=None, fm_t=None, target=None, **kw):
        seen.append((pred.dtype, torch.is_autocast_enabled('cpu'),
                     *[o.dtype for o in (*fm_s.values(), *fm_t.values())]))
        return loss(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, target=target)
    spy.same_shape = getattr(loss, 'same_shape', False)
    learn.fit(1, cbs=KD(t, spy, **layers))
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert set(seen)=={(torch.float32, False, *[torch.float32]*4)}


def test_channels_last():
    learn = learner(cbs=ChannelsLast())
    learn.fit(1, cbs=KD(teacher(), [Similarity, Attention], **layers))
    ref = learner()
    ref.fit(1, cbs=KD(teacher(), [Similarity, Attention], **layers))
    for a,b in zip(learn.model.parameters(), ref.model.parameters()):
        torch.testing.assert_close(a.contiguous(), b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels_reach_a_loss_that_takes_them_and_others_refuse(mix):
    seen = []
    def soft(pred, target, **kw): seen.append(target); return -(pred.log_softmax(1)*target).sum(1).mean()
    set_seed(0)
    learner().fit(1, cbs=[KD(teacher(), soft), mix()])
    assert all(y.shape==(8, 3) for y in seen)
    torch.testing.assert_close(torch.cat(seen).sum(1), torch.ones(32))
    assert any(((y>0).sum(1)==2).any() for y in seen)
    with pytest.raises(TypeError, match='DecoupledKD.*class indices'):
        learner().fit(1, cbs=[KD(teacher(), DecoupledKD), mix()])


def test_labels_in_a_column_are_mixed_as_others_are():
    seen = []
    def soft(pred, target): seen.append(target); return -(target*pred.log_softmax(1)).sum(1).mean()
    for y in data().train_ds.tensors[1], data().train_ds.tensors[1][:, None]:
        set_seed(0)
        learner(dls=data(y=y)).fit(1, cbs=[KD(None, soft), MixUp()])
    for a,b in zip(seen[:4], seen[4:]): torch.testing.assert_close(a, b)


@pytest.mark.parametrize('lf', [LabelSmoothingCrossEntropyFlat(), FocalLossFlat(), nn.CrossEntropyLoss()])
def test_other_task_losses(lf):
    learn = learner(loss_func=lf)
    learn.fit(1, cbs=KD(teacher(), DecoupledKD))
    assert learn.recorder.values[-1][1]>0


def test_fine_tune_freezes_and_unfreezes_with_adapters():
    from fastai.torch_core import params
    learn = learner(splitter=lambda m: [params(m[:2]), params(m[2:])], opt_func=Adam)
    learn.fine_tune(1, cbs=KD(teacher(), FitNet, **layers))
    assert sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters()))


def test_export_and_pickle_hold_no_teacher(tmp_path):
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import RandomSplitter
    big = nn.Sequential(nn.Linear(4, 3000), nn.Linear(3000, 3))
    db = DataBlock(blocks=(_Floats, CategoryBlock), get_x=_x, get_y=_y, splitter=RandomSplitter(seed=0))
    learn = learner(nn.Linear(4, 3), db.dataloaders(list(range(40)), bs=8, num_workers=0, device='cpu'), path=tmp_path)
    kd = KD(big)
    learn.add_cb(kd)
    learn.fit(1)
    size = len(pickle.dumps(learn))
    learn.export('student.pkl')
    assert kd.teacher is not None and (tmp_path/'student.pkl').stat().st_size<60_000 and size<60_000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'student.pkl')
    loaded.remove_cbs([c for c in loaded.cbs if type(c).__name__=='ProgressCallback'])
    a,b = [l.get_preds(dl=l.dls.test_dl(list(range(5))))[0] for l in (learn, loaded)]
    torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match='without its teacher'):
        loaded.dls = learn.dls
        loaded.fit(1)
    again = copy.deepcopy(loaded) # without a teacher, as it is
    kd = again.cbs[-1]
    assert kd is not loaded.cbs[-1] and kd.learn is again and copy.copy(kd).teacher is None
    with pytest.raises(ValueError, match='without its teacher'): kd.replace(weight=.1)
    again.validate()


def _x(i): return torch.tensor([i, -i, 1, 0.])/40


def _y(i): return 'abc'[i%3]


def _Floats():
    from fastai.data.block import TransformBlock
    return TransformBlock()


def test_unlabelled_inference_and_summary():
    import fastai.callback.hook  # noqa: F401  `summary`
    learn = learner(cbs=KD(teacher(), Attention, **layers))
    dl = learn.dls.valid.new(torch.utils.data.TensorDataset(torch.randn(5, 3, 8, 8)))
    assert learn.get_preds(dl=dl)[0].shape==(5, 3)
    assert 'Conv2d' in learn.summary() and not n_hooks(learn.model) and len(learn.metrics)==0


def test_segmentation_ignores_what_the_task_ignores():
    y = torch.randint(0, 3, (16, 8, 8))
    y[:, :4] = 255
    dls = data(n=16, y=y)
    seg = lambda w: nn.Sequential(nn.Conv2d(3, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, 3, 1))
    got = []
    def loss(pred, teacher_pred, target=None, axis=1, ignore_index=None, **kw):
        got.append((axis, ignore_index))
        return SoftTarget(pred, teacher_pred, target=target, axis=axis, ignore_index=ignore_index)
    learn = learner(seg(4), dls, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    learn.fit(1, cbs=KD(seg(8), loss))
    assert set(got)=={(1, 255)}
    other = learner(seg(4), dls, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    other.fit(1, cbs=KD(seg(8), [SoftTarget, DecoupledKD]))


def test_compiled_student_and_teacher():
    s,t = (torch.compile(m, backend='eager') for m in (net(), teacher()))
    learn = learner(s)
    learn.fit(1, cbs=KD(t, [SoftTarget, Attention], **layers))
    ref = learner()
    ref.fit(1, cbs=KD(teacher(), [SoftTarget, Attention], **layers))
    for a,b in zip(learn.model.parameters(), ref.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_compiled_student_whose_distillation_starts_late():
    torch.compiler.reset()
    learn = learner(torch.compile(net(), backend='eager'))
    kd = KD(teacher(), Attention, **layers, start_pct=0.5)
    learn.fit(2, cbs=kd)
    assert (kd.log.history.weight>0).sum()==len(learn.dls.train)
    assert kd.log.history.distill_loss.notna().sum()==len(learn.dls.train)


def test_a_compiled_student_that_ran_unhooked_is_told_apart():
    torch.compiler.reset()
    learn = learner(torch.compile(net(), backend='eager'))
    learn.fit(1)
    with pytest.raises(RuntimeError, match='compiled'): learn.fit(1, cbs=KD(teacher(), Attention, **layers))


def test_predict_show_results_and_the_other_ways_to_fit(tmp_path):
    from fastai.callback.progress import CSVLogger
    from fasterai.data.digits import digits_dls, digits_net
    dls = digits_dls(n_train=40, bs=20, n_valid=20)
    learn = learner(digits_net(4), dls, opt_func=Adam, path=tmp_path,
                    cbs=KD(digits_net(8), [SoftTarget, Attention], {'0': '0'}))
    learn.fit_flat_cos(1, 1e-3)
    learn.fit(2, cbs=CSVLogger())
    head,*rows = (tmp_path/'history.csv').read_text().splitlines()
    assert head.endswith('SoftTarget_loss,Attention_loss,time') and len(rows)==2
    assert learn.predict(dls.valid_ds[0][0])[0] in '0123456789'
    learn.show_results(max_n=2)
    assert len(learn.tta(n=1)[0])==20
    assert not n_hooks(learn.model) and len(learn.metrics)==0


def test_save_load_and_resume(tmp_path):
    a = learner(path=tmp_path, opt_func=Adam)
    kd = KD(teacher(), FitNet, **layers)
    a.fit(2, cbs=kd)
    a.save('half')
    torch.save(kd.learned.state_dict(), tmp_path/'adapters.pth')
    b = learner(path=tmp_path, opt_func=Adam)
    b.create_opt()
    b.load('half')
    kd2 = KD(teacher(), FitNet, **layers)
    kd2.load_learned(torch.load(tmp_path/'adapters.pth'))
    for dl,other in zip(a.dls.loaders, b.dls.loaders): other.rng = copy.deepcopy(dl.rng)
    a.fit(1, cbs=kd)
    b.fit(1, cbs=kd2)
    assert same(state(a.model), state(b.model)) and same(state(kd.learned), state(kd2.learned))


def test_data_parallel_is_refused_by_name():
    model = nn.DataParallel(net())
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match='DataParallel'): learner(model).fit(1, cbs=KD(teacher(), Attention, **layers))


def test_a_callback_pickles_whatever_it_was_given():
    kd = KD(teacher(), FitNet, **layers, adapters={'0': nn.Conv2d(4, 8, 1)}, select=lambda o: o, schedule=lambda s,e,
            p: e)
    learner(opt_func=Adam).fit(1, cbs=kd)
    assert len(pickle.dumps(kd))<2000


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_hidden_synchronisation():
    x,y = torch.randn(32, 3, 8, 8, device='cuda'),torch.randint(3, (32,), device='cuda')
    from fastai.data.core import DataLoaders, TfmdDL
    dls = DataLoaders(*[TfmdDL(torch.utils.data.TensorDataset(x, y), bs=8, num_workers=0) for _ in range(2)],
                      device='cuda')
    learn = learner(dls=dls)
    kd = KD(teacher(), [SoftTarget, Attention, FitNet], **layers)
    learn.fit(1, cbs=kd)
    class Strict(Boom):
        order = 4
        def __init__(self, mode, event): self.mode,self.at = mode,event
        def __call__(self, name):
            if name==self.at: torch.cuda.set_sync_debug_mode(self.mode)
    late = Strict('default', 'before_backward')
    late.order = -20
    try: learn.fit(1, cbs=[kd, Strict('error', 'after_loss'), late])
    finally: torch.cuda.set_sync_debug_mode('default')


def test_two_targets_of_a_task_that_ignores_a_label():
    x,y = torch.randn(16, 3, 8, 8),torch.arange(16)%3
    ds = TensorDataset(x, y, y)
    ds.n_inp = 1
    def both(pred, a, b): return F.cross_entropy(pred, a)+F.cross_entropy(pred, b)
    both.ignore_index = -100
    dls,teacher = DataLoaders.from_dsets(ds, ds, bs=16, num_workers=0),net(c=3).eval()
    learn = learner(net(c=3), dls, loss_func=both)
    before = copy.deepcopy(learn.model).train()
    kd = KD(teacher, Logits)
    learn.fit(1, 0., cbs=kd)
    assert kd.log.history.distill_loss[0]==pytest.approx(F.mse_loss(before(x), teacher(x)).item(), rel=1e-4)
