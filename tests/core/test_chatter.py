"Quiet for a while, and never louder than before"
import logging
from io import StringIO

import pytest

from fasterai.core.chatter import without_chatter


@pytest.mark.parametrize('before,said', [(logging.NOTSET, ['critical']), (logging.INFO, ['critical']),
                                         (logging.CRITICAL, [])])
def test_never_louder_than_before(before, said):
    log,out = logging.getLogger('test_chatter'),StringIO()
    handler = logging.StreamHandler(out)
    log.addHandler(handler)
    log.propagate = False
    logging.disable(before)
    try:
        with without_chatter():
            log.error('error')
            log.critical('critical')
        assert (out.getvalue().split(), logging.root.manager.disable)==(said, before)
    finally:
        logging.disable(logging.NOTSET)
        log.removeHandler(handler)
