"""`worldvla push` through the real upload client: what lies in the repository afterwards, and what is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from robot_folder import write_recordings
from small_checkpoint import LIBERO, small_model, small_processor, write_checkpoint

from transformers_worldvla import WorldVLAConfig, WorldVLAForCausalLM
from transformers_worldvla.cli.checkpoints import Checkpoint
from transformers_worldvla.cli.closed_loop import hash_checkpoint
from transformers_worldvla.cli.main import main
from transformers_worldvla.evaluation.results import ResultFolder
from transformers_worldvla.publishing.card import BEGIN, END, fill_card, has_chameleon_license
from transformers_worldvla.publishing.folder import MODEL, Publication

REPO = "tester/published"
Push = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "any")
        yield server


@pytest.fixture
def push(capfd: pytest.CaptureFixture[str]) -> Push:
    """Run the command, which must end well; the document it prints."""

    def run(*arguments: object) -> dict[str, Any]:
        capfd.readouterr()
        code = main(["push", *map(str, arguments), "--json"])
        out, err = capfd.readouterr()
        assert code == 0, err
        document: dict[str, Any] = json.loads(out)
        return document

    return run


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must be refused; the one line it says."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        code = main(["push", *map(str, arguments)])
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("worldvla push:")]
        assert code == 2 and len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint in the folder of a run, as training leaves it."""
    folder = write_checkpoint(tmp_path / "run")
    (folder / "trainer" / "checkpoint-1").mkdir(parents=True)
    (folder / "trainer" / "checkpoint-1" / "model.safetensors").write_bytes(b"optimizer")
    (folder / "run.json").write_text(json.dumps({"settings": {"checkpoint": str(tmp_path)}}))
    (folder / ".partial").write_text("")
    torch.save({}, folder / "training_args.bin")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------- models


def test_the_checkpoint_of_a_run_and_nothing_else_goes_to_the_hub(folder: Path, hub: FakeHub, push: Push) -> None:
    document = push(folder, REPO)
    assert document["kind"] == "model" and hub.commit(REPO)["oid"] in document["commit"]
    published = hub.files(REPO)
    stays = {"trainer/checkpoint-1/model.safetensors", "run.json", ".partial", "training_args.bin"}
    assert published == {name: content for name, content in contents(folder).items() if name not in stays}
    assert sorted(published) == document["files"]


