"""What a type checker knows of the producer: without `wait_s` there is no answer, with it there is one.

`make lint` is what checks the types; here nothing is sent.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import assert_type

from holdfast_client.async_client import AsyncClient
from holdfast_client.client import Batch, Client
from holdfast_client.messages import MESSAGES
from holdfast_client.results import Result
from holdfast_client.unanswered import Unanswered


def _each_message(client: Client) -> None:
    """Never called."""
    assert_type(client.start(org_id="acme", workflow_id="run", credits=5), Unanswered)
    assert_type(client.start(org_id="acme", workflow_id="run", credits=5, wait_s=1), Result)
    assert_type(client.finish(org_id="acme", workflow_id="run", credits=5), Unanswered)
    assert_type(client.finish(org_id="acme", workflow_id="run", credits=5, wait_s=1), Result)
    assert_type(client.cancel(org_id="acme", workflow_id="run"), Unanswered)
    assert_type(client.cancel(org_id="acme", workflow_id="run", wait_s=1), Result)
    assert_type(client.fail(org_id="acme", workflow_id="run"), Unanswered)
    assert_type(client.fail(org_id="acme", workflow_id="run", wait_s=1), Result)
    assert_type(client.purchase(org_id="acme", purchase_id="order", credits=5), Unanswered)
    assert_type(client.purchase(org_id="acme", purchase_id="order", credits=5, wait_s=1), Result)
    assert_type(client.grant(org_id="acme", grant_id="gift", credits=5), Unanswered)
    assert_type(client.grant(org_id="acme", grant_id="gift", credits=5, wait_s=1), Result)
    assert_type(client.adjust(org_id="acme", adjustment_id="fix", credits=5, reason="typo"), Unanswered)
    assert_type(client.adjust(org_id="acme", adjustment_id="fix", credits=5, reason="typo", wait_s=1), Result)
    assert_type(client.refund(org_id="acme", refund_id="back", credits=5), Unanswered)
    assert_type(client.refund(org_id="acme", refund_id="back", credits=5, wait_s=1), Result)
    assert_type(client.bill(org_id="acme", billing_id="bill", credits=5), Unanswered)
    assert_type(client.bill(org_id="acme", billing_id="bill", credits=5, wait_s=1), Result)
    assert_type(client.reverse(org_id="acme", reversal_id="back", purchase_id="order", reason="disputed"), Unanswered)
    assert_type(
        client.reverse(org_id="acme", reversal_id="back", purchase_id="order", reason="disputed", wait_s=1), Result
    )
    assert_type(
        client.subscribe(org_id="acme", subscription_id="sub", version=1, plan="team", monthly_credits=5), Unanswered
    )
    assert_type(
        client.subscribe(org_id="acme", subscription_id="sub", version=1, plan="team", monthly_credits=5, wait_s=1),
        Result,
    )
    assert_type(client.unsubscribe(org_id="acme", subscription_id="sub", version=1), Unanswered)
    assert_type(client.unsubscribe(org_id="acme", subscription_id="sub", version=1, wait_s=1), Result)
    assert_type(client.configure(org_id="acme", version=1), Unanswered)
    assert_type(client.configure(org_id="acme", version=1, wait_s=1), Result)


async def _each_awaited(client: AsyncClient) -> None:
    """Never called."""
    assert_type(await client.start(org_id="acme", workflow_id="run", credits=5), Unanswered)
    assert_type(await client.start(org_id="acme", workflow_id="run", credits=5, wait_s=1), Result)
    assert_type(await client.finish(org_id="acme", workflow_id="run", credits=5), Unanswered)
    assert_type(await client.finish(org_id="acme", workflow_id="run", credits=5, wait_s=1), Result)
    assert_type(await client.cancel(org_id="acme", workflow_id="run"), Unanswered)
    assert_type(await client.cancel(org_id="acme", workflow_id="run", wait_s=1), Result)
    assert_type(await client.fail(org_id="acme", workflow_id="run"), Unanswered)
    assert_type(await client.fail(org_id="acme", workflow_id="run", wait_s=1), Result)
    assert_type(await client.purchase(org_id="acme", purchase_id="order", credits=5), Unanswered)
    assert_type(await client.purchase(org_id="acme", purchase_id="order", credits=5, wait_s=1), Result)
    assert_type(await client.grant(org_id="acme", grant_id="gift", credits=5), Unanswered)
    assert_type(await client.grant(org_id="acme", grant_id="gift", credits=5, wait_s=1), Result)
    assert_type(await client.adjust(org_id="acme", adjustment_id="fix", credits=5, reason="typo"), Unanswered)
    assert_type(await client.adjust(org_id="acme", adjustment_id="fix", credits=5, reason="typo", wait_s=1), Result)
    assert_type(await client.refund(org_id="acme", refund_id="back", credits=5), Unanswered)
    assert_type(await client.refund(org_id="acme", refund_id="back", credits=5, wait_s=1), Result)
    assert_type(await client.bill(org_id="acme", billing_id="bill", credits=5), Unanswered)
    assert_type(await client.bill(org_id="acme", billing_id="bill", credits=5, wait_s=1), Result)
    assert_type(
        await client.reverse(org_id="acme", reversal_id="back", purchase_id="order", reason="disputed"), Unanswered
    )
    assert_type(
        await client.reverse(org_id="acme", reversal_id="back", purchase_id="order", reason="disputed", wait_s=1),
        Result,
    )
    assert_type(
        await client.subscribe(org_id="acme", subscription_id="sub", version=1, plan="team", monthly_credits=5),
        Unanswered,
    )
    assert_type(
        await client.subscribe(
            org_id="acme", subscription_id="sub", version=1, plan="team", monthly_credits=5, wait_s=1
        ),
        Result,
    )
    assert_type(await client.unsubscribe(org_id="acme", subscription_id="sub", version=1), Unanswered)
    assert_type(await client.unsubscribe(org_id="acme", subscription_id="sub", version=1, wait_s=1), Result)
    assert_type(await client.configure(org_id="acme", version=1), Unanswered)
    assert_type(await client.configure(org_id="acme", version=1, wait_s=1), Result)


def _each_gathered(batch: Batch) -> None:
    """Never called."""
    assert_type(batch.start(org_id="acme", workflow_id="run", credits=5), Unanswered)


def test_the_types_of_every_message_are_checked() -> None:
    for each in (_each_message, _each_awaited):
        named = re.findall(r"client\.(\w+)\(", inspect.getsource(each))
        assert sorted(named) == sorted(2 * [task.split(".")[1] for task in MESSAGES])


def test_a_producer_needs_no_plugin_for_pydantic_to_have_its_calls_checked() -> None:
    """Whoever installs the client checks against it with the settings of their own project, or with pyright."""
    root = Path(__file__).parents[2]
    options = ["--config-file=", "--strict", f"--cache-dir={root / '.mypy_cache' / 'without_plugin'}"]
    command = [sys.executable, "-m", "mypy", *options, __file__]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
