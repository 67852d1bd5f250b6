from sqlalchemy import Engine

from ledger import audit, store
from tests.support import delivery


def test_smoke(engine: Engine) -> None:
    r = store.apply_batch(
        engine,
        [
            delivery("wallet.purchase", org_id="a", purchase_id="p1", credits=500),
            delivery("workflow.start", org_id="a", workflow_id="w1", credits=75),
            delivery("workflow.finish", org_id="a", workflow_id="w1", credits=80),
            delivery("wallet.subscribe", org_id="a", subscription_id="s", version=1, plan="p", monthly_credits=100),
            delivery("wallet.subscribe", org_id="a", subscription_id="s", version=2, plan="p", monthly_credits=200),
            delivery("wallet.refund", org_id="a", refund_id="r", credits=5, workflow_id="w1"),
        ],
    )
    print(r)
    v = audit.verify(engine)
    assert v.is_clean, v.findings
