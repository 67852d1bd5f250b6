"""What a start would be answered, for programs."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Query
from pydantic import AfterValidator

from api_stub import answers, errors
from api_stub.problems import RETRY, Problem
from api_stub.rights import IS_AN_ID, ReadableOrg
from api_stub.services import Using
from holdfast_client.messages import MAX_AMOUNT
from ledger import filters, quotes


def add(app: FastAPI) -> None:
    """Add the route for quotes."""

    @app.get(
        "/api/organizations/{orgId}/quote",
        tags=["workflows"],
        response_model=answers.Quote,
        responses=errors.READ_RESPONSES,
    )
    def quote(
        org_id: ReadableOrg,
        using: Using,
        credits: Annotated[int, Query(ge=0, le=MAX_AMOUNT, description="The credits that the start would reserve.")],
        _: Annotated[
            str | None,
            Query(
                alias="project_id",
                description="The start's project. It has no effect on the answer: no limit is a project's own.",
                json_schema_extra=IS_AN_ID,
            ),
            AfterValidator(filters.identifier),
        ] = None,
    ) -> dict[str, Any]:
        """What a start would be answered now. This holds nothing, so the start itself may be answered otherwise."""
        with using.reading() as ledger:
            try:
                found = quotes.quote(ledger, org_id, credits)
            except quotes.MuchDueError:
                detail = "Much is due in this wallet, and a start would have to wait for it; try again in a minute."
                raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, RETRY) from None
        limits = [{**limit._asdict(), "remaining": limit.remaining} for limit in found.limits]
        return {**found._asdict(), "limits": limits}
