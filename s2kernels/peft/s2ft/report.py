"""What an S2FT model trains, layer by layer."""

from torch import nn

from s2kernels.peft.s2ft.layer import S2FTLayer


def report(model: nn.Module, adapter_name: str = "default") -> str:
    """A table of the adapter's layers: trained channels, parameters and equivalent LoRA ranks.

    `exact rank` is that of the LoRA which does the same (`s2kernels.lora.export_lora`): the number
    of trained channels. `same size` is the rank at which a LoRA has as many parameters. Channels
    and ranks of a tensor of experts are those of each expert.

    Raises ValueError for an adapter that the model does not have.
    """
    layers = [module for module in model.modules() if isinstance(module, S2FTLayer)]
    layers = [layer for layer in layers if adapter_name in layer.modes]
    if not layers:
        raise ValueError(f"the model has no S2FT adapter named {adapter_name!r}")
    rows = [("layer", "dim", "channels", "of", "parameters", "exact rank", "same size")]
    total = 0
    for layer in layers:
        num, delta = str(layer.s2ft_index[adapter_name].shape[-1]), layer.s2ft_delta[adapter_name]
        num_weights = layer.num_experts[0] if layer.num_experts else 1
        same = delta.numel() / (num_weights * (layer.in_features + layer.out_features))
        total += delta.numel()
        sizes = num, str(layer.num_channels), f"{delta.numel():,}", num, f"{same:.1f}"
        rows.append((layer.name, layer.dim, *sizes))
    rows.append(("total", "", "", "", f"{total:,}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
