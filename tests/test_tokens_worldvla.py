"""The grammar: published ids, blocks and their errors, samples, and the structure of whole batches against brute
force."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factory import MAX_GRID, NUM_CODES, Writer, compact_vocabulary

from transformers_worldvla.tokens_worldvla import (
    WorldVLATokens,
    action_bin_name,
    grid_name,
    image_code_name,
    published_vocabulary,
    special_token_names,
)

BOS, PAD, SEP, PLACEHOLDER, BOI, EOI, NEWLINE, BOA, EOA = 0, 1, 8710, 8711, 8197, 8196, 8803, 10004, 15004


@pytest.fixture(scope="module")
def published() -> WorldVLATokens:
    return WorldVLATokens.from_vocabulary(published_vocabulary())


# -------------------------------------------------------------------- names and ids


def test_published_ids(published):
    """The table of the authors' constants (their item processor and model code)."""
    assert (published.bos, published.pad, published.separator) == (BOS, PAD, SEP)
    assert (published.image_start, published.image_end, published.image_newline) == (BOI, EOI, NEWLINE)
    assert (published.action_start, published.action_end, published.image_placeholder) == (BOA, EOA, PLACEHOLDER)
    assert published.unreachable_bin == 10005
    assert published.action_bins == tuple(range(10006, 10262))
    assert published.image_codes == tuple(range(4, 8196))
    # 256 and 512 pixels are 8 and 16 units; the largest side lies before <boa>
    assert published.grids == {units: 8804 + units for units in range(1, 257)}


