"""The error codes of MongoDB servers: their names, and what each means for the service.

The names are those of the server's src/mongo/base/error_codes.yml (read at 9.0). A name such as
Location40324 is how the server names an error that has only a number. A code that is not in the
table is transient, except in the error of one update: there it belongs to the document. So the
table has only those transient codes that a server may report for one update of a batch.
"""

from __future__ import annotations

from enum import Enum


class ErrorClass(Enum):
    """What the service does about an error."""

    PERMANENT = "permanent"
    """It cannot pass by itself. For an update: this document cannot be updated."""
    TRANSIENT = "transient"
    """A later attempt may succeed."""
    TIMEOUT = "time limit"
    """The query reached its own time limit."""
    SNAPSHOT_TOO_OLD = "snapshot too old"
    """An attempt with a new snapshot may succeed."""
    NEW_CLIENT = "new client"
    """An attempt with a new client may succeed."""
    RESYNC = "resync"
    """A change stream cannot be continued."""
    UNSUPPORTED = "unsupported"
    """The server lacks a feature that the service needs."""
    AUTHENTICATION = "authentication"
    """The server rejects the credentials."""
    PERMISSION = "permission"
    """The database user lacks a privilege."""


CODES: dict[ErrorClass, dict[str, int]] = {
    ErrorClass.PERMANENT: {
        "BadValue": 2,
        "FailedToParse": 9,
        "TypeMismatch": 14,
        "Overflow": 15,
        "InvalidLength": 16,
        "IllegalOperation": 20,
        "InvalidBSON": 22,
        "PathNotViable": 28,
        "ConflictingUpdateOperators": 40,
        "DollarPrefixedFieldName": 52,
        "NotSingleValueField": 54,
        "ShardKeyNotFound": 61,
        "ImmutableField": 66,
        "CannotCreateIndex": 67,
        "InvalidOptions": 72,
        "InvalidNamespace": 73,
        "NoReplicationEnabled": 76,
        "UnknownReplWriteConcern": 79,
        "IndexOptionsConflict": 85,
        "IndexKeySpecsConflict": 86,
        "UnsatisfiableWriteConcern": 100,
        "DocTooLargeForCapped": 116,
        "DocumentValidationFailure": 121,
        "NotAReplicaSet": 123,
        "InvalidSSLConfiguration": 140,
        "ExceededMemoryLimit": 146,
        "ReadConcernMajorityNotEnabled": 148,
        "IncompatibleCollationVersion": 161,
        "ViewDepthLimitExceeded": 165,
        "CommandNotSupportedOnView": 166,
        "OptionNotSupportedOnView": 167,
        "CommandOnShardedViewNotSupportedOnMongod": 169,
        "CannotIndexParallelArrays": 171,
        "InvalidViewDefinition": 182,
        "ViewPipelineMaxSizeExceeded": 195,
        "InvalidIndexSpecificationOption": 197,
        "CannotBuildIndexKeys": 201,
        "QueryFeatureNotAllowed": 224,
        "MaxSubPipelineDepthExceeded": 232,
        "ConversionFailure": 241,
        "CannotCreateCollection": 242,
        "NoQueryExecutionPlans": 291,
        "QueryExceededMemoryLimitNoDiskUseAllowed": 292,
        "DataCorruptionDetected": 301,
        "MechanismUnavailable": 334,
        "KeyPatternShorterThanBound": 349,
        "NonConformantBSON": 378,
        "QueryRejectedBySettings": 411,
        "AtlasError": 8000,
        "CannotGrowDocumentInCappedNamespace": 10003,
        "BSONObjectTooLarge": 10334,
        "DuplicateKey": 11000,
        "Location16755": 16755,  # no valid GeoJSON for an index
        "Location17419": 17419,  # the document would become larger than 16 MB
        "Location17420": 17420,  # the same
        "IDLDuplicateField": 40413,
        "IDLFailedToParse": 40414,
        "IDLUnknownField": 40415,
    },
    ErrorClass.TRANSIENT: {
        "HostUnreachable": 6,
        "HostNotFound": 7,
        "LockTimeout": 24,
        "WriteConcernTimeout": 64,
        "ShardNotFound": 70,
        "NoProgressMade": 82,
        "NetworkTimeout": 89,
        "ShutdownInProgress": 91,
        "WriteConflict": 112,
        "FailedToSatisfyReadPreference": 133,
        "StaleEpoch": 150,
        "QueryPlanKilled": 175,
        "PrimarySteppedDown": 189,
        "NetworkInterfaceExceededTimeLimit": 202,
        "DatabaseDropPending": 215,
        "StaleDbVersion": 249,
        "ExceededTimeLimit": 262,
        "ClientDisconnect": 279,
        "SplitHorizonChange": 303,
        "MovePrimaryInProgress": 319,
        "ShardCannotRefreshDueToLocksHeld": 343,
        "TemporarilyUnavailable": 365,
        "UserWritesBlocked": 371,
        "ConnectionError": 384,
        "ResourceExhausted": 402,
        "PooledConnectionAcquisitionExceededTimeLimit": 407,
        "InterruptedDueToReshardingCriticalSection": 453,
        "SocketException": 9001,
        "NotWritablePrimary": 10107,
        "InterruptedAtShutdown": 11600,
        "Interrupted": 11601,
        "InterruptedDueToReplStateChange": 11602,
        "StaleConfig": 13388,
        "NotPrimaryNoSecondaryOk": 13435,
        "NotPrimaryOrSecondary": 13436,
        "OutOfDiskSpace": 14031,
    },
    ErrorClass.TIMEOUT: {"MaxTimeMSExpired": 50},
    ErrorClass.SNAPSHOT_TOO_OLD: {
        "SnapshotTooOld": 239,
        "SnapshotUnavailable": 246,
        "StaleChunkHistory": 250,
        "MigrationConflict": 272,
    },
    ErrorClass.NEW_CLIENT: {
        "TimeProofMismatch": 204,
        "ClusterTimeFailsRateLimiter": 205,
        "KeyNotFound": 211,
        "ReauthenticationRequired": 391,
    },
    ErrorClass.RESYNC: {
        "CappedPositionLost": 136,
        "CloseChangeStream": 222,
        "RetryChangeStream": 234,
        "InvalidResumeToken": 260,
        "ChangeStreamFatalError": 280,
        "ChangeStreamHistoryLost": 286,
        "ChangeStreamInvalidated": 346,
    },
    ErrorClass.UNSUPPORTED: {
        "CommandNotFound": 59,
        "CommandNotSupported": 115,
        "InvalidPipelineOperator": 168,
        "NotImplemented": 238,
        "DocumentDBStageNotSupported": 304,  # Amazon DocumentDB; MongoDB has no such code
        "APIVersionError": 322,
        "APIStrictError": 323,
        "APIDeprecationError": 324,
        "ChangeStreamNotEnabled": 376,
        "Location40324": 40324,  # an unknown stage
    },
    ErrorClass.AUTHENTICATION: {
        "UserNotFound": 11,
        "AuthenticationFailed": 18,
        "AuthenticationRestrictionUnmet": 214,
    },
    ErrorClass.PERMISSION: {"Unauthorized": 13},
}

_BY_CODE = {
    code: (error_class, name)
    for error_class, codes in CODES.items()
    for name, code in codes.items()
}


def classify(code: int | None) -> ErrorClass | None:
    """Return what an error code means; None for a code that is not in the table."""
    return _BY_CODE[code][0] if code in _BY_CODE else None


def describe(code: int | None, server_name: str = "") -> str:
    """Return the number and the name of an error code, for the operator."""
    name = _BY_CODE[code][1] if code in _BY_CODE else server_name
    return f"code {code}, {name}" if name else f"error code {code} is unknown to this service"
