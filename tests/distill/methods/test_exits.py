"Exits on the way through the student"
import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import *  # noqa: F403 (gives Learner `lr_find`)
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.data.digits import digits_dls, digits_net
from fasterai.distill.methods.exits import DeepSupervision, Exits
from classes import named
from helpers import Boom, data, learner, n_hooks, net, same, state


logits = torch.tensor([[[1.6905, -0.4659, 0.0328], [0.4075, -0.7889, 0.0021], [-0.0009, -1.7547, 1.0177],
                        [0.6005, -0.6254, -0.1715]],
                       [[0.0912, 1.0913, -1.947], [-1.3863, -2.2965, 2.4098], [1.7278, 2.2046, 0.7948],
                        [0.9764, -1.1834, 1.9164]],
                       [[3.2487, -1.2235, -1.0563], [-2.1459, 1.7308, -4.6031], [3.4896, -1.5224, 0.6381],
                        [-0.4987, 2.9242, -4.1203]]])
features = torch.tensor([[[0.0011, -0.2895, -1.1161, -0.0129, -0.3784], [-0.4811, -1.5173, -0.4909, -0.2407, -0.6479],
                          [0.6359, 1.7401, 0.2967, 0.7075, 1.8228], [0.4308, 1.5427, -0.9007, -0.1371, 1.2976]],
                         [[1.3316, 0.7153, -1.5454, -0.0084, 0.6213], [-0.7201, 0.2655, 0.1085, 0.0043, -0.1746],
                          [0.433, 1.203, -0.9651, 1.0283, 0.2286], [0.4451, -1.1366, 0.1351, 1.4845, -1.0798]],
                         [[1.7495, -0.2861, -0.4846, -2.6533, -0.0083], [-0.3196, -0.5366, 0.3154, 0.4211, -1.0656],
                          [-0.8862, -0.4757, 0.6897, 0.5612, -1.3055], [-1.1195, 0.7368, 1.5746, -0.0311, -0.6834]]])


class Says(nn.Module):
    "An exit that says what it was told to"
    def __init__(self, *said): super().__init__(); self.said = said
    def forward(self, x): return self.said


def test_the_exits_have_the_reference_s_value():
    y = torch.tensor([0, 2, 1, 1])
    loss = Exits(T=3, alpha=0.1, beta=1e-6, hint=True)
    loss.exits = nn.ModuleList(Says(*o) for o in zip(logits[:2], features[:2]))
    maps = dict(a=features[0], b=features[1], hint=features[2])
    whole = F.cross_entropy(logits[2], y)
    torch.testing.assert_close(0.9*whole+loss(logits[2], maps, y), torch.tensor(6.000637800542119))


def test_training_along():
    learn = learner(opt_func=Adam)
    ds = DeepSupervision(['0', '1'], hint='4:input')
    first = []
    class First(Boom):
        def __call__(self, name):
            if name=='before_step' and not first: first.append(deepcopy(ds.learned.state_dict()))
    plain = state(learn.model).keys()
    learn.fit(2, cbs=[ds, First('', None, order=20)])
    now = ds.learned.state_dict()
    moved = [k for k,v in first[0].items() if v.is_floating_point() and not torch.equal(v, now[k])]
    assert len(moved)==len([v for v in first[0].values() if v.is_floating_point()])
    assert state(learn.model).keys()==plain and not n_hooks(learn.model)
    assert len(learn.opt.all_params())==len(list(learn.model.parameters()))
    assert all(e.head.in_features==8 for e in ds.exits.values())


def test_no_weight_is_plain_training():
    a,b = learner(),learner()
    a.fit(2)
    b.fit(2, cbs=DeepSupervision('0', weight=0.))
    assert same(state(a.model), state(b.model))


def test_the_whole_network_learns_nothing_from_its_exits():
    torch.manual_seed(0)
    loss = Exits()
    maps = dict(a=torch.randn(4, 3, 5, 5, requires_grad=True))
    pred = torch.randn(4, 3, requires_grad=True)
    loss.build(maps, pred)
    loss(pred, maps, torch.tensor([0, 1, 2, 0])).backward()
    assert pred.grad is None and maps['a'].grad.any() and all(p.grad is not None for p in loss.parameters())


def test_the_student_s_random_stream_is_as_it_was():
    torch.manual_seed(0)
    Exits().build(dict(a=torch.ones(2, 3)), torch.ones(2, 3))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_validation_does_not_run_the_exits():
    learn,calls = learner(),[]
    ds = DeepSupervision(['0'])
    learn.fit(1, cbs=ds)
    ds.exits['0'].register_forward_hook(lambda *_: calls.append(learn.training))
    learn.fit(1, cbs=ds)
    assert calls==[True]*len(learn.dls.train)
    n = len(calls)
    learn.validate(cbs=ds)
    assert len(calls)==n


