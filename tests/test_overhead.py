"The benchmark of a step's cost: its variants run, and what they are compared with is what they should be"
import math, sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
sys.path.append(str(root/'benchmarks'))
import overhead


def _rows(pair, names):
    bench = overhead.make_bench(pair, steps=2)
    found = overhead.measure(bench, [overhead.FLOOR, *names], 1)
    return {n: overhead.row(bench, n, v, found.get('plain student')) for n,v in found.items()}


def test_every_variant_takes_its_steps():
    names = [o for o in overhead.variants(overhead.make_bench('toy', steps=2)) if 'compiled' not in o]
    rows = _rows('toy', names)
    assert set(rows)=={*names, overhead.FLOOR}
    for name,r in rows.items():
        assert r['step_ms']>0 and r['samples_per_s']==pytest.approx(64/(r['step_ms']/1e3)), name
        assert r['rounds']==1 and (r['ratio']>0 or math.isnan(r['ratio'])), name


def test_the_pair_of_a_gpu_trains_two_steps(monkeypatch):
    "On the CPU here, with small pictures"
    monkeypatch.setitem(overhead.pairs, 'small', overhead.pairs['cuda'] | dict(bs=2, shape=(3, 64, 64), amp=False))
    names = ['plain student', 'Attention, 4 stages']
    rows = _rows('small', names)
    assert set(rows)=={*names, overhead.FLOOR} and all(r['step_ms']>0 for r in rows.values())
