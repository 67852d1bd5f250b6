"""What parses, with which defaults, and the sentence that a person reads about what does not."""

import json
import math
from datetime import UTC, datetime
from typing import Any, get_args

import pytest

from holdfast_client.messages import (
    MAX_BODY_BYTES,
    MAX_METADATA_BYTES,
    MESSAGES,
    OWN_REASONS,
    AnyMessage,
    InvalidMessage,
    Message,
    Reverse,
    WalletMessage,
    parse,
    too_large_body,
    too_large_entry,
)
from ledger.bodies import only_argument

CARRIED = {"source": "import", "occurred_at": "2026-01-31T11:00:00+02:00", "metadata": {"run": 7}}
CARRIED_READ = {
    "source": "import",
    "occurred_at": datetime(2026, 1, 31, 9, tzinfo=UTC),
    "metadata": {"run": 7},
}
END = "2026-12-31T00:00:00Z"
END_READ = datetime(2026, 12, 31, tzinfo=UTC)
NOT_AN_ID = "must be 1-128 characters of A-Z a-z 0-9 _ . : -, got"
MAX = 9_007_199_254_740_991
AMOUNT = 1_000_000_000_000
"""The most credits that one message moves."""


def start(**fields: Any) -> dict[str, Any]:
    """The smallest workflow.start, changed by `fields`."""
    return {"org_id": "acme", "workflow_id": "w1", "credits": 5, **fields}


def adjust(**fields: Any) -> dict[str, Any]:
    """The smallest wallet.adjust, changed by `fields`."""
    return {"org_id": "acme", "adjustment_id": "a1", "credits": 5, "reason": "promise", **fields}


def reverse(**fields: Any) -> dict[str, Any]:
    """The smallest wallet.reverse, changed by `fields`."""
    return {"org_id": "acme", "reversal_id": "r1", "purchase_id": "p1", "reason": "disputed", **fields}


def subscribe(**fields: Any) -> dict[str, Any]:
    """The smallest wallet.subscribe, changed by `fields`."""
    return {"org_id": "acme", "subscription_id": "s1", "version": 1, "plan": "pro", "monthly_credits": 9, **fields}


def read(task: str, payload: object) -> Message:
    message = parse(task, payload)
    assert isinstance(message, Message), message
    return message


def refused(task: str, payload: object) -> str:
    """Why it is refused, in words."""
    message = parse(task, payload)
    assert isinstance(message, InvalidMessage), message
    assert message.code == "invalid_message"
    return message.error


# task, the required fields, the optional ones with values, what the optional ones are when left out
FORMS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (
        "workflow.start",
        {"org_id": "acme", "workflow_id": "w1", "credits": 0},
        {"project_id": "p1", "activity_name": "Résumé 1", "expires_in_s": 60},
        {"project_id": None, "activity_name": None, "expires_in_s": 86_400, "source": "workflow-engine"},
    ),
    (
        "workflow.finish",
        {"org_id": "acme", "workflow_id": "w1", "credits": AMOUNT},
        {"project_id": "p1", "activity_name": "Résumé 1"},
        {"project_id": None, "activity_name": None, "source": "workflow-engine"},
    ),
    (
        "workflow.cancel",
        {"org_id": "acme", "workflow_id": "w1"},
        {"reason": "by hand"},
        {"reason": None, "source": "workflow-engine"},
    ),
    (
        "workflow.fail",
        {"org_id": "acme", "workflow_id": "w1"},
        {"reason": "crashed"},
        {"reason": None, "source": "workflow-engine"},
    ),
    (
        "wallet.purchase",
        {"org_id": "acme", "purchase_id": "x1", "credits": 1},
        {"expires_at": END},
        {"expires_at": None, "source": "billing"},
    ),
    (
        "wallet.grant",
        {"org_id": "acme", "grant_id": "x1", "credits": 1},
        {"reason": "welcome", "expires_at": END},
        {"reason": None, "expires_at": None, "source": "admin"},
    ),
    (
        "wallet.adjust",
        {"org_id": "acme", "adjustment_id": "x1", "credits": -AMOUNT, "reason": "typo"},
        {"allow_negative": True},
        {"allow_negative": False, "source": "admin"},
    ),
    (
        "wallet.refund",
        {"org_id": "acme", "refund_id": "x1", "credits": 1},
        {"workflow_id": "w1"},
        {"workflow_id": None, "source": "billing"},
    ),
    (
        "wallet.bill",
        {"org_id": "acme", "billing_id": "x1", "credits": 0},
        {"invoice_id": "2026-01:7"},
        {"invoice_id": None, "source": "billing"},
    ),
    (
        "wallet.reverse",
        {"org_id": "acme", "reversal_id": "x1", "purchase_id": "p1", "reason": "disputed"},
        {"credits": 1},
        {"credits": None, "source": "billing"},
    ),
    (
        "wallet.subscribe",
        {"org_id": "acme", "subscription_id": "x1", "version": 1, "plan": "pro", "monthly_credits": 5},
        {"rollover_limit": MAX, "anchor": END, "first_credits": 0},
        {"rollover_limit": 0, "anchor": None, "first_credits": None, "source": "billing"},
    ),
    (
        "wallet.unsubscribe",
        {"org_id": "acme", "subscription_id": "x1", "version": 1},
        {},
        {"source": "billing"},
    ),
    (
        "wallet.configure",
        {"org_id": "acme", "version": MAX},
        {"credit_limit": MAX, "period_cap": 0, "reason": "x" * 500},
        {"credit_limit": 0, "period_cap": None, "reason": None, "source": "admin"},
    ),
]
TASKS = [form[0] for form in FORMS]


