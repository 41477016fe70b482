"""Vision Transformer (Dosovitskiy et al. 2021): patches as tokens, GPT-2's block without the mask, mean pooling.

The mean over the patches stands for the paper's class token, which would make the rows of every matrix product an odd
number: FP8 GEMMs on tensor cores take multiples of 16. It classifies as well (Beyer et al. 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.models._base import BaseConfig, Twin
from mptrain.models._base import all_blocks_alike as grows_evenly  # noqa: F401 - of the contract
from mptrain.models._transformer import Transformer, require_heads, require_positive
from mptrain.models.gpt import Block

INPUT = "images"
TENSOR_PARALLEL: dict[str, str] = {}
hugging_face: Twin | None = None


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes of a ViT. ``image_size``, ``channels`` and ``classes`` 0 mean: the data's. ValueError names the setting."""

    image_size: int = 0
    channels: int = 0
    classes: int = 0
    patch_size: int = 2
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive("vit", self, "patch_size", "n_layer", "n_head", "n_embd")
        require_heads("vit", self.n_embd, self.n_head)
        if self.image_size % self.patch_size:
            works = max(d for d in range(1, self.patch_size + 1) if self.image_size % d == 0)
            raise ValueError(
                f"vit: image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                f"try model.patch_size={works}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"vit: dropout={self.dropout} must be in [0, 1); try model.dropout=0.1")

    @property
    def patches(self) -> int:
        """Count the patches of an image: the length of the sequences that attention sees."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch_size**2


class ViT(Transformer):
    """The whole model: images in, logits or loss out."""

    config: Config

    def __init__(self, config: Config) -> None:
        blocks: list[nn.Module] = [Block(config, causal=False) for _ in range(config.n_layer)]
        embed = nn.Linear(config.patch_values, config.n_embd)
        head = nn.Linear(config.n_embd, config.classes)
        super().__init__(config, embed, blocks, nn.LayerNorm(config.n_embd, bias=config.bias), head)
        self.position = nn.Embedding(config.patches, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Draw the first weights as in every transformer here, but patches and positions start at the size of pixels: 1
        / sqrt(patch_values).

        With 0.02 for both, training starts with a plateau, on some seeds a long one: after 100 steps of vit-nano on
        data=digits two seeds had 91 and 75 % top-1, and 91 and 92 % with this.
        """
        super().reset_parameters()
        for layer in (self.embed, self.position):
            nn.init.normal_(layer.weight, std=self.config.patch_values**-0.5)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """``images`` [B, channels, image_size, image_size], ``labels`` [B] int64 -> mean cross-entropy in nats, or
        logits [B, classes] without labels."""
        config = self.config
        wanted = (config.channels, config.image_size, config.image_size)
        if images.shape[1:] != wanted:
            channels, size = images.shape[1], images.shape[-1]
            raise ValueError(
                f"images of {tuple(images.shape[1:])} do not fit a model for {wanted}; "
                f"set model.channels={channels} model.image_size={size}"
            )
        positions = torch.arange(config.patches, device=images.device)
        patches = self.cut(images).to(self.embed.weight.dtype)  # weights may be stored in BF16 (optim.weights)
        x = self.dropout(self.embed(patches) + self.position(positions))
        logits: Tensor = self.head(self.encode(x).mean(dim=1))
        return logits if labels is None else F.cross_entropy(logits, labels)

    def cut(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, C * patch_size^2], patches row by row."""
        config, size = self.config, self.config.patch_size
        rows = config.image_size // size
        cut = images.reshape(-1, config.channels, rows, size, rows, size).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(-1, config.patches, config.patch_values)

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Measure a validation batch, each figure a 0-dim mean: the loss (nats) and the share of images whose
        largest logit is that of their class."""
        logits = self(images)
        return {"loss": F.cross_entropy(logits, labels), "top1_frac": (logits.argmax(-1) == labels).float().mean()}

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for one image: its patches through embedding and blocks
        (:meth:`block_flops`), their mean through the head."""
        config = self.config
        patch = 6.0 * self.embed.weight.numel() + self.block_flops(config.patches)
        return config.patches * patch + 6.0 * self.head.weight.numel()

    def example(self, rows: int) -> dict[str, Tensor]:
        """A random batch of about ``rows`` patches, as ``forward`` takes it."""
        config, device = self.config, self.head.weight.device
        batch = max(1, rows // config.patches)
        images = torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
        return {"images": images, "labels": torch.randint(config.classes, (batch,), device=device)}


def sizes(settings: dict[str, Any], state: dict[str, Tensor]) -> dict[str, int]:
    """Read off the weights what the data decided: the images and their classes."""
    patch_size = settings.get("patch_size", Config.patch_size)
    side = math.isqrt(len(state["position.weight"]))
    return {
        "image_size": side * patch_size,
        "channels": state["embed.weight"].shape[1] // patch_size**2,
        "classes": len(state["head.weight"]),
    }


def build(config: Config) -> ViT:
    """A freshly initialized model on torch's default device, from torch's global random state."""
    for name, works in (("image_size", 8), ("channels", 1), ("classes", 10)):
        if getattr(config, name) <= 0:
            raise ValueError(f"vit: {name}={getattr(config, name)}: without data to set it, try model.{name}={works}")
    model = ViT(config)
    model.reset_parameters()
    return model
