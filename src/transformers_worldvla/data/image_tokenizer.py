"""The image tokenizer of a checkpoint on its own: loaded without the decoder, and told apart from others by its hash.

A 7B checkpoint holds some 270 MB of it; only the files that hold them are fetched and only they are read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..configuration_worldvla import WorldVLAConfig
from ..vqvae_worldvla import WorldVLAVQVAE
from .storage import first_line

PREFIX = "model.vqmodel."
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PIXELS_ONLY = ("decoder.", "post_quant_conv.")  # what turns codes back into pixels and has no say in the codes


def load_image_tokenizer(checkpoint: str, **options: Any) -> WorldVLAVQVAE:
    """The image tokenizer of a checkpoint folder or Hub id, on the CPU. `options` are `revision`, `local_files_only`.

    Raises ValueError when its weights are missing, incomplete or damaged.
    """
    from safetensors import SafetensorError, safe_open

    config = WorldVLAConfig.from_pretrained(checkpoint, **options)
    names = [WEIGHTS]
    index = _find_file(checkpoint, INDEX, **options)
    if index is not None:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({place for name, place in places.items() if name.startswith(PREFIX)})
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        path = _find_file(checkpoint, name, **options)
        if path is None:
            raise ValueError(f"{checkpoint} lacks {name}")
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(PREFIX)]
                weights |= {key.removeprefix(PREFIX): file.get_tensor(key) for key in keys}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    vqvae = WorldVLAVQVAE(config.vq_config)
    if missing := sorted(set(vqvae.state_dict()) - set(weights)):
        raise ValueError(f"{checkpoint} lacks {PREFIX}{missing[0]} ({len(missing)} weights of the image tokenizer)")
    try:
        vqvae.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint}: the image tokenizer does not fit its config: {first_line(error)}") from error
    return vqvae


def hash_image_tokenizer(vqvae: WorldVLAVQVAE) -> str:
    """sha256 of all that decides which codes a picture gets: names, shapes and float32 values of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vqvae.state_dict().items()):
        if not name.startswith(PIXELS_ONLY):
            values = tensor.detach().cpu().float().contiguous().numpy()
            digest.update(f"{name} {values.shape}\0".encode() + values.tobytes())
    return digest.hexdigest()


def _find_file(checkpoint: str, name: str, **options: Any) -> Path | None:
    """A file of a checkpoint, fetched if need be; None when there is none."""
    from transformers.utils import cached_file

    found = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **options)
    return None if found is None else Path(found)
