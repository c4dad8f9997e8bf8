"The small data sets: what is asked of them is checked by name"
import numpy as np
import pytest
from fastai.data.transforms import RandomSplitter
from PIL import Image

from fasterai.data.digits import digits_dls
from fasterai.data.images import _at_random, image_dls
from fasterai.data.scenes import digit_scenes


@pytest.mark.parametrize('n_valid', [0, -1, 1788, 1797, 10.])
def test_a_validation_of_none_or_of_too_many(n_valid):
    with pytest.raises(ValueError, match=f'n_valid must be a whole number from 1 to 1787, got {n_valid}'):
        digits_dls(10, n_valid=n_valid)

def test_a_training_of_too_many_or_without_a_batch():
    with pytest.raises(ValueError, match='n_train must be a whole number from 10 to 1197 with n_valid=600, got 1198'):
        digits_dls(1198)
    for args in (dict(n_train=20), dict(bs=0), dict(bs=8.)): # 20 images are less than a batch of 64
        with pytest.raises(ValueError, match='bs must be a whole number from 1 to (20|1197), .* got (64|0|8.0)'):
            digits_dls(**args)
    found = digits_dls(10, 10, n_valid=1787),digits_dls(1796-9, n_valid=10)
    assert [len(o) for o in (found[0].train_ds, found[0].train, found[1].valid_ds)]==[10, 1, 10]

@pytest.mark.parametrize('kwargs, said', [
    (dict(valid_pct=20), 'valid_pct must be a share of the images, from 0 to less than 1, got 20'),
    (dict(valid_pct=1.), 'valid_pct must be a share .* got 1'), (dict(valid_pct=float('nan')), 'valid_pct must be'),
    (dict(bs=0), 'bs must be a whole number from 1 on, got 0'),
    (dict(size=0), 'size must be a whole number from 1 on, got 0'),
    (dict(size=(8, 0)), 'size must be a whole number from 1 on, got 0')])
def test_numbers_of_a_folder_of_images(tmp_path, kwargs, said):
    "Looked at before the images are"
    with pytest.raises(ValueError, match=said): image_dls(tmp_path, **kwargs)

def _paint(path, *names):
    for name in names:
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path/name)

def _images(path, **kwargs): return image_dls(path, size=4, bs=2, num_workers=0, device='cpu', **kwargs)

def test_what_lies_beside_the_folders_of_the_classes_is_left_out_and_said(tmp_path, capsys):
    _paint(tmp_path/'one', *[f'{c}/{i}.png' for c in 'ab' for i in range(5)], 'cover.png')
    _paint(tmp_path/'two', *[f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in 'ab' for i in range(2)],
           'train/cover.png', 'more/a/0.png')
    for name,n in dict(one=(8, 2), two=(4, 4)).items():
        dls = _images(tmp_path/name)
        assert list(dls.vocab)==['a', 'b'] and (len(dls.train_ds), len(dls.valid_ds))==n
    said = capsys.readouterr().out
    assert said.count('left out 1 images beside the folders of the classes, such as')==2 and 'cover.png' in said
    assert 'left out 1 images that are neither in a training nor in a validation folder' in said

def test_folders_within_folders_say_which_are_the_classes(tmp_path, capsys):
    _paint(tmp_path, *[f'{a}/{i}.png' for a in ('a/x', 'a/y', 'b/x', 'b/y', 'c') for i in range(3)])
    assert list(_images(tmp_path).vocab)==['c', 'x', 'y']
    assert capsys.readouterr().out=='12 images lie in folders within folders, and the innermost is the class: x, y\n'

def test_a_rare_class_has_an_image_in_the_training(tmp_path, capsys):
    labels,moved = ['a']*4+['rare']*2+['b']*4,0
    for seed in range(40):
        (train,valid),(t,v) = (f(labels) for f in (_at_random(labels, .4, seed), RandomSplitter(.4, seed=seed)))
        known,all_of_rare = {labels[i] for i in train},{4, 5}<=set(v)
        assert known=={'a', 'b', 'rare'} and sorted([*train, *valid])==[*range(10)]
        assert (list(train), list(valid))==(list(t), list(v)) or all_of_rare and len(valid)==3
        moved += all_of_rare
    assert capsys.readouterr().out.count('the validation got all images of rare: one of each is kept')==moved>0
    _paint(tmp_path, *[f'{c}/{i}.png' for c in 'ab' for i in range(4)], 'rare/0.png')
    dls = _images(tmp_path, seed=2, valid_pct=.5)
    assert list(dls.vocab)==['a', 'b', 'rare'] and len([*dls.valid]) and 'all images of rare' in capsys.readouterr().out

def test_pictures_with_no_digits():
    with pytest.raises(ValueError, match='most must be 1 or more, got 0'): digit_scenes(1, most=0)
    assert len(digit_scenes(1, most=1)[0][1]['labels'])==1
