"What several tests of the callback share"
from functools import partial

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import *
from helpers import net


KD = KnowledgeDistillationCallback
teacher = partial(net, width=8, seed=1)
layers = dict(activations_student=['0','1'], activations_teacher=['0','1'])