def test_the_tasks_are_those_of_the_contract() -> None:
    assert sorted(MESSAGES) == sorted(TASKS)


@pytest.mark.parametrize(("task", "required", "optional", "defaults"), FORMS, ids=TASKS)
def test_the_smallest_form_gets_the_documented_defaults(
    task: str, required: dict[str, Any], optional: dict[str, Any], defaults: dict[str, Any]
) -> None:
    message = read(task, required)
    assert message.task == task
    assert message.model_dump() == {**required, **defaults, "occurred_at": None, "metadata": {}}


@pytest.mark.parametrize(("task", "required", "optional", "defaults"), FORMS, ids=TASKS)
def test_the_full_form_keeps_every_field(
    task: str, required: dict[str, Any], optional: dict[str, Any], defaults: dict[str, Any]
) -> None:
    full = {**required, **optional, **CARRIED}
    times = dict.fromkeys((name for name, value in full.items() if value is END), END_READ)
    assert read(task, full).model_dump() == {**defaults, **full, **times, **CARRIED_READ}


@pytest.mark.parametrize(("task", "required", "optional", "defaults"), FORMS, ids=TASKS)
def test_every_required_field_is_missed(
    task: str, required: dict[str, Any], optional: dict[str, Any], defaults: dict[str, Any]
) -> None:
    for name in required:
        without = {field: value for field, value in required.items() if field != name}
        assert refused(task, without) == f"{task}: {name} is missing"


def test_an_optional_text_may_be_null() -> None:
    message = read("workflow.start", start(project_id=None, activity_name=None, occurred_at=None))
    assert message == read("workflow.start", start())


def test_every_problem_is_named_in_one_sentence_each() -> None:
    assert refused("workflow.start", {"workflow_id": "w1", "credits": -1, "extra": 1}) == (
        "workflow.start: org_id is missing; credits must be greater than or equal to 0, got -1; "
        "extra is not a field of this message"
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("5", "credits must be an integer, got '5'"),
        (True, "credits must be an integer, got true"),
        (5.0, "credits must be an integer, got 5.0"),
        (None, "credits must be an integer, got null"),
        ([], "credits must be an integer, got a list of 0"),
        ({"a": 1, "b": 2}, "credits must be an integer, got an object of 2"),
        (-1, "credits must be greater than or equal to 0, got -1"),
        (10**12 + 1, "credits must be less than or equal to 1000000000000, got 1000000000001"),
        (2**64, "credits must be less than or equal to 1000000000000, got 18446744073709551616"),
    ],
)
def test_credits_are_integers_within_bounds(value: object, problem: str) -> None:
    assert refused("workflow.start", start(credits=value)) == f"workflow.start: {problem}"


@pytest.mark.parametrize(
    ("task", "id_field"),
    [("wallet.purchase", "purchase_id"), ("wallet.grant", "grant_id"), ("wallet.refund", "refund_id")],
)
def test_what_is_given_is_more_than_nothing(task: str, id_field: str) -> None:
    payload = {"org_id": "acme", id_field: "x1", "credits": 0}
    assert refused(task, payload) == f"{task}: credits must be greater than 0, got 0"


def test_an_adjustment_changes_something() -> None:
    assert refused("wallet.adjust", adjust(credits=0)) == "wallet.adjust: credits must not be 0"


