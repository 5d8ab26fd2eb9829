"""Perception Encoder G/14 and its two downsamplers.

N = images, P = patches (rows x columns), C = width. Parameter names are the hub's.

    pixels [N, 3, H, W]
      conv1 (patch embedding)           [N, P, C]
      + positional_embedding            bilinear where the grid differs from the table's
      ln_pre
      transformer.resblocks[j]          x + ls_1 * attn(ln_1 x);  x + ls_2 * mlp(ln_2 x)
      vit_downsampler1, 2               3x3 convolutions, stride 2: [N, P / 16, 4 C]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step37_lit.config import VisionConfig
from step37_lit.model import recompute

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [N, 3, H, W] -> (x / 255 - mean) / std of CLIP, in `dtype`; float pixels are normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1)
    # One multiply and one add a pixel: x / (255 std) - mean / std.
    return torch.addcmul(-mean / std, pixels.float(), 1.0 / (255.0 * std)).to(dtype)


def rotary_2d(config: VisionConfig, rows: int, columns: int, device: torch.device) -> Tensor:
    """fp32 [2 (cos, sin), P, head_dim / 2]: angle of each interleaved pair of a head.

    The first half of a head turns with the patch's column, the second with its row; the frequencies of each half are
    theta^(-2i / (head_dim / 2)).
    """
    half = config.head_dim // 2
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angles = torch.cat((torch.outer(column.flatten(), frequencies), torch.outer(row.flatten(), frequencies)), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Turns neighbouring channels (2i, 2i + 1) together. x: [N, heads, P, head_dim]; cos_sin: [2, P, head_dim / 2]."""
    cos, sin = cos_sin.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class LayerScale(nn.Module):
    """One learned factor a channel on a residual branch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.width,), config.layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VisionAttention(nn.Module):
    """Full attention over the patches of one image, with 2-D rotary embedding."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        """[N, P, C] -> [N, P, C]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, heads, P, head_dim]
        attended = F.scaled_dot_product_attention(rotate_pairs(q, cos_sin), rotate_pairs(k, cos_sin), v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear layers with quick-GELU (x * sigmoid(1.702 x)) between."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.ffn_hidden_size)
        self.c_proj = nn.Linear(config.ffn_hidden_size, config.width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.c_fc(x)
        return self.c_proj(inner * torch.sigmoid(1.702 * inner))


class VisionBlock(nn.Module):
    """Pre-norm residual block with LayerScale on both branches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.ls_1 = LayerScale(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.ls_2 = LayerScale(config)

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), cos_sin))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class VisionTransformer(nn.Module):
    """The stack of blocks.

    Args:
        config: The vision tower.
        recompute: Each block keeps its input only, and is computed again in the backward pass.
    """

    def __init__(self, config: VisionConfig, recompute: bool):
        super().__init__()
        self.recompute = recompute
        self.resblocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        for block in self.resblocks:
            x = recompute.run(self.recompute, block, x, cos_sin)
        return x


class VisionTower(nn.Module):
    """Pixels to the features that fusion inserts into the text.

    The tower is the same on every rank of the first pipeline stage: it is small beside the decoder. Ranks that share a
    pack encode different images of it.

    Args:
        config: Its sizes.
        recompute: See `VisionTransformer`.
    """

    def __init__(self, config: VisionConfig, recompute: bool = False):
        super().__init__()
        self.config = config
        width, grid = config.width, config.position_grid
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(grid * grid, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = VisionTransformer(config, recompute)
        self.vit_downsampler1 = nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1)
        self.vit_downsampler2 = nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of images of one size.

        Args:
            pixels: [N, 3, H, W]; uint8, or float that is normalised already. H and W: multiples of the patch size.

        Returns:
            [N, tokens, output_dim] in the parameters' dtype; 169 tokens for 728 x 728, 81 for 504 x 504.
        """
        patch = self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] % patch or pixels.shape[3] % patch:
            raise ValueError(
                f"images: expected [N, 3, H, W] with H and W multiples of {patch}, found {list(pixels.shape)}"
            )
        rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
        x = self.conv1(normalise(pixels, self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + self._positions(rows, columns))
        x = self.transformer(x, rotary_2d(self.config, rows, columns, x.device))
        x = x.transpose(1, 2).unflatten(2, (rows, columns))
        return self.vit_downsampler2(self.vit_downsampler1(x)).flatten(2).transpose(1, 2)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """[P, C]: the learned table, resampled where the image's grid is not its own."""
        grid = self.config.position_grid
        if (rows, columns) == (grid, grid):
            return self.positional_embedding
        table = self.positional_embedding.T.view(1, -1, grid, grid)
        table = F.interpolate(table, size=(rows, columns), mode="bilinear", align_corners=False)
        return table.flatten(2).squeeze(0).T
