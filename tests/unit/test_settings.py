"""The settings: what is accepted, what is refused, and that the refusal is one line without a secret."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast_client.broker_urls import names_nodes_well
from ledger.settings import Settings, SettingsError

DATABASE = "postgresql+psycopg://user:sekrit@host/holdfast"
REDIS = "redis://:sekrit@host:6379/0"

Environment = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Sets the settings by their names without the prefix, and removes all others."""
    for variable in os.environ:
        if variable.upper().startswith("HOLDFAST_"):
            monkeypatch.delenv(variable)

    def put(**settings: str) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"HOLDFAST_{name}", value)

    return put


def refusal(*needed: str) -> str:
    with pytest.raises(SettingsError) as refused:
        Settings.load(*needed)
    line = str(refused.value)
    assert "\n" not in line
    assert "sekrit" not in line
    return line


def test_without_any_setting_nothing_is_set(environment: Environment) -> None:
    assert Settings.load() == Settings(database_url=None, broker_url=None, result_url=None, data_dir=None)


def test_all_settings_are_read(environment: Environment) -> None:
    environment(DATABASE_URL=DATABASE, BROKER_URL=REDIS, RESULT_URL="redis://results", DATA_DIR="/srv/holdfast")
    settings = Settings.load("database_url", "broker_url", "result_url", "data_dir")
    assert (settings.database_url, settings.broker_url) == (DATABASE, REDIS)
    assert (settings.result_url, settings.data_dir) == ("redis://results", Path("/srv/holdfast"))


def test_an_empty_setting_is_not_set(environment: Environment) -> None:
    environment(BROKER_URL="")
    assert Settings.load().broker_url is None
    assert refusal("broker_url") == (
        "HOLDFAST_BROKER_URL is not set. The broker: `redis://`, `rediss://`, `amqp://` or `amqps://`; "
        "for a RabbitMQ cluster, all nodes, separated by semicolons: `amqp://user:password@a//;amqp://user:password@b//`"
    )


def test_a_missing_setting_says_what_it_is(environment: Environment) -> None:
    assert refusal("database_url") == (
        "HOLDFAST_DATABASE_URL is not set. PostgreSQL: `postgresql+psycopg://user:password@host/database`"
    )


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ("HOLDFAST_DATABSASE_URL", "HOLDFAST_DATABSASE_URL is not a setting; did you mean HOLDFAST_DATABASE_URL?"),
        ("HOLDFAST_BROKERURL", "HOLDFAST_BROKERURL is not a setting; did you mean HOLDFAST_BROKER_URL?"),
        ("holdfast_datadir", "holdfast_datadir is not a setting; did you mean HOLDFAST_DATA_DIR?"),
    ],
)
def test_a_misspelled_setting_is_told_what_was_meant(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, variable: str, line: str
) -> None:
    monkeypatch.setenv(variable, "sekrit")
    assert refusal() == line


def service_links(name: str, address: str, *ports: tuple[str, int, str]) -> dict[str, str]:
    """What Kubernetes puts into every container for a Service with these ports: the name, number and protocol of each.

    The names and values are those of kubelet's `envvars.FromServices`.
    """
    prefix = name.upper().replace("-", "_")
    host = f"[{address}]" if ":" in address else address
    first = ports[0]
    links = {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(first[1]),
        f"{prefix}_PORT": f"{first[2].lower()}://{host}:{first[1]}",
    }
    for port_name, number, protocol in ports:
        if port_name:
            links[f"{prefix}_SERVICE_PORT_{port_name.upper().replace('-', '_')}"] = str(number)
        port = f"{prefix}_PORT_{number}_{protocol}"
        links[port] = f"{protocol.lower()}://{host}:{number}"
        links |= {f"{port}_PROTO": protocol.lower(), f"{port}_PORT": str(number), f"{port}_ADDR": address}
    return links


