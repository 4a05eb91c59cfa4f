"""OpenVLA's REST interface: JSON with numpy arrays as json-numpy writes them, one action back.

`POST /act` with `{"image": array, "instruction": str, "unnorm_key": str or null}`, or that as a string under the key
`encoded`; the answer is the action (D,) in the same encoding (`vla-scripts/deploy.py` of OpenVLA). Ours also takes
pictures as base64 PNG or JPEG, cameras under their own names, `"chunk": true` for all K actions and `"format": "list"`
for plain numbers. An error is an HTTP status and `{"error": one line}`, not the string "error" with status 200.
"""

import base64
import binascii
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from worldvla_client.protocol import MAX_CONTAINER_ITEMS, ProtocolError, array_from_bytes

from .observations import MAX_SIDE

_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
_FORMATS = ("json-numpy", "list")


@dataclass(frozen=True)
class ActCall:
    """One call of `/act`, its arrays read."""

    observation: dict[str, Any]
    embodiment: str | None
    chunk: bool
    as_list: bool
    encoded: bool


def read_act(body: bytes, cameras: Sequence[str]) -> ActCall:
    """Read the body of a call. `cameras` are the picture keys that the policy wants.

    Raises ProtocolError, one line, for anything that is no such call.
    """
    payload = _parse(body)
    encoded = isinstance(payload, dict) and set(payload) == {"encoded"}
    if encoded:
        if not isinstance(payload["encoded"], str):
            raise ProtocolError("encoded is a string of JSON")
        payload = _parse(payload["encoded"].encode())
    if not isinstance(payload, dict):
        raise ProtocolError("the body is a JSON object with a picture and an instruction")
    if len(cameras) == 1 and "image" in payload and cameras[0] not in payload:  # OpenVLA's name for the only picture
        payload[cameras[0]] = payload.pop("image")
    for camera in cameras:
        if isinstance(payload.get(camera), str):
            payload[camera] = _read_picture(camera, payload[camera])
    embodiment, chunk, answer_format = payload.pop("unnorm_key", None), payload.pop("chunk", False), "json-numpy"
    if embodiment is not None and not isinstance(embodiment, str):
        raise ProtocolError("unnorm_key is the name of an embodiment, or null")
    if not isinstance(chunk, bool):
        raise ProtocolError("chunk is true for all actions, or false for the first")
    if "format" in payload and (answer_format := payload.pop("format")) not in _FORMATS:
        raise ProtocolError(f"format is one of {', '.join(_FORMATS)}")
    return ActCall(payload, embodiment, chunk, answer_format == "list", encoded)


def write_actions(actions: np.ndarray, call: ActCall) -> str:
    """The JSON body that answers a call with actions (K, D)."""
    answer = actions if call.chunk else actions[0]
    text = json.dumps(answer.tolist() if call.as_list else encode_array(answer))
    return json.dumps(text) if call.encoded else text


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """An array as json-numpy writes it."""
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _parse(body: bytes) -> Any:
    # every entry of a list or object costs a comma or a bracket; arrays are base64, which has neither
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_CONTAINER_ITEMS:
        raise ProtocolError(f"the body has more than {MAX_CONTAINER_ITEMS} entries: send pictures as json-numpy or PNG")
    try:
        return json.loads(body, object_hook=_read_object)
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is no JSON: {' '.join(str(error).split())[:200]}") from error


def _read_object(values: dict[str, Any]) -> Any:
    if "__numpy__" not in values:
        return values
    shape = values.get("shape")
    return array_from_bytes(_decode_base64(values["__numpy__"]), values.get("dtype"), [] if shape is None else shape)


def _decode_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ProtocolError("the data of an array or picture are a string in base64") from error


def _read_picture(camera: str, text: str) -> Image.Image:
    """A picture file in base64, with or without `data:image/png;base64,` before it."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(_decode_base64(text)), formats=_PICTURE_FORMATS)
            if max(picture.size) > MAX_SIDE:  # before it is decompressed
                raise ProtocolError(f"{camera!r} is larger than {MAX_SIDE} pixels on a side: {picture.size}")
            picture.load()
    except ProtocolError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise ProtocolError(f"{camera!r} is no picture that can be read (PNG, JPEG or WebP in base64)") from error
    return picture
