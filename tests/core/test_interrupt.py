"Ctrl-C whose exception Python drops, as in a hook of a fork"
import signal
from contextlib import suppress

import pytest

from fasterai.core.interrupt import remember_interrupt, stop_if_interrupted


@pytest.fixture(autouse=True)
def as_python_starts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_one_that_is_lost_comes_again():
    with remember_interrupt():
        stop_if_interrupted()
        with suppress(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt): stop_if_interrupted()
    stop_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_of_before_is_back_after_one_that_is_not_lost():
    with pytest.raises(KeyboardInterrupt), remember_interrupt(): signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize('other', [signal.SIG_IGN, lambda *_: None])
def test_a_signal_that_is_ignored_or_somebody_elses_stays_so(other):
    signal.signal(signal.SIGINT, other)
    with remember_interrupt():
        signal.raise_signal(signal.SIGINT)
        stop_if_interrupted()
        assert signal.getsignal(signal.SIGINT) is other
