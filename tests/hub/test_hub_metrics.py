"""The `evaluate` modules, loaded from their files: the numbers of the library."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transformers_worldvla.evaluation.metrics import psnr

evaluate = pytest.importorskip("evaluate")
skimage = pytest.importorskip("skimage.metrics")
pytest.importorskip("torchmetrics")

METRICS = Path(__file__).parents[2] / "hub" / "metrics"


@pytest.fixture
def pictures() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    recorded = [rng.integers(0, 200, (32, 40, 3), dtype=np.uint8) for _ in range(3)]
    return [picture + np.uint8(5 * number + 5) for number, picture in enumerate(recorded)], recorded


def load(name: str, tmp_path: Path) -> "evaluate.Metric":
    return evaluate.load(str(METRICS / name / f"{name}.py"), cache_dir=str(tmp_path))


def test_frame_quality(pictures: tuple[list[np.ndarray], list[np.ndarray]], tmp_path: Path) -> None:
    imagined, recorded = pictures
    found = load("frame_quality", tmp_path).compute(
        predictions=[Image.fromarray(picture) for picture in imagined],
        references=[Image.fromarray(picture) for picture in recorded],
    )
    assert found["psnr"] == pytest.approx(np.mean([psnr(*pair) for pair in zip(imagined, recorded, strict=True)]))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    expected = [skimage.structural_similarity(*pair, **options) for pair in zip(imagined, recorded, strict=True)]
    assert found["ssim"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_unknown_names_and_missing_networks_are_said(
    pictures: tuple[list[np.ndarray], list[np.ndarray]], tmp_path: Path
) -> None:
    frames = {
        name: [Image.fromarray(p) for p in each]
        for name, each in zip(("predictions", "references"), pictures, strict=True)
    }
    with pytest.raises(ValueError, match="fid"):
        load("frame_quality", tmp_path).compute(**frames, metrics=["fid"])
    with pytest.raises(OSError, match="vgg16-397923af.pth is not there"):
        load("frame_quality", tmp_path).compute(**frames, metrics=["lpips"], weights=str(tmp_path))
    clips = {name: [each, each] for name, each in frames.items()}
    with pytest.raises(OSError, match="i3d_torchscript.pt is not there"):
        load("fvd", tmp_path).compute(**clips, weights=str(tmp_path))
    with pytest.raises(ValueError, match="3 and 2 frames"):
        load("fvd", tmp_path).compute(**clips | {"references": [each[:2] for each in clips["references"]]})
