"What several tests of the callback share"
from functools import partial

import torch
from fastai.callback.fp16 import MixedPrecision

from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import *
from helpers import net


KD = KnowledgeDistillationCallback


teacher = partial(net, width=8, seed=1)


layers = dict(activations_student=['0','1'], activations_teacher=['0','1'])


class CPUMixedPrecision(MixedPrecision):
    "fastai's own is for CUDA; autocast works on the CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.amp.autocast('cpu', dtype=torch.bfloat16)
