"""What the families of methods gained in their own studies, in one table: gains and losses alike.

    python benchmarks/overview.py

A selection: the arms of a study that stand for its methods, and the arm that they are compared with, are named here.
The families' pages have all arms: other settings of the same methods, controls, and bounds from above. Figures are
those of `benchmarks/results/family-*.csv`; the intervals are not adjusted for the number of rows."""
from dataclasses import dataclass

import pandas as pd

from families import runs
from fasterai.distill.study.summary import summary


@dataclass
class Compared:
    "The arms of a study that methods have trained"
    against:str            # The arm to compare with
    methods:list           # Arms
    metric:str = 'accuracy'

STUDIES = {
    'few_labels': Compared('alone, 100 labels', ['taught, 100 labels', 'taught, all photographs']),
    'tenth_of_labels': Compared('alone, a tenth of the labels',
                                ['taught, a tenth of the labels', 'taught, all photographs']),
    'photos': Compared('alone', ['embeddings, then a probe']),
    'embeddings': Compared('alone', ['Cosine', 'Affinity', 'Queue']),
    'text': Compared('labels of 208, as many steps', ['distilled, no labels, all 600']),
    'detection': Compared('alone', ['PKD'], 'map'),
    'dense': Compared('alone', ['SoftTarget', 'CWD', 'IFVD', 'CIRKD'], 'mean_iou'),
    'transformers': Compared('alone', ['token, soft', 'token, hard']),
    'following': Compared('alone', ['EMA()']),
    'peers': Compared('alone', ['two, T=3', 'four, T=3']),
    'several': Compared('alone', ['the first teacher', 'ConfidentTeachers', 'average of probabilities']),
    'generations': Compared('alone', ['generation 1', 'generation 3']),
    'assistants': Compared('straight', ['over 16', 'over 32, 16, 8']),
    'itself': Compared('alone', ['class', 'virtual', 'last_batch', 'past', 'deep supervision']),
    'views': Compared('alone', ['taught from 8x8', 'generalized, from 8x8', 'no labels, from 8x8']),
    'grey': Compared('alone', ['taught from colours', 'taught from grey']),
    'unlabelled': Compared('augmented', ['FixMatch .95', 'pseudo labels, soft', 'wide noisy student']),
    'which_teacher': Compared('epoch 60 of 60', ['epoch 8 of 60']),
    'refined': Compared('SoftTarget, misled teacher', ['DecoupledKD, misled teacher', 'RLD, misled teacher']),
    'robust': Compared('adversarial training', ['ARD', 'RSLAD', 'AdaAD'], 'robust'),
    'discriminator': Compared('SoftTarget', ['SoftTarget + hinge', 'SoftTarget + wgan']),
    'dream': Compared('uniform noise', ['dream', 'generator, fast']),
    'adapt': Compared('as it was', ['bn', 'tent', 'ema']),
    'continual': Compared('finetune', ['LwF, labels over the new', 'iCaRL']),
    'integers': Compared('full precision', ['int8, taught']),
    'search': Compared('hand-made', ['found']),
    'quantize-few': Compared('2 bits, trained on the labels', ['2 bits, taught on 1,197 unlabelled']),
    'integers-teacher': Compared('teacher in full precision', ['teacher of integers'])}


def span(gain, low, high): return '' if pd.isna(gain) else f'{100*gain:+.1f} ({100*low:+.1f} to {100*high:+.1f})'

def judged(low, high): return 'better' if low>0 else 'worse' if high<0 else 'not decided'

def rows_of(name):
    "The rows of one study, at its longest training"
    asked,found = STUDIES[name],runs(name)
    t = summary(found, asked.metric, asked.against)
    t = t[t.epochs.eq(found[found.arm.isin(asked.methods)].epochs.max())].set_index('arm')
    for arm in asked.methods:
        r = t.loc[arm]
        yield {'study':name, 'method':arm, 'against':asked.against, 'seeds':int(r.seeds),
               'points':span(r.gain, r.gain_low, r.gain_high), 'judged':judged(r.gain_low, r.gain_high),
               'at equal time':span(r.same_time, r.same_time_low, r.same_time_high)}

def overview():
    "A row for each method: points gained over the arm that it is compared with, with their 95 % intervals"
    return pd.DataFrame([r for name in STUDIES for r in rows_of(name)]).set_index(['study', 'method'])


if __name__=='__main__': print(overview().to_string())
