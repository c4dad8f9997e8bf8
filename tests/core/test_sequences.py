"The sequential t-test: against integration, its error by simulation, its power against a plain paired t-test"
import numpy as np
import pytest
from scipy import stats

from fasterai.core.sequences import chance_to_decide, confidence_sequence, critical_t, evidence

draws,pairs = 2000,12

@pytest.fixture(scope='module')
def nothing(): return np.random.default_rng(7).standard_normal((draws, pairs))

def rejects(d, **kwargs):
    seq = confidence_sequence(d, **kwargs)
    return (seq.low>0).any(-1),(seq.high<0).any(-1)

def at_most(share, level): # four standard errors of a simulation
    return share<=level+4*np.sqrt(level*(1-level)/draws)


@pytest.mark.parametrize('t,n,effect', [(0, 3, 1), (2.5, 4, 2), (-4, 7, .5), (1, 12, 2), (6, 5, 3)])
def test_evidence_is_the_mixture_of_noncentral_t(t, n, effect):
    d = np.linspace(-9*effect, 9*effect, 6001)
    likelier = stats.nct.pdf(t, n-1, np.sqrt(n)*d)/stats.t.pdf(t, n-1)
    assert evidence(t, n, effect)==pytest.approx(np.trapezoid(likelier*stats.norm.pdf(d, scale=effect), d), rel=1e-3)

def test_the_critical_t_is_where_the_evidence_is_enough():
    n = np.arange(1, 30)
    for alpha,effect in ((.05, 2), (.1, 1), (.001, 4)):
        t = critical_t(n, alpha, effect)
        known = np.isfinite(t)
        assert known[-1] and not known[0] and (np.diff(known.astype(int))>=0).all()
        assert evidence(t[known], n[known], effect)==pytest.approx(1/alpha)
        assert (evidence(1e9, n[~known], effect)<1/alpha).all()
    assert np.isfinite(evidence(np.inf, 4)) and evidence(np.inf, 4)==pytest.approx(evidence(1e9, 4), rel=1e-6)

def test_evidence_has_mean_one_under_nothing(nothing):
    for n in (4, 8, 12):
        t = stats.t.rvs(n-1, size=200_000, random_state=n)
        assert evidence(t, n, .5).mean()==pytest.approx(1, abs=.05)

@pytest.mark.parametrize('scale', [1e-3, 1, 100])
@pytest.mark.parametrize('alpha', [.05, .1, .2])
def test_type_1_error(nothing, scale, alpha):
    up,down = rejects(scale*nothing, alpha=alpha)
    assert at_most((up|down).mean(), alpha) and at_most(up.mean(), alpha/2)

def test_the_mean_is_ever_outside_as_seldom(nothing):
    seq = confidence_sequence(3+5*nothing, .1)
    assert at_most(((seq.low>3)|(seq.high<3)).any(1).mean(), .1)

def test_over_a_long_time():
    d = np.random.default_rng(3).standard_normal((draws, 400))
    up,down = rejects(d, alpha=.1)
    assert .02<(up|down).mean()<=.1+4*np.sqrt(.09/draws)

def test_coarse_steps_and_heavy_tails():
    "Accuracies move in steps of the validation set, and some seeds are far out"
    rng = np.random.default_rng(11)
    coarse = np.round(2*rng.standard_normal((draws, pairs))) # a standard deviation of two steps
    up,down = rejects(coarse, alpha=.1, least_sd=1/np.sqrt(6))
    assert at_most((up|down).mean(), .1)
    up,down = rejects(rng.standard_t(3, (draws, pairs)), alpha=.1)
    assert at_most((up|down).mean(), .1)

def test_looking_at_a_t_test_is_wrong_more_often(nothing):
    ps = np.stack([stats.ttest_1samp(nothing[:, :n], 0, axis=1).pvalue for n in range(2, pairs+1)])
    assert (ps<.05).any(0).mean()>.15 and at_most(np.logical_or(*rejects(nothing)).mean(), .05)

