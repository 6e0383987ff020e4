"""The kernel in Triton's interpreter, against batched products, on odd shapes; and compiled."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from cachepress.cache.codec import Codec
from cachepress.cache.kernel import spans_of
from cachepress.cache.pairs import Pairs
from cachepress.cache.segment import Segment
from cachepress.cache.tail import Tail
from cachepress.cache.window import WindowRows
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention.batched import batched_attention
from cachepress.ops.paged_attention.plan import MOST_SPLITS, UnplannedError, plan
from cachepress.ops.paged_attention.triton import NewToken, triton_attention
from tests.bounds import near
from tests.tiny import rand, randn

ODD = [(0, 1, 1000), (31, 32, 33)]
SEEN = 1000
CPU = torch.device("cpu")
RULE = AttentionRule(0.5)
NONE_ADDED = torch.zeros(1, dtype=torch.int32)


class Case:
    """A segment and a tail of random pairs, with queries, attended to in both ways."""

    def __init__(self, counts=ODD, *, batch=None, n=1, g=2, d=8, e=8, dtype=torch.float32, tail=5):
        self.h, self.g, self.n = len(counts[0]), g, n
        self.batch = batch or len(counts)
        keys = randn(len(counts), self.h, SEEN, d).to(dtype)
        values = randn(len(counts), self.h, SEEN, e).to(dtype)
        order = rand(len(counts), self.h, SEEN).argsort(-1).argsort(-1)
        self.mask = order < torch.tensor(counts)[..., None]
        self.pairs = Pairs(keys, values)
        self.new = [randn(self.batch, self.h, tail, size).to(dtype) for size in (d, e)]
        self.query = randn(self.batch, self.h * g, n, d).to(dtype)
        self.terms = d + 2 * (max(map(max, counts)) + tail)
        self.e = e

    def both(self, rule=None, codec=None, cores=1, bias=None, of_pairs=None):
        rule = rule or AttentionRule(0.3)
        segment = Segment.of(replace(self.pairs, bias=of_pairs), self.mask, codec)
        tail = Tail.of(*self.new).read()
        seen = SEEN + self.new[0].shape[2]
        laid = plan([spans_of(segment), tail.spans(seen)], CPU, self.shape, cores)
        ours = triton_attention(self.query, laid, rule, self.h, self.e, NONE_ADDED, bias=bias)
        return ours, self.exact([segment, tail], rule, bias)

    @property
    def shape(self):
        return self.batch, self.h, self.g * self.n

    def exact(self, parts, rule, bias=None):
        """Attention by batched products of the same numbers in float64."""
        own = self.new[0].shape[2]
        if bias is None:
            visible = torch.ones(self.n, own, dtype=torch.bool).tril(own - self.n)
            laid = [None, torch.zeros(1, self.n, own).masked_fill(~visible, -3e38)]
        else:
            bias = bias.expand(self.batch, -1, -1)
            laid = [bias, bias[..., SEEN:]]
        segment, tail = parts
        exact = [segment.part(laid[0], self.batch), tail.part(laid[1])]
        query = self.query.double().unflatten(1, (self.h, self.g))
        return batched_attention(query, exact, rule).flatten(1, 2).transpose(1, 2)


SINKS = torch.linspace(-1, 2, 6)
RULES = {
    "plain": AttentionRule(0.5),
    "softcap": AttentionRule(0.7, softcap=2.0),
    "sinks": AttentionRule(0.5, sinks=SINKS),
    "both": AttentionRule(0.5, 3.0, SINKS),
}


@pytest.mark.parametrize("cores", [1, 30], ids=["few splits", "many splits"])
@pytest.mark.parametrize("name", RULES)
def test_equals_batched_products(name, cores):
    case = Case()
    near(*case.both(RULES[name], cores=cores), torch.float32, case.terms)


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("g", [1, 5, 16])
def test_groups_and_queries_of_any_number(g, n):
    case = Case([(33,)] if n > 3 else [(3, 33, 100)], n=n, g=g, tail=n + 2)
    near(*case.both(), torch.float32, case.terms)


@pytest.mark.parametrize("size", [16, 80, 96, 128, 256])
def test_head_sizes(size):
    case = Case([(3, 33, 100)], d=size, e=size // 2)
    near(*case.both(), torch.float32, case.terms)


@pytest.mark.parametrize(("counts", "batch", "n"), [((3, 64, 150), 4, 1), ((70,), 64, 8)])
def test_sequences_that_share_pairs_read_them_together(counts, batch, n):
    case = Case([counts], batch=batch, n=n, tail=n)
    near(*case.both(cores=4), torch.float32, case.terms)


def test_two_sequences_stand_for_four_in_turns():
    case = Case(ODD, batch=4)
    near(*case.both(), torch.float32, case.terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32_and_rounded_at_the_end(dtype):
    case = Case(dtype=dtype)
    ours, wanted = case.both()
    assert ours.dtype == dtype
    near(ours, wanted, dtype, terms=4)


@pytest.mark.parametrize("codec", [Codec(8), Codec(4), Codec(2, value_group=4)], ids=str)
def test_quantized_pages_are_dequantized_in_the_kernel(codec):
    case = Case(n=2, d=8, e=16)
    near(*case.both(codec=codec, cores=3), torch.float32, case.terms)


def test_a_mask_over_text_columns():
    case = Case(n=3)
    bias = randn(2, 3, SEEN + 5).float()
    bias[0, 1, ::3] = torch.finfo(torch.float32).min
    near(*case.both(bias=bias), torch.float32, case.terms)
    near(*case.both(bias=bias[:1]), torch.float32, case.terms)


def test_a_bias_of_each_pair_and_head():
    case = Case()
    segment = Segment.of(case.pairs, case.mask)
    shift = randn(segment.layout.n_pages * 32).float()
    spans = spans_of(segment)
    biased = replace(spans, bias=shift)
    laid = plan([biased], CPU, case.shape, 1)
    rule = AttentionRule(0.5)
    ours = triton_attention(case.query, laid, rule, case.h, case.e, NONE_ADDED)
    table, real = segment.layout.padded()
    keys, values = (x.flatten(0, 1)[table].double() for x in (segment.keys, segment.values))
    query = case.query.double().view(len(table), case.g, -1)
    logits = query @ keys.mT * 0.5 + shift.double()[table][:, None]
    logits = logits.masked_fill(~real[:, None], float("-inf"))
    wanted = logits.softmax(-1).nan_to_num() @ values  # The first span has no pair.
    near(ours, wanted.view(2, 1, 6, case.e), torch.float32, case.terms)


@pytest.mark.parametrize("codec", [None, Codec(8)], ids=str)
@pytest.mark.parametrize(("counts", "batch"), [(ODD, 2), (ODD, 4), ([(70, 70)], 3)], ids=str)
def test_a_bias_that_is_stored_with_the_pairs(counts, batch, codec):
    case = Case(counts, batch=batch, n=2)
    of_pairs = randn(len(counts), case.h, SEEN)
    of_pairs[:, :, ::6] = torch.finfo(torch.float32).min
    near(*case.both(of_pairs=of_pairs, codec=codec), torch.float32, case.terms)
    mask = randn(1, 2, SEEN + 2).float()
    mask[0, :, 1::3] = torch.finfo(torch.float32).min  # Hidden twice would be no number.
    case = Case(counts, batch=batch, n=2, tail=2)
    found = case.both(RULES["softcap"], codec, 3, mask, of_pairs)
    near(*found, torch.float32, case.terms)


def test_listed_pages_are_read_and_no_others():
    case = Case([(64, 33, 100)])
    segment = Segment.of(case.pairs, case.mask)
    first = segment.layout.first_page.int()
    pages = torch.stack([first, first + torch.tensor([1, 1, 3])], dim=1).int()
    lengths = torch.tensor([64, 33, 36], dtype=torch.int32)
    laid = plan([spans_of(segment, pages, lengths)], CPU, case.shape, 1)
    ours = triton_attention(case.query, laid, AttentionRule(0.5), case.h, case.e, NONE_ADDED)
    keep = case.mask.cumsum(-1)
    third = (keep[:, 2:] <= 32) | (keep[:, 2:] > 96)
    kept = Segment.of(case.pairs, case.mask & torch.cat([keep[:, :2] > 0, third], dim=1))
    query = case.query.double().unflatten(1, (case.h, case.g))
    wanted = batched_attention(query, [kept.part(None)], AttentionRule(0.5))
    near(ours, wanted.flatten(1, 2).transpose(1, 2), torch.float32, case.terms)


@pytest.mark.parametrize("name", RULES)
def test_a_token_is_appended_and_attended_to(name):
    case = Case(tail=6)
    with torch.no_grad():  # With gradients there would be no room.
        tail = Tail.of(*(x[:, :, :4] for x in case.new))
    segment = Segment.of(case.pairs, case.mask)
    laid = plan([spans_of(segment), tail.read().spans(SEEN + 4)], CPU, case.shape, 2, appends=True)
    for i in range(2):
        new = NewToken(*(x[:, :, 4 + i : 5 + i] for x in case.new))
        ours = triton_attention(
            case.query, laid, RULES[name], case.h, case.e, NONE_ADDED + i, new=new
        )
    held = Tail(tail.keys, tail.values, 6).read()
    assert torch.equal(held.keys, case.new[0]) and torch.equal(held.values, case.new[1])
    near(ours, case.exact([segment, held], RULES[name]), torch.float32, case.terms)


def test_a_tail_grows_to_the_end_of_its_room():
    """The work is divided for all rows that there is room for, and not only for those of now."""
    case = Case([(5, 40, 33)], tail=68)
    with torch.no_grad():
        tail = Tail.of(*(x[:, :, :4] for x in case.new))
    segment = Segment.of(case.pairs, case.mask)
    laid = plan([spans_of(segment), tail.read().spans(SEEN + 4)], CPU, case.shape, 50)
    for x, new in zip(tail.tensors(), case.new, strict=True):
        x[:, :, :68] = new
    ours = triton_attention(case.query, laid, RULE, case.h, case.e, NONE_ADDED + 64)
    held = Tail(tail.keys, tail.values, 68).read()
    near(ours, case.exact([segment, held], RULE), torch.float32, case.terms)


@pytest.mark.parametrize("size", [2, 5, 70, 100])
def test_an_appended_token_sees_a_window(size):
    case = Case([(1, 1, 1)], tail=80)
    with torch.no_grad():
        tail = Tail.of(*(x[:, :, :78] for x in case.new))
    rows = WindowRows(tail.keys[:, :, :78], tail.values[:, :, :78], size)
    laid = plan([rows.spans(SEEN + 78)], CPU, case.shape, 50, appends=True)
    bias = randn(1, 1, SEEN + 80).float()
    bias[..., -1] = 0  # A token sees itself.
    for i in range(2):
        new = NewToken(*(x[:, :, 78 + i : 79 + i] for x in case.new))
        given = {"bias": bias, "new": new}
        ours = triton_attention(case.query, laid, RULE, case.h, case.e, NONE_ADDED + i, **given)
    shown = bias[..., -min(size, 80) :].double()
    held = Tail(tail.keys, tail.values, 80).read().newest(size)
    query = case.query.double().unflatten(1, (case.h, case.g))
    wanted = batched_attention(query, [held.part(shown)], RULE).flatten(1, 2).transpose(1, 2)
    near(ours, wanted, torch.float32, case.terms)


def test_a_launch_of_more_programs_than_the_table_needs_gives_the_same():
    case = Case()
    tail = Tail.of(*case.new).read()
    parts = [spans_of(Segment.of(case.pairs, case.mask)), tail.spans(SEEN + 5)]
    laid = plan(parts, CPU, case.shape, 1)
    roomy = replace(laid, programs=laid.programs + 40, splits=MOST_SPLITS)
    rule = AttentionRule(0.5)
    ours, wanted = (
        triton_attention(case.query, x, rule, case.h, case.e, NONE_ADDED) for x in (roomy, laid)
    )
    assert torch.equal(ours, wanted)


def test_long_spans_are_read_by_many_programs_and_short_ones_by_few():
    case = Case([(1, 20, 1000)])  # 16 blocks of 64 rows for each of three heads.
    parts = [spans_of(Segment.of(case.pairs, case.mask))]
    assert plan(parts, CPU, case.shape, cores=1).splits == 2
    assert plan(parts, CPU, case.shape, cores=8).splits == 8
    laid = plan(parts, CPU, case.shape, cores=100)
    assert (laid.splits, laid.programs, laid.partials) == (16, 48, 96)


def test_pairs_of_several_types_are_left_to_batched_products():
    case = Case()
    parts = [
        spans_of(Segment.of(case.pairs, case.mask)),
        Tail.of(*(x.half() for x in case.new)).read().spans(SEEN + 5),
    ]
    with pytest.raises(UnplannedError, match="types"):
        plan(parts, CPU, case.shape, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_it_compiles_for_gpus_that_are_not_here():
    """Vectors of 16 bytes are copied past the registers, and tensor cores multiply half types."""
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compiled"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    names = ["plain", "plain", "masked", "coded", "paged", "appends", "window"]
    assert [line[0] for line in found] == names
    for name, copies, products in found:
        assert int(products) > 0, name
        assert name == "coded" or int(copies) > 0, name
