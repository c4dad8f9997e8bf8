"""Ten photographs, of which one has a label: as `few_labels`, with ten times its labels

    python benchmarks/families.py --names tenth_of_labels  # in a folder with data/imagenette2sq_96

The teacher's new head is trained on the 950 labels. Each step of each training has 60 photographs; where those without
a label are mixed in, a third is labelled. What the teacher says is kept in `models/`, and asked for once."""
from functools import cache, partial
from pathlib import Path

import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from families import study
from fasterai.data.unlabelled import mix_unlabelled
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import SoftTarget
from fasterai.distill.study.one_run import fit_one_cycle, quiet
from fasterai.distill.teacher.pretrained import body_and_head
from fasterai.distill.teacher.recorded.recorded import Replay
from fasterai.distill.teacher.teacher import Teacher, resize_batch
from fasterai.distill.training.views import StudentSees
from methods.few_labels import folder, photographs, size, steps, student, train, way
from methods.photos import Photos, pictures
from photographs import lite0

n_each,rows,ratio = 95,60,2 # labelled of each class, photographs in a step, unlabelled ones for each labelled one


@cache
def unlabelled():
    "The photographs of the training set that have no label here"
    x,y = pictures(folder/'train')
    return Photos(torch.cat([x[y==c][n_each:] for c in range(10)]))

@cache
def network():
    "EfficientNet-Lite0 with a new head; this is trained on the labelled photographs, and BatchNorms follow them"
    set_seed(0)
    larger = StudentSees(partial(resize_batch, size=size))
    learn = Learner(photographs(n_each, rows), lite0(10), CrossEntropyLossFlat(), metrics=accuracy, cbs=larger,
                    splitter=body_and_head, lr=1e-2, train_bn=False)
    learn.freeze()
    with quiet(learn): fit_one_cycle(learn, 4)
    print(f'teacher: {learn.validate()[1]:.1%}', flush=True)
    return learn.model.eval()

@cache
def teacher(name, views):
    "Each view of a photograph is asked about once, for all seeds"
    Path('models').mkdir(exist_ok=True)
    return Teacher(network(), size=size, channels_last=True, cache=Replay(views, path=Path(f'models/tenth-{name}')))


def alone(learn, epochs):
    learn.dls = photographs(n_each, rows)
    train(learn)

def learn_from(learn, asked):
    train(learn, KnowledgeDistillationCallback(asked, partial(SoftTarget, T=1), weight=0.9))

def taught(learn, epochs):
    learn.dls = photographs(n_each, rows)
    learn_from(learn, teacher('labelled', 8))

def taught_on_all(learn, epochs):
    learn.dls = mix_unlabelled(photographs(n_each, rows//(ratio+1)), unlabelled(), ratio)
    learn_from(learn, teacher('all', steps//len(learn.dls.train)))

def fit(learn, epochs, way): way(learn, epochs)

def run():
    arms = {'alone, a tenth of the labels': way(alone), 'taught, a tenth of the labels': way(taught),
            'taught, all photographs': way(taught_on_all)}
    found = study('tenth_of_labels', student, arms, fit=fit, baseline='alone, a tenth of the labels')
    return found.run(steps//5, seeds=5)
