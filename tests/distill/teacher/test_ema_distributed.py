"Two processes on the CPU have one average, that of one process with the same batches"
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')


def test_two_processes_have_the_average_of_one(tmp_path):
    here = Path(__file__).parent
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
               PYTHONPATH=os.pathsep.join([*map(str, (here, *here.parents[1:4])), os.environ.get('PYTHONPATH', '')]))
    res = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                          str(here/'ema_worker.py'), str(tmp_path)],
                         env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr[-3000:]
    from ema_worker import run
    one = run(16, False)
    for rank in range(2):
        got = torch.load(tmp_path/f'{rank}.pth')
        assert got['n']==one['n']==4 and [*got['average']]==[*one['average']]
        for k,v in one['average'].items(): torch.testing.assert_close(got['average'][k], v, rtol=1e-4, atol=1e-6)
        assert not torch.equal(got['average']['0.weight'], got['student']['0.weight'])