@pytest.mark.parametrize("credits", [10**12 + 1, -(10**12) - 1])
def test_signed_credits_are_bounded_on_both_sides(credits: int) -> None:
    bound = f"greater than or equal to -{AMOUNT}" if credits < 0 else f"less than or equal to {AMOUNT}"
    bill = {"org_id": "acme", "billing_id": "b1", "credits": credits}
    assert refused("wallet.bill", bill) == f"wallet.bill: credits must be {bound}, got {credits}"
    assert refused("wallet.adjust", adjust(credits=credits)) == f"wallet.adjust: credits must be {bound}, got {credits}"


BOUNDED: list[tuple[str, dict[str, Any], str, int]] = [
    ("workflow.start", start(), "credits", AMOUNT),
    ("workflow.finish", start(), "credits", AMOUNT),
    ("wallet.purchase", {"org_id": "acme", "purchase_id": "p1"}, "credits", AMOUNT),
    ("wallet.grant", {"org_id": "acme", "grant_id": "g1"}, "credits", AMOUNT),
    ("wallet.refund", {"org_id": "acme", "refund_id": "r1"}, "credits", AMOUNT),
    ("wallet.reverse", reverse(), "credits", AMOUNT),
    ("wallet.subscribe", subscribe(), "monthly_credits", AMOUNT),
    ("wallet.subscribe", subscribe(monthly_credits=AMOUNT), "first_credits", AMOUNT),
    ("wallet.subscribe", subscribe(), "rollover_limit", MAX),
    ("wallet.subscribe", subscribe(), "version", MAX),
    ("wallet.configure", {"org_id": "acme", "version": 1}, "credit_limit", MAX),
    ("wallet.configure", {"org_id": "acme", "version": 1}, "period_cap", MAX),
]


@pytest.mark.parametrize(("task", "fields", "field", "most"), BOUNDED)
def test_one_message_moves_a_million_million_credits_and_a_limit_is_any_balance(
    task: str, fields: dict[str, Any], field: str, most: int
) -> None:
    assert read(task, {**fields, field: most}).model_dump()[field] == most
    assert refused(task, {**fields, field: most + 1}) == (
        f"{task}: {field} must be less than or equal to {most}, got {most + 1}"
    )


def test_every_amount_and_limit_is_bounded() -> None:
    amounts = {
        (task, name)
        for task, model in MESSAGES.items()
        for name, schema in model.model_json_schema()["properties"].items()
        if '"integer"' in json.dumps(schema) and name != "expires_in_s"
    }
    signed = {("wallet.adjust", "credits"), ("wallet.bill", "credits")}
    versions = {("wallet.unsubscribe", "version"), ("wallet.configure", "version")}
    assert amounts == {(task, field) for task, _, field, _ in BOUNDED} | signed | versions


@pytest.mark.parametrize("first_credits", [0, 8, 9])
def test_a_first_period_is_given_at_most_what_any_other_is(first_credits: int) -> None:
    assert read("wallet.subscribe", subscribe(first_credits=first_credits)).model_dump()["monthly_credits"] == 9


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"first_credits": 10}, "first_credits must not be above monthly_credits, 9, got 10"),
        ({"first_credits": -1}, "first_credits must be greater than or equal to 0, got -1"),
        ({"first_credits": "9"}, "first_credits must be an integer, got '9'"),
        (
            {"first_credits": 10, "monthly_credits": -1},
            "monthly_credits must be greater than or equal to 0, got -1",
        ),
    ],
)
def test_what_a_first_period_cannot_be_given(fields: dict[str, Any], problem: str) -> None:
    assert refused("wallet.subscribe", subscribe(**fields)) == f"wallet.subscribe: {problem}"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"credits": 0}, "credits must be greater than 0, got 0"),
        ({"credits": -5}, "credits must be greater than 0, got -5"),
        ({"reason": "typo"}, "reason must be 'refunded' or 'disputed', got 'typo'"),
        ({"purchase_id": "a b"}, f"purchase_id {NOT_AN_ID} 'a b'"),
    ],
)
def test_what_a_reversal_cannot_be(fields: dict[str, Any], problem: str) -> None:
    assert refused("wallet.reverse", reverse(**fields)) == f"wallet.reverse: {problem}"


