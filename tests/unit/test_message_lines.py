"""A line of JSON Lines is a valid message, or a sentence that says what is wrong with it; lines are counted."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_client.messages import InvalidMessage
from ledger.message_lines import MAX_LINE_BYTES, MessageLine, numbered_lines, read_line, strict_json

FINISH: dict[str, Any] = {"org_id": "acme", "workflow_id": "run-1", "credits": 80}
LINE = b'{"task": "workflow.finish", "org_id": "acme", "workflow_id": "run-1", "credits": 80}'
BOM = b"\xef\xbb\xbf"


def line(**fields: Any) -> bytes:
    return json.dumps({"task": "workflow.finish", **FINISH, **fields}).encode()


def refused(text: bytes) -> str:
    found = read_line(text)
    assert isinstance(found, InvalidMessage)
    return found.error


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r", b" \t\r\n"])
@pytest.mark.parametrize("begin", [b"", BOM, b"  "])
def test_a_line_is_a_task_and_its_message(begin: bytes, end: bytes) -> None:
    assert read_line(begin + LINE + end) == MessageLine("workflow.finish", FINISH)


def test_the_message_is_what_the_line_says_without_defaults_and_with_its_texts() -> None:
    metadata = {"who": "Zoë", "parts": [1, 2.5, None, True, {"n": 2**70}]}
    found = read_line(
        json.dumps({"task": "workflow.finish", **FINISH, "metadata": metadata}, ensure_ascii=False).encode()
    )
    assert found == MessageLine("workflow.finish", {**FINISH, "metadata": metadata})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"org_id": "acme"}', "task is missing, such as workflow.finish"),
        (b'{"task": 7, "org_id": "acme"}', "task must be a string, such as workflow.finish"),
        (b'{"task": NaN}', "task must be a string, such as workflow.finish"),
        (b'{"task": "wallet.nothing", "org_id": "acme"}', "there is no task named 'wallet.nothing'"),
        (line(credits="80"), "workflow.finish: credits must be an integer, got '80'"),
        (line(credits=float("nan")), "workflow.finish: credits must be an integer, got nan"),
        (line(credits=float("inf")), "workflow.finish: credits must be an integer, got inf"),
        (line(metadata={"a": float("nan")}), "workflow.finish: metadata must not contain NaN or Infinity"),
        (line(metadata={"a": "\ud800"}), "workflow.finish: metadata must not contain half a surrogate pair"),
        (b'{"task": "workflow.finish", "org_id": "acme", "credits": 1}', "workflow.finish: workflow_id is missing"),
        (
            b'[{"task": "workflow.finish"}]',
            "the line must be a JSON object: one message, with no list around the lines",
        ),
        (b"7", "the line must be a JSON object: one message, with no list around the lines"),
        (b'{"task": "a", "task": "b"}', "task is given more than once in the same object"),
        (line(metadata={})[:-2] + b'"n": 1, "n": 2}}', "n is given more than once in the same object"),
        (b'{"task": "workflow.finish",', "the JSON has no end: it must be complete, on one line"),
        (b"[", "the JSON has no end: it must be complete, on one line"),
        (LINE + LINE, "not JSON: Extra data at character 85"),
        (b"org_id,credits", "not JSON: Expecting value at character 1"),
        (b"", "not JSON: Expecting value at character 1"),
        (b'{"org_id": "a\nb"}', "not JSON: Invalid control character at character 14"),
        ("Zoë".encode("latin-1"), "the byte 0xeb at position 3 is not UTF-8: save the text as UTF-8"),
        (LINE.decode().encode("utf-16"), "the text is UTF-16: save it as UTF-8"),
        (b"[" * 60_000, "the JSON is nested too deeply"),
        (b'{"credits": -' + b"9" * 5_000 + b"}", "an integer must not have 5,000 digits"),
        (line(metadata={"long": "x" * MAX_LINE_BYTES}), "the line has more than 65,536 bytes"),
    ],
)
def test_what_is_wrong_with_a_line_is_one_sentence(text: bytes, problem: str) -> None:
    assert refused(text) == problem


def test_a_refused_message_names_its_organization() -> None:
    assert read_line(line(credits=-1)) == InvalidMessage(
        "invalid_message", "workflow.finish: credits must be greater than or equal to 0, got -1", "acme"
    )


def test_the_longest_line_is_read() -> None:
    padded = LINE + b" " * (MAX_LINE_BYTES - len(LINE))
    assert read_line(padded + b"\r\n") == MessageLine("workflow.finish", FINISH)
    assert read_line(padded + b" ") == InvalidMessage("too_large", "the line has more than 65,536 bytes", None)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_problem_on_one_line(text: bytes) -> None:
    found = read_line(text)
    assert isinstance(found, InvalidMessage)
    assert found.error.isprintable()


def test_json_is_read_as_python_reads_it_but_strictly() -> None:
    assert strict_json(b' {"a": [1, 2.5, "\\u00e9", true, null]} ') == {"a": [1, 2.5, "é", True, None]}
    with pytest.raises(ValueError, match=r"^a\\xe9 is given more than once in the same object$"):
        strict_json('{"aé": 1, "aé": 1}'.encode())


# Lines of a text


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"", b"  ", b"\r", b"d\r"]), max_size=12), st.integers(1, 5), st.booleans()
)
def test_lines_are_counted_wherever_the_text_is_cut(lines: list[bytes], size: int, ends: bool) -> None:
    text = b"\n".join(lines) + b"\n" * ends
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    expected = [(number, each) for number, each in enumerate(lines, 1) if each.strip()]
    assert list(numbered_lines(pieces)) == expected


def test_a_line_that_is_too_long_is_cut_and_the_next_ones_are_read() -> None:
    pieces = [LINE + b"\n", *[b"x" * 50_000] * 40, b"\r\n\r\n" + LINE]
    found = list(numbered_lines(pieces))
    assert found == [(1, LINE), (2, b"x" * (MAX_LINE_BYTES + 1)), (4, LINE)]
    assert refused(found[1][1]) == "the line has more than 65,536 bytes"


def test_a_text_of_nothing_but_a_byte_order_mark_has_no_lines() -> None:
    assert list(numbered_lines([BOM])) == []
    assert [number for number, _ in numbered_lines([BOM + LINE, b"\n"])] == [1]
