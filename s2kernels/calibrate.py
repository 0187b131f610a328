"""What a calibration set says about heads and channels: activations and gradients, in squares.

Both are sums over the set divided once at the end, so neither batches nor processes matter. The
model is only borrowed: see `s2kernels.observe.borrowed`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2kernels.architectures import Member, is_bias, is_weight
from s2kernels.autograd.experts import Routing
from s2kernels.coupling import Structure, structures
from s2kernels.observe import (
    Observer,
    Target,
    borrowed,
    layer_of,
    observed,
    observed_experts,
    observed_gradients,
)

# What a model is called with: its keyword arguments (a dict, a BatchEncoding), or input_ids alone.
Batch: TypeAlias = Mapping[str, Any] | Tensor


def activation_squares(
    model: nn.Module, batches: Iterable[Batch], *, progress: bool = True
) -> dict[str, Tensor]:
    """Mean over the tokens of the squared norm of each unit's share of the coupled activation.

    The coupled activation x (tokens, K) is the input of the structure's in-slice projection:

        squares[u] = 1 / tokens * sum over tokens t, channels k of unit u of x[t, k]^2

    Tokens whose attention_mask is 0 are left out. To an expert, x[t] is zero for the tokens that
    do not go to it. Arguments, answer and errors as in `s2kernels.select.scores`.
    """
    found = structures(model).values()
    targets = [(s, m) for s in found for m in s.members if m.dim == "in" and not is_bias(m)]
    means = _Means(model, targets)
    # of the present batch: its tokens, and which of them are no padding
    num_tokens, rows = 0, torch.empty(0)

    def observer(structure: Structure, member: Member) -> Observer:
        def on_output(x: Tensor, y: Tensor) -> None:
            x = x.detach().flatten(0, -2)
            if len(x) != num_tokens:
                raise ValueError(
                    f"{structure.name}: an activation of {num_tokens} tokens wanted, that of "
                    f"{member.suffix} has {len(x)}"
                )
            means.add(structure, member, _squared_norms(x[rows], axis=1))

        return on_output

    def on_experts(structure: Structure, member: Member, x: Tensor, routing: Routing) -> None:
        counts = torch.zeros(num_tokens, dtype=torch.bool, device=x.device)
        counts[rows] = True
        counts = counts[routing.order // routing.experts_per_token]
        starts = (0, *routing.ends)
        parts = [slice(start, end) for start, end in zip(starts, routing.ends, strict=False)]
        squares = [_squared_norms(x[part][counts[part]], axis=1) for part in parts]
        means.add(structure, member, torch.cat(squares))

    linear = [target for target in targets if is_weight(target[1])]
    bare = [target for target in targets if not is_weight(target[1])]
    with (
        borrowed(model),
        torch.no_grad(),
        observed(model, linear, observer),
        observed_experts(model, bare, on_experts),
    ):
        for inputs in _inputs(model, batches, progress):
            real = _is_real(inputs).flatten()
            num_tokens, rows = len(real), real.nonzero().flatten()
            model(**inputs)
            means.count += len(rows)
    return means.over_all_processes()


def gradient_squares(
    model: nn.Module, batches: Iterable[Batch], *, progress: bool = True
) -> dict[str, Tensor]:
    """Mean over the sequences of the squared norm of each unit's share of the weight gradients.

        squares[u] = 1 / sequences * sum over sequences s, coupled weights W of
                     || d loss_s / d W restricted to u ||_F^2

    loss_s is what the model returns for sequence s alone: of language models the mean over its
    tokens. Sequences are therefore run one at a time, whatever the batches. Without labels a
    causal model's are its input_ids, without padding and what follows it.

    No gradient of a linear layer's weight ever exists, not even of one: see `_column_squares`.
    Gradients of expert tensors exist for one layer at a time. Arguments, answer and errors as in
    `s2kernels.select.scores`.
    """
    found = structures(model).values()
    targets = [(s, m) for s in found for m in s.members if not is_bias(m)]
    means = _Means(model, targets)

    def observer(structure: Structure, member: Member) -> Observer:
        def on_output(x: Tensor, y: Tensor) -> None:
            if not y.requires_grad:  # nothing is trained: back-propagation ends at the first layer
                y.requires_grad_()
            kept = [x.detach()]  # popped, so that the activation goes as soon as it was used

            def on_gradient(dy: Tensor) -> None:
                factors = kept.pop(), dy.detach()
                left, right = factors if member.dim == "out" else reversed(factors)
                means.add(structure, member, _column_squares(left, right))

            y.register_hook(on_gradient)

        return on_output

    def on_dense_gradient(structure: Structure, member: Member, gradient: Tensor) -> None:
        means.add(structure, member, channel_squares(structure, member, gradient))

    bare = [target for target in targets if not is_weight(target[1])]
    with (
        borrowed(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        observed(model, [target for target in targets if is_weight(target[1])], observer),
        observed_gradients(model, bare, on_dense_gradient),
    ):
        for inputs in _inputs(model, batches, progress):
            for sequence in _sequences(_with_labels(model, inputs)):
                _loss(model, sequence).backward()
                means.count += 1
    return means.over_all_processes()


def channel_squares(structure: Structure, member: Member, value: Tensor) -> Tensor:
    """The squared norm of what lies at each channel of `member`'s axis in `value`, which has the
    shape of the parameter: fp64, (size,), of experts (num_experts * size,).
    """
    if structure.kind == "experts":
        return torch.cat([_squared_norms(expert, member.axis - 1) for expert in value])
    return _squared_norms(value, member.axis)


def per_unit(structure: Structure, member: Member, squares: Tensor) -> Tensor:
    """Sums of `channel_squares` over the channels of each query head or FFN channel.

    A KV head counts for each of the query heads that read it.
    """
    wanted = structure.num_experts * structure.size(member)
    if squares.shape != (wanted,):
        raise ValueError(
            f"{structure.name}.{member.suffix}: {wanted} channels wanted, got {len(squares)}"
        )
    if structure.kind == "attention":
        heads = torch.arange(structure.num_heads, device="cpu").split(1)
        return torch.stack([squares[structure.channels(member, h).long()].sum() for h in heads])
    return squares.view(structure.num_experts, len(member.units), -1).sum(1).flatten()


class _Means:
    """Sums over all that was seen of squares along the channels of `targets`, and how much it was.

    They are fp64 and stay on the device until the end: a transfer would wait for the forward.
    """

    def __init__(self, model: nn.Module, targets: list[Target]) -> None:
        self.count = 0
        self._model, self._targets = model, targets
        self._sums: dict[tuple[str, str], Tensor] = {}

    def add(self, structure: Structure, member: Member, squares: Tensor) -> None:
        """Add squares along the member's channels, fp64."""
        key = structure.name, member.suffix
        self._sums[key] = self._sums[key] + squares if key in self._sums else squares

    def over_all_processes(self) -> dict[str, Tensor]:
        """Sums / count by structure and unit, in the original basis, fp64 on the CPU."""
        sums = []
        for structure, member in self._targets:
            own = self._sums.get((structure.name, member.suffix))
            if own is None and self.count:
                raise ValueError(
                    f"{structure.name}.{member.suffix} took no part in any run of the model, or an "
                    "adapter hides it, so nothing is known about it; strategy 'weight' needs no run"
                )
            empty = torch.zeros(structure.num_experts * structure.size(member), device="cpu")
            sums.append(empty.double() if own is None else own.cpu())
        count = torch.tensor([self.count], dtype=torch.float64, device="cpu")
        total = torch.cat([count, *sums])
        if dist.is_available() and dist.is_initialized():
            total = total.to(_device(self._model))  # NCCL takes no CPU tensors
            dist.all_reduce(total)
            total = total.cpu()
        if total[0] == 0:
            raise ValueError(
                "batches: model inputs with at least one token wanted, got an empty iterable"
            )
        parts = (total[1:] / total[0]).split([len(own) for own in sums])
        means: dict[str, Tensor] = {}
        for (structure, member), part in zip(self._targets, parts, strict=True):
            units = per_unit(structure, member, part)
            means[structure.name] = means.get(structure.name, 0) + units
        found = {structure.name: structure for structure, _ in self._targets}
        return {name: _in_original_basis(self._model, found[name], means[name]) for name in means}


