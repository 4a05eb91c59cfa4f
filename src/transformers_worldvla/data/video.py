"""Frames of an mp4 by their time, decoded from the key frame before the first one wanted, not from the file's start.

PyAV by default, bit-identical to what LeRobot's own reader returns; `WORLDVLA_VIDEO_BACKEND=torchcodec` takes
torchcodec, if installed. This file knows no episodes: it raises `VideoError`, and the reader adds file and episode.
"""

import os
from pathlib import Path

import numpy as np

from .episodes import import_extra

BACKEND_VARIABLE = "WORLDVLA_VIDEO_BACKEND"
LONGEST = 1e7  # seconds, four months


class VideoError(ValueError):
    """A video that lacks a wanted frame or cannot be decoded."""


def decode_frames(path: Path, seconds: np.ndarray, tolerance: float) -> np.ndarray:
    """The frames shown at `seconds` (N, ascending; time inside the file): (N, H, W, 3) uint8 RGB.

    A frame counts when its time is within `tolerance` seconds; take less than half a frame, so that none can be
    confused with its neighbour. Raises VideoError when one is missing, corrupt or undecodable.
    """
    if not (abs(seconds) < LONGEST).all():
        raise VideoError(f"cannot have a frame at {seconds[0]} s")
    backend = os.environ.get(BACKEND_VARIABLE, "pyav")
    if backend == "torchcodec":
        return _decode_torchcodec(path, seconds, tolerance)
    if backend != "pyav":
        raise ValueError(f'{BACKEND_VARIABLE} is "{backend}"; it may be "pyav" or "torchcodec"')
    frames = _decode_pyav(path, seconds, tolerance, seek=True)
    if frames is None:  # the index led past the first frame: read the file from its start
        frames = _decode_pyav(path, seconds, tolerance, seek=False)
    if frames is None:
        raise VideoError(f"has no frame at {seconds[0]:.3f} s")
    return frames


def count_frames(path: Path) -> int | None:
    """Number of frames that a file claims to hold; None when it cannot be opened or does not say."""
    av = import_extra("av")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            return container.streams.video[0].frames or None if container.streams.video else None
    except (av.error.FFmpegError, OSError):
        return None


def _decode_pyav(path: Path, seconds: np.ndarray, tolerance: float, seek: bool) -> np.ndarray | None:
    """As `decode_frames`; None when the first decoded frame is already later than the first wanted."""
    av = import_extra("av")
    frames: np.ndarray | None = None
    found, last = 0, None
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError("holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if seek:
                container.seek(max(int((seconds[0] - tolerance) / stream.time_base), 0), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise VideoError("has a frame without a time")
                time = float(frame.pts * frame.time_base)
                if time < seconds[found] - tolerance:
                    last = time
                    continue
                if time > seconds[found] + tolerance:
                    if last is None:
                        return None
                    raise VideoError(f"has no frame at {seconds[found]:.3f} s, only at {last:.3f} and {time:.3f} s")
                if frame.is_corrupt:
                    raise VideoError(f"has a corrupt frame at {time:.3f} s")
                picture = frame.to_ndarray(format="rgb24")
                if frames is None:
                    frames = np.empty((len(seconds), *picture.shape), dtype=np.uint8)
                if picture.shape != frames.shape[1:]:
                    raise VideoError(f"changes its size at {time:.3f} s")
                frames[found] = picture
                found, last = found + 1, time
                if found == len(seconds):
                    return frames
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"cannot be decoded: {error.strerror or error}") from error
    end = "holds no frame from there on" if last is None else f"ends at {last:.3f} s"
    raise VideoError(f"{end}, a frame at {seconds[found]:.3f} s is wanted")


def _decode_torchcodec(path: Path, seconds: np.ndarray, tolerance: float) -> np.ndarray:
    decoders = import_extra("torchcodec.decoders")
    try:
        decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC")
        indices = np.rint(seconds * decoder.metadata.average_fps).astype(int)
        if indices[-1] >= len(decoder):
            raise VideoError(f"holds {len(decoder)} frames, number {indices[-1]} is wanted")
        batch = decoder.get_frames_at(indices=indices.tolist())
    except RuntimeError as error:
        raise VideoError(f"cannot be decoded: {error}") from error
    errors = np.abs(batch.pts_seconds.numpy() - seconds)
    if errors.max() > tolerance:
        worst = int(errors.argmax())
        raise VideoError(f"has no frame at {seconds[worst]:.3f} s, the nearest is at {batch.pts_seconds[worst]:.3f} s")
    return batch.data.numpy()
