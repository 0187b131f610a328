"""A whole training step behind one call, and on a GPU behind one launch: a CUDA graph.

    step = s2kernels.capture(model, optimizer)
    for batch in loader:
        loss = step(batch)

is this loop, to the bit:

    optimizer.zero_grad(); loss = model(**batch).loss; loss.backward(); optimizer.step()

Up to about a thousand tokens such a loop waits for Python: thousands of small launches,
each of them some microseconds of host time. A graph is all of them in one.

The first `warmup` steps on batches of a shape run as that loop does, and train. The next one is
recorded, which computes nothing, and the recording is replayed, for it and all that follow. So no
step is done in vain, and there is nothing to put back.

A recording reads and writes memory at fixed addresses, and leaves out what Python did beside it.
What it takes for granted of both is compared before each replay (`Premises`): after a state_dict,
which gives the base weights back, a disabled or another adapter, a model that was moved, or had a
part replaced, a recording no longer holds, and the shape begins anew.
"""

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from s2kernels.capturing import rehearsing
from s2kernels.causal_mask import no_needless_mask
from s2kernels.flat import FlatAdamW
from s2kernels.recording import Premises, Recorder, Recording

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]

# Each shape has a recording of its own, with gradients and a loss in memory of its own.
MAX_GRAPHS = 8