@pytest.mark.parametrize(
    "links",
    [
        service_links("holdfast", "10.0.0.1", ("", 8000, "TCP")),
        service_links("holdfast-api", "10.0.0.1", ("http", 8000, "TCP")),
        service_links("holdfast-worker-metrics", "10.96.0.12", ("metrics", 9464, "TCP"), ("p2", 53, "UDP")),
        service_links("holdfast-2", "10.0.0.1", ("8", 80, "TCP"), ("x-9", 81, "SCTP")),
        service_links("holdfast-port-80", "fd00::1", ("service-port", 80, "SCTP"), ("port", 80, "UDP")),
        service_links("holdfast-database-url", "10.0.0.1", ("postgres", 5432, "TCP")),
    ],
    ids=lambda links: next(iter(links)),
)
def test_what_kubernetes_sets_for_a_service_is_no_setting(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, links: dict[str, str]
) -> None:
    environment(DATABASE_URL=DATABASE, BROKER_URL=REDIS)
    set_by_hand = Settings.load()
    for variable, value in links.items():
        monkeypatch.setenv(variable, value)
        assert Settings.load() == set_by_hand, variable


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HOLDFAST_API_PORT", "8000"),
        ("HOLDFAST_PORT", "8000"),
        ("HOLDFAST_PORT", "http://10.0.0.1:8000"),
        ("HOLDFAST_PORT", "tcp://10.0.0.1"),
        ("HOLDFAST_API_PORT_8000_TCP", "8000"),
        ("HOLDFAST_API_PORT_8000_TCP_ADDR", "sekrit"),
        ("HOLDFAST_API_PORT_8000_TCP_PROTO", "udq"),
        ("HOLDFAST_API_PORT_HTTP_TCP_PORT", "8000"),
        ("HOLDFAST_API_SERVICE_HOST", "sekrit.example"),
        ("HOLDFAST_API_SERVICE_PORT", "sekrit"),
        ("HOLDFAST_SERVICE", "10.0.0.1"),
        ("HOLDFAST_BROKER_URL_PORT", "redis://:sekrit@10.0.0.1:6379"),
        ("holdfast_api_service_host", "10.0.0.1"),
        ("HOLDFAST_API_SERVICE_HOST", "10.0.0.1\n"),
    ],
)
def test_what_only_looks_like_a_variable_of_a_service_is_refused(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert refusal().startswith(f"{variable} is not a setting; ")


def test_a_setting_like_no_other_is_told_all_there_are(environment: Environment) -> None:
    environment(QQQQQQ="sekrit")
    assert refusal().startswith(
        "HOLDFAST_QQQQQQ is not a setting; the settings are HOLDFAST_DATABASE_URL, HOLDFAST_READ_DATABASE_URL, "
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"DATABASE_URL": "sekrit"},
            "HOLDFAST_DATABASE_URL is not a URL; it looks like postgresql+psycopg://user:password@host/database",
        ),
        (
            {"DATABASE_URL": "postgresql://user:sekrit@host/d"},
            "HOLDFAST_DATABASE_URL must begin with postgresql+psycopg://, not postgresql://",
        ),
        (
            {"DATABASE_URL": "mysql://user:sekrit@host/d"},
            "HOLDFAST_DATABASE_URL must begin with postgresql+psycopg://, not mysql://",
        ),
        (
            {"READ_DATABASE_URL": "postgresql://user:sekrit@host/d"},
            "HOLDFAST_READ_DATABASE_URL must begin with postgresql+psycopg://, not postgresql://",
        ),
        (
            {"BROKER_URL": "memory://:sekrit@host"},
            "HOLDFAST_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host",
        ),
        (
            {"BROKER_URL": "sentinel://:sekrit@host:26379"},
            "HOLDFAST_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host",
        ),
        (
            {"BROKER_URL": "redis:///0"},
            "HOLDFAST_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host",
        ),
        (
            {"BROKER_URL": "host:6379"},
            (
                "HOLDFAST_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host; "
                "it has no scheme, such as redis://"
            ),
        ),
        (
            {"BROKER_URL": "user:sekrit@host"},
            (
                "HOLDFAST_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host; "
                "it has no scheme, such as redis://"
            ),
        ),
        (
            {"ENGINE_BROKER_URL": "http://user:sekrit@host:8000"},
            (
                "HOLDFAST_ENGINE_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host; "
                "http is for the API or a web page, not for the broker"
            ),
        ),
        (
            {"RESULT_URL": "HTTPS://user:sekrit@host"},
            (
                "HOLDFAST_RESULT_URL must begin with redis:// or rediss:// and name a host; "
                "http is for the API or a web page, not for the broker"
            ),
        ),
        ({"JWT_AUDIENCE": "sekrit "}, "HOLDFAST_JWT_AUDIENCE must not begin or end with a space"),
        ({"JWT_ISSUER": "  "}, "HOLDFAST_JWT_ISSUER must not begin or end with a space"),
        (
            {"JWT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----sekrit" * 3},
            "HOLDFAST_JWT_PUBLIC_KEY must be one key, or the new and the old one, not more",
        ),
        (
            {"RESULT_URL": "amqp://user:sekrit@host"},
            "HOLDFAST_RESULT_URL must begin with redis:// or rediss:// and name a host",
        ),
        (
            {"BROKER_URL": "rediss://:sekrit@host/0?ssl_cert_reqs=bogus"},
            "HOLDFAST_BROKER_URL must have as ssl_cert_reqs one of required, optional, none",
        ),
        (
            {"BROKER_URL": "amqp://user:sekrit@host//?heartbeat=x"},
            "HOLDFAST_BROKER_URL has an unknown option: heartbeat",
        ),
        (
            {"BROKER_URL": "amqp://user:sekrit/sekrit@host//"},
            (
                "HOLDFAST_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host;"
                " in a password, write %40 for @, %2F for / and %23 for #"
            ),
        ),
        (
            {"RESULT_URL": "redis://host/0?socket_timeout=abc"},
            "HOLDFAST_RESULT_URL has an unknown option: socket_timeout",
        ),
    ],
)
def test_a_malformed_url_is_refused(environment: Environment, settings: dict[str, str], line: str) -> None:
    environment(**settings)
    assert refusal() == line


