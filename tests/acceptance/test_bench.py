"""The measuring instrument leaves out no figure, and notices what did not do its work. No test looks at a clock."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import redis
from sqlalchemy import Engine

from bench import past, stand
from bench.measures import QUICK, repetitions
from bench.report import BARS, Report, describe_machine
from bench.stand import Stand, check_ledger
from bench.workload import NotAccountedError, Workload
from ledger.store import apply_batch
from tests.installation import Fork
from tests.messages import delivery
from tests.support import sql
from worker.local.embedded import Embedded

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine

TINY = replace(
    QUICK,
    repetitions=1,
    organizations=10,
    messages=400,
    slow_messages=200,
    batches=(1, 200),
    sent_for_s=1,
    few_events=40,
    many_events=1_000,
    offset=100,
    subscribers=20,
)


@pytest.fixture
def funded(engine: Engine) -> Engine:
    past.fill(engine, organizations=10, workflows_each=3)
    return engine


@pytest.mark.soak
def test_every_measurement_runs_and_every_message_is_accounted_for(
    services: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody reads these figures: workers may start as forks, and need not be warm.
    monkeypatch.setattr(stand, "Process", Fork)
    monkeypatch.setattr(stand, "_WARM_UP", Workload.without_effect(50, organizations=10))
    with redis.Redis.from_url(services.broker_url) as broker:
        broker.flushdb()  # a benchmark's broker is new; this one has served other tests
    with Stand(services) as own:
        report = Report.of(repetitions(own, TINY, progress=print), describe_machine(own))
    as_json = json.loads(json.dumps(report.as_json()))
    assert {row["key"][0] for row in as_json["rows"]} == set("abcdefghijk")
    assert all(len(row["values"]) == 1 and row["median"] > 0 for row in as_json["rows"])
    assert [bar["key"] for bar in as_json["bars"]] == [bar.key for bar in BARS]
    assert "fsync off" in as_json["circumstances"]["database"]  # as tests have it; a report says so
    for row in report.rows.values():
        assert row.what in report.as_markdown()


@pytest.mark.soak
def test_any_installation_is_measured_by_its_urls(services: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand, "Process", Fork)
    monkeypatch.setattr(stand, "_WARM_UP", Workload.without_effect(50, organizations=10))
    with Stand(services) as own, own.database(stand.MIGRATED) as engine, own.holdfast(engine, workers=1):
        urls = ("--database", engine.url.render_as_string(hide_password=False), "--broker", services.broker_url)
        ended = subprocess.run(
            [sys.executable, "-m", "bench", *urls, "--messages", "100"], capture_output=True, text=True, check=True
        )
    assert re.fullmatch(r"[0-9,]+ messages/s, end to end \(100 messages of 10 organizations\)\n", ended.stdout)


def test_a_past_satisfies_every_invariant(funded: Engine) -> None:
    check_ledger(funded)
    [(events,)] = sql(funded, "SELECT count(*) FROM credit_events")
    assert events == 10 * (1 + 3 * 3)


def test_what_is_due_satisfies_every_invariant(engine: Engine) -> None:
    past.fill_due(engine, organizations=3)
    check_ledger(engine)


def test_a_workload_that_was_applied_is_accounted_for(funded: Engine) -> None:
    load = Workload.lifecycle(200, organizations=10)
    apply_batch(funded, load.deliveries)
    load.check(funded, used_before=3 * past.CREDITS_PER_WORKFLOW)


@pytest.mark.parametrize("lost", [0, 100, 199])
def test_a_message_that_was_lost_is_noticed(funded: Engine, lost: int) -> None:
    load = Workload.lifecycle(200, organizations=10)
    apply_batch(funded, load.deliveries[:lost] + load.deliveries[lost + 1 :])
    with pytest.raises(NotAccountedError, match="1 of 100 workflows differ from their messages"):
        load.check(funded, used_before=3 * past.CREDITS_PER_WORKFLOW)


def test_a_balance_that_is_not_what_the_messages_left_is_noticed(funded: Engine) -> None:
    load = Workload.lifecycle(200, organizations=10)
    grant = delivery("wallet.grant", org_id="org-3", grant_id="more", credits=1)
    apply_batch(funded, [*load.deliveries, grant])
    with pytest.raises(NotAccountedError, match="org-3 should have a prepaid balance"):
        load.check(funded, used_before=3 * past.CREDITS_PER_WORKFLOW)


def test_a_dead_letter_is_noticed(funded: Engine) -> None:
    apply_batch(funded, [delivery("wallet.grant", org_id="org-3")])
    with pytest.raises(NotAccountedError, match="1 messages became dead letters"):
        check_ledger(funded)


def test_a_broken_ledger_is_noticed(funded: Engine) -> None:
    sql(funded, "UPDATE wallets SET prepaid_balance = prepaid_balance + 1 WHERE org_id = 'org-5'")
    with pytest.raises(NotAccountedError, match=r"the ledger is broken: .* org-5"):
        check_ledger(funded)
