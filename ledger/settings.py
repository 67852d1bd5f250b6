"""The settings: environment variables that begin with `HOLDFAST_`, checked once, at the start of a program."""

import difflib
import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from holdfast_client.broker_urls import REDIS_SCHEMES, refuse_no_broker, refuse_no_result_store
from ledger.database import parse_url
from ledger.readable import JOINERS, escaped

PREFIX = "HOLDFAST_"
MIN_SECRET_LENGTH = 32
MIN_SECRET_VARIETY = 8
"""The fewest different characters in a secret. Random hexadecimal digits of the minimum length have more."""
MAX_PRODUCT_NAME = 40
MAX_LINK_LENGTH = 2_000

_ADDRESS = re.compile(r"[^\s:]+:[0-9]{1,5}")
_SERVICE_LINK = re.compile(
    rf"""{PREFIX}([A-Z0-9_]+_)?(
        SERVICE_HOST=[0-9a-f.:]+
      | SERVICE_PORT(_[A-Z0-9_]+)?=[0-9]+
      | PORT(_[0-9]+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://[0-9a-f.:\[\]]+:[0-9]+
      | PORT_[0-9]+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp)|PORT=[0-9]+|ADDR=[0-9a-f.:]+)
    )""",
    re.VERBOSE,
)
"""The variables that Kubernetes sets in every container for a Service named `holdfast` or `holdfast-…`. No settings."""


class SettingsError(Exception):
    """A setting is missing or wrong; the text says in one line which one, and what it should be."""


