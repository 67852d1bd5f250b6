"""The forms of operators: what is typed is understood, or said to be wrong, and becomes a message to the ledger."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from api_stub import forms
from api_stub.forms import FORMS
from holdfast_client.messages import OPERATOR, InvalidMessage, parse
from ledger.actions import KINDS, Place

TEMPLATES = Path(forms.__file__).parent / "templates"
TYPED = {
    "grant": {"credits": "1,000", "last_day": "2999-12-30", "why": "goodwill"},
    "adjust": {"credits": "−5", "allow_negative": "yes", "why": "counted twice"},
    "refund": {"workflow_id": "run-1", "credits": "+60", "why": " it \n failed "},
    "reverse": {"purchase_id": "order-1", "credits": "", "payment": "disputed", "why": "chargeback"},
    "release": {"workflow_id": "run-2", "why": "lost"},
    "limits": {"credit_limit": "0", "period_cap": "", "why": "as agreed"},
}
SENT: dict[str, dict[str, Any]] = {
    "grant": {"grant_id": "7", "credits": 1000, "expires_at": "2999-12-31T00:00:00+00:00", "reason": "goodwill"},
    "adjust": {"adjustment_id": "7", "credits": -5, "allow_negative": True, "reason": "counted twice"},
    "refund": {"refund_id": "7", "credits": 60, "workflow_id": "run-1"},
    "reverse": {"reversal_id": "7", "purchase_id": "order-1", "credits": None, "reason": "disputed"},
    "release": {"workflow_id": "run-2", "reason": "lost"},
    "limits": {"version": 7, "credit_limit": 0, "period_cap": None, "reason": "as agreed"},
}
WHY = {"refund": {"reason": "it failed"}, "reverse": {"given_reason": "chargeback"}}
"""The reason in the metadata, where the message has no field for it."""


@pytest.mark.parametrize("name", FORMS)
def test_what_is_typed_becomes_a_message_that_says_who_sent_it(name: str) -> None:
    form = FORMS[name]
    values, errors = form.understood(TYPED[name])
    assert errors == {}
    payload = form.payload("acme", "7", values, by="olga")
    metadata = {**WHY.get(name, {}), "by": "olga"}
    assert payload == {"org_id": "acme", **SENT[name], "source": OPERATOR, "metadata": metadata}
    message = parse(form.message.task, payload)
    assert not isinstance(message, InvalidMessage), message


@pytest.mark.parametrize("name", FORMS)
def test_every_field_that_is_needed_is_asked_for(name: str) -> None:
    needed = {field.name for field in FORMS[name].fields if not field.is_optional}
    assert set(FORMS[name].understood({})[1]) == needed
    assert forms.WHY in needed


def test_what_operators_do_has_a_kind_and_words_for_it() -> None:
    assert {form.key for form in FORMS.values()} <= set(KINDS)
    words = (TEMPLATES / "console_shared.html").read_text().partition("{% set names = {")[2].partition("}")[0]
    assert all(f"'{kind}':" in words for kind in KINDS)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("12", 12), ("+12", 12), ("1,000", 1000), ("1 000", 1000), ("1\N{NO-BREAK SPACE}000", 1000)],
)
def test_a_number_is_read_as_people_write_it(text: str, number: int) -> None:
    assert forms.whole_number(0, 1000)(text) == number


@pytest.mark.parametrize("text", ["", "-1", "1001", "1.5", "1,5", "5,00", "1 5", ",5", "1e3", "ten", "١٢", "9" * 40])
def test_what_is_no_such_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Enter a whole number from 0 to 1,000\."):
        forms.whole_number(0, 1000)(text)


def test_a_last_day_is_not_over() -> None:
    today = datetime.now(UTC).date()
    assert forms.last_day(today.isoformat()) == f"{today + timedelta(days=1)}T00:00:00+00:00"
    for text in ("2020-01-01", "2999-12-31", "soon"):
        with pytest.raises(ValueError, match="Enter a da"):
            forms.last_day(text)


def test_the_place_of_an_action_can_be_written_and_read() -> None:
    now = datetime(2026, 1, 31, 9, 0, 0, 123_456, tzinfo=UTC)
    for place in (Place(now, True, "acme", 7), Place(now, False, "", 12)):
        assert Place.read(str(place)) == place
    for text in ("", "a~b~c~d", f"{now.isoformat()}~event~a b~7", f"{now.isoformat()}~other~acme~7", "x~letter~~1"):
        with pytest.raises(ValueError, match=r".+"):
            Place.read(text)
