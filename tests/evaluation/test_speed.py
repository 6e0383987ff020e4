"""Decoding after a text, timed under several presses."""

import cachepress as cp
from cachepress.evaluation.speed import speed_lines
from tests.tiny import tiny, tokens


def test_each_press_has_a_line_with_the_bytes_of_its_own_cache():
    model, ids, presses = tiny(), tokens(300), [cp.KnormPress(0.5), cp.KeyDiffPress(0.9)]
    whole, *lines = speed_lines(model, ids, presses)
    assert whole.press is None
    assert whole.cache_bytes == 4 * 2 * 300 * 2 * 8 * 4  # layers, heads, tokens, K and V, size
    assert [line.press for line in lines] == presses
    for line in lines:
        assert line.ratio == line.press.compression_ratio
        assert line.cache_bytes == cp.size_of(cp.prefill(model, ids, line.press)).bytes_after
        assert 0 < line.seconds.low <= line.seconds.median <= line.seconds.high