def test_what_was_pushed_loads_as_it_was(folder: Path, hub: FakeHub, push: Push, tmp_path: Path) -> None:
    push(folder, REPO)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files(REPO).items():
        (copy / name).write_bytes(content)
    ids = torch.arange(4, 24)[None]
    logits = [WorldVLAForCausalLM.from_pretrained(each)(input_ids=ids).logits for each in (folder, copy)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_a_second_push_replaces_what_it_wrote_and_keeps_what_people_wrote(
    folder: Path, hub: FakeHub, push: Push
) -> None:
    push(folder, REPO)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("# WorldVLA checkpoint", "# My robot") + "\nAsk me about it.\n")
    (folder / "model-00001-of-00009.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    push(folder, REPO)
    assert "model-00001-of-00009.safetensors" in hub.files(REPO)
    (folder / "model-00001-of-00009.safetensors").unlink()
    push(folder, REPO)
    text = hub.files(REPO)["README.md"].decode()
    assert "# My robot" in text and "Ask me about it." in text
    assert text.count(BEGIN) == text.count(END) == text.count("## Licence and origin") == 1
    assert "model-00001-of-00009.safetensors" not in hub.files(REPO)


def test_to_a_branch(folder: Path, hub: FakeHub, push: Push) -> None:
    for _ in range(2):
        push(folder, REPO, "--revision", "trial")
    assert "config.json" in hub.files(REPO, "trial") and hub.files(REPO) == {}


def test_a_dry_run_sends_and_changes_nothing(folder: Path, hub: FakeHub, push: Push) -> None:
    before = contents(folder)
    document = push(folder, REPO, "--dry-run")
    assert hub.commits == {} and contents(folder) == before
    assert BEGIN in document["card"] and "config.json" in document["files"] and document["commit"] is None


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("tokens_worldvla.py", "code: missing: tokens_worldvla.py"),
        ("tokenizer.json", "files: missing: tokenizer.json"),
        ("model.safetensors", "files: missing: model.safetensors"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(
    folder: Path, hub: FakeHub, refused: Callable[..., str], broken: str, reason: str
) -> None:
    (folder / broken).unlink()
    before = contents(folder)
    assert reason in refused(folder, REPO)
    assert hub.commits == {} and contents(folder) == before


def test_a_model_of_another_kind_is_refused(folder: Path, hub: FakeHub, refused: Callable[..., str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    refused(folder, REPO)
    assert hub.commits == {}


def test_a_hub_that_refuses_loses_nothing(folder: Path, refused: Callable[..., str], monkeypatch: Any) -> None:
    from huggingface_hub import constants

    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"{server.endpoint}/nowhere")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "any")
        assert f"{REPO} refused it" in refused(folder, REPO)
    assert (folder / "model.safetensors").is_file()


# -------------------------------------------------------------------- the card


def write_results(folder: Path, checkpoint: str | None) -> Path:
    results = ResultFolder(folder, {"model": "run", "checkpoint": checkpoint})
    for trial in range(10):
        row = {"suite": "libero_goal", "task": 3, "trial": trial, "success": trial < 7, "steps": 80}
        results.add({**row, "instruction": "open the drawer", "versions": {"mujoco": "3.3.0"}})
    results.finish()
    return folder


def test_the_card_has_results_with_intervals_and_versions(folder: Path, push: Push, tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", hash_checkpoint(Checkpoint(str(folder), True)))
    card = ModelCard(push(folder, REPO, "--dry-run", "--results", results)["card"])
    # Wilson's interval of 7 in 10, from the closed form with z = 1.95996
    assert "| libero_goal | 3 | open the drawer | 70.0 % [39.7, 89.2] (7 of 10) |" in card.text
    assert "| mujoco | 3.3.0 | 3.3.0 |" in card.text or "| mujoco | - | 3.3.0 |" in card.text
    assert f"| torch | {torch.__version__} | - |" in card.text
    [result] = card.data.eval_results or []
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("libero_goal", "success_rate", 70.0)


@pytest.mark.parametrize("checkpoint", [None, "0" * 64])
def test_results_of_other_weights_are_refused(
    folder: Path, refused: Callable[..., str], tmp_path: Path, checkpoint: str | None
) -> None:
    results = write_results(tmp_path / "results", checkpoint)
    assert f"evaluate {folder} itself" in refused(folder, REPO, "--dry-run", "--results", results)


def test_results_that_are_none_are_refused(folder: Path, refused: Callable[..., str]) -> None:
    assert "no folder that `worldvla evaluate` wrote" in refused(folder, REPO, "--results", folder)


def chameleon(folder: Path, license_id: str | None) -> Publication:
    WorldVLAConfig(vocab_size=65536).save_pretrained(folder)
    header = "---\n" + (f"license: {license_id}\n" if license_id else "") + "tags:\n- robotics\n---\n# A model\n"
    (folder / "README.md").write_text(header)
    return Publication(folder, MODEL, ())


def test_weights_of_chameleons_lineage_name_its_licence(tmp_path: Path) -> None:
    card = fill_card(chameleon(tmp_path, None), {})
    assert card.data.to_dict()["license"] == "other"
    assert card.data.to_dict()["license_name"] == "chameleon-research-license"
    assert card.data.to_dict()["license_link"] in card.text
    assert has_chameleon_license(card) and card.data.tags[:2] == ["robotics", "worldvla"]


def test_the_card_says_what_chameleons_licence_asks_for(tmp_path: Path) -> None:
    text = " ".join(fill_card(chameleon(tmp_path, None), {}).text.split())
    for duty in (
        "outputs are for **noncommercial research only**",
        "under the same terms only, with a copy of the licence and with the file `NOTICE`",
        "Acceptable Use Policy",
        "say Apache-2.0. That covers what their authors added, not what comes from Chameleon",
    ):
        assert duty in text


def test_another_licence_for_them_must_be_meant(tmp_path: Path) -> None:
    publication = chameleon(tmp_path, "apache-2.0")
    with pytest.raises(ValueError, match="say --license"):
        fill_card(publication, {})
    card = fill_card(publication, {}, license_id="apache-2.0")
    assert card.data.to_dict()["license"] == "apache-2.0" and not has_chameleon_license(card)
    assert has_chameleon_license(fill_card(publication, {}, license_id="other"))


def test_its_notice_goes_along_and_its_text_is_asked_for(
    tmp_path: Path, hub: FakeHub, push: Push, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "run")
    monkeypatch.setattr("transformers_worldvla.publishing.card.has_chameleon_lineage", lambda config: True)
    assert "NOTICE" in push(folder, REPO, "--dry-run")["files"] and not (folder / "NOTICE").exists()
    assert main(["push", str(folder), REPO]) == 0
    assert "asks for a copy of itself" in capfd.readouterr().err
    assert "Copyright (c) Meta Platforms, Inc. All Rights Reserved." in hub.files(REPO)["NOTICE"].decode()
    (folder / "NOTICE").write_text("our own, with Meta's sentence")
    (folder / "LICENSE").write_text("the licence")
    assert main(["push", str(folder), REPO]) == 0
    assert "asks for a copy of itself" not in capfd.readouterr().err
    assert hub.files(REPO)["NOTICE"] == b"our own, with Meta's sentence" and "LICENSE" in hub.files(REPO)


def test_weights_of_their_own_do_not(folder: Path, push: Push) -> None:
    card = ModelCard(push(folder, REPO, "--dry-run")["card"])
    assert "license" not in card.data.to_dict() and "do not descend from Meta's" in card.text


# -------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter over a base that only this machine has."""
    pytest.importorskip("peft")
    from transformers_worldvla.training.adapters import add_lora, fingerprint, write_adapter_facts

    processor = small_processor(LIBERO)
    model = small_model(processor)
    folder = tmp_path / "adapter"
    adapted = add_lora(model, rank=2)
    adapted.peft_config["default"].base_model_name_or_path = str(write_checkpoint(tmp_path / "base"))
    adapted.save_pretrained(folder)
    write_adapter_facts(folder, model.config, fingerprint(small_model(processor)))
    processor.save_pretrained(folder)
    return folder


def test_an_adapter_must_name_a_base_that_others_can_open(
    adapter: Path, hub: FakeHub, refused: Callable[..., str]
) -> None:
    assert "is a folder of this machine, nobody else could open it" in refused(adapter, REPO)
    document = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(document | {"base_model_name_or_path": None}))
    assert "the adapter names no base" in refused(adapter, REPO)
    assert hub.commits == {}


def test_an_adapter_with_the_repository_of_its_base(adapter: Path, hub: FakeHub, push: Push) -> None:
    document = push(adapter, REPO, "--base-model", "tester/base")
    published = hub.files(REPO)
    assert document["kind"] == "adapter" and published == contents(adapter)
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == "tester/base"
    card = ModelCard(published["README.md"].decode())
    assert card.data.base_model == "tester/base" and card.data.library_name == "peft"
    assert {"lora", "worldvla"} <= set(card.data.tags)
    assert "More Information Needed" not in card.text and "# WorldVLA adapter" in card.text  # PEFT's form is no card
    assert push(adapter, REPO)["card"] == str(card)  # now it is named in the adapter


# -------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    dataset = write_recordings(root / "toy", (5, 6, 7))
    arguments = [dataset, "--model", write_checkpoint(root / "model"), "--output", root / "cache", "--device", "cpu"]
    assert main(["tokenize", *map(str, arguments)]) == 0
    return root / "cache"


@pytest.fixture
def cache(whole_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_cache, tmp_path / "cache"))


def test_a_cache_becomes_a_dataset_repository(cache: Path, hub: FakeHub, push: Push) -> None:
    document = push(cache, REPO, "--private")
    assert document["kind"] == "dataset cache" and hub.files(REPO) == contents(cache)


def test_a_damaged_cache_is_refused(cache: Path, hub: FakeHub, refused: Callable[..., str]) -> None:
    shard = next(cache.glob("data/*.parquet"))
    content = shard.read_bytes()
    (cache / "data" / "train-other.parquet").write_bytes(content)
    assert "train-other.parquet is in no header" in refused(cache, REPO)
    (cache / "data" / "train-other.parquet").unlink()
    shard.write_bytes(content[: len(content) // 2])
    assert shard.name in refused(cache, REPO)
    shard.unlink()
    assert shard.name in refused(cache, REPO)
    assert hub.commits == {}


# -------------------------------------------------------------------- Spaces

SPACE = Path(__file__).parents[2] / "hub" / "space"


@pytest.fixture
def space(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SPACE, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__")))


def test_a_space_becomes_a_space(space: Path, hub: FakeHub, push: Push) -> None:
    expected = contents(space)
    (space / "__pycache__").mkdir()
    (space / "__pycache__" / "app.pyc").write_bytes(b"compiled")
    (space / ".env").write_text("a secret")
    document = push(space, REPO)
    assert document["kind"] == "Space" and hub.files(REPO) == expected
    assert hub.created[REPO] == {"type": "space", "sdk": "gradio"}


def test_a_space_without_its_app_is_refused(space: Path, hub: FakeHub, refused: Callable[..., str]) -> None:
    (space / "app.py").unlink()
    assert "names the app app.py, which is not there" in refused(space, REPO)
    (space / "README.md").write_text("---\nsdk: [\n---\n")
    assert "its header cannot be read" in refused(space, REPO)
    (space / "README.md").write_text("# A folder with a text\n")
    assert "holds nothing to push" in refused(space, REPO)
    assert hub.commits == {}
