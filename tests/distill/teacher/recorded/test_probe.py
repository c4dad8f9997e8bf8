"Is it the same teacher? What the probes notice, and what they let pass"
import pytest
import torch
from torch import nn

from fasterai.distill.teacher.recorded.probe import Probe, version_of
from fasterai.distill.teacher.recorded.recorded import TeacherCache
from fasterai.distill.teacher.teacher import Teacher as Frozen
from recording import BS, N, Blobs, Teacher, loaders, train


@pytest.fixture
def path(tmp_path): return tmp_path/'teacher.cache'


class Net(nn.Module):
    "A small net with something beside its weights"
    def __init__(self, scale=1., mean=0.):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.head = nn.Linear(108, 4)
        self.scale = scale
        self.register_buffer('mean', torch.tensor(mean), persistent=False)
    def forward(self, x): return self.head((x-self.mean).flatten(1))*self.scale

class Edited(Net):
    def forward(self, x): return super().forward(x).flip(1)

def hooked():
    net = Net()
    net.register_forward_hook(lambda m, args, out: out*2)
    return net

def nudged(name='weight', i=(0, 0)):
    "One weight is the next number that there is"
    net = Net()
    p = getattr(net.head, name).data
    p[i] = torch.nextafter(p[i], torch.tensor(9.))
    return net

class TwoHeads(nn.Module):
    def forward(self, x): return x.mean((2, 3)).repeat(1, 2)[:, :4],-x.mean((2, 3)).repeat(1, 2)[:, :4]


class TestAnotherTeacher:
    def run(self, path, teacher, dtype=torch.float32):
        cache = TeacherCache(path, dtype=dtype)
        train(loaders(), teacher, cache, n=1)
        return cache

    @pytest.mark.parametrize('make',
                             [lambda: Net(1.5), lambda: Net(mean=0.1), Edited, hooked, nudged,
                              lambda: nudged('bias', 0)])
    def test_is_noticed_by_what_it_says(self, path, make):
        self.run(path, Frozen(Net()))
        before = path.read_bytes()
        with pytest.raises(ValueError, match='another teacher, or other weights.*16 samples'):
            self.run(path, Frozen(make()))
        assert path.read_bytes()==before

    @pytest.mark.parametrize('kw', [dict(select=lambda o: o*2), dict(tfms=lambda x: x*1.01)])
    def test_what_is_around_it_counts(self, path, kw):
        self.run(path, Frozen(Net()))
        with pytest.raises(ValueError, match='another teacher'): self.run(path, Frozen(Net(), **kw))

    def test_another_head_does_not_take_the_stored_answers(self, path):
        self.run(path, Frozen(TwoHeads(), select=lambda o: o[0]))
        with pytest.raises(ValueError, match='another teacher'):
            self.run(path, Frozen(TwoHeads(), select=lambda o: o[1]))

    @pytest.mark.parametrize('make',
                             [Net, lambda: Net().to(memory_format=torch.channels_last), lambda: nn.Sequential(Net()),
                                      lambda: (n:=Net()).register_forward_hook(lambda *o: None) and n])
    def test_the_same_answers_are_the_same_teacher(self, path, make):
        self.run(path, Frozen(Net()))
        cache = self.run(path, Frozen(make()))
        assert (cache.asked, cache.hits)==(0, N)

    def test_half_precision_takes_what_it_cannot_tell_apart(self, path):
        self.run(path, Frozen(Net()), torch.float16)
        assert self.run(path, Frozen(nudged()), torch.float16).hits==N
        with pytest.raises(ValueError, match='another teacher'): self.run(path, Frozen(Net(1.003)), torch.float16)

    def test_a_teacher_that_is_not_the_same_twice(self, path):
        class Jitters(Teacher):
            def __call__(self, *xb, **kw):
                pred,fm = super().__call__(*xb, **kw)
                return pred*(1+1e-6*len(self.seen)),fm
        self.run(path, Jitters())
        assert self.run(path, Jitters()).hits==N

    def test_other_batches_of_the_same_teacher(self, path):
        self.run(path, Frozen(Net()))
        cache = TeacherCache(path, dtype=torch.float32)
        train(loaders(Blobs(), bs=24, shuffle=True, num_workers=0), Frozen(Net()), cache, n=1)
        assert (cache.asked, cache.hits)==(0, N)

    def test_other_threads_round_otherwise(self):
        x = torch.randn(8, 108)
        file = Probe.of((x,), x[:, :4], {})
        was = dict(probe={**file.about(), 'where':'elsewhere'})
        near,far = Probe.of((x,), x[:, :4]*(1+1e-6), {}),Probe.of((x,), x[:, :4]*(1+1e-3), {})
        assert near.misfit(was, file.block, torch.float32, lambda: near)==''
        assert 'another teacher' in far.misfit(was, file.block, torch.float32, lambda: far)
        assert 'another teacher' in near.misfit(dict(probe=file.about()), file.block, torch.float32, lambda: near)

    def test_maps_count(self, path):
        class Inside(Net):
            def forward(self, x): return self.head(x.flatten(1)*self.scale)/self.scale
        def run(net):
            cache = TeacherCache(path, maps=True, dtype=torch.float32)
            train(loaders(), Frozen(net), cache, n=1, layers=['head'])
            return cache
        run(Inside())
        assert run(Inside()).hits==N
        with pytest.raises(ValueError, match='another teacher'): run(Inside(2.))

    def test_one_sample_of_the_probe_counts(self):
        x = torch.randn(16, 5000)
        y = x.clone()
        y[7, 1] += 1e-7
        a,b = Probe.of((x,), x, {}),Probe.of((x,), y, {})
        assert [i for i in range(16) if a.answers[i]!=b.answers[i]]==[7]
        assert a.values[0].shape==(16, 2500) and len(a.block)==16*2500*4  # every second of 5000


def test_the_version_counts_changes_in_place():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    version = version_of(Frozen(net))
    before = version()
    net(torch.zeros(3, 2)); net.requires_grad_(False)
    assert version()==before
    for t in net[0].weight, net[1].running_var:
        t.detach().add_(1)
        assert version()!=before
        before = version()
    net.load_state_dict(net.state_dict())
    assert version()!=before
