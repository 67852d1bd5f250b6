"""`holdfast usage`: what used the credits of an organization, with shares."""

from enum import StrEnum
from typing import Annotated, Any, get_args

import typer

from api_stub import exports
from ledger import views
from ledger.usage import MOST_GROUPED_BY, MOST_GROUPS, Group, Usage, usage
from ledger.wording import share
from worker.cli.tables import Column, table
from worker.cli.terminal import AsJson, Organization, console, fail, open_ledger, print_json, say, time_range

app = typer.Typer()

NONE = "–"
"""The project or activity of the runs that named none."""

By = StrEnum("By", get_args(Group))  # type: ignore[misc] # the names are those of Group


@app.command("usage", epilog="Example: holdfast usage acme --by project --by day --from 2026-01-01")
def show_usage(
    org_id: Organization,
    by: Annotated[
        list[By] | None, typer.Option("--by", help=f"Repeatable: at most {MOST_GROUPED_BY}. Default: project.")
    ] = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="First day, or first moment (ISO 8601, UTC).")
    ] = None,
    last: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="Last day, or the moment before which to end (ISO 8601, UTC)."),
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, as the API does.")] = False,
) -> None:
    """Show what used the credits of an organization. Refunds are not subtracted. Exit code 1 if it has no wallet."""
    group_by: list[Group] = list(dict.fromkeys(each.value for each in by or [By("project")]))  # type: ignore[misc]
    if len(group_by) > MOST_GROUPED_BY:
        raise typer.BadParameter(f"may be given at most {MOST_GROUPED_BY} times", param_hint="--by")
    if as_json and as_csv:
        raise typer.BadParameter("is not combined with --json", param_hint="--csv")
    created_from, created_before = time_range(first, last)
    most = exports.MOST_LINES if as_csv else MOST_GROUPS
    with open_ledger() as engine, engine.connect() as connection:
        if views.wallet(connection, org_id) is None:
            fail(f"{org_id} has no wallet: no message has named it yet", code=1)
        found = usage(connection, org_id, group_by, created_from=created_from, created_before=created_before, most=most)
    if as_json:
        total = {"credits": found.credits, "runs": found.runs}
        print_json({"groups": found.groups, "total": total, "truncated": found.truncated})
    elif as_csv and found.truncated:
        fail(f"these are more than {most:,} groups: ask for a shorter range, or for fewer values of --by")
    elif as_csv:
        print(exports.usage(group_by, found), end="")
    elif found.runs:
        _print(org_id, group_by, found)
    else:
        say("No usage.")


def _print(org_id: str, group_by: list[Group], found: Usage) -> None:
    columns = [
        *(Column(name, keeps_line=name in ("day", "month")) for name in group_by),
        Column("credits", is_amount=True),
        Column("share", is_amount=True),
        Column("runs", is_amount=True),
    ]
    rows: list[dict[str, Any]] = [
        {**group, **{name: group[name] or NONE for name in group_by}, "share": share(group["credits"], found.credits)}
        for group in found.groups
    ]
    first, *others = group_by
    rows.append({first: "all", **dict.fromkeys(others), "credits": found.credits, "share": "", "runs": found.runs})
    console.print(table(f"Usage of {org_id}", columns, rows))
    if found.truncated:
        say(f"These are the largest {len(found.groups):,} groups; --csv prints all.")
