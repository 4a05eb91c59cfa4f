"""How alike imagined and recorded pictures are to people: SSIM, LPIPS and FVD.

SSIM comes from torchmetrics. LPIPS takes torchmetrics' linear heads over a VGG16 of its own, because every kept package
builds that from torchvision, which need not be there. FVD runs the I3D network that the field's implementations share
(StyleGAN-V's TorchScript file). The networks are fetched from the Hub at fixed revisions, or read from a folder, and
their SHA-256 is checked before anything is loaded; `MissingWeights` says what lacks. PSNR is in `metrics`.

Pictures are uint8 RGB, (..., H, W, 3); every function returns one number a picture, or features a clip.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # as in piqa, which RynnVLA-002 measures with, and in Wang et al. 2004
SMALLEST_SIDE = 16  # pixels: VGG16 halves a picture four times
CLIP_SIDE = 224  # pixels that the I3D file scales its clips to
MIN_CLIPS = 16  # fewer, and FVD says nothing at all
FRAMES_AT_ONCE = 32


class MissingWeights(OSError):
    """A network that a metric needs is not here and cannot be fetched, or is not the right one."""


@dataclass(frozen=True)
class Weights:
    """A file on the Hub, by its content."""

    repository: str
    revision: str
    path: str
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


I3D = Weights(
    "flateon/FVD-I3D-torchscript",
    "1c2d61711c52571ad617a1063e6fa691b212e184",
    "i3d_torchscript.pt",
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
)
VGG16 = Weights(  # torchvision's, whose name ends in the hash's beginning
    "ByteDance/LatentSync-1.6",
    "c42c7e6c8e9c213626389fa7d9a3c444b8536353",
    "auxiliary/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)


def find_weights(weights: Weights, folder: str | Path | None = None) -> Path:
    """The file, from a folder or from the Hub (and its cache). Raises MissingWeights."""
    if folder is not None:
        path = Path(folder) / weights.name
        if not path.is_file():
            raise MissingWeights(f"{path} is not there")
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(weights.repository, weights.path, revision=weights.revision))
        except (OSError, ValueError) as error:  # no network, offline mode, gone
            reason = str(error).strip().splitlines()[0]
            where = f"{weights.name} cannot be had from the Hub ({weights.repository})"
            raise MissingWeights(f"{where}: {reason}; put it into a folder and name that with --weights") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != weights.sha256:
        raise MissingWeights(f"{path} is another file than {weights.name}: its SHA-256 is {found}")
    return path


# -------------------------------------------------------------------- SSIM


def ssim(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Structural similarity of pictures (..., H, W, 3) with references of the same shape: (...) in [-1, 1].

    Gaussian window of 11 pixels with sigma 1.5, values in [0, 1], K = (0.01, 0.03), only windows that lie inside the
    picture, mean over the colours. Raises ValueError on another dtype or shape, and ImportError without torchmetrics.
    """
    measure = _import_torchmetrics().functional.image.structural_similarity_index_measure
    options = {"sigma": SSIM_SIGMA, "data_range": 1.0, "reduction": "none", "return_full_image": True}
    edge, values = SSIM_WINDOW // 2, []
    for one, two in _slices(*_tensor_pairs(pictures, references)):
        _, windows = measure(one.double(), two.double(), **options)  # (n, 3, H, W), those over the edge padded ...
        values.append(windows[..., edge:-edge, edge:-edge].mean((1, 2, 3)))  # ... and no part of the published SSIM
    return torch.cat(values).numpy().reshape(np.shape(pictures)[:-3])


def _import_torchmetrics() -> Any:
    if find_spec("torchmetrics") is None:
        raise ImportError('SSIM and LPIPS need torchmetrics: pip install "transformers_worldvla[metrics]"')
    import torchmetrics

    return torchmetrics


