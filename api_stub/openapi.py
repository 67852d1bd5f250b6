"""The description of the API, /openapi.json: corrects where FastAPI by itself says too little or too much."""

from typing import Any

from fastapi import FastAPI
from pydantic import WithJsonSchema

from holdfast_client.messages import MAX_NAME_LENGTH, PLAIN_TEXT_PATTERN, TIME_PATTERN

# The times that the description allows; `filters.when` accepts more. No offset takes these years out of the calendar.
_A_DAY = {"type": "string", "format": "date", "pattern": "^[12][0-9]{3}-[0-9]{2}-[0-9]{2}$"}
_A_TIME = {"type": "string", "format": "date-time", "pattern": f"^[12][0-9]{{3}}-{TIME_PATTERN}$"}
IS_A_TIME = WithJsonSchema({"anyOf": [_A_DAY, _A_TIME]})
IS_A_NAME = WithJsonSchema(
    {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH, "pattern": PLAIN_TEXT_PATTERN}
)

_VALUE = {"$ref": "#/components/schemas/Value"}
ANY_OBJECT = {"type": "object", "propertyNames": {"pattern": PLAIN_TEXT_PATTERN}, "additionalProperties": _VALUE}
_VALUES: dict[str, Any] = {
    "anyOf": [
        {"type": ["null", "boolean", "number"]},
        {"type": "string", "pattern": PLAIN_TEXT_PATTERN},
        {"type": "array", "items": _VALUE},
        ANY_OBJECT,
    ]
}
"""Any value that may be in `metadata`."""


class DescribedAPI(FastAPI):
    """FastAPI with a corrected description."""

    def openapi(self) -> dict[str, Any]:
        """The description, with the schema `Value` for bodies, and without null in parameters, which cannot be sent."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"]["Value"] = _VALUES
            operations = [operation for path in document["paths"].values() for operation in path.values()]
            for parameter in (each for operation in operations for each in operation.get("parameters", ())):
                schema = parameter["schema"]
                if given := [each for each in schema.pop("anyOf", ()) if each != {"type": "null"}]:
                    schema |= given[0] if len(given) == 1 else {"anyOf": given}
        return super().openapi()
