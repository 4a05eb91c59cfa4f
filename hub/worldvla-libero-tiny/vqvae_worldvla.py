"""The image tokenizer: Chameleon's VQ-GAN with the pixel decoder that the upstream library leaves out.

Pictures in, codebook indices out, and back again. It knows nothing of the shared vocabulary, of sequences or of robots.
Module names are those of the taming-transformers VQ-GAN, so that `vqgan.ckpt` loads one to one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAE,
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)

from .configuration_worldvla import WorldVLAVQVAEConfig


class WorldVLAVQVAEUpsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class WorldVLAVQVAEDecoder(nn.Module):
    """The taming VQ-GAN decoder: (batch, latent_channels, h, w) -> (batch, in_channels, 16h, 16w) in [-1, 1] (not
    clamped)."""

    def __init__(self, config: WorldVLAVQVAEConfig):
        super().__init__()
        num_levels = len(config.channel_multiplier)
        channels = config.base_channels * config.channel_multiplier[-1]
        resolution = config.resolution // 2 ** (num_levels - 1)
        attn_resolutions = config.attn_resolutions or []

        self.conv_in = nn.Conv2d(config.latent_channels, channels, kernel_size=3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1 = ChameleonVQVAEEncoderResnetBlock(config, channels, channels)
        self.mid.attn_1 = ChameleonVQVAEEncoderAttnBlock(channels) if config.attn_type == "vanilla" else nn.Identity()
        self.mid.block_2 = ChameleonVQVAEEncoderResnetBlock(config, channels, channels)

        levels = []
        for level in reversed(range(num_levels)):
            out_channels = config.base_channels * config.channel_multiplier[level]
            up = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                up.block.append(ChameleonVQVAEEncoderResnetBlock(config, channels, out_channels))
                channels = out_channels
                if resolution in attn_resolutions and config.attn_type == "vanilla":
                    up.attn.append(ChameleonVQVAEEncoderAttnBlock(channels))
            if level > 0:
                up.upsample = WorldVLAVQVAEUpsample(channels)
                resolution *= 2
            levels.append(up)
        # taming stores the highest resolution first and walks the list backwards
        self.up = nn.ModuleList(reversed(levels))

        self.norm_out = nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, config.in_channels, kernel_size=3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(latents)
        hidden_states = self.mid.block_1(hidden_states)
        hidden_states = self.mid.attn_1(hidden_states)
        hidden_states = self.mid.block_2(hidden_states)
        for level, up in reversed(list(enumerate(self.up))):
            for index, block in enumerate(up.block):
                hidden_states = block(hidden_states)
                if len(up.attn) > 0:
                    hidden_states = up.attn[index](hidden_states)
            if level > 0:
                hidden_states = up.upsample(hidden_states)
        hidden_states = F.silu(self.norm_out(hidden_states))
        return self.conv_out(hidden_states)


class WorldVLAVQVAE(ChameleonVQVAE):
    """VQ-GAN encoder, codebook and decoder (Gafni et al. 2022; compression 16, paper section 3.2).

    Frozen: parameters carry no gradient and `train()` keeps evaluation mode. `trainable()` lifts that for training one.
    """

    config: WorldVLAVQVAEConfig
    config_class = WorldVLAVQVAEConfig
    frozen = True

    def __init__(self, config: WorldVLAVQVAEConfig):
        super().__init__(config)
        self.decoder = WorldVLAVQVAEDecoder(config)
        for parameter in self.parameters():  # whatever torch's default dtype is while the model is built
            parameter.data = parameter.data.float()
        self.requires_grad_(False)
        self.post_init()
        self.eval()

    @property
    def stride(self) -> int:
        """Pixels a code stands for along one side (16 in every published checkpoint)."""
        return 2 ** (len(self.config.channel_multiplier) - 1)

    def train(self, mode: bool = True) -> "WorldVLAVQVAE":
        if self.frozen:
            self.requires_grad_(False)  # from_pretrained, which ends with eval(), has put new parameters in place
        return super().train(mode and not self.frozen)

    def trainable(self) -> "WorldVLAVQVAE":
        """Unfreeze, to train an image tokenizer of one's own; returns self in training mode."""
        self.frozen = False
        self.requires_grad_(True)
        return self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation: with Chameleon's normal(0, 0.02) a convolutional net cannot be trained."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "WorldVLAVQVAE":
        """Move with the model, but stay in float32 when it is cast: half precision changes codes."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def encode_codes(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Pixels (batch, 3, H, W) in [-1, 1] -> codebook indices (batch, H/16, W/16).

        Raises ValueError when a side is not a multiple of 16.
        """
        batch, _, height, width = pixel_values.shape
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image size {height}x{width} is not a multiple of {self.stride}: resize or crop it, "
                f"for example with WorldVLAImageProcessor"
            )
        with torch.autocast(pixel_values.device.type, enabled=False):
            indices = self.encode(pixel_values.float(), return_dict=True).image_tokens
        return indices.view(batch, height // self.stride, width // self.stride)

    def decode_codes(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codebook indices (batch, h, w) -> pixels (batch, 3, 16h, 16w), clamped to [-1, 1]."""
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2)  # (batch, embed_dim, h, w)
        with torch.autocast(quantized.device.type, enabled=False):
            return self.decode(quantized).clamp(-1.0, 1.0)

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Codebook vectors (batch, embed_dim, h, w) -> pixels (batch, 3, 16h, 16w), not clamped."""
        return self.decoder(self.post_quant_conv(quantized))
