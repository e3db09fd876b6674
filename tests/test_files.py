"""Files are whole or absent, whatever interrupts; errors about them are one line."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, ConfigError, check_format, first_line, in_a_line, lacks_or_garbles, reason_of
from calib.base.files import (
    abandoned_temporaries,
    checksum,
    free_bytes,
    read_json,
    remove_abandoned,
    replacing,
    short_hash,
    take_room,
    write_json,
    write_text,
)
from calib.base.locks import is_locked, locked

import pytest
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert temporary.parent == path.parent, "a rename within one folder is atomic"
        assert not path.exists()
    assert path.read_text() == "first"
    with replacing(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_while_writing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom calib.base.files import replacing\n"
        "with replacing(Path('file.txt')) as temporary:\n"
        "    temporary.write_text('half of the ne')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == -9
    assert path.read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["file.txt"]
    (half,) = abandoned_temporaries(tmp_path)
    assert half.read_text() == "half of the ne"


def test_living_writer(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom calib.base.files import replacing\n"
        "with replacing(Path('file.txt')) as temporary:\n"
        "    temporary.write_text('half of the ne')\n    print('written', flush=True)\n    sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"written\n"
    (half,) = tmp_path.glob(".*.tmp")
    assert is_locked(half)
    assert abandoned_temporaries(tmp_path) == []
    writer.communicate()
    assert writer.returncode == 0
    assert (tmp_path / "file.txt").read_text() == "half of the ne"
    assert list(tmp_path.iterdir()) == [tmp_path / "file.txt"]


def test_remove_abandoned(tmp_path: Path) -> None:
    (tmp_path / ".file.txt.abc.tmp").write_text("half")
    (tmp_path / "kept.tmp").write_text("")
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
        remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {temporary, tmp_path / "kept.tmp"}
    assert (tmp_path / "file.txt").read_text() == "whole"


def test_locked(tmp_path: Path) -> None:
    path, order = tmp_path / "new" / ".lock", []
    with locked(path, lambda: order.append("no wait")):
        waiting = threading.Thread(target=lambda: hold(path, order))
        waiting.start()
        while "waits" not in order:
            assert waiting.is_alive()
            time.sleep(0.001)
        order.append("first ends")
    waiting.join()
    assert order == ["waits", "first ends", "second has it"]


def hold(path: Path, order: list[str]) -> None:
    with locked(path, lambda: order.append("waits")):
        order.append("second has it")


def test_take_room(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        take_room(file, 5000)
        assert (tmp_path / "file").stat().st_size in (0, 5000), "taken where the system can"
        with pytest.raises(OSError) as error:
            take_room(file, 2 * free_bytes(tmp_path))
        assert error.value.errno == errno.ENOSPC
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@given(value=JSON)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{} {}"])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(CalibError, match=r"value\.json.*not valid JSON"):
        read_json(path)
    with pytest.raises(CalibError, match=r"absent\.json.*no such file"):
        read_json(tmp_path / "absent.json")


@given(value=st.dictionaries(st.text(), st.integers() | st.text(), max_size=6))
def test_short_hash(value: dict[str, Any]) -> None:
    backwards = dict(reversed(value.items()))
    assert short_hash(backwards) == short_hash(value) == short_hash(json.loads(json.dumps(value)))
    assert len(short_hash(value, digits=16)) == 16
    assert short_hash({**value, "one more": 0}) != short_hash(value) or "one more" in value


def test_checksum(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checksum(tmp_path / "abc") == f"sha256:{known}"


# Errors


def no_text(error: BaseException) -> str:
    raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("kind", "line"), [(CalibError, "Mute"), (OSError, "run: Mute"), (ValueError, "Mute:")], ids=["calib", "os", "any"]
)
def test_an_error_without_a_text(kind: type[Exception], line: str) -> None:
    """Its class says what it is, where its own ``__str__`` fails."""
    error = type("Mute", (kind,), {"__str__": no_text})()
    assert in_a_line(error, "run") == line
    assert reason_of(error) == first_line(error) == "Mute"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CalibError("runs/a: is empty"), "runs/a: is empty"),
        (ConfigError("seed=x: must be an integer"), "seed=x: must be an integer"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "run: No space left on device"),
        (OSError("HDF5 cannot\nwrite"), "run: HDF5 cannot write"),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines"),
    ],
    ids=str,
)
def test_in_a_line(error: BaseException, line: str) -> None:
    assert in_a_line(error, "run") == line


def test_reason_of() -> None:
    assert reason_of(ValueError("two\n  lines")) == "two lines"
    assert reason_of(EOFError()) == "EOFError"


def test_lacks_or_garbles() -> None:
    error = lacks_or_garbles("plan.json", KeyError("bits"), "calib analyze writes it", part="layer 'x'")
    assert str(error) == "plan.json: layer 'x' lacks or garbles 'bits'; calib analyze writes it"


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ({"format": "calib-x", "format_version": 2}, None),
        ({"format": "calib-x", "format_version": 3}, "f: has format version 3, this calib reads 1 and 2; do it again"),
        ({"format": "calib-x"}, "f: has format version None, this calib reads 1 and 2; do it again"),
        ({"format": "calib-y", "format_version": 2}, "f: not a calib-x file; do it again"),
        ([], "f: not a calib-x file; do it again"),
    ],
    ids=str,
)
def test_check_format(document: object, line: str | None) -> None:
    if line is None:
        check_format("f", document, "calib-x", (1, 2), "do it again")
        return
    with pytest.raises(CalibError) as error:
        check_format("f", document, "calib-x", (1, 2), "do it again")
    assert str(error.value) == line
