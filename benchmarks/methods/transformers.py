"""A tiny vision transformer with a distillation token, taught by a convolutional network, on the first 100 digits"""
from functools import partial

from timm.models.deit import VisionTransformerDistilled

from families import few100, full1197, study, trained
from fasterai.distill.loss.logits import HardTarget, SoftTarget
from fasterai.distill.methods.token import TokenDistillation


def tiny_deit():
    "Two blocks of width 48 on four patches of 4 x 4 pixels"
    return VisionTransformerDistilled(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=2,
                                      num_heads=4)

def student():
    learn = few100()
    learn.model,learn.lr = tiny_deit(),5e-3
    return learn

def run(epochs=240, seeds=5):
    teacher = trained(partial(full1197, width=32), 60)
    arms = {'alone': None,
            'token, hard': lambda: TokenDistillation(teacher, 'hard'),
            'token, soft': lambda: TokenDistillation(teacher, 'soft'),
            'both heads, hard': dict(teacher=teacher, loss=HardTarget, weight=0.5),
            'both heads, soft': dict(teacher=teacher, loss=partial(SoftTarget, T=3), weight=0.5)}
    study('transformers', student, arms).run(epochs, seeds, progress=False)