def test_names_of_the_published_vocabulary():
    names = {token: name for name, token in published_vocabulary().items()}
    assert {i: names[i] for i in (0, 1, 2, 3)} == {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>"}
    assert names[4] == "IMGIMGAZ" and names[4 + 10] == "IMGIMGBAZ" and names[4 + 8191] == "IMGIMGIBJBZ"
    assert names[8196] == "<eoss>" and names[8197] == "<racm3:break>"
    assert names[8710] == "<reserved08706>" and names[16383] == "<reserved16379>"
    assert max(names) == 16383


def test_ids_come_from_names_in_the_authors_tokenizer(authors_tiny):
    """This tokenizer maps codes to ids in random order: code + 4 would be wrong."""
    content = json.loads((authors_tiny / "checkpoint" / "base_model" / "tokenizer.json").read_text())
    vocabulary = dict(content["model"]["vocab"])
    vocabulary |= {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    tokens = WorldVLATokens.from_vocabulary(vocabulary)
    assert len(tokens.image_codes) == 8192 and tokens.image_codes != tuple(range(4, 8196))
    for code in (0, 9, 10, 123, 8191):
        name = "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"
        assert tokens.image_codes[code] == vocabulary[name]
    assert (tokens.separator, tokens.action_start, tokens.grids[8]) == (SEP, BOA, 8812)


def test_compact_vocabulary_in_any_order():
    vocabulary = compact_vocabulary()
    tokens = WorldVLATokens.from_vocabulary(vocabulary)
    assert tokens.image_codes == tuple(vocabulary[image_code_name(code)] for code in range(NUM_CODES))
    assert tokens.action_bins == tuple(vocabulary[action_bin_name(index)] for index in range(256))
    assert tokens.grids == {units: vocabulary[grid_name(units)] for units in range(1, MAX_GRID + 1)}
    assert vocabulary["text0"] not in tokens.structural_ids
    assert tokens.structural_ids < set(vocabulary.values())
    assert len(special_token_names(32, 4)) == len(set(special_token_names(32, 4)))


@pytest.mark.parametrize("vocabulary", [published_vocabulary(), compact_vocabulary()], ids=["published", "compact"])
def test_ids_are_told_by_table(vocabulary):
    """Every id that there is, and some that there are not."""
    tokens = WorldVLATokens.from_vocabulary(vocabulary)
    ids = [-(2**40), -2, -1, *range(max(vocabulary.values()) + 3), 2**40]
    asked = np.array(ids).reshape(1, -1)
    bins, codes = {token: index for index, token in enumerate(tokens.action_bins)}, set(tokens.image_codes)
    assert tokens.action_bin_indices(asked).tolist() == [[bins.get(token, -1) for token in ids]]
    assert tokens.are_image_codes(asked).tolist() == [[token in codes for token in ids]]
    assert tokens.action_bin_indices(np.empty((0, 7), np.int32)).shape == (0, 7)


def test_published_names_are_listed_in_the_order_of_their_ids():
    published_ids = published_vocabulary()
    ids = [published_ids[name] for name in special_token_names(8192, 32)]
    assert ids == sorted(ids)


def test_placeholder_of_converted_vocabularies():
    vocabulary = compact_vocabulary()
    vocabulary["<image>"] = vocabulary.pop("<reserved08707>")
    assert WorldVLATokens.from_vocabulary(vocabulary).image_placeholder == vocabulary["<image>"]


@pytest.mark.parametrize("name", ["<s>", "<reserved08706>", "<reserved10100>", "IMGIMGCZ", "<reserved08707>"])
def test_missing_name_is_said(name):
    vocabulary = compact_vocabulary()
    del vocabulary[name]
    with pytest.raises(ValueError, match="not a WorldVLA vocabulary: 1 names are missing") as error:
        WorldVLATokens.from_vocabulary(vocabulary)
    assert ("<image>" if name == "<reserved08707>" else name) in str(error.value)


def test_a_text_vocabulary_is_none_of_ours():
    with pytest.raises(ValueError, match="<s>"):
        WorldVLATokens.from_vocabulary({"hello": 0})


# -------------------------------------------------------------------- blocks


def test_image_block_by_hand(published):
    codes = np.array([[4, 5, 6, 7], [8, 9, 10, 11]])  # 1 x 2 grid units: 32 x 64 pixels
    expected = [BOI, 8805, 8806, 4, 5, 6, 7, NEWLINE, 8, 9, 10, 11, NEWLINE, EOI]
    assert published.image_block(codes) == expected
    assert published.image_block_layout(2, 4) == [-1 if 4 <= token <= 11 else token for token in expected]
    assert published.image_placeholder_block(2, 4) == [PLACEHOLDER if 4 <= t <= 11 else t for t in expected]


def test_action_block_by_hand(published):
    # the authors' block of [0.1, -0.2, 0.3, 0.05, -0.1, 0.2, 1]
    assert published.action_block([10147, 10106, 10174, 10142, 10099, 10201, 10260]) == [
        *(BOA, 10147, 10106, 10174, 10142, 10099, 10201, 10260, EOA)
    ]


@pytest.mark.parametrize(("height", "width", "length"), [(16, 16, 276), (32, 32, 1060), (14, 18, 14 * 18 + 14 + 4)])
def test_block_lengths(published, height, width, length):
    assert published.image_block_length(height, width) == length
    assert len(published.image_block(np.full((height, width), 4))) == length
    assert published.action_block_length(7) == 9


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, MAX_GRID), width=st.integers(1, MAX_GRID), seed=st.integers(0, 2**20))
def test_image_block_round_trip(height, width, seed):
    vocabulary = compact_vocabulary()
    tokens, writer = WorldVLATokens.from_vocabulary(vocabulary), Writer(vocabulary, seed)
    codes = writer.rng.choice(writer.codes, (2 * height, 2 * width))
    block = tokens.image_block(codes)
    assert block == writer.image((height, width), codes.ravel().tolist())
    assert (tokens.parse_image_block(block) == codes).all()
    assert (tokens.parse_image_block(torch.tensor(block)) == codes).all()


def test_parsing_accepts_pixels(published):
    assert (published.parse_image_block(published.image_placeholder_block(2, 2)) == PLACEHOLDER).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "do not run from <boi> to <eoi>"),
        (lambda b: b[1:], "do not run from <boi> to <eoi>"),
        (lambda b: [], "not an image block: 0 tokens"),
        (lambda b: [*b[:5], *b[6:]], "2x2 codes has 10 tokens, this one has 9"),
        (lambda b: [b[0], 8806, *b[2:]], "4x2 codes has 16 tokens, this one has 10"),
        (lambda b: [b[0], 99, *b[2:]], "token 99 is no grid token"),
        (lambda b: [*b[:5], b[5] + 1, *b[6:]], "a row does not end with the newline token"),
        (lambda b: [*b[:4], 10006, *b[5:]], "1 tokens are no image codes"),
    ],
)
def test_what_is_no_image_block(published, change, message):
    block = published.image_block(np.full((2, 2), 4))
    with pytest.raises(ValueError, match=message):
        published.parse_image_block(change(block))


