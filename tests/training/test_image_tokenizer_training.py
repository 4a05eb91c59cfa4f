"""Training the image tokenizer: on pictures it has not seen, with a codebook that follows them, and after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import small_model
from torch import nn

from transformers_worldvla.training.image_tokenizer import (
    Codebook,
    ImageTokenizerTraining,
    reconstruction_psnr,
    start_image_embeddings,
    to_pixels,
    train_image_tokenizer,
    whiten_latents,
)


@pytest.fixture
def pictures() -> np.ndarray:
    """(40, 32, 32, 3): a bright square on a dark ground, in another place each time."""
    rng = np.random.default_rng(0)
    drawn = np.full((40, 32, 32, 3), 30, np.uint8)
    for picture, (top, left) in zip(drawn, rng.integers(0, 24, (40, 2)), strict=True):
        picture[top : top + 8, left : left + 8] = (220, 120, 40)
    return drawn


@pytest.fixture
def make_vqvae(processor: Any) -> Callable[[], Any]:
    return lambda: small_model(processor).model.vqmodel


def train(vqvae: Any, pictures: np.ndarray, file: Path, steps: int, **settings: Any) -> Any:
    train_image_tokenizer(vqvae, pictures, ImageTokenizerTraining(steps, 4, compile=False, **settings), file)
    return vqvae


def test_goes_on_from_the_codebook_there_is(make_vqvae: Any, pictures: np.ndarray, tmp_path: Path) -> None:
    vqvae = make_vqvae()
    before = reconstruction_psnr(vqvae, pictures)
    train(vqvae, pictures, tmp_path / "progress.pt", 30)
    assert reconstruction_psnr(vqvae, pictures) > before + 1
    assert vqvae.frozen and not vqvae.training and not any(p.requires_grad for p in vqvae.parameters())


def test_a_new_one_begins_as_an_auto_encoder(make_vqvae: Any, pictures: np.ndarray, tmp_path: Path) -> None:
    vqvae = make_vqvae()
    whiten_latents(vqvae, pictures)
    with torch.no_grad():
        latents = vqvae.quant_conv(vqvae.encoder(to_pixels(pictures))).permute(0, 2, 3, 1).flatten(0, 2)
    assert latents.mean(0).abs().max() < 1e-3
    before = vqvae.quantize.embedding.weight.clone()
    train(vqvae, pictures, tmp_path / "progress.pt", 16, continuous_steps=10)
    assert not torch.equal(vqvae.quantize.embedding.weight, before)
    with pytest.raises(ValueError, match="10 steps leave none after the 10 continuous ones"):
        train(make_vqvae(), pictures, tmp_path / "other.pt", 10, continuous_steps=10)


def test_a_killed_run_ends_as_an_uninterrupted_one(
    make_vqvae: Any, pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers_worldvla.training.image_tokenizer.SAVE_EVERY", 5)
    whole = train(make_vqvae(), pictures, tmp_path / "whole.pt", 12)

    def kill(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_worldvla.training.image_tokenizer.REPORT_EVERY", 7)
    killed = make_vqvae()
    with pytest.raises(KeyboardInterrupt):
        train_image_tokenizer(
            killed, pictures, ImageTokenizerTraining(12, 4, compile=False), tmp_path / "killed.pt", kill
        )
    resumed = train(make_vqvae(), pictures, tmp_path / "killed.pt", 12)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-5)


def test_the_codebook_finds_clusters_and_revives_what_nothing_chooses() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    latents = (centres[:, None] + 0.1 * torch.randn(3, 200, 2)).flatten(0, 1)
    codebook = Codebook(nn.Embedding(24, 2))
    codebook.start_from(latents)
    assert torch.cdist(centres, codebook.vectors).min(1).values.max() < 0.2
    codebook.vectors[5:] = 1000.0
    codebook.sums[5:] = 1000.0
    codebook.update(latents, restart=True)
    assert codebook.vectors.abs().max() < 20, "each stands at a latent again"
    chosen = codebook.update(latents, restart=False)
    assert (chosen - latents).norm(dim=1).max() < 15


def test_embeddings_of_like_codes_start_alike(processor: Any) -> None:
    """Distances of embeddings rank as those of the codebook; no other row, and not the head, is touched."""
    model = small_model(processor)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    start_image_embeddings(model, scale=0.5)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.embed_tokens.weight"]
    codes = list(model.tokens.image_codes)
    rows = model.get_input_embeddings().weight.detach()
    others = [row for row in range(len(rows)) if row not in set(codes)]
    assert torch.equal(rows[others], before["model.embed_tokens.weight"][others])
    assert rows[codes].std().item() == pytest.approx(0.5, rel=0.5)
    distances = [torch.pdist(each) for each in (model.model.vqmodel.quantize.embedding.weight.detach(), rows[codes])]
    assert torch.corrcoef(torch.stack(distances))[0, 1] > 0.5
