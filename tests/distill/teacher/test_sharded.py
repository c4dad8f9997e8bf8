"Two and three processes on the CPU: a sharded teacher teaches as a whole one, and a rank that dies is named"
import os, re, subprocess, sys
from pathlib import Path

import pytest
import torch

from helpers import net, state

pytest.importorskip('accelerate')


def start(path, n, *args):
    here = Path(__file__).parent
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
               PYTHONPATH=os.pathsep.join([*map(str, (here, *here.parents[1:4])), os.environ.get('PYTHONPATH', '')]))
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n),
                           str(here/'sharded_worker.py'), str(path), *args],
                          env=env, capture_output=True, text=True, timeout=300)


def check(path, n):
    found = [torch.load(path/f'{rank}.pth') for rank in range(n)]
    for o in found:
        assert o['as_before'] and o['share']<1.1/n+.05
        for a,b in o['pairs'].values():
            for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-6, msg=k)
    assert len({o['asked'][1] for o in found})>1 # ranks had to ask about more and less
    return found[0]['pairs'].keys()


def test_two_ranks_hold_a_half_each(tmp_path):
    res = start(tmp_path, 2)
    assert res.returncode==0, res.stderr[-3000:]
    assert len(check(tmp_path, 2))==5


def test_three_ranks_hold_a_third_each_and_one_that_is_killed_is_named(tmp_path):
    res = start(tmp_path, 3, 'die')
    assert len(check(tmp_path, 3))==2
    assert res.returncode!=0
    assert re.search(r'rank\s*: 2 ', res.stderr) and 'Signal 9 (SIGKILL) received' in res.stderr
    kept = torch.load(tmp_path/'kept_0.pth')
    assert kept.keys()==state(net()).keys() # the epoch before is there
