"""`holdfast token`: a signed token for trying the HTTP interface. Production has an identity provider for that."""

import re
from typing import Annotated, get_args

import typer

from holdfast_client.messages import ID_PATTERN
from ledger.readable import escaped
from ledger.settings import Settings
from worker.cli.terminal import fail, one_line, this_person

app = typer.Typer()


@app.command(epilog="Example: holdfast token --org acme --scope credits:read")
def token(
    scopes: Annotated[
        list[str],
        typer.Option(
            "--scope",
            metavar="SCOPE",
            help="Repeatable: credits:read, workflows:write, wallet:write, operator:read, operator.",
        ),
    ],
    org_ids: Annotated[
        list[str] | None, typer.Option("--org", metavar="ORG", help="Repeatable: an organization it is valid for.")
    ] = None,
    all_orgs: Annotated[bool, typer.Option("--all-orgs", help="Valid for every organization.")] = False,
    expires_in_s: Annotated[
        int, typer.Option("--expires-in-s", min=1, max=366 * 86_400, help="How many seconds it is valid.")
    ] = 3600,
    subject: Annotated[
        str, typer.Option("--subject", metavar="NAME", help="The user or system it is for.", callback=one_line)
    ] = this_person(),
) -> None:
    """Print a token for the HTTP interface, signed with HOLDFAST_JWT_SECRET. For development."""
    from api_stub.auth import Scope, sign  # only here: no other command needs the API's packages

    for scope in scopes:
        if scope not in get_args(Scope):
            known = ", ".join(get_args(Scope))
            raise typer.BadParameter(f"{escaped(scope)} is not one of {known}", param_hint="--scope")
    if (org_ids and all_orgs) or not (org_ids or all_orgs or {"operator:read", "operator"} >= set(scopes)):
        raise typer.BadParameter("give either organizations or --all-orgs", param_hint="--org")
    for org_id in org_ids or []:
        if not re.fullmatch(ID_PATTERN, org_id):
            raise typer.BadParameter(f"{escaped(org_id)} is not a valid organization id", param_hint="--org")
    settings = Settings.load("jwt_secret")
    assert settings.jwt_secret is not None
    if settings.jwt_public_key is not None:
        fail("HOLDFAST_JWT_PUBLIC_KEY is set, so a token that is signed with the secret would not be accepted")
    print(
        sign(
            settings.jwt_secret.get_secret_value(),
            orgs="*" if all_orgs else org_ids or [],
            scopes=scopes,
            subject=subject,
            expires_in_s=expires_in_s,
            audience=settings.jwt_audience,
            issuer=settings.jwt_issuer,
        )
    )
