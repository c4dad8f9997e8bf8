"What runs on the device gives what `learn.predict` gives, and needs neither PyTorch nor fastai nor this library"
import io, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.vision.augment import CropPad, RandomResizedCrop, Resize, aug_transforms
from fastai.vision.core import PILImageBW
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize, RandomSplitter, get_image_files, parent_label
from fastai.losses import BCEWithLogitsLossFlat
from fastai.vision.data import ImageBlock, ImageDataLoaders
from PIL import Image
from torch import nn

pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
from fasterai.data.images import image_dls
from fasterai.distill.ship.describe import describe
from fasterai.distill.ship.export import export_student
from fasterai.distill.ship.predictor import Predictor, description_of, prepare
from classes import named
from helpers import data, learner
from ship_helpers import quiet_learner, save_digits, small_net


@pytest.fixture(scope='module')
def pictures(tmp_path_factory): return save_digits(tmp_path_factory.mktemp('pictures')/'digits')


def as_learn_predicts(learn, file, tol=1e-4):
    "On every validation picture: the class, its number, and the probabilities to `tol`"
    predict = Predictor(file)
    items = list(learn.dls.valid_ds.items)
    for item,(label,index,probs) in zip(items, predict.batch(items, bs=7)):
        want = learn.predict(item)
        assert (label, index)==(str(want[0]), int(want[1]))
        assert np.abs(probs-want[2].numpy()).max()<tol
    assert len(items)>=10
    return predict


def test_equals_learn_predict_on_every_validation_picture(pictures, tmp_path):
    learn = quiet_learner(image_dls(pictures, size=16, bs=8, augment=True, num_workers=0), small_net())
    predict = as_learn_predicts(learn, export_student(learn, tmp_path/'s.onnx'))
    item = learn.dls.valid_ds.items[0]
    by_file = predict(item)
    assert by_file[0]==predict(str(item))[0] and predict.batch([item])[0][0]==by_file[0]
    eight_bits = Image.fromarray(np.zeros((30, 22), np.uint8))
    assert np.array_equal(predict(eight_bits)[2], predict(np.asarray(eight_bits))[2])


def test_grey_pictures(pictures, tmp_path):
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=RandomSplitter(seed=1), item_tfms=Resize(12, 'squish'),
                      batch_tfms=Normalize.from_stats([.3], [.2]))
    dls = block.dataloaders(pictures, bs=8, num_workers=0)
    learn = quiet_learner(dls, small_net(1))
    as_learn_predicts(learn, export_student(learn, tmp_path/'s.onnx'))


def test_a_learner_without_resize(tmp_path):
    folder = save_digits(tmp_path/'same', size=(14, 12))
    learn = quiet_learner(ImageDataLoaders.from_folder(folder, valid_pct=.3, seed=2, bs=8, num_workers=0), small_net())
    predict = as_learn_predicts(learn, export_student(learn, tmp_path/'s.onnx'))
    with pytest.raises(ValueError, match=r'\(3, 12, 14\).*does not resize them so, got \(3, 20, 20\)'):
        predict(Image.new('RGB', (20, 20)))


@pytest.mark.parametrize('item_tfms, batch_tfms', [
    (Resize((12, 18)), None), (Resize(12, 'pad'), None), (Resize(15, 'pad', 'zeros'), None),
    (RandomResizedCrop(12), None), ([Resize(20), CropPad(12)], None), (Resize(20), aug_transforms(size=11)),
    (Resize(40), aug_transforms(size=(9, 12))), (Resize(16), aug_transforms())], ids=str)
def test_pictures_are_prepared_as_in_the_batch(pictures, item_tfms, batch_tfms):
    dls = ImageDataLoaders.from_folder(pictures, valid_pct=.3, seed=3, bs=8, num_workers=0, item_tfms=item_tfms,
                                       batch_tfms=batch_tfms)
    dls.train.one_batch() # which leaves its random state in transforms that both sides share
    how = describe(quiet_learner(dls, small_net()))['input']
    x = dls.test_dl(list(dls.valid_ds.items)).one_batch()[0].numpy()
    for item,want in zip(dls.valid_ds.items, x): assert np.abs(prepare(item, how)-want).max()<1e-4


@pytest.mark.parametrize('batch', [None, 1, 3])
def test_numbers_for_names_a_half_for_a_threshold_and_batches_of_one_size(tmp_path, batch):
    "Of tensors, with PyTorch's own losses"
    y = torch.randint(0, 2, (32, 3)).float()
    for loss_func,labels in ((nn.CrossEntropyLoss(), None), (nn.BCEWithLogitsLoss(), y)):
        learn = learner(dls=data(y=labels), loss_func=loss_func)
        predict = Predictor(export_student(learn, tmp_path/'s.onnx', batch=batch))
        x = torch.rand(5, 3, 8, 8)
        with torch.no_grad(): z = learn.model.eval()(x)
        found,alone = predict.batch(list(x.numpy()), bs=4),predict(x[4].numpy())
        probs = z.softmax(1) if labels is None else z.sigmoid()
        assert np.abs(np.stack([p for *_,p in [*found, alone]])-probs[[0, 1, 2, 3, 4, 4]].numpy()).max()<1e-5
        if labels is None: assert [o[:2] for o in found]==[(int(i), int(i)) for i in z.argmax(1)]
        else: assert [o[0] for o in found]==[[i for i in range(3) if o[i]>.5] for o in probs]
        said = predict.description
        assert said['classes'] is None and said['output']['threshold']==(None if labels is None else .5)