@pytest.mark.parametrize('effect,power,after', [(1.5, .85, 9), (2, .97, 7), (3, .99, 5.5)])
def test_power_against_a_plain_t_test(nothing, effect, power, after):
    d = nothing+effect
    found = confidence_sequence(d).low>0
    once = (stats.ttest_1samp(d, 0, axis=1, alternative='greater').pvalue<.025).mean()
    assert found.any(1).mean()>power and once-found.any(1).mean()<.12
    assert (found.argmax(1)+1)[found.any(1)].mean()<after<pairs

def test_vectorised_rows_are_single_ones(nothing):
    seq = confidence_sequence(nothing[:5]+1)
    for i in range(5):
        for a,b in zip(seq, confidence_sequence(nothing[i]+1)): assert np.array_equal(a[i], b)
    assert (np.diff(seq.low[:, 4:])>=0).all() and (np.diff(seq.high[:, 4:])<=0).all()

@pytest.mark.parametrize('effect,first', [(0, 3), (1, 4), (2, 3)])
def test_the_chance_to_decide_is_that_of_its_futures(effect, first):
    "Truths drawn from what the prediction starts from: of those with a chance near p, a share of p is decided"
    rng = np.random.default_rng(2)
    d = effect+rng.standard_normal(first)
    sd = d.std(ddof=1)*np.sqrt((first-1)/rng.chisquare(first-1, (draws, 1)))
    mean = d.mean()+sd/np.sqrt(first)*rng.standard_normal((draws, 1))
    seq = confidence_sequence(np.hstack([np.tile(d, (draws, 1)), rng.normal(mean, sd, (draws, pairs-first))]), .1)
    share = ((seq.low>0)|(seq.high<.5)).any(1).mean()
    assert chance_to_decide(d, pairs, .5, .1, draws=draws)==pytest.approx(share, abs=.05)

@pytest.mark.parametrize('effect', [0, 1, 1.5, 2])
def test_giving_up_costs_few_findings_and_saves_pairs(nothing, effect):
    d = nothing[:200]+effect
    seq = confidence_sequence(d, .1)
    decided = (seq.low>0)|(seq.high<.5)
    stop = np.where(decided.any(1), decided.argmax(1)+1, pairs)
    def given_up(row, n): return any(chance_to_decide(row[:k], pairs, .5, .1, draws=200)<.1 for k in range(2, n))
    lost = [given_up(row, n) for row,n in zip(d, stop)]
    found = (seq.low>0).any(1)
    assert (found & lost).mean()<=.03
    if not effect: assert (np.array(lost) & ~decided.any(1)).mean()>.6

def test_the_chance_at_the_ends():
    assert chance_to_decide([], 12, 1)==chance_to_decide([3], 12, 1)==1 # nothing is known of a spread
    assert chance_to_decide([1.]*5, 5, .5)==1 and chance_to_decide([0., 2, -2, 1, -1], 5, .5)==0
    assert chance_to_decide([0.]*3, 12, .5)==1 and chance_to_decide([0.]*3, 12, .5, least_sd=3)<.1
    assert chance_to_decide([1, -1, 2], 12, .5)==chance_to_decide([1, -1, 2], 12, .5)

def test_differences_that_are_all_equal():
    assert confidence_sequence([0.]*6).high[-1]==0==confidence_sequence([0.]*6).low[-1]
    seq = confidence_sequence([.1]*6, least_sd=.01)
    assert 0<seq.low[-1]<.1<seq.high[-1] and seq.mean.tolist()==[.1]*6

def test_what_is_refused():
    with pytest.raises(ValueError, match='at least one difference'): confidence_sequence([])
    with pytest.raises(ValueError, match='finite'): confidence_sequence([1, np.inf])
    with pytest.raises(ValueError, match='alpha must be between 0 and 1, got 0'): critical_t(5, 0)
    with pytest.raises(ValueError, match='effect must be positive, got -1'): critical_t(5, effect=-1)