@pytest.mark.parametrize("version", [0, -1])
def test_versions_begin_with_1(version: int) -> None:
    assert refused("wallet.subscribe", subscribe(version=version)) == (
        f"wallet.subscribe: version must be greater than or equal to 1, got {version}"
    )


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"credit_limit": -1}, "credit_limit must be greater than or equal to 0, got -1"),
        ({"credit_limit": None}, "credit_limit must be an integer, got null"),
        ({"period_cap": -1}, "period_cap must be greater than or equal to 0, got -1"),
        ({"period_cap": True}, "period_cap must be an integer, got true"),
        ({"version": 1.0}, "version must be an integer, got 1.0"),
    ],
)
def test_limits_are_integers_from_0(fields: dict[str, Any], problem: str) -> None:
    assert refused("wallet.configure", {"org_id": "acme", "version": 1, **fields}) == f"wallet.configure: {problem}"


@pytest.mark.parametrize("allow", [1, 0, "true", "yes", None])
def test_allow_negative_is_a_boolean_and_nothing_like_it(allow: object) -> None:
    shown = "null" if allow is None else repr(allow)
    assert refused("wallet.adjust", adjust(allow_negative=allow)) == (
        f"wallet.adjust: allow_negative must be true or false, got {shown}"
    )


@pytest.mark.parametrize("reason", [*sorted(OWN_REASONS), "Grant_Expired", " refund_expired "])
def test_only_the_ledger_says_that_credits_expired(reason: str) -> None:
    assert refused("wallet.adjust", adjust(reason=reason)) == (
        "wallet.adjust: reason must not be a reason that only the ledger gives"
    )


@pytest.mark.parametrize("expires_in_s", [60, 2_592_000])
def test_a_hold_may_last_from_a_minute_to_30_days(expires_in_s: int) -> None:
    assert read("workflow.start", start(expires_in_s=expires_in_s)).model_dump()["expires_in_s"] == expires_in_s


@pytest.mark.parametrize(
    ("expires_in_s", "problem"),
    [
        (59, "must be greater than or equal to 60, got 59"),
        (2_592_001, "must be less than or equal to 2592000, got 2592001"),
        ("60", "must be an integer, got '60'"),
    ],
)
def test_a_hold_lasts_neither_shorter_nor_longer(expires_in_s: object, problem: str) -> None:
    assert refused("workflow.start", start(expires_in_s=expires_in_s)) == f"workflow.start: expires_in_s {problem}"


# Text

ID_FIELDS = [
    ("workflow.start", "org_id"),
    ("workflow.start", "workflow_id"),
    ("workflow.start", "project_id"),
    ("workflow.finish", "project_id"),
    ("wallet.purchase", "purchase_id"),
    ("wallet.grant", "grant_id"),
    ("wallet.adjust", "adjustment_id"),
    ("wallet.refund", "refund_id"),
    ("wallet.refund", "workflow_id"),
    ("wallet.bill", "billing_id"),
    ("wallet.bill", "invoice_id"),
    ("wallet.reverse", "reversal_id"),
    ("wallet.reverse", "purchase_id"),
    ("wallet.subscribe", "subscription_id"),
    ("wallet.unsubscribe", "subscription_id"),
]
SMALLEST = {form[0]: form[1] for form in FORMS}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", f"{NOT_AN_ID} ''"),
        ("a b", f"{NOT_AN_ID} 'a b'"),
        ("a\n", f"{NOT_AN_ID} 'a\\n'"),
        ("a\x00b", f"{NOT_AN_ID} 'a\\x00b'"),
        ("é", f"{NOT_AN_ID} '\\xe9'"),
        ("٣", f"{NOT_AN_ID} '\\u0663'"),
        ("x" * 129, f"{NOT_AN_ID} '{'x' * 76}..."),
        ("a\ud800b", "must not contain half a surrogate pair"),
        (5, "must be a valid string, got 5"),
        (["a"], "must be a valid string, got a list of 1"),
    ],
    ids=["empty", "space", "newline", "NUL", "accent", "arabic digit", "129", "surrogate", "number", "list"],
)
@pytest.mark.parametrize(("task", "field"), ID_FIELDS)
def test_ids_are_128_plain_characters(task: str, field: str, text: object, problem: str) -> None:
    assert refused(task, {**SMALLEST[task], field: text}) == f"{task}: {field} {problem}"


@pytest.mark.parametrize("text", ["a", "x" * 128, "A-Z_a.z:09"])
@pytest.mark.parametrize(("task", "field"), ID_FIELDS)
def test_ids_may_be_all_that_is_documented(task: str, field: str, text: str) -> None:
    assert read(task, {**SMALLEST[task], field: text}).model_dump()[field] == text


