"""What a conversion checks and says: vocabularies against one another, the configuration against its source, and the
written checkpoint against the files it was made from.

Checks that make a checkpoint wrong raise; the rest is numbers and warnings in the report. Nothing here writes weights.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tqdm import tqdm

from .configuration_worldvla import WorldVLAConfig
from .convert_weights import StoredTensor, open_folder, raw_bytes
from .image_processing_worldvla import WorldVLAImageProcessor
from .modeling_worldvla import WorldVLAForCausalLM
from .processing_worldvla import WorldVLAProcessor
from .prompts_worldvla import fill_template
from .tokens_worldvla import IMAGE_PLACEHOLDERS, WorldVLATokens, published_vocabulary
from .vqvae_worldvla import WorldVLAVQVAE

REPORT_NAME = "conversion_report.json"
INSTRUCTION = "put both moka pots on the stove, then open drawer 2"
PATTERN_SIZE = 256
_PUBLISHED_CODE_OFFSET = 4
# housekeeping of transformers, and fields that are carried over under another name or compared elsewhere
_NOT_COMPARED = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
    "vocabulary_map",
    "vq_config",
}


# -------------------------------------------------------------------- before anything is written


def compare_vocabularies(
    vocabularies: Mapping[str, dict[str, int] | None], vocab_size: int, num_codes: int
) -> dict[str, Any]:
    """Do the files name the same tokens? `vocabularies` holds name -> id of each file, None where a file has none.

    Raises ValueError when two files give one name two ids, when a file lacks a token of the grammar, when an id of the
    grammar or of a text piece lies outside the `vocab_size` embeddings, and when there are not `num_codes` image codes.
    """
    present = {file: vocabulary for file, vocabulary in vocabularies.items() if vocabulary is not None}
    grammars = {}
    for file, vocabulary in present.items():
        try:
            grammars[file] = WorldVLATokens.from_vocabulary(vocabulary)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if outside := [name for name, token in vocabulary.items() if token >= vocab_size]:
            raise ValueError(
                f"{file}: {len(outside)} tokens lie outside the model's {vocab_size} embeddings, among them "
                f"{outside[0]!r} ({vocabulary[outside[0]]}): this vocabulary belongs to another model"
            )
    reference, *others = present
    only: dict[str, int] = {}
    for file in others:
        first, second = present[reference], present[file]
        if conflicts := [name for name in first if name in second and first[name] != second[name]]:
            name = conflicts[0]
            raise ValueError(
                f"{reference} and {file} do not belong together: {len(conflicts)} tokens have different ids, "
                f"for example {name!r} ({first[name]} and {second[name]})"
            )
        if grammars[reference] != grammars[file]:
            raise ValueError(f"{reference} and {file} do not belong together: they do not name the same image tokens")
        renamed = set(IMAGE_PLACEHOLDERS)  # one id, two names
        only[f"{reference} but not {file}"] = len(set(first) - set(second) - renamed)
        only[f"{file} but not {reference}"] = len(set(second) - set(first) - renamed)
    tokens = grammars[reference]
    if len(tokens.image_codes) != num_codes:
        raise ValueError(
            f"the vocabulary names {len(tokens.image_codes)} image codes, the image tokenizer of --vq has {num_codes}: "
            "they do not belong together"
        )
    published = WorldVLATokens.from_vocabulary(published_vocabulary())
    plain = tuple(range(_PUBLISHED_CODE_OFFSET, _PUBLISHED_CODE_OFFSET + num_codes))
    specials = ("bos", "separator", "image_start", "image_end", "image_newline", "action_start", "action_end")
    return {
        "files": list(present),
        "size": vocab_size,
        "image_codes": num_codes,
        "image_codes_are_code_plus_4": tokens.image_codes == plain,
        "special_ids_are_the_published_ones": all(getattr(tokens, n) == getattr(published, n) for n in specials)
        and tokens.action_bins == published.action_bins,
        "names_in": only,
    }


def config_changes(source: Mapping[str, Any], config: WorldVLAConfig) -> dict[str, Any]:
    """Fields of the source's config.json that the new one says differently or not at all: {field: [source, ours]}."""
    ours = config.to_dict()
    theirs = {key: value for key, value in source.items() if key not in _NOT_COMPARED}
    changed = {key: [value, ours[key]] for key, value in theirs.items() if key in ours and ours[key] != value}
    source_vq, vq = source.get("vq_config") or {}, config.vq_config.to_dict()
    changed |= {
        f"vq_config.{key}": [value, vq[key]]
        for key, value in source_vq.items()
        if key in vq and key not in _NOT_COMPARED and json.dumps(vq[key]) != json.dumps(value)
    }
    return {"changed": changed, "left_out": {key: value for key, value in theirs.items() if key not in ours}}


