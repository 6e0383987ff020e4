"""What all errors have in common."""

import pickle

from cachepress.errors import CachepressError, UnsupportedError


def test_the_text_of_an_error_is_one_line_whatever_it_quotes():
    error = UnsupportedError("a.txt: got {\n  b\r\n\n\u2028c  d},\x0b wanted {e}\n")
    assert str(error) == "a.txt: got { b c  d}, wanted {e}"
    assert isinstance(error, CachepressError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
