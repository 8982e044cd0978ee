"""The type of parameters whose values a rank has given up."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xdit_compile.errors import XditError


class GivenUp(nn.Parameter):
    """A parameter without values. Writes through its ``.data`` count as all others do, so that none goes unnoticed."""

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.detach(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not value.is_meta:
            raise XditError(f"this rank has given up the values of a parameter of shape {tuple(self.shape)}, for a "
                            "share of it or to another stage, and no others can be assigned to its .data: load weights "
                            "before the first call, or parallelize the model anew")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type != "meta":
            raise XditError(f"this rank has given up the values of a parameter of shape {tuple(self.shape)}, for a "
                            f"share of it or to another stage or rank: there is nothing to bring to {device}. Move the "
                            "model as a whole, and switch offloading by parts on before the first call")
        return super().to(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise XditError(f"this rank has given up the values of a parameter of shape {tuple(self.shape)}, which cannot "
                        "be saved: save the model before its first call")


def kind_of(tensor: torch.Tensor) -> type:
    """Its type; of one that was given up, what it was."""
    return nn.Parameter if type(tensor) is GivenUp else type(tensor)
