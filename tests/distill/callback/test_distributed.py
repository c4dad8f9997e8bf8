"Two processes on the CPU train as one does on the same batch: hooks, adapters, columns and memories included"
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')
close = dict(rtol=1e-4, atol=1e-6)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What each of two processes has found"
    here,path = Path(__file__).parent,tmp_path_factory.mktemp('two')
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
               PYTHONPATH=os.pathsep.join([*map(str, (here, *here.parents[1:4])), os.environ.get('PYTHONPATH', '')]))
    res = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                          str(here/'distributed_worker.py'), str(path)],
                         env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr[-3000:]
    return [torch.load(path/f'{rank}.pth') for rank in range(2)]


def test_two_processes_get_the_gradients_of_one(two):
    from distributed_worker import run
    one = run(16, False)
    for found in two:
        got = found['gradients']
        assert got['hooks']==0 and got['teacher_same'] and got['rows']==1 and got['names']==one['names']
        for who in ('student','adapter'):
            assert len(got[who])==len(one[who])==1
            for a,b in zip(got[who][0], one[who][0]): torch.testing.assert_close(a, b, **close)
        for k,v in one['weights'].items(): torch.testing.assert_close(got['weights'][k], v, **close)


def test_columns_are_those_of_all_processes_as_fastai_s_own_are(two):
    from distributed_worker import columns
    one = columns(10, False)
    a,b = (found['columns'] for found in two)
    assert a==b and a['names']==one['names'] # and both stopped after the same epoch
    assert 1<len(a['values'])==len(one['values'])<12
    for got,alone in zip(a['values'], one['values']):
        row,ours = (dict(zip(a['names'], o)) for o in (got, alone))
        assert row['valid_distill_loss']==pytest.approx(row['soft_target'], rel=1e-5)
        assert row['task']==pytest.approx(row['valid_loss'], rel=1e-5)
        assert row==pytest.approx(ours, rel=1e-4)


def test_each_process_knows_the_past_of_all(two):
    from distributed_worker import past
    one = past(18, False)
    assert one['seen'].all()
    for found in two:
        got = found['past']
        assert got['seen'].all() and torch.equal(got['said'], two[0]['past']['said'])
        torch.testing.assert_close(got['said'], one['said'], **close)
        for k,v in one['student'].items(): torch.testing.assert_close(got['student'][k], v, **close)
