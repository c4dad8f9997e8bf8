"The project's own promises: generated files are up to date, imports point downward, and the name is not another's"
import ast, configparser, filecmp, importlib.util, json, re, shutil, subprocess, sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

root = Path(__file__).parent.parent


def _run(*cmd, cwd):
    cmd = [str(Path(sys.executable).parent/cmd[0]), *cmd[1:]]
    return subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, check=True)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project, exported and cleaned anew"
    to = tmp_path_factory.mktemp('copy')/'fasterai'
    left_out = '.git','.venv','__pycache__','*.egg-info','demo','_docs','models','.hypothesis'
    shutil.copytree(root, to, ignore=shutil.ignore_patterns(*left_out))
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
floors = ['core', 'data', 'distill.layers', 'distill.loss', 'distill.losses', 'distill.teacher', 'distill.training',
          'distill.distillation_callback', 'distill.study', 'distill.methods', 'distill.ship',
          'distill.command',
          'distill.cli', 'distill.all']


def _modules():
    for f in (root/'fasterai').rglob('*.py'):
        if f.name in ('__init__.py', '_modidx.py'): continue
        yield '.'.join(f.relative_to(root/'fasterai').with_suffix('').parts),f


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
    from fasterai.distill.losses import catalogue
    n = len(catalogue)
    for f in ('README.md', 'nbs/comparison.md'):
        assert f'losses, as each counts them | {n} |' in (root/f).read_text(), (f, n)


def test_library_star_imports_nothing_of_fastai_vision():
    for f in (root/'fasterai').rglob('*.py'): assert not re.search(r'from fastai\.\S+ import \*', f.read_text()), f


# The name: PyPI's `fasterai` is another project

def _settings():
    ini = configparser.ConfigParser(delimiters='=')
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def test_one_name_for_the_distribution_and_none_for_a_place_that_is_not_ours():
    assert _settings()['lib_name']=='fasterai-distill'
    assert 'name = "fasterai-distill"' in (root/'pyproject.toml').read_text()
    text = [f for pat in ('*.py', '*.md', '*.toml', '*.ini', '*.ipynb') for f in root.rglob(pat)
            if not {'.venv', '.git', '_docs', '_proc', 'build', 'demo'} & set(f.relative_to(root).parts)]
    ours = re.compile(r'fasterai-labs(?!/fasterai/blob/[0-9a-f]{40}/)', re.I)  # what was read there has its commit
    assert len(text)>80
    for f in text:
        if f!=Path(__file__): assert not ours.search(f.read_text(encoding='utf-8')), f


@pytest.fixture
def site_packages(tmp_path):
    "A folder of installed packages with our `fasterai` in it, and a way to import it from there"
    (tmp_path/'fasterai').mkdir()
    shutil.copy(root/'fasterai'/'__init__.py', tmp_path/'fasterai')
    def installed(name, *files):
        (tmp_path/f'{name}.dist-info').mkdir()
        (tmp_path/f'{name}.dist-info'/'RECORD').write_text(''.join(f'{f},sha256=0,1\n' for f in files))
    def load():
        spec = importlib.util.spec_from_file_location('fasterai_copy', tmp_path/'fasterai'/'__init__.py')
        m = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(m)
        return m
    return installed,load


def test_importing_refuses_to_run_among_the_other_project_s_files(site_packages):
    installed,load = site_packages
    installed('fasterai_distill-0.1.0', 'fasterai/__init__.py', 'fasterai/distill/all.py')
    assert load().__version__
    installed('fasterai-0.4.1', 'fasterai/__init__.py', 'fasterai/sparse/all.py', 'fasterai/core/criteria.py')
    said = "'fasterai-0.4.1', another project.*pip uninstall fasterai fasterai-distill"
    with pytest.raises(ImportError, match=said): load()


def test_importing_runs_beside_an_editable_install_of_that_name(site_packages):
    installed,load = site_packages
    installed('fasterai-0.1.0', '__editable__.fasterai-0.1.0.pth', 'fasterai-0.1.0.dist-info/METADATA')
    m = load()
    assert m.__version__ and not [n for n in vars(m) if 'mixed' in n]


def test_no_notebook_stores_warnings_or_paths_of_a_machine():
    for f in (root/'nbs').rglob('*.ipynb'):
        outputs = [o for c in json.loads(f.read_text())['cells'] for o in c.get('outputs', ())]
        assert not [o for o in outputs if o.get('name')=='stderr'], f
        for o in outputs: o.get('data', {}).pop('image/png', None)  # whose letters may spell anything
        assert not re.search(r'site-packages|/tmp/|/root/|/home/', json.dumps(outputs)), f
