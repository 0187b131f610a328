"""Mixed batches: which adapter each row that reaches a layer takes, and what it adds there.

    y[row] += x[row][:, index] deltaᵀ    in-slice of the row's adapter
    y[row][:, index] += x[row] deltaᵀ    out-slice

One adapter after the other where gradients are wanted, and in the first forward of a batch. What
`generate` computes after that, token by token, is one grouped op a layer (`s2kernels.groups`), for
which the slices of all adapters are copied into one pool.
"""

from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.autograd.linear import delta_linear
from s2kernels.groups import Groups, TokenOrder, order_tokens
from s2kernels.reference import Index

Part = tuple[Tensor, Index]  # a delta, and where its channels lie


class Rows(list[str]):
    """The adapter of each row of a batch, "__base__" for none. A beam search repeats each row
    `beams` times: for a decoder, not for an encoder.

    It lives as long as the call that has the batch: no adapter changes meanwhile.
    """

    def __init__(self, names: list[str], beams: int = 1) -> None:
        super().__init__(names)
        self.beams = beams
        self._seen: set[nn.Module] = set()
        self._pools: dict[nn.Module, _Pool] = {}
        self._orders: dict[tuple, TokenOrder] = {}

    def of(self, x: Tensor, joined: bool = False) -> list[str]:
        """The adapter of each row of x. joined: x (M, K) may have the tokens of a row one after the
        other, as in the FFN of OPT.

        Raises ValueError for an x whose rows are not those of the batch.
        """
        times, rest = divmod(len(x), len(self)) if self else (0, len(x))
        if rest or not (times in (1, self.beams) or (joined and x.ndim == 2 and times)):
            raise ValueError(
                f"adapter_names must name an adapter for each of the {len(x)} rows of the batch, "
                f"got {len(self)}"
            )
        return [name for name in self for _ in range(times)]

    def add(
        self, y: Tensor, x: Tensor, layer: nn.Module, dim: str, names: list[str], parts: dict
    ) -> Tensor:
        """y (..., N) of the base layer with what the adapters of its rows add for x (..., K).

        names are those of the rows of x; parts, by name, the `Part` of each adapter that trains the
        layer. May write into y.
        """
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or y.requires_grad or any(d.requires_grad for d, _ in parts.values())
        )
        if needs_grad or x.dtype != y.dtype or layer not in self._seen:
            self._seen.add(layer)
            return _one_by_one(y, x, dim, names, parts, in_place=not needs_grad)
        pool = self._pools.get(layer)
        if pool is None:
            pool = self._pools[layer] = _Pool(dim, parts, x)
        flat = y.reshape(-1, y.shape[-1])
        ops = backend.select(x)
        op = ops.grouped_in_ if dim == "in" else ops.grouped_out_
        op(flat, x.reshape(-1, x.shape[-1]), pool.rows, self._groups_of(pool, names, x))
        return flat.view(y.shape)

    def _groups_of(self, pool: "_Pool", names: list[str], x: Tensor) -> Groups:
        size = len(x), x.numel() // max(1, x.shape[-1] * len(x))
        if size not in pool.groups:
            key = size, pool.names
            if key not in self._orders:
                number = {name: group for group, name in enumerate(pool.names)}
                of_row = torch.tensor([number.get(name, -1) for name in names])
                of_token = of_row.repeat_interleave(size[1])
                self._orders[key] = order_tokens(of_token, len(pool.names), x.device)
            pool.groups[size] = Groups(self._orders[key], *pool.entries)
        return pool.groups[size]


class _Pool:
    """The slices of all adapters of a layer: `rows` (E, N) of in-slices, (E, K) of out-slices.

    entries: the fields of `Groups`, but for the order of tokens. groups: by rows and their tokens.
    """

    def __init__(self, dim: str, parts: dict[str, Part], x: Tensor) -> None:
        self.names, device = tuple(parts), x.device
        deltas = [(d.t() if dim == "in" else d).detach() for d, _ in parts.values()]
        self.rows = torch.cat([d.to(device, x.dtype) for d in deltas])
        counts = torch.tensor([len(d) for d in deltas])
        ends = counts.cumsum(0)
        self.entries = (
            torch.stack([ends - counts, ends], 1).int().to(device),
            torch.arange(len(self.rows), dtype=torch.int32, device=device),
            torch.cat([_channels(where, device) for _, where in parts.values()]),
            max(map(len, deltas)),
        )
        self.groups: dict[tuple[int, int], Groups] = {}


def _channels(where: Index, device: torch.device) -> Tensor:
    if isinstance(where, slice):
        return torch.arange(where.start, where.stop, dtype=torch.int32, device=device)
    return where.int().to(device)


def _one_by_one(
    y: Tensor, x: Tensor, dim: str, names: list[str], parts: dict[str, Part], in_place: bool
) -> Tensor:
    for name, (delta, where) in parts.items():
        chosen = [row for row, wanted in enumerate(names) if wanted == name]
        index = torch.tensor(chosen, device=x.device)
        part = delta_linear(y[index], x[index], delta, where, dim)
        y = y.index_copy_(0, index, part) if in_place else y.index_copy(0, index, part)
    return y


def hook_whole_modules(model: nn.Module, rows: Rows) -> list[Any]:
    """Have the modules_to_save of `model` go by their rows, too, until the handles are removed."""

    def give(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        names = rows.of(args[0]) if args and isinstance(args[0], Tensor) else rows
        return args, kwargs | {"adapter_names": names}

    wrappers = (each for each in model.modules() if isinstance(each, AuxiliaryTrainingWrapper))
    return [wrapper.register_forward_pre_hook(give, with_kwargs=True) for wrapper in wrappers]
