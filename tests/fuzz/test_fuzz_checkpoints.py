"""Checkpoints from outside: damaged ones are refused in one line, and none of them runs code that nobody asked for."""

import json
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import damaged_bytes, damaged_json, fuzz, refused_or_read, to_text, values, written
from hypothesis import strategies as st

from transformers_worldvla import WorldVLAPolicy
from transformers_worldvla.action_tokenization_worldvla import LIBERO, Embodiment
from transformers_worldvla.cli.checkpoints import find_checkpoint
from transformers_worldvla.cli.errors import UserError
from transformers_worldvla.diagnosis.files import check_folder
from transformers_worldvla.evaluation.metrics import STATISTICS_FILE, read_action_mean
from transformers_worldvla.publishing import inspect_folder
from transformers_worldvla.serving.loading import adapter_base, load_model, load_processor

FEW, MANY = 15, 300
EXAMPLES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
FEWER = [pytest.param(6, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(1800)


def load_all(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_processor(folder)
        load_model(folder, None, CPU)


def inspect(folder: Path) -> None:
    """What `worldvla doctor` and `worldvla push` read; the doctor's checks report and do not raise."""
    for finding in check_folder(folder):
        assert "\n" not in finding.found
    refused_or_read(lambda: inspect_folder(folder), [folder])


# -------------------------------------------------------------------- JSON


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json"])
def test_processor_files(small_folder: Path, name: str, examples: int) -> None:
    file = small_folder / name

    def claim(document: Any) -> None:
        with written(file, to_text(document)):
            refused_or_read(lambda: load_processor(small_folder), [small_folder])

    fuzz(damaged_json(json.loads(file.read_text())), claim, examples)


@pytest.mark.parametrize("examples", FEWER)
def test_tokenizer(small_folder: Path, examples: int) -> None:
    file = small_folder / "tokenizer.json"

    def claim(content: bytes | str) -> None:
        with written(file, content):
            refused_or_read(lambda: load_processor(small_folder), [small_folder])

    text = file.read_bytes()
    damaged = st.one_of(damaged_json(json.loads(text)).map(to_text), damaged_bytes(text, head=4000))
    fuzz(damaged, claim, examples)


@pytest.mark.parametrize("examples", FEWER)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_model_files(small_folder: Path, name: str, examples: int) -> None:
    file = small_folder / name
    document = json.loads(file.read_text())
    document.pop("vocabulary_map", None)  # a thousand entries would hide the others
    full = json.loads(file.read_text())

    def claim(damaged: Any) -> None:
        content = full | damaged if isinstance(damaged, dict) else damaged
        with written(file, to_text(content)):
            refused_or_read(lambda: load_all(small_folder), [small_folder])

    fuzz(damaged_json(document), claim, examples)


SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")


@pytest.mark.parametrize("size", [10**9, 0])
@pytest.mark.parametrize("field", [*SIZES, "vq_config.num_embeddings", "vq_config.num_res_blocks"])
def test_sizes_that_no_model_has(small_folder: Path, field: str, size: int) -> None:
    file = small_folder / "config.json"
    document = json.loads(file.read_text())
    *outer, name = field.split(".")
    (document[outer[0]] if outer else document)[name] = size

    def claim(_: None) -> None:
        with written(file, to_text(document)), pytest.raises(ValueError, match=small_folder.name):
            load_all(small_folder)

    fuzz(st.none(), claim, 1)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_adapters(small_folder: Path, tmp_path: Path, examples: int) -> None:
    pytest.importorskip("peft")
    document = {"base_model_name_or_path": str(small_folder), "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    file = tmp_path / "adapter_config.json"
    (tmp_path / "processor_config.json").write_text("{}")

    def claim(damaged: Any) -> None:
        with written(file, to_text(damaged)):
            refused_or_read(lambda: adapter_base(tmp_path), [tmp_path])
            named = [tmp_path, "no such folder", "is a file"]  # the last two of the base
            refused_or_read(lambda: find_checkpoint(str(tmp_path)).whole, named, (ValueError, OSError, UserError))
            inspect(tmp_path)

    fuzz(damaged_json(document), claim, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_training_statistics(tmp_path: Path, examples: int) -> None:
    document = {"action_mean": [0.5, 0.25, -1.0], "action_std": [1.0, 1.0, 2.0], "steps": 100}
    file = tmp_path / STATISTICS_FILE

    def claim(content: str) -> None:
        with written(file, content):
            refused_or_read(lambda: read_action_mean(tmp_path, 3), [file])

    fuzz(st.one_of(damaged_json(document).map(to_text), st.just("[" * 100_000)), claim, 4 * examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_embodiments(examples: int) -> None:
    def claim(document: Any) -> None:
        def use() -> None:
            robot = Embodiment.from_dict(document)
            robot.decode(robot.encode(np.zeros((2, robot.action_dim))))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused_or_read(use, ["embodiment", "actions"])

    fuzz(st.one_of(damaged_json(LIBERO.to_dict()), values), claim, 8 * examples)


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("examples", FEWER)
def test_weights(small_folder: Path, examples: int) -> None:
    """The header of a safetensors file, as bytes and as JSON."""
    file = small_folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])

    def forge(document: Any) -> bytes:
        text = to_text(document).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    def claim(damaged: bytes) -> None:
        with written(file, damaged):
            refused_or_read(lambda: load_model(small_folder, None, CPU), [small_folder])
            inspect(small_folder)

    fuzz(st.one_of(damaged_bytes(content, head=64), damaged_json(header).map(forge)), claim, examples)


@pytest.mark.parametrize("examples", FEWER)
def test_index_of_shards(small_folder: Path, examples: int) -> None:
    file, weights = small_folder / "model.safetensors.index.json", small_folder / "model.safetensors"
    names = ["lm_head.weight", "model.norm.weight"]
    document = {"metadata": {"total_size": 10}, "weight_map": dict.fromkeys(names, weights.name)}

    def claim(damaged: Any) -> None:
        with written(file, to_text(damaged)):
            inspect(small_folder)

    fuzz(damaged_json(document), claim, 3 * examples)


# -------------------------------------------------------------------- code


class Trap:
    """What a pickle may hold: a call that is made when it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def set_traps(folder: Path, marker: Path) -> None:
    """Code in every place from which somebody's library may run it."""
    trap = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for path in [*folder.glob("*_worldvla.py"), folder / "evil.py", folder / "__init__.py", folder / "setup.py"]:
        path.write_text(trap)
    classes = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B", "AutoModel": "evil.B"}
    processors = {"AutoProcessor": "evil.C", "AutoImageProcessor": "evil.D", "AutoTokenizer": ["evil.E", "evil.E"]}
    for name, changes in (
        ("config.json", {"auto_map": classes}),
        ("processor_config.json", {"auto_map": processors}),
        ("tokenizer_config.json", {"auto_map": processors, "tokenizer_class": "Evil"}),
        ("generation_config.json", {"custom_generate": "evil"}),
    ):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(marker)))


@pytest.fixture
def trapped(small_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with traps, and the file that appears when one is sprung."""
    import shutil

    folder, marker = tmp_path / "trapped", tmp_path / "sprung"
    shutil.copytree(small_folder, folder)
    set_traps(folder, marker)
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()  # the traps work
    marker.unlink()
    return folder, marker


def test_code_in_a_checkpoint_does_not_run(trapped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether it may: transformers would, and take a y."""
    folder, marker = trapped
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load_model(folder, None, CPU)
    refused_or_read(lambda: load_processor(folder), [folder])
    refused_or_read(lambda: WorldVLAPolicy.from_pretrained(folder, device="cpu"), [folder])
    inspect(folder)
    assert not marker.exists()


def test_nor_does_it_where_the_tokenizer_is_an_ordinary_one(
    trapped: tuple[Path, Path], small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = trapped
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "tokenizer_config.json").write_bytes((small_folder / "tokenizer_config.json").read_bytes())
    load_all(folder)
    WorldVLAPolicy.from_pretrained(folder, device="cpu")
    assert not marker.exists()


def test_nor_does_a_pickle_where_weights_are_missing(trapped: tuple[Path, Path]) -> None:
    folder, marker = trapped
    (folder / "model.safetensors").unlink()
    refused = []
    for load in (lambda: load_model(folder, None, CPU), lambda: WorldVLAPolicy.from_pretrained(folder, device="cpu")):
        try:
            load()
        except (ValueError, OSError) as error:
            refused.append(str(error))
    assert len(refused) == 2 and not marker.exists()


def test_nor_does_a_pickle_beside_an_adapter(small_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    marker = tmp_path / "sprung"
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"base_model_name_or_path": str(small_folder), "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises((ValueError, OSError)):
        load_all(folder)
    assert not marker.exists()


def test_nor_does_a_pickle_in_an_array(tmp_path: Path) -> None:
    from transformers_worldvla.cli.files import read_plan
    from transformers_worldvla.data.storage import load_numbers

    marker, file = tmp_path / "sprung", tmp_path / "plan.npy"
    np.save(file, np.array([Trap(marker)], dtype=object), allow_pickle=True)
    for read in (load_numbers, lambda path: read_plan(path, (), 7)):
        with pytest.raises((ValueError, UserError)):
            read(file)
    assert not marker.exists()