def _squared_norms(value: Tensor, axis: int) -> Tensor:
    """The squared norm of each row (axis 0) or column (axis 1) of a matrix, fp64."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    return torch.linalg.vector_norm(value, dim=1 - axis, dtype=dtype).double().square()


def _column_squares(left: Tensor, right: Tensor) -> Tensor:
    """The squared norm of each column of G = leftᵀ right, fp64 (R,), without G.

    left   (..., L), right (..., R), over the same M tokens: x and dy, or dy and x

    A weight's gradient has as many entries as the weight; this needs M * M and M * (L + R):

        || G[:, r] ||^2 = right[:, r]ᵀ (left leftᵀ) right[:, r]
    """
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    left, right = left.flatten(0, -2).to(dtype), right.flatten(0, -2).to(dtype)
    return (right * (left @ left.t() @ right)).sum(0).clamp_(min=0).double()


def _inputs(model: nn.Module, batches: Iterable[Batch], progress: bool) -> Iterator[dict[str, Any]]:
    """The keyword arguments of `model` for each batch, on its device."""
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(
            f"batches: an iterable of model inputs wanted, got one {type(batches).__name__}; "
            "put it into a list"
        )
    device = _device(model)
    for position, batch in enumerate(_with_progress(batches, progress)):
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batches: item {position} must be a mapping of tensors or a tensor of input_ids, "
                f"got {type(batch).__name__}"
            )
        main = _main_input(batch)
        if not isinstance(main, Tensor) or main.ndim < 2:
            got = tuple(main.shape) if isinstance(main, Tensor) else type(main).__name__
            raise ValueError(
                f"batches: item {position} must hold input_ids (batch, length) or inputs_embeds, "
                f"got {got}"
            )
        mask = batch.get("attention_mask")
        if mask is not None and getattr(mask, "shape", None) != main.shape[:2]:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"batches: item {position} must have an attention_mask of shape "
                f"{tuple(main.shape[:2])}, got {got}"
            )
        yield {
            key: value.detach().to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


def _main_input(inputs: Mapping[str, Any]) -> Any:
    ids = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if ids is None else ids


def _is_real(inputs: Mapping[str, Any]) -> Tensor:
    """bool (batch, length): which tokens are no padding."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask != 0
    main = _main_input(inputs)
    return torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)


