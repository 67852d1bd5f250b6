"""What an engine or a billing system needs of Holdfast, a credit ledger: its messages, and clients that send them.

    from holdfast_client import ENGINE_QUEUE, Client

    engine = Client("redis://broker:6379/0", queue=ENGINE_QUEUE)

Knows neither the worker nor the ledger. `messages` and `results`, which the ledger imports, need no broker's library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast_client.async_client import AsyncClient as AsyncClient
    from holdfast_client.broker import ENGINE_QUEUE as ENGINE_QUEUE
    from holdfast_client.broker import QUEUE as QUEUE
    from holdfast_client.client import BrokerUnavailableError as BrokerUnavailableError
    from holdfast_client.client import Client as Client
    from holdfast_client.client import ClientError as ClientError
    from holdfast_client.client import DeadLetteredError as DeadLetteredError
    from holdfast_client.client import InvalidMessageError as InvalidMessageError
    from holdfast_client.client import NoAnswerError as NoAnswerError
    from holdfast_client.client import NoAnswersError as NoAnswersError
    from holdfast_client.client import NotSentError as NotSentError
    from holdfast_client.client import UnsupportedBrokerError as UnsupportedBrokerError
    from holdfast_client.results import Limit as Limit
    from holdfast_client.results import Result as Result
    from holdfast_client.unanswered import Unanswered as Unanswered

_MODULES = {
    "AsyncClient": "async_client",
    "BrokerUnavailableError": "client",
    "Client": "client",
    "ClientError": "client",
    "DeadLetteredError": "client",
    "ENGINE_QUEUE": "broker",
    "InvalidMessageError": "client",
    "Limit": "results",
    "NoAnswerError": "client",
    "NoAnswersError": "client",
    "NotSentError": "client",
    "QUEUE": "broker",
    "Result": "results",
    "Unanswered": "unanswered",
    "UnsupportedBrokerError": "client",
}
"""Where each name is. Its module is imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
