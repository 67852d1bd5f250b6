"""A workflow engine that is a Celery application: before each run it asks the ledger, and after it says what was used.

The id of the task is the id of the run. So a task that is delivered again is the same run, and is charged once.
"""

import os
import sys

from celery import Celery, Task

from holdfast_client.broker import ENGINE_QUEUE
from holdfast_client.client import Client

CREDITS_PER_PAGE = 2

app = Celery("reports", broker=os.environ["REPORTS_BROKER_URL"])
app.conf.update(task_default_queue="reports", task_acks_late=True, task_ignore_result=True)
ledger = Client(os.environ["HOLDFAST_ENGINE_BROKER_URL"], queue=ENGINE_QUEUE)


@app.task(name="reports.render", bind=True)
def render(self: Task, org_id: str, pages: int) -> str:
    """Render a report of so many pages, if the organization has the credits."""
    run = {"org_id": org_id, "workflow_id": self.request.id}
    decision = ledger.start(**run, credits=CREDITS_PER_PAGE * pages, activity_name="report", wait_s=10)
    if not decision.holds:  # rejected, or the run has ended before
        return f"not rendered: {decision.reason or decision.state}"
    try:
        rendered = _render(pages)
    except Exception as error:
        ledger.fail(**run, reason=str(error)[:200])  # nothing is charged
        raise
    ledger.finish(**run, credits=CREDITS_PER_PAGE * rendered)
    return f"rendered {rendered} pages"


def _render(pages: int) -> int:
    """The work itself. Returns how many pages there are."""
    if pages > 100:
        raise ValueError("a report has at most 100 pages")
    return pages - pages // 10  # empty pages are left out


if __name__ == "__main__":  # python engine.py ORGANIZATION PAGES
    org_id, pages = sys.argv[1:]
    print(render.delay(org_id, int(pages)).id)