@pytest.mark.parametrize(
    "settings",
    [
        {"DATABASE_URL": "postgresql+psycopg://user:sekrit@host:port/d"},
        {"BROKER_URL": "redis://:sekrit@host:port/0"},
        {"BROKER_URL": "redis://:sekrit@host:99999/0"},
        {"BROKER_URL": "redis://:sekrit@[::1/0"},
        {"BROKER_URL": "redis://:sekrit@host/database"},
        {"RESULT_URL": "redis://:sekrit@host/database"},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_a_url_whose_parts_cannot_be_used_is_refused_in_words_for_a_person(
    environment: Environment, settings: dict[str, str]
) -> None:
    environment(**settings)
    [name] = settings
    line = refusal()
    assert line.startswith(f"HOLDFAST_{name} ")
    assert "int()" not in line


@pytest.mark.parametrize(
    ("secret", "line"),
    [
        ("sekrit-of-31-different-letters!", "must have at least 32 characters"),
        ("s" * 32, "must have at least 8 different characters, as a random one has"),
        ("sekrit-" * 10, "must have at least 8 different characters, as a random one has"),
        (
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA",
            "must not be a key in PEM format: a public key belongs in HOLDFAST_JWT_PUBLIC_KEY",
        ),
    ],
)
def test_a_secret_that_could_be_guessed_is_refused(environment: Environment, secret: str, line: str) -> None:
    environment(JWT_SECRET=secret)
    assert refusal() == f"HOLDFAST_JWT_SECRET {line}"


def test_a_secret_of_16_random_bytes_in_hexadecimal_is_accepted(environment: Environment) -> None:
    environment(JWT_SECRET="00112233445566770011223344556677")
    assert Settings.load().jwt_secret is not None


def test_what_a_token_must_say_is_not_looked_at_unless_it_is_set(environment: Environment) -> None:
    environment(JWT_AUDIENCE="", JWT_ISSUER="")
    assert (Settings.load().jwt_audience, Settings.load().jwt_issuer) == (None, None)
    environment(JWT_AUDIENCE="https://credits.example", JWT_ISSUER="https://login.example/")
    settings = Settings.load("jwt_audience", "jwt_issuer")
    assert (settings.jwt_audience, settings.jwt_issuer) == ("https://credits.example", "https://login.example/")


@pytest.mark.parametrize("name", ["A", "Acme <Credits> & Söhne", "積分", "x" * 40, "{{ 7 * 7 }}", "क्\u200dष"])
def test_a_product_has_any_name_that_fits_on_a_page(environment: Environment, name: str) -> None:
    environment(PRODUCT_NAME=name)
    assert Settings.load().product_name == name


@pytest.mark.parametrize("name", ["x" * 41, "two\nlines", "\u202egnp", "\udcff", "a\tb"])
def test_a_product_has_no_name_that_does_not_fit_on_a_page(environment: Environment, name: str) -> None:
    environment(PRODUCT_NAME=name)
    assert refusal() == "HOLDFAST_PRODUCT_NAME must be one line of printable text, of at most 40 characters"


@pytest.mark.parametrize("name", [" ", " A", "A "])
def test_a_name_has_no_space_around_it(environment: Environment, name: str) -> None:
    environment(PRODUCT_NAME=name)
    assert refusal() == "HOLDFAST_PRODUCT_NAME must not begin or end with a space"


@pytest.mark.parametrize(
    "url",
    [
        "https://billing.example.com/credits?from=holdfast#packs",
        "https://billing.example.com:8443",
        "http://localhost:3000/buy",
        "http://127.0.0.2/",
        "http://[::1]:3000/",
    ],
)
def test_credits_are_bought_on_a_page_that_is_safe_to_follow(environment: Environment, url: str) -> None:
    environment(BUY_CREDITS_URL=url)
    assert Settings.load().buy_credits_url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://billing.example.com/credits",
        "http://localhost.example.com/",
        "javascript:alert(1)",
        "//billing.example.com",
        "/credits",
        "https://",
        "https://user:pw@billing.example.com/",
        "https://billing.example.com:port/",
        "https://[billing",
        "https://billing.example.com/a b",
        "https://billing.example.com/<b>",
        "https://b\u00fccher.example/",
        "https://billing.example.com/" + "x" * 2_000,
    ],
)
def test_a_link_that_is_not_safe_is_refused(environment: Environment, url: str) -> None:
    environment(BUY_CREDITS_URL=url)
    assert refusal() == (
        "HOLDFAST_BUY_CREDITS_URL must be the https URL of a page, such as https://billing.example.com/credits; "
        "http only for localhost or a loopback address"
    )


