"""Whether the tensors that PEFT loads for an adapter are those that were saved, and all land."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2kernels.adapter import PREFIX
from s2kernels.digests import check_loaded
from s2kernels.peft.host.config import AdapterConfig


def check_tensors(
    prefix: str,
    model: nn.Module,
    config: AdapterConfig,
    adapter: str,
    given: Mapping[str, Tensor],
    loaded: Mapping[str, Tensor],
) -> None:
    """Raises ValueError for tensors that are not those of the adapter, before any is loaded.

    prefix: of the method's tensors, as "s2ft_". given: the tensors by their names in the file;
    loaded: by their names in the model, where it has them.

    Without digests the tensors may be some of the adapter's, but each must have its place. With
    them all must be there. The digests are those of one file: the first tensors are held to them,
    then they are gone.
    """
    own = {name for name in model.state_dict() if name.endswith(f".{adapter}")}
    own = {name for name in own if f".{prefix}" in name}
    lost = sorted(name for name in loaded if f".{prefix}" in name and name not in own)
    where = f"the adapter {adapter!r}"
    if config.digests is not None:
        expected = {name.removeprefix(PREFIX): value for name, value in config.digests.items()}
        tensors = {name.removeprefix(PREFIX): value for name, value in given.items()}
        check_loaded(where, expected, tensors)
    if lost:
        raise ValueError(
            f"{where} does not fit: the model has no place for {', '.join(lost[:3])}"
            + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        )
    if config.digests is not None:
        if absent := sorted(own - loaded.keys()):
            raise ValueError(
                f"{where} is damaged or incomplete: {', '.join(absent[:3])} "
                f"{'is' if len(absent) == 1 else 'are'} missing, {len(absent)} in all"
            )
        config.digests = None


def as_integers(model: nn.Module, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, by their names in the model, with whole numbers where its buffers have them: the
    average of several adapters' indices is floating.

    Raises ValueError where they are no whole numbers.
    """
    found = dict(loaded)
    for name, buffer in model.named_buffers():
        value = found.get(name)
        if value is None or buffer.is_floating_point() or not value.is_floating_point():
            continue
        found[name] = value.round().to(buffer.dtype)
        if not torch.allclose(found[name].to(value.dtype), value, rtol=1e-6, atol=1e-3):
            raise ValueError(
                f"{name} must be whole numbers: if it is an average, the adapters did not train "
                "the same entries"
            )
    return found
