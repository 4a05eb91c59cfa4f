"""PSNR, SSIM and LPIPS of imagined frames, as a metric of the `evaluate` library.

    import evaluate
    metric = evaluate.load("frame_quality.py")
    metric.compute(predictions=imagined, references=recorded)          # lists of pictures: {"psnr": ..., "ssim": ...}
    metric.compute(predictions=imagined, references=recorded, metrics=["lpips"], weights="metric-weights")

The formulas are those of `worldvla evaluate world-model`: transformers_worldvla.evaluation.metrics and .perceptual.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Mean PSNR (dB, epsilon 1e-8), SSIM (Gaussian window 11, sigma 1.5) and LPIPS (VGG16, 0.1) of pictures beside references.
Pictures are 8-bit RGB; the two of a pair have the same size, of at least 16 pixels a side.
"""
_INPUTS = """\
predictions: list of pictures (PIL images or (H, W, 3) uint8 arrays)
references: as many pictures
metrics: names out of psnr, ssim, lpips (psnr and ssim)
weights: folder with vgg16-397923af.pth, for lpips without the Hub
"""
_CITATION = """\
@article{cen2025worldvla, title={WorldVLA: Towards Autoregressive Action World Model}, author={Cen, Jun and others},
  journal={arXiv preprint arXiv:2506.21539}, year={2025}}
"""


class FrameQuality(evaluate.Metric):
    """One mean a metric over all pairs."""

    def _info(self) -> evaluate.MetricInfo:
        picture = datasets.Image()
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": picture, "references": picture}),
        )

    def _compute(
        self,
        predictions: list[Any],
        references: list[Any],
        metrics: tuple[str, ...] = ("psnr", "ssim"),
        weights: str | None = None,
    ) -> dict[str, float]:
        from transformers_worldvla.evaluation.metrics import psnr
        from transformers_worldvla.evaluation.perceptual import Lpips, ssim

        known = {"psnr": psnr, "ssim": ssim}
        if unknown := set(metrics) - {*known, "lpips"}:
            raise ValueError(f"metrics are psnr, ssim and lpips, not {sorted(unknown)}")
        if "lpips" in metrics:
            known["lpips"] = Lpips.from_weights(weights).measure
        pairs = [
            tuple(np.asarray(one.convert("RGB")) for one in pair) for pair in zip(predictions, references, strict=True)
        ]
        return {name: float(np.mean([known[name](*pair) for pair in pairs])) for name in metrics}
