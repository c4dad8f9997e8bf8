"The trial takes the fastest format that is safe, and no copy where nothing is faster"
import pytest
import torch
from torch import nn

from fasterai.distill.teacher import auto
from fasterai.distill.teacher.forward import Plan
from fasterai.distill.teacher.teacher import Teacher
from teacher_nets import net, plain, seed, x


def fake_clock(monkeypatch, fast):
    "A clock for which the formats in `fast` take half the time"
    def time(f, device): return 0.5 if (f.args[2].dtype, f.args[2].channels_last) in fast else 1.
    monkeypatch.setattr(auto, 'best_time', time)

@pytest.mark.parametrize('dtype,cl',
                         [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False),
                          (torch.bfloat16, True)])
def test_auto_takes_the_fastest(net, x, monkeypatch, capsys, dtype, cl):
    fake_clock(monkeypatch, [(dtype, cl)])
    teacher = Teacher(net, dtype='auto')
    teacher(x); teacher(x)
    assert teacher.nets[0].plan==Plan(dtype, cl, True)
    said = capsys.readouterr().out
    assert said.count('\n')==1
    assert str(dtype)[6:] in said and ('channels_last' in said)==cl
    assert '5 BatchNorms folded' in said and 'as it is 1000.0 ms' in said

def test_auto_takes_no_copy_where_nothing_is_faster(net, x, monkeypatch, capsys):
    fake_clock(monkeypatch, [])
    teacher = Teacher(net, dtype='auto')
    assert torch.equal(teacher(x)[0], plain(net, x)) and teacher.nets[0].net is net
    assert 'nothing safe is faster' in capsys.readouterr().out and 'as it is' in repr(teacher)

def test_auto_refuses_what_is_fast_and_wrong(x, monkeypatch):
    class Fine(nn.Module):
        "What it says is in what bf16 rounds away"
        def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(3, 8, 3),nn.Linear(8, 5)
        def forward(self, x):
            z = self.conv(x).mean((2, 3))
            return self.head(1000+z) - self.head(1000+0*z)
    fake_clock(monkeypatch, [(torch.bfloat16, c) for c in (False, True)])
    teacher = Teacher(Fine(), dtype='auto')
    teacher(x)
    assert teacher.nets[0].plan.dtype is None

def test_auto_skips_what_the_device_lacks(net, x, monkeypatch):
    fake_clock(monkeypatch, [(torch.bfloat16, True), (torch.float32, True)])
    net[8] = NoHalf()
    teacher = Teacher(net, dtype='auto')
    teacher(x)
    assert teacher.nets[0].plan==Plan(torch.float32, True, True)

class NoHalf(nn.Module):
    "Stands for a kernel that a device lacks"
    def forward(self, x):
        if torch.is_autocast_enabled('cpu'): raise RuntimeError("\"op_cpu\" not implemented for 'BFloat16'")
        return x

def test_a_dtype_that_the_device_lacks(net, x):
    net[8] = NoHalf()
    with pytest.raises(ValueError, match="dtype=bfloat16: cpu cannot run the teacher Sequential.*dtype='auto'"):
        Teacher(net, dtype='bf16')(x)
