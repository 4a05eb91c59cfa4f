"""The frame-token cache: it holds what pixels give, and it is used with nothing that it was not made for."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dataset_hub import COMMIT, REPO, DatasetHub
from PIL import Image
from robot_folder import NAMES, TASKS, write_recordings
from small_checkpoint import small_model, small_processor

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import LIBERO, Embodiment
from transformers_worldvla.data import (
    CacheOptions,
    EpisodeError,
    FrameTokenCache,
    ImageAugmentation,
    SampleDataset,
    WorldVLADataCollator,
    load_episodes,
    plan_cache,
    write_cache,
)
from transformers_worldvla.data.image_tokenizer import hash_image_tokenizer, load_image_tokenizer

CAMERAS = ("wrist", "image")
TOY = Embodiment("toy", low=(-1.0,) * 3, high=(1.0,) * 3, action_names=NAMES, cameras=CAMERAS)


@pytest.fixture(scope="module")
def processor() -> WorldVLAProcessor:
    return small_processor(TOY)


@pytest.fixture(scope="module")
def model(processor: WorldVLAProcessor) -> WorldVLAForCausalLM:
    return small_model(processor)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recorded") / "toy", failed=(1,))


@pytest.fixture(scope="module")
def make(
    processor: WorldVLAProcessor, model: WorldVLAForCausalLM, recorded: Path
) -> Callable[..., tuple[Any, FrameTokenCache]]:
    """Plan and write a cache; options as `CacheOptions`."""

    def make(
        output: Path, source: Path = recorded, cameras: Any = CAMERAS, template: Any = None, **options: Any
    ) -> tuple[Any, FrameTokenCache]:
        dataset, vqvae = load_episodes(source, cameras=cameras), model.model.vqmodel
        plan = plan_cache(dataset, processor.image_processor, vqvae, CacheOptions(**options), template)
        return dataset, write_cache(plan, output, vqvae)

    return make


@pytest.fixture(scope="module")
def cached(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FrameTokenCache]:
    """The recordings and a cache of them, seeded split; read-only."""
    return make(tmp_path_factory.mktemp("caches") / "toy", batch_size=5)


@pytest.fixture
def copy(cached: tuple[Any, FrameTokenCache], tmp_path: Path) -> Path:
    """The cache in a folder that a test may damage."""
    for file in sorted(path for path in cached[1].path.rglob("*") if path.is_file()):
        target = tmp_path / "copy" / file.relative_to(cached[1].path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / "copy"


def steps_kept(cache: FrameTokenCache, index: int) -> list[int]:
    rows = cache.table(columns=["episode_index", "step"]).to_pydict()
    return [step for episode, step in zip(rows["episode_index"], rows["step"], strict=True) if episode == index]


# -------------------------------------------------------------------- what is in it


def test_frames_are_the_tokens_of_the_kept_pictures(cached, model, processor):
    dataset, cache = cached
    episodes = cache.verify(model, processor).episodes()
    assert [episode.index for episode in episodes] == [0, 2, 3, 4, 5]
    for episode in episodes:
        recorded, kept = dataset[episode.index], steps_kept(cache, episode.index)
        assert len(kept) < len(recorded)  # some pause was dropped
        for number, camera in enumerate(CAMERAS):
            pictures = [Image.fromarray(recorded.frame(camera, step)) for step in kept]
            pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            assert np.array_equal(episode.frames[:, number], model.tokenize_images(pixels).numpy())
        assert np.array_equal(episode.actions, recorded.actions[kept])
        assert episode.instruction == TASKS[episode.index % 2]


@pytest.mark.parametrize("kind", ["action", "world", "video"])
def test_a_sample_from_the_cache_is_the_sample_from_pixels(cached, model, processor, kind):
    """Token for token, through processor and model.discretize; the cache's own embodiment has the ranges of both."""
    dataset, cache = cached
    robot = cache.embodiment
    both = WorldVLAProcessor(
        processor.image_processor, processor.tokenizer, embodiments={robot.name: robot}, num_actions=3
    )
    episodes = cache.verify(model, both).episodes("train")
    samples = SampleDataset(episodes, kinds=[kind], num_actions=3, history=2, world_history=2)
    first, kept = episodes[0], steps_kept(cache, episodes[0].index)
    recorded = dataset[first.index]

    def see(steps):
        return [Image.fromarray(recorded.frame(camera, kept[step])) for step in steps for camera in CAMERAS]

    for step in range(len(first) - (2 if kind == "action" else 1)):
        seen = range(max(0, step - 1), step + 1)
        call: dict[str, Any] = {"images": see(seen), "embodiment": robot.name}
        if kind == "world":
            call["actions"] = recorded.actions[[kept[each] for each in seen]]
        else:
            call["instruction"] = recorded.instruction
        if kind == "action":
            call["target_actions"] = recorded.actions[kept[step : step + 3]]
        else:
            call["target_images"] = see([step + 1])
        expected = model.discretize(**both(**call))
        found = WorldVLADataCollator(both)([samples[step]])
        for name in ("input_ids", "labels", "loss_weights"):
            assert torch.equal(found[name], expected[name]), (step, name)


