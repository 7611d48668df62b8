"""What the driver raises becomes an error of ours, whose exit code says what helps."""

from __future__ import annotations

import pytest
from pymongo.errors import OperationFailure

from loyalty.errors import (
    AuthenticationFailed,
    ConfigurationError,
    DatabaseUnavailable,
    NoPermission,
    QueryTimeout,
    ServiceError,
    SnapshotTooOld,
)
from loyalty.mongo.driver_errors import map_driver_errors


@pytest.mark.parametrize(
    ("code", "said", "kind"),
    [
        (13, "not authorized on shop to execute command { find: 'secret' }", NoPermission),
        (18, "Authentication failed.", AuthenticationFailed),
        (8000, "bad auth : authentication failed", AuthenticationFailed),
        (8000, "user is not allowed to do action [find] on [shop.orders]", NoPermission),
        (8000, "$currentOp is not allowed in this atlas tier", ConfigurationError),
        (50, "operation exceeded time limit", QueryTimeout),
        (239, "Snapshot too old", SnapshotTooOld),
        (40324, "Unrecognized pipeline stage name: '$unionWith'", ConfigurationError),
        (304, "Aggregation stage not supported: '$unionWith'", ConfigurationError),
        (166, "Namespace shop.orders is a view, not a collection", ConfigurationError),
        (167, "Cannot override a view's default collation", ConfigurationError),
        (86, "An existing index has the same name as the requested index", ConfigurationError),
        (91, "The server is in quiesce mode and will shut down", DatabaseUnavailable),
    ],
)
def test_what_the_server_turns_down_is_sorted_by_its_code(
    code: int, said: str, kind: type[ServiceError]
) -> None:
    with pytest.raises(ServiceError) as raised, map_driver_errors("find", "shop.orders"):
        raise OperationFailure(said, code, {"errmsg": said, "code": code, "of": "a secret"})
    assert type(raised.value) is kind
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