@pytest.mark.parametrize("shape", [(3, 2), (2, 5), (0, 2)])
def test_sides_without_a_grid_token(shape):
    tokens = WorldVLATokens.from_vocabulary(compact_vocabulary())
    with pytest.raises(ValueError, match="multiples of 32 from 32 to 128"):
        tokens.image_block(np.full(shape, tokens.image_codes[0]))
    with pytest.raises(ValueError, match="image side of 160 pixels has no grid token"):
        tokens.image_block(np.full((10, 2), tokens.image_codes[0]))


# -------------------------------------------------------------------- samples

TEXT = [16400, 16500, 16600]


@pytest.mark.parametrize("history", [1, 2, 4])
@pytest.mark.parametrize(("count", "dim"), [(1, 4), (5, 7), (10, 7), (3, 14)])
def test_action_model_template(published, history, count, dim):
    images = [published.image_block(np.full((16, 16), 4 + index)) for index in range(history)]
    actions = [published.action_block([10006 + index] * dim) for index in range(count)]
    sample = published.sequence(TEXT, images, actions)
    expected = [BOS, *TEXT]
    for index in range(history):
        expected += [BOI, 8812, 8812, *([4 + index] * 16 + [NEWLINE]) * 16, EOI]
    expected.append(SEP)
    prompt = len(expected)
    for index in range(count):
        expected += [BOA, *[10006 + index] * dim, EOA]
    expected.append(SEP)
    assert sample.ids == expected
    assert sample.labelled == [False] * prompt + [True] * (count * (dim + 2) + 1)
    assert len(sample) == len(expected)
    assert published.sequence(TEXT, images).ids == expected[:prompt]
    assert not any(published.sequence(TEXT, images).labelled)


def test_published_sizes(published):
    """Labelled tokens and lengths of the authors' four sample kinds, P being the text's length."""
    small, large = (published.image_block(np.full((side, side), 4)) for side in (16, 32))
    action = published.action_block([10006] * 7)
    sizes = {
        "action 256, K=5": (published.sequence(TEXT, [small] * 2, [action] * 5), 46, 555 + 45),
        "action 512, K=10": (published.sequence(TEXT, [large] * 2, [action] * 10), 91, 2123 + 90),
        "world 256": (published.sequence(TEXT, [small, action], [small]), 277, 564),
        "world 512": (published.sequence(TEXT, [large, action], [large]), 1061, 2132),
    }
    for name, (sample, labelled, length) in sizes.items():
        assert (sum(sample.labelled), len(sample)) == (labelled, length + len(TEXT)), name


@pytest.mark.parametrize(("rounds", "cameras"), [(1, 1), (3, 1), (2, 2)])
def test_world_model_template(published, rounds, cameras):
    image = published.image_block(np.full((2, 4), 7))
    action = published.action_block([10100] * 4)
    sample = published.sequence(TEXT, ([image] * cameras + [action]) * rounds, [image] * cameras)
    block = [BOI, 8805, 8806, 7, 7, 7, 7, NEWLINE, 7, 7, 7, 7, NEWLINE, EOI]
    prompt = [BOS, *TEXT, *(block * cameras + [BOA, 10100, 10100, 10100, 10100, EOA]) * rounds, SEP]
    assert sample.ids == [*prompt, *block * cameras, SEP]
    assert sum(sample.labelled) == len(block) * cameras + 1 and not any(sample.labelled[: len(prompt)])


def test_video_prediction_template(published):
    image = published.image_block(np.full((2, 2), 7))
    sample = published.sequence(TEXT, [image] * 2, [image] * 3)
    assert sample.ids == [BOS, *TEXT, *image, *image, SEP, *image, *image, *image, SEP]
    assert sample.labelled == [False] * (5 + 2 * len(image)) + [True] * (3 * len(image) + 1)


def test_text_may_not_hold_the_grammar():
    vocabulary = compact_vocabulary()
    tokens = WorldVLATokens.from_vocabulary(vocabulary)
    names = [name for name in vocabulary if not name.startswith("text") and name not in ("</s>", "<unk>")]
    for name in names:
        with pytest.raises(ValueError, match=f"reserved tokens .ids .{vocabulary[name]}"):
            tokens.sequence([vocabulary["text1"], vocabulary[name]], [])


# -------------------------------------------------------------------- structure of whole batches


