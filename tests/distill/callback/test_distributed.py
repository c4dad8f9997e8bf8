"Two processes on the CPU train as one does on the same batch: hooks, adapters and several losses included"
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')


def test_two_processes_get_the_gradients_of_one(tmp_path):
    here = Path(__file__).parent
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
               PYTHONPATH=os.pathsep.join([*map(str, (here, *here.parents[1:4])), os.environ.get('PYTHONPATH', '')]))
    res = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                          str(here/'distributed_worker.py'), str(tmp_path)],
                         env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr[-3000:]
    from distributed_worker import run
    one = run(16, False)
    for rank in range(2):
        got = torch.load(tmp_path/f'{rank}.pth')
        assert got['hooks']==0 and got['teacher_same'] and got['rows']==1 and got['names']==one['names']
        for who in ('student','adapter'):
            assert len(got[who])==len(one[who])==1
            for a,b in zip(got[who][0], one[who][0]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for k,v in one['weights'].items(): torch.testing.assert_close(got['weights'][k], v, rtol=1e-4, atol=1e-6)
