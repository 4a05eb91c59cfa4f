"""The grammar of WorldVLA: which ids exist, where they may stand, what is forced, what carries loss, who may see whom.

This is the only place that knows a token by name. Processor, collator, mask, decoder and metrics ask it; none of them
holds a literal id. Everything here is a pure function of a vocabulary or of token ids; it knows no pixels, units or
weights.

A sequence (paper section 3.3 and the authors' code) is

    <s> text prompt-blocks <sep>                                  what the model is given
    answer-blocks <sep>                                           what it answers, all of it labelled

    action model      text  IMG x M                 <sep>  ACT x K            <sep>
    world model       text (IMG x C, ACT) x N       <sep>  IMG x C            <sep>
    video prediction  text  IMG x M                 <sep>  IMG x C x frames   <sep>

with IMG = <boi> grid_h grid_w (row of codes, newline) x h <eoi> and ACT = <boa> bin x D <eoa>. Images stand oldest
first; with C cameras a time step holds C images in camera order. The height comes before the width, in units of 32
pixels.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

NUM_BINS = 256
MAX_GRID = 256  # the grid tokens lie between <reserved08800> and <reserved10000>; 256 units are 8192 pixels
CODES_PER_GRID_UNIT = 2  # a grid unit is 32 pixels, a code is 16

BOS, PAD, SEPARATOR = "<s>", "<pad>", "<reserved08706>"
IMAGE_START, IMAGE_END, IMAGE_NEWLINE = "<racm3:break>", "<eoss>", "<reserved08799>"
IMAGE_PLACEHOLDERS = ("<image>", "<reserved08707>")  # upstream conversions rename the second to the first
ACTION_START, ACTION_END = "<reserved10000>", "<reserved15000>"
UNREACHABLE_BIN = "<reserved10001>"  # decodes like the first bin; the encoder never emits it
_IMAGE_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_DIGITS = str.maketrans("0123456789", "ABCDEFGHIJ")
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


def image_code_name(code: int) -> str:
    """Vocabulary name of a codebook index: decimal digits written as letters, 0 -> IMGIMGAZ."""
    return f"IMGIMG{str(code).translate(_DIGITS)}Z"


def grid_name(units: int) -> str:
    """Vocabulary name of the token that says a side is `units` x 32 pixels long."""
    return f"<reserved{8800 + units:05d}>"


def action_bin_name(index: int) -> str:
    """Vocabulary name of legal action bin `index` in 0..255 (the authors' digitize index is `index` + 1)."""
    return f"<reserved{10002 + index:05d}>"


def special_token_names(num_image_codes: int = 8192, max_grid: int = 32) -> list[str]:
    """Names of every non-text token a vocabulary needs, in the order of the published ids (for compact
    vocabularies)."""
    return [
        *(BOS, PAD, "</s>", "<unk>"),
        *(image_code_name(code) for code in range(num_image_codes)),
        *(IMAGE_END, IMAGE_START, SEPARATOR, IMAGE_PLACEHOLDERS[1], IMAGE_NEWLINE),
        *(grid_name(units) for units in range(1, max_grid + 1)),
        *(ACTION_START, UNREACHABLE_BIN, *(action_bin_name(index) for index in range(NUM_BINS)), ACTION_END),
    ]


def published_vocabulary() -> dict[str, int]:
    """Names and ids of the published vocabulary without its text pieces: ids 0..16383 of 65536."""
    vocabulary = {BOS: 0, PAD: 1, "</s>": 2, "<unk>": 3, IMAGE_END: 8196, IMAGE_START: 8197}
    vocabulary |= {image_code_name(code): code + 4 for code in range(8192)}
    vocabulary |= {f"<reserved{number:05d}>": number + 4 for number in range(8706, 16380)}
    return vocabulary


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sample, L of them; those from `answer_start` on carry loss."""

    ids: list[int]
    answer_start: int

    @property
    def labelled(self) -> list[bool]:
        """Which tokens carry loss."""
        return [False] * self.answer_start + [True] * (len(self) - self.answer_start)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class WorldVLATokens:
    """Ids of one vocabulary. Build it with `from_vocabulary`; every field is an id or a table of ids."""

    bos: int
    pad: int
    separator: int
    image_start: int
    image_end: int
    image_newline: int
    image_placeholder: int
    action_start: int
    action_end: int
    action_bins: tuple[int, ...]  # legal bins 0..255, lowest value first
    unreachable_bin: int
    image_codes: tuple[int, ...]  # codebook index -> id
    grids: dict[int, int] = field(hash=False)  # units of 32 pixels -> id

    @classmethod
    def from_vocabulary(cls, vocabulary: dict[str, int]) -> "WorldVLATokens":
        """Look every id up by name. Raises ValueError that lists the names a vocabulary lacks."""
        required = [
            BOS,
            PAD,
            SEPARATOR,
            IMAGE_START,
            IMAGE_END,
            IMAGE_NEWLINE,
            ACTION_START,
            ACTION_END,
            UNREACHABLE_BIN,
        ]
        required += [action_bin_name(index) for index in range(NUM_BINS)]
        placeholder = next((name for name in IMAGE_PLACEHOLDERS if name in vocabulary), IMAGE_PLACEHOLDERS[0])
        codes = {}
        for name, token in vocabulary.items():
            if match := _IMAGE_CODE.fullmatch(name):
                codes[int(match[1].translate(_LETTERS))] = token
        missing = [name for name in [*required, placeholder] if name not in vocabulary]
        missing += [image_code_name(code) for code in range(max(len(codes), 1)) if code not in codes]
        if missing:
            raise ValueError(
                f"not a WorldVLA vocabulary: {len(missing)} names are missing, among them {', '.join(missing[:5])}"
            )
        return cls(
            bos=vocabulary[BOS],
            pad=vocabulary[PAD],
            separator=vocabulary[SEPARATOR],
            image_start=vocabulary[IMAGE_START],
            image_end=vocabulary[IMAGE_END],
            image_newline=vocabulary[IMAGE_NEWLINE],
            image_placeholder=vocabulary[placeholder],
            action_start=vocabulary[ACTION_START],
            action_end=vocabulary[ACTION_END],
            action_bins=tuple(vocabulary[action_bin_name(index)] for index in range(NUM_BINS)),
            unreachable_bin=vocabulary[UNREACHABLE_BIN],
            image_codes=tuple(codes[code] for code in range(len(codes))),
            grids={n: vocabulary[grid_name(n)] for n in range(1, MAX_GRID + 1) if grid_name(n) in vocabulary},
        )

    # ---------------------------------------------------------------- blocks

    def image_block(self, codes: np.ndarray) -> list[int]:
        """Wrap the code ids of one image, (h, w), as IMG; h and w are even (a grid unit is two codes)."""
        height, width = codes.shape
        rows = np.full((height, width + 1), self.image_newline, dtype=np.int64)
        rows[:, :-1] = codes
        return [self.image_start, self._grid(height), self._grid(width), *rows.ravel().tolist(), self.image_end]

    def image_placeholder_block(self, height: int, width: int) -> list[int]:
        """IMG of (height, width) codes whose codes are still pixels: every code is the placeholder."""
        return self.image_block(np.full((height, width), self.image_placeholder, dtype=np.int64))

    def image_block_layout(self, height: int, width: int) -> list[int]:
        """IMG with -1 where a code is free; every other token is forced by the format."""
        return self.image_block(np.full((height, width), -1, dtype=np.int64))

    def parse_image_block(self, ids: Sequence[int]) -> np.ndarray:
        """Inverse of `image_block`: code ids (h, w). Raises ValueError on anything that is not one whole IMG."""
        ids = [int(token) for token in ids]
        if len(ids) < 4 or ids[0] != self.image_start or ids[-1] != self.image_end:
            raise ValueError(f"not an image block: {len(ids)} tokens that do not run from <boi> to <eoi>")
        height, width = self.grid_codes(ids[1]), self.grid_codes(ids[2])
        if len(ids) != self.image_block_length(height, width):
            raise ValueError(
                f"an image block of {height}x{width} codes has {self.image_block_length(height, width)} tokens, "
                f"this one has {len(ids)}"
            )
        rows = np.array(ids[3:-1], dtype=np.int64).reshape(height, width + 1)
        if not (rows[:, -1] == self.image_newline).all():
            raise ValueError("not an image block: a row does not end with the newline token")
        legal = self.are_image_codes(rows[:, :-1]) | (rows[:, :-1] == self.image_placeholder)
        if not legal.all():
            raise ValueError(f"not an image block: {int((~legal).sum())} tokens are no image codes")
        return rows[:, :-1]

    def action_block(self, bins: Iterable[int]) -> list[int]:
        """Wrap D bin ids as ACT."""
        return [self.action_start, *(int(token) for token in bins), self.action_end]

    @staticmethod
    def image_block_length(height: int, width: int) -> int:
        """Tokens of IMG with (height, width) codes: 276 for 16x16, 1060 for 32x32."""
        return height * (width + 1) + 4

    @staticmethod
    def action_block_length(action_dim: int) -> int:
        """Tokens of ACT."""
        return action_dim + 2

    def grid_codes(self, token: int) -> int:
        """Codes along the side that a grid token announces."""
        for units, grid in self.grids.items():
            if grid == token:
                return units * CODES_PER_GRID_UNIT
        raise ValueError(f"token {token} is no grid token")

    def _grid(self, codes: int) -> int:
        units, rest = divmod(codes, CODES_PER_GRID_UNIT)
        if rest or units not in self.grids:
            sizes = [units * 32 for units in self.grids]
            raise ValueError(
                f"an image side of {codes * 16} pixels has no grid token: sides are multiples of 32 "
                f"from {min(sizes)} to {max(sizes)}"
            )
        return self.grids[units]

    # ---------------------------------------------------------------- samples

    def sequence(
        self, text: Sequence[int], prompt: Iterable[list[int]], answer: Iterable[list[int]] | None = None
    ) -> TokenSequence:
        """`<s> text prompt-blocks <sep> [answer-blocks <sep>]`; the answer with its separator is labelled.

        Raises ValueError when the text holds a token of this grammar, which would break the structure.
        """
        if reserved := sorted(self.structural_ids.intersection(text)):
            raise ValueError(
                f"the text contains reserved tokens (ids {reserved[:5]}): remove them from the instruction"
            )
        ids = [self.bos, *text]
        for block in prompt:
            ids += block
        ids.append(self.separator)
        answer_start = len(ids)
        if answer is not None:
            for block in answer:
                ids += block
            ids.append(self.separator)
        return TokenSequence(ids, answer_start)

    @cached_property
    def structural_ids(self) -> frozenset[int]:
        """Every id that is not text."""
        singles = {self.bos, self.pad, self.separator, self.image_start, self.image_end, self.image_newline}
        singles |= {self.image_placeholder, self.action_start, self.action_end, self.unreachable_bin}
        return frozenset(singles.union(self.action_bins, self.image_codes, self.grids.values()))

    def are_image_codes(self, ids: np.ndarray) -> np.ndarray:
        """True where an id, of any sign and size, is that of an image code: bool of the shape of `ids`."""
        return _look_up(ids, self.image_code_table) >= 0

    def action_bin_indices(self, ids: np.ndarray) -> np.ndarray:
        """0 to 255 where an id, of any sign and size, is that of an action bin, -1 elsewhere: the shape of `ids`."""
        return _look_up(ids, self.action_bin_table)

    @cached_property
    def image_code_table(self) -> np.ndarray:
        """The image code of each id up to one beyond the largest code's, -1 where it is none."""
        return _places(self.image_codes)

    @cached_property
    def action_bin_table(self) -> np.ndarray:
        """The action bin of each id up to one beyond the largest bin's, -1 where it is none."""
        return _places(self.action_bins)

    # ---------------------------------------------------------------- structure of whole batches

    def action_block_ids(self, input_ids: torch.Tensor, seq_idx: torch.Tensor | None = None) -> torch.LongTensor:
        """Number the action blocks of the answers: (batch, length) -> (batch, length), -1 outside them.

        Tokens of two different blocks must not see one another under `independent` attention (paper Figure 3b). Blocks
        in the prompt, before a segment's first separator, are -1: they are always visible. An open block, during
        generation, lasts to the segment's end. `seq_idx` (batch, length) tells packed segments apart.
        """
        answer = self.answer_mask(input_ids, seq_idx)
        is_start = ((input_ids == self.action_start) & answer).long()
        is_end = ((input_ids == self.action_end) & answer).long()
        started = self._seen_in_segment(is_start, seq_idx)
        ended = self._seen_in_segment(is_end, seq_idx) - is_end  # before this token
        return torch.where(started > ended, is_start.cumsum(-1) - 1, -1)

    def answer_mask(self, input_ids: torch.Tensor, seq_idx: torch.Tensor | None = None) -> torch.BoolTensor:
        """True behind a segment's first separator: (batch, length)."""
        is_separator = (input_ids == self.separator).long()
        return self._seen_in_segment(is_separator, seq_idx) - is_separator > 0

    def world_mask(self, input_ids: torch.Tensor, seq_idx: torch.Tensor | None = None) -> torch.BoolTensor:
        """True on the answers of world-model and video samples, final separator included: (batch, length)."""
        starts = ((input_ids == self.image_start) & self.answer_mask(input_ids, seq_idx)).long()
        return self._seen_in_segment(starts, seq_idx) > 0

    @staticmethod
    def _seen_in_segment(events: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
        """How many events (0/1) happened up to and including each position, counted from its segment's start."""
        counts = events.cumsum(-1)
        if seq_idx is None:
            return counts
        is_first = torch.ones_like(events, dtype=torch.bool)
        is_first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        before = torch.where(is_first, counts - events, 0).cummax(-1).values  # counts never fall
        return counts - before


def _places(ids: tuple[int, ...]) -> np.ndarray:
    """id -> its place in `ids`, -1 where it has none, up to one beyond the largest of them."""
    table = np.full(max(ids) + 2, -1)
    table[list(ids)] = np.arange(len(ids))
    return table


def _look_up(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    ids = ids.astype(np.int64, copy=False)
    return table[np.where((ids >= 0) & (ids < len(table)), ids, -1)]  # the last entry is -1
