from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from transformers_worldvla.data.video import BACKEND_VARIABLE, VideoError, decode_frames

FPS, COUNT = 10, 40


def write_video(path: Path, numbers: list[int], codec: str = "libx264", **options: str) -> None:
    """A video whose frame at number / FPS seconds is a grey of 6 times its number, `numbers` ascending."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, FPS, options={"crf": "0", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        for number in numbers:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 6 * number, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbers_of(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean(axis=(1, 2, 3)) / 6).astype(int).tolist()


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "2"}),
        ("libx264", {"g": "12", "bf": "3"}),
        ("libx264", {"g": "250", "bf": "3"}),
        ("libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1"}),
        ("libsvtav1", {"g": "2", "crf": "20"}),
        ("libsvtav1", {"g": "16", "crf": "20"}),
    ],
)
def test_any_span_of_any_group_of_pictures(tmp_path, codec, options):
    """Sparse key frames, B frames and open groups: seeking must neither lose nor move a frame."""
    write_video(tmp_path / "a.mp4", list(range(COUNT)), codec, **options)
    for start, stop in [(0, COUNT), (0, 1), (1, 2), (11, 13), (12, 24), (17, 18), (COUNT - 1, COUNT)]:
        frames = decode_frames(tmp_path / "a.mp4", np.arange(start, stop) / FPS, 0.25 / FPS)
        assert frames.shape == (stop - start, 64, 64, 3)
        assert numbers_of(frames) == list(range(start, stop))


def test_missing_frames_are_errors_not_neighbours(tmp_path):
    write_video(tmp_path / "a.mp4", [*range(0, 20), *range(22, COUNT)])
    assert numbers_of(decode_frames(tmp_path / "a.mp4", np.array([19, 22]) / FPS, 0.025)) == [19, 22]
    with pytest.raises(VideoError, match="has no frame at 2.000 s, only at 1.900 and 2.200 s"):
        decode_frames(tmp_path / "a.mp4", np.arange(15, 25) / FPS, 0.025)
    with pytest.raises(VideoError, match="ends at 3.900 s, a frame at 4.000 s is wanted"):
        decode_frames(tmp_path / "a.mp4", np.arange(35, 45) / FPS, 0.025)
    with pytest.raises(VideoError, match="a frame at 9.000 s is wanted"):
        decode_frames(tmp_path / "a.mp4", np.array([9.0]), 0.025)


def test_a_file_that_starts_too_late(tmp_path):
    write_video(tmp_path / "a.mp4", list(range(5, COUNT)))
    with pytest.raises(VideoError, match="has no frame at 0.000 s"):
        decode_frames(tmp_path / "a.mp4", np.array([0.0]), 0.025)


def test_what_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(VideoError, match="cannot be decoded: No such file"):
        decode_frames(path, np.array([0.0]), 0.025)
    path.write_bytes(b"")
    with pytest.raises(VideoError, match="cannot be decoded: "):
        decode_frames(path, np.array([0.0]), 0.025)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="holds no video stream"):
        decode_frames(path, np.array([0.0]), 0.025)


def test_unknown_decoder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "opencv")
    with pytest.raises(ValueError, match='is "opencv"; it may be "pyav" or "torchcodec"'):
        decode_frames(tmp_path / "a.mp4", np.array([0.0]), 0.025)


def test_torchcodec_returns_the_same_frames(libero, monkeypatch):
    pytest.importorskip("torchcodec")
    path = libero / "lerobot_v30_video/videos/observation.images.image/chunk-000/file-000.mp4"
    seconds = np.arange(50, 70) / 20
    expected = decode_frames(path, seconds, 0.0125)
    monkeypatch.setenv(BACKEND_VARIABLE, "torchcodec")
    assert np.array_equal(decode_frames(path, seconds, 0.0125), expected)
    with pytest.raises(VideoError, match="holds 120 frames, number 120 is wanted"):
        decode_frames(path, np.array([6.0]), 0.0125)