def test_the_datasets_library_opens_it(cached, model, tmp_path):
    datasets = pytest.importorskip("datasets")
    recorded, cache = cached
    loaded = datasets.load_dataset(str(cache.path), cache_dir=str(tmp_path / "datasets"))
    assert {name: len(rows) for name, rows in loaded.items()} == {name: n for name, n in cache.splits.items() if n}
    assert list(loaded) == ["train", "val_ind"]
    codes = loaded["train"].features["codes.wrist"]
    assert (codes.feature.dtype, codes.length) == ("uint16", 16)
    ids = np.array(cache.verify(model, small_processor(TOY)).episodes("train")[0].frames)
    table = np.array(small_processor(TOY).tokens.image_codes)
    for number, row in zip(range(len(ids)), loaded["train"], strict=False):
        episode = recorded[row["episode_index"]]
        assert row["instruction"] == episode.instruction
        assert np.array_equal(np.float32(row["action"]), episode.actions[row["step"]])
        assert np.array_equal(np.float32(row["state"]), episode.state[row["step"]])
        for camera, name in enumerate(CAMERAS):
            assert np.array_equal(table[row[f"codes.{name}"]].reshape(4, 4), ids[number, camera])


def test_splits_and_embodiment_come_from_the_kept_training_episodes(cached, model, processor):
    dataset, cache = cached
    cache.verify(model, processor)
    parts = {name: cache.episodes(name) for name in ("train", "val_ind", "val_ood")}
    assert {name: sum(map(len, episodes)) for name, episodes in parts.items()} == cache.splits
    assert [len(episodes) for episodes in parts.values()] == [4, 1, 0]
    actions = np.concatenate([episode.actions for episode in parts["train"]])
    assert np.array_equal([cache.embodiment.low, cache.embodiment.high], [actions.min(0), actions.max(0)])
    assert (cache.embodiment.action_names, cache.embodiment.cameras) == (NAMES, CAMERAS)
    assert {episode.embodiment for episode in parts["train"]} == {cache.embodiment.name} == {"toy"}
    header = cache.header
    assert header["preparation"]["failed_episodes"] == [1]
    assert header["preparation"]["steps"] == sum(cache.splits.values())
    assert header["dataset"]["fingerprint"] == dataset.fingerprint and header["dataset"]["source"] == "toy"
    assert header["image_tokenizer"]["sha256"] == hash_image_tokenizer(model.model.vqmodel)
    assert header["image_transform"]["target_size"] == 64


def test_the_template_decides_ranges_gripper_and_rule(make, tmp_path):
    absolute = replace(TOY, semantics="absolute", gripper={"index": 2, "open": 1.0, "close": -1.0})
    _, cache = make(tmp_path / "cache", template=absolute, statistics="checkpoint")
    assert cache.embodiment == absolute
    assert cache.header["preparation"]["no_ops"] == "keep" and cache.header["preparation"]["gripper"] == 2
    assert cache.header["statistics"] == {"method": "checkpoint"}


