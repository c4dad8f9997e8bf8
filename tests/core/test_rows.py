"Data sets are told from others by their items, whatever these are made of"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import TensorImage
from fastcore.foundation import L
from PIL import Image
from torch.utils.data import TensorDataset

from fasterai.core.rows import digest_of, fingerprint


class Rows:
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return torch.tensor(float(i))


def picture(i): return Image.fromarray(np.full((2, 2), i, np.int32))

@pytest.mark.parametrize('make', [
    lambda i: f'{i}.png', lambda i: (f'{i}.png', 0), lambda i: ('a.png', i), lambda i: {'file': i},
    lambda i: dict(x=torch.tensor([i])), lambda i: [np.array([i])], lambda i: np.array([i, 'a'], object),
    lambda i: TensorImage(torch.full((2, 2), i)), lambda i: L('a', i), picture, lambda i: (picture(i), 1),
    lambda i: torch.tensor(float(i), dtype=torch.bfloat16), lambda i: b'%d' % i])
def test_one_item_that_is_another_or_in_another_place(make):
    def known(order): return fingerprint(Rows([make(i) for i in order])).tolist()
    order = list(range(300))
    assert known(order)==known(order)
    assert len({*map(tuple, (known(order), known([1, 0, *order[2:]]), known([*order[:-1], 7]), known(order[:-1])))})==4


def test_a_list_is_its_own_items_and_a_table_has_rows():
    frames = [pd.DataFrame(dict(a=[1, 2, 3], b=['x', 'y', z])) for z in 'zzw']
    a,b,c = (fingerprint(Rows(o)).tolist() for o in frames)
    assert a==b!=c
    assert fingerprint([('a', 1), ('b', 2)]).tolist()!=fingerprint([('a', 1), ('b', 3)]).tolist()


def test_items_do_not_run_into_each_other():
    assert digest_of(['ab', 'c']).digest()!=digest_of(['a', 'bc']).digest()


def test_every_label_of_many_rows_counts():
    x,y = torch.zeros(5000, 2),torch.zeros(5000, dtype=torch.long)
    other = y.clone()
    other[4321] = 1
    assert fingerprint(TensorDataset(x, y)).tolist()!=fingerprint(TensorDataset(x, other)).tolist()


def test_what_says_nothing_counts_by_its_number():
    a,b,c = (fingerprint(Rows([object() for _ in range(n)])).tolist() for n in (3, 3, 4))
    assert a==b!=c


def test_what_cannot_be_told_is_left_out():
    loop = ['a']
    loop.append(loop)
    odd = ['a\udce9.png', torch.eye(2).to_sparse(), torch.empty(2, device='meta'), np.ma.masked, loop,
           torch.nn.parameter.UninitializedParameter()]
    for o in odd:
        assert fingerprint(Rows([o, 'b'])).tolist()==fingerprint(Rows([o, 'b'])).tolist()
        assert fingerprint(Rows([o, 'b'])).tolist()!=fingerprint(Rows([o, 'c'])).tolist()
