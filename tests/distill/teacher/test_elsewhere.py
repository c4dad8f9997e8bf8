"A teacher that is elsewhere teaches the same, and whatever ends its process is told and leaves nothing behind"
import multiprocessing, os, signal, subprocess, sys, textwrap, time
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from torch import nn

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import FitNet, SoftTarget
from fasterai.distill.teacher.elsewhere import Elsewhere
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.teacher import worker
from fasterai.distill.training.ask_ahead import AskAhead
from fasterai.distill.training.views import StudentSees
from helpers import Boom, data, learner, n_hooks, net, same, state
from teacher_nets import Breaks, ends

losses = {SoftTarget: 1, FitNet: .5}
to_maps = dict(activations_student='1', activations_teacher='1')


class Kill(Callback):
    "Kills the teacher's worker after the `at`th batch has been asked about"
    order = 101 # after AskAhead
    def __init__(self, teacher, at): self.teacher,self.at,self.pids,self.n = teacher,at,set(),0
    def before_batch(self):
        self.n += 1
        pid = self.teacher.nets[0].worker.process.pid
        self.pids.add(pid)
        if self.n==self.at: os.kill(pid, signal.SIGKILL)


def after_20_steps(teacher, cbs=(), **kwargs):
    torch.manual_seed(0) # of the adapter
    learn = learner(dls=data(n=40, bs=8), cbs=cbs)
    learn.fit(4, cbs=KD(teacher, losses, **to_maps, **kwargs))
    assert n_hooks(learn.model, *teacher.models)==0 and not learn._grab_cbs(AskAhead)
    return learn


@pytest.fixture(scope='module')
def local(): return after_20_steps(Teacher(net(8, seed=1)), valid=True)


def gone(pids):
    alive = {p.pid for p in multiprocessing.active_children()}
    return pids and not pids & alive and not any(os.path.exists(f'/proc/{p}') for p in pids)


def test_on_another_device_it_teaches_the_same(local):
    t = Teacher(net(8, seed=1), device='cpu')
    learn = after_20_steps(t, valid=True)
    assert same(state(learn.model), state(local.model)) and learn.recorder.values[-1][1:]==local.recorder.values[-1][1:]
    assert t.nets[0].begun is None


def test_in_a_killed_worker_it_teaches_the_same_to_the_last_bit(local):
    t = Teacher(net(8, seed=1), worker=True)
    kill = Kill(t, at=5)
    with pytest.warns(UserWarning, match=r'the worker of the teacher Sequential \(process \d+\) was ended by SIGKILL'):
        learn = after_20_steps(t, [kill], valid=True)
    assert same(state(learn.model), state(local.model)) and learn.recorder.values[-1][1:]==local.recorder.values[-1][1:]
    assert len(kill.pids)==2 and gone(kill.pids) and t.nets[0].worker is None


def test_an_error_in_the_worker_comes_with_its_traceback_and_leaves_nothing():
    t = Teacher(Breaks(), worker=True)
    kill = Kill(t, at=99)
    learn = learner(cbs=[kill])
    with pytest.raises(KeyError, match='the fourth batch') as e: learn.fit(1, cbs=KD(t))
    assert "in forward\n    if self.n>3: raise KeyError('the fourth batch')" in str(e.value.__cause__)
    assert gone(kill.pids) and not learn._grab_cbs(AskAhead) and n_hooks(learn.model)==0


def test_an_interrupted_fit_ends_the_worker():
    t = Teacher(net(8, seed=1), worker=True)
    kill = Kill(t, at=99)
    learn = learner(cbs=[kill, Boom('after_backward', KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=KD(t))
    assert gone(kill.pids) and t.nets[0].worker is None


def test_the_question_leaves_before_the_students_forward_and_is_put_once(monkeypatch):
    t = Teacher(net(8, seed=1), device='cpu')
    said = []
    ahead,call = Elsewhere.ahead,Elsewhere.start
    monkeypatch.setattr(Elsewhere, 'ahead', lambda self, *o, **k: (said.append('ahead'), ahead(self, *o, **k)))
    monkeypatch.setattr(Elsewhere, 'start', lambda self, *o, **k: (said.append('asked'), call(self, *o, **k))[1])
    class Says(Callback):
        def after_pred(self): said.append('student')
        def after_loss(self): said.append('loss')
    learner(cbs=[Says(), MixUp(), StudentSees(lambda x: x[:, :, 1:])]).fit(1, cbs=KD(t, valid=True))
    assert said[:3]==['student', 'loss', 'asked'] # the first answer is looked at
    assert said[3:]==['ahead', 'asked', 'student', 'loss']*7


def test_who_changes_the_batch_later_makes_it_another_question():
    class Later(Callback):
        order = 200
        def before_batch(self): self.learn.xb = (self.xb[0]*2,)
    here,there = learner(cbs=Later()),learner(cbs=Later())
    here.fit(1, cbs=KD(Teacher(net(8, seed=1))))
    there.fit(1, cbs=KD(Teacher(net(8, seed=1), device='cpu')))
    assert same(state(here.model), state(there.model))


def test_batches_without_an_answer_are_left_behind():
    from fastai.callback.core import CancelBatchException
    class Skips(Callback):
        def after_pred(self):
            if self.iter%3==1: raise CancelBatchException
    results = []
    for kw in {}, dict(device='cpu'):
        learn = learner(cbs=Skips())
        learn.fit(1, cbs=KD(Teacher([net(8, seed=1), net(6, seed=2)], **kw)))
        results.append(state(learn.model))
    assert same(*results)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match='device and worker and shard: a teacher is in one place'):
        Teacher(net(), device='cpu', worker=True, shard=True)
    with pytest.raises(ValueError, match="device='cuda:99': there is no such device here"):
        Teacher(net(), device='cuda:99')
    bad = net()
    bad.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='worker=True: the teacher Sequential cannot be sent to another process'):
        learner().fit(1, cbs=KD(Teacher(bad, worker=True)))


def test_a_worker_that_cannot_begin_says_why(monkeypatch):
    monkeypatch.setattr(worker, 'serve', ends)
    with pytest.raises(RuntimeError, match=r"code 7 .* must start its training under `if __name__=='__main__'"):
        worker.Worker(net())


def test_it_ends_with_the_students_process_and_a_class_of_the_prompt_is_refused():
    here = Path(__file__).parent
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
               PYTHONPATH=os.pathsep.join([*map(str, (here, *here.parents[1:4])), os.environ.get('PYTHONPATH', '')]))
    code = textwrap.dedent('''
        import os, signal
        from torch import nn
        from helpers import net
        from fasterai.distill.teacher.worker import Worker
        class Own(nn.Linear): pass
        try: Worker(Own(2, 2))
        except ValueError as e: print(e)
        print(Worker(net()).process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)''')
    killed = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    said = killed.stdout.split('\n')
    assert killed.returncode==-signal.SIGKILL, killed.stderr
    assert 'the teacher Own uses what was defined in a notebook or at the prompt' in said[0]
    end = time.monotonic()+10
    while os.path.exists(f'/proc/{said[1]}') and time.monotonic()<end: time.sleep(.05)
    assert not os.path.exists(f'/proc/{said[1]}')
