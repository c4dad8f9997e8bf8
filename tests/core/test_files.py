"Files that are whole, and may be read by whom the umask allows to"
import os
import stat

import pytest

from fasterai.core.files import read_json, whole_file, write_json
from fasterai.distill.study.run_log import RunLog
from fasterai.distill.teacher.recorded.store import create

pytestmark = pytest.mark.skipif(os.name!='posix', reason='rights of POSIX')


@pytest.fixture(params=[0o077, 0o027, 0o022])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)

def _log(path): RunLog(path, ['a']).add(dict(a=1))
def _bytes(path):
    with whole_file(path) as f: f.write(b'1')

makers = dict(whole_file=_bytes, json=lambda path: write_json(path, dict(a=1)), log=_log,
              store=lambda path: create(path, dict(rows=1), b'', 8))

@pytest.mark.parametrize('make', makers)
def test_the_umask_says_who_may_read(tmp_path, umask, make):
    file = tmp_path/'new'/'file.csv'
    makers[make](file)
    assert oct(stat.S_IMODE(file.stat().st_mode))==oct(0o666 & ~umask)
    assert [o.name for o in file.parent.iterdir()]==['file.csv']

def test_json_there_and_back(tmp_path):
    values = dict(classes=['é', 'b'], n=1.5, none=None)
    for how in {}, dict(indent=None), dict(ensure_ascii=False):
        write_json(tmp_path/'values.json', values, **how)
        assert read_json(tmp_path/'values.json')==values
    assert 'é' in (tmp_path/'values.json').read_text(encoding='utf-8')
