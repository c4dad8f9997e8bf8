"Two processes train student and peers as one does on the same batch, whatever the peers were in the second process"
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')


def test_two_processes_end_with_the_networks_of_one(tmp_path):
    here = Path(__file__).parent
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
               PYTHONPATH=os.pathsep.join([*map(str, (here, *here.parents[1:4])), os.environ.get('PYTHONPATH', '')]))
    res = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                          str(here/'mutual_worker.py'), str(tmp_path)],
                         env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr[-3000:]
    from mutual_worker import run
    nets,shown = run(16, False)
    for rank in range(2):
        got,values = torch.load(tmp_path/f'{rank}.pth')
        for a,b in zip(got, nets, strict=True):
            for k,v in b.items(): torch.testing.assert_close(a[k], v, rtol=1e-4, atol=1e-6)
        assert values[2:]==pytest.approx(shown[2:], rel=1e-4) # accuracy, losses, and the accuracy of the others
