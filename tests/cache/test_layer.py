"""A compressed layer holds what plain lists of pairs would, after any operations."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

import cachepress as cp
from cachepress.cache.codec import Codec, Quantized
from cachepress.cache.joined import JoinedLayer
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.tail import SLACK
from cachepress.generation.cache_files import _named_today, _pack, _state, _unpack
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention import PAGE
from cachepress.ops.paged_attention.naive import naive_attention
from tests.bounds import close, half_a_step
from tests.tiny import rand, randn
from tests.tiny_cache import allocated

HEADS, SIZE, NAN = 2, 8, float("nan")
RULE = AttentionRule(0.3)


@dataclass(frozen=True)
class Kind:
    """How a layer stores its pairs, and what a press does with them.

    Attributes:
        codec: in few bits, or as they are.
        reads: pages that a query reads; None for all.
        thin: whether some channels of the keys are stored only.
        extras: whether a press turns keys and leaves a number with each row.
        even: whether every head keeps as many rows.
        biased: whether a press adds a number to the logits of each pair.
    """

    codec: Codec | None = None
    page_budget: int | None = None
    thin: bool = False
    extras: bool = False
    even: bool = False
    biased: bool = False


KINDS = {
    "even": Kind(even=True),
    "uneven": Kind(),
    "turned, with numbers": Kind(extras=True),
    "thin": Kind(thin=True),
    "by page": Kind(page_budget=1),
    "in few bits": Kind(Codec(8, residual=5)),
    "in few bits, even, by page": Kind(Codec(8, residual=0), page_budget=1, even=True),
    "biased": Kind(biased=True),
    "biased, even, by page": Kind(page_budget=1, even=True, biased=True),
    "biased, in few bits": Kind(Codec(8, residual=5), biased=True),
    "thin, in few bits": Kind(Codec(4, residual=40), thin=True, extras=True),
}
by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@dataclass
class Head:
    """The pairs of one head of one sequence, in order."""

    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rope: list[int] = field(default_factory=list)
    token_state: list[float] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)

    def add(self, position: int, key: Tensor, value: Tensor) -> None:
        row = (position, key, value, -1, NAN, 0.0)
        for column, x in zip(vars(self).values(), row, strict=True):
            column.append(x)

    def take(self, some: list[int]) -> "Head":
        return Head(**{name: [column[i] for i in some] for name, column in vars(self).items()})

    def before(self, target: int) -> "Head":
        return self.take([i for i, p in enumerate(self.positions) if p < target])


class Pair:
    """A compressed layer, and lists of what it should hold: everything is done to both."""

    def __init__(self, kind: Kind, batch: int, draw: random.Random) -> None:
        self.kind, self.draw, self.seen, self.compressed = kind, draw, 0, 0
        self.store = CompressedLayer()
        self.store.codec, self.store.page_budget = kind.codec, kind.page_budget
        self.heads = [[Head() for _ in range(HEADS)] for _ in range(batch)]
        # Of several texts some begin with columns that are no tokens.
        self.padding = [draw.randrange(PAGE) if b and batch > 1 else 0 for b in range(batch)]

    def append(self, n: int, batch: int | None = None) -> None:
        """Append the pairs of a forward; several sequences after one share what it holds."""
        if batch is not None:
            self.heads, self.padding = copied(self.heads * batch), self.padding * batch
        new = [randn(len(self.heads), HEADS, n, SIZE) for _ in range(2)]
        self.store.update(*new)
        for b, sequence in enumerate(self.heads):
            for h, head in enumerate(sequence):
                for t in range(n):
                    key, value = (x[b, h, t] for x in new)
                    head.add(self.seen + t, key, value)
        self.seen += n

    def read(self) -> None:
        self.append(self.draw.randrange(2, 2 * PAGE))

    def decode(self) -> None:
        for _ in range(self.draw.choice([1, 3, PAGE, 2 * PAGE + 11])):
            self.append(1)

    def decode_on(self) -> None:
        """So many that some are put into pages."""
        for _ in range(2 * PAGE + 11):
            self.append(1)

    def keep(self) -> None:
        """What a press evicts, rotates, keeps with each token, and stores."""
        rows, kind, draw = self.store.snapshot.rows(), self.kind, self.draw
        where = rows.text_positions()
        slots = [
            [(head >= padding).nonzero()[:, 0].tolist() for head in sequence]
            for sequence, padding in zip(where, self.padding, strict=True)
        ]
        least = min(len(found) for sequence in slots for found in sequence)
        same = draw.randrange(max(1, least // 2), least + 1)
        mask, size = torch.zeros_like(where, dtype=torch.bool), where.shape
        key_channels = rand(*size[:2], SIZE).argsort(-1) < SIZE // 2 if kind.thin else None
        rope = torch.randint(0, 99, size).int() if kind.extras else None
        token_state = randn(size) if kind.extras else None
        bias = randn(size) if kind.biased else None
        for b, sequence in enumerate(self.heads):
            for h, head in enumerate(sequence):
                found = slots[b][h]
                fewest = max(1, len(found) // 3)
                n = same if kind.even else draw.randrange(fewest, len(found) + 1)
                some = sorted(draw.sample(range(len(found)), n))
                padded = sum(p < self.padding[b] for p in head.positions)
                left = sequence[h] = head.take([padded + i for i in some])
                chosen = [found[i] for i in some]
                mask[b, h, chosen] = True
                left.rope = [-1] * n if rope is None else rope[b, h, chosen].tolist()
                left.token_state = (
                    [NAN] * n if token_state is None else token_state[b, h, chosen].tolist()
                )
                left.bias = [0.0] * n if bias is None else bias[b, h, chosen].tolist()
                if key_channels is not None:
                    left.keys = [key * key_channels[b, h] for key in left.keys]
        numbers = {"rope": rope, "token_state": token_state, "bias": bias}
        table = Pairs(rows.keys, rows.values, where, **numbers)
        text_valid = self._tokens() if any(self.padding) else None
        self.store.keep(table, mask, text_valid, key_channels)
        self.compressed = self.seen
        self._check_residual()

    def _tokens(self) -> Tensor:
        """Which text columns are tokens, ``[B, S]``."""
        return torch.arange(self.seen) >= torch.tensor(self.padding)[:, None]

    def _check_residual(self) -> None:
        """Right after it all but the newest rows are in few bits."""
        if self.kind.codec is None:
            return
        counts = torch.zeros(len(self.heads), HEADS, dtype=torch.long)
        for segment in self.store.snapshot.segments:
            if isinstance(segment.keys, Quantized):
                counts += torch.tensor(segment.layout.lengths).view(segment.shape)
        n = torch.tensor([[len(head.positions) for head in row] for row in self.heads])
        assert torch.equal(counts, (n - self.kind.codec.residual).clamp(min=0))

    def crop(self) -> None:
        """Forget the newest text columns, as far back as to what was compressed."""
        store, target = self.store, self.draw.randint(self.compressed, self.seen)
        target = self.draw.choice([target, target, self.compressed, self.seen])
        if self.compressed > 1:
            with pytest.raises(cp.CachepressError, match="cannot crop a compressed cache"):
                store.crop(self.compressed - 1)
        store.scored_at = scored_at = self.draw.randint(0, self.seen)
        store.text_ids = np.arange(self.seen)[None]
        by_length = target > 0 and self.draw.random() < 0.5
        store.crop(target if by_length else target - self.seen)
        assert store.scored_at == min(scored_at, target)
        assert store.text_ids.tolist() == [list(range(target))]
        self.heads = [[head.before(target) for head in sequence] for sequence in self.heads]
        self.seen = target

    def reorder(self) -> None:
        b = len(self.heads)
        chosen = [self.draw.randrange(b) for _ in range(self.draw.randint(1, 4))]
        how = self.draw.randrange(3)
        if how == 0:
            self.store.reorder_cache(torch.tensor(chosen))
        elif how == 1:
            self.store.batch_select_indices(torch.tensor(chosen))
        else:
            self.store.batch_repeat_interleave(2)
            chosen = [i // 2 for i in range(2 * b)]
        self.heads = copied([self.heads[i] for i in chosen])
        self.padding = [self.padding[i] for i in chosen]

    def fork(self) -> None:
        """Go on with a copy; what is done to the other one does not show in it."""
        before = self.store
        self.store = copy.deepcopy(before) if self.draw.random() < 0.5 else before.fork()
        n = self.draw.randint(1, PAGE)
        before.update(*(randn(len(self.heads), HEADS, n, SIZE) for _ in range(2)))

    def fork_on(self) -> None:
        """Go on with the original; what is done to a copy does not show in it."""
        fork = self.store.fork()
        fork.update(*(randn(len(self.heads), HEADS, 1, SIZE) for _ in range(2)))
        fork.reorder_cache(torch.tensor([len(self.heads) - 1]))

    def save(self) -> None:
        """Write it, and read it."""
        tensors: dict[str, Tensor] = {}
        packed = json.loads(json.dumps(_pack(_state(self.store), "0", tensors)))
        self.store = CompressedLayer()
        vars(self.store).update(_named_today(_unpack(packed, tensors, torch.device("cpu"))))

    def rest(self) -> None:
        """What changes how rows are stored, and nothing about them."""
        how = self.draw.randrange(3)
        if how == 0:
            assert self.store.form
        elif how == 1:
            self.store.restore()
        else:
            self.store.mark_skipped(1, bounded=True)

    def check(self) -> None:
        """Assert that all that the layer answers is what the lists say."""
        store, held = self.store, self.store.snapshot
        rows, b = held.rows(), len(self.heads)
        where = rows.text_positions()
        rope = torch.full_like(where, -1) if rows.rope is None else rows.rope
        token_state = torch.full(where.shape, NAN) if rows.token_state is None else rows.token_state
        bias = torch.zeros(where.shape) if rows.bias is None else rows.bias
        assert where.shape[0] == store.batch_size == b and store.get_seq_length() == self.seen
        for i, sequence in enumerate(self.heads):
            for j, head in enumerate(sequence):
                real = where[i, j] >= 0
                assert where[i, j][real].tolist() == head.positions
                assert store.lengths[i, j] == len(head.positions)
                assert rope[i, j][real].tolist() == head.rope
                left = torch.tensor(head.token_state, dtype=torch.float64)
                close(token_state[i, j][real].double(), left)
                assert bias[i, j][real].tolist() == head.bias
                for dim, name in enumerate(("keys", "values")):
                    ours = getattr(rows, name)[i, j][real]
                    wanted = torch.stack(getattr(head, name))
                    self._check_numbers(ours, wanted, dim)
                    # What one step has put into few bits, the next one starts from.
                    setattr(head, name, list(ours))
        assert rows.full == bool((where >= 0).all())
        self._check_attention(rows)
        self._check_bounds()
        assert store.nbytes == allocated(store)
        assert store.whole_nbytes == self.seen * b * HEADS * 2 * SIZE * 8

    def _check_numbers(self, ours: Tensor, wanted: Tensor, dim: int) -> None:
        """They are as they were, but for half of a step of what was put into few bits."""
        codec = self.kind.codec
        newest = len(ours) if codec is None else codec.residual
        close(ours[len(ours) - newest :], wanted[len(ours) - newest :])
        if codec is not None:
            # A page has no more of a range than all rows have.
            off = half_a_step(wanted, dim, codec.bits)
            assert ((ours - wanted).abs() <= off).all()

    def _check_attention(self, rows: Pairs) -> None:
        """The newest tokens attend to all that is held of their text up to themselves."""
        b, where, tail = len(self.heads), rows.text_positions(), self.store.snapshot.tail
        n = 1 if tail is None else max(1, min(self.draw.randint(1, 3), tail.keys.shape[2]))
        query = randn(b, 2 * HEADS, n, SIZE)
        none = not any(self.padding) and self.draw.random() < 0.5
        mask = TextMask(None if none else self._tokens().long(), n)
        ours = self.store.snapshot.whole().attend(query, mask, RULE)
        for t in range(n):
            first = torch.tensor(self.padding)[:, None, None]
            seen = (where >= first) & (where < self.seen - n + 1 + t)
            columns = [
                [(rows.keys[i, j][seen[i, j]], rows.values[i, j][seen[i, j]]) for j in range(HEADS)]
                for i in range(b)
            ]
            some = query[:, :, t].reshape(b, HEADS, 2, 1, SIZE)
            added = None
            if rows.bias is not None:
                added = [[rows.bias[i, j][seen[i, j]] for j in range(HEADS)] for i in range(b)]
            wanted = naive_attention(some, columns, RULE, added)
            close(ours[:, t], wanted.view(b, 2 * HEADS, SIZE))

    def _check_bounds(self) -> None:
        """The keys of a page lie within its bounds, and reach them; slots behind them are free."""
        for segment in self.store.snapshot.segments:
            left = [n - first for n in segment.layout.lengths for first in range(0, n, PAGE)]
            used = torch.arange(PAGE) < torch.tensor(left, dtype=torch.long)[:, None]
            assert torch.equal(segment.positions >= 0, used)
            if segment.bounds is None:
                continue
            for keys, real, bounds in zip(segment.keys, used, segment.bounds, strict=True):
                close(bounds, torch.stack([keys[real].amin(0), keys[real].amax(0)]))


def copied(heads: list[list[Head]]) -> list[list[Head]]:
    return [[head.take(list(range(len(head.positions)))) for head in row] for row in heads]


def steps(pair: Pair) -> list[Callable[[], None]]:
    often = [pair.decode, pair.read, pair.keep, pair.crop]
    return [*often, *often, pair.reorder, pair.fork, pair.fork_on, pair.save, pair.rest]


HISTORIES = {
    "compressed again": "keep decode_on decode_on keep decode_on decode_on fork decode_on",
    "cropped": "keep decode_on crop decode_on decode crop read crop decode_on crop",
    "forked": "decode_on fork keep decode_on fork_on decode_on fork crop decode_on save decode_on",
    "reordered": "keep reorder decode_on decode reorder keep read reorder fork reorder decode_on",
}


@pytest.mark.parametrize("history", HISTORIES)
@by_kind
def test_a_store_holds_what_lists_would_after(kind, history):
    torch.manual_seed(7)
    pair = Pair(kind, 2, random.Random(7))
    pair.append(3 * PAGE)
    for name in HISTORIES[history].split():
        getattr(pair, name)()
        pair.check()


@pytest.mark.parametrize("seed", range(4))
@by_kind
def test_a_store_holds_what_lists_would(kind, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pair = Pair(kind, draw.choice([1, 2]), draw)
    pair.append(2 * PAGE + draw.randrange(PAGE))
    pair.check()
    for _ in range(12):
        draw.choice(steps(pair))()
        pair.check()
        if len(pair.heads) == 1 and draw.random() < 0.5:
            pair.append(draw.choice([1, 5]), batch=3)
            pair.check()


@by_kind
def test_joined_stores_hold_what_each_of_them_does(kind):
    def one(seed, *done):
        torch.manual_seed(seed)
        pair = Pair(kind, 1, random.Random(seed))
        pair.append(6 * PAGE)
        for name in done:
            getattr(pair, name)()
            pair.check()
        return pair

    same = [one(seed, "keep", "decode_on") for seed in (1, 2, 3)]
    assert len({pair.store.form() for pair in same}) == 1
    joined = Pair(kind, 1, random.Random(6))
    joined.store = CompressedLayer.stack([pair.store for pair in same], 2)
    joined.heads = copied([*(pair.heads[0] for pair in same)] * 2)
    joined.padding = [0, 40, 3, 17, 0, 31]  # What a mask hides of rows that two of them share.
    for head in (head for row in joined.heads for head in row):
        # What presses alone read stays behind.
        head.rope, head.token_state = [-1] * len(head.rope), [NAN] * len(head.token_state)
    joined.seen, joined.compressed = same[0].seen, same[0].compressed
    joined.check()
    for name in ("decode", "fork", "save", "reorder", "decode", "crop", "keep", "read"):
        getattr(joined, name)()
        joined.check()


def test_groups_of_joined_stores_hold_what_each_of_them_does():
    def made(name, seed):
        torch.manual_seed(seed)
        pair = Pair(KINDS[name], 1, random.Random(seed))
        pair.append(2 * PAGE)
        pair.keep()
        pair.append(3)
        pair.check()
        assert pair.store.form()
        return pair

    groups = [[made("uneven", 1)], [made("even", 2), made("even", 3)], [made("thin", 4)]]
    order = [pair for group in groups for pair in group * 2]
    stacked = [CompressedLayer.stack([pair.store for pair in group], 2) for group in groups]
    store = JoinedLayer(stacked)
    assert store.batch_size == len(order)
    apart = [pair.store.fork() for pair in order]
    for _ in range(3):
        new = [randn(len(order), HEADS, 1, SIZE) for _ in range(2)]
        store.update(*new)
        query = randn(len(order), 2 * HEADS, 1, SIZE)
        mask = torch.ones(len(order), store.get_seq_length(), dtype=torch.long)
        # Of a question that is shorter than others the first columns are none.
        mask[[1, 2, 7], 2 * PAGE + 3] = 0
        ours = store.snapshot.attend(query, TextMask(mask, 1), RULE)
        for i, one in enumerate(apart):
            one.update(*(x[i : i + 1] for x in new))
            wanted = one.snapshot.attend(query[i : i + 1], TextMask(mask[i : i + 1], 1), RULE)
            close(ours[i], wanted[0])
            assert torch.equal(store.lengths[i], one.lengths[0])


def test_padding_of_a_question_stays_hidden_when_its_rows_are_shared():
    """Behind a text that has padding of its own, which is not held."""
    pair = Pair(KINDS["uneven"], 2, random.Random(1))
    pair.padding = [0, 9]
    pair.append(2 * PAGE)
    pair.keep()
    pair.append(SLACK + 3)
    store = pair.store.fork()
    assert len(store.snapshot.segments) == 2
    store.update(*(randn(2, HEADS, 1, SIZE) for _ in range(2)))
    rows, query = store.snapshot.rows(), randn(2, 2 * HEADS, 1, SIZE)
    valid = torch.arange(store.get_seq_length()) >= torch.tensor(pair.padding)[:, None]
    valid[0, 2 * PAGE : 2 * PAGE + 2] = False
    columns = []
    for b, sequence in enumerate(rows.text_positions().long()):
        seen = (sequence >= 0) & valid[b][sequence.clamp(min=0)]
        columns.append([(rows.keys[b, h][seen[h]], rows.values[b, h][seen[h]]) for h in range(2)])
    wanted = naive_attention(query.view(2, HEADS, 2, 1, SIZE), columns, RULE)
    ours = store.snapshot.attend(query, TextMask(valid.long(), 1), RULE)
    close(ours.transpose(1, 2), wanted.view(2, 2 * HEADS, 1, SIZE))


@torch.no_grad()
def test_a_tail_is_no_longer_than_it_has_to_be():
    """What a token more takes, and what a prompt of several tokens does."""
    store = CompressedLayer()
    store.update(randn(1, HEADS, 70, SIZE), randn(1, HEADS, 70, SIZE))
    assert store._tail.keys.shape[2] == 70
    store.update(randn(1, HEADS, 1, SIZE), randn(1, HEADS, 1, SIZE))
    assert store._tail.keys.shape[2] == 71 + SLACK
    for _ in range(SLACK):
        store.update(randn(1, HEADS, 1, SIZE), randn(1, HEADS, 1, SIZE))
    assert store._tail.keys.shape[2] == 71 + SLACK
    store.update(randn(1, HEADS, 2, SIZE), randn(1, HEADS, 2, SIZE))
    assert store._tail.keys.shape[2] == 73 + SLACK
