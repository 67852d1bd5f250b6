"""A workflow engine that is a Celery application: before each run it asks the ledger, and after it says what was used.

The id of the task is the id of the run. So a task that is delivered again is the same run, and is charged once.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from celery import Celery, Task

from holdfast_client.broker import ENGINE_QUEUE
from holdfast_client.client import Client, NoAnswerError, NotSentError

CREDITS_PER_PAGE = 2

logger = logging.getLogger(__name__)
Told = TypeVar("Told")

app = Celery("reports", broker=os.environ["REPORTS_BROKER_URL"])
app.conf.update(task_default_queue="reports", task_acks_late=True, task_ignore_result=True)
ledger = Client(os.environ["HOLDFAST_ENGINE_BROKER_URL"], queue=ENGINE_QUEUE)


@app.task(name="reports.render", bind=True)
def render(self: Task, org_id: str, pages: int) -> str:
    """Render a report of so many pages, if the organization has the credits."""
    run = {"org_id": org_id, "workflow_id": self.request.id}
    estimate = CREDITS_PER_PAGE * pages
    decision = _told(lambda: ledger.start(**run, credits=estimate, activity_name="report", wait_s=10))
    if not decision.holds:  # rejected, or the run has ended before
        return f"not rendered: {decision.reason or decision.state}"
    try:
        rendered = _render(pages)
    except Exception as error:
        reason = str(error)[:200] or type(error).__name__
        _told(lambda: ledger.fail(**run, reason=reason))  # nothing is charged
        raise
    _told(lambda: ledger.finish(**run, credits=CREDITS_PER_PAGE * rendered))
    return f"rendered {rendered} pages"


def _told(send: Callable[[], Told]) -> Told:
    """Send the same message until the ledger's broker has it, and the answer is there if one is asked for.

    A task that failed instead would be acknowledged all the same, and nobody would charge what its run used.
    """
    while True:
        try:
            return send()
        except (NotSentError, NoAnswerError) as error:
            logger.warning("%s", error)
            time.sleep(1)


def _render(pages: int) -> int:
    """The work itself. Returns how many pages there are."""
    if pages > 100:
        raise ValueError("a report has at most 100 pages")
    return pages - pages // 10  # empty pages are left out


if __name__ == "__main__":  # python engine.py ORGANIZATION PAGES
    org_id, pages = sys.argv[1:]
    print(render.delay(org_id, int(pages)).id)
