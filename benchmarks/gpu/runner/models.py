"""ViT and Swin in plain PyTorch, with timm's names of weights, for machines without timm.

They are the peers: written the way that runs fastest. Attention of ViT is PyTorch's fused one; that
of Swin, whose bias and mask change from window to window, is written out unless ``fused``, and bias
and mask are added up beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SwinTransformer", "VisionTransformer", "blocks_of", "build"]


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return patches in rows and columns, channels last."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class VisionTransformer(nn.Module):
    """ViT and DeiT with a class token."""

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, embed_dim: int = 192, depth: int = 12,
        num_heads: int = 3, mlp_ratio: float = 4.0, num_classes: int = 1000, in_chans: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, tokens = int(embed_dim * mlp_ratio), (img_size // patch_size) ** 2 + 1
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, embed_dim) * 0.02)
        blocks = [Block(embed_dim, num_heads, hidden) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of normalised images."""
        x = self.patch_embed(x).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


class WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int, size: int, shift: int) -> None:
        super().__init__()
        self.heads, self.fused = heads, False
        self.relative_position_bias_table = nn.Parameter(
            torch.randn((2 * window - 1) ** 2, heads) * 0.02)  # fmt: skip
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        place = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", apart[..., 0] * (2 * window - 1)
                             + apart[..., 1], persistent=False)  # fmt: skip
        self.register_buffer("mask", _mask(size, window, shift), persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def settle(self) -> None:
        """Add up bias and mask once: ``[windows or 1, heads, tokens, tokens]``."""
        tokens = self.relative_position_index.shape[0]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(tokens, tokens, self.heads).permute(2, 0, 1)[None]
        if self.mask is not None:
            bias = bias + self.mask[:, None].to(bias.dtype)
        self.bias = bias.detach().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside windows: ``[batch, windows, tokens, channels]``."""
        batch, windows, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, windows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        assert self.bias is not None
        if self.fused:
            flat = (batch * windows, self.heads, tokens, width // self.heads)
            bias = self.bias
            if len(bias) > 1:
                bias = bias.expand(batch, *bias.shape).flatten(0, 1)
            x = F.scaled_dot_product_attention(
                q.reshape(flat), k.reshape(flat), v.reshape(flat), attn_mask=bias)  # fmt: skip
            x = x.view(batch, windows, *flat[1:])
        else:
            scale = (width // self.heads) ** -0.5
            x = ((q * scale) @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.proj(x.transpose(2, 3).reshape(batch, windows, tokens, width))


def _mask(size: int, window: int, shift: int) -> Tensor | None:
    """Return what keeps shifted windows from looking across the border, None without a shift."""
    if shift == 0:
        return None
    band = torch.zeros(size, dtype=torch.long)
    band[size - window : size - shift] = 1
    band[size - shift :] = 2
    region = 3 * band[:, None] + band[None, :]
    region = region.view(size // window, window, size // window, window).transpose(1, 2)
    region = region.reshape(-1, window * window)
    return (region[:, None, :] != region[:, :, None]).float() * -100.0


class SwinBlock(nn.Module):
    def __init__(
        self, width: int, heads: int, hidden: int, size: int, window: int, shift: int
    ) -> None:
        super().__init__()
        if size % window:
            raise ValueError(f"windows of {window} do not divide {size}")
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, size, shift)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self._mix(x + self._attend(self.norm1(x)))

    def _mix(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        batch, size, _, width = x.shape
        n, w, s = size // self.window, self.window, self.shift
        if s:
            x = torch.roll(x, (-s, -s), (1, 2))
        x = x.view(batch, n, w, n, w, width).transpose(2, 3).reshape(batch, n * n, w * w, width)
        x = self.attn(x).view(batch, n, n, w, w, width).transpose(2, 3)
        x = x.reshape(batch, size, size, width)
        return torch.roll(x, (s, s), (1, 2)) if s else x


class Merge(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, size, _, width = x.shape
        x = x.view(batch, size // 2, 2, size // 2, 2, width).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))


class Stage(nn.Module):
    def __init__(
        self, width: int, heads: int, depth: int, ratio: float, size: int, window: int, merge: bool
    ) -> None:
        super().__init__()
        self.downsample = Merge(width // 2) if merge else nn.Identity()
        window = min(window, size)
        shift = window // 2 if window < size else 0
        self.blocks = nn.Sequential(*[
            SwinBlock(width, heads, int(width * ratio), size, window, shift * (i % 2))
            for i in range(depth)
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((1, 2)))


class SwinTransformer(nn.Module):
    """Swin with shifted windows."""

    def __init__(
        self, img_size: int = 224, patch_size: int = 4, embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2), num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7, mlp_ratio: float = 4.0, num_classes: int = 1000, in_chans: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm=True)
        size = img_size // patch_size
        self.layers = nn.Sequential(*[
            Stage(embed_dim << i, heads, depth, mlp_ratio, size >> i, window_size, i > 0)
            for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        ])  # fmt: skip
        width = embed_dim << (len(depths) - 1)
        self.norm = nn.LayerNorm(width)
        self.head = Head(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of normalised images."""
        return self.head(self.norm(self.layers(self.patch_embed(x))))


_FAMILIES = {"vit": VisionTransformer, "swin": SwinTransformer}


def build(
    architecture: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None,
    fused: bool = False,
) -> nn.Module:  # fmt: skip
    """Build a model, ready to run.

    Parameters
    ----------
    architecture
        ``family`` (vit or swin) and the arguments of its class.
    weights
        timm's state dict; None leaves random weights.
    fused
        PyTorch's fused attention in Swin's windows, too.
    """
    arguments = dict(architecture)
    model = _FAMILIES[arguments.pop("family")](**arguments).eval()
    if weights is not None:
        missing, unknown = model.load_state_dict(weights, strict=False)
        unknown = [name for name in unknown
                   if not name.endswith(("relative_position_index", "attn_mask"))]  # fmt: skip
        if missing or unknown:
            raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}")
    for part in model.modules():
        if isinstance(part, WindowAttention):
            part.settle()
            part.fused = fused
    return model.requires_grad_(False)


def blocks_of(architecture: Mapping[str, Any]) -> int:
    """Return the number of transformer blocks."""
    model = dict(architecture)
    if model["family"] == "vit":
        return int(model.get("depth", 12))
    return sum(model.get("depths", (2, 2, 6, 2)))
