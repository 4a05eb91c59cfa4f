"""Datasets from the Hub, through huggingface_hub and a real HTTP server in this process."""

import hashlib

import numpy as np
import pytest
from dataset_hub import COMMIT, REPO, DatasetHub

from transformers_worldvla.data import load_episodes

PRELUDE = """
import hashlib, json, sys
from transformers_worldvla.data import load_episodes, scan_episodes
def digest(frames): return hashlib.sha256(frames.tobytes()).hexdigest()
def attempt(function):
    try: function()
    except Exception as error: return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def ask(fresh_process):
    """Run a script that loads datasets from `hub`, in a process with an empty cache; it prints one JSON document."""

    def run(hub: DatasetHub, script: str) -> object:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return fresh_process(PRELUDE + script, package=True, **environment)

    return run


def test_download_fetches_the_chosen_cameras_only(libero, ask):
    script = f"""
dataset = load_episodes("{REPO}", revision="v3.0", cameras="image")
print(json.dumps([dataset.revision, dataset.fingerprint, dataset.source, digest(dataset[2].frames("image"))]))
"""
    with DatasetHub(libero / "lerobot_v30_video") as hub:
        revision, fingerprint, source, frames = ask(hub, script)
        fetched = hub.fetched
    assert (revision, fingerprint, source) == (COMMIT, COMMIT, REPO)
    assert frames == _digest(load_episodes(libero / "lerobot_v30_video")[2].frames("image"))
    assert sorted(fetched) == [name for name in hub.names() if "wrist_image" not in name]


def test_streaming_fetches_what_an_episode_needs(libero, ask):
    script = f"""
dataset = load_episodes("{REPO}", streaming=True)
episode = dataset[3]
print(json.dumps([len(dataset), dataset.revision, episode.instruction, digest(episode.frames("wrist_image"))]))
"""
    with DatasetHub(libero / "lerobot_v30_video") as hub:
        length, revision, instruction, frames = ask(hub, script)
        fetched = hub.fetched
    expected = load_episodes(libero / "lerobot_v30_video")[3]
    assert (length, revision, instruction) == (5, COMMIT, expected.instruction)
    assert frames == _digest(expected.frames("wrist_image"))
    assert sorted(name for name in fetched if not name.startswith("meta/")) == [
        "data/chunk-000/file-000.parquet",
        "videos/observation.images.wrist_image/chunk-000/file-001.mp4",
    ]


def test_a_file_that_the_repository_lacks(copy_of, ask):
    folder = copy_of("lerobot_v30_video")
    (folder / "videos/observation.images.image/chunk-000/file-002.mp4").unlink()
    script = f"""
streamed = list(map(str, scan_episodes("{REPO}").problems))
whole = attempt(lambda: load_episodes("{REPO}")[4].frame("image", 0))
print(json.dumps([streamed, whole]))
"""
    with DatasetHub(folder) as hub:
        streamed, whole = ask(hub, script)
    name = f"{REPO}/videos/observation.images.image/chunk-000/file-002.mp4: episode 4: file is missing"
    assert streamed == [f"{name} on the Hub"]
    assert whole == f"EpisodeError: {name}"


def test_what_the_hub_does_not_have(tmp_path, libero, ask, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    (tmp_path / "me/mine").mkdir(parents=True)
    script = f"""
messages = [attempt(lambda: load_episodes("{REPO}", revision="v9")), attempt(lambda: load_episodes("lab/no_robot")),
            attempt(lambda: load_episodes("{REPO}", cameras="wrist")), attempt(lambda: load_episodes("me/mine"))]
print(json.dumps(messages))
"""
    with DatasetHub(libero / "lerobot_v30_video") as hub:
        revision, repository, camera, recorded = ask(hub, script)
    assert revision == f'FileNotFoundError: the dataset repository {REPO} has no revision "v9"'
    assert repository == "FileNotFoundError: lab/no_robot: no such folder, and no such dataset repository on the Hub"
    assert camera.startswith('ValueError: no camera "wrist" here; the cameras are: image, wrist_image, did you mean')
    assert recorded.endswith(f"; LeRobot recorded it in {tmp_path}/me/mine, give that folder")


def test_no_hub_at_all(fresh_process):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    script = PRELUDE + f'print(json.dumps(attempt(lambda: load_episodes("{REPO}"))))'
    message = fresh_process(script, package=True, **environment)
    assert message.startswith(f"FileNotFoundError: {REPO}: no such folder, and the Hub could not be asked: ")
    assert "\n" not in message


def test_hdf5_from_the_hub_and_what_is_no_recording(copy_of, ask):
    folder = copy_of("libero_hdf5")
    (folder / "model.safetensors").write_bytes(b"large")
    script = f"""
dataset = load_episodes("{REPO}")
print(json.dumps([dataset.format, dataset.revision, digest(dataset[0].frames("agentview_rgb"))]))
"""
    frames = load_episodes(folder)[0].frames("agentview_rgb")
    with DatasetHub(folder) as hub:
        assert ask(hub, script) == ["LIBERO HDF5", COMMIT, _digest(frames)]
        next(folder.glob("*.hdf5")).unlink()
        message = ask(hub, f'print(json.dumps(attempt(lambda: load_episodes("{REPO}"))))')
        assert "model.safetensors" not in hub.fetched
    assert message.endswith(f"{REPO} holds no meta/info.json (LeRobot) and no *.hdf5 (LIBERO)")


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(frames.tobytes()).hexdigest()
