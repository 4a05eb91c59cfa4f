"""The image tokenizer against upstream's encoder, a decoder written with functions only, and a nearest-neighbour
search."""

import pytest
import torch
import torch.nn.functional as F
from model_factory import VQ_SIZES
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from transformers_worldvla import WorldVLAVQVAE, WorldVLAVQVAEConfig


def tiny_vqvae(seed: int = 0, **fields) -> WorldVLAVQVAE:
    torch.manual_seed(seed)
    return WorldVLAVQVAE(WorldVLAVQVAEConfig(**{**VQ_SIZES, "num_embeddings": 32, **fields}))


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_published_sizes():
    """`vqgan.ckpt` of Chameleon: 293 tensors, 68.7 million parameters."""
    with torch.device("meta"):
        vqvae = WorldVLAVQVAE(WorldVLAVQVAEConfig())
    assert count(vqvae.parameters()) == 68_718_467
    assert len(vqvae.state_dict()) == 293
    assert count(vqvae.encoder.parameters()) == 27_194_880
    assert count(vqvae.decoder.parameters()) == 39_294_851
    assert count(vqvae.quantize.parameters()) == 2_097_152
    assert vqvae.stride == 16
    names = set(vqvae.state_dict())
    assert {
        "decoder.up.4.block.2.conv2.weight",
        "decoder.up.1.upsample.conv.bias",
        "decoder.mid.attn_1.q.weight",
    } < names
    assert {"quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias", "decoder.norm_out.bias"} < names
    assert "decoder.up.0.upsample.conv.weight" not in names


# -------------------------------------------------------------------- oracles


