"""Detection: digits pasted on noise, and a student that learns from the feature pyramid of a larger detector, by `PKD`.

Both are torchvision's FCOS on a small backbone, written in `fasterai.data.scenes`. The teacher has 16 times as many
weights in its backbone, and has seen 480 scenes, the student 120. Judged by the mean average precision on 150 scenes
with digits that neither has seen. The authors' weight is 6; their detectors train for hundreds of times as many steps.

    pip install torchmetrics pycocotools
    python benchmarks/families.py --names detection"""
from functools import cache, partial

from fastai.optimizer import Adam
from fastai.torch_core import set_seed

from families import study
from fasterai.core.seeds import same_start
from fasterai.data.scenes import digit_scenes, scenes_detector
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.dense import PKD
from fasterai.distill.methods.detection import detection_dls, detector_learner
from fasterai.distill.study.one_run import fit_one_cycle, quiet

levels = [f'backbone.fpn[{i}]' for i in range(4)]


@cache
def scenes(n, seed, valid=False): return digit_scenes(n, seed=seed, valid=valid)

def learner(width, n, seed=0, bs=8):
    "A detector of digits, with AdamW"
    dls = detection_dls(scenes(n, seed), scenes(150, 1, valid=True), bs=bs, val_bs=50)
    return detector_learner(dls, scenes_detector(width), opt_func=partial(Adam, decouple_wd=True), lr=1e-2, wd=1e-2)

def student(): return learner(6, 120)

@cache
def teacher():
    "A detector of four times the width, trained on more scenes"
    set_seed(0)
    learn = learner(24, 480, seed=2, bs=16)
    same_start(learn.dls, 0)
    with quiet(learn): fit_one_cycle(learn, 14)
    return learn

def taught(weight):
    "What makes a callback that adds `weight` times `PKD` of the pyramids to the detector's own losses"
    return lambda: KnowledgeDistillationCallback(teacher(), PKD, levels, levels, weight=weight, task_weight=1.)


def run():
    arms = {'alone': None, 'PKD': taught(6.), 'PKD, weight 1': taught(1.)}
    found = study('detection', student, arms).run(10, seeds=5)
    return found.run([10, 15], seeds=5, arms=['alone'])
