"Two processes on the CPU train as one does on the same batches, a sharded teacher as a whole one; a death is named"
import os, re, subprocess, sys
from pathlib import Path

import pytest
import torch

from helpers import net, state

pytest.importorskip('accelerate')
close = dict(rtol=1e-4, atol=1e-6)


def start(path, n, *args):
    here = Path(__file__).parent
    paths = [*map(str, (here, *here.parents[1:3])), os.environ.get('PYTHONPATH', '')]
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', PYTHONPATH=os.pathsep.join(paths))
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), here/'rank.py']
    return subprocess.run([*cmd, path, *args], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What each of two processes has found"
    path = tmp_path_factory.mktemp('two')
    res = start(path, 2)
    assert res.returncode==0, res.stderr[-3000:]
    return [torch.load(path/f'{rank}.pth') for rank in range(2)]


def in_one(name):
    "The training in this process alone, with batches as large as those of two together"
    import trainings
    f = getattr(trainings, name)
    return f(2*trainings.batch_sizes[f], False)


def test_two_processes_get_the_gradients_of_one(two):
    one = in_one('gradients')
    for found in two:
        got = found['gradients']
        assert got['hooks']==0 and got['teacher_same'] and got['rows']==1 and got['names']==one['names']
        for who in ('student','adapter'):
            assert len(got[who])==len(one[who])==1
            for a,b in zip(got[who][0], one[who][0]): torch.testing.assert_close(a, b, **close)
        for k,v in one['weights'].items(): torch.testing.assert_close(got['weights'][k], v, **close)


def test_columns_are_those_of_all_processes_as_fastai_s_own_are(two):
    one = in_one('columns')
    a,b = (found['columns'] for found in two)
    assert a==b and a['names']==one['names'] # and both stopped after the same epoch
    assert 1<len(a['values'])==len(one['values'])<12
    for got,alone in zip(a['values'], one['values']):
        row,ours = (dict(zip(a['names'], o)) for o in (got, alone))
        assert row['valid_distill_loss']==pytest.approx(row['soft_target'], rel=1e-5)
        assert row['task']==pytest.approx(row['valid_loss'], rel=1e-5)
        assert row==pytest.approx(ours, rel=1e-4)


def test_each_process_knows_the_past_of_all(two):
    one = in_one('past')
    assert one['seen'].all()
    for found in two:
        got = found['past']
        assert got['seen'].all() and torch.equal(got['said'], two[0]['past']['said'])
        torch.testing.assert_close(got['said'], one['said'], **close)
        for k,v in one['student'].items(): torch.testing.assert_close(got['student'][k], v, **close)


def test_all_processes_have_the_average_of_one(two):
    one = in_one('average')
    for found in two:
        got = found['average']
        assert got['n']==one['n']==4 and [*got['average']]==[*one['average']]
        for k,v in one['average'].items(): torch.testing.assert_close(got['average'][k], v, **close)
        assert not torch.equal(got['average']['0.0.weight'], got['student']['0.0.weight'])


def test_all_processes_end_with_the_peers_of_one_whatever_they_were_in_the_second(two):
    nets,shown = in_one('peers')
    for found in two:
        got,values = found['peers']
        for a,b in zip(got, nets, strict=True):
            for k,v in b.items(): torch.testing.assert_close(a[k], v, **close)
        assert values[2:]==pytest.approx(shown[2:], rel=1e-4) # accuracy, losses, and the accuracy of the others


def check_shards(found):
    for o in found:
        assert o['as_before'] and o['share']<1.1/len(found)+.05
        for a,b in o['pairs'].values():
            for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-6, msg=k)
    assert len({o['asked'][1] for o in found})>1 # ranks had to ask about more and less
    return len(found[0]['pairs'])


def test_two_ranks_hold_a_half_each(two): assert check_shards([found['shards'] for found in two])==5


def test_three_ranks_hold_a_third_each_and_one_that_is_killed_is_named(tmp_path):
    res = start(tmp_path, 3, 'die')
    assert check_shards([torch.load(tmp_path/f'{rank}.pth')['shards'] for rank in range(3)])==2
    assert res.returncode!=0
    assert re.search(r'rank\s*: 2 ', res.stderr) and 'Signal 9 (SIGKILL) received' in res.stderr
    kept = torch.load(tmp_path/'kept_0.pth')
    assert kept.keys()==state(net()).keys() # the epoch before is there
