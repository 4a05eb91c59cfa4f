"""The processor: pictures, instructions and actions in, model inputs out; token ids in, actions and pictures out.

It speaks robot on one side and tokens on the other and holds everything about them that is no weight: tokenizer,
picture size, embodiments, prompts, chunk and history length. All of it is saved in `processor_config.json`. The grammar
of a sequence is `tokens_worldvla`'s; nothing here knows a token id, and nothing here rotates a picture.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .action_tokenization_worldvla import Embodiment
from .image_processing_worldvla import GRID_UNIT, pad_to_largest
from .processing_inputs_worldvla import ImageTokens, Request, check_counts, naming_sample, resolve_kind, split_requests
from .prompts_worldvla import INSTRUCTION_STYLES, KINDS, fill_template, resolve_prompts, spell_instruction
from .tokens_worldvla import CODES_PER_GRID_UNIT, TokenSequence, WorldVLATokens

IGNORED_LABEL = -100
TEXT_CACHE_SIZE = 4096  # prompts whose ids are kept: a data set says the same few again and again


@dataclass(frozen=True)
class Sample:
    """One sequence before its pictures have a size: text ids, pictures, bin indices (N, D) of its actions."""

    kind: str
    text: list[int]
    images: list[Any]
    actions: np.ndarray | None
    target_images: list[Any] | None
    target_actions: np.ndarray | None
    num_cameras: int
    weight: float

    @property
    def pictures(self) -> list[Any]:
        """What is still pixels, in the order of the sequence."""
        return [image for image in [*self.images, *(self.target_images or [])] if not isinstance(image, ImageTokens)]


class WorldVLAProcessor(ProcessorMixin):
    """Processor of WorldVLA: image processor, tokenizer, embodiments and prompts.

    Args:
        image_processor: crops and scales pictures.
        tokenizer: its vocabulary names every token of the grammar.
        embodiments: name -> fields of `Embodiment` (objects are accepted too).
        default_embodiment: used when a call names none; one embodiment needs no default.
        prompts: templates for `action`, `world`, `video`; the world prompt may be
            `training` (default), `evaluation` or `paper`, the three strings of the authors. Saved as the strings
            themselves.
        instruction_style: `task_name` or `task_language` take a LIBERO task's file
            name and spell it as the authors' training data or as their evaluation does; see `spell_instruction`.
        num_actions: actions a chunk (K) that the checkpoint was trained to answer.
        history: time steps an action prompt shows at most.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        embodiments: dict[str, Any] | None = None,
        default_embodiment: str | None = None,
        prompts: dict[str, str] | None = None,
        instruction_style: str = "as_given",
        num_actions: int = 5,
        history: int = 2,
    ):
        super().__init__(image_processor, tokenizer)
        self.embodiments = {name: _embodiment_fields(name, value) for name, value in (embodiments or {}).items()}
        if default_embodiment is not None and default_embodiment not in self.embodiments:
            raise ValueError(f"unknown default_embodiment {default_embodiment!r}; known: {self._known_embodiments()}")
        if instruction_style not in INSTRUCTION_STYLES:
            raise ValueError(f"instruction_style is one of {', '.join(INSTRUCTION_STYLES)}, not {instruction_style!r}")
        for name, value in (("num_actions", num_actions), ("history", history)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is an integer >= 1, not {value!r}")
        self.default_embodiment = default_embodiment
        self.prompts = resolve_prompts(prompts)
        self.instruction_style = instruction_style
        self.num_actions = num_actions
        self.history = history
        self._tokens = WorldVLATokens.from_vocabulary(tokenizer.get_vocab())
        self._reserved = {
            token: name for name, token in tokenizer.get_added_vocab().items() if token != tokenizer.unk_token_id
        }
        self._text_cache: dict[str, list[int]] = {}

    @property
    def tokens(self) -> WorldVLATokens:
        """The grammar of this vocabulary."""
        return self._tokens

    @property
    def model_input_names(self) -> list[str]:
        """What a call without targets returns (`pixel_values` only where there are pictures)."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def get_embodiment(self, name: str | None = None) -> Embodiment:
        """The embodiment of that name; without a name the default, or the only one.

        Raises ValueError that lists the embodiments with their dimensions and the data sets they come from.
        """
        if name is None:
            name = self.default_embodiment or (next(iter(self.embodiments)) if len(self.embodiments) == 1 else None)
        if name is None:
            count = (
                "several embodiments, name one with embodiment=" if self.embodiments else "no embodiment for actions"
            )
            raise ValueError(f"this processor has {count}; known: {self._known_embodiments()}")
        if name not in self.embodiments:
            raise ValueError(f"unknown embodiment {name!r}; known: {self._known_embodiments()}")
        return Embodiment.from_dict(self.embodiments[name])

    def _known_embodiments(self) -> str:
        robots = [Embodiment.from_dict(value) for value in self.embodiments.values()]
        return ", ".join(r.describe() + (f" from {r.dataset}" if r.dataset else "") for r in robots) or "none"

    # ---------------------------------------------------------------- robot -> tokens

    def __call__(
        self,
        images: Any = None,
        instruction: str | list[str | None] | None = None,
        actions: Any = None,
        target_actions: Any = None,
        target_images: Any = None,
        image_tokens: Any = None,
        target_image_tokens: Any = None,
        prompt: str | list[str | None] | None = None,
        embodiment: str | list[str | None] | None = None,
        target_size: int | None = None,
        sample_weights: float | list[float] | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Build model inputs; with targets also labels and loss weights.

        A picture or a flat list of pictures, oldest first, is one sample. A list of lists is a batch, and every other
        argument is then a list of that length with None where a sample has none; `prompt`, `embodiment` and
        `sample_weights` may also be one value for all. With C cameras a time step is C pictures in the order of the
        cameras.

        Args:
            images: pictures (PIL, or numpy / torch of shape (H, W), (H, W, C), (C, H, W), uint8 or float in [0, 1]).
            instruction: what to do; a world prompt leaves it out.
            actions: (N, D) in robot units, those taken after each of the N time steps shown: a world-model sample.
            target_actions: (K, D), the chunk to be learnt.
            target_images: the pictures to be learnt: C of them after actions, C x frames without (video prediction).
            image_tokens, target_image_tokens: pictures that are tokenized already, in place of `images` and
                `target_images`: (h, w) token ids as `model.tokenize_images` returns, or flat image blocks as
                `model.generate_frames` does.
            prompt: `action`, `world`, `video` (the checkpoint's strings) or a template with `{instruction}`; decided by
                what is given where it is missing.
            embodiment: whose actions these are; needed only where the checkpoint has several.
            target_size: pixels, in place of the image processor's.
            sample_weights: factor on the loss weights of a sample, >= 0.
            padding: True (or "longest") pads with `<pad>` on the left. False leaves sequences of different length as
                they are, which needs `return_tensors=None`.
            return_tensors: "pt", "np", or None for lists.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (batch, length), codes that are still pixels being the
            placeholder; with pictures `pixel_values` (n, 3, H, W) in [-1, 1], all of the batch in order of appearance,
            smaller ones padded with zeros at the right and the bottom; with any target `labels`, -100 where there is
            none, and `loss_weights`, both (batch, length).

        Raises:
            ValueError: one line that says what is wrong and, in a batch, in which sample.
        """
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding is True (to the longest) or False, not {padding!r}")
        requests, is_batch = split_requests(
            self._tokens, images, image_tokens, instruction, actions, target_actions, target_images,
            target_image_tokens, embodiment, prompt, sample_weights,
        )  # fmt: skip
        samples, sequences, pixels = [], [], []
        get_embodiment = cache(self.get_embodiment)  # a batch names the same few again and again
        for index, request in enumerate(requests):
            with naming_sample(index, is_batch):
                sample = self._sample(request, get_embodiment)
                own_pixels = [self.image_processor.pixels(picture, target_size) for picture in sample.pictures]
                sequences.append(self._sequence(sample, own_pixels))
                samples.append(sample)
                pixels += own_pixels

        data = self._collate(samples, sequences, padding, return_tensors)
        if pixels:
            data["pixel_values"] = pad_to_largest(pixels)
        return BatchFeature(data, tensor_type=return_tensors)

    def _sample(self, request: Request, get_embodiment: Callable[[str | None], Embodiment]) -> Sample:
        """Check one request against itself and this checkpoint, tokenize its text and encode its actions."""
        kind = resolve_kind(request)
        has_actions = request.actions is not None or request.target_actions is not None
        is_needed = self.embodiments or has_actions or request.embodiment is not None
        embodiment = get_embodiment(request.embodiment) if is_needed else None

        def encode(actions: Any) -> np.ndarray | None:
            return None if actions is None or embodiment is None else embodiment.encode(actions)

        actions, num_cameras = encode(request.actions), embodiment.num_cameras if embodiment else 1
        check_counts(request, kind, 0 if actions is None else len(actions), num_cameras)
        return Sample(
            kind=kind,
            text=self._text_ids(request, kind),
            images=request.images,
            actions=actions,
            target_images=request.target_images,
            target_actions=encode(request.target_actions),
            num_cameras=num_cameras,
            weight=request.weight,
        )

    def _text_ids(self, request: Request, kind: str) -> list[int]:
        template = request.prompt if request.prompt not in (None, *KINDS) else self.prompts[kind]
        instruction = request.instruction
        if instruction is not None:
            instruction = spell_instruction(instruction, self.instruction_style)
        text = fill_template(template, instruction)
        if text not in self._text_cache:
            if len(self._text_cache) >= TEXT_CACHE_SIZE:
                self._text_cache.clear()
            self._text_cache[text] = self._tokenize(text)
        return self._text_cache[text]

    def _tokenize(self, text: str) -> list[int]:
        """BPE ids of a text, without special tokens. Raises ValueError for a token of the grammar in it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if found := [self._reserved[token] for token in ids if token in self._reserved]:
            raise ValueError(f"the text contains the reserved token {found[0]}: remove it from the instruction")
        return ids

    def _sequence(self, sample: Sample, pixels: list[np.ndarray]) -> TokenSequence:
        """Lay one sample out; `pixels` are its pictures that are no tokens yet."""
        sizes = iter([(image.shape[1], image.shape[2]) for image in pixels])
        prompt = list(self._image_blocks(sample.images, sizes))
        if sample.kind == "world":  # C pictures, then the action taken on them
            count = sample.num_cameras
            steps = zip(self._action_blocks(sample.actions), range(0, len(prompt), count), strict=True)
            prompt = [block for action, start in steps for block in (*prompt[start : start + count], action)]
        answer = None
        if sample.target_images is not None:
            answer = list(self._image_blocks(sample.target_images, sizes))
        elif sample.target_actions is not None:
            answer = self._action_blocks(sample.target_actions)
        return self._tokens.sequence(sample.text, prompt, answer)

    def _collate(
        self, samples: list[Sample], sequences: list[TokenSequence], padding: bool | str, return_tensors: str | None
    ) -> dict[str, Any]:
        """Everything of length (batch, length), padded on the left; arrays unless `return_tensors` is None."""
        lengths = [len(sequence) for sequence in sequences]
        if not padding and return_tensors is not None and len(set(lengths)) > 1:
            raise ValueError("the sequences differ in length: padding=False needs return_tensors=None")
        shape = len(sequences), max(lengths)
        data: dict[str, Any] = {
            "input_ids": np.full(shape, self._tokens.pad, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        if any(sample.target_images or sample.target_actions is not None for sample in samples):
            data["labels"] = np.full(shape, IGNORED_LABEL, dtype=np.int64)
            data["loss_weights"] = np.zeros(shape, dtype=np.float32)
        for row, (sample, sequence) in enumerate(zip(samples, sequences, strict=True)):
            data["input_ids"][row, -len(sequence) :] = sequence.ids
            data["attention_mask"][row, -len(sequence) :] = 1
            if "labels" in data:
                answer = slice(shape[1] - len(sequence) + sequence.answer_start, None)
                data["labels"][row, answer] = data["input_ids"][row, answer]
                data["loss_weights"][row, answer] = sample.weight
        if return_tensors is None:
            starts = [0 if padding else shape[1] - length for length in lengths]
            data = {
                key: [row[start:].tolist() for row, start in zip(rows, starts, strict=True)]
                for key, rows in data.items()
            }
        return data

    def _image_blocks(self, images: list[Any], sizes: Iterator[tuple[int, int]]) -> Iterator[list[int]]:
        for image in images:
            if isinstance(image, ImageTokens):
                yield self._tokens.image_block(image.codes)
            else:
                height, width = (side // GRID_UNIT * CODES_PER_GRID_UNIT for side in next(sizes))
                yield self._tokens.image_placeholder_block(height, width)

    def _action_blocks(self, bins: np.ndarray | None) -> list[list[int]]:
        rows = [] if bins is None else bins.tolist()
        return [self._tokens.action_block(self._tokens.action_bins[index] for index in row) for row in rows]

    # ---------------------------------------------------------------- tokens -> robot

    def decode_actions(self, tokens: Any, embodiment: str | list[str] | None = None) -> np.ndarray:
        """Bin token ids (batch, K, D), as `model.generate_actions` returns, -> float64 actions in robot units.

        `embodiment` may be a list with one name for each sample (all of the same D). Raises ValueError for ids that are
        no action bins and for another D.
        """
        ids = tokens.detach().cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
        if ids.ndim != 3 or ids.dtype.kind not in "iu":
            raise ValueError(f"action tokens are integers of shape (batch, K, D), not {ids.dtype} of shape {ids.shape}")
        bins = self._tokens.action_bin_indices(ids)  # the unreachable bin's -1 decodes like the first bin
        if wrong := int(((bins < 0) & (ids != self._tokens.unreachable_bin)).sum()):
            raise ValueError(f"{wrong} of {ids.size} ids are no action bins: pass what model.generate_actions returns")
        names = embodiment if isinstance(embodiment, list | tuple) else [embodiment] * len(bins)
        if len(names) != len(bins):
            raise ValueError(f"embodiment is one name or one for each of the {len(bins)} samples, not {len(names)}")
        actions = [self.get_embodiment(name).decode(sample) for name, sample in zip(names, bins, strict=True)]
        return np.stack(actions) if actions else np.zeros(bins.shape)

    def decode_frames(self, ids: Any, model: Any) -> list[list[Image.Image]]:
        """Image blocks (batch, frames, block length), as `model.generate_frames` returns, -> pictures of each sample.

        `ids` may also be nested lists with blocks of different sizes. `model` has `detokenize_images`. Raises
        ValueError for anything that is no whole image block.
        """
        codes: list[np.ndarray] = []
        counts = []
        for frames in ids:
            blocks = [frame.tolist() if isinstance(frame, torch.Tensor | np.ndarray) else frame for frame in frames]
            if not all(isinstance(block, list) for block in blocks):
                raise ValueError(
                    "frames have the shape (batch, frames, block length): pass what model.generate_frames returns"
                )
            codes += [self._tokens.parse_image_block(block) for block in blocks]
            counts.append(len(blocks))
        pictures: list[Any] = [None] * len(codes)
        for shape in {code.shape for code in codes}:
            members = [index for index, code in enumerate(codes) if code.shape == shape]
            pixels = model.detokenize_images(torch.from_numpy(np.stack([codes[index] for index in members])))
            for index, picture in zip(members, self.image_processor.postprocess(pixels), strict=True):
                pictures[index] = picture
        starts = np.cumsum([0, *counts]).tolist()
        return [pictures[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def _embodiment_fields(name: str, value: Any) -> dict[str, Any]:
    """The plain dict of an embodiment, checked; its name is its key."""
    fields = value.to_dict() if isinstance(value, Embodiment) else {"name": name, **value}
    if fields["name"] != name:
        raise ValueError(f"embodiment {name!r} calls itself {fields['name']!r}: use one name")
    return Embodiment.from_dict(fields).to_dict()


WorldVLAProcessor.register_for_auto_class()

__all__ = ["WorldVLAProcessor"]
