"""The producer for workflow engines and billing systems written in Python.

    client = Client("redis://broker:6379/0")
    decision = client.start(org_id="acme", workflow_id="run-1", credits=50, wait_s=5)

A message is checked before it is sent. When a call returns, the broker has the message; when it raises NotSentError,
the broker may or may not have it. Sending the same message again is always safe: it is applied once.
"""

from datetime import datetime
from typing import Any, Self, TypedDict, Unpack, overload

from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from ledger.messages import InvalidMessage, parse
from ledger.state import Result
from worker.broker import create_celery

_RETRY_POLICY = {"max_retries": 3, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 1.0}


class InvalidMessageError(ValueError):
    """The message is not valid; nothing was sent. The text says what is wrong with it."""


class NotSentError(Exception):
    """The message could not be handed to the broker. Sending it again is safe."""


class NoAnswerError(Exception):
    """The message was sent, but its answer did not come in time. It is still applied; sending it again is safe."""


class DeadLetteredError(Exception):
    """The message arrived but could not be applied, and was kept as a dead letter. The text says why."""


class Options(TypedDict, total=False):
    """What every message may carry besides its own fields."""

    source: str
    occurred_at: datetime | str
    metadata: dict[str, Any]


class Client:
    """Sends messages to the ledger. One client may be used by many threads.

    Every method takes `wait_s`: how many seconds to wait for the answer. Without it the method returns None as soon as
    the broker has the message; with it, the Result. Raises InvalidMessageError, NotSentError and, with `wait_s`,
    NoAnswerError and DeadLetteredError.
    """

    def __init__(self, broker_url: str, *, result_url: str | None = None) -> None:
        """`result_url`: where answers are kept, `redis://`; default: the broker, if that is Redis."""
        if result_url is None and broker_url.startswith(("redis://", "rediss://")):
            result_url = broker_url
        self._result_url = result_url
        self._celery = create_celery("holdfast-client", broker_url, result_url)

    def close(self) -> None:
        """Close the connections."""
        self._celery.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @overload
    def start(
        self,
        *,
        org_id: str,
        workflow_id: str,
        credits: int,
        project_id: str | None = ...,
        activity_name: str | None = ...,
        expires_in_s: int | None = ...,
        wait_s: float,
        **options: Unpack[Options],
    ) -> Result: ...

    @overload
    def start(
        self,
        *,
        org_id: str,
        workflow_id: str,
        credits: int,
        project_id: str | None = ...,
        activity_name: str | None = ...,
        expires_in_s: int | None = ...,
        wait_s: None = ...,
        **options: Unpack[Options],
    ) -> None: ...

    def start(
        self,
        *,
        org_id: str,
        workflow_id: str,
        credits: int,
        project_id: str | None = None,
        activity_name: str | None = None,
        expires_in_s: int | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """Reserve `credits` for a workflow, for at most `expires_in_s` seconds (60-2592000; default: a day)."""
        return self._send(
            "workflow.start",
            wait_s,
            options,
            org_id=org_id,
            workflow_id=workflow_id,
            credits=credits,
            project_id=project_id,
            activity_name=activity_name,
            expires_in_s=expires_in_s,
        )

    def finish(
        self,
        *,
        org_id: str,
        workflow_id: str,
        credits: int,
        project_id: str | None = None,
        activity_name: str | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """The workflow is done and used `credits`: release what it held, charge what it used."""
        return self._send(
            "workflow.finish",
            wait_s,
            options,
            org_id=org_id,
            workflow_id=workflow_id,
            credits=credits,
            project_id=project_id,
            activity_name=activity_name,
        )

    def cancel(
        self,
        *,
        org_id: str,
        workflow_id: str,
        reason: str | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """The workflow was cancelled: release what it held."""
        return self._send("workflow.cancel", wait_s, options, org_id=org_id, workflow_id=workflow_id, reason=reason)

    def fail(
        self,
        *,
        org_id: str,
        workflow_id: str,
        reason: str | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """The workflow failed: release what it held."""
        return self._send("workflow.fail", wait_s, options, org_id=org_id, workflow_id=workflow_id, reason=reason)

    def purchase(
        self, *, org_id: str, purchase_id: str, credits: int, wait_s: float | None = None, **options: Unpack[Options]
    ) -> Result | None:
        """The organization bought prepaid `credits`."""
        return self._send("wallet.purchase", wait_s, options, org_id=org_id, purchase_id=purchase_id, credits=credits)

    def grant(
        self,
        *,
        org_id: str,
        grant_id: str,
        credits: int,
        reason: str | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """The organization was given prepaid `credits`."""
        return self._send(
            "wallet.grant", wait_s, options, org_id=org_id, grant_id=grant_id, credits=credits, reason=reason
        )

    def adjust(
        self,
        *,
        org_id: str,
        adjustment_id: str,
        credits: int,
        reason: str,
        allow_negative: bool | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """Correct the prepaid balance by `credits`; below zero only with `allow_negative`."""
        return self._send(
            "wallet.adjust",
            wait_s,
            options,
            org_id=org_id,
            adjustment_id=adjustment_id,
            credits=credits,
            reason=reason,
            allow_negative=allow_negative,
        )

    def refund(
        self,
        *,
        org_id: str,
        refund_id: str,
        credits: int,
        workflow_id: str | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """Give `credits` back; for a named workflow never more, in total, than it used."""
        return self._send(
            "wallet.refund",
            wait_s,
            options,
            org_id=org_id,
            refund_id=refund_id,
            credits=credits,
            workflow_id=workflow_id,
        )

    def bill(
        self,
        *,
        org_id: str,
        billing_id: str,
        credits: int,
        invoice_id: str | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """A billing entry of `credits`: positive, negative, or 0 for the record."""
        return self._send(
            "wallet.bill",
            wait_s,
            options,
            org_id=org_id,
            billing_id=billing_id,
            credits=credits,
            invoice_id=invoice_id,
        )

    def subscribe(
        self,
        *,
        org_id: str,
        subscription_id: str,
        version: int,
        plan: str,
        monthly_credits: int,
        rollover_limit: int | None = None,
        anchor: datetime | str | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """The organization gets `monthly_credits` every month, counted from `anchor` (default: when first applied)."""
        return self._send(
            "wallet.subscribe",
            wait_s,
            options,
            org_id=org_id,
            subscription_id=subscription_id,
            version=version,
            plan=plan,
            monthly_credits=monthly_credits,
            rollover_limit=rollover_limit,
            anchor=anchor,
        )

    def unsubscribe(
        self,
        *,
        org_id: str,
        subscription_id: str,
        version: int,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """No further allocation; what is left expires when the period ends."""
        return self._send(
            "wallet.unsubscribe", wait_s, options, org_id=org_id, subscription_id=subscription_id, version=version
        )

    def configure(
        self,
        *,
        org_id: str,
        version: int,
        credit_limit: int | None = None,
        period_cap: int | None = None,
        wait_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result | None:
        """Set the wallet's limits, both: None is the default, no credit and no cap."""
        return self._send(
            "wallet.configure",
            wait_s,
            options,
            org_id=org_id,
            version=version,
            credit_limit=credit_limit,
            period_cap=period_cap,
        )

    def _send(self, task: str, wait_s: float | None, options: Options, **fields: object) -> Result | None:
        given = {name: value for name, value in {**fields, **options}.items() if value is not None}
        payload = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in given.items()}
        message = parse(task, payload)
        if isinstance(message, InvalidMessage):
            raise InvalidMessageError(message.error)
        return self.send_as_is(task, [payload], {}, wait_s=wait_s)

    def send_as_is(
        self, task: str, args: list[Any], kwargs: dict[str, Any], *, wait_s: float | None = None
    ) -> Result | None:
        """Send a task with these arguments, unchecked: how a dead letter is sent again. Raises as every method does."""
        if wait_s is not None and self._result_url is None:
            raise ValueError("wait_s needs a result_url: this broker keeps no answers")
        try:
            sent = self._celery.send_task(
                task,
                args=args,
                kwargs=kwargs,
                ignore_result=wait_s is None,
                retry=True,
                retry_policy=_RETRY_POLICY,
            )
        except (KombuError, RedisError, OSError) as error:
            raise NotSentError(f"{task} could not be handed to the broker, and may be sent again: {error}") from error
        return None if wait_s is None else self._answer(task, sent, wait_s)

    def _answer(self, task: str, sent: AsyncResult, wait_s: float) -> Result:
        try:
            answer = sent.get(timeout=wait_s, propagate=False)
        except CeleryTimeoutError:
            raise NoAnswerError(f"{task} was sent, but no answer came within {wait_s:g} s") from None
        except RedisError as error:
            raise NoAnswerError(f"{task} was sent, but its answer could not be read: {error}") from error
        sent.forget()
        if isinstance(answer, BaseException):
            raise DeadLetteredError(str(answer))
        return Result(**{**answer, "event_seqs": tuple(answer["event_seqs"])})