@pytest.mark.parametrize("scheme", ["redis", "rediss", "amqp", "amqps"])
def test_every_documented_broker_is_accepted(environment: Environment, scheme: str) -> None:
    environment(BROKER_URL=f"{scheme}://user:sekrit@host:1/0")
    assert Settings.load("broker_url").broker_url == f"{scheme}://user:sekrit@host:1/0"


@pytest.mark.parametrize(
    "url",
    ["amqp://u:p,w@a//;amqp://u:sekrit@b//", "amqps://u:sekrit@a:1/v;amqps://u:sekrit@b:2/v;amqps://u:sekrit@c:3/v"],
)
def test_nodes_of_a_cluster_are_separated_by_semicolons(environment: Environment, url: str) -> None:
    environment(BROKER_URL=url)
    assert Settings.load("broker_url").broker_url == url
    assert names_nodes_well(url)


@pytest.mark.parametrize(
    "url",
    [
        "amqp://a,b,c",
        "amqp://u:sekrit@a,b//",
        "amqp://u:sekrit@a:5672,b:5672//",
        "amqp://u:sekrit@a,u:sekrit@b//",
        "amqp://u:sekrit@a//,amqp://u:sekrit@b//",
        "amqp://u:sekrit@a//;u:sekrit@b//",
        "amqp://u:sekrit@a//;b",
        "amqp://u:sekrit@a//;",
        "amqp://u:sekrit@a//;amqps://u:sekrit@b//",
        "amqp://u:sekrit@a//;redis://:sekrit@b",
        "redis://:sekrit@a;redis://:sekrit@b",
        "redis://:sekrit@a,b/0",
    ],
)
def test_several_servers_in_any_other_way_are_refused(environment: Environment, url: str) -> None:
    environment(BROKER_URL=url)
    assert refusal() == (
        "HOLDFAST_BROKER_URL must name one server, or the nodes of one RabbitMQ cluster as whole URLs with semicolons "
        "between them: amqp://user:password@a//;amqp://user:password@b//"
    )
    assert not names_nodes_well(url)


@pytest.mark.parametrize(
    ("settings", "store"),
    [
        ({}, None),
        ({"BROKER_URL": REDIS}, REDIS),
        ({"BROKER_URL": "rediss://host?ssl_cert_reqs=none"}, "rediss://host?ssl_cert_reqs=none"),
        ({"BROKER_URL": "amqp://host"}, None),
        ({"BROKER_URL": "amqp://host", "RESULT_URL": "redis://results"}, "redis://results"),
        ({"BROKER_URL": REDIS, "RESULT_URL": "redis://results"}, "redis://results"),
    ],
)
def test_results_are_kept_where_it_says_or_else_in_a_broker_that_is_redis(
    environment: Environment, settings: dict[str, str], store: str | None
) -> None:
    environment(**settings)
    assert Settings.load().result_store_url == store


def test_the_first_wrong_setting_is_told_and_not_the_missing_one(environment: Environment) -> None:
    environment(BROKER_URL="kafka://host")
    assert refusal("database_url", "broker_url").startswith("HOLDFAST_BROKER_URL must begin with ")
