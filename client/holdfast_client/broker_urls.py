"""The rules for the URLs of brokers and result stores, for the settings and for the client, which has no settings."""

import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

AMQP_SCHEMES = ("amqp://", "amqps://")
REDIS_SCHEMES = ("redis://", "rediss://")
CERTIFICATE_CHECKS = ("required", "optional", "none")

SEVERAL_NODES = (
    "must name one server, or the nodes of one RabbitMQ cluster as whole URLs with semicolons between them: "
    "amqp://user:password@a//;amqp://user:password@b//"
)


def refuse_no_broker(url: str) -> None:
    """Raise ValueError if `url` cannot be a broker's; the text says why."""
    if not names_nodes_well(url):
        raise ValueError(SEVERAL_NODES)
    for node in url.split(";"):
        _refuse_node(node, (*REDIS_SCHEMES, *AMQP_SCHEMES))


def refuse_no_result_store(url: str) -> None:
    """Raise ValueError if `url` cannot be a result store's; the text says why."""
    _refuse_node(url, REDIS_SCHEMES)


def names_nodes_well(url: str) -> bool:
    """Whether `url` names one server, or the nodes of one RabbitMQ cluster as whole URLs with semicolons."""
    nodes = [node.partition("://") for node in url.split(";")]
    if len(nodes) > 1 and (len({scheme for scheme, _, _ in nodes}) > 1 or not url.startswith(AMQP_SCHEMES)):
        return False
    return not any("," in (host.partition("@")[2] or host) for _, _, host in nodes)


def _refuse_node(url: str, schemes: Sequence[str]) -> None:
    try:
        parts = urlsplit(url)
        is_well_formed = url.startswith(tuple(schemes)) and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, an unclosed bracket
        is_well_formed = False
    if not is_well_formed:
        raise ValueError(
            f"must begin with {', '.join(schemes[:-1])} or {schemes[-1]} and name a host{_hint(url, schemes)}"
        )
    if url.startswith(REDIS_SCHEMES) and not re.fullmatch(r"/?|/\d+", parts.path):
        raise ValueError("must end with the number of a Redis database, such as /0")
    options = dict(parse_qsl(parts.query))
    if unknown := sorted(name for name in options if not name.startswith("ssl_")):
        raise ValueError(f"has an unknown option: {unknown[0]}")
    if options.get("ssl_cert_reqs", "required") not in CERTIFICATE_CHECKS:
        raise ValueError(f"must have as ssl_cert_reqs one of {', '.join(CERTIFICATE_CHECKS)}")


def _hint(url: str, schemes: Sequence[str]) -> str:
    """What is probably wrong with a URL that is not well-formed, without any part that may be a password."""
    if url.startswith(tuple(schemes)):
        return "; in a password, write %40 for @, %2F for / and %23 for #" if "@" in url else ""
    if url.lower().startswith(("http://", "https://")):
        return "; http is for the API or a web page, not for the broker"
    return "" if "://" in url else f"; it has no scheme, such as {schemes[0]}"
