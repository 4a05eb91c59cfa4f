"""Checkpoints of the authors and of stock Chameleon -> complete WorldVLA checkpoints.

Knows two layouts and nothing of what a robot does with them:

    WorldVLA    a model folder (config.json, weights without an image tokenizer), a tokenizer folder (`base_model/`) and
                an image tokenizer folder (`chameleon/tokenizer/`: vqgan.yaml, vqgan.ckpt, text_tokenizer.json)
    Chameleon   a Hugging Face folder with the tokenizer in it; its image tokenizer has no decoder, so that the folder
                with vqgan.ckpt is needed too

Everything is checked before a byte is written; the output appears whole or not at all. Weights are copied tensor by
tensor (`convert_weights`) and compared with their source afterwards (`convert_report`).
"""

import hashlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import ChameleonConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from . import __version__
from .action_tokenization_worldvla import EMBODIMENTS, Embodiment
from .configuration_worldvla import WorldVLAConfig, WorldVLAVQVAEConfig
from .convert_report import (
    REPORT_NAME,
    check_output,
    compare_vocabularies,
    config_changes,
    write_report,
)
from .convert_weights import (
    StoredTensor,
    open_file,
    open_folder,
    read_json,
    require_file,
    write_folder,
)
from .image_processing_worldvla import WorldVLAImageProcessor
from .modeling_worldvla import WorldVLAForCausalLM
from .processing_worldvla import WorldVLAProcessor
from .prompts_worldvla import WORLD_PROMPTS

VQ_PREFIX = "model.vqmodel."
VQ_TRAINING_PREFIXES = ("loss.",)  # discriminator and perceptual loss of the VQ-GAN's own training
RECOMPUTED_SUFFIX = ".rotary_emb.inv_freq"  # a buffer in old checkpoints
QK_NORMS = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
# carried over from the source's config.json; everything else in it is either ours to decide or listed in the report
CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "swin_norm",
)
WORLDVLA_FIELDS = ("dropout", "z_loss_weight")  # the authors' additions
VQ_FIELDS = {  # vqgan.yaml -> config
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "attn_type": "attn_type",
    "dropout": "dropout",
    "in_channels": "in_channels",
    "resolution": "resolution",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}


@dataclass(frozen=True)
class Choices:
    """What a published checkpoint does not say about itself; see `WorldVLAProcessor` for the meaning."""

    target_size: int = 256
    num_actions: int = 5
    history: int = 2
    world_prompt: str = "training"
    embodiment: str = "libero"
    instruction_style: str = "as_given"

    def __post_init__(self) -> None:
        if self.world_prompt not in WORLD_PROMPTS:
            raise ValueError(f"world_prompt is one of {', '.join(WORLD_PROMPTS)}, not {self.world_prompt!r}")
        if self.embodiment not in EMBODIMENTS:
            raise ValueError(f"unknown embodiment {self.embodiment!r}: known are {', '.join(EMBODIMENTS)}")

    @property
    def robot(self) -> Embodiment:
        """The embodiment of that name."""
        return EMBODIMENTS[self.embodiment]


def convert_checkpoint(
    model: str | Path,
    output: str | Path,
    tokenizer: str | Path | None = None,
    vq: str | Path | None = None,
    choices: Choices | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    forward_limit: int = 10**9,
    progress: bool = False,
) -> dict[str, Any]:
    """Convert one checkpoint and return its report, which is also written beside it as `conversion_report.json`.

    Args:
        model: folder of the language model (a folder of `model_256/`, or a Hugging Face Chameleon folder).
        output: folder to write; empty or new, unless `overwrite` replaces a WorldVLA checkpoint there.
        tokenizer: folder with tokenizer.json (`base_model/`); the model folder by default.
        vq: folder with vqgan.yaml and vqgan.ckpt (`chameleon/tokenizer/`).
        choices: what the checkpoint does not say about itself.
        max_shard_bytes: size of an output file.
        forward_limit: bytes of weights up to which the result is also loaded and run once.
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: one line that says what was expected and what was found. Nothing is written then.
    """
    choices, output = choices or Choices(), Path(output)
    _check_target(output, [path for path in (model, tokenizer, vq) if path is not None], overwrite)
    source = read_source(model, tokenizer, vq)
    config = build_config(source, choices)
    vocabulary = compare_vocabularies(source.vocabularies, config.vocab_size, config.vq_config.num_embeddings)
    with torch.device("meta"):  # knows the names and shapes of its weights, and has no memory for them
        empty_model = WorldVLAForCausalLM(config)
    tensors, counts = plan_tensors(empty_model, source)
    processor = build_processor(source.tokenizer, choices)
    report: dict[str, Any] = {
        "generator": f"transformers_worldvla {__version__}",
        "layout": source.layout,
        "choices": {**asdict(choices), "prompts": processor.prompts},
        "tensors": counts,
        "vocabulary": vocabulary,
        "config": config_changes(source.config, config),
        "sources": describe_sources(source, progress),
    }
    with _new_folder(output, counts["bytes"]) as folder:
        dtype = next(tensor.dtype for tensor in tensors if tensor.name == "model.embed_tokens.weight")
        _save_without_weights(empty_model.to(dtype), folder)
        processor.save_pretrained(folder)
        _consume(write_folder(folder, tensors, max_shard_bytes), "writing weights", counts["bytes"], progress)
        report["self_check"] = check_output(folder, tensors, source.tokenizer_file, forward_limit, progress)
        write_report(folder / REPORT_NAME, report)
    return report


