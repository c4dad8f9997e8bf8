"Assistants between a teacher of width 64 and a student of width 4 that has 100 digits"
from functools import partial
from tempfile import TemporaryDirectory

from families import few100, full1197, results, trained
from fasterai.distill.losses import SoftTarget
from fasterai.distill.methods.assistants import assistants
from fasterai.distill.study.run_log import RunLog

chains = [[8], [16], [32], [32, 16, 8]] # widths of the assistants
arms = {'student, straight from the teacher': 'straight', 'student, alone': 'alone'}
cols = ['arm', 'seed', 'epochs', 'valid_loss', 'accuracy', 'seconds']
kd = dict(loss=partial(SoftTarget, T=4), weight=.9)


def run():
    "Run what is missing; the chains of a seed share its controls"
    log = RunLog(results/'family-assistants.csv', cols)
    seeds = [s for s in range(5) if not log.find(arm=_name(chains[-1]), seed=s)]
    if not seeds: return
    teacher = trained(partial(full1197, 64), 60)
    for seed in seeds:
        with TemporaryDirectory() as path: # where a later chain finds the controls of the first
            for widths in chains: _add(log, seed, widths, teacher, path)

def _name(widths): return f"over {', '.join(map(str, widths))}"

def _add(log, seed, widths, teacher, path):
    found = assistants(few100, [*widths, 4], teacher, 120, seed=seed, path=path, progress=False, **kd)
    names = {**arms, 'student': _name(widths)}
    links = found.table.seconds[found.table.network.isin([*found.links])].sum()
    for row in found.table.to_dict('records'):
        arm = names.get(row['network'])
        if arm is None or log.find(arm=arm, seed=seed): continue
        if row['network']=='student': row['seconds'] = links # its assistants' trainings are a part of it
        log.add({**row, 'arm': arm, 'seed': seed, 'epochs': 120})