def test_one_logit_says_which_of_two_classes(tmp_path):
    dls = named(['cat', 'dog'])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    file = export_student(learner(model, dls, loss_func=BCEWithLogitsLossFlat()), tmp_path/'s.onnx')
    x = dls.valid_ds[0][0]
    p = model(x[None]).sigmoid().item()
    label,i,probs = Predictor(file)(x.numpy())
    assert (label, i)==(['cat', 'dog'][p>.5], int(p>.5)) and probs[0]==pytest.approx(p, abs=1e-5)
    with torch.no_grad(): model[1].weight.neg_(), model[1].bias.neg_()
    file = export_student(learner(model, dls, loss_func=BCEWithLogitsLossFlat()), tmp_path/'t.onnx')
    assert Predictor(file)(x.numpy())[0]==['cat', 'dog'][p<.5]


@pytest.fixture(scope='module')
def device(pictures, tmp_path_factory):
    "A folder with the file, the module and a picture, and what the student says of it"
    import fasterai.distill.ship.predictor as module
    to = tmp_path_factory.mktemp('device')
    learn = quiet_learner(image_dls(pictures, size=16, bs=8, num_workers=0), small_net())
    export_student(learn, to/'student.onnx')
    (to/'student.json').unlink() # the file says it too
    shutil.copy(module.__file__, to/'predictor.py')
    item = learn.dls.valid_ds.items[0]
    shutil.copy(item, to/'picture.png')
    return to,learn.predict(item)


blocked = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names}: raise ImportError('not on this device: '+name)
sys.meta_path.insert(0, Refuse())
from {module} import Predictor
label,index,probs = Predictor('student.onnx')('picture.png')
print(label, index, *probs)
"""


@pytest.mark.parametrize('module, names', [
    ('fasterai.distill.ship.predictor', ['torch', 'fastai', 'fastcore', 'onnx', 'scipy', 'pandas', 'matplotlib']),
    ('predictor', ['torch', 'fastai', 'fastcore', 'fasterai', 'onnx', 'scipy', 'pandas', 'matplotlib'])])
def test_runs_where_there_is_no_pytorch(device, module, names):
    folder,want = device
    code = blocked.format(names=names, module=module)
    run = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert run.returncode==0, run.stderr
    label,index,*probs = run.stdout.split()
    assert (label, int(index))==(str(want[0]), int(want[1]))
    assert np.allclose(np.array(probs, float), want[2].numpy(), atol=1e-4)


def test_without_onnxruntime_the_error_names_the_remedy(device, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r"pip install onnxruntime, or.*fasterai-distill\[export\]"):
        Predictor(device[0]/'student.onnx')


def test_a_file_that_is_not_whole(device, tmp_path):
    data = (device[0]/'student.onnx').read_bytes()
    (tmp_path/'half.onnx').write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match='half.onnx.*is it a whole ONNX file'): Predictor(tmp_path/'half.onnx')


@pytest.mark.parametrize('image, words', [
    (None, 'got NoneType'), (torch.zeros(3, 16, 16), 'got Tensor'), (np.zeros((16, 16), np.int64), 'got int64'),
    (np.full((3, 16, 16), 200.), 'expected floats from 0 to 1, got 200 to 200')])
def test_what_is_no_picture(device, image, words):
    with pytest.raises(ValueError, match=words): Predictor(device[0]/'student.onnx')(image)


def test_a_description_that_was_cut(tmp_path):
    (tmp_path/'s.json').write_text('{"inp')
    session = SimpleNamespace(get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={}))
    with pytest.raises(ValueError, match="s.json' is cut"): description_of(session, tmp_path/'s.onnx')


def test_whatever_pillow_opens(device):
    predictor,file = Predictor(device[0]/'student.onnx'),device[0]/'picture.png'
    want = predictor(file)[2]
    with open(file, 'rb') as f:
        for image in str(file), f, io.BytesIO(file.read_bytes()):
            np.testing.assert_array_equal(predictor(image)[2], want)
    assert np.isfinite(predictor(np.full((3, 16, 16), 1.1))[2]).all() # what interpolates overshoots a little


@pytest.mark.parametrize('kind', ['16 bits', 'floats'])
def test_deep_pictures_are_seen_alike_wherever_they_come_from(pictures, tmp_path, kind):
    learn = quiet_learner(image_dls(pictures, size=16, bs=8, num_workers=0), small_net())
    a = np.linspace(0, 1, 400).reshape(20, 20)
    a = (a-.01).astype(np.float32) if kind=='floats' else (65535*a).astype(np.uint16)
    Image.fromarray(a).save(tmp_path/'deep.tif')
    how = describe(learn)['input']
    want = learn.dls.test_dl([tmp_path/'deep.tif'], num_workers=0).one_batch()[0][0]
    assert want.std()>.3
    given = [tmp_path/'deep.tif', Image.open(tmp_path/'deep.tif'), *([] if kind=='floats' else [a])]
    for o in given: np.testing.assert_allclose(prepare(o, how), want, atol=1e-6)
    with pytest.raises(ValueError, match='got uint8'): prepare(np.zeros((0, 0, 3), np.uint8), how)