_DISTRIBUTED = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Loss | None = None,
    max_norm: float | None = None,
    warmup: int = 3,
) -> "CapturedStep":
    """The training step of `model` by `optimizer`, as a callable that takes a batch.

    loss:      of (model, batch), a scalar; model(**batch).loss by default
    max_norm:  gradients are clipped to this norm, as `torch.nn.utils.clip_grad_norm_` does
    warmup:    steps on batches of a shape that run, and train, before the shape is recorded

    On a GPU every parameter group of the optimizer must have capturable=True. Its lr becomes a
    tensor on the device, which schedulers and assignments of a number write to (make schedulers
    first: made from a tensor they wait for the device); another beta or weight decay makes the step
    record anew. On another device, and where the model is distributed or trained by SpIEL, whose
    entries change, the loop itself runs, and a warning says so.

    With `use_fast_ops` all steps, warm-ups included, compute the model's own cross entropy, and
    differ from a loop with liger-kernel's by rounding. Its logits are whole: tokens * vocabulary
    numbers, in the model's dtype and in fp32, and so is their gradient.

    What a recording cannot do is wait for the device: mixtures of experts do, which ask how many
    tokens each gets, and checkpoints with preserve_rng_state, which is True if not set. And
    transformers cannot look at numbers: replays of a step with an attention_mask, or without a
    cache with position_ids, compute a whole mask of (batch, 1, tokens, tokens), which Flash and
    cuDNN attention do not take, and differ from the loop by rounding. Give neither where no batch
    is padded or packed. Without them no mask is computed (`s2kernels.causal_mask`).

    Raises ValueError for an optimizer that cannot be captured or is scaled for fp16 (a GradScaler
    waits for the device in every step), a warmup below 1, a max_norm that is not positive, or that
    is given with a FlatAdamW(step_in_backward=True).
    """
    if warmup < 1:
        raise ValueError(f"warmup must be 1 at least, got {warmup}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if getattr(optimizer, "scaler", None) is not None:
        raise ValueError("optimizer must not be scaled: train in bf16, which needs no GradScaler")
    uses_up = isinstance(optimizer, FlatAdamW) and optimizer.step_in_backward
    if max_norm is not None and uses_up:
        raise ValueError("max_norm must be None with step_in_backward, which keeps no gradients")
    step = CapturedStep(model, optimizer, loss or _model_loss, max_norm, warmup)
    if step.obstacle is not None:
        warnings.warn(
            f"steps are not captured but run operation by operation: {step.obstacle}", stacklevel=2
        )
    return step


class CapturedStep:
    """What `capture` returns. Call it with a batch of tensors; it returns the loss, detached.

    The gradients of the step stay in `.grad` until the next one begins, also those of parameters
    that the optimizer lacks.

    replays   steps that were one launch
    eager     steps that ran as a loop does: warm-ups, and those of more than MAX_GRAPHS shapes
    obstacle  why no step is recorded here; None where steps are
    """

    # by what `_key` says of a batch: the recording, the batch that it reads, and the gradients
    _recordings: dict[
        tuple, tuple[Recording, dict[str, Tensor], list[tuple[Tensor, Tensor | None]]]
    ]
    _num_eager: dict[tuple, int]
    _premises: Premises | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        max_norm: float | None,
        warmup: int,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.replays = self.eager = 0
        self._loss, self._max_norm, self._warmup = loss, max_norm, warmup
        self._device = self._params[0].device
        self.obstacle = _obstacle(model, self._params)
        if self.obstacle is None:
            _check_capturable(optimizer)
            self._lrs = [self._rate(group["lr"]) for group in optimizer.param_groups]
            self._recorder = Recorder(self._device)
        self._forget()

    def __call__(self, batch: Batch) -> Tensor:
        """One step on `batch`: tensors by name, on any device.

        Raises TypeError for a batch of anything else; ValueError inside an autocast to fp16, whose
        gradients need a GradScaler, and where a loaded state took capturable=True from the
        optimizer; RuntimeError where the step does what no recording can, such as waiting for a
        number from the device. Nothing is trained then, nor where the memory does not suffice for
        a recording, which raises torch.OutOfMemoryError.
        """
        key = self._key(batch)
        if self.obstacle is not None:
            self.eager += 1
            return self._step(self._moved(batch))
        self._put_lrs()
        if self._premises is not None and not self._premises.hold():
            _check_capturable(self.optimizer)
            self._forget()
        if key not in self._recordings:
            if self._num_eager.get(key, 0) < self._warmup or len(self._recordings) >= MAX_GRAPHS:
                return self._step_eagerly(key, batch)
            self._record(key, batch)
        recording, inputs, grads = self._recordings[key]
        for name, x in batch.items():
            inputs[name].copy_(x, non_blocking=True)
        recording.replay()
        for p, grad in grads:
            p.grad = grad
        self.replays += 1
        return recording.result.clone()

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _key(self, batch: Batch) -> tuple:
        """What two batches of one recording have in common."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch must be tensors by name, got a {type(batch).__name__}")
        for name, x in batch.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"batch[{name!r}] must be a tensor, got a {type(x).__name__}")
        device = self._device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype == torch.float16:
            raise ValueError("autocast must not be to float16, which needs a GradScaler: use bf16")
        shapes = sorted((name, tuple(x.shape), str(x.dtype)) for name, x in batch.items())
        return dtype, *shapes

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        """What is run, or recorded. Returns the loss, detached."""
        self._drop_gradients()
        loss = self._loss(self.model, batch)
        loss.backward()
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self._params, self._max_norm)
        self.optimizer.step()
        return loss.detach()

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        # Those that it lacks, too: a recording would add to memory that others may give back.
        self.model.zero_grad()

    def _rate(self, lr: float | Tensor) -> Tensor:
        """What the recorded optimizer reads: the very tensor, if it is one that it can read."""
        if isinstance(lr, Tensor) and lr.device == self._device:
            return lr
        return torch.empty((), device=self._device)

    def _moved(self, batch: Batch) -> dict[str, Tensor]:
        return {name: x.to(self._device, non_blocking=True) for name, x in batch.items()}

    def _step_eagerly(self, key: tuple, batch: Batch) -> Tensor:
        with rehearsing():
            loss = self._recorder.run(lambda: self._step(self._moved(batch)))
        self.eager += 1
        self._num_eager[key] = self._num_eager.get(key, 0) + 1
        if self._premises is None:  # else it is compared with what the recordings began with
            self._premises = Premises(self.model, self.optimizer)
        if self._num_eager[key] == self._warmup + 1:
            warnings.warn(
                f"batches of {key[1:]} are not captured, since {MAX_GRAPHS} other shapes are: "
                "pad them to fewer lengths",
                stacklevel=3,
            )
        return loss

    def _record(self, key: tuple, batch: Batch) -> None:
        inputs = {name: x.to(self._device, copy=True) for name, x in batch.items()}
        self._drop_gradients()  # their memory must not be given back within the recording
        assert self._premises is not None
        try:
            with rehearsing(), no_needless_mask(self.model):
                recording = self._recorder.record(lambda: self._step(inputs))
        except BaseException as error:
            self._premises.put_back()
            self._forget()
            for p in self._params:  # never written
                p.grad = None
            if isinstance(self.optimizer, FlatAdamW):
                self.optimizer.forget_backward()
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise
            raise RuntimeError(
                "the step cannot be captured: a model, a loss or an optimizer must not wait for a "
                f"number from the device, nor copy from pageable memory ({error})"
            ) from error
        trained = [p for p in self.model.parameters() if p.requires_grad]
        grads = [(p, p.grad) for p in dict.fromkeys([*self._params, *trained])]
        self._recordings[key] = recording, inputs, grads

    def _put_lrs(self) -> None:
        """The recorded optimizer reads its rates from tensors; others may have been assigned."""
        if len(self._lrs) != len(self.optimizer.param_groups):
            raise ValueError("optimizer was given another parameter group: call capture() anew")
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            if group["lr"] is not lr:
                lr.fill_(group["lr"])
                group["lr"] = lr

    def _forget(self) -> None:
        self._recordings = {}
        self._num_eager = {}
        self._premises = None


def _model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(**batch).loss
    if loss is None:
        raise ValueError("the model returned no loss: give labels in the batch, or capture(loss=)")
    return loss


def _obstacle(model: nn.Module, params: list[Tensor]) -> str | None:
    """Why no step of the model can be recorded, or may not; None if it can."""
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        return f"what is trained lies on several devices, {', '.join(devices)}"
    if params[0].device.type != "cuda":
        return f"what is trained lies on the device {devices[0]}"
    if any(isinstance(module, _DISTRIBUTED) for module in model.modules()):
        return "the model is distributed"
    if any("spiel_" in name for name, _ in model.named_parameters()):
        return "SpIEL replaces entries between steps"
    return None


def _check_capturable(optimizer: torch.optim.Optimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        if not group.get("capturable"):
            kind = type(optimizer).__name__
            raise ValueError(
                f"optimizer must have capturable=True in every parameter group, got a {kind} "
                f"without it in group {i}: torch.optim.AdamW(..., fused=True, capturable=True)"
            )
