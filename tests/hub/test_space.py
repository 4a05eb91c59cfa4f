"""The Space (`hub/space/app.py`) with the bundled checkpoint: its functions, its server, and the page in a browser."""

import base64
import importlib.util
import io
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

gr = pytest.importorskip("gradio", reason='the Space needs gradio: pip install "transformers_worldvla[space]"')

from transformers_worldvla import WorldVLAPolicy  # noqa: E402
from transformers_worldvla.data import load_episodes  # noqa: E402
from transformers_worldvla.evaluation.open_loop import crop_for_model  # noqa: E402
from transformers_worldvla.serving.play import Keyboard  # noqa: E402

HUB = Path(__file__).parents[2] / "hub"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREEN = re.compile(r'<img src="data:image/(?P<kind>png|gif);base64,(?P<content>[^"]+)"')


@pytest.fixture(scope="module")
def app() -> Any:
    spec = importlib.util.spec_from_file_location("space_app", HUB / "space" / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def space(app: Any) -> Any:
    return app.Space()


@pytest.fixture(scope="module")
def server(app: Any, space: Any) -> Iterator[str]:
    """The address of the running page."""
    app.launch(space, prevent_thread_lock=True, quiet=True)
    page = next(page for page in gr.Blocks.get_instances() if page.is_running)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """The fourth and the fifth frame of the bundled episode."""
    episode = load_episodes(HUB / "libero-episode")[0]
    return [episode.frame("image", step) for step in (3, 4)]


@pytest.fixture(scope="module")
def files(frames: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """These frames as files, the newer first, as the page has them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, frame in zip(("before", "now"), frames, strict=True):
        Image.fromarray(frame).save(folder / f"{name}.png")
    return [str(folder / "now.png"), str(folder / "before.png")]


def pictures(html: str) -> list[np.ndarray]:
    """What a piece of the page shows, without the line of text above it."""
    found = SCREEN.search(html)
    assert found is not None
    with Image.open(io.BytesIO(base64.b64decode(found["content"]))) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    return [frame[-frame.shape[1] :] for frame in frames]  # pictures are square here


def enlarged(picture: Image.Image, app: Any) -> np.ndarray:
    return np.asarray(picture.resize((app.SIDE, app.SIDE), Image.Resampling.BICUBIC))


# -------------------------------------------------------------------- act


def test_actions_are_the_policys(space: Any, frames: list[np.ndarray], files: list[str]) -> None:
    plots, table = space.act("put the bowl on the plate", *files)
    policy = WorldVLAPolicy(space.world.model, space.world.processor)
    chunk = policy.predict({"image": np.stack(frames), "prompt": "put the bowl on the plate"})
    assert chunk.num_frames == 2
    rows = np.array(table)
    assert rows[:, 0].tolist() == list(range(1, 11))
    np.testing.assert_allclose(rows[:, 1:8], chunk.actions, atol=5e-4)
    np.testing.assert_allclose(rows[:, 8], chunk.confidence, atol=5e-4)
    assert plots.size == (4 * 300 + 3 * 8, 2 * 150 + 8)  # seven dimensions and the confidence


def test_without_an_earlier_picture_the_prompt_has_one(space: Any, frames: list[np.ndarray], files: list[str]) -> None:
    _, table = space.act("put the bowl on the plate", files[0], None)
    policy = WorldVLAPolicy(space.world.model, space.world.processor)
    expected = policy.predict_action_chunk({"image": frames[1], "prompt": "put the bowl on the plate"})
    np.testing.assert_allclose(np.array(table)[:, 1:8], expected, atol=5e-4)


# -------------------------------------------------------------------- imagine


def test_a_movement_is_imagined_as_the_model_does(space: Any, app: Any, files: list[str]) -> None:
    *shown, (animation, strip) = space.imagine("z down", 2, "", files[0], None)
    plan = np.stack([Keyboard(space.robot).action("f")] * 2)
    start = Image.open(files[0])
    expected = space.world.model.imagine(space.world.processor, image=start, actions=plan, draft="previous")
    assert len(shown) == 2 and len(pictures(animation)) == 3 and strip.width == 3 * app.SMALL + 2 * 8
    for (html, _), picture in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(pictures(html)[0], enlarged(picture, app))


def test_the_policy_acts_in_its_own_dream(space: Any, app: Any, frames: list[np.ndarray], files: list[str]) -> None:
    *shown, _ = space.imagine(app.POLICY, 2, "put the bowl on the plate", *files)
    policy = WorldVLAPolicy(space.world.model, space.world.processor)
    observation = {"image": np.stack(frames), "prompt": "put the bowl on the plate"}
    dream = space.world.begin(frames[1])
    for html, _ in shown:
        dream = space.world.step([dream], policy.select_action(observation)[None])[0]
        np.testing.assert_array_equal(pictures(html)[0], enlarged(Image.fromarray(dream.pictures[0]), app))
        observation["image"] = dream.pictures[0]


# -------------------------------------------------------------------- drag


def test_dragging_goes_on_from_the_newest_frame(space: Any, frames: list[np.ndarray], files: list[str]) -> None:
    trail, screen, _ = space.begin(files[0])
    assert trail[-1].steps == 0 and len(pictures(screen)) == 1
    np.testing.assert_array_equal(trail[-1].pictures[0], crop_for_model(space.world.processor, frames[1]))
    moves = [0.5, 0, -1, 0, 0, 0, -1], [0, 0, 0.3, 0, 0, 0.1, 1]
    for move in moves:
        *_, (trail, _, _) = space.drag(1, trail, *move)
    plan = space.world.model.imagine(space.world.processor, image=Image.fromarray(frames[1]), actions=np.array(moves))
    assert [dream.steps for dream in trail] == [0, 1, 2]
    for dream, picture in zip(trail[1:], plan, strict=True):
        np.testing.assert_array_equal(dream.pictures[0], np.asarray(picture))


def test_a_trail_stays_short(space: Any, app: Any, files: list[str]) -> None:
    trail = [replace(space.begin(files[0])[0][0], steps=step) for step in range(app.SHOWN)]
    *_, (trail, _, strip) = space.drag(1, trail, *space.rest)
    assert [dream.steps for dream in trail] == list(range(1, app.SHOWN + 1))
    assert strip.width == app.SHOWN * (app.SMALL + 8) - 8


def test_sliders_span_the_range_in_round_steps(space: Any, app: Any) -> None:
    sliders = [app.slider(space, index) for index in space.moving]
    for index, slider in enumerate(sliders):
        low, high = space.robot.low[index], space.robot.high[index]
        assert low - 1e-9 <= slider.minimum < slider.maximum <= high + 1e-9
        assert (
            50 <= (high - low) / slider.step <= 500 and high - low - (slider.maximum - slider.minimum) < 2 * slider.step
        )


# -------------------------------------------------------------------- what is refused


def bad_inputs(space: Any, files: list[str], folder: Path) -> dict[str, Any]:
    (folder / "text.png").write_text("not a picture")
    (folder / "half.png").write_bytes(Path(files[0]).read_bytes()[:500])
    Image.new("RGB", (5000, 2)).save(folder / "wide.png")
    text, half, wide = (str(folder / name) for name in ("text.png", "half.png", "wide.png"))
    trail = space.begin(files[0])[0]
    return {
        "choose a picture of image first": lambda: space.act("go", None, None),
        "cannot identify image": lambda: space.act("go", text, None),
        "is not a picture": lambda: space.act("go", half, None),
        "larger than 4096 pixels": lambda: space.act("go", wide, None),
        "prompt is a sentence": lambda: space.act("  ", files[0], None),
        "has 3000 characters": lambda: space.act("a" * 3000, files[0], None),
        "1 to 20 steps": lambda: list(space.imagine("stay", 10**9, "go", files[0], None)),
        "choose one of the plans": lambda: list(space.imagine("fly", 2, "go", files[0], None)),
        "action 0 is nan in dimension x": lambda: list(space.drag(1, trail, *[np.nan] * 7)),
        "choose a picture to start": lambda: list(space.drag(1, [], *space.rest)),
    }


def test_bad_inputs_are_one_line(space: Any, files: list[str], tmp_path: Path) -> None:
    for reason, call in bad_inputs(space, files, tmp_path).items():
        with pytest.raises(gr.Error) as raised:
            call()
        assert reason in raised.value.message and "\n" not in raised.value.message
    assert space.begin(None)[0] == []  # before a picture is chosen


# -------------------------------------------------------------------- the server


def test_visitors_have_dreams_of_their_own(server: str, app: Any, space: Any, files: list[str]) -> None:
    from gradio_client import Client, handle_file

    ann, bob = (Client(server, verbose=False) for _ in range(2))
    for visitor in (ann, bob):
        visitor.predict(handle_file(files[0]), api_name="/begin")
    left, right = [0, 1, 0, 0, 0, 0, -1], [0, -1, 0, 0, 0, 0, -1]
    trails = {visitor: space.begin(files[0])[0] for visitor in (ann, bob)}
    for visitor, move in ((ann, left), (bob, right), (ann, left)):
        shown = pictures(visitor.predict(*move, api_name="/drag")[0])[0]
        trails[visitor] += space.world.step(trails[visitor][-1:], np.array([move]))
        np.testing.assert_array_equal(shown, enlarged(Image.fromarray(trails[visitor][-1].pictures[0]), app))
    with pytest.raises(Exception, match="choose a picture to start from"):
        Client(server, verbose=False).predict(*left, api_name="/drag")


# -------------------------------------------------------------------- the page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_visitor_acts_imagines_and_drags(server: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(120_000)
        playwright.expect.set_options(timeout=120_000)
        page.goto(server, wait_until="domcontentloaded")
        playwright.expect(page.get_by_label("instruction")).to_have_value("put the bowl on top of the cabinet")

        page.get_by_role("button", name="Predict actions").click()
        playwright.expect(page.locator("#plots img")).to_be_visible()
        playwright.expect(page.get_by_text("confidence").first).to_be_visible()

        page.get_by_role("tab", name="Imagine").click()
        page.get_by_label("steps").first.fill("2")
        page.get_by_role("button", name="Imagine", exact=True).click()
        playwright.expect(page.get_by_alt_text("the imagined rollout")).to_be_visible()

        page.get_by_role("tab", name="Drag and watch").click()
        screen = page.locator("#screen img")
        given = screen.get_attribute("src")
        slider = page.locator("#sliders input[type=range]").nth(2)
        box = slider.bounding_box()
        assert box is not None
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, middle)
        page.mouse.down()
        for share in (0.4, 0.3, 0.2, 0.1):
            page.mouse.move(box["x"] + box["width"] * share, middle)
            time.sleep(0.3)
        page.mouse.up()
        playwright.expect(screen).not_to_have_attribute("src", given)
        page.screenshot(path=tmp_path / "space.png", full_page=True)
        page.get_by_role("button", name="Reset", exact=True).click()
        playwright.expect(screen).to_have_attribute("src", given)

        page.get_by_label("instruction").fill(" ")
        page.get_by_role("tab", name="Act").click()
        page.get_by_role("button", name="Predict actions").click()
        playwright.expect(page.get_by_text("prompt is a sentence that says what to do")).to_be_visible()
        browser.close()
    assert Image.open(tmp_path / "space.png").width == 1200
