"""The wire format: openpi's own code is the oracle, and bytes from outside do no harm whatever they are."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from worldvla_client.protocol import MAX_CONTAINER_ITEMS, ProtocolError, array_from_bytes, pack, unpack


@pytest.fixture(scope="module")
def openpi() -> ModuleType:
    """`msgpack_numpy` of openpi-client."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
    try:
        from openpi_client import msgpack_numpy
    finally:
        sys.path.pop(0)
    return msgpack_numpy


MESSAGES: list[Any] = [
    {"image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3), "prompt": "go", "state": np.ones(8, np.float32)},
    {"nested": [{"a": np.float64(1.5)}, [np.int64(-3), np.bool_(True)], None, b"bytes", 1.25]},
    {
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.array(3.0),
        "text": np.array(["a", "bc"]),
        "one": np.str_("x"),
    },
    {"transposed": np.arange(6).reshape(2, 3).T},
]


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("message", MESSAGES)
def test_openpi_reads_what_we_write_and_we_read_what_it_writes(openpi: ModuleType, message: Any) -> None:
    assert_same(openpi.unpackb(pack(message)), openpi.unpackb(openpi.packb(message)))
    assert_same(unpack(openpi.packb(message)), openpi.unpackb(openpi.packb(message)))
    assert_same(unpack(pack(message)), unpack(openpi.packb(message)))


def test_keys_may_be_strings_as_other_languages_send_them() -> None:
    data = msgpack.packb({"__ndarray__": True, "data": b"\1\2", "dtype": "|u1", "shape": [2]})
    np.testing.assert_array_equal(unpack(data), [1, 2])


@pytest.mark.parametrize("value", [np.array([object()]), np.array([1j]), np.zeros(1, [("a", "i4")]), np.complex64(1)])
def test_arrays_that_need_pickle_or_more_are_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        pack({"x": value})
    with pytest.raises(TypeError, match="not object"):
        pack({"x": object()})


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "reason"),
    [
        ("|O", [1], b"12345678", "dtype '|O'"),
        ("O", [1], b"12345678", "dtype 'O'"),
        ("<c8", [1], b"12345678", "dtype '<c8'"),
        ("<M8[s]", [1], b"12345678", "dtype"),
        ("i4,O", [1], b"12345678", "dtype"),
        ("V8", [1], b"12345678", "dtype"),
        ([["a", "<i8"]], [1], b"12345678", "dtype"),
        ("<U0", [10**12], b"", "dtype"),
        (None, [1], b"12345678", "dtype"),
        ("<f8", [2], b"12345678", "does not have 8 bytes"),
        ("<f8", [], b"", "does not have 0 bytes"),
        ("|u1", [2**40, 2**40], b"12345678", "does not have 8 bytes"),
        ("|u1", [0, 2**62, 2**62], b"", "no array has the shape"),
        ("|u1", [-1, -8], b"12345678", "not negative"),
        ("|u1", [8.0], b"12345678", "whole numbers"),
        ("|u1", [True] * 3, b"1", "whole numbers"),
        ("|u1", "8", b"12345678", "shape of an array is a list"),
        ("|u1", 8, b"12345678", "shape of an array is a list"),
        ("|u1", [1] * 9, b"1", "at most 8"),
        ("|u1", [8], "12345678", "are bytes, not str"),
        ("|u1", [8], None, "are bytes, not NoneType"),
    ],
)
def test_arrays_that_lie_are_refused(dtype: Any, shape: Any, data: Any, reason: str) -> None:
    message = {"x": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}}
    with pytest.raises(ProtocolError) as caught:
        unpack(msgpack.packb(message))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "value"), [("|O", 1), ("<i8", "three"), ("|u1", 300), ("<i8", None), ("<i8", [1, 2]), (None, 1)]
)
def test_scalars_that_lie_are_refused(dtype: Any, value: Any) -> None:
    with pytest.raises(ProtocolError, match="scalar"):
        unpack(msgpack.packb({b"__npgeneric__": True, b"data": value, b"dtype": dtype}))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x81", b"\x80\x80", b"\xa5ab", b"\xa1\xff", b"\xdd\xff\xff\xff\xff", b"\x91" * 5000 + b"\x80"],
)
def test_what_is_no_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="no msgpack map"):
        unpack(data)


@pytest.mark.parametrize("entry", [b"\x80", b"\x90", b"\x01"], ids=["maps", "lists", "numbers"])
def test_small_bytes_cannot_become_large_objects(entry: bytes) -> None:
    count = MAX_CONTAINER_ITEMS + 1
    with pytest.raises(ProtocolError, match="more than 10000 entries"):
        unpack(b"\xdd" + count.to_bytes(4, "big") + entry * count)


def test_arrays_from_outside_are_views_and_read_only() -> None:
    array = unpack(pack(np.arange(4)))
    assert array.base is not None and not array.flags.writeable


_DTYPES = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(),
    arrays.unsigned_integer_dtypes(),
    arrays.floating_dtypes(sizes=(16, 32, 64)),
    arrays.unicode_string_dtypes(min_len=1, max_len=5),
)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | arrays.arrays(_DTYPES, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES)
@settings(max_examples=50, deadline=None)
def test_every_message_survives_the_wire(value: Any) -> None:
    def same(left: Any, right: Any) -> bool:
        if isinstance(left, np.ndarray):
            return left.dtype == right.dtype and left.tobytes() == right.tobytes() and left.shape == right.shape
        if isinstance(left, dict):
            return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
        if isinstance(left, list):
            return len(left) == len(right) and all(map(same, left, right))
        return bool(left == right)

    assert same(value, unpack(pack(value)))


@given(st.binary(max_size=200))
@settings(max_examples=120, deadline=None)
@example(b"\xc7\x00\xff")
@example(b"\xd6\xff\x00\x00\x00\x00")  # a timestamp
@example(b"\x81\x90\x01")  # a list as a key
@example(b"\x81\xc7\x00\x01\x01")
def test_no_bytes_do_more_than_raise_a_protocol_error(data: bytes) -> None:
    try:
        unpack(data)
    except ProtocolError as error:
        assert "\n" not in str(error)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_no_damaged_message_does_more_than_raise_a_protocol_error(data: Any) -> None:
    whole = bytearray(pack(MESSAGES[data.draw(st.integers(0, len(MESSAGES) - 1))]))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not whole:
            break
    try:
        unpack(bytes(whole))
    except ProtocolError as error:
        assert "\n" not in str(error)


@given(
    st.one_of(st.sampled_from(["<f4", "|u1", "O", "<U3", "i4,i4", "f", ""]), st.none(), st.integers()),
    st.one_of(st.lists(st.integers(-2, 2**65), max_size=10), st.none(), st.text(max_size=3)),
    st.one_of(st.binary(max_size=40), st.none(), st.text(max_size=3)),
)
@settings(max_examples=80, deadline=None)
def test_an_array_is_what_it_says_or_nothing(dtype: Any, shape: Any, data: Any) -> None:
    try:
        array = array_from_bytes(data, dtype, shape)
    except ProtocolError:
        return
    assert array.shape == tuple(shape) and array.nbytes == len(data)
