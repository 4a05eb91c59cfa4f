"""OpenVLA's REST body: json-numpy is the oracle, and no body does harm."""

import base64
import io
import json
from typing import Any

import json_numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from transformers_worldvla.serving.rest import ActCall, encode_array, read_act, write_actions
from worldvla_client.protocol import ProtocolError

PICTURE = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


def png(size: tuple[int, int] = (4, 5), file_format: str = "PNG") -> str:
    stream = io.BytesIO()
    picture = Image.fromarray(PICTURE) if size == (4, 5) else Image.new("L", size)
    picture.save(stream, file_format)
    return base64.b64encode(stream.getvalue()).decode()


def test_what_json_numpy_writes_is_read() -> None:
    body = json_numpy.dumps({"image": PICTURE, "instruction": "go", "unnorm_key": "libero"})
    call = read_act(body.encode(), ["image"])
    np.testing.assert_array_equal(call.observation["image"], PICTURE)
    assert call.observation["instruction"] == "go"
    assert (call.embodiment, call.chunk, call.as_list, call.encoded) == ("libero", False, False, False)


def test_a_body_may_be_encoded_twice_as_openvlas_clients_without_a_patched_json_do() -> None:
    inner = json_numpy.dumps({"image": PICTURE, "instruction": "go"})
    call = read_act(json.dumps({"encoded": inner}).encode(), ["image"])
    np.testing.assert_array_equal(call.observation["image"], PICTURE)
    actions = np.linspace(0, 1, 14).reshape(2, 7)
    np.testing.assert_array_equal(json_numpy.loads(json.loads(write_actions(actions, call))), actions[0])


@pytest.mark.parametrize("array", [PICTURE, np.float64(2.5), np.arange(6.0).reshape(2, 3).T, np.zeros((0, 2))])
def test_json_numpy_reads_what_we_write(array: Any) -> None:
    read = json_numpy.loads(json.dumps(encode_array(np.asarray(array))))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.asarray(array).dtype


def test_image_is_the_only_camera_whatever_its_name() -> None:
    body = json_numpy.dumps({"image": PICTURE, "instruction": "go"}).encode()
    np.testing.assert_array_equal(read_act(body, ["front"]).observation["front"], PICTURE)
    assert "front" not in read_act(body, ["front", "wrist"]).observation


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_pictures_may_be_files_in_base64(prefix: str) -> None:
    call = read_act(json.dumps({"image": prefix + png(), "instruction": "go"}).encode(), ["image"])
    np.testing.assert_array_equal(np.asarray(call.observation["image"]), PICTURE)


def test_the_answer_is_one_action_a_chunk_or_plain_numbers() -> None:
    actions = np.linspace(0, 1, 14).reshape(2, 7)

    def answer(**options: Any) -> Any:
        body = json.dumps({"image": png(), "instruction": "go", **options}).encode()
        return json_numpy.loads(write_actions(actions, read_act(body, ["image"])))

    np.testing.assert_array_equal(answer(), actions[0])
    np.testing.assert_array_equal(answer(chunk=True), actions)
    assert answer(format="list") == actions[0].tolist()
    assert answer(format="list", chunk=True) == actions.tolist()


BODIES = [
    (b"", "no JSON"),
    (b"\xff\xfe\xfd", "no JSON"),
    (b"{", "no JSON"),
    (b"[" * 3000, "no JSON"),
    (b"[" * 50_000, "more than 10000 entries"),
    (b"[" + b"0," * 20_000 + b"0]", "more than 10000 entries"),
    (b"1" * 10_000, "no JSON"),
    (b"[1]", "is a JSON object"),
    (b'"text"', "is a JSON object"),
    (b'{"encoded": 3}', "encoded is a string"),
    (b'{"encoded": "["}', "no JSON"),
    (b'{"image": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}}', "dtype '|O'"),
    (b'{"image": {"__numpy__": "AAAA", "dtype": [["a", "|O"]], "shape": [1]}}', "dtype"),
    (b'{"image": {"__numpy__": "AAAA", "dtype": "|u1", "shape": [4]}}', "does not have 3 bytes"),
    (b'{"image": {"__numpy__": "A*AA", "dtype": "|u1", "shape": [3]}}', "base64"),
    (b'{"image": {"__numpy__": 3, "dtype": "|u1", "shape": [3]}}', "base64"),
    (b'{"image": {"__numpy__": "AAAA"}}', "dtype"),
    (b'{"image": "AAAA"}', "'image' is no picture that can be read"),
    (b'{"image": "???"}', "base64"),
    (json.dumps({"image": png((5000, 1))}).encode(), "larger than 4096 pixels"),
    (json.dumps({"image": png((3, 3), "GIF")}).encode(), "is no picture"),
    (json.dumps({"image": png()[:60] + "AA" + png()[62:]}).encode(), "is no picture"),
    (b'{"unnorm_key": ["libero"]}', "unnorm_key is the name"),
    (b'{"chunk": 1}', "chunk is true"),
    (b'{"format": "numpy"}', "format is one of"),
    (b'{"format": {}}', "format is one of"),
]


@pytest.mark.parametrize(("body", "reason"), BODIES, ids=range(len(BODIES)))
def test_what_is_no_call_is_refused_in_one_line(body: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        read_act(body, ["image"])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image", "__numpy__", "dtype", "shape", "encoded", "chunk", "format", "unnorm_key"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(_JSON)
@settings(max_examples=120, deadline=None)
def test_no_json_does_more_than_raise_a_protocol_error(value: Any) -> None:
    try:
        call = read_act(json.dumps(value).encode(), ["image"])
    except ProtocolError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(call, ActCall) and isinstance(call.observation, dict)


@given(st.binary(max_size=300))
@settings(max_examples=80, deadline=None)
def test_no_bytes_do_more_than_raise_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_act(body, ["image"])


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_no_damaged_body_does_more_than_raise_a_protocol_error(data: Any) -> None:
    whole = bytearray(json.dumps({"image": png(), "state": encode_array(PICTURE), "instruction": "go"}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        read_act(bytes(whole), ["image"])
    except ProtocolError as error:
        assert "\n" not in str(error)