def test_an_augmented_cache_holds_the_training_episodes_changed_alike(cached, make, model, processor, tmp_path):
    """Every picture of an episode under one and the same crop and colours; the rest is as in the plain cache."""
    dataset, plain = cached
    _, changed = make(tmp_path / "changed", batch_size=5, augment=3, augment_colours=0.5)
    assert changed.splits == {"train": plain.splits["train"], "val_ind": 0, "val_ood": 0}
    assert changed.embodiment == plain.embodiment
    assert changed.header["split"] == plain.header["split"]
    half = ImageAugmentation(crop=0.9, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.025)
    assert changed.header["augmentation"] == {"seed": 3, **asdict(half)}
    train = {episode.index: episode for episode in plain.verify(model, processor).episodes("train")}
    found = changed.verify(model, processor).episodes()
    assert [episode.index for episode in found] == list(train)
    for episode in found:
        kept = steps_kept(changed, episode.index)
        shown = [dataset[episode.index].frame(camera, step) for step in kept for camera in CAMERAS]
        pictures = half(shown, np.random.default_rng((3, episode.index)))
        pixels = np.stack([processor.image_processor.pixels(picture) for picture in pictures])
        expected = model.tokenize_images(torch.from_numpy(pixels)).numpy()
        assert np.array_equal(episode.frames.reshape(expected.shape), expected)
        assert not np.array_equal(episode.frames, train[episode.index].frames)
        assert np.array_equal(episode.actions, train[episode.index].actions)


def test_augmented_caches_differ_by_their_number(make, tmp_path):
    caches = [make(tmp_path / str(number), augment=number)[1] for number in (0, 1)]
    one, other = (cache.table(columns=["codes.image"]) for cache in caches)
    assert not one.equals(other)
    assert caches[0].fingerprint != caches[1].fingerprint


def test_libero_files_are_of_liberos_arm(libero, make, tmp_path):
    dataset, cache = make(
        tmp_path / "cache", libero / "libero_hdf5", "agentview_rgb", split="authors", unsuccessful="keep"
    )
    assert (cache.embodiment.name, cache.embodiment.gripper, cache.embodiment.rotation) == (
        "libero",
        LIBERO.gripper,
        180,
    )
    assert cache.header["preparation"]["gripper"] == 6
    assert sum(cache.splits.values()) == cache.header["preparation"]["steps"] <= sum(dataset.lengths)