# -------------------------------------------------------------------- what was written


def check_output(
    folder: Path, planned: list[StoredTensor], tokenizer_file: Path, forward_limit: int, progress: bool
) -> dict[str, Any]:
    """Read the written checkpoint back and compare it with its sources. Raises ValueError where it is not the same."""
    compare_tensors(folder, planned, progress)
    config = WorldVLAConfig.from_pretrained(folder)
    processor = WorldVLAProcessor.from_pretrained(folder)
    compare_tokenizers(processor, tokenizer_file)
    pattern = draw_pattern()
    psnr, flat_psnr = reconstruction_psnr(folder, config, pattern)
    result: dict[str, Any] = {
        "tensors_bit_equal": len(planned),
        "prompts_tokenized_equally": len(processor.prompts),
        "reconstruction_psnr_db": psnr,
        "flat_picture_psnr_db": flat_psnr,
        "forward": None,
    }
    nbytes = sum(tensor.nbytes for tensor in planned)
    if nbytes <= forward_limit:
        result["forward"] = run_once(folder, processor, pattern)
    else:
        result["forward_skipped"] = f"{nbytes / 1e9:.1f} GB of weights are more than {forward_limit / 1e9:.1f} GB"
    return result


def compare_tensors(folder: Path, planned: Iterable[StoredTensor], progress: bool) -> None:
    """Is every tensor in a folder, bit for bit, what was planned?"""
    written = open_folder(folder)
    planned = list(planned)
    if sorted(written) != sorted(tensor.name for tensor in planned):
        raise ValueError(f"{folder} does not hold the tensors that were written to it")
    for tensor in tqdm(planned, "comparing weights", disable=not progress):
        copy = written[tensor.name]
        same = (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        if not same or not torch.equal(raw_bytes(copy.read()), raw_bytes(tensor.read())):
            raise ValueError(f"{tensor.name} was not written as it was read: is the disk full or damaged?")


def compare_tokenizers(processor: WorldVLAProcessor, tokenizer_file: Path) -> None:
    """Does the saved tokenizer split the prompts as the source's tokenizer.json does?"""
    original = Tokenizer.from_file(str(tokenizer_file))
    for template in processor.prompts.values():
        text = fill_template(template, INSTRUCTION)
        ours = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = original.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise ValueError(
                f"{tokenizer_file} splits {text!r} differently after conversion: {ours[:8]} for {theirs[:8]}"
            )


def draw_pattern() -> Image.Image:
    """A picture with colour ramps, edges in all directions and flat areas, (256, 256) pixels."""
    y, x = np.mgrid[:PATTERN_SIZE, :PATTERN_SIZE] / (PATTERN_SIZE - 1)
    picture = np.stack([x, y, 1 - (x + y) / 2], axis=-1)
    radius = np.hypot(x - 0.3, y - 0.35)
    picture[radius < 0.2] = (0.9, 0.2, 0.15)
    picture[(x > 0.55) & (y > 0.6) & (x - y < 0.2)] = (0.1, 0.15, 0.5)
    checkers = (np.floor(x * 16) + np.floor(y * 16)) % 2 == 0
    picture[checkers & (x > 0.7) & (y < 0.4)] = 1.0
    return Image.fromarray((picture * 255).astype(np.uint8))


@torch.inference_mode()
def reconstruction_psnr(folder: Path, config: WorldVLAConfig, picture: Image.Image) -> tuple[float, float]:
    """PSNR in dB of a picture that went through the written image tokenizer, and of its mean colour."""
    prefix = "model.vqmodel."
    tensors = open_folder(folder)
    state = {name.removeprefix(prefix): tensors[name].read() for name in tensors if name.startswith(prefix)}
    with torch.device("meta"):
        vqmodel = WorldVLAVQVAE(config.vq_config)
    vqmodel.load_state_dict(state, assign=True)
    images = WorldVLAImageProcessor(target_size=PATTERN_SIZE)
    pixels = torch.from_numpy(images.pixels(picture))[None]
    decoded = images.postprocess(vqmodel.decode_codes(vqmodel.encode_codes(pixels)))[0]
    original, mean = np.asarray(picture, np.float64), np.asarray(picture, np.float64).mean((0, 1))
    return psnr(original, np.asarray(decoded)), psnr(original, np.broadcast_to(mean, original.shape))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures of 0..255, in dB."""
    error = float(np.mean((first - second) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


@torch.inference_mode()
def run_once(folder: Path, processor: WorldVLAProcessor, picture: Image.Image) -> dict[str, Any]:
    """Load the checkpoint and answer one prompt. Raises ValueError when logits are not finite."""
    model = WorldVLAForCausalLM.from_pretrained(folder, dtype="auto").eval()
    inputs = processor(images=[picture], instruction=INSTRUCTION)
    logits = model(**inputs).logits
    if not logits.isfinite().all():
        raise ValueError("the converted model gives logits that are not finite: are the source's weights damaged?")
    actions = processor.decode_actions(model.generate_actions(**inputs, num_actions=1))
    return {
        "logits_finite": True,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "first_action": actions[0, 0].tolist(),
    }


# -------------------------------------------------------------------- telling


def find_warnings(report: Mapping[str, Any]) -> list[str]:
    """What the numbers of a report mean where they are unusual."""
    lines = []
    check = report["self_check"]
    if check["reconstruction_psnr_db"] < check["flat_picture_psnr_db"]:
        lines.append("the image tokenizer reconstructs a test picture worse than its mean colour would: is it trained?")
    if report["tensors"]["unexpected"]:
        names = report["tensors"]["unexpected"]
        lines.append(
            f"vqgan.ckpt holds {len(names)} tensors that are no part of an image tokenizer, such as {names[0]}"
        )
    if report["config"]["left_out"].get("mask_image_logits"):
        lines.append("the source forbade image tokens in its answers (mask_image_logits); WorldVLA allows them")
    if any(key.startswith("vq_config.") for key in report["config"]["changed"]):
        lines.append("config.json and vqgan.yaml describe two image tokenizers; vqgan.yaml was used")
    if any(report["vocabulary"]["names_in"].values()):
        lines.append("the vocabularies do not hold the same names: see names_in of the report")
    return lines


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Add the warnings and write the report as JSON."""
    report["warnings"] = find_warnings(report)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def format_report(report: Mapping[str, Any]) -> str:
    """The report for people, some fifteen lines."""
    tensors, vocabulary, check = report["tensors"], report["vocabulary"], report["self_check"]
    forward = check["forward"]
    rows = [
        ("layout", report["layout"]),
        *((f"choice: {name}", value) for name, value in report["choices"].items() if name != "prompts"),
        ("world prompt", report["choices"]["prompts"]["world"]),
        ("tensors", f"{tensors['read']} read, {tensors['written']} written, {tensors['left_out']} left out"),
        ("", f"{len(tensors['missing'])} missing, {len(tensors['unexpected'])} unexpected"),
        ("", f"{tensors['qk_norms_repeated']} q/k norms repeated for every head"),
        (
            "weights",
            f"{tensors['bytes'] / 1e6:,.1f} MB, language model in {', '.join(tensors['language_model_dtypes'])}",
        ),
        ("image codes", f"{vocabulary['image_codes']}, {_code_rule(vocabulary)}"),
        ("vocabulary", f"{vocabulary['size']} tokens, the same ids in {', '.join(vocabulary['files'])}"),
        (
            "config",
            "; ".join(f"{key} {a} -> {b}" for key, (a, b) in report["config"]["changed"].items()) or "as it was",
        ),
        ("compared", f"{check['tensors_bit_equal']} tensors bit-equal with their source"),
        ("image tokenizer", f"{check['reconstruction_psnr_db']:.1f} dB on a test picture"),
        ("forward", "logits finite" if forward else f"skipped: {check['forward_skipped']}"),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    return "\n".join([*lines, *(f"warning: {line}" for line in report["warnings"])])


def _code_rule(vocabulary: Mapping[str, Any]) -> str:
    plain = vocabulary["image_codes_are_code_plus_4"]
    return "ids are code + 4" if plain else "ids are not code + 4 (read from the names)"
