"""How the broker is reached."""

import ssl

import pytest

from holdfast_client.broker import masked
from worker.broker import create_celery


@pytest.mark.parametrize(
    ("query", "check"),
    [
        ("", ssl.CERT_REQUIRED),
        ("?ssl_ca_certs=/etc/ca.pem", ssl.CERT_REQUIRED),
        ("?ssl_cert_reqs=none", ssl.CERT_NONE),
    ],
)
def test_with_tls_the_server_is_checked_unless_the_url_says_otherwise(query: str, check: ssl.VerifyMode) -> None:
    url = f"rediss://host:1/0{query}"
    with create_celery("holdfast", url, url) as app:
        assert app.connection_for_write().ssl["ssl_cert_reqs"] == check
        assert app.backend.connparams["ssl_cert_reqs"] == check


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:sekrit@host:1/0", "redis://:**@host:1/0"),
        ("amqp://ann:sekrit@a//", "amqp://ann:**@a//"),
        ("amqp://ann:sekrit@a:1//;amqp://bob:other@b:2//", "amqp://ann:**@a:1//;amqp://bob:**@b:2//"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert masked(url) == shown
