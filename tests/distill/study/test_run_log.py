"The log of runs under any values and any damage: what was written comes back, and what was not is never made up"
import warnings

import pytest
from hypothesis import given, settings, strategies as st

from fasterai.distill.study.run_log import RunLog

few = settings(deadline=None, derandomize=True, max_examples=60)
texts = st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=12)


def opened(path):
    "The rows of a log whose columns are a and b; None if it is refused"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return RunLog(path, ['a', 'b']).rows
        except ValueError as e:
            assert path.name in str(e)
            return None


@few
@given(rows=st.lists(st.tuples(texts, texts), max_size=5))
def test_any_text_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp('log')/'runs.csv'
    log = RunLog(path, ['a', 'b'])
    for a,b in rows: log.add(dict(a=a, b=b))
    assert opened(path)==log.rows==[dict(a=a, b=b) for a,b in rows]
    for a,b in rows: assert log.find(a=a, b=b)


@few
@given(at=st.integers(0, 60), damage=st.binary(max_size=6), cut=st.booleans())
def test_damage_never_makes_a_row_up(tmp_path_factory, at, damage, cut):
    path = tmp_path_factory.mktemp('log')/'runs.csv'
    log = RunLog(path, ['a', 'b'])
    for i in range(6): log.add(dict(a=i, b=f'value {i}'))
    raw = path.read_bytes()
    path.write_bytes(raw[:at] if cut else raw[:at]+damage+raw[at+len(damage):])
    rows = opened(path)
    if rows is None: return
    changed = [r for r in rows if r not in log.rows]
    assert len(rows)<=len(log.rows)+damage.count(b'\n') and (not cut or not changed)
    assert all(r.keys()=={'a', 'b'} for r in rows)
    again = RunLog(path, ['a', 'b'])
    again.add(dict(a='new', b='row'))
    assert opened(path)==[*rows, dict(a='new', b='row')]


@pytest.mark.parametrize('raw', [b'my only copy', b'{"a": 1, "b": 2}', b'a,b\r1,2\r', b'a,b\r1,2\r3,4', b'a,b\r',
                                 b'a,bc', b'a,b\n1,2\r3,4\r', b'a,b\n1,2\n3,4\r5,6'])
def test_a_file_of_somebody_else_stays(tmp_path, raw):
    path = tmp_path/'notes.txt'
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="notes.txt' is no run log"): RunLog(path, ['a', 'b'])
    assert path.read_bytes()==raw and [p.name for p in tmp_path.iterdir()]==['notes.txt']


@pytest.mark.parametrize('raw,rows', [(b'', 0), (b'\xef\xbb\xbfa,', 0), (b'a,b', 0), (b'a,b\n1,2\n3', 1),
                                      (b'a,b\r\n1,2\r\n3,4\r', 1)])
def test_a_log_that_was_cut_goes_on(tmp_path, raw, rows):
    path = tmp_path/'runs.csv'
    path.write_bytes(raw)
    RunLog(path, ['a', 'b']).add(dict(a=5, b=6))
    assert RunLog(path, ['a', 'b']).rows==[dict(a='1', b='2')]*rows+[dict(a='5', b='6')]


def test_numbers_that_are_none_and_cells_that_were_edited(tmp_path):
    log = RunLog(tmp_path/'r.csv', ['a', 'loss'])
    for a,loss in ((1, .5), (2, float('nan')), (3, float('inf')), (4, None)): log.add(dict(a=a, loss=loss))
    df = RunLog(tmp_path/'r.csv', ['a', 'loss']).frame()
    assert df.loss.dtype==float and df.loss[[0, 2]].tolist()==[.5, float('inf')]
    assert df.loss.isna().tolist()==[0, 1, 0, 1]
    log.rows[0]['loss'] = '0,5'
    with pytest.raises(ValueError, match="r.csv' has '0,5' for loss, expected a"): log.number(log.rows[0], 'loss')
    assert [log.number(r, 'loss') for r in log.rows[2:3]]==[float('inf')]


def test_whole_numbers_of_many_digits_stay_apart(tmp_path):
    log,seeds = RunLog(tmp_path/'r.csv', ['seed']),[1732000000000000001, 1732000000000000002]
    for s in seeds: log.add(dict(seed=s))
    again = RunLog(tmp_path/'r.csv', ['seed'])
    assert again.frame().seed.tolist()==seeds and again.find(seed=seeds[1])==again.rows[1]


@pytest.mark.parametrize('on_disk', [True, False])
def test_rows_bring_columns_and_none_is_lost(tmp_path, on_disk):
    path = tmp_path/'r.csv' if on_disk else None
    log,other = (RunLog(path, ['a', 'b'], more=True) for _ in range(2)) # two processes, as it were
    log.add(dict(a=1, b='x, y'))
    if on_disk: other.add(dict(a=2, b=2, n=7))
    log.add(dict(b=3, m=.5))
    log.add({'a':4, 5:'five'})
    if on_disk: other.add(dict(a=6, n=8))
    rows = [dict(a=1, b='x, y'), dict(a=2, b=2, n=7), dict(b=3, m=.5), {'a':4, '5':'five'}, dict(a=6, n=8)]
    cols = ['a', 'b', *['n'][:on_disk], 'm', '5']
    if not on_disk: del rows[1], rows[-1]
    found = RunLog(path, ['a', 'b'], more=True) if on_disk else log
    assert found.rows==[{c:str(r.get(c, '')) for c in cols} for r in rows] and found.cols==cols
    assert found.frame().m.sum()==.5 and log.find(a=1)['m']==''
    if not on_disk: return
    was = path.read_bytes()
    for cols,more in ((['a', 'c'], True), (['a', 'b'], False), (['a', 'b', 'm'], True)):
        with pytest.raises(ValueError, match='belongs to other runs'): RunLog(path, cols, more=more)
    assert path.read_bytes()==was and [p.name for p in tmp_path.iterdir()]==['r.csv']


def test_a_link_to_a_log_stays_a_link(tmp_path):
    real,path = tmp_path/'real.csv',tmp_path/'r.csv'
    RunLog(real, ['a']).add(dict(a=1))
    path.symlink_to(real)
    RunLog(path, ['a'], more=True).add(dict(a=2, b=3))
    assert path.is_symlink() and real.read_text()=='a,b\n1,\n2,3\n'
    plain = RunLog(tmp_path/'s.csv', ['a'])
    plain.add(dict(a=1, b=2)) # of named columns alone
    assert plain.path.read_text()=='a\n1\n'