def test_nothing_is_left_behind():
    for event in 'after_pred', 'after_loss', 'before_step', 'before_validate':
        learn,ds = learner(),DeepSupervision(['0', '1'])
        with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[ds, Boom(event, KeyboardInterrupt(), at=0, order=20)])
        assert not n_hooks(learn.model) and not len(learn.metrics) and ds.session is None
        assert len(learn.opt.all_params())==len(list(learn.model.parameters()))
        assert all(p.grad is None for e in ds.exits.values() for p in e.parameters())


def test_lr_find_leaves_no_exits(tmp_path):
    ds = DeepSupervision(['0', '1'])
    learner(path=tmp_path, cbs=ds).lr_find(num_it=8, stop_div=False, show_plot=False)
    assert not ds.exits


def test_a_resumed_training_equals_an_uninterrupted_one():
    torch.manual_seed(0)
    learn = learner(cbs=DeepSupervision(['0', '1']))
    learn.fit(4)
    torch.manual_seed(0)
    other,first,second = learner(),DeepSupervision(['0', '1']),DeepSupervision(['0', '1'])
    other.fit(2, cbs=first)
    second.load_learned(deepcopy(first.learned.state_dict()))
    other.fit(2, cbs=second)
    for a,b in zip(state(learn.model).values(), state(other.model).values()): torch.testing.assert_close(a, b)


def accuracies_by_hand(learn, ds):
    "Of each exit and the whole, on all of the validation set in one batch"
    x,y = (torch.cat(o) for o in zip(*learn.dls.valid))
    maps,net = {},learn.model.eval()
    hooks = [getattr(net, k).register_forward_hook(lambda _,__,out,k=k: maps.update({k: out})) for k in ds.exits]
    with torch.no_grad(): said = {'whole': net(x)} | {k: leave.eval()(maps[k])[0] for k,leave in ds.exits.items()}
    for o in hooks: o.remove()
    return {k: (z.argmax(1)==y).sum().item()/len(y) for k,z in said.items()}


def test_accuracies_of_a_trained_network(tmp_path):
    torch.manual_seed(0)
    learn = Learner(digits_dls(300, n_valid=100), digits_net(8), CrossEntropyLossFlat(), path=tmp_path)
    ds = DeepSupervision(['0', '1'])
    with pytest.raises(ValueError, match='no exits yet'): ds.exit_accuracies(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(10, 5e-2, cbs=ds)
    before = state(learn.model),state(ds.learned)
    found = ds.exit_accuracies(learn)
    by_hand = accuracies_by_hand(learn, ds)
    assert list(found)==['0', '1', 'whole'] and found==by_hand and found['whole']>0.3
    assert same(before[0], state(learn.model)) and same(before[1], state(ds.learned))
    learn.add_cb(ds)
    learn.export('student.pkl')
    assert load_learner(tmp_path/'student.pkl').model(torch.zeros(1, 1, 8, 8)).shape==(1, 10)


def test_copies():
    learn,ds = learner(),DeepSupervision(['0', '1'], T=2, hint='4:input', start_pct=0.1)
    learn.fit(1, cbs=ds)
    copied = deepcopy(ds)
    assert copied.given==ds.given and copied.recipe.window==(0.1, 1.) and not copied.exits
    learn.fit(1, cbs=copied)
    assert copied.exits and pickle.loads(pickle.dumps(ds)).given==ds.given
    assert ds.replace(alpha=0.5).terms[0].base.alpha==0.5


def test_bad_arguments():
    with pytest.raises(ValueError, match='layers is empty'): DeepSupervision([])
    with pytest.raises(ValueError, match='share of the teacher'): DeepSupervision('0', alpha=1.5)
    for k in 'loss','teacher':
        with pytest.raises(TypeError, match=f'there is no {k}: give layers, T'):
            DeepSupervision('0').replace(**{k: 'DIST'})
    with pytest.raises(ValueError, match="unknown layer of the student '11'; did you mean '1"):
        learner().fit(1, cbs=DeepSupervision('11'))
    with pytest.raises(ValueError, match='its exits learn classes'):
        learner(net(), loss_func=nn.MSELoss()).fit(1, cbs=DeepSupervision('0'))


def test_exits_of_a_series_are_convolutions_over_its_positions():
    class Series(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv1d(3, 7, 3, padding=1),nn.Conv1d(7, 9, 3, padding=1)
            self.head = nn.Linear(9, 3)
        def forward(self, x): return self.head(self.b(self.a(x).relu()).relu().mean(2))
    def dls(length):
        ds = TensorDataset(torch.randn(16, 3, length), torch.arange(16)%3)
        return DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0)]*2, device='cpu')
    kd = DeepSupervision('a', width=5)
    learn = learner(Series(), dls(20), kd)
    learn.fit(1)
    assert kd.exits['a'].body[0].weight.shape==(5, 7, 3, 3)
    learn.dls = dls(12) # an average over positions does not mind how many there are
    learn.fit(1)
    found = kd.exit_accuracies(learn)
    x,y = learn.dls.train_ds.tensors
    learn.model.eval(), kd.exits['a'].eval()
    with torch.no_grad(): z = kd.exits['a'](learn.model.a(x).unsqueeze(-1))[0]
    assert found['a']==pytest.approx((z.argmax(1)==y).float().mean().item())


