"""JSON of the shapes that people have: lists, objects keyed by id, captions in lists within; and Parquet."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from calib.base.errors import ConfigError
from calib.dataset.prompts import from_file

import pytest
from helpers import check_config_error, environment

BY_ID = {"b": {"prompt": "a cat", "style": "oil"}, "a": {"prompt": "an owl", "style": "ink"}}
COCO = {
    "info": {"description": "captions", "year": 2017},
    "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}],
    "annotations": [{"image_id": 7, "caption": "a cat"}, {"image_id": 7, "caption": "an owl"}],
}
SEVERAL = [{"id": 7, "captions": ["a cat", "an owl"]}, {"id": 8, "captions": []}, {"id": 9, "captions": ["a cat"]}]
SENTENCES = {
    "dataset": "coco",
    "images": [{"id": 7, "sentences": [{"raw": "a cat", "n": 1}, {"raw": "an owl"}]}, {"id": 8, "sentences": []}],
}
TWO_PLACES = {"train": [{"caption": "a cat"}], "test": [{"caption": "an owl"}]}

READ: list[tuple[Any, str, list[str]]] = [
    (BY_ID, "prompt", ["a cat", "an owl"]),
    (BY_ID, "style", ["oil", "ink"]),
    (BY_ID, "a.prompt", ["an owl"]),
    ({"b": "a cat", "a": "an owl"}, "prompt", ["a cat", "an owl"]),
    ({"b": "a cat", "a": "an owl"}, "a", ["an owl"]),
    ({"b": ["a cat", "an owl"], "a": ["a cat"]}, "prompt", ["a cat", "an owl", "a cat"]),
    ({"set": "x", "n": 2, "data": BY_ID}, "prompt", ["a cat", "an owl"]),
    ({"set": "x", "n": 2, "data": BY_ID}, "data.style", ["oil", "ink"]),
    ({"set": "x", "prompts": {"b": "a cat", "a": "an owl"}}, "prompt", ["a cat", "an owl"]),
    ({"prompt": "a cat", "set": "x"}, "prompt", ["a cat"]),
    (COCO, "caption", ["a cat", "an owl"]),
    (COCO, "annotations.caption", ["a cat", "an owl"]),
    (COCO, "file_name", ["7.jpg", "8.jpg"]),
    ({"b": COCO, "a": COCO}, "caption", ["a cat", "an owl"] * 2),
    (SEVERAL, "captions", ["a cat", "an owl", "a cat"]),
    ({"images": SEVERAL, "licenses": [{"name": "x"}]}, "captions", ["a cat", "an owl", "a cat"]),
    ({"images": SEVERAL, "licenses": [{"name": "x"}]}, "images.captions", ["a cat", "an owl", "a cat"]),
    (SENTENCES, "raw", ["a cat", "an owl"]),
    (SENTENCES, "sentences.raw", ["a cat", "an owl"]),
    (SENTENCES, "images.sentences.raw", ["a cat", "an owl"]),
    (SENTENCES["images"], "raw", ["a cat", "an owl"]),
    ([{"id": 7, "picture": {"caption": "a cat"}}], "caption", ["a cat"]),
    ([{"id": 7, "regions": {"r": {"caption": "a cat"}, "q": {"caption": "an owl"}}}], "caption", ["a cat", "an owl"]),
    (TWO_PLACES, "test.caption", ["an owl"]),
    ([["a cat", "an owl"], "a cat"], "prompt", ["a cat", "an owl", "a cat"]),
    ([{"a.b": {"c.d": "a cat"}}], "a.b.c.d", ["a cat"]),
]


#: Lists, and objects keyed by id, may have a line for each of their entries.
OF_LINES = [
    ([{key: value} for key, value in document.items()] if isinstance(document, dict) else document, column, prompts)
    for document, column, prompts in READ
    if isinstance(document, list) or (document.keys() == {"b", "a"} and not column.startswith("a"))
]


@pytest.mark.parametrize(("document", "column", "prompts"), READ)
def test_prompts_of_a_document_are_found(tmp_path: Path, document: Any, column: str, prompts: list[str]) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    assert from_file(str(path), column) == prompts


@pytest.mark.parametrize(("values", "column", "prompts"), OF_LINES)
def test_prompts_of_lines_are_found(tmp_path: Path, values: list[Any], column: str, prompts: list[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    assert from_file(str(path), column) == prompts


NOT_READ: list[tuple[Any, str, str]] = [
    (BY_ID, "promt", "text under 'prompt', 'style'. Did you mean 'prompt'?"),
    (COCO, "prompt", "text under 'info.description', 'images.file_name', 'annotations.caption'. Name one"),
    (COCO, "annotations", "item 1, has text under 'annotations.caption'. Did you mean 'annotations.caption'?"),
    (COCO, "images.caption", "item 1, has text under 'images.file_name'"),
    (SEVERAL, "caption", "item 1, has text under 'captions'. Did you mean 'captions'?"),
    (SENTENCES, "sentences", "item 1, has text under 'images.sentences.raw'"),
    (SENTENCES["images"], "sentences", "item 1, has text under 'sentences.raw'"),
    (TWO_PLACES, "caption", "in several places: 'train.caption', 'test.caption'. Did you mean 'test.caption' or"),
    ([{"id": 1, "a": [{"caption": "x"}], "b": [{"caption": "y"}]}], "caption", "several places: 'a.caption', 'b.cap"),
    ({"set": 2, "data": {"prompt": "a cat"}}, "prompt", "text under 'data.prompt'. Did you mean 'data.prompt'?"),
    ([{"prompt": {"en": "a cat", "de": "eine Katze"}}], "prompt", "item 1, has text under 'prompt.en', 'prompt.de'"),
    ({"texts": ["a cat"], "n": 1}, "prompt", "text under 'texts'. Name one"),
    ({"b": "a cat", "a": "an owl"}, "text", "text under 'b', 'a'. Name one"),
    # Some that have it must not stand for all
    ({"b": {"prompt": "a cat"}, "a": {"text": "an owl"}}, "prompt", "text under 'b.prompt', 'a.text'"),
    ({"b": {"prompt": "a cat"}, "a": "an owl"}, "prompt", "text under 'b.prompt', 'a'"),
    ([{"prompt": "a cat", "style": "oil"}, {"text": "an owl", "style": "ink"}], "prompt", "item 2, has text under 'st"),
    ([{"s": [{"raw": "a cat"}], "t": "x"}, {"t": "y"}], "raw", "item 2, has text under 't'"),
]


@pytest.mark.parametrize(("document", "column", "said"), NOT_READ)
def test_the_advice_works(tmp_path: Path, document: Any, column: str, said: str) -> None:
    """Every name in the message is one under which prompts are found."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        from_file(str(path), column)
    message = str(error.value)
    assert message.startswith(f"prompts.column={column}: {path}")
    assert said in message
    assert len(message.splitlines()) == 1
    for name in re.findall(r"'([^']+)'", message):
        assert from_file(str(path), name)


