"""What holds in every test of a press."""

from tests.laws.conftest import _kept_sets_do_not_hang_on_rounding  # noqa: F401
