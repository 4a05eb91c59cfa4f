"""Upload to a Hub, then load from it, through the real clients against a small server that speaks their protocol."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub

REPO = "tester/worldvla-tiny"

PUSH = """
import json, sys, torch
import transformers_worldvla
from transformers import AutoModelForCausalLM, AutoProcessor
folder, repo = sys.argv[1:]
model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
processor.push_to_hub(repo)
first = model.push_to_hub(repo)
with torch.no_grad():
    model.lm_head.weight.zero_()
second = model.push_to_hub(repo)
print(json.dumps([first.oid, second.oid]))
"""

# what a fine-tuning job does that knows the package only as remote code; sharded, as large models are
PUSH_COPY = """
import json, sys
from transformers import AutoModelForCausalLM, AutoProcessor
source, revision, repo = sys.argv[1:]
for auto in (AutoProcessor, AutoModelForCausalLM):
    part = auto.from_pretrained(source, trust_remote_code=True, revision=revision)
    part.push_to_hub(repo, max_shard_size="2MB")
print(json.dumps(None))
"""

UPLOAD_FOLDER = """
import json, sys
from huggingface_hub import HfApi
folder, repo = sys.argv[1:]
HfApi().create_repo(repo)
HfApi().upload_folder(repo_id=repo, folder_path=folder)
print(json.dumps(None))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture
def environment(hub: FakeHub) -> dict[str, str]:
    """What points Hugging Face's clients to our server."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "any", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@pytest.mark.slow
def test_push_to_hub_then_load(
    checkpoint: Path,
    tmp_path: Path,
    hub: FakeHub,
    environment: dict[str, str],
    fresh_process: Callable[..., Any],
    use_checkpoint: Callable[..., Any],
) -> None:
    use_checkpoint(checkpoint, tmp_path / "local", package=True)
    expected = torch.load(tmp_path / "local.pt")

    first, second = fresh_process(PUSH, checkpoint, REPO, package=True, **environment)
    assert hub.files(REPO).keys() == {path.name for path in checkpoint.iterdir()}

    # the same code and weights as those of the folder, by the commit that was asked for
    report = use_checkpoint(REPO, tmp_path / "remote", first, **environment)
    assert report["prompts"] == 0
    for name in report["classes"].keys() - {"AutoTokenizer"}:
        assert report["classes"][name].startswith(f"transformers_modules.tester.worldvla_hyphen_tiny.{first}.")
    torch.testing.assert_close(torch.load(tmp_path / "remote.pt"), expected, rtol=0, atol=0)

    # the newest commit, and with the package installed: no flag, no prompt, our installed classes
    report = use_checkpoint(REPO, tmp_path / "newest", package=True, **environment)
    assert report["prompts"] == 0
    assert report["classes"]["AutoModel"] == "transformers_worldvla.modeling_worldvla.WorldVLAForCausalLM"
    assert not torch.load(tmp_path / "newest.pt")["logits"]["AutoModelForCausalLM"].any()

    # pushed again by a process that had the code from the Hub only
    fresh_process(PUSH_COPY, REPO, first, "tester/copy", package=False, **environment)
    copy = hub.files("tester/copy")
    assert "model.safetensors.index.json" in copy and "model.safetensors" not in copy
    for name, content in copy.items():
        assert not name.endswith(".py") or content == hub.files(REPO)[name]
    use_checkpoint("tester/copy", tmp_path / "copy", **environment)
    torch.testing.assert_close(torch.load(tmp_path / "copy.pt"), expected, rtol=0, atol=0)


def test_uploaded_folder_keeps_its_card(
    checkpoint: Path, hub: FakeHub, environment: dict[str, str], fresh_process: Callable[..., Any]
) -> None:
    fresh_process(UPLOAD_FOLDER, checkpoint, REPO, package=False, **environment)
    assert hub.files(REPO) == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert json.loads(hub.files(REPO)["config.json"])["model_type"] == "worldvla"