TEXT_FIELDS = [
    ("workflow.start", "source", 64),
    ("workflow.start", "activity_name", 256),
    ("workflow.cancel", "reason", 500),
    ("workflow.fail", "reason", 500),
    ("wallet.grant", "reason", 500),
    ("wallet.adjust", "reason", 500),
    ("wallet.subscribe", "plan", 256),
]


@pytest.mark.parametrize(("task", "field", "longest"), TEXT_FIELDS)
def test_text_may_be_as_long_as_documented_in_any_script(task: str, field: str, longest: int) -> None:
    text = "界" * longest
    assert read(task, {**SMALLEST[task], field: text}).model_dump()[field] == text


@pytest.mark.parametrize(("task", "field", "longest"), TEXT_FIELDS)
def test_text_is_neither_empty_nor_longer(task: str, field: str, longest: int) -> None:
    text = "x" * (longest + 1)
    shown = repr(text) if longest == 64 else f"'{'x' * 76}..."
    assert refused(task, {**SMALLEST[task], field: ""}) == f"{task}: {field} must have at least 1 character, got ''"
    assert refused(task, {**SMALLEST[task], field: text}) == (
        f"{task}: {field} must have at most {longest} characters, got {shown}"
    )


@pytest.mark.parametrize(("task", "field", "longest"), TEXT_FIELDS)
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\x00b", "must not contain the NUL character, got 'a\\x00b'"),
        ("a\udfffb", "must not contain half a surrogate pair"),
        (7, "must be a valid string, got 7"),
    ],
    ids=["NUL", "surrogate", "number"],
)
def test_text_can_be_stored(task: str, field: str, longest: int, text: object, problem: str) -> None:
    assert refused(task, {**SMALLEST[task], field: text}) == f"{task}: {field} {problem}"


# Metadata


