"The project's own promises: generated files are up to date, and imports point downward"
import ast, filecmp, re, shutil, subprocess, sys
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


floors = [
    {'core.names', 'core.run_log', 'core.stats', 'core.plots', 'core.seeds', 'core.digits', 'core.images', 'distill.train_along', 'distill.cache'},
    {'core.schedule', 'core.archs', 'distill.loss_log', 'distill.terms', 'distill.features', 'distill.adapters', 'distill.losses_base'},
    {'distill.losses_logits', 'distill.losses_features', 'distill.losses_relational', 'distill.matching', 'distill.teacher', 'distill.measure', 'distill.learned_losses'},
    {'distill.losses', 'distill.pictures'},
    {'distill.distillation_callback', 'distill.report'},
    {'distill.experiment', 'distill.sweep', 'distill.advice'},
    {'distill.all', 'distill.cli'},
]
floor_of = {m:i for i,ms in enumerate(floors) for m in ms}


def _imports(f):
    "Modules of ours that a file imports"
    here = f.relative_to(root/'fasterai').with_suffix('').parts
    for n in ast.walk(ast.parse(f.read_text())):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('fasterai')):
            base = list(here[:len(here)-n.level]) if n.level else []
            mod = base + [p for p in (n.module or '').split('.') if p and p!='fasterai']
            for a in n.names:
                name = '.'.join(mod)
                yield name if name in floor_of else f'{name}.{a.name}'


def test_no_module_imports_upward():
    seen = 0
    for f in (root/'fasterai').glob('*/*.py'):
        me = '.'.join(f.relative_to(root/'fasterai').with_suffix('').parts)
        if f.name=='__init__.py': continue
        assert me in floor_of, f'{me} has no floor yet'
        for other in _imports(f):
            seen += 1
            assert floor_of[other]<floor_of[me], f'{me} imports {other}'
    assert seen>20


def test_the_number_of_losses_on_the_pages_is_the_code_s():
    from fasterai.distill import learned_losses, losses
    n = len(losses.available_losses()) + sum(o in learned_losses.__all__ for o in ('VID', 'CRD', 'ReviewKD', 'OFD'))
    for f in ('README.md', 'nbs/comparison.md'): assert f'losses, as each counts them | {n} |' in (root/f).read_text(), (f, n)


def test_library_star_imports_nothing_of_fastai_vision():
    for f in (root/'fasterai').glob('*/*.py'): assert not re.search(r'from fastai\.\S+ import \*', f.read_text()), f
