"The states of one training: files that hold code are refused, names, and copies of the network"
import pickle

import numpy as np
import pytest
import torch
from fastai.callback.schedule import lr_find
from fastai.callback.tracker import SaveModelCallback

from fasterai.distill.teacher.checkpoints import KeepEpochs, checkpoints
from helpers import data, learner, net, same, state


class StatesAfter(KeepEpochs):
    "For comparison: what `SaveModelCallback` sees"
    order = SaveModelCallback.order+1
    def after_train(self): pass
    def after_epoch(self): self.nets[self.epoch+1] = state(self.learn.model)


@pytest.mark.parametrize('with_opt', [False, True])
def test_files_of_fastai_s_callback(tmp_path, with_opt):
    learn,seen = learner(path=tmp_path),StatesAfter(1)
    learn.fit_one_cycle(11, cbs=[SaveModelCallback(every_epoch=True, fname='wide', with_opt=with_opt), seen])
    (tmp_path/'models'/'wide_best.pth').write_bytes(b'none of them')
    before = state(learn.model)
    nets = checkpoints(learn, 'wide')
    assert list(nets)==[f'epoch {n}' for n in range(1, 12)] # by number, not by letter
    for n,o in enumerate(nets.values(), 1):
        assert same(state(o), seen.nets[n]) and not o.training and not any(p.requires_grad for p in o.parameters())
    assert same(state(learn.model), before) and learn.model is not nets['epoch 11']
    assert list(checkpoints(learn, 'wide', [11, 2]))==['epoch 11', 'epoch 2']
    with pytest.raises(ValueError, match="epochs must be whole numbers from 1 on, got '2'"):
        checkpoints(learn, 'wide', '2')


def test_states_and_files_by_name(tmp_path):
    a,b = net(seed=1),net(seed=2)
    torch.save(b.state_dict(), tmp_path/'b.pth')
    nets = checkpoints(net(), {'a': a.state_dict(), 'b': tmp_path/'b.pth', 'c': a})
    assert [same(state(o), state(m)) for o,m in zip(nets.values(), (a, b, a))]==[True]*3
    with pytest.raises(ValueError, match='a is no state of this Sequential'): checkpoints(net(6), {'a': a.state_dict()})
    with pytest.raises(ValueError, match='needs the Learner'): checkpoints(net(), 'wide')


class Runs:
    def __reduce__(self): return print, ('this ran',)

def test_a_file_with_code_is_refused(tmp_path, capsys):
    torch.save(dict(a=Runs()), tmp_path/'bad.pth')
    with pytest.raises(pickle.UnpicklingError, match='[Ww]eights'): checkpoints(net(), {'a': tmp_path/'bad.pth'})
    assert 'this ran' not in capsys.readouterr().out


def test_epochs_to_keep_are_whole_numbers():
    assert KeepEpochs(*np.arange(1, 3)).epochs==[1, 2]
    for n in (0, True, 1.5):
        with pytest.raises(ValueError, match='epochs must be a whole number from 1 on'): KeepEpochs(n)
    with pytest.raises(ValueError, match='from 1 on, got none'): KeepEpochs()


def test_kept_epochs_are_copies():
    keep,seen = KeepEpochs(1, 3),StatesAfter(1)
    learn = learner(cbs=keep)
    learn.lr_find(num_it=5, show_plot=False, suggest_funcs=())
    assert not keep.nets
    learn.fit(3, cbs=seen)
    learn.validate()
    assert list(keep.nets)==['epoch 1', 'epoch 3']
    assert all(same(state(keep.nets[f'epoch {n}']), seen.nets[n]) for n in (1, 3))
