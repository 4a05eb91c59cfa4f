"""SSIM, LPIPS and FVD against other implementations and closed forms; networks are checked by their hash."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from transformers_worldvla.evaluation import perceptual
from transformers_worldvla.evaluation.metrics import psnr

skimage = pytest.importorskip("skimage.metrics")


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Two stacks (2, 3, 48, 40, 3) of smooth pictures, one noisier from picture to picture; the last pair is equal."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:48, 0:40]
    base = np.stack([rows * 4, columns * 5, (rows + columns) * 2], axis=-1)
    first = np.stack([(base + 20 * shift) % 256 for shift in range(6)]).reshape(2, 3, 48, 40, 3)
    noise = rng.normal(size=first.shape) * np.arange(5, -1, -1).reshape(2, 3, 1, 1, 1) * 8
    return first.astype(np.uint8), (first + noise).clip(0, 255).astype(np.uint8)


def test_ssim_is_that_of_scikit_image(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = pictures
    values = perceptual.ssim(first, second)
    assert values.shape == (2, 3) and values[1, 2] == pytest.approx(1.0, abs=1e-6)
    for place in np.ndindex(2, 3):
        expected = skimage.structural_similarity(
            first[place], second[place], gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1
        )
        assert values[place] == pytest.approx(expected, abs=1e-4)
    assert np.ptp(values) > 0.1, "pictures so alike show nothing"


def test_psnr_is_that_of_scikit_image(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = (
        values.reshape(-1, 48, 40, 3)[:-1] for values in pictures
    )  # of equal pictures it is infinite there
    expected = [skimage.peak_signal_noise_ratio(one, two) for one, two in zip(first, second, strict=True)]
    assert psnr(second, first) == pytest.approx(expected, abs=1e-4)


def test_pictures_that_cannot_be_compared_are_refused(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = pictures
    for one, two in [(first, second[0]), (first / 255, second), (first[..., :2], second[..., :2])]:
        with pytest.raises(ValueError, match="compared"):
            perceptual.ssim(one, two)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        perceptual.ssim(first[:, :, :8, :8], second[:, :, :8, :8])


class TestLpips:
    def test_is_that_of_torchmetrics(
        self, pictures: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On the same random VGG16; torchmetrics' own comes from torchvision, which need not be there."""
        from torchmetrics.functional.image import lpips as theirs

        torch.manual_seed(0)
        ours = perceptual.Lpips()
        monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_, **__: torch.nn.Sequential(*ours.layers))
        expected = theirs._LPIPS(pretrained=True, net="vgg", pnet_rand=True)  # their published heads
        for number, head in enumerate(ours.heads):
            head.data = expected.state_dict()[f"lin{number}.model.1.weight"]
        first, second = (torch.from_numpy(values[0]).permute(0, 3, 1, 2) / 127.5 - 1 for values in pictures)
        values = ours.measure(*pictures)
        assert values.shape == (2, 3) and values[0, 0] > 1e-4
        assert values[0] == pytest.approx(expected(first, second).flatten().numpy(), rel=1e-4)

    def test_equal_pictures_have_no_distance(self, pictures: tuple[np.ndarray, np.ndarray]) -> None:
        values = perceptual.Lpips().measure(*pictures)
        assert values[1, 2] == 0 and (values[0] > 0).all()

    def test_weights_come_from_a_file_with_the_right_hash(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: tuple[np.ndarray, np.ndarray]
    ) -> None:
        torch.manual_seed(1)
        random = perceptual.Lpips()
        state = {f"features.{name}": value for name, value in random.layers.state_dict().items()}
        file = tmp_path / perceptual.VGG16.name
        torch.save(state | {"classifier.0.bias": torch.zeros(3)}, file)
        with pytest.raises(perceptual.MissingWeights, match="another file than vgg16"):
            perceptual.Lpips.from_weights(tmp_path)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(perceptual, "VGG16", replace(perceptual.VGG16, sha256=sha256))
        loaded = perceptual.Lpips.from_weights(tmp_path)
        assert all(
            torch.equal(loaded.layers.state_dict()[name], value) for name, value in random.layers.state_dict().items()
        )
        assert 0 < float(loaded.heads[0].mean()) < 1, "the published heads are not those of a new module"
        assert loaded.measure(*pictures)[0, 0] > 0


