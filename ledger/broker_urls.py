"""How a URL names a broker: one rule for the setting and for the client, which has no settings."""

AMQP_SCHEMES = ("amqp://", "amqps://")

SEVERAL_NODES = (
    "must name one server, or the nodes of one RabbitMQ by whole URLs with semicolons between them: "
    "amqp://user:password@a//;amqp://user:password@b//"
)
"""What is wrong with a URL that names its nodes badly, after the name of the URL."""


def names_nodes_well(url: str) -> bool:
    """Whether `url` names one server or, each by a whole URL, with semicolons, the nodes of one RabbitMQ."""
    nodes = [node.partition("://") for node in url.split(";")]
    if len(nodes) > 1 and (len({scheme for scheme, _, _ in nodes}) > 1 or not url.startswith(AMQP_SCHEMES)):
        return False
    return not any("," in (host.partition("@")[2] or host) for _, _, host in nodes)
