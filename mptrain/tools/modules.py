"""Names of a model's parameters."""

from __future__ import annotations

from torch import nn


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every trained parameter with its name, in the order of the model.

    One with several names (a head tied to the embedding) goes by that of the linear layer, which multiplies by it.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight in names:
            names[weight] = f"{name}.weight" if name else "weight"
    return names
