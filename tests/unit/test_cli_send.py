"""A message as a person gives it to `holdfast send`: each field is text, and gets the type that the message needs."""

from typing import Any

import pytest

from worker.cli.send import message_of

ADJUST = ("org_id=acme", "adjustment_id=a1", "credits=-5", "reason=a = b")


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (
            "wallet.adjust",
            (*ADJUST, "allow_negative=true", 'metadata={"ticket": [7, "é"]}', "source=123"),
            {
                "org_id": "acme",
                "adjustment_id": "a1",
                "credits": -5,
                "reason": "a = b",
                "allow_negative": True,
                "metadata": {"ticket": [7, "é"]},
                "source": "123",
            },
        ),
        (
            "wallet.configure",
            ("org_id=7", "version=2", "credit_limit=0", "period_cap=null"),
            {"org_id": "7", "version": 2, "credit_limit": 0, "period_cap": None},
        ),
        (
            "workflow.start",
            ("org_id=acme", "workflow_id=1", "credits=5", "occurred_at=2026-01-31T09:00:00Z", "project_id=null"),
            {
                "org_id": "acme",
                "workflow_id": "1",
                "credits": 5,
                "occurred_at": "2026-01-31T09:00:00Z",
                "project_id": "null",
            },
        ),
    ],
)
def test_a_field_has_the_type_that_the_message_needs(
    task: str, given: tuple[str, ...], message: dict[str, Any]
) -> None:
    assert message_of(task, list(given)) == message


@pytest.mark.parametrize(
    ("task", "given", "problem"),
    [
        ("workflow.finnish", (), "there is no task named 'workflow.finnish'; did you mean workflow.finish?"),
        ("wallet.adjust", ("org_id",), "'org_id' is not a field and its value, such as credits=500"),
        ("wallet.adjust", ("\x1b[2J",), r"'\x1b[2J' is not a field and its value, such as credits=500"),
        ("wallet.adjust", (*ADJUST, "credits=-5"), "wallet.adjust: credits is given more than once"),
        ("wallet.adjust", ADJUST[:3], "wallet.adjust: reason is missing"),
        (
            "wallet.adjust",
            (*ADJUST, "allow_negativ=true"),
            "wallet.adjust: allow_negativ is not a field of this message (did you mean allow_negative?)",
        ),
        (
            "wallet.adjust",
            (*ADJUST, "allow_negative=yes"),
            "wallet.adjust: allow_negative must be true or false, got 'yes'",
        ),
        ("wallet.adjust", (*ADJUST, "metadata=[1]"), "wallet.adjust: metadata must be a JSON object, got a list of 1"),
        (
            "wallet.adjust",
            (*ADJUST, "metadata={"),
            "wallet.adjust: metadata must be a JSON object: the JSON has no end: it must be complete, on one line",
        ),
        (
            "wallet.adjust",
            (*ADJUST, 'metadata={"a": 1, "a": 2}'),
            "wallet.adjust: metadata must be a JSON object: a is given more than once in the same object",
        ),
        *(
            (
                "workflow.finish",
                ("org_id=acme", "workflow_id=w", f"credits={value}"),
                f"workflow.finish: credits must be an integer, got {shown}",
            )
            for value, shown in (
                ("", "''"),
                ("5.0", "5.0"),
                ("1,000", "'1,000'"),
                ("007", "'007'"),
                ("\udcff", r"'\udcff'"),
            )
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], task: str, given: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        message_of(task, list(given))
    assert (ended.value.code, capsys.readouterr().err) == (2, f"holdfast: {problem}\n")