# -------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: everything but the values of its weights."""

    layout: str
    config: dict[str, Any]
    language_model: dict[str, StoredTensor]  # in the Chameleon layout with an image tokenizer without decoder
    vq_config: WorldVLAVQVAEConfig
    vq: dict[str, StoredTensor]
    tokenizer: PreTrainedTokenizerFast
    tokenizer_file: Path
    vocabularies: dict[str, dict[str, int] | None]  # name -> id in each file that has any
    files: dict[str, list[Path]]  # role -> what was read


def read_source(model: str | Path, tokenizer: str | Path | None, vq: str | Path | None) -> Source:
    """Open the three folders of a checkpoint. Raises FileNotFoundError and ValueError as `convert_checkpoint` does."""
    model_folder, tokenizer_folder = _folder("model", model), _folder("tokenizer", tokenizer or model)
    config_file = require_file(model_folder, "config.json", "the model's configuration")
    config = read_json(config_file)
    _check_layout(model_folder, config)
    language_model = open_folder(model_folder)
    if head := next((name for name in language_model if "action_head" in name), None):
        raise ValueError(_refuse_rynnvla(model_folder, f"it holds {head}"))
    layout = "Chameleon" if any(name.startswith(VQ_PREFIX) for name in language_model) else "WorldVLA"
    if vq is None:
        raise ValueError(_missing_vq(layout))
    vq_folder = _folder("vq", vq)
    vq_files = [
        require_file(vq_folder, "vqgan.yaml", "sizes of the image tokenizer"),
        require_file(vq_folder, "vqgan.ckpt", "weights of the image tokenizer with its decoder"),
    ]
    tokenizer_file = require_file(tokenizer_folder, "tokenizer.json", "the tokenizer; the authors' is in base_model/")
    read_json(tokenizer_file)  # says better what is wrong with a damaged one
    # not AutoTokenizer: some versions of transformers rebuild what tokenizer_config.json calls a Llama tokenizer
    text_tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    vocabularies = {"tokenizer.json": text_tokenizer.get_vocab(), "config.json": config.get("vocabulary_map")}
    if (names := vq_folder / "text_tokenizer.json").is_file():
        vocabularies[names.name] = _text_vocabulary(names)
        vq_files.append(names)
    return Source(
        layout=layout,
        config=config,
        language_model=language_model,
        vq_config=read_vq_config(vq_files[0]),
        vq=open_file(vq_files[1]),
        tokenizer=text_tokenizer,
        tokenizer_file=tokenizer_file,
        vocabularies=vocabularies,
        files={
            "model": [config_file, *sorted({tensor.file for tensor in language_model.values()})],
            "tokenizer": [tokenizer_file],
            "vq": vq_files,
        },
    )


def _folder(role: str, path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"{role} folder {path} does not exist: download the checkpoint and name its local folder"
        )
    return Path(path)


