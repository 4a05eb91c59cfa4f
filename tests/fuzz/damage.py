"""What may happen to a file on its way to us: bytes that changed, and JSON with one value that nobody expected."""

import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SPARE_MEMORY = 4 * 2**30  # address space that a call may take beyond what the process has
DEEP = json.loads("[" * 400 + "]" * 400)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([-(2**63), 2**31, 2**40, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "{0.__class__}", "{x:9999999999}", "nan", "\x00", "a" * 5000]),
)
values: st.SearchStrategy[Any] = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=5), scalars, max_size=3),
    st.just(DEEP),
)


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON document."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> Any:
    """The document with one value replaced, removed or added, or something else altogether."""
    copy = json.loads(json.dumps(document))
    found = list(places(copy))
    if not found or draw(st.integers(0, 30)) == 0:
        return draw(values)
    container, key = found[draw(st.integers(0, len(found) - 1))]
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if action == "replace":
        container[key] = draw(values)
    elif action == "remove":
        del container[key]
    elif isinstance(container, dict):
        container[draw(st.text(max_size=8))] = draw(values)
    else:
        container.append(draw(values))
    return copy


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes, head: int | None = None) -> bytes:
    """The bytes with some of them overwritten, inserted or missing, in the first `head` of them or anywhere."""
    last = min(len(data), head or len(data))
    start = draw(st.integers(0, last))
    junk = draw(st.binary(min_size=1, max_size=16))
    match draw(st.sampled_from(["overwrite", "overwrite", "insert", "cut", "end", "else"])):
        case "overwrite":
            return data[:start] + junk + data[start + len(junk) :]
        case "insert":
            return data[:start] + junk + data[start:]
        case "cut":
            return data[:start] + data[start + draw(st.integers(1, 64)) :]
        case "end":
            return data[:start]
        case _:
            return junk


def to_text(document: Any) -> str:
    """As Python writes JSON: NaN and infinity are written too, and readers meet them."""
    return json.dumps(document)


def fuzz(strategy: st.SearchStrategy[Any], claim: Callable[[Any], None], examples: int) -> None:
    """Check a claim on so many examples, the same ones every time."""
    run = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with limited_memory():
        run(given(strategy)(claim))()


@contextmanager
def limited_memory() -> Iterator[None]:
    """What asks for far more memory than the file can need gets a MemoryError, which no claim allows."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def written(path: Path, content: bytes | str) -> Iterator[None]:
    """The file with another content while the block runs."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    try:
        yield
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


def refused_or_read(
    read: Callable[[], object],
    names: Sequence[object],
    errors: tuple[type[Exception], ...] = (ValueError, OSError, ImportError),
) -> None:
    """`read` works, or raises one of these errors in one line that has one of the names."""
    try:
        read()
    except errors as error:
        assert type(error) is not UnicodeDecodeError, repr(error)
        assert any(str(name) in str(error) for name in names), f"no file is named: {error!r}"
        assert "\n" not in str(error).strip(), f"more than one line: {error!r}"
