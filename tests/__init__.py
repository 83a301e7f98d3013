"""The tests of ``fastst/a/b.py`` are in ``tests/a/test_b.py``; what they share, in ``support``."""

import pytest

pytest.register_assert_rewrite("tests.support")
