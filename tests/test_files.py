"""Files are whole or absent, whatever interrupts."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError
from calib.base.files import (
    abandoned_temporaries,
    checksum,
    free_bytes,
    is_locked,
    locked,
    read_json,
    remove_abandoned,
    replacing,
    short_hash,
    take_room,
    write_json,
    write_text,
)

import pytest
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def test_until_it_is_whole_a_file_is_what_it_was(tmp_path: Path) -> None:
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
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
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


def test_what_a_living_writer_has_half_written_is_not_abandoned(tmp_path: Path) -> None:
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


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.txt.abc.tmp").write_text("half")
    (tmp_path / "kept.tmp").write_text("")
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
        remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {temporary, tmp_path / "kept.tmp"}
    assert (tmp_path / "file.txt").read_text() == "whole"


def test_a_lock_is_waited_for_and_that_is_said(tmp_path: Path) -> None:
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


def test_room_is_taken_or_refused(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        take_room(file, 5000)
        assert (tmp_path / "file").stat().st_size in (0, 5000), "taken where the system can"
        with pytest.raises(OSError) as error:
            take_room(file, 2 * free_bytes(tmp_path))
        assert error.value.errno == errno.ENOSPC
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@given(value=JSON)
def test_json_makes_the_round_trip(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_numbers_that_json_does_not_have_are_refused_and_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{} {}"])
def test_damaged_json_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(CalibError, match=r"value\.json.*not valid JSON"):
        read_json(path)
    with pytest.raises(CalibError, match=r"absent\.json.*no such file"):
        read_json(tmp_path / "absent.json")


@given(value=st.dictionaries(st.text(), st.integers() | st.text(), max_size=6))
def test_a_hash_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    backwards = dict(reversed(value.items()))
    assert short_hash(backwards) == short_hash(value) == short_hash(json.loads(json.dumps(value)))
    assert len(short_hash(value, digits=16)) == 16
    assert short_hash({**value, "one more": 0}) != short_hash(value) or "one more" in value


def test_a_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checksum(tmp_path / "abc") == f"sha256:{known}"