def _check_target(output: Path, sources: list[str | Path], overwrite: bool) -> None:
    """May this folder be written?"""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file: name a folder")
    if any(Path(source).resolve().is_relative_to(output.resolve()) for source in sources):
        raise ValueError(f"output folder {output} holds one of the sources: choose another folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"output folder {output} is not empty: choose another folder, or replace it with --overwrite")
    config = output / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != WorldVLAConfig.model_type:
        raise ValueError(
            f"output folder {output} holds something other than a WorldVLA checkpoint: choose another folder"
        )


def _check_layout(folder: Path, config: Mapping[str, Any]) -> None:
    """Is this a layout that can be converted? Raises ValueError that says what it is instead."""
    architectures = ", ".join(config.get("architectures") or ["none named"])
    if "action_head" in architectures or "time_horizon" in config:
        raise ValueError(_refuse_rynnvla(folder, f"architectures: {architectures}"))
    if config.get("model_type") == WorldVLAConfig.model_type:
        raise ValueError(f"{folder} is a transformers_worldvla checkpoint already: load it with from_pretrained")
    if config.get("model_type") != ChameleonConfig.model_type:
        raise ValueError(
            f"unknown layout of {folder}: expected a config.json with model_type {ChameleonConfig.model_type!r} (a "
            "model folder of WorldVLA, or a Hugging Face Chameleon folder), found model_type "
            f"{config.get('model_type')!r}, architectures: {architectures}"
        )


def _refuse_rynnvla(folder: Path, found: str) -> str:
    return (
        f"{folder} is a RynnVLA-002 checkpoint ({found}) and cannot be converted: its continuous action head and robot "
        "state tokens have no place in WorldVLA"
    )


def _missing_vq(layout: str) -> str:
    where = "--vq FOLDER with vqgan.yaml and vqgan.ckpt (chameleon/tokenizer/ of the published repositories)"
    if layout == "Chameleon":
        return f"a Chameleon checkpoint has no image decoder, so that it could not imagine frames: pass {where}"
    return f"a WorldVLA model folder has no image tokenizer: pass {where}"


def read_vq_config(path: Path) -> WorldVLAVQVAEConfig:
    """Sizes of the image tokenizer from `vqgan.yaml`. Raises ValueError when something it needs is not there."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        sizes = params["ddconfig"]
        fields = {ours: sizes[theirs] for theirs, ours in VQ_FIELDS.items() if theirs in sizes}
        fields |= {"num_embeddings": params["n_embed"], "embed_dim": params["embed_dim"]}
        if sizes["out_ch"] != sizes["in_channels"]:
            raise ValueError(f"out_ch {sizes['out_ch']} is not in_channels {sizes['in_channels']}")
        return WorldVLAVQVAEConfig(**fields)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no plain YAML file: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected model.params with ddconfig, n_embed and embed_dim; not found: {error}"
        ) from None


def _text_vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json(path).get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError(f"{path}: expected the vocabulary under model.vocab, found none")
    return vocabulary


def build_config(source: Source, choices: Choices) -> WorldVLAConfig:
    """Our configuration: sizes of the source, the authors' losses, dimensions of the embodiment."""
    try:
        chameleon = ChameleonConfig.from_dict(source.config)  # knows the older spellings of its own fields
    except StrictDataclassError as error:
        raise ValueError(f"the model's config.json is damaged: {' '.join(str(error).split())}") from None
    return WorldVLAConfig(
        **{name: getattr(chameleon, name) for name in CONFIG_FIELDS},
        **{name: source.config[name] for name in WORLDVLA_FIELDS if name in source.config},
        vq_config=source.vq_config,
        vocabulary_map=source.vocabularies["config.json"] or source.vocabularies["tokenizer.json"],
        action_dim=choices.robot.action_dim,
        num_cameras=choices.robot.num_cameras,
        loss_reduction="authors",
        generator_version=__version__,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, choices: Choices) -> WorldVLAProcessor:
    """The processor of one embodiment."""
    return WorldVLAProcessor(
        WorldVLAImageProcessor(target_size=choices.target_size),
        tokenizer,
        embodiments={choices.embodiment: choices.robot},
        default_embodiment=choices.embodiment,
        prompts={"world": choices.world_prompt},
        instruction_style=choices.instruction_style,
        num_actions=choices.num_actions,
        history=choices.history,
    )


# -------------------------------------------------------------------- planning


def plan_tensors(empty_model: WorldVLAForCausalLM, source: Source) -> tuple[list[StoredTensor], dict[str, Any]]:
    """Which tensor of the output comes from where, and the counts for the report.

    Raises ValueError when a tensor is missing, unknown or of another shape. Only the image tokenizer's file may hold
    more than its encoder, codebook and decoder: the state of its own training, which is left out.
    """
    expected = {name: tuple(value.shape) for name, value in empty_model.state_dict().items()}
    if empty_model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    stock_vq, recomputed, language_model = {}, [], []
    for name, tensor in source.language_model.items():
        if name.startswith(VQ_PREFIX):
            stock_vq[name.removeprefix(VQ_PREFIX)] = tensor
        elif name.endswith(RECOMPUTED_SUFFIX):
            recomputed.append(name)
        else:
            language_model.append(_for_every_head(tensor, expected.get(name)))
    if quantized := [tensor.name for tensor in language_model if not tensor.dtype.is_floating_point]:
        raise ValueError(f"quantized weights, such as {quantized[0]}, cannot be converted: take the unquantized ones")
    if unknown := [tensor.name for tensor in language_model if tensor.name not in expected]:
        raise ValueError(_mismatch("holds tensors that WorldVLA does not have", unknown))

    vq = {VQ_PREFIX + name: tensor.cast(torch.float32).rename(VQ_PREFIX + name) for name, tensor in source.vq.items()}
    planned = [*language_model, *(tensor for name, tensor in vq.items() if name in expected)]
    names = {tensor.name for tensor in planned}
    if missing := [name for name in expected if name not in names]:
        raise ValueError(_mismatch("lacks tensors", missing))
    if wrong := [tensor for tensor in planned if tensor.shape != expected[tensor.name]]:
        shapes = [f"{tensor.name} {tensor.shape} for {expected[tensor.name]}" for tensor in wrong]
        raise ValueError(_mismatch("has tensors of another shape than its configuration says", shapes))
    training = [name for name in source.vq if name.startswith(VQ_TRAINING_PREFIXES)]
    counts = {
        "read": len(source.language_model) + len(source.vq),
        "written": len(planned),
        "bytes": sum(tensor.nbytes for tensor in planned),
        "qk_norms_repeated": sum(tensor.shape != source.language_model[tensor.name].shape for tensor in language_model),
        "left_out": len(training) + len(recomputed) + len(stock_vq),
        "missing": [],
        "unexpected": [name for name in source.vq if VQ_PREFIX + name not in expected and name not in training],
        "language_model_dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in language_model}),
        "encoder_difference": compare_encoders(stock_vq, source.vq) if stock_vq else None,
    }
    return planned, counts


def _for_every_head(tensor: StoredTensor, shape: tuple[int, ...] | None) -> StoredTensor:
    """q/k norms are stored once for each of r model-parallel ranks, (r, head_dim): repeat each for its heads."""
    if not tensor.name.endswith(QK_NORMS) or shape is None or len(tensor.shape) != 2 or not tensor.shape[0]:
        return tensor
    return tensor.repeat_rows(shape[0]) if shape[0] % tensor.shape[0] == 0 else tensor


def _mismatch(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"unknown layout: the checkpoint {what} ({len(names)}): {shown}"


def compare_encoders(stock: Mapping[str, StoredTensor], vq: Mapping[str, StoredTensor]) -> float:
    """Largest difference between the image tokenizer in a Chameleon folder and that of vqgan.ckpt, relative to the
    largest value of the tensor; the former may be stored in half precision.

    Raises ValueError when they are two different ones: the language model would not know the codes.
    """
    largest = 0.0
    for name, tensor in stock.items():
        if name not in vq or vq[name].shape != tensor.shape:
            raise ValueError(f"--vq is not the image tokenizer of --model: {name} is missing or has another shape")
        ours, theirs = vq[name].read().float(), tensor.read().float()
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
        if difference > torch.finfo(tensor.dtype).eps:
            raise ValueError(
                f"--vq is not the image tokenizer of --model: {name} differs by {difference:.1e} of its range"
            )
        largest = max(largest, difference)
    return largest


# -------------------------------------------------------------------- writing


def describe_sources(source: Source, progress: bool) -> list[dict[str, Any]]:
    """Role, name, bytes and sha256 of every file that was read."""
    descriptions = []
    paths = [(role, path) for role, members in source.files.items() for path in members]
    for role, path in tqdm(paths, "hashing sources", disable=not progress):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        descriptions.append({"role": role, "name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return descriptions


def _save_without_weights(empty_model: WorldVLAForCausalLM, folder: Path) -> None:
    """Configuration, generation defaults, code and card, as `save_pretrained` writes them."""
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        empty_model.save_pretrained(folder, state_dict={})
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def _consume(written: Iterator[int], label: str, total: int, progress: bool) -> None:
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
        for nbytes in written:
            bar.update(nbytes)


@contextmanager
def _new_folder(output: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    Raises ValueError when `nbytes` do not fit there.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < nbytes:
        raise ValueError(f"{output.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {nbytes / 1e9:.1f} GB")
    suffix = uuid.uuid4().hex[:8]
    folder, old = (output.with_name(f".{output.name}-{suffix}-{kind}") for kind in ("new", "old"))
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            output.rename(old)
        try:
            folder.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