def brute_force(writer: Writer, row: list[int], segments: list[int] | None) -> tuple[list[int], list[bool], list[bool]]:
    """Block ids, answer mask and world mask of one row, token by token."""
    blocks, answers, worlds = [], [], []
    count, is_open, separators, images, before = 0, False, 0, False, None
    for token, segment in zip(row, segments or [0] * len(row), strict=True):
        if segment != before:
            is_open, separators, images, before = False, 0, False, segment
        is_answer = separators > 0
        if is_answer and token == writer.ids["<reserved10000>"]:
            is_open, count = True, count + 1
        images = images or (is_answer and token == writer.ids["<racm3:break>"])
        blocks.append(count - 1 if is_open else -1)
        answers.append(is_answer)
        worlds.append(images)
        if token == writer.ids["<reserved15000>"]:
            is_open = False
        separators += token == writer.separator
    return blocks, answers, worlds


@st.composite
def packed_rows(draw) -> tuple[Writer, list[int], list[int]]:
    """A row of one to three samples of any kind, each perhaps cut off anywhere, behind padding; and its segments."""
    writer = Writer(compact_vocabulary(), draw(st.integers(0, 2**20)))
    row, segments = [], []
    if padding := draw(st.integers(0, 4)):
        row, segments = [writer.ids["<pad>"]] * padding, [draw(st.sampled_from([-1, 0]))] * padding
    for index in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            ids, _ = writer.action_sample(draw(st.integers(1, 4)), draw(st.integers(1, 5)))
        else:
            rounds, cameras = draw(st.integers(0, 2)), draw(st.integers(1, 2))
            ids, _ = writer.world_sample(draw(st.integers(1, 2)), rounds=rounds, cameras=cameras, dim=3)
        cut = draw(st.one_of(st.just(len(ids)), st.integers(1, len(ids))))
        row, segments = row + ids[:cut], segments + [index] * cut
    return writer, row, segments


@settings(max_examples=60, deadline=None)
@given(packed_rows())
def test_structure_of_packed_rows(row_and_segments):
    writer, row, segments = row_and_segments
    tokens = WorldVLATokens.from_vocabulary(writer.ids)
    ids, seq_idx = torch.tensor([row, row[::-1]]), torch.tensor([segments, segments[::-1]])
    for index, (tokens_of_row, numbers) in enumerate([(row, segments), (row[::-1], segments[::-1])]):
        blocks, answers, worlds = brute_force(writer, tokens_of_row, numbers)
        assert tokens.answer_mask(ids, seq_idx)[index].tolist() == answers
        assert tokens.world_mask(ids, seq_idx)[index].tolist() == worlds
        if index == 0:  # backwards no block is well formed
            assert tokens.action_block_ids(ids, seq_idx)[index].tolist() == blocks


@settings(max_examples=40, deadline=None)
@given(packed_rows(), st.data())
def test_structure_of_single_rows_grows_with_the_row(row_and_segments, data):
    """What a token belongs to depends on the tokens before it only: a block that is still open lasts to the end."""
    writer, row, segments = row_and_segments
    end = next((i for i, n in enumerate(segments) if n > 0), len(row))
    cut = data.draw(st.integers(1, end))
    tokens = WorldVLATokens.from_vocabulary(writer.ids)
    blocks, answers, worlds = brute_force(writer, row[:end], None)
    ids = torch.tensor([row[:cut]])
    assert tokens.action_block_ids(ids)[0].tolist() == blocks[:cut]
    assert tokens.answer_mask(ids)[0].tolist() == answers[:cut]
    assert tokens.world_mask(ids)[0].tolist() == worlds[:cut]


def test_structure_by_hand(published):
    """Two actions in the answer, one in the prompt; the final separator belongs to no block but to the answer."""
    row = [PAD, BOS, 16400, BOA, 10006, EOA, SEP, BOA, 10006, EOA, BOA, 10007, EOA, SEP]
    ids = torch.tensor([row])
    assert published.action_block_ids(ids)[0].tolist() == [-1] * 7 + [0, 0, 0, 1, 1, 1, -1]
    assert published.answer_mask(ids)[0].tolist() == [False] * 7 + [True] * 7
    assert not published.world_mask(ids).any()
    world = torch.tensor([[BOS, BOI, 8805, EOI, SEP, BOI, 8805, EOI, SEP]])
    assert published.world_mask(world)[0].tolist() == [False] * 5 + [True] * 4


def test_a_block_cut_off_does_not_reach_into_the_next_segment(published):
    row = [BOS, SEP, BOA, 10006] + [BOS, SEP, BOA, 10006, EOA, SEP]
    seq_idx = torch.tensor([[0] * 4 + [1] * 6])
    assert published.action_block_ids(torch.tensor([row]), seq_idx)[0].tolist() == [-1, -1, 0, 0, -1, -1, 1, 1, 1, -1]
