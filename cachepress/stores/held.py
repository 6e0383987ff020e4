"""What a store holds at one moment, and attention over it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.forward import Rows
from cachepress.masks import TextMask
from cachepress.ops import AttentionRule
from cachepress.ops.ragged_attention import Part, ragged_attention
from cachepress.stores.block import Block
from cachepress.stores.tail import TailRows


@dataclass(frozen=True)
class Held:
    """Blocks and tail of a store as they were at one moment.

    Attributes:
        blocks: settled rows, of all sequences or of one that all share.
        tail: rows since.
        seen: text columns seen.
        batch: number of sequences.
        known: ``[B, S]`` of the settled text columns, those that are tokens; None if all.
    """

    blocks: tuple[Block, ...]
    tail: TailRows | None
    seen: int
    batch: int
    known: Tensor | None

    @property
    def start(self) -> int:
        """The text column that the tail begins with."""
        return self.seen - (0 if self.tail is None else self.tail.keys.shape[2])

    @property
    def shared(self) -> bool:
        """Whether sequences share rows."""
        return any(block.shape[0] != self.batch for block in self.blocks)

    def lengths(self) -> Tensor:
        """Rows of each head, ``[B, H]``."""
        own = self.seen - self.start
        total = torch.full((self.batch, self.heads), own)
        for block in self.blocks:
            total += torch.tensor(block.layout.lengths).view(block.shape)
        return total

    @property
    def heads(self) -> int:
        """KV heads."""
        if self.tail is not None:
            return self.tail.keys.shape[1]
        return self.blocks[0].shape[1]

    def rows(self) -> Rows:
        """Everything as one table ``[B, H, T, ...]``, the rows of the tail last."""
        if not self.blocks and self.tail is not None:
            return Rows(self.tail.keys, self.tail.values)
        parts = [block.rows() for block in self.blocks]
        if self.tail is not None:
            parts.append(self.tail.rows(self.seen))
        parts = [self._expanded(part) for part in parts]
        if len(parts) == 1:
            return parts[0]
        rope = None
        if any(part.rope is not None for part in parts):
            columns = [part.text_positions().new_full(part.keys.shape[:3], -1) for part in parts]
            ropes = [c if p.rope is None else p.rope for p, c in zip(parts, columns, strict=True)]
            rope = torch.cat(ropes, dim=2)
        carried = None
        if any(part.carried is not None for part in parts):
            nothing = [part.keys.new_full(part.keys.shape[:3], float("nan")) for part in parts]
            left = [
                n if p.carried is None else p.carried for p, n in zip(parts, nothing, strict=True)
            ]
            carried = torch.cat([x.float() for x in left], dim=2)
        return Rows(
            keys=torch.cat([part.keys for part in parts], dim=2),
            values=torch.cat([part.values for part in parts], dim=2),
            positions=torch.cat([part.text_positions() for part in parts], dim=2),
            full=all(part.full for part in parts),
            rope=rope,
            carried=carried,
        )

    def attend(self, query: Tensor, mask: TextMask, rule: AttentionRule) -> Tensor:
        """Attention of ``query [B, H * G, n, D]`` over everything, ``[B, n, H * G, E]``.

        The rows of the tail end with those of the queries. Rows that sequences share are read
        once for all of them.
        """
        b, hq, n, d = query.shape
        bias = mask.of_rows(self.start, self.known)
        parts: list[Part] = [block.part(bias) for block in self.blocks]
        if self.tail is not None:
            parts.append(self.tail.part(mask.of_columns(self.start, self.seen, query.device)))
        grouped = query.reshape(b, self.heads, hq // self.heads, n, d)
        out = ragged_attention(grouped, parts, rule)
        return out.view(b, hq, n, -1).transpose(1, 2).to(query.dtype).contiguous()

    def _expanded(self, rows: Rows) -> Rows:
        """A shared table as one of every sequence."""
        if rows.keys.shape[0] == self.batch:
            return rows
        columns = {"keys": rows.keys, "values": rows.values}
        columns |= {"positions": rows.positions, "rope": rows.rope, "carried": rows.carried}
        return replace(
            rows,
            **{k: x.expand(self.batch, *x.shape[1:]) for k, x in columns.items() if x is not None},
        )
