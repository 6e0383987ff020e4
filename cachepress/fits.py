"""Fits what presses learn of a model, from tensors: regressions, gates and budget curves."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.presses import fastkvzip

Tensors = dict[str, Tensor]
_RIDGE = 1e-2
_LOOK = 10
"""Steps of descent from one look at the rows that are held out to the next."""


def fit_linear(hidden: Tensor, targets: Tensor) -> Tensors:
    """Fit a ridge regression of ``targets [N, H]`` on ``hidden [N, M]``: weight and bias."""
    centre, middle = hidden.mean(0), targets.mean(0)
    x, y = (hidden - centre).double(), (targets - middle).double()
    scale = x.square().sum() / x.shape[1]
    gram = x.mT @ x + _RIDGE * scale * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.mT @ y).mT.float()
    return {"weight": weight, "bias": middle - weight @ centre}


def descend(
    parameters: Tensors,
    loss: Callable[[Tensors, Tensor], Tensor],
    rows: int,
    steps: int,
    seed: int,
    decay: float = 0.0,
) -> Tensors:
    """Fit parameters by AdamW on batches of rows, with a learning rate that falls to zero.

    The last tenth of the rows, which are those of other windows, is held out: of the parameters
    along the way, those are taken that fit them best.
    """
    learned = {name: x.clone().requires_grad_() for name, x in parameters.items()}
    optimizer = torch.optim.AdamW(learned.values(), lr=3e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    fitted = rows - rows // 10
    held = torch.arange(fitted if fitted < rows else 0, rows)
    least, found = float("inf"), parameters
    for step in range(1, steps + 1):
        batch = torch.randint(fitted, (min(fitted, 512),), generator=generator)
        optimizer.zero_grad()
        loss(learned, batch).backward()
        optimizer.step()
        schedule.step()
        if step % _LOOK == 0 or step == steps:
            with torch.no_grad():
                now = float(loss(learned, held))
            if now < least:
                least, found = now, {name: x.detach().clone() for name, x in learned.items()}
    return found


def fit_mlp(hidden: Tensor, targets: Tensor, steps: int, seed: int) -> Tensors:
    """Fit an MLP of two layers with a GELU: ``0.weight``, ``0.bias``, ``2.weight``, ``2.bias``.

    Hidden states and targets are standardised for the descent; the result takes them as they are.
    """
    m, n = hidden.shape[1], max(1, hidden.shape[1] // 8)
    centre, width = hidden.mean(0), hidden.std(0).clamp(min=1e-6)
    middle, spread = targets.mean(0), targets.std(0).clamp(min=1e-6)
    x, y = (hidden - centre) / width, (targets - middle) / spread
    generator = torch.Generator().manual_seed(seed)
    start = {
        "0.weight": torch.randn(n, m, generator=generator) / m**0.5,
        "0.bias": torch.zeros(n),
        "2.weight": torch.randn(targets.shape[1], n, generator=generator) / n**0.5,
        "2.bias": torch.zeros(targets.shape[1]),
    }

    def loss(learned: Tensors, batch: Tensor) -> Tensor:
        inner = F.gelu(F.linear(x[batch], learned["0.weight"], learned["0.bias"]))
        return F.mse_loss(F.linear(inner, learned["2.weight"], learned["2.bias"]), y[batch])

    found = descend(start, loss, len(x), steps, seed, decay=1.0)
    first = found["0.weight"] / width
    return {
        "0.weight": first,
        "0.bias": found["0.bias"] - first @ centre,
        "2.weight": found["2.weight"] * spread[:, None],
        "2.bias": found["2.bias"] * spread + middle,
    }


def fit_gate(hidden: Tensor, targets: Tensor, groups: int, steps: int, seed: int) -> Tensors:
    """Fit a gate of Fast KVzip for ``targets [N, H]``, from 0 to 1, by cross-entropy."""
    m, h, d, n_base = hidden.shape[1], targets.shape[1], 16, 16
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    start = {
        "q_weight": drawn(h * groups * d, m),
        "q_bias": torch.zeros(h * groups * d),
        "k_weight": drawn(h * d, m),
        "q_norm": torch.ones(d),
        "k_norm": torch.ones(d),
        "base": drawn(h, n_base, d),
        "bias": torch.zeros(h, groups),
    }

    def loss(learned: Tensors, batch: Tensor) -> Tensor:
        guess = fastkvzip.gate(hidden[batch].unsqueeze(0), learned)[0].mT
        return F.binary_cross_entropy(guess.clamp(1e-6, 1 - 1e-6), targets[batch])

    return descend(start, loss, len(hidden), steps, seed)


def budget_curve(gains: Tensor) -> Tensor:
    """Compute the fractions of pairs that heads keep at ratios 0.01 to 0.99, ``[99, L, H]``.

    Args:
        gains: ``[L, H, 100]`` what each further hundredth of its rows is worth to a head.
    """
    layers, h, n = gains.shape
    flat = _falling(gains).flatten()
    order = flat.argsort(descending=True, stable=True)
    curve = torch.zeros(99, layers * h)
    for percent in range(1, 100):
        chosen = order[: (100 - percent) * layers * h * n // 100] // n
        curve[percent - 1] = torch.bincount(chosen, minlength=layers * h) / n
    return curve.view(99, layers, h)


def _falling(gains: Tensor) -> Tensor:
    """Compute the slopes of the concave majorant of the running sums of ``gains [..., n]``."""
    sums = F.pad(gains.double().cumsum(-1), (1, 0)).flatten(0, -2)
    slopes = torch.empty_like(sums[:, 1:])
    for row, total in zip(slopes, sums, strict=True):
        start, n = 0, len(total) - 1
        while start < n:
            steps = torch.arange(1, n - start + 1, dtype=total.dtype)
            rise = (total[start + 1 :] - total[start]) / steps
            stop = start + 1 + int(rise.argmax())
            row[start:stop] = rise.max()
            start = stop
    return slopes.view_as(gains).float()