class SeveralTargets(nn.Module):
    def forward(self, p, y, *_): return F.cross_entropy(p, y)

@pytest.mark.parametrize('form', ['plain', 'column', 'soft'])
def test_accuracies_by_labels_in_a_column_or_soft_and_without_the_ignored(form):
    torch.manual_seed(0)
    y = torch.randint(3, (32,))
    if form!='soft': y[::4] = -100
    given = F.one_hot(y, 3).float() if form=='soft' else y.unsqueeze(1) if form=='column' else y
    kd = DeepSupervision(['0'])
    learn = learner(dls=data(y=given), loss_func=nn.CrossEntropyLoss() if form=='soft' else None)
    learn.fit(1, cbs=kd)
    x = learn.dls.valid_ds.tensors[0]
    learn.model.eval()
    with torch.no_grad(): want = (learn.model(x).argmax(1)==y)[y>=0].float().mean().item()
    found = kd.exit_accuracies(learn)
    assert found['whole']==pytest.approx(want) and 0<=found['0']<=1


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_students_of_other_precisions(dtype):
    dls = data()
    for dl in dls.loaders: dl.dataset.tensors = dl.dataset.tensors[0].to(dtype),dl.dataset.tensors[1]
    kd,learn = DeepSupervision(['0']),learner(net().to(dtype), dls)
    learn.fit(1, cbs=kd)
    assert all(0<=v<=1 for v in kd.exit_accuracies(learn).values())
    assert next(kd.exits['0'].parameters()).dtype==(torch.float64 if dtype==torch.float64 else torch.float32)


def test_of_several_targets_exits_know_none():
    ds = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16)%3, torch.arange(16)%3)
    ds.n_inp = 1
    dls = DataLoaders(*[TfmdDL(ds, bs=8, num_workers=0)]*2, device='cpu')
    kd = DeepSupervision(['0'])
    several = learner(dls=dls, loss_func=SeveralTargets())
    with pytest.raises(TypeError, match='one target.*got 2'): several.fit(1, cbs=kd)
    learner().fit(1, cbs=kd)
    with pytest.raises(TypeError, match='one target.*got 2'): kd.exit_accuracies(several)


def test_exits_of_a_head_that_has_grown_are_made_anew_and_learn():
    learn,ds = learner(net(c=3)),DeepSupervision(['0', '1'])
    learn.fit(1, cbs=ds)
    old = ds.exits['0']
    learn.fit(1, cbs=ds)
    assert ds.exits['0'] is old # which go on as long as the classes are the same
    learn.model[-1] = nn.Linear(8, 5)
    learn.opt = None
    before = []
    class Note(Callback):
        order = 90
        def after_loss(self):
            if not before: before.append(state(ds.learned))
    learn.fit(1, cbs=[ds, Note()])
    assert {o.head.out_features for o in ds.exits.values()}=={5}
    now = state(ds.learned)
    assert before and all(not torch.equal(v, now[k]) for k,v in before[0].items() if k.endswith('head.weight'))


def test_accuracies_are_by_data_of_the_same_classes_and_normalisation():
    learn,ds = learner(dls=named('abc', std=.5)),DeepSupervision('0')
    learn.fit(1, cbs=ds)
    assert ds.exit_accuracies(learn, named('abc', std=.5).valid)==ds.exit_accuracies(learn)
    for other in named('cab', std=.5),named('abc'):
        with pytest.raises(ValueError, match="dl: its .*the Learner's"): ds.exit_accuracies(learn, other.valid)


def test_classes_of_pixels_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    learn = learner(model, data(y=torch.zeros(32, 8, 8).long()), loss_func=CrossEntropyLossFlat(axis=1))
    with pytest.raises(ValueError, match=r'one class a sample.*logits are \(8, 3, 8, 8\), expected'):
        learn.fit(1, cbs=DeepSupervision(['0']))