def test_the_same_bytes_whatever_the_place(cached, make, recorded, tmp_path):
    """Nothing of this machine or moment is in a cache."""
    elsewhere = tmp_path / "toy"
    elsewhere.symlink_to(recorded)
    _, again = make(tmp_path / "again", elsewhere, batch_size=5)
    assert contents(again.path) == contents(cached[1].path)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bytes_with_more_threads(cached, make, model, tmp_path, threads):
    """Every batch is encoded by one thread, as more may round otherwise; torch's setting is back afterwards."""
    before, seen = torch.get_num_threads(), set()
    hook = model.model.vqmodel.encoder.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        torch.set_num_threads(threads)
        _, cache = make(tmp_path / "cache", batch_size=5)
        assert torch.get_num_threads() == threads and seen == {1}
    finally:
        torch.set_num_threads(before)
        hook.remove()
    assert contents(cache.path) == contents(cached[1].path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_stored_in_16_bits_an_index(cached):
    _, cache = cached
    schema = pq.read_schema(cache.path / cache.header["files"][0]["path"])
    assert str(schema.field("codes.wrist").type) == "fixed_size_list<element: uint16>[16]"
    assert str(schema.field("action").type) == "fixed_size_list<element: float>[3]"
    assert set(contents(cache.path)) == {
        "README.md",
        "worldvla_cache.json",
        *(f["path"] for f in cache.header["files"]),
    }


# -------------------------------------------------------------------- checked on use


def test_codes_need_a_vocabulary(cached):
    with pytest.raises(ValueError, match="call verify"):
        FrameTokenCache(cached[1].path).episodes()


def test_another_vocabulary_gives_the_same_codes_other_ids(cached, model):
    """Ids come from the grammar of the processor in use, never from the file."""
    _, cache = cached
    shifted = small_processor(TOY)
    tokens = shifted.tokens
    shifted._tokens = replace(tokens, image_codes=tuple(token + 1000 for token in tokens.image_codes))
    here = cache.verify(model, small_processor(TOY)).episodes()
    there = FrameTokenCache(cache.path).verify(model, shifted).episodes()
    assert all(np.array_equal(a.frames + 1000, b.frames) for a, b in zip(here, there, strict=True))


def test_other_weights_of_the_image_tokenizer_are_refused(cached, processor):
    _, cache = cached
    other = small_model(processor, seed=1)
    with pytest.raises(
        ValueError, match=r"made by another image tokenizer \(sha256 \w{12}, not \w{12}\): run `worldvla"
    ):
        cache.verify(other, processor)


def test_only_what_decides_the_codes_counts(cached, model, processor):
    """The cast of the language model and a better pixel decoder leave a cache valid."""
    changed = small_model(processor).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in changed.model.vqmodel.decoder.parameters():
            parameter.add_(1.0)
    cached[1].verify(changed, processor)
    assert hash_image_tokenizer(changed.model.vqmodel) == hash_image_tokenizer(model.model.vqmodel)
    with torch.no_grad():
        changed.model.vqmodel.encoder.conv_in.bias[0] += 1e-6
    assert hash_image_tokenizer(changed.model.vqmodel) != hash_image_tokenizer(model.model.vqmodel)


def test_another_picture_size_is_refused(cached, model):
    larger = small_processor(TOY)
    larger.image_processor.target_size = 128
    with pytest.raises(ValueError, match="holds pictures of WorldVLAImageProcessor at 64 pixels, .* at 128: run"):
        cached[1].verify(model, larger)


def test_other_data_is_refused(cached, model, processor, tmp_path):
    dataset, cache = cached
    cache.verify(model, processor, dataset)
    other = load_episodes(write_recordings(tmp_path, seed=1))
    with pytest.raises(ValueError, match="made from other data than .* is now"):
        cache.verify(model, processor, other)


def test_the_image_tokenizer_alone_is_that_of_the_checkpoint(model, processor, tmp_path):
    for size in ("50MB", "100KB"):  # one file, and shards
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        alone = load_image_tokenizer(str(folder), local_files_only=True)
        assert alone.state_dict().keys() == model.model.vqmodel.state_dict().keys()
        assert hash_image_tokenizer(alone) == hash_image_tokenizer(model.model.vqmodel)
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert torch.equal(alone.encode_codes(pixels), model.model.vqmodel.encode_codes(pixels))
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_image_tokenizer(str(folder), local_files_only=True)


# -------------------------------------------------------------------- the Hub


def test_a_repository_is_opened_at_a_revision(cached, fresh_process):
    script = f"""
import json
from transformers_worldvla.data import FrameTokenCache
cache = FrameTokenCache("{REPO}", revision="v3.0")
print(json.dumps([cache.fingerprint, cache.path.name, cache.splits, cache.table().num_rows]))
"""
    _, cache = cached
    with DatasetHub(cache.path) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        found = fresh_process(script, package=True, **environment)
    assert found == [cache.fingerprint, COMMIT, cache.splits, sum(cache.splits.values())]


# -------------------------------------------------------------------- refusals


def test_damage_is_named(copy):
    files = sorted((copy / "data").glob("*.parquet"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EpisodeError, match=f"{files[0].name}: cannot be read"):
        FrameTokenCache(copy).table()
    pq.write_table(pq.read_table(files[1]).slice(1), files[1])
    with pytest.raises(EpisodeError, match=rf"{files[1].name}: holds \d+ rows, not \d+"):
        FrameTokenCache(copy).table("val_ind")
    files[0].unlink()
    with pytest.raises(EpisodeError, match=f"{files[0].name}: file is missing"):
        FrameTokenCache(copy)


def test_codes_outside_the_codebook_are_damage(copy, model, processor):
    file = next((copy / "data").glob("val_ind*"))
    table = pq.read_table(file)
    column = table.column_names.index("codes.image")
    broken = table["codes.image"].combine_chunks().flatten().to_numpy().copy()
    broken[3] = 32
    import pyarrow as pa

    lists = pa.FixedSizeListArray.from_arrays(pa.array(broken, pa.uint16()), 16)
    pq.write_table(table.set_column(column, "codes.image", lists), file)
    with pytest.raises(EpisodeError, match=r"codes.image holds no \(4, 4\) codes"):
        FrameTokenCache(copy).verify(model, processor).episodes("val_ind")


def test_no_cache_and_damaged_headers(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no cache"):
        FrameTokenCache(tmp_path)
    with pytest.raises(ValueError, match="splits are train, val_ind, val_ood, not 'test'"):
        FrameTokenCache(copy).table("test")
    with pytest.raises(ValueError, match="has no val_ood rows"):
        FrameTokenCache(copy).table("val_ood")
    header = json.loads((copy / "worldvla_cache.json").read_text())
    (copy / "worldvla_cache.json").write_text(json.dumps({**header, "version": 2}))
    with pytest.raises(EpisodeError, match="worldvla_cache.json: is version 2, this library reads 1"):
        FrameTokenCache(copy)
    (copy / "worldvla_cache.json").write_text("{")
    with pytest.raises(EpisodeError, match="worldvla_cache.json: is no header of a cache"):
        FrameTokenCache(copy)


def resize(folder: Path, size: tuple[int, int]) -> None:
    for file in folder.glob("*.png"):
        with Image.open(file) as picture:
            smaller = picture.resize(size)
        smaller.save(file)


def test_pictures_of_another_shape_are_refused(make, tmp_path):
    """Episode 2 is wide: its pictures would become other grids of codes, which one cache cannot hold."""
    source = write_recordings(tmp_path / "mixed", steps=(3, 3, 3))
    for camera in CAMERAS:
        resize(source / "episode_2" / camera, (144, 36))
    with pytest.raises(
        EpisodeError, match="episode 2: a picture of 2 x 8 codes, earlier ones have 4 x 4: one cache holds"
    ):
        make(tmp_path / "cache", source)
    source = write_recordings(tmp_path / "cameras", steps=(3,))
    resize(source / "episode_0/wrist", (144, 36))
    with pytest.raises(ValueError, match="by camera they get these codes: wrist 2 x 8, image 4 x 4"):
        make(tmp_path / "other", source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": "mean"}, "statistics are one of minmax, quantile, checkpoint, not 'mean'"),
        ({"statistics": "checkpoint"}, "need an embodiment of it: name it"),
        ({"no_ops": "authors", "semantics": "absolute"}, "no-op rule is for delta actions"),
        ({"gripper": 3}, "dimension 3 is no gripper"),
        ({"split": "random"}, "a split rule is one of"),
        ({"augment": -1}, "augment is a number >= 0, not -1"),
    ],
)
def test_options_that_make_no_sense(make, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_something_else_is_left_alone(make, copy, tmp_path):
    before = contents(copy)
    with pytest.raises(ValueError, match=r"cache of something else: encoding.batch_size \(5, not 4\).* there and here"):
        make(copy, batch_size=4)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not empty and holds no cache"):
        make(tmp_path / "notes")
    assert contents(copy) == before and contents(tmp_path / "notes") == {"todo.txt": b"keep me"}
    assert partial(make, batch_size=5)(copy)[1].fingerprint  # the same again: nothing to do
    assert contents(copy) == before
