"""Prompts: files in every format and encoding, sources that stay the same, and what is reported of them."""

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from calib.base.progress import note
from calib.dataset.prompt_rows import MOST_BYTES
from calib.dataset.prompts import PER_TEMPLATE, TEMPLATES, builtin, emoji, from_file, report_duplicates

import pytest
from helpers import check_config_error, environment, everything, is_one_clear_line, run_in
from hypothesis import example, given
from hypothesis import strategies as st

#: Any text a file can hold: all of Unicode but NUL and lone surrogates.
ANY = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
TEXTS = st.lists(ANY, min_size=1, max_size=8)
NAMES = ("id", "prompt", "the note")
HARD = [
    'a sign, "OPEN", at night',
    "two\nlines",
    "Süße Äpfel",
    "日本の猫",
    "قطة حمراء",
    "👩‍🚀🚀",
    "a\u2028b\x85c\x0bd",
    "\ufeffx",
    "-1",
]


def normal(text: str) -> str:
    """A prompt as it is documented: without white space at its ends, line breaks with what surrounds them a space."""
    lines = [line.strip() for line in re.split("[\r\n]", text.strip())]
    if len(lines) == 1:
        return lines[0]
    return " ".join(line for line in lines if line)


def as_csv(texts: list[str], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
    writer.writerow(NAMES)
    writer.writerows((i, text, texts[-1 - i]) for i, text in enumerate(texts))
    return file.getvalue()


def as_tsv(texts: list[str]) -> str:
    return as_csv(texts, "\t")


def as_quoted_csv(texts: list[str]) -> str:
    return as_csv(texts, quoting=csv.QUOTE_ALL)


def as_objects(texts: list[str]) -> str:
    return json.dumps([{"id": i, "prompt": text} for i, text in enumerate(texts)], indent=1)


def as_list(texts: list[str]) -> str:
    return json.dumps(texts, ensure_ascii=False)


def as_object_of_prompts(texts: list[str]) -> str:
    return json.dumps({"version": 1, "prompts": texts})


def as_object_of_the_column(texts: list[str]) -> str:
    return json.dumps({"prompts": 3, "prompt": [{"prompt": text} for text in texts]})


def as_jsonl(texts: list[str]) -> str:
    values = [text if i % 2 else {"prompt": text, "id": i} for i, text in enumerate(texts)]
    return "".join(json.dumps(value, ensure_ascii=i % 3 > 0) + "\n" for i, value in enumerate(values))


WRITERS: list[tuple[str, Callable[[list[str]], str]]] = [
    (".csv", as_csv),
    (".CSV", as_quoted_csv),
    (".tsv", as_tsv),
    (".json", as_objects),
    (".json", as_list),
    (".json", as_object_of_prompts),
    (".Json", as_object_of_the_column),
    (".jsonl", as_jsonl),
]
WRITER_IDS = [write.__name__ for _, write in WRITERS]


def written(folder: Path, name: str, content: str | bytes) -> str:
    """The path of a new file with this content, byte for byte."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# What is written is read


@pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=WRITER_IDS)
@given(texts=TEXTS)
@example(texts=HARD)
def test_any_texts_come_back(suffix: str, write: Callable[[list[str]], str], texts: list[str]) -> None:
    expected = [normal(text) for text in texts if normal(text)]
    content = write(texts).encode()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (
            (f"prompts{suffix}", content),
            (f"packed{suffix}.gz", gzip.compress(content, 1)),
            (f"unpacked{suffix}.GZ", content),  # as browsers save it
            (f"renamed{suffix}", gzip.compress(content, 1)),
        ):
            path = written(Path(folder), name, data)
            if expected:
                assert from_file(path) == expected
            else:
                check_config_error(lambda path=path: from_file(path), ["prompts.path=", "holds no prompts"])  # type: ignore[misc]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.TXT", "prompts"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@given(texts=TEXTS)
@example(texts=HARD)
def test_the_lines_of_a_text_file_come_back(name: str, newline: str, texts: list[str]) -> None:
    lines = [*(re.sub("[\r\n]", "", text) for text in texts), "last"]
    # A byte order mark at the very start belongs to the encoding.
    expected = [line.strip() for line in [lines[0].removeprefix("\ufeff"), *lines[1:]] if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        assert from_file(written(Path(folder), name, newline.join(lines))) == expected
        assert from_file(written(Path(folder), name, newline.join([*lines, ""]))) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("suffix", "write"), [*WRITERS, (".txt", "\n".join)], ids=[*WRITER_IDS, "as_txt"])
def test_encodings_and_line_ends_do_not_matter(
    tmp_path: Path, suffix: str, write: Callable[[list[str]], str], newline: str, encoding: str
) -> None:
    texts = ["Süße Äpfel", "قطة حمراء", "🚀, launch", "a cat"]
    content = re.sub("\r\n|\n", newline, write(texts))
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    assert from_file(written(tmp_path, f"prompts{suffix}", (mark + content).encode(encoding))) == texts


def test_white_space_is_as_documented(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'id, prompt \n1, "\t  two \r\n\n  lines  kept \u3000"\n2,\u00a0a  b\n3,"x\ry"\n')
    assert from_file(path) == ["two lines  kept", "a  b", "x y"]


def test_a_column_is_chosen_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "id,Caption in English,prompt\n1,a cat,une chatte\n2,an owl,un hibou\n")
    assert from_file(path, column="Caption in English") == ["a cat", "an owl"]
    assert from_file(path) == ["une chatte", "un hibou"]
    path = written(tmp_path, "a.jsonl", '{"text": "a cat", "prompt": 3}\n"an owl"\n')
    assert from_file(path, column="text") == ["a cat", "an owl"]


def test_a_prompt_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    long = "a very, very long prompt " * 20_000
    for suffix, write in WRITERS:
        assert from_file(written(tmp_path, f"a{suffix}", write([long, "b"]))) == [long.strip(), "b"]


# What cannot be read

PATH = "prompts.path="
COLUMN = "prompts.column="

BAD: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("a.txt", b"a cat\nS\xfc\xdfe \xc4pfel\n", (PATH, "0xfc in line 2", "save it as UTF-8")),
    ("a.csv", "prompt\nSüße Äpfel\n".encode("latin-1"), (PATH, "0xfc in line 2", "save it as UTF-8")),
    ("a.txt", b"\xff\xfea", (PATH, "UTF-16", "save it as UTF-8")),
    ("a.txt", "a cat\nan owl".encode("utf-16-le"), (PATH, "NUL", "line 1", "save it as UTF-8")),
    ("a.csv", "prompt\na cat\nan\0owl\n", (PATH, "NUL", "line 3")),
    ("a.jsonl", '"a"\n"b\\u0000"\n', (PATH, "NUL", "line 2")),
    ("a.json", '["a", "\\ud83d"]', (PATH, "surrogate", "item 2")),
    ("a.txt", "", (PATH, "holds no prompts")),
    ("a.csv", "", (PATH, "holds no prompts")),
    ("a.csv", "prompt\n", (PATH, "holds no prompts")),
    ("a.csv", 'id,prompt\n1,\n2," "\n', (PATH, "holds no prompts")),
    ("a.json", " \n", (PATH, "holds no prompts")),
    ("a.json", "[]", (PATH, "holds no prompts")),
    ("a.jsonl", "\n\n", (PATH, "holds no prompts")),
    ("a.xlsx", "a cat", (PATH, ".xlsx", ".txt", ".csv", ".tsv", ".json", ".jsonl")),
    (
        "a.csv",
        "id,Prompt,x\n1,a cat,y\n",
        (f"{COLUMN}prompt: ", "columns 'id', 'Prompt', 'x'", "Did you mean 'Prompt'"),
    ),
    ("a.csv", "id,text\n1,a cat\n", (f"{COLUMN}prompt: ", "columns 'id', 'text'", "prompts.column=COLUMN")),
    (
        "a.csv",
        "a red fox\nan owl\n",
        (f"{COLUMN}prompt: ", "column 'a red fox'", "first line", "prompts.column=COLUMN"),
    ),
    ("a.csv", "id|prompt\n1|a cat\n", (f"{COLUMN}prompt: ", "column 'id|prompt'")),
    ("a.csv", "prompt,prompt\na,b\n", (f"{COLUMN}prompt: ", "2 columns")),
    ("a.csv", '"two\nlines\u2028here"\nx\n', (COLUMN, "'two lines\\u2028here'")),
    ("a.csv", "id,prompt\n1,a cat\n2,a cat, asleep\n", (PATH, "line 3 has 3 cells, the header has 2", "comma")),
    ("a.csv", 'id,prompt\n1,"a\ncat"\n2\n', (PATH, "line 4 has 1 cell,")),
    ("a.tsv", "id\tprompt\n1\ta\tcat\n", (PATH, "line 2 has 3 cells", "tab")),
    ("a.csv", 'id,prompt\n1,"an owl, asleep\n', (PATH, "line 2 has 3 cells", "quote a cell that contains a comma")),
    ("a.json", '["a",\n "b"\n "c"]', (PATH, "line 3 is not JSON")),
    ("a.json", '"a"\n"b"\n', (PATH, "line 2 is not JSON", ".jsonl")),
    ("a.jsonl", '"a"\n\n{"prompt": b}\n', (PATH, "line 3 is not JSON")),
    ("a.json", '"a cat"', (PATH, "list")),
    ("a.json", "[" * 100_000, (PATH, "nested too deep")),
    ("a.jsonl", "9" * 10_000, (PATH, "number too long")),
    ("a.json", '["a", 3]', (PATH, "item 2 is a number")),
    ("a.json", '["a", null]', (PATH, "item 2 is null")),
    ("a.jsonl", '"a"\ntrue\n', (PATH, "line 2 is true or false")),
    ("a.jsonl", '{"prompt": [["a"]]}\n', (PATH, "line 1 is a list")),
    ("a.json", '{"a": ' * 30 + "1" + "}" * 30, (f"{COLUMN}prompt: ", "no text")),
    ("a.json", '{"a": ' * 900 + "1" + "}" * 900, (PATH, "nested too deep")),
    ("a.json", '{"a": [' * 450 + "1" + "]}" * 450, (PATH, "nested too deep")),
    ("a.json.gz", b"\x1f\x8b\x08\x00", (PATH, "is damaged")),
    ("a.csv.gz", b"\x1f\x8bprompt", (PATH, "is damaged")),
    ("a.tsv.gz", gzip.compress(b"prompt\na cat\n" * 9)[:-9], (PATH, "is damaged")),
    ("a.txt.gz", gzip.compress(b"a cat\n")[:-5] + b"\0\0\0\0\0", (PATH, "is damaged")),
    ("a.txt.gz", gzip.compress(b"S\xfc\xdfe"), (PATH, "0xfc in line 1", "save it as UTF-8")),
    ("a.txt.gz", gzip.compress(bytes(1 << 20)) * (MOST_BYTES // (1 << 20) + 1), (PATH, "more than 268 MB")),
    ("a.xlsx.gz", "a cat", (PATH, ".xlsx files are not read")),
    ("a.gz.gz", "a cat", (PATH, ".gz files are not read")),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD, ids=[f"{name}-{words[1]}" for name, _, words in BAD])
def test_what_cannot_be_read_is_one_clear_line(
    tmp_path: Path, name: str, content: str | bytes, words: tuple[str, ...]
) -> None:
    path = written(tmp_path, name, content)
    check_config_error(lambda: from_file(path), [str(tmp_path / name), *words])
    with pytest.raises(Exception) as error:
        from_file(path)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_no_file_is_one_clear_line(tmp_path: Path) -> None:
    check_config_error(from_file, ["prompts.path is not set", "prompts.path=FILE"])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.csv").mkdir()
    for path, words in {
        str(tmp_path): ["cannot be read", "folder"],
        str(tmp_path / "folder.csv"): ["cannot be read", "folder"],
        str(tmp_path / "none.csv"): ["cannot be read (No such file or directory)"],
        str(tmp_path / "pipe"): ["cannot be read twice"],
        "~no-such-user/prompts.txt": ["cannot be read"],
        "a\0b": ["cannot be read"],
        "x" * 5000: ["cannot be read (File name too long)"],
    }.items():
        check_config_error(lambda path=path: from_file(path), [f"prompts.path={path}: ", *words])  # type: ignore[misc]


def test_a_file_without_permission_is_one_clear_line(tmp_path: Path) -> None:
    """As a user without special rights; root may read anything, so the process gives its rights up first."""
    tmp_path.chmod(0o755)
    Path(written(tmp_path, "secret.txt", "a cat")).chmod(0)
    code = (
        "import os; from calib.dataset.prompts import from_file\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: from_file('secret.txt')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout.startswith("ConfigError prompts.path=secret.txt: cannot be read (Permission denied); name ")
    assert len(done.stdout.splitlines()) == 1


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "id,text\n1,a cat\n")
    check_config_error(lambda: from_file(path, column="text"), ["prompts.column=text: ", "a.txt has no columns"])


# The sources that come with calib


@pytest.mark.parametrize("source", [builtin, emoji])
def test_a_source_is_the_same_in_another_process(source: Callable[[int], list[str]]) -> None:
    code = f"import json; from calib.dataset.prompts import {source.__name__} as f; print(json.dumps([f(0), f(7)]))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == [source(0), source(7)]


@pytest.mark.parametrize("source", [builtin, emoji])
def test_a_source_has_a_thousand_distinct_prompts_and_its_seed_orders_them(source: Callable[[int], list[str]]) -> None:
    first, second = source(0), source(1)
    assert len(set(first)) == len(first) >= 1000
    assert first[:20] != second[:20]
    assert all(prompt == normal(prompt) for prompt in first)


def test_another_seed_of_emoji_has_the_same_names() -> None:
    assert sorted(emoji(0)) == sorted(emoji(1))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_builtin_is_varied_from_the_first_prompt_on(seed: int) -> None:
    prompts = builtin(seed)
    assert len(prompts) == PER_TEMPLATE * len(TEMPLATES)
    assert not [prompt for prompt in prompts if set(prompt) & set("{}")]
    for start in (0, 140, 1386):
        some = prompts[start : start + len(TEMPLATES)]
        lengths = [len(prompt.split()) for prompt in some]
        # CLIP reads 75 tokens, and most of these words are one.
        assert min(lengths) <= 4
        assert 25 <= max(lengths) <= 45
        assert len({prompt.split()[-1] for prompt in some}) >= 7
        assert sum("portrait of" in prompt for prompt in some) == 1
        assert sum("that says" in prompt for prompt in some) == 1
        assert sum("abstract" in prompt for prompt in some) == 1
    stride = prompts[:: len(TEMPLATES)]
    assert 0 < sum("portrait of" in prompt for prompt in stride) < len(stride) / 3


# What is reported


def test_a_note_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    note("test: ä note")
    note("test: ä note")
    note("test: another")
    assert capsys.readouterr() == ("", "calib: note: test: ä note\ncalib: note: test: another\n")


def test_duplicates_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report_duplicates(["cat", "dog", "Cat"])
    assert capsys.readouterr().err == ""
    report_duplicates(["cat", "dog", "cat", "dog", "cat"])
    assert capsys.readouterr().err == (
        "calib: note: prompts: 3 of 5 repeat an earlier one, e.g. 'cat' (3 times);"
        " they are kept, each is drawn with a seed of its own\n"
    )
    report_duplicates(["x\n" * 100, "x\n" * 100])
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 2 repeats" in line
    assert len(line) < 200


def test_no_source_that_comes_with_calib_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for source in (builtin, emoji):
        report_duplicates(source(3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("one.txt", "a\n\nb\n", "1 empty prompt is left out (line 2)"),
        ("many.txt", "\n\na\n \n\n\u3000\n\nb", "6 empty prompts are left out (lines 1, 2, 4, 5, 6, …)"),
        ("a.csv", 'id,prompt\n1,"a\nb"\n2,\n\n4,"\n"\n', "3 empty prompts are left out (lines 4, 5, 6)"),
        ("a.jsonl", '"a"\n\n{"prompt": " "}\n', "2 empty prompts are left out (lines 2, 3)"),
        ("a.json", '["a", "", {"prompt": ""}]', "2 empty prompts are left out (items 2, 3)"),
        ("clean.txt", "a\nb\n", None),
        ("clean.csv", "prompt\r\na\r\n", None),
    ],
)
def test_empty_prompts_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str | None
) -> None:
    path = written(tmp_path, name, content)
    from_file(path)
    assert capsys.readouterr().err == (f"calib: note: prompts.path={path}: {said}\n" if said else "")


def test_a_job_draws_the_prompts_of_a_file_and_reports_once(tmp_path: Path) -> None:
    content = 'id,caption\r\n1,"a ""red"" fox,\r\nasleep 🦊"\r\n2,\r\n3,an owl\r\n4,an owl\r\n'
    written(tmp_path, "table.csv", b"\xef\xbb\xbf" + content.encode())
    cheap = ("num_images=1", "sampler.num_steps=1", "data_dir=dataset")
    arguments = ("generate", *cheap, "prompts=file", "prompts.path=table.csv", "prompts.column=caption")
    outcome = run_in(tmp_path, *arguments, "report=none")
    assert outcome.status == 0, outcome.err
    notes = [line for line in outcome.err.splitlines() if "empty" in line or "repeat" in line]
    assert notes == [
        "calib: note: prompts.path=table.csv: 1 empty prompt is left out (line 4)",
        "calib: note: prompts: 1 of 3 repeats an earlier one, e.g. 'an owl' (2 times);"
        " they are kept, each is drawn with a seed of its own",
    ]
    manifest = json.loads((tmp_path / "dataset" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["images"][0]["prompt"] == 'a "red" fox, asleep 🦊'


def test_a_job_ends_with_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    written(tmp_path, "table.csv", "id,caption\n1,a cat\n")
    line = is_one_clear_line(run_in(tmp_path, "prompts=file", "prompts.path=table.csv", "prompts.column=captoin"))
    assert line.startswith("prompts.column=captoin: table.csv has columns 'id', 'caption'")
    assert line.endswith("Did you mean 'caption'?")
    assert everything(tmp_path) == ["table.csv"]
