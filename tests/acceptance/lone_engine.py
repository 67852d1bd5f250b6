"""An engine that has the client alone: it sends in every way, and tells what it was answered."""

import json

from tests.wheels import Environment

ENGINE = """
import asyncio, json, sys
from pathlib import Path
from holdfast_client import ENGINE_QUEUE, AsyncClient, Client, DeadLetteredError, NoAnswerError
org_id, broker_url, result_url = sys.argv[1:]
told = {}
with Client(broker_url, result_url=result_url) as billing:
    told["purchase"] = billing.purchase(org_id=org_id, purchase_id="order-1", credits=500, wait_s=30).available
    told["sees a worker"] = billing.sees_worker()
    told["waiting"] = [waiting.messages for waiting in billing.waiting().values()]
    try:
        billing.reverse(org_id=org_id, reversal_id="r", purchase_id="unknown", reason="disputed", wait_s=30)
    except DeadLetteredError as error:
        told["reverse"] = error.code
with Client(broker_url, queue=ENGINE_QUEUE, result_url=result_url) as engine:
    told["start"] = engine.start(org_id=org_id, workflow_id="run-1", credits=75, wait_s=30).holds
    with engine.batch() as batch:
        for number in range(3):
            batch.start(org_id=org_id, workflow_id=f"batch-{number}", credits=1)
async def run():
    async with AsyncClient(broker_url, queue=ENGINE_QUEUE, result_url=result_url) as engine:
        told["finish"] = (await engine.finish(org_id=org_id, workflow_id="run-1", credits=80, wait_s=30)).outcome
        try:
            await engine.cancel(org_id=org_id, workflow_id="run-1", wait_s=0)
        except NoAnswerError as error:
            told["cancel"] = str(error).partition(":")[0]
asyncio.run(run())
if Path("worker.py").exists():
    import celery, worker
    told["beside"] = [worker.__file__, worker.app.main, celery.__version__]
print(json.dumps(told))
"""
TOLD = {
    "purchase": 500,
    "sees a worker": True,
    "waiting": [0, 0],
    "reverse": "unknown_purchase",
    "start": True,
    "finish": "settled",
    "cancel": "workflow.cancel was sent, but no answer came within 0 s",
}


def told(environment: Environment, *arguments: str) -> dict[str, object]:
    """What the engine is told, in the folder of this environment, with these arguments."""
    (environment.folder / "engine.py").write_text(ENGINE)
    done = environment.run(environment.python, "engine.py", *arguments, cwd=environment.folder)
    assert (done.returncode, done.stderr) == (0, "")
    answer: dict[str, object] = json.loads(done.stdout)
    return answer
