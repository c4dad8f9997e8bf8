"The catalogue: complete, true to docstrings and results, and what reads it by name"
import re
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from torch import nn

from fasterai.distill import losses as L
from fasterai.distill.loss import learned
from fasterai.distill.loss.catalogue import GENERAL, KINDS, catalogue, loss_by_name
from fasterai.distill.loss.terms import Term, as_terms
from fasterai.distill.losses import *

results = Path(__file__).parents[3]/'benchmarks'/'results'


def test_every_loss_has_an_entry():
    of_stacks = {'ConfidentTeachers', 'DeepMutualLearning'} # which ask for the answers of several networks
    functions = {n for n in L.__all__ if n[0].isupper()} - of_stacks
    modules = {n for n in learned.__all__ if n!='LearnedLoss'} | {'Queue', 'HiddenStates', 'ViTKD'}
    assert set(catalogue)==functions | modules and len(functions)==39 and len(modules)==7
    assert [o.name for o in catalogue.values() if o.kind!='learned']==[o for o in L.__all__ if o in functions]
    assert available_losses()==[o.name for o in catalogue.values() if o.kind in GENERAL]
    assert set(available_losses('learned'))==modules
    assert [len(available_losses(k)) for k in KINDS]==[12, 3, 7, 6, 3, 4, 4, 7]


@pytest.mark.parametrize('info', catalogue.values(), ids=lambda o: o.name)
def test_entries(info):
    doc = ' '.join(info.loss.__doc__.split())
    if info.arxiv: assert info.paper in doc and info.venue in doc and f"arXiv {info.arxiv}" in doc
    else: assert 'arXiv' not in doc
    assert info.weight>0 and info.task_weight>0 and info.kind in KINDS
    assert set(info.needs)=={p for p in Term(info.make()).required}
    recipe = recipe_of(info.name)
    assert set(recipe)=={'loss', 'weight', 'task_weight'} and (recipe['weight'],
                                                               recipe['task_weight'])==(info.weight, info.task_weight)
    assert isinstance(recipe['loss'], nn.Module)==(info.kind=='learned')
    if info.kind!='learned':
        term = Term(recipe['loss'])   # refuses misspelt hyper-parameters
        assert {k: term.hypers[k] for k in info.hypers}==info.hypers


def test_what_was_measured():
    rows = pd.concat(map(pd.read_csv, results.glob('accuracy-*.csv')))
    run = {(loss, setting) for loss,setting in zip(rows.loss, rows.setting) if loss in catalogue}
    assert {(o.name, setting) for o in catalogue.values() for setting in o.measured}==run


def test_published_recipes():
    "As the benchmark ran them, where that does not depend on the networks"
    want = dict(SoftTarget=(0.9, 0.1, dict(T=4)), Logits=(1, 1, {}), Mutual=(1, 1, {}), Attention=(1000, 1, {}),
                FitNet=(100, 1, {}), Similarity=(3000, 1, {}),
                HardTarget=(0.5, 0.5, {}), RLD=(1, 1, dict(T=4, beta=8, T_alpha=1)),
                Embedding=(2000, 1, {}), DIST=(2, 1, dict(T=4)), TTM=(45, 1, dict(gamma=0.1)), BinaryKD=(10, 1, {}),
                Ranking=(0.1, 1, {}), ChannelStats=(0.08, 1, {}),
                NST=(50, 1, {}), RKDDistance=(25, 1, {}), RKDAngle=(50, 1, {}), PKT=(30000, 1, {}),
                CC=(100, 1, dict(gamma=0.4, P=2)))
    for name, (weight, task_weight, hypers) in want.items():
        o = catalogue[name]
        assert (o.weight, o.task_weight, o.hypers)==(weight, task_weight, hypers), name
    assert [o.name for o in catalogue.values() if o.source is None]==['BinaryKD', 'Ranking', 'ActivationBoundaries']


def test_the_page_of_theory_has_all_of_them():
    page = (Path(__file__).parents[3]/'nbs'/'tutorials'/'theory.md').read_text(encoding='utf-8')
    listed = page[page.index('## What of it is here'):page.index('## What is not here')]
    assert [o for o in catalogue if f'`{o}`' not in listed and f"`'{o}'`" not in listed]==[]


def test_patterns_and_kinds():
    assert available_losses(like='*KD')==['DecoupledKD', 'NKD', 'BinaryKD', 'RKD']
    assert available_losses(like='*kd')==available_losses(like='*KD') and available_losses(like='?')==[]
    assert available_losses('learned', 'review*')==['ReviewKD']
    assert available_losses('embedding')==['Cosine', 'Embedding', 'Affinity']
    with pytest.raises(ValueError, match="unknown kind 'maps'; did you mean 'map'"): available_losses('maps')


def test_the_catalogue_cannot_be_changed():
    with pytest.raises(TypeError): catalogue['New'] = catalogue['CRD']
    with pytest.raises(AttributeError): catalogue['CRD'].weight = 1


def test_a_learned_loss_is_new_each_time():
    a, b = (recipe_of('OFD')['loss'] for _ in range(2))
    assert a is not b and a.scale==1e-3


def test_names_in_terms():
    terms = as_terms({'SoftTarget': 0.9, 'Attention': 1000, partial(DIST, T=2): 1, 'VID': 2})
    assert [(o.name, o.weight) for o in terms]==[('SoftTarget', 0.9), ('Attention', 1000), ('DIST', 1), ('VID', 2)]
    assert terms[0].hypers['T']==4 and isinstance(terms[3].base, learned.VID)
    assert [o.name for o in as_terms(['RKD', 'RKD', RKD])]==['RKD', 'RKD_2', 'RKD_3']
    assert as_terms('PKT')[0].base is PKT and as_terms('PKT')[0].weight==1
    for bad in ('Atention', ['Atention'], {'Atention': 1}):
        with pytest.raises(ValueError, match="unknown loss 'Atention'; did you mean 'Attention'"): as_terms(bad)


def test_loss_by_name():
    assert loss_by_name('DIST') is DIST and loss_by_name('DIST', 3).keywords==dict(T=3)
    assert isinstance(loss_by_name('CRD'), learned.CRD)
    for name in ('Attention', 'CRD', 'VID'):
        with pytest.raises(ValueError, match=f"loss {name} has no temperature: leave out T"): loss_by_name(name, 2)
    with pytest.raises(ValueError, match="did you mean 'ReviewKD'"): loss_by_name('reviewkd')
    assert all(re.fullmatch(r'\d{4}\.\d{4,5}', o.arxiv) for o in catalogue.values() if o.arxiv)


def test_the_weights_of_a_term_and_of_a_dict_are_multiplied():
    first,second = Term(SoftTarget, 0.5),Term(Logits)
    terms = as_terms({first: 5., second: 3, 'Attention': 2})
    assert [o.weight for o in terms]==[2.5, 3, 2] and (first.weight, second.weight)==(0.5, 1)
    assert [o.base for o in terms[:2]]==[SoftTarget, Logits] and as_terms([first])[0] is first
