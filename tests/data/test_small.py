"The small data sets: what is asked of them is checked by name"
import pytest

from fasterai.data.digits import digits_dls
from fasterai.data.scenes import digit_scenes


@pytest.mark.parametrize('n_valid', [0, -1, 1788, 1797])
def test_a_validation_of_none_or_of_too_many(n_valid):
    with pytest.raises(ValueError, match=f'n_valid must be 1 to 1787, got {n_valid}'): digits_dls(10, n_valid=n_valid)

def test_a_training_of_too_many():
    with pytest.raises(ValueError, match='n_train must be 10 to 1197 with n_valid=600, got 1198'): digits_dls(1198)
    assert [len(o) for o in (digits_dls(10, n_valid=1787).train_ds, digits_dls(1796-9, n_valid=10).valid_ds)]==[10, 10]

def test_pictures_with_no_digits():
    with pytest.raises(ValueError, match='most must be 1 or more, got 0'): digit_scenes(1, most=0)
    assert len(digit_scenes(1, most=1)[0][1]['labels'])==1