def decode_with_functions(state: dict[str, torch.Tensor], config: WorldVLAVQVAEConfig, latents: torch.Tensor):
    """The decoder of taming-transformers, from its tensors by name."""

    def convolve(name, x, padding=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def normalise(name, x):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def residual(name, x):
        hidden = convolve(f"{name}.conv1", F.silu(normalise(f"{name}.norm1", x)))
        hidden = convolve(f"{name}.conv2", F.silu(normalise(f"{name}.norm2", hidden)))
        return hidden + (convolve(f"{name}.nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in state else x)

    def attend(name, x):
        hidden = normalise(f"{name}.norm", x)
        query, key, value = (convolve(f"{name}.{part}", hidden, 0).flatten(2) for part in "qkv")
        weights = (query.transpose(1, 2) @ key * x.shape[1] ** -0.5).softmax(-1)  # (batch, hw, hw)
        return x + convolve(f"{name}.proj_out", (value @ weights.transpose(1, 2)).view_as(x), 0)

    x = convolve("decoder.conv_in", convolve("post_quant_conv", latents, 0))
    x = residual("decoder.mid.block_2", attend("decoder.mid.attn_1", residual("decoder.mid.block_1", x)))
    for level in reversed(range(len(config.channel_multiplier))):
        for index in range(config.num_res_blocks + 1):
            x = residual(f"decoder.up.{level}.block.{index}", x)
            if f"decoder.up.{level}.attn.{index}.q.weight" in state:
                x = attend(f"decoder.up.{level}.attn.{index}", x)
        if level > 0:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = convolve(f"decoder.up.{level}.upsample.conv", x)
    return convolve("decoder.conv_out", F.silu(normalise("decoder.norm_out", x)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2},
        {"channel_multiplier": [1, 2, 1], "attn_resolutions": [32, 16]},
    ],
)
@torch.no_grad()
def test_decoder(fields):
    vqvae = tiny_vqvae(**fields)
    for parameter in vqvae.decoder.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # norms and biases away from 1 and 0
    if "attn_resolutions" in fields:
        assert {len(level.attn) for level in vqvae.decoder.up} == {0, 2}
    codes = torch.randint(0, 32, (2, 2, 3), generator=torch.Generator().manual_seed(1))
    latents = vqvae.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
    expected = decode_with_functions(vqvae.state_dict(), vqvae.config, latents)
    assert expected.shape == (2, 3, 2 * vqvae.stride, 3 * vqvae.stride)
    torch.testing.assert_close(vqvae.decode(latents), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(vqvae.decode_codes(codes), expected.clamp(-1, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_decoded_pixels_are_clamped():
    vqvae = tiny_vqvae()
    vqvae.decoder.conv_out.weight.mul_(50)
    codes = torch.arange(4).view(1, 2, 2)
    decoded = vqvae.decode_codes(codes)
    assert (decoded.min(), decoded.max()) == (-1, 1)
    assert vqvae.decode(vqvae.quantize.embedding(codes).permute(0, 3, 1, 2)).abs().max() > 1


@torch.no_grad()
def test_encoder_is_upstreams():
    vqvae = tiny_vqvae()
    upstream = ChameleonVQVAE(vqvae.config).eval()
    encoder = {name: value for name, value in vqvae.state_dict().items() if not name.startswith("decoder.")}
    upstream.load_state_dict(encoder, strict=True)
    images = pixels(3, 3, 64, 64)
    codes = vqvae.encode_codes(images)
    assert codes.shape == (3, 4, 4)
    assert (codes.flatten() == upstream.encode(images, return_dict=True).image_tokens.flatten()).all()
    latents = vqvae.quant_conv(vqvae.encoder(images)).permute(0, 2, 3, 1)  # (3, 4, 4, embed_dim)
    distances = (latents[..., None, :].double() - vqvae.quantize.embedding.weight.double()).norm(dim=-1)
    assert (distances.argmin(-1) == codes).float().mean() > 0.95  # rounding may break a tie
    nearest, chosen = distances.min(-1).values, distances.gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, nearest, rtol=0, atol=1e-5)


# -------------------------------------------------------------------- sizes


@torch.no_grad()
def test_images_that_are_not_square():
    vqvae = tiny_vqvae()
    codes = vqvae.encode_codes(pixels(2, 3, 32, 80))
    assert codes.shape == (2, 2, 5) and codes.dtype == torch.long
    assert vqvae.decode_codes(codes).shape == (2, 3, 32, 80)
    turned = vqvae.encode_codes(pixels(2, 3, 80, 32))
    assert turned.shape == (2, 5, 2)


@pytest.mark.parametrize("size", [(32, 40), (24, 32)])
def test_sides_that_are_no_multiple_of_the_stride(size):
    with pytest.raises(ValueError, match=f"image size {size[0]}x{size[1]} is not a multiple of 16: resize or crop it"):
        tiny_vqvae().encode_codes(pixels(1, 3, *size))


# -------------------------------------------------------------------- float32, frozen


def dtypes(vqvae: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in vqvae.parameters()}


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: torch.nn.ModuleList([m]).to(torch.bfloat16)[0],
    ],
)
def test_casting_leaves_it_in_float32(cast):
    vqvae = tiny_vqvae()
    codes = vqvae.encode_codes(pixels(2, 3, 32, 32))
    vqvae = cast(vqvae)
    assert dtypes(vqvae) == {torch.float32}
    assert (vqvae.encode_codes(pixels(2, 3, 32, 32)) == codes).all()


def test_it_still_moves_between_devices():
    assert {p.device.type for p in tiny_vqvae().to("meta", torch.bfloat16).parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_leaves_it_in_float32(dtype, tmp_path):
    vqvae = tiny_vqvae()
    vqvae.save_pretrained(tmp_path)
    loaded = WorldVLAVQVAE.from_pretrained(tmp_path, dtype=dtype)
    assert dtypes(loaded) == {torch.float32}
    for name, value in vqvae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert dtypes(WorldVLAVQVAE._from_config(vqvae.config, dtype=dtype)) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_does_not_reach_it(dtype):
    vqvae = tiny_vqvae()
    images = pixels(2, 3, 32, 32)
    codes = vqvae.encode_codes(images)
    decoded = vqvae.decode_codes(codes)
    with torch.autocast("cpu", dtype):
        assert (vqvae.encode_codes(images) == codes).all()
        again = vqvae.decode_codes(codes)
    assert again.dtype == torch.float32 and torch.equal(again, decoded)


def test_pixels_in_half_precision_are_read_in_float32():
    vqvae = tiny_vqvae()
    images = pixels(1, 3, 32, 32).bfloat16()
    assert (vqvae.encode_codes(images) == vqvae.encode_codes(images.float())).all()


def test_it_is_frozen(tmp_path):
    """New, loaded, and whatever mode its model is put into."""
    tiny_vqvae().save_pretrained(tmp_path)
    for vqvae in (tiny_vqvae(), WorldVLAVQVAE.from_pretrained(tmp_path)):
        for module in (vqvae, torch.nn.ModuleList([vqvae])):
            assert not any(parameter.requires_grad for parameter in vqvae.parameters())
            module.train()
            assert not any(part.training for part in vqvae.modules())
    assert all(p.requires_grad for p in WorldVLAVQVAE.from_pretrained(tmp_path).trainable().parameters())


# -------------------------------------------------------------------- trainable


def test_trainable_lets_gradients_through_the_codes():
    vqvae = tiny_vqvae()
    assert vqvae.trainable() is vqvae
    assert all(part.training for part in vqvae.modules())
    images = pixels(2, 3, 32, 32)
    encoded = vqvae.encode(images, return_dict=True)
    decoded = vqvae.decode(encoded.quantized_last_hidden_state)
    (F.mse_loss(decoded, images) + encoded.embedding_loss).backward()
    for name, parameter in vqvae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # one code may win everywhere, and a bias before a norm over the whole image has no effect
        assert parameter.grad.abs().sum() > 0 or name.endswith("bias"), name
    assert vqvae.eval().encoder.training is False


def test_a_few_steps_lower_the_reconstruction_error():
    vqvae = tiny_vqvae().trainable()
    images = pixels(2, 3, 1, 1).expand(-1, -1, 32, 32)  # two plain colours
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=2e-3)
    errors = []
    for _ in range(10):
        encoded = vqvae.encode(images, return_dict=True)
        error = F.mse_loss(vqvae.decode(encoded.quantized_last_hidden_state), images)
        optimizer.zero_grad()
        (error + encoded.embedding_loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0]
