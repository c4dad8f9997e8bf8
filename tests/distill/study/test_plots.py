"The library's plots can be read: no tick's label covers its neighbour, and nothing is black on dark or white on white"
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from fasterai.core.schedule import cos
from fasterai.distill.study.compare import Comparison, plot_compare
from fasterai.distill.study.summary import plot_gains, summary
from fasterai.distill.study.sweep import Sweep
from fasterai.distill.training.loss_log import LossLog


def _sweep(values):
    rows = [dict(run='distilled', T=v, seed=s, epochs=1, accuracy=0.9+0.01*s) for v in values for s in (0, 1)]
    rows += [dict(run='alone', seed=s, epochs=1, accuracy=0.88) for s in (0, 1)]
    return Sweep(pd.DataFrame(rows), ['T'], ['valid_loss', 'accuracy']).plot()


def _compare():
    row = dict(accuracy=0.9, accuracy_lo=0.88, accuracy_hi=0.92)
    costs = dict(teacher=dict(params=21_300_000, macs=3_600_000_000, latency_ms=12.3, size_mb=85.3),
                 alone=dict(params=105_866, macs=1_117_056, latency_ms=0.2, size_mb=0.4))
    table = Comparison.from_dict({k: {**row, **v} for k,v in costs.items()}, orient='index')
    table.attrs = dict(metrics=['accuracy'], teacher='teacher', baseline='alone', n=10)
    return plot_compare(table, costs=('params', 'macs', 'latency_ms', 'size_mb'))


def _losses():
    log = LossLog(['task_loss', 'distill_loss'])
    for i in range(3000): log.add([torch.tensor(1e-4*i), torch.tensor(1e4/(1+i))], 0.5, 8)
    log.close()
    return log.plot()


plots = dict(near=lambda: _sweep([1, 2, 3, 5, 10]), far=lambda: _sweep([1, 2, 4, 8, 16, 32, 64]),
             weights=lambda: _sweep([0., 0.1, 0.5, 0.9, 1.]), compare=_compare, losses=_losses,
             schedule=lambda: [cos.plot()])


@pytest.fixture(params=plots)
def axs(request):
    plt.close('all')
    axs = np.atleast_1d(plots[request.param]()).ravel()
    axs[0].figure.canvas.draw()
    yield axs
    plt.close('all')


def _boxes(axis):
    low,high = sorted(axis.get_view_interval())
    labels = [t.label1 for t in axis.get_major_ticks() if low<=t.get_loc()<=high]
    return [o.get_window_extent() for o in labels if o.get_visible() and o.get_text()]


def test_labels_of_ticks_do_not_collide(axs):
    for ax in axs:
        x = sorted(_boxes(ax.xaxis), key=lambda b: b.x0)
        y = sorted(_boxes(ax.yaxis), key=lambda b: b.y0)
        assert len(x)>1 and all(a.x1<b.x0 for a,b in zip(x, x[1:])), [b.bounds for b in x]
        assert all(a.y1<b.y0 for a,b in zip(y, y[1:]))


def test_are_clear_on_light_and_dark(axs):
    for ax in axs:
        assert ax.figure.get_facecolor()[3]==0 and ax.get_facecolor()[3]==0
        texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
        for t in texts: assert 0.35<np.mean(to_rgb(t.get_color()))<0.65, t


def test_gains_without_a_training_that_took_as_long():
    "Two baselines of one seed took as long, which makes no pair of seeds"
    rows = [dict(arm=a, epochs=5, seed=s, seconds=t, accuracy=0.8+0.1*(a=='kd')+0.01*s)
            for a,t in (('alone', 5.), ('kd', 10.)) for s in range(3)]
    rows.append(dict(arm='alone', epochs=10, seed=0, seconds=10., accuracy=0.85))
    table = summary(pd.DataFrame(rows))
    assert 'same_time' not in table
    ax = plot_gains(table)
    assert [c.get_label() for c in ax.containers]==['equal epochs']
    assert ax.containers[0].lines[0].get_xdata().tolist()==pytest.approx([0.1])