def test_weights_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with pytest.raises(perceptual.MissingWeights, match=r"i3d_torchscript.pt is not there"):
        perceptual.find_weights(perceptual.I3D, tmp_path)
    with pytest.raises(perceptual.MissingWeights, match=r"cannot be had from the Hub.*--weights"):
        perceptual.find_weights(perceptual.I3D)  # the tests have no network


class TestFrechetDistance:
    def test_of_gaussians_with_known_parameters(self) -> None:
        """|m1 - m2|^2 + sum (s1 - s2)^2 for covariances with the same axes."""
        rng = np.random.default_rng(0)
        white = rng.normal(size=(500, 4))
        white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
        axes, _ = np.linalg.qr(rng.normal(size=(4, 4)))
        one, two = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 1.0, 0.5, 0.0])
        offset = np.array([1.0, -2.0, 0.0, 2.0])
        distance = perceptual.frechet_distance(white * one @ axes, white[::-1] * two @ axes + offset)
        assert distance == pytest.approx(9.0 + np.square(one - two).sum(), rel=1e-6)

    def test_is_that_of_the_matrix_square_root(self) -> None:
        linalg = pytest.importorskip("scipy.linalg")
        rng = np.random.default_rng(1)
        first, second = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(80, 5)) + 1
        covariances = [np.cov(values, rowvar=False) for values in (first, second)]
        root = linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
        assert perceptual.frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
        assert perceptual.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
        assert perceptual.frechet_distance(first, second) == pytest.approx(perceptual.frechet_distance(second, first))

    def test_fewer_samples_than_features(self) -> None:
        rng = np.random.default_rng(2)
        first, second = rng.normal(size=(2, 20, 50))
        assert np.isfinite(perceptual.frechet_distance(first, second))

    @pytest.mark.parametrize("shapes", [((1, 3), (4, 3)), ((4, 3), (4, 2)), ((4,), (4,))], ids=str)
    def test_refuses(self, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        with pytest.raises(ValueError, match="features are"):
            perceptual.frechet_distance(*map(np.zeros, shapes))


class TestFvd:
    def test_carries_its_protocol(self) -> None:
        assert perceptual.fvd_name(512, 16) == "fvd_i3d_n512_t16_224"

    def test_refuses_and_warns_by_the_number_of_clips(self) -> None:
        rng = np.random.default_rng(3)
        few, some, many = (rng.normal(size=(clips, 20)) for clips in (8, 18, 40))
        value, reason = perceptual.fvd(few, few)
        assert value is None and reason is not None and "8 clips are too few" in reason
        value, warning = perceptual.fvd(some, some + 1)
        assert value == pytest.approx(20) and warning is not None and "18 clips for 20 features" in warning
        assert perceptual.fvd(many, many + 1) == (pytest.approx(20), None)

    def test_features_are_those_of_the_network_one_clip_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stand-in with the published file's interface: it must get (1, 3, T, H, W) in 0..255."""
        file = tmp_path / perceptual.I3D.name
        torch.jit.script(_MeanColour()).save(str(file))
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(perceptual, "I3D", replace(perceptual.I3D, sha256=sha256))
        clips = np.random.default_rng(4).integers(0, 256, (3, 5, 16, 20, 3), dtype=np.uint8)
        features = perceptual.I3DFeatures(tmp_path)(clips)
        assert features == pytest.approx(clips.mean((1, 2, 3)), rel=1e-5)


class _MeanColour(torch.nn.Module):
    def forward(self, video: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert rescale and resize and return_features
        return video.mean([2, 3, 4])
