"The project's own promises: generated files are up to date, and imports point downward"
import ast, filecmp, re, shutil, subprocess, sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

root = Path(__file__).parent.parent


def _run(*cmd, cwd): return subprocess.run([str(Path(sys.executable).parent/cmd[0]), *cmd[1:]], cwd=cwd, capture_output=True, text=True, check=True)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project, exported and cleaned anew"
    to = tmp_path_factory.mktemp('copy')/'fasterai'
    shutil.copytree(root, to, ignore=shutil.ignore_patterns('.git', '.venv', '__pycache__', '*.egg-info', 'demo', '_docs', 'models', '.hypothesis'))
    shutil.rmtree(to/'fasterai'/'core')
    _run('nbdev-export', cwd=to)
    _run('nbdev-clean', cwd=to)
    return to


def test_export_and_clean_leave_no_diff(copy):
    files = [f.relative_to(root) for d in ('fasterai','nbs') for f in (root/d).rglob('*')
             if f.suffix in ('.py','.ipynb') and '.ipynb_checkpoints' not in f.parts and '__pycache__' not in f.parts]
    same, *differ = filecmp.cmpfiles(root, copy, files, shallow=False)
    assert len(same)>20 and not any(differ), differ


def test_readme_is_the_index(copy):
    md = _run('python', '-m', 'nbconvert', '--config', 'docs/readme.py', cwd=copy).stdout
    assert md == (root/'README.md').read_text()


# From the ground up: a folder imports from those before it and from itself, in no circle
floors = ['core', 'data', 'distill.layers', 'distill.loss', 'distill.losses', 'distill.teacher', 'distill.training', 'distill.distillation_callback',
          'distill.study', 'distill.cli', 'distill.all']


def _modules():
    for f in (root/'fasterai').rglob('*.py'):
        if f.name not in ('__init__.py', '_modidx.py'): yield '.'.join(f.relative_to(root/'fasterai').with_suffix('').parts),f


def _floor(m):
    found = [i for i,o in enumerate(floors) if m==o or m.startswith(f'{o}.')]
    assert found, f'{m} has no floor yet'
    return found[0]


def _imports(me, f, known):
    "Modules of ours that a file imports"
    for n in ast.walk(ast.parse(f.read_text())):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('fasterai')):
            base = me.split('.')[:-n.level] if n.level else []
            mod = '.'.join(base + [p for p in (n.module or '').split('.') if p and p!='fasterai'])
            for a in n.names: yield mod if mod in known else f'{mod}.{a.name}' if mod else a.name


def test_no_module_imports_upward():
    known = dict(_modules())
    graph = {me: set(_imports(me, f, known)) & known.keys() for me,f in known.items()}
    for me,others in graph.items():
        for o in others: assert _floor(o)<=_floor(me), f'{me} imports {o}'
    list(TopologicalSorter(graph).static_order()) # raises CycleError for a circle
    assert sum(map(len, graph.values()))>40


def test_the_number_of_losses_on_the_pages_is_the_code_s():
    from fasterai.distill import losses
    from fasterai.distill.loss import learned
    n = len(losses.available_losses()) + sum(o in learned.__all__ for o in ('VID', 'CRD', 'ReviewKD', 'OFD'))
    for f in ('README.md', 'nbs/comparison.md'): assert f'losses, as each counts them | {n} |' in (root/f).read_text(), (f, n)


def test_library_star_imports_nothing_of_fastai_vision():
    for f in (root/'fasterai').rglob('*.py'): assert not re.search(r'from fastai\.\S+ import \*', f.read_text()), f
