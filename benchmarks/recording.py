"""A recording by several processes that are killed at random: how fast, in how much memory, and is anything lost?

    python benchmarks/recording.py                              1,000,000 rows, 4 processes, 20 kills
    python benchmarks/recording.py --rows 5000 --kills 3 --out -

The teacher is a matrix and the samples are made of their numbers, so that the time is that of the recording alone, and
every answer can be computed again in the end. A process is killed by SIGKILL up to a second after it began to write,
and started again. The figures are written to `results/recording.json`.
"""
import argparse, json, os, random, resource, signal, tempfile, time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import TfmdDL

from fasterai.distill.teacher.recorded.codec import Codec
from fasterai.distill.teacher.recorded.record import record
from fasterai.distill.teacher.recorded.shards import WHOLE, Manifest, Shards, pieces_of
from fasterai.distill.teacher.recorded.signature import signature
from fasterai.distill.teacher.recorded.upkeep import check_recording

RESULTS = Path(__file__).parent/'results'
WIDTH,CLASSES,BS = 8,10,256

class Numbers:
    "Sample i is made of the number i"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return i

def inputs(rows):
    i = torch.as_tensor(rows, dtype=torch.float64)[:, None]
    return torch.frac(i*torch.linspace(0.1, 0.9, WIDTH, dtype=torch.float64).sqrt()).float()

class Matrix:
    "A teacher that costs next to nothing"
    def __init__(self): self.weight = torch.linspace(-3, 3, WIDTH*CLASSES).sin().reshape(WIDTH, CLASSES)
    def __call__(self, x, layers=(), logits=True): return x.as_subclass(torch.Tensor)@self.weight, {}

def loader(n):
    "Batches out of numbers at once, so that no time is the data set's"
    return TfmdDL(Numbers(n), bs=BS, num_workers=0, device='cpu', create_batch=lambda rows: (inputs(rows),),
                  n_inp=1)

def work(log, path, n, part, parts):
    "One process, which writes what it says to an open file"
    os.dup2(log, 1)
    os.dup2(log, 2)
    start = _peak_mb()
    report = record(Matrix(), loader(n), path, part=(part, parts))
    print(json.dumps(dict(asked=report.asked, seconds=report.seconds, start_mb=start, peak_mb=_peak_mb())), flush=True)

def _peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10


class Process:
    "One that records, and can be killed; a fork, so that no time is the imports'"
    def __init__(self, path, n, part, parts):
        self.args = path,n,part,parts
        self.start()

    def start(self):
        self.log = tempfile.TemporaryFile('w+')
        self.run = get_context('fork').Process(target=work, args=(self.log.fileno(), *self.args))
        self.run.start()

    def said(self): return os.pread(self.log.fileno(), 1<<20, 0).decode()

    def writes(self): return 'Recording into' in self.said() and self.run.is_alive()

    def kill(self):
        "SIGKILL, and another one; False if it had ended before"
        self.run.kill()
        self.run.join()
        killed = self.run.exitcode==-signal.SIGKILL
        if killed: self.start()
        return killed

    def result(self):
        self.run.join()
        if self.run.exitcode: raise RuntimeError(self.said()[-3000:])
        return json.loads(self.said().splitlines()[-1])

def run(path, n, jobs, kills, seed=0):
    "Results of the processes, how many were killed, and the seconds from the first start to the last end"
    rng,start,killed = random.Random(seed),time.time(),0
    processes = [Process(path, n, i, jobs) for i in range(jobs)]
    while killed<kills and any(p.run.is_alive() for p in processes):
        writing = [p for p in processes if p.writes()]
        if not writing:
            time.sleep(0.02)
            continue
        time.sleep(rng.random()*min(1, n/jobs/1e5))
        killed += rng.choice(writing).kill()
    return [p.result() for p in processes],killed,time.time()-start

def verify(path, n):
    "Rows that are lost, doubled, or not what the teacher says"
    check,manifest = check_recording(path),Manifest.at(path)
    store,codec,wrong = Shards(manifest, pieces_of(manifest), keep=False),Codec(),0
    for i in range(0, n, 8192):
        rows = np.arange(i, min(i+8192, n))
        rec,states = store.raw_rows(rows)
        x = inputs(rows)
        right = (rec['pred']==codec.encode(*Matrix()(x))['pred'].numpy()).all(1) & (rec['sig']==signature((x,))).all(1)
        wrong += int((~right | (states!=WHOLE)).sum())
    store.close()
    return dict(whole=check.whole, lost=check.holes+check.damaged, doubled=check.doubles, wrong=wrong, ok=check.ok)

def measure(n, jobs, kills):
    with tempfile.TemporaryDirectory() as tmp:
        few,_,_ = run(Path(tmp)/'few', max(n//10, BS), jobs, 0)
        plain,_,seconds = run(Path(tmp)/'plain', n, jobs, 0)
        killed,n_killed,killed_seconds = run(Path(tmp)/'killed', n, jobs, kills)
        found = verify(Path(tmp)/'killed', n)
        row = Manifest.at(Path(tmp)/'killed').row.itemsize
    return dict(rows=n, jobs=jobs, cores=os.cpu_count(), row_bytes=row,
                rows_per_second=round(sum(o['asked']/o['seconds'] for o in plain)), seconds=round(seconds, 1),
                start_mb=round(max(o['start_mb'] for o in plain)), peak_mb=round(max(o['peak_mb'] for o in plain)),
                peak_mb_of_a_tenth=round(max(o['peak_mb'] for o in few)),
                kills=n_killed, seconds_with_kills=round(killed_seconds, 1), **found)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=1_000_000)
    p.add_argument('--jobs', type=int, default=4)
    p.add_argument('--kills', type=int, default=20)
    p.add_argument('--out', default=RESULTS/'recording.json', help='file, - for none')
    args = p.parse_args()
    torch.set_num_threads(1) # OpenMP's threads do not survive a fork
    result = measure(args.rows, args.jobs, args.kills)
    print(json.dumps(result, indent=1))
    if str(args.out)!='-': Path(args.out).write_text(json.dumps(result, indent=1)+'\n')

if __name__=='__main__': main()