class Settings(BaseSettings):
    """The settings of Holdfast. No password or key among them appears in an error message or a log."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True)

    database_url: str | None = Field(None, description="PostgreSQL: `postgresql+psycopg://user:password@host/database`")
    read_database_url: str | None = Field(
        None,
        description="A replica of that database, from which the API reads what only informs: credit history, usage, "
        "their pages and files, and its metrics; default: none",
    )
    broker_url: str | None = Field(
        None,
        description="The broker: `redis://`, `rediss://`, `amqp://` or `amqps://`; for a RabbitMQ cluster, "
        "all nodes, separated by semicolons: `amqp://user:password@a//;amqp://user:password@b//`",
    )
    engine_broker_url: str | None = Field(
        None,
        description="The broker for a workflow engine, which has fewer rights and sends to `credits.engine`; "
        "no part of Holdfast reads this setting",
    )
    result_url: str | None = Field(
        None,
        description="Where answers are kept for senders that wait: `redis://`; default: the broker, if it is Redis",
    )
    data_dir: Path | None = Field(
        None, description="The data folder of `holdfast up`; default: `.holdfast` in the current folder"
    )

    shard_connections: int = Field(
        4,
        ge=1,
        le=32,
        description="How many shards of a ledger on several machines a worker writes to at once, 1 to 32, each over a "
        "connection of its own; default: 4",
    )
    metrics_address: str | None = Field(
        None, description="Where a worker serves its own metrics for Prometheus: `127.0.0.1:9464`; default: nowhere"
    )
    product_name: str | None = Field(
        None, description="The name on the pages, at most 40 characters on one line; default: `Holdfast`"
    )
    buy_credits_url: str | None = Field(
        None,
        description='Where customers buy credits: the link "Buy credits" of their page, `https://` (`http://` only on '
        "this machine); default: no link",
    )
    jwt_secret: SecretStr | None = Field(
        None,
        description=f"The secret that API tokens are signed with (HS256), at least {MIN_SECRET_LENGTH} characters, "
        f"{MIN_SECRET_VARIETY} of them different",
    )
    jwt_public_key: str | None = Field(
        None,
        description="Instead of the secret: the PEM public key that tokens are checked with "
        "(RS256 with at least 2,048 bits, ES256, EdDSA); while you change keys, the new and the old one",
    )
    jwt_audience: str | None = Field(
        None, description="What the `aud` of a token must be or contain; default: not checked"
    )
    jwt_issuer: str | None = Field(None, description="What the `iss` of a token must be; default: not checked")

    @field_validator("metrics_address")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        if address is not None and not (_ADDRESS.fullmatch(address) and 0 < int(address.rpartition(":")[2]) < 2**16):
            raise ValueError("must be a host and a port, such as 127.0.0.1:9464")
        return address

    @field_validator("jwt_secret")
    @classmethod
    def _is_hard_to_guess(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None:
            return None
        if len(secret.get_secret_value()) < MIN_SECRET_LENGTH:
            raise ValueError(f"must have at least {MIN_SECRET_LENGTH} characters")
        if len(set(secret.get_secret_value())) < MIN_SECRET_VARIETY:
            raise ValueError(f"must have at least {MIN_SECRET_VARIETY} different characters, as a random one has")
        if "-----BEGIN" in secret.get_secret_value():
            raise ValueError("must not be a key in PEM format: a public key belongs in HOLDFAST_JWT_PUBLIC_KEY")
        return secret

    @field_validator("jwt_public_key")
    @classmethod
    def _is_public_key(cls, key: str | None) -> str | None:
        if key is not None and "-----BEGIN PUBLIC KEY-----" not in key:
            raise ValueError("must be a public key in PEM format, beginning with -----BEGIN PUBLIC KEY-----")
        if key is not None and key.count("-----BEGIN") > 2:
            raise ValueError("must be one key, or the new and the old one, not more")
        return key

    @field_validator("product_name")
    @classmethod
    def _fits_on_a_page(cls, name: str | None) -> str | None:
        if name is not None and (len(name) > MAX_PRODUCT_NAME or escaped(name, keep=JOINERS) != name):
            raise ValueError(f"must be one line of printable text, of at most {MAX_PRODUCT_NAME} characters")
        return name

    @field_validator("buy_credits_url")
    @classmethod
    def _is_a_safe_link(cls, link: str | None) -> str | None:
        if link is not None and not _is_safe(link):
            raise ValueError(
                "must be the https URL of a page, such as https://billing.example.com/credits; "
                "http only for localhost or a loopback address"
            )
        return link

    @field_validator("jwt_audience", "jwt_issuer", "product_name")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and name != name.strip():
            raise ValueError("must not begin or end with a space")
        return name

    @field_validator("database_url", "read_database_url")
    @classmethod
    def _is_postgresql(cls, url: str | None) -> str | None:
        if url is not None:
            parse_url(url)
        return url

    @field_validator("broker_url", "engine_broker_url")
    @classmethod
    def _is_broker(cls, url: str | None) -> str | None:
        if url is not None:
            refuse_no_broker(url)
        return url

    @field_validator("result_url")
    @classmethod
    def _is_result_store(cls, url: str | None) -> str | None:
        if url is not None:
            refuse_no_result_store(url)
        return url

    @property
    def result_store_url(self) -> str | None:
        """The URL of the result store. None: none is set, and the broker is not Redis."""
        if self.result_url is not None:
            return self.result_url
        if self.broker_url is not None and self.broker_url.startswith(REDIS_SCHEMES):
            return self.broker_url
        return None

    @classmethod
    def load(cls, *needed: str) -> Self:
        """Load the settings; those in `needed` must be set. Raises SettingsError."""
        names = {f"{PREFIX}{field.upper()}": field for field in cls.model_fields}
        for variable, value in os.environ.items():
            is_ours = variable.upper().startswith(PREFIX) and not _SERVICE_LINK.fullmatch(f"{variable}={value}")
            if is_ours and variable.upper() not in names:
                similar = difflib.get_close_matches(variable.upper(), names, n=1)
                hint = f"; did you mean {similar[0]}?" if similar else f"; the settings are {', '.join(names)}"
                raise SettingsError(f"{variable} is not a setting{hint}")
        try:
            settings = cls()
        except ValidationError as error:
            [problem, *_] = error.errors(include_input=False, include_url=False)
            raise SettingsError(
                f"{PREFIX}{str(problem['loc'][0]).upper()} {problem['msg'].removeprefix('Value error, ')}"
            ) from None
        for variable, field in names.items():
            if field in needed and getattr(settings, field) is None:
                raise SettingsError(f"{variable} is not set. {cls.model_fields[field].description}")
        return settings


def _is_safe(link: str) -> bool:
    """Whether a browser can follow `link` without giving a password away or asking another machine without TLS."""
    if len(link) > MAX_LINK_LENGTH or not link.isascii() or not link.isprintable() or set(link) & set(' "<>\\'):
        return False
    try:
        parts = urlsplit(link)
        host = parts.hostname
        parts.port  # noqa: B018 - raises ValueError if it is none
    except ValueError:
        return False
    if not host or "@" in parts.netloc:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_this_machine(host))


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