def nested(levels: int) -> dict[str, Any]:
    """Metadata of that many levels: an object, and lists in it."""
    value: Any = "core"
    for _ in range(levels - 1):
        value = [value]
    return {"a": value}


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ([], "must be a JSON object, got a list of 0"),
        ("{}", "must be a JSON object, got '{}'"),
        (None, "must be a JSON object, got null"),
        ({"a": "\x00"}, "must not contain the NUL character"),
        ({"a\x00": 1}, "must not contain the NUL character"),
        ({"a": [{"b": "\x00"}]}, "must not contain the NUL character"),
        ({"a": "\ud800"}, "must not contain half a surrogate pair"),
        ({"\udfff": 1}, "must not contain half a surrogate pair"),
        ({"a": math.nan}, "must not contain NaN or Infinity"),
        ({"a": [-math.inf]}, "must not contain NaN or Infinity"),
        ({1: "one"}, "must have strings as keys"),
        ({"a": {True: 1}}, "must have strings as keys"),
        ({"a": b"bytes"}, "must not contain a bytes"),
        ({"a": "x" * 9_216}, "must not be larger than 8 KiB as JSON"),
        (nested(21), "must not be nested deeper than 20 levels"),
        (nested(100), "must not be nested deeper than 20 levels"),
        (nested(100_000), "must not be nested deeper than 20 levels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_metadata_is_a_small_json_object(metadata: object, problem: str) -> None:
    assert refused("workflow.start", start(metadata=metadata)) == f"workflow.start: metadata {problem}"


@pytest.mark.parametrize(
    "metadata",
    [{}, {"a": [None, True, 1, -1.5, "ü😀", {"b": []}]}, {"": ""}, nested(20), {"credits": 2**60}],
    ids=["empty", "all kinds", "empty key", "20 levels", "large number"],
)
def test_metadata_is_kept_as_it_is(metadata: dict[str, Any]) -> None:
    assert read("workflow.start", start(metadata=metadata)).metadata == metadata


@pytest.mark.parametrize(("character", "bytes_each"), [("x", 1), ("ü", 2), ("界", 3), ("😀", 4)])
def test_metadata_holds_8192_bytes_and_not_one_more(character: str, bytes_each: int) -> None:
    count, rest = divmod(8_192 - len('{"a":""}'), bytes_each)
    full = {"a": character * count + "x" * rest}
    assert read("workflow.start", start(metadata=full)).metadata == full
    assert refused("workflow.start", start(metadata={"a": full["a"] + "x"})) == (
        "workflow.start: metadata must not be larger than 8 KiB as JSON"
    )


# Points in time

NOT_AN_INSTANT = [
    ("2026-01-31T09:00:00", "must have an offset from UTC, such as Z or +02:00, got '2026-01-31T09:00:00'"),
    ("2026-01-31", "must have an offset from UTC, such as Z or +02:00, got '2026-01-31'"),
    (1_769_850_000, "must be an ISO 8601 string, such as 2026-01-31T09:00:00Z, got 1769850000"),
    (True, "must be an ISO 8601 string, such as 2026-01-31T09:00:00Z, got true"),
    ("1769850000", "must be an ISO 8601 date and time, got '1769850000'"),
    ("yesterday", "must be an ISO 8601 date and time, got 'yesterday'"),
    ("", "must be an ISO 8601 date and time, got ''"),
    ("2026-02-30T09:00:00Z", "must be an ISO 8601 date and time, got '2026-02-30T09:00:00Z'"),
    ("0001-01-01T00:00:00+14:00", "must be between the years 1971 and 2999, got '0001-01-01T00:00:00+14:00'"),
    ("9999-12-31T23:59:59-14:00", "must be between the years 1971 and 2999, got '9999-12-31T23:59:59-14:00'"),
    ("1970-12-31T23:59:59Z", "must be between the years 1971 and 2999, got '1970-12-31T23:59:59Z'"),
    ("3000-01-01T00:00:00Z", "must be between the years 1971 and 2999, got '3000-01-01T00:00:00Z'"),
]


@pytest.mark.parametrize(("text", "problem"), NOT_AN_INSTANT)
def test_a_point_in_time_is_iso_8601_with_an_offset(text: object, problem: str) -> None:
    assert refused("workflow.start", start(occurred_at=text)) == f"workflow.start: occurred_at {problem}"
    assert refused("wallet.subscribe", subscribe(anchor=text)) == f"wallet.subscribe: anchor {problem}"
    for task, id_field in (("wallet.grant", "grant_id"), ("wallet.purchase", "purchase_id")):
        given = {"org_id": "acme", id_field: "x1", "credits": 1, "expires_at": text}
        assert refused(task, given) == f"{task}: expires_at {problem}"


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-01-31T09:00:00Z", datetime(2026, 1, 31, 9, tzinfo=UTC)),
        ("2026-02-01T01:30:00.25+02:00", datetime(2026, 1, 31, 23, 30, 0, 250_000, tzinfo=UTC)),
        ("1971-01-01T00:00:00Z", datetime(1971, 1, 1, tzinfo=UTC)),
        ("2999-12-31T23:59:59Z", datetime(2999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_a_point_in_time_is_held_in_utc(text: str, instant: datetime) -> None:
    anchor = read("wallet.subscribe", subscribe(anchor=text)).model_dump()["anchor"]
    assert (anchor, anchor.tzinfo) == (instant, UTC)


# What is no message at all


@pytest.mark.parametrize(
    ("payload", "shown"),
    [([], "a list of 0"), ([1, 2], "a list of 2"), ("x", "'x'"), (None, "null"), (5, "5"), (1.5, "1.5")],
)
def test_a_message_is_a_json_object(payload: object, shown: str) -> None:
    assert parse("workflow.start", payload) == InvalidMessage(
        "invalid_message", f"workflow.start: the message must be a JSON object, got {shown}", None
    )


def test_a_task_takes_the_message_as_its_only_argument() -> None:
    assert only_argument("workflow.start", [{"org_id": "acme"}], {}) == {"org_id": "acme"}


@pytest.mark.parametrize(
    ("args", "kwargs", "sent"),
    [
        ([], {}, "0 positional and 0 named"),
        ([], {"org_id": "acme", "workflow_id": "w1"}, "0 positional and 2 named"),
        ([{}, {}], {}, "2 positional and 0 named"),
        ([{}], {"x": 1}, "1 positional and 1 named"),
    ],
)
def test_other_arguments_are_no_message(args: list[object], kwargs: dict[str, object], sent: str) -> None:
    problem = only_argument("workflow.start", args, kwargs)
    assert problem == InvalidMessage(
        "invalid_message",
        f"workflow.start takes one positional argument, the message as a JSON object; got {sent}",
        None,
    )
    assert parse("workflow.start", problem) is problem


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ("workflow.strat", "'workflow.strat'; did you mean workflow.start?"),
        ("purchase", "'purchase'; did you mean wallet.purchase?"),
        ("wallet.subscription", "'wallet.subscription'; did you mean wallet.subscribe?"),
        ("wallet.nothing", "'wallet.nothing'"),
        ("celery.chord", "'celery.chord'"),
        ("", "''"),
        ("a\x00\n\ud800é", "'a\\x00\\n\\ud800\\xe9'"),
        ("x" * 1_000, f"'{'x' * 76}..."),
    ],
)
def test_an_unknown_task_is_named(task: str, shown: str) -> None:
    expected = InvalidMessage("unknown_task", f"there is no task named {shown}", "acme")
    assert parse(task, {"org_id": "acme"}) == expected


@pytest.mark.parametrize(
    ("org_id", "kept"),
    [
        ("acme", "acme"),
        ("x" * 128, "x" * 128),
        ("x" * 129, None),
        ("", None),
        ("a\n", None),
        ("a\x00", None),
        ("\ud800", None),
        ("é", None),
        (5, None),
        (None, None),
        (["acme"], None),
    ],
)
def test_a_bad_message_names_its_organization_if_that_could_exist(org_id: object, kept: str | None) -> None:
    for message in (parse("workflow.start", {"org_id": org_id}), parse("no.such", {"org_id": org_id})):
        assert isinstance(message, InvalidMessage)
        assert message.org_id == kept


@pytest.mark.parametrize(
    ("name", "shown"),
    [("colour", "colour"), ("colouré", "colour\\xe9"), ("a.b", "a.b"), ("x" * 100, "x" * 64)],
)
def test_an_unknown_field_is_named(name: str, shown: str) -> None:
    assert refused("workflow.start", start(**{name: 1})) == f"workflow.start: {shown} is not a field of this message"


def test_a_field_that_was_probably_meant_is_named() -> None:
    missing = {"org_id": "acme", "workflow_id": "w1", "credit": 5, "project": "web"}
    assert refused("workflow.start", missing) == (
        "workflow.start: credits is missing; credit is not a field of this message (did you mean credits?); "
        "project is not a field of this message (did you mean project_id?)"
    )
    assert refused("workflow.start", start(credit=5)) == (  # credits are given
        "workflow.start: credit is not a field of this message"
    )


@pytest.mark.parametrize(("unknown", "rest"), [(9, ""), (10, "; … and 1 more"), (100_000, "; … and 99,991 more")])
def test_of_many_problems_the_first_ten_are_named(unknown: int, rest: str) -> None:
    error = refused("workflow.start", start(credits="5", **{f"field{number}": number for number in range(unknown)}))
    fields = "; ".join(f"field{number} is not a field of this message" for number in range(9))
    assert error == f"workflow.start: credits must be an integer, got '5'; {fields}{rest}"


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", "a\x1b[31m", "a\ud800"])
def test_the_name_of_an_unknown_field_can_be_stored_and_printed(name: str) -> None:
    error = refused("workflow.start", start(**{name: 1}))
    assert error.isprintable()
    assert error.startswith("workflow.start: a")


def test_an_unknown_field_may_be_nested_as_deep_as_it_likes() -> None:
    assert refused("workflow.start", start(extra=nested(100_000))) == (
        "workflow.start: extra is not a field of this message"
    )


@pytest.mark.parametrize("field", ["credits", "metadata"])
def test_an_integer_too_long_to_print_is_refused_like_any_other(field: str) -> None:
    huge = 10**5_000
    error = refused("workflow.start", start(**{field: huge if field == "credits" else {"a": huge}}))
    assert error.startswith(f"workflow.start: {field} must ")


# Wallet messages: what makes two of them the same


@pytest.mark.parametrize(
    ("task", "fields", "message_id", "terms"),
    [
        ("wallet.purchase", {"purchase_id": "p1", "credits": 5}, "p1", {"credits": 5, "expires_at": None}),
        (
            "wallet.grant",
            {"grant_id": "g1", "credits": 5, "expires_at": "2026-01-31T11:00:00+02:00"},
            "g1",
            {"credits": 5, "reason": None, "expires_at": "2026-01-31T09:00:00Z"},
        ),
        (
            "wallet.adjust",
            {"adjustment_id": "a1", "credits": -5, "reason": "typo"},
            "a1",
            {"credits": -5, "reason": "typo", "allow_negative": False},
        ),
        (
            "wallet.refund",
            {"refund_id": "r1", "credits": 5, "workflow_id": "w1"},
            "r1",
            {"credits": 5, "workflow_id": "w1"},
        ),
        ("wallet.bill", {"billing_id": "b1", "credits": 0}, "b1", {"credits": 0, "invoice_id": None}),
        (
            "wallet.reverse",
            {"reversal_id": "r1", "purchase_id": "p1", "reason": "refunded"},
            "r1",
            {"purchase_id": "p1", "credits": None, "reason": "refunded"},
        ),
        (
            "wallet.subscribe",
            {
                "subscription_id": "s1",
                "version": 3,
                "plan": "pro",
                "monthly_credits": 9,
                "anchor": "2026-01-31T11:00:00+02:00",
            },
            "s1:3",
            {
                "version": 3,
                "plan": "pro",
                "monthly_credits": 9,
                "rollover_limit": 0,
                "anchor": "2026-01-31T09:00:00Z",
                "first_credits": None,
            },
        ),
        ("wallet.unsubscribe", {"subscription_id": "s1", "version": 4}, "s1:4", {"version": 4}),
        (
            "wallet.configure",
            {"version": 2, "period_cap": 7, "reason": "as agreed"},
            "2",
            {"credit_limit": 0, "period_cap": 7, "reason": "as agreed"},
        ),
    ],
)
def test_a_wallet_message_is_known_by_its_id_and_its_terms(
    task: str, fields: dict[str, Any], message_id: str, terms: dict[str, Any]
) -> None:
    message = read(task, {"org_id": "acme", **fields, **CARRIED})
    assert isinstance(message, WalletMessage)
    assert (message.message_id, message.terms()) == (message_id, terms)


def test_what_is_too_large_is_told_with_what_was_measured_and_which_digest_it_has() -> None:
    body, entry = too_large_body(3_000_000, "ab12"), too_large_entry(4_000_000, 262_144, "cd34")
    assert {(problem.code, problem.org_id) for problem in (body, entry)} == {("too_large", None)}
    assert body.error == (
        "the body has 3,000,000 bytes, more than 65,536: only the first 65,536 are kept; "
        "the SHA-256 of the whole body is ab12"
    )
    assert entry.error == (
        "the message's entry in the queue has 4,000,000 bytes, more than 262,144: "
        "only the body in its first 65,536 is kept; the SHA-1 of the whole entry is cd34"
    )


def test_no_valid_message_is_too_large_however_it_is_escaped() -> None:
    largest = {
        "org_id": "o" * 128,
        "workflow_id": "w" * 128,
        "credits": AMOUNT,
        "project_id": "p" * 128,
        "activity_name": "📄" * 256,
        "source": "📄" * 64,
        "metadata": {"text": "é" * ((MAX_METADATA_BYTES - len('{"text":""}')) // 2)},
    }
    assert isinstance(parse("workflow.start", largest), Message)
    assert len(json.dumps([[largest], {}, {}], indent=4)) < MAX_BODY_BYTES / 2


def test_every_class_of_a_message_is_one_of_the_messages() -> None:
    assert {model for model in subclasses(Message) if "task" in vars(model)} == set(get_args(AnyMessage))


def subclasses(model: type[Message]) -> set[type[Message]]:
    """All below `model` that this project defines."""
    own = {each for each in model.__subclasses__() if each.__module__ == Message.__module__}
    return own.union(*map(subclasses, own))


def test_a_reversal_names_its_purchase() -> None:
    message = read("wallet.reverse", reverse(purchase_id="p7"))
    assert isinstance(message, Reverse)
    assert message.purchase_key == ("acme", "purchase", "p7")


@pytest.mark.parametrize(
    ("task", "fields", "workflow", "subscription", "posted"),
    [
        ("workflow.start", start(), ("acme", "w1"), None, None),
        ("wallet.adjust", adjust(), None, None, ("acme", "adjustment", "a1")),
        ("wallet.subscribe", subscribe(), None, ("acme", "s1"), ("acme", "subscribe", "s1:1")),
        (
            "wallet.unsubscribe",
            {"org_id": "acme", "subscription_id": "s1", "version": 2},
            None,
            ("acme", "s1"),
            ("acme", "unsubscribe", "s1:2"),
        ),
        (
            "wallet.refund",
            {"org_id": "acme", "refund_id": "r1", "credits": 1, "workflow_id": "w1"},
            ("acme", "w1"),
            None,
            ("acme", "refund", "r1"),
        ),
        ("wallet.refund", {"org_id": "acme", "refund_id": "r1", "credits": 1}, None, None, ("acme", "refund", "r1")),
        ("wallet.reverse", reverse(), None, None, ("acme", "reversal", "r1")),
    ],
)
def test_a_message_says_which_records_it_names(
    task: str,
    fields: dict[str, Any],
    workflow: tuple[str, str] | None,
    subscription: tuple[str, str] | None,
    posted: tuple[str, str, str] | None,
) -> None:
    message = read(task, fields)
    assert (message.workflow_key, message.subscription_key) == (workflow, subscription)
    assert (message.posted_key if isinstance(message, WalletMessage) else None) == posted
