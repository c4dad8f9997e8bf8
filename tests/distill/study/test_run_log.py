"The log of runs under any values and any damage: what was written comes back, and what was not is never made up"
import warnings

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
