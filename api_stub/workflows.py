"""One workflow's state, for programs."""

import re
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Path

from api_stub import answers, errors
from api_stub.problems import Problem
from api_stub.rights import IS_AN_ID, ReadableOrg
from api_stub.services import Using
from holdfast_client.messages import ID_PATTERN
from ledger import history, views

WorkflowId = Annotated[str, Path(alias="workflowId", description="The workflow's id.", json_schema_extra=IS_AN_ID)]


def add(app: FastAPI) -> None:
    """Add the route for one workflow."""

    @app.get(
        "/api/organizations/{orgId}/workflows/{workflowId}",
        tags=["workflows"],
        response_model=answers.Workflow,
        responses=errors.READ_RESPONSES,
    )
    def workflow(org_id: ReadableOrg, workflow_id: WorkflowId, using: Using) -> dict[str, Any]:
        """A workflow: its state, reservation and usage, and its events and refunds, oldest first."""
        found = None
        if re.fullmatch(ID_PATTERN, workflow_id):
            with using.reading() as ledger:
                found = views.workflow(ledger, org_id, workflow_id)
        if found is None:
            raise Problem(HTTPStatus.NOT_FOUND, "There is no such workflow in this organization.")
        return {**asdict(found), "events": [history.as_item(event) for event in found.events]}
