"""A block that reads only a subspace of the residual: how the known-answer subjects are built.

If the layers above a site see only the span of some directions, what is orthogonal to them cannot
matter. A clamp on features whose encoders span all that the later layers see holds by construction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "projection.safetensors"


class Projected(nn.Module):
    """A decoder block behind an orthogonal projection: `block(x·Q·Qᵀ)`, Q [d_model r]."""

    def __init__(self, block: nn.Module, basis: Tensor):
        super().__init__()
        self.block = block
        self.register_buffer("basis", basis)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        basis = self.get_buffer("basis").to(hidden_states.dtype)
        return self.block((hidden_states @ basis) @ basis.T, *args, **kwargs)


def save_projection(folder: Path, basis: Tensor, layer: int) -> None:
    """Write the basis [d_model r] that block `layer` reads through into the model's folder."""
    save_file({"basis": basis.contiguous()}, folder / FILE, metadata={"layer": str(layer)})


def attach_projection(model: nn.Module, folder: Path) -> None:
    """Put the projection saved in the model's folder, if there is one, before its block."""
    path = folder / FILE
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        project(model, file.get_tensor("basis"), int(file.metadata()["layer"]))


def project(model: nn.Module, basis: Tensor, layer: int) -> None:
    """Let block `layer` and everything above see only the span of `basis` [d_model r]."""
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    error = (basis.T @ basis - torch.eye(basis.shape[1])).abs().max()
    assert error < 1e-5, f"the basis is not orthonormal (error {error:.1e})"
    blocks[layer] = Projected(blocks[layer], basis)
