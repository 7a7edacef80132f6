"""Training data in all its forms, and every wrong row told with file, line and reason."""

import json

import pytest

from gguflora.errors import TrainingDataError
from gguflora.training.rows import read_rows

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) for row in map(_line, rows)))
    return path


def _line(row):
    return (row if isinstance(row, str) else json.dumps(row)) + "\n"


def test_all_forms(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", {"messages": [ASK, SAY], "tools": [{"name": "f"}]}, "",
        {"prompt": "Q", "completion": "A"}, {"text": "once"}, {"instruction": "Do", "input": "it", "output": "Done"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
        {"prompt": [ASK, SAY, ASK], "completion": [SAY]},
    )  # fmt: skip
    rows = read_rows([path])
    assert [row.source for row in rows] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6, 7)]
    assert rows[0].messages == (ASK, SAY) and rows[0].tools == ({"name": "f"},)
    assert (rows[1].prompt, rows[1].text) == ("Q", "A")
    assert (rows[2].prompt, rows[2].text) == (None, "once")
    assert [m["content"] for m in rows[3].messages] == ["Do\n\nit", "Done"]
    assert rows[4].messages == (ASK, SAY)
    assert len(rows[5].messages) == 4 and rows[5].first == 3


def test_folders_and_lists(tmp_path):
    (tmp_path / "notes/deep").mkdir(parents=True)
    (tmp_path / "notes/b.md").write_text("second")
    (tmp_path / "notes/deep/c.txt").write_text("third")
    (tmp_path / "notes/a.txt").write_text("first")
    (tmp_path / "notes/empty.txt").write_text(" \n")
    (tmp_path / "notes/picture.png").write_bytes(b"\xff")
    for hidden in (".ipynb_checkpoints/a.txt", "deep/.gguflora/record.json", ".hidden.txt"):
        (tmp_path / "notes" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "notes" / hidden).write_text("hidden")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert [row.text for row in read_rows([tmp_path / "notes", listed])] == ["first", "second", "third", "one", "two"]


WRONG = {
    "is no JSON": "{",
    "is a list, expected an object": "[1]",
    "has 'question', expected 'messages'": {"question": "?"},
    "'messages' is no list of messages": {"messages": []},
    "has no message of the role 'assistant'": {"messages": [ASK]},
    "begins with a message of the assistant": {"messages": [SAY, ASK]},
    "message 2 has no 'content' that is a text": {"messages": [ASK, {"role": "assistant", "content": 3}]},
    "message 1 has no 'role'": {"messages": [{"content": "x"}, SAY]},
    "'completion' is empty": {"prompt": "Q", "completion": ""},
    "must be two texts": {"prompt": "Q", "completion": [SAY]},
    "'text' is no text, or empty": {"text": " "},
    "'input' is no text": {"instruction": "a", "input": 4, "output": "b"},
    "'tools' is no list": {"messages": [ASK, SAY], "tools": "f"},
    "message 1 is not from": {"conversations": [{"from": "dog", "value": "w"}]},
}


def test_every_wrong_row_is_told(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "good"}, *WRONG.values())
    with pytest.raises(TrainingDataError) as caught:
        read_rows([path])
    problems = caught.value.problems
    assert len(problems) == len(WRONG)
    for line, (reason, problem) in enumerate(zip(WRONG, problems, strict=True), 2):
        assert problem.startswith(f"{path}:{line}: ")
        assert reason in problem
        assert problem in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\xff\xfe\x00"), ("a.txt", b"\n")])
def test_files_without_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingDataError, match=r"no training data|cannot be read"):
        read_rows([tmp_path / name])


def test_missing_files_and_empty_folders(tmp_path):
    with pytest.raises(TrainingDataError, match="no such file"):
        read_rows([tmp_path / "none.jsonl"])
    with pytest.raises(TrainingDataError, match=r"holds no \.txt"):
        read_rows([tmp_path])


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x1c"])
def test_a_line_ends_with_a_newline_only(tmp_path, odd):
    """Python's splitlines cuts at others, too, which JSON may hold as they are (RFC 8259, section 7)."""
    content = json.dumps({"prompt": "a", "completion": f"b{odd}c"}, ensure_ascii=odd == "\x1c")
    (tmp_path / "rows.jsonl").write_text(f"{content}\r\n{content}\n", encoding="utf-8", newline="")
    rows = read_rows([tmp_path / "rows.jsonl"])
    assert [row.text for row in rows] == [f"b{odd}c"] * 2
    assert rows[1].source.endswith("rows.jsonl:2")
