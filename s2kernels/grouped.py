"""The ops of many adapters in one batch in plain torch: their part of `s2kernels.reference`.

Sizes: M tokens, N out_features, K in_features; a pool (P, N) of in-slices or (P, K) of out-slices.
For every token m of a group, over the entries e of that group (`s2kernels.groups.Groups`),

    grouped_in_    y[m, :]           += sum over e of x[m, channels[e]] pool[rows[e], :]
    grouped_out_   y[m, channels[e]] += pool[rows[e], :] · x[m, :]

Tokens of no group are left as they are, bit for bit. `s2kernels.kernels` holds the same names and
signatures in Triton.
"""

import torch
from torch import Tensor

from s2kernels.groups import Bags, Groups

_SUM = 0  # the mode of an embedding bag

# The gradient of an embedding bag's weights is each row times its bag's vector, without a copy of
# the rows. Not a public op of torch: without it the rows are copied.
_ROW_DOTS = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)


def grouped_in_(y: Tensor, x: Tensor, pool: Tensor, groups: Groups) -> Tensor:
    """Add the in-slices of the groups' adapters to y (M, N), in place; x (M, K), pool (P, N).

    All of one dtype. Returns y. Not differentiable. Waits for the device, which knows the groups;
    the kernel does not.
    """
    if not groups.widest:
        return y
    bags, products = groups.parts(pool.shape[1])
    if bags is not None:
        layout = bags.layout
        # What F.embedding_bag calls, without its checks in Python.
        sums, *_ = torch.embedding_bag(
            pool, bags.rows, layout.offsets, False, _SUM, False, x.take(bags.places(x.shape[1]))
        )
        if layout.num_tokens == y.shape[0]:  # all of them, ascending
            y.add_(sums)
        else:
            y.index_add_(0, layout.tokens, sums)
    for product in products:
        part = _take(x, product.tokens).index_select(1, product.channels)
        if isinstance(product.tokens, slice):
            y[product.tokens].addmm_(part, _take(pool, product.rows))
        else:
            y.index_add_(0, product.tokens, part @ _take(pool, product.rows))
    return y


def grouped_out_(y: Tensor, x: Tensor, pool: Tensor, groups: Groups) -> Tensor:
    """Add the out-slices of the groups' adapters to y (M, N), in place; x (M, K), pool (P, K).

    As `grouped_in_`.
    """
    if not groups.widest:
        return y
    bags, products = groups.parts()
    if bags is not None:
        y.index_put_((bags.layout.token, bags.channels), _dots(x, pool, bags), accumulate=True)
    for product in products:
        part = _take(x, product.tokens) @ _take(pool, product.rows).t()
        if isinstance(product.tokens, slice):
            y[product.tokens].index_add_(1, product.channels, part)
        else:
            rows = y.index_select(0, product.tokens).index_add_(1, product.channels, part)
            y.index_copy_(0, product.tokens, rows)
    return y


def _dots(x: Tensor, pool: Tensor, bags: Bags) -> Tensor:
    """(S,): each row of the pool times the vector of its token."""
    layout = bags.layout
    if _ROW_DOTS is None:
        return (pool.index_select(0, bags.rows) * x.index_select(0, layout.token)).sum(1)
    x = x if layout.num_tokens == len(x) else x.index_select(0, layout.tokens)
    return _ROW_DOTS(x, pool, bags.rows, layout.offsets, layout.bag, 0, -1)


def _take(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)
