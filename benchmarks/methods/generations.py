"Born-again networks: three generations of the digits' student, their ensemble, and as many networks trained alone"
from families import few100, full1197, results
from fasterai.distill.methods.generations import born_again
from fasterai.distill.study.run_log import RunLog

benches = [(few100, 120), (full1197, 20)] # with the length of their trainings
arms = {'4 alone, their mean': 'alone'}   # names of the table that are others in the log
cols = ['arm', 'seed', 'epochs', 'valid_loss', 'accuracy', 'seconds']


def run():
    "Run what is missing; a seed is a whole sequence"
    log = RunLog(results/'family-generations.csv', cols)
    for seed in range(5):
        for make_learner,epochs in benches:
            if log.find(arm='ensemble of 4 alone', seed=seed, epochs=epochs): continue
            table = born_again(make_learner, 3, epochs, seed=seed, progress=False).table
            for row in table.rename(columns=dict(network='arm')).to_dict('records'):
                log.add({**row, 'arm': arms.get(row['arm'], row['arm']), 'seed': seed, 'epochs': epochs})
