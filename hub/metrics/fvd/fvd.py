"""Frechet video distance of imagined clips, as a metric of the `evaluate` library.

    import evaluate
    metric = evaluate.load("fvd.py")
    metric.compute(predictions=imagined, references=recorded)     # lists of clips, each a list of pictures
    # {"fvd": 336.8, "protocol": "fvd_i3d_n512_t16_224", "warning": None}

The formulas are those of `worldvla evaluate world-model`: transformers_worldvla.evaluation.perceptual.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
FVD with the I3D network of StyleGAN-V's TorchScript file. FVD moves with the number of clips, their length and how they
are scaled: `protocol` names all of it, and belongs beside the number. Below 16 clips there is no number.
"""
_INPUTS = """\
predictions: list of clips, a clip is a list of pictures (PIL images or (H, W, 3) uint8 arrays), all of one length
references: as many clips of that length, or more
weights: folder with i3d_torchscript.pt, instead of the Hub
device: torch device of the network
"""
_CITATION = """\
@article{unterthiner2018fvd, title={Towards Accurate Generative Models of Video: A New Metric & Challenges},
  author={Unterthiner, Thomas and others}, journal={arXiv preprint arXiv:1812.01717}, year={2018}}
"""


class FVD(evaluate.Metric):
    """One number for all clips."""

    def _info(self) -> evaluate.MetricInfo:
        clip = datasets.Sequence(datasets.Image())
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": clip, "references": clip}),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], weights: str | None = None, device: str = "cpu"
    ) -> dict[str, Any]:
        from transformers_worldvla.evaluation.perceptual import I3DFeatures, fvd, fvd_name

        clips = [_clips(predictions), _clips(references)]
        if clips[0].shape[1] != clips[1].shape[1]:
            raise ValueError(f"clips have {clips[0].shape[1]} and {clips[1].shape[1]} frames: cut them to one length")
        network = I3DFeatures(weights, device)
        value, warning = fvd(*(network(values) for values in clips))
        return {"fvd": value, "protocol": fvd_name(len(clips[0]), clips[0].shape[1]), "warning": warning}


def _clips(clips: list[Any]) -> np.ndarray:
    """(N, T, H, W, 3) uint8. Raises ValueError when clips differ in length or size."""
    frames = [np.stack([np.asarray(picture.convert("RGB")) for picture in clip]) for clip in clips]
    if len({each.shape for each in frames}) != 1:
        raise ValueError("clips have one length and one picture size")
    return np.stack(frames)