def _with_labels(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    if inputs.get("labels") is not None:
        return inputs
    config: Any = getattr(model, "config", None)
    generates: Any = getattr(model, "can_generate", lambda: False)
    if not generates() or getattr(config, "is_encoder_decoder", False) or "input_ids" not in inputs:
        raise ValueError(
            "batches: strategy 'gradient' needs labels, or input_ids and a causal language model "
            f"to make them; got {', '.join(inputs)} for a {type(model).__name__}"
        )
    # The model predicts each token but the first from the one before, which may be padding.
    real = _is_real(inputs)
    counts = real & real.roll(1, dims=1)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~counts, -100)}


def _sequences(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of each sequence of a batch, as batches of one."""
    num_sequences = len(_main_input(inputs))
    for row in range(num_sequences):
        yield {
            key: value[row : row + 1]
            if isinstance(value, Tensor) and value.ndim and len(value) == num_sequences
            else value
            for key, value in inputs.items()
        }


def _loss(model: nn.Module, sequence: dict[str, Any]) -> Tensor:
    loss = getattr(model(**sequence), "loss", None)
    if not isinstance(loss, Tensor) or not torch.isfinite(loss):
        got = loss.item() if isinstance(loss, Tensor) else loss
        raise ValueError(
            "batches: a finite loss wanted of every sequence, which takes at least one label that "
            f"counts; got {got}"
        )
    return loss


def _with_progress(batches: Iterable[Batch], progress: bool) -> Iterable[Batch]:
    if not progress or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:  # a bar is no reason to fail
        return batches
    return tqdm(batches, desc="calibration", unit="batch")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _in_original_basis(model: nn.Module, structure: Structure, units: Tensor) -> Tensor:
    """S2FT layers may run their structure in a working basis, whose order their keeper knows."""
    for member in structure.members:
        layer: Any = layer_of(model, structure, member)
        arrangement = getattr(getattr(layer, "keeper", None), "arrangement", None)
        permutations = getattr(arrangement, "permutations", {})
        own = getattr(layer, "structure", None)
        if own is not None and (permutation := permutations.get(own.name)):
            return torch.empty_like(units).index_copy_(0, permutation.orders[structure.unit], units)
    return units
