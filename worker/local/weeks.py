"""Three weeks of two customers, with which a new ledger of `holdfast up` begins, so that its pages are not empty.

Everything is applied by the ledger's own rules, as if each message had come at its time. It is the same at every start,
but for the time of day and the day of the week.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, time, timedelta
from operator import itemgetter
from random import Random
from typing import Any, NamedTuple

from sqlalchemy import Engine, select

from holdfast_client.messages import MESSAGES
from ledger import bodies
from ledger.store import Delivery, apply_batch, apply_past
from ledger.tables import wallets

ORGANIZATION = "northwind"
"""The customer with a plan, purchases and many runs."""
OVERDRAWN = "initech"
"""The customer with a debt, and with refunds that came before the runs that they are of."""

DAYS = 21
SUBSCRIBED_BEFORE = 40
"""So many days ago the plan began, elsewhere: its period changes 9 to 12 days ago."""
JUST_NOW = timedelta(minutes=50)
"""What happened within this time is told message by message."""

Step = tuple[datetime, str, dict[str, Any]]
Moments = Callable[[int, float], datetime]
"""The moment so many days before today, and so many hours after its midnight."""


class _Job(NamedTuple):
    project_id: str
    activity_name: str
    name: str
    estimate: int
    a_day: int
    """The runs of a working day."""


_JOBS = (
    _Job("churn-model", "Train churn model", "train", 129, 2),
    _Job("churn-model", "Score customers", "score", 36, 3),
    _Job("support-bot", "Answer tickets", "tickets", 18, 4),
    _Job("support-bot", "Summarize calls", "calls", 45, 2),
    _Job("catalog", "Translate products", "translate", 64, 1),
    _Job("website", "Weekly report", "report", 24, 1),
)


def tell(engine: Engine, now: datetime) -> bool:
    """Write the three weeks before `now` into a ledger without any wallet. False: it has one, and stays as it is."""
    with engine.connect() as connection:
        if connection.scalar(select(wallets.c.org_id).limit(1)) is not None:
            return False
    # Before the runs: as if they had overtaken the finishes.
    for refund in _EARLY_REFUNDS:
        apply_batch(engine, [Delivery("wallet.refund", refund, bodies.written([refund], {}))])
    for org_id, steps in ((OVERDRAWN, initech(now)), (ORGANIZATION, northwind(now))):
        in_order = sorted(steps, key=itemgetter(0))
        apply_past(engine, [(at, MESSAGES[task](org_id=org_id, **fields)) for at, task, fields in in_order])
    return True


def northwind(now: datetime) -> Iterator[Step]:
    """The messages of the customer with a plan, in any order."""
    midnight = datetime.combine(now.astimezone(UTC), time.min, UTC)

    def on(days_ago: int, hours: float) -> datetime:
        return midnight - timedelta(days=days_ago) + timedelta(hours=hours)

    yield from _billing(on, now.year)
    yield from _troubles(on)
    for days_ago in range(DAYS, -1, -1):
        yield from _runs_of(on(days_ago, 0), until=now - JUST_NOW)
    for minutes, name, job in ((38, "train-now", _JOBS[0]), (11, "calls-now", _JOBS[3]), (4, "tickets-now", _JOBS[2])):
        yield now - timedelta(minutes=minutes), "workflow.start", _start(job, name)


def _billing(on: Moments, year: int) -> Iterator[Step]:
    anchor = on(SUBSCRIBED_BEFORE, 0).isoformat()
    terms = {"plan": "Team", "monthly_credits": 5_000, "rollover_limit": 1_000}
    yield (
        on(DAYS, 0.1),
        "wallet.subscribe",
        {"subscription_id": "sub-northwind", "version": 1, **terms, "anchor": anchor},
    )
    yield on(DAYS, 0.2), "wallet.configure", {"version": 1, "period_cap": 9_000}
    workshop = {"reason": "onboarding workshop", "expires_at": on(19, 18).isoformat()}
    yield on(20, 8), "wallet.grant", {"grant_id": "workshop", "credits": 1_500, **workshop}
    yield on(18, 10.4), "wallet.purchase", {"purchase_id": "order-1047", "credits": 1_500}
    yield on(13, 15.2), "wallet.adjust", {
        "adjustment_id": "adj-31", "credits": -40, "reason": "order-1047 was bought with a voucher of 1,460"
    }  # fmt: skip
    yield on(6, 9.7), "wallet.purchase", {"purchase_id": "order-1062", "credits": 2_000}
    yield on(5, 9.0), "wallet.bill", {
        "billing_id": "bill-1201", "credits": 0, "invoice_id": f"INV-{year}-1201",
        "metadata": {"description": "Priority support"},
    }  # fmt: skip
    thanks = {"reason": "thank you for the review", "expires_at": on(-60, 0).isoformat()}
    yield on(4, 12.0), "wallet.grant", {"grant_id": "review", "credits": 250, **thanks}


def _troubles(on: Moments) -> Iterator[Step]:
    """A cancelled run; a failed one, and its second try, which overruns and is refunded in part; a refused one."""
    train, translate = _JOBS[0], _JOBS[4]
    yield on(15, 11.0), "workflow.start", _start(translate, "translate-old-shop")
    yield (
        on(15, 11.3),
        "workflow.cancel",
        {"workflow_id": "translate-old-shop", "reason": "the user changed their mind"},
    )
    yield on(8, 13.0), "workflow.start", _start(train, "train-q4")
    yield on(8, 13.6), "workflow.fail", {"workflow_id": "train-q4", "reason": "out of memory"}
    yield on(8, 13.8), "workflow.start", _start(train, "train-q4-again")
    yield on(8, 15.1), "workflow.finish", {"workflow_id": "train-q4-again", "credits": 212}
    yield on(7, 9.5), "wallet.refund", {
        "refund_id": "refund-17", "workflow_id": "train-q4-again", "credits": 120, "source": "support",
        "metadata": {"reason": "goodwill", "ticket": "SUP-8821"},
    }  # fmt: skip
    yield on(3, 16.0), "workflow.start", {**_start(train, "train-everything"), "credits": 9_500}


def _runs_of(day: datetime, *, until: datetime) -> Iterator[Step]:
    """The runs of a day that end before `until`: fewer at the weekend."""
    random = Random(f"{ORGANIZATION} {day:%j}")  # noqa: S311 - a story
    is_weekend = day.weekday() >= 5
    for job in _JOBS:
        for number in range(-(-job.a_day // 4) if is_weekend else job.a_day):
            # Most people work before noon, or after.
            begins = day + timedelta(hours=min(max(random.gauss(random.choice((9.5, 14.5)), 1.2), 6), 20))
            ends = begins + timedelta(minutes=random.uniform(2, 45))
            is_over = random.random() < 0.08
            share = random.uniform(1.05, 1.3) if is_over else random.uniform(0.45, 1)
            if ends < until:
                name = f"{job.name}-{day:%m%d}-{number + 1}"
                yield begins, "workflow.start", _start(job, name)
                yield ends, "workflow.finish", {"workflow_id": name, "credits": round(job.estimate * share)}


def _start(job: _Job, workflow_id: str) -> dict[str, Any]:
    about = {"project_id": job.project_id, "activity_name": job.activity_name}
    return {"workflow_id": workflow_id, "credits": job.estimate, **about}


_IMPORTS = {10: 48, 8: 61, 5: 37, 2: 464}
"""The runs of the customer with a debt: how many days ago each began, and what it used."""
_EARLY_REFUNDS = [
    {"org_id": OVERDRAWN, "refund_id": f"refund-{number}", "workflow_id": f"import-{days_ago}", "credits": 20}
    for number, days_ago in enumerate(_IMPORTS, start=41)
]


def initech(now: datetime) -> Iterator[Step]:
    """The messages of the customer with a debt, in any order."""
    plan = {"subscription_id": "sub-initech", "version": 1, "plan": "Starter", "monthly_credits": 200}
    about = {"project_id": "crm", "activity_name": "Import contacts", "credits": 50}
    yield now - timedelta(days=11, hours=3), "wallet.subscribe", plan
    for days_ago, used in _IMPORTS.items():
        began, run = now - timedelta(days=days_ago), f"import-{days_ago}"
        yield began, "workflow.start", {**about, "workflow_id": run}
        yield began + timedelta(minutes=20), "workflow.finish", {"workflow_id": run, "credits": used}
    yield now - timedelta(hours=20), "workflow.start", {**about, "workflow_id": "import-1"}
