"""How the pages write values."""

from api_stub.formats import pairs


def test_short_metadata_is_read_in_passing_and_long_metadata_is_not() -> None:
    assert pairs({}) == []
    assert pairs({"reason": "settled", "count": 3, "last": True, "none": None}) == [
        ("reason", "settled"),
        ("count", "3"),
        ("last", "true"),
        ("none", "null"),
    ]
    moments = {"expires_at": "2026-11-03T09:05:33.081662+00:00", "until": "2026-02-31T00:00:00+00:00"}
    assert pairs(moments) == [("expires_at", "3 Nov 2026 09:05:33"), ("until", "2026-02-31T00:00:00+00:00")]
    assert pairs({"note": "x" * 100}) is None
    assert pairs({"list": []}) is None
    assert pairs({"paid_by": {"subscription": 30, "ending": 4}}) == [("paid_by", "subscription 30, ending 4")]
    assert pairs({"deep": {"er": {}}}) is None
    assert pairs({"parts": dict.fromkeys("abcde", 1)}) is None