@pytest.mark.parametrize(
    "document",
    [{}, [{}], {"n": 1}, [{"prompt": "a cat"}, {"text": "an owl"}], [{"s": [{"raw": "a cat"}]}, {"n": 3}, {"n": 4}]],
)
def test_where_no_name_would_do_none_is_given(tmp_path: Path, document: Any) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    check_config_error(lambda: from_file(str(path), "prompt"), ["prompts.column=prompt: ", "no text", "mend the file"])


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"  # as if it were not installed
        "from calib.dataset.prompts import from_file\n"
        "try: from_file('a.parquet')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout.startswith("ConfigError prompts.path=a.parquet: Parquet needs the package pyarrow")
    assert len(done.stdout.splitlines()) == 1


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    columns = {
        "id": [1, 2, 3],
        "prompt": ["a cat", None, "an owl"],
        "captions": [["a cat", "an owl"], [], ["a cat"]],
        "picture": [{"caption": "a cat", "size": 3}] * 3,
        "style": arrow.array(["oil", "ink", "oil"]).dictionary_encode(),
        "bytes": [b"a cat"] * 3,
    }
    parquet.write_table(arrow.table(columns), path)
    assert from_file(path) == ["a cat", "an owl"]
    assert from_file(path, "captions") == ["a cat", "an owl", "a cat"]
    assert from_file(path, "picture.caption") == ["a cat"] * 3
    assert from_file(path, "style") == ["oil", "ink", "oil"]
    names = "'prompt', 'captions', 'picture.caption', 'style'"
    check_config_error(lambda: from_file(path, "caption"), [f"columns {names}. Did you mean 'captions'"])
    check_config_error(lambda: from_file(path, "picture"), ["row 1, has text under 'picture.caption'"])
    check_config_error(lambda: from_file(path, "id"), ["row 1 is a number"])
    check_config_error(lambda: from_file(path, "bytes"), ["row 1 is bytes"])
    content = Path(path).read_bytes()
    for damaged in (b"", content[:-9], content[:4] + bytes(200) + content[204:]):
        Path(path).write_bytes(damaged)
        check_config_error(lambda: from_file(path), [f"prompts.path={path}: is not readable Parquet"])
    parquet.write_table(arrow.table({"prompt": ["x" * 1_000_000] * 300}), path)  # 300 MB in some kB
    check_config_error(lambda: from_file(path), ["holds more than 268 MB"])
