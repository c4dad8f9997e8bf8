"The small data sets: what is asked of them is checked by name"
import pytest

from fasterai.data.digits import digits_dls
from fasterai.data.images import image_dls
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

def test_pictures_with_no_digits():
    with pytest.raises(ValueError, match='most must be 1 or more, got 0'): digit_scenes(1, most=0)
    assert len(digit_scenes(1, most=1)[0][1]['labels'])==1