def _tensor_pairs(pictures: np.ndarray, references: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as (n, 3, H, W) in [0, 1]."""
    pictures, references = np.asarray(pictures), np.asarray(references)
    if pictures.dtype != np.uint8 or references.dtype != np.uint8:
        raise ValueError(f"uint8 pictures are compared, not {pictures.dtype} and {references.dtype}")
    if pictures.shape != references.shape or pictures.ndim < 3 or pictures.shape[-1] != 3:
        raise ValueError(f"(..., H, W, 3) of one shape are compared, not {pictures.shape} and {references.shape}")
    if min(pictures.shape[-3:-1]) < SMALLEST_SIDE:
        raise ValueError(f"pictures of at least {SMALLEST_SIDE} pixels a side are compared, not {pictures.shape}")
    flat = (values.reshape(-1, *values.shape[-3:]) for values in (pictures, references))
    first, second = (
        torch.from_numpy(np.ascontiguousarray(values)).permute(0, 3, 1, 2).float() / 255 for values in flat
    )
    return first, second


def _slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    yield from zip(*(tensor.split(FRAMES_AT_ONCE) for tensor in tensors), strict=True)


# -------------------------------------------------------------------- LPIPS


class Lpips(nn.Module):
    """LPIPS 0.1 with VGG16 (Zhang et al. 2018): distance of deep features, 0 for equal pictures.

    `layers` are VGG16's convolutions as torchvision numbers them, `heads` one weight a channel of five of its layers.
    """

    CHANNELS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    READ_AFTER = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for channels in self.CHANNELS:
            if isinstance(channels, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
        self.layers = nn.Sequential(*layers)
        sizes = [self.layers[position - 1].out_channels for position in self.READ_AFTER]
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(1, size, 1, 1)) for size in sizes)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    @classmethod
    def from_weights(cls, folder: str | Path | None = None, device: Any = "cpu") -> "Lpips":
        """With the published weights. Raises MissingWeights, and ImportError without torchmetrics."""
        heads_file = Path(_import_torchmetrics().__file__).parent / "functional/image/lpips_models/vgg.pth"
        backbone = torch.load(find_weights(VGG16, folder), map_location="cpu", weights_only=True)
        heads = torch.load(heads_file, map_location="cpu", weights_only=True)
        model = cls()
        model.layers.load_state_dict({k.removeprefix("features."): v for k, v in backbone.items() if "features." in k})
        for number, head in enumerate(model.heads):
            head.copy_(heads[f"lin{number}.model.1.weight"])
        return model.to(device)

    def forward(self, pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, H, W) in [-1, 1] and references of the same shape: (n,)."""
        total: Any = 0.0
        first, second = ((values - self.shift) / self.scale for values in (pictures, references))
        heads = iter(self.heads)
        for position, layer in enumerate(self.layers):
            first, second = layer(first), layer(second)
            if position in self.READ_AFTER:
                difference = (_unit_length(first) - _unit_length(second)).square()
                total = total + (difference * next(heads)).sum(1).mean((1, 2))
        return total

    @torch.no_grad()
    def measure(self, pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
        """LPIPS of pictures (..., H, W, 3) uint8: (...)."""
        first, second = _tensor_pairs(pictures, references)
        device = self.shift.device
        values = [self(2 * one.to(device) - 1, 2 * two.to(device) - 1).cpu() for one, two in _slices(first, second)]
        return torch.cat(values).double().numpy().reshape(np.shape(pictures)[:-3])


def _unit_length(features: torch.Tensor) -> torch.Tensor:
    """Features (n, C, H, W), each pixel's of length 1, as torchmetrics does."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


# -------------------------------------------------------------------- FVD


class I3DFeatures:
    """Features of clips by the I3D network trained on Kinetics-400, for FVD. Raises MissingWeights."""

    def __init__(self, folder: str | Path | None = None, device: Any = "cpu"):
        self._network = torch.jit.load(find_weights(I3D, folder), map_location=device).eval()
        self._device = device

    @torch.no_grad()
    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Clips (N, T, H, W, 3) uint8 -> features (N, D) float64, one clip at a time."""
        features = []
        for clip in clips:
            video = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)[None].float().to(self._device)
            features.append(self._network(video, rescale=True, resize=True, return_features=True).flatten().cpu())
        return torch.stack(features).double().numpy()


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the Gaussians that fit two sets of features (N, D) and (M, D).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), covariances divided by N - 1. Raises ValueError for fewer
    than two rows.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features are (N, D) and (M, D) with N, M >= 2, not {first.shape} and {second.shape}")
    offset = first.mean(0) - second.mean(0)
    covariances = [np.atleast_2d(np.cov(values, rowvar=False)) for values in (first, second)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # S1^(1/2): then root S2 root has the eigenvalues of S1 S2
    eigenvalues = np.linalg.eigvalsh(root @ covariances[1] @ root)
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(offset @ offset + traces - 2 * np.sqrt(eigenvalues.clip(0)).sum())


def fvd_name(clips: int, frames: int) -> str:
    """The protocol that belongs beside every FVD: `fvd_i3d_n512_t16_224`."""
    return f"fvd_i3d_n{clips}_t{frames}_{CLIP_SIDE}"


def fvd(generated: np.ndarray, recorded: np.ndarray) -> tuple[float | None, str | None]:
    """Frechet video distance of I3D features (N, D) of each side, and what to know about it.

    None and the reason with fewer than `MIN_CLIPS` clips; a warning beside the number while the clips are too few for
    covariances of full rank, where it is biased upwards and comparable at the same N only.
    """
    clips, width = min(len(generated), len(recorded)), np.shape(recorded)[1]
    if clips < MIN_CLIPS:
        return None, f"{clips} clips are too few for FVD, at least {MIN_CLIPS} are needed"
    warning = None
    if clips <= width:
        warning = f"{clips} clips for {width} features: compare this FVD only with others of as many clips"
    return frechet_distance(generated, recorded), warning
