"""What used the credits of an organization: for programs, and as a file for spreadsheets."""

from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Response
from sqlalchemy import Connection

from api_stub import answers, errors, exports
from api_stub.exports import MOST_LINES
from api_stub.problems import Problem
from api_stub.reader import Reader
from api_stub.rights import ReadableOrg
from api_stub.services import Using
from api_stub.wallets import DateFrom, DateTo, time_range
from ledger import views
from ledger.filters import EventFilter
from ledger.usage import MOST_GROUPED_BY, MOST_GROUPS, Group, Rate, Usage, rate, usage, usage_of
from ledger.views import WalletView


class Asked:
    """What the query asks for."""

    def __init__(
        self,
        group_by: Annotated[
            list[Group] | None, Query(description=f"Repeatable: at most {MOST_GROUPED_BY} different ones.")
        ] = None,
        date_from: DateFrom = None,
        date_to: DateTo = None,
    ) -> None:
        self.group_by = tuple(dict.fromkeys(group_by or ()))
        if len(self.group_by) > MOST_GROUPED_BY:
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY, f"group_by may be given at most {MOST_GROUPED_BY} times, not more"
            )
        self.created_from, self.created_before = time_range(date_from, date_to)

    @property
    def matching(self) -> EventFilter:
        """The events that are added up."""
        return usage_of(EventFilter(created_from=self.created_from, created_before=self.created_before))

    def of(self, ledger: Connection, org_id: str, *, most: int) -> Usage:
        """The usage that is asked for."""
        return usage(
            ledger,
            org_id,
            self.group_by,
            created_from=self.created_from,
            created_before=self.created_before,
            most=most,
        )


AskedFor = Annotated[Asked, Depends()]


def add(app: FastAPI) -> None:
    """Add the routes of the usage."""

    @app.get(
        "/api/organizations/{orgId}/usage",
        tags=["credits"],
        response_model=answers.Usage,
        response_model_exclude_unset=True,
        responses=errors.READ_RESPONSES,
    )
    def usage_of(org_id: ReadableOrg, using: Using, asked: AskedFor) -> dict[str, Any]:
        """What used credits: usage by project, activity, source, day or month. Refunds are not subtracted."""

        def read(ledger: Connection) -> tuple[Usage, Rate | None]:
            view = views.wallet(ledger, org_id) or WalletView(org_id)
            speed = rate(ledger, org_id, available=view.available, now=datetime.now(UTC))
            return asked.of(ledger, org_id, most=MOST_GROUPS), speed

        reader = Reader(using)
        found, speed = reader.read(read, through=(org_id, asked.matching))
        return {
            "groups": found.groups,
            "total": {"credits": found.credits, "runs": found.runs},
            "truncated": found.truncated,
            "rate": None if speed is None else asdict(speed),
            "as_of": reader.as_of,
        }

    @app.get(
        "/api/organizations/{orgId}/usage.csv",
        tags=["credits"],
        response_class=Response,
        responses={**errors.READ_RESPONSES, 200: exports.DESCRIBED},
    )
    def usage_as_csv(org_id: ReadableOrg, using: Using, asked: AskedFor) -> Response:
        """The same as a file: a line a group."""
        reader = Reader(using)
        found = reader.read(lambda ledger: asked.of(ledger, org_id, most=MOST_LINES), through=(org_id, asked.matching))
        if found.truncated:
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"these are more than {MOST_LINES:,} groups: ask for a shorter range, or for fewer values of group_by",
            )
        file = exports.usage(asked.group_by, found)
        headers = exports.as_file(f"usage-{org_id}.csv", reader.as_of)
        return Response(file, media_type=exports.MEDIA_TYPE, headers=headers)
