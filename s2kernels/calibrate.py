"""What a calibration set says about heads and channels: activations and gradients, in squares.

Both are sums over the set divided once at the end, so neither batches nor processes matter. The
model is only borrowed: see `borrowed`.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2kernels.architectures import Member, is_weight
from s2kernels.coupling import Structure, parameter, structures

# What a model is called with: its keyword arguments (a dict, a BatchEncoding), or input_ids alone.
Batch: TypeAlias = Mapping[str, Any] | Tensor

Target: TypeAlias = tuple[Structure, Member]
Observer: TypeAlias = Callable[[Tensor, Tensor], None]


def activation_squares(
    model: nn.Module, batches: Iterable[Batch], *, progress: bool = True
) -> dict[str, Tensor]:
    """Mean over the tokens of the squared norm of each unit's share of the coupled activation.

    The coupled activation x (tokens, K) is the input of the structure's in-slice projection:

        squares[u] = 1 / tokens * sum over tokens t, channels k of unit u of x[t, k]^2

    Tokens whose attention_mask is 0 are left out. So are the activations of experts, which no
    module sees. Arguments, answer and errors as in `s2kernels.select.scores`.
    """
    found = structures(model).values()
    targets = [(s, m) for s in found for m in s.members if is_weight(m) and m.dim == "in"]
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

    with borrowed(model), torch.no_grad(), _observed(model, targets, observer):
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
    targets = [(s, m) for s in found for m in s.members if not m.suffix.endswith(".bias")]
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

    with (
        borrowed(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        _observed(model, [target for target in targets if is_weight(target[1])], observer),
        _bare_parameters(model, [target for target in targets if not is_weight(target[1])], means),
    ):
        for inputs in _inputs(model, batches, progress):
            for sequence in _sequences(_with_labels(model, inputs)):
                _loss(model, sequence).backward()
                means.count += 1
    return means.over_all_processes()


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode and none of its parameters requires a gradient.

    Afterwards, also after an exception, the training mode of every module, requires_grad of every
    parameter and the random states of torch (CPU and CUDA) and Python are what they were.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [value for value in model.parameters() if value.requires_grad]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    random_state = random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for module in training:  # not eval(): that changes the children too
                module.training = False
            for value in trainable:
                value.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for value in trainable:
                value.requires_grad_(True)
            random.setstate(random_state)


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
                    f"{structure.name}.{member.suffix} took no part in any run of the model, so "
                    "nothing is known about it; strategy 'weight' needs no run"
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


@contextmanager
def _observed(
    model: nn.Module, targets: list[Target], observer: Callable[[Structure, Member], Observer]
) -> Iterator[None]:
    """Inside, every input x and output y of the linear layers `targets` go to their observers."""

    def hook(observe: Observer) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, args, y: observe(args[0], y)

    with ExitStack() as stack:
        for structure, member in targets:
            # The tuner layer, if one is there: it need not call the layer that it wraps, and input
            # and output are the same.
            layer = _layer(model, structure, member)
            handle = layer.register_forward_hook(hook(observer(structure, member)))
            stack.callback(handle.remove)
        yield


@contextmanager
def _bare_parameters(model: nn.Module, targets: list[Target], means: _Means) -> Iterator[None]:
    """Inside, the gradient of each of the expert tensors `targets` goes to `means`, and then goes.

    Nobody sees the inputs and outputs of experts, whose weights are slices of one tensor.
    """

    def hook(structure: Structure, member: Member) -> Callable[[Tensor], None]:
        def on_gradient(value: Tensor) -> None:
            if value.grad is not None:
                means.add(structure, member, channel_squares(structure, member, value.grad))
            value.grad = None

        return on_gradient

    with ExitStack() as stack:
        for structure, member in targets:
            value = parameter(model, structure, member)
            stack.callback(setattr, value, "grad", value.grad)
            stack.callback(value.requires_grad_, False)
            value.grad = None
            value.requires_grad_()
            handle = value.register_post_accumulate_grad_hook(hook(structure, member))
            stack.callback(handle.remove)
        yield


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


def _layer(model: nn.Module, structure: Structure, member: Member) -> nn.Module:
    """The module that holds `member`, or the tuner layer around it."""
    return model.get_submodule(f"{structure.name}.{member.suffix}".rpartition(".")[0])


def _in_original_basis(model: nn.Module, structure: Structure, units: Tensor) -> Tensor:
    """S2FT layers may run their structure in a working basis, whose order their keeper knows."""
    for member in structure.members:
        layer: Any = _layer(model, structure, member)
        permutations = getattr(getattr(layer, "base_weights", None), "permutations", {})
        if permutation := permutations.get(getattr(layer, "structure", None)):
            return torch.empty_like(units).index_copy_(0, permutation.orders[structure.unit], units)
    return units
