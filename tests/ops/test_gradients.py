import pytest
import torch

import cachepress as cp
from cachepress.ops import backward_task, following, storing, without_gradient


def test_a_lost_gradient_is_told_in_backward_and_nowhere_else():
    x = torch.arange(3.0, requires_grad=True)
    lost = without_gradient(x * 2, "there is none: do this")
    assert torch.equal(lost, torch.tensor([0.0, 2.0, 4.0])) and lost.requires_grad
    other = torch.ones(3, requires_grad=True)
    (ours,) = torch.autograd.grad((lost * other).sum(), other)
    assert torch.equal(ours, torch.tensor([0.0, 2.0, 4.0]))
    with pytest.raises(cp.CachepressError, match="^there is none: do this$"):
        (lost * other).sum().backward()


def test_a_lost_gradient_holds_no_graph():
    x = torch.ones(3, requires_grad=True)
    (middle,) = [x * 2]
    node = middle.grad_fn
    lost, todo = without_gradient(middle, "why"), []
    todo.append(lost.grad_fn)
    while todo:
        here = todo.pop()
        assert here is not node
        todo += [parent for parent, _ in here.next_functions if parent is not None]


def test_what_is_part_of_a_graph_stays_so_without_grad_mode():
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        with following(x):
            assert (x * 2).requires_grad
        with following(x.detach()):
            assert not (x * 2).requires_grad
    with torch.enable_grad(), following(x.detach()):
        assert (x * 2).requires_grad


def test_what_is_stored_in_inference_mode_is_an_ordinary_tensor():
    @storing
    def double(x):
        assert not torch.is_grad_enabled()
        return x * 2

    with torch.inference_mode():
        assert not double(torch.ones(3)).is_inference()
    learned = torch.ones(3, requires_grad=True)
    assert storing(lambda x: x * 2)(learned).requires_grad


def test_which_backward_is_under_way():
    seen = []

    class Tell(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(backward_task())
            return gradient

    assert backward_task() is None
    for _ in range(2):
        Tell.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert None not in seen and seen[0] != seen[1]
