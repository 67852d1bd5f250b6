"""The trace context of a message: what is one, and where spans go."""

import sys

import pytest

from ledger import traces
from ledger.settings import SettingsError

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GOOD = f"00-{TRACE}-00f067aa0ba902b7-01"


def test_a_context_of_w3c_is_taken_and_names_its_trace() -> None:
    assert traces.valid(GOOD) == GOOD
    assert traces.trace_id(GOOD) == TRACE
    assert traces.of(GOOD) == {"trace_id": TRACE}


@pytest.mark.parametrize(
    "bad",
    [
        *(None, 7, [GOOD], {"traceparent": GOOD}, GOOD.encode(), ""),
        GOOD.upper(),
        f"{GOOD}\n",
        f" {GOOD}",
        f"{GOOD}-x",
        f"ff{GOOD[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-00f067aa0ba902b7-01",
        f"00-{TRACE[:-1]}g-00f067aa0ba902b7-01",
        GOOD * 1_000,
    ],
    ids=repr,
)
def test_whatever_is_no_context_is_ignored(bad: object) -> None:
    assert traces.valid(bad) is None


def test_without_one_nothing_is_said() -> None:
    assert traces.trace_id(None) is None
    assert traces.of(None) == {}


@pytest.mark.parametrize("name", traces.ENDPOINTS)
def test_a_collector_without_the_packages_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in traces.ENDPOINTS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    traces.export("worker", most_links=1)
    monkeypatch.setenv(name, "")
    traces.export("worker", most_links=1)
    monkeypatch.setenv(name, "http://collector:4318")
    with pytest.raises(SettingsError) as refused:
        traces.export("worker", most_links=1)
    assert str(refused.value) == (
        f"{name} is set, and the package opentelemetry.sdk.resources is missing: "
        "install the extra `otel`, in a checkout with: pip install ./client '.[otel]'"
    )
