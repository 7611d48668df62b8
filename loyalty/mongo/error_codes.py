"""The error codes of MongoDB servers: their names, and the error that each becomes.

The names are those of the server's src/mongo/base/error_codes.yml (as of MongoDB 9.0). The server
uses names such as Location40324 for errors that have only a number.

- If a command fails with a code that is not in the table, the error is transient.
- If one update of a batch fails with such a code, or with one of ConfigurationError, its document
  is the cause. So the table has every transient code that a server may report for one update.
"""

from loyalty.errors import (
    AuthenticationFailed,
    ClientUnusable,
    ConfigurationError,
    DatabaseUnavailable,
    MissingPrivilege,
    QueryTimeout,
    ResyncRequired,
    ServiceError,
    SnapshotTooOld,
    UnsupportedServer,
)

# One entry a line would take three pages.
# fmt: off
CODES: dict[type[ServiceError], dict[str, int]] = {
    ConfigurationError: {
        "BadValue": 2, "FailedToParse": 9, "TypeMismatch": 14, "Overflow": 15, "InvalidLength": 16,
        "IllegalOperation": 20, "InvalidBSON": 22, "PathNotViable": 28,
        "ConflictingUpdateOperators": 40, "DollarPrefixedFieldName": 52, "NotSingleValueField": 54,
        "ShardKeyNotFound": 61, "ImmutableField": 66, "CannotCreateIndex": 67, "InvalidOptions": 72,
        "InvalidNamespace": 73, "NoReplicationEnabled": 76, "UnknownReplWriteConcern": 79,
        "IndexOptionsConflict": 85, "IndexKeySpecsConflict": 86, "UnsatisfiableWriteConcern": 100,
        "DocTooLargeForCapped": 116, "DocumentValidationFailure": 121, "NotAReplicaSet": 123,
        "InvalidSSLConfiguration": 140, "ExceededMemoryLimit": 146,
        "ReadConcernMajorityNotEnabled": 148, "IncompatibleCollationVersion": 161,
        "ViewDepthLimitExceeded": 165, "CommandNotSupportedOnView": 166,
        "OptionNotSupportedOnView": 167, "CommandOnShardedViewNotSupportedOnMongod": 169,
        "CannotIndexParallelArrays": 171, "InvalidViewDefinition": 182,
        "ViewPipelineMaxSizeExceeded": 195, "InvalidIndexSpecificationOption": 197,
        "CannotBuildIndexKeys": 201, "QueryFeatureNotAllowed": 224,
        "MaxSubPipelineDepthExceeded": 232, "ConversionFailure": 241, "CannotCreateCollection": 242,
        "NoQueryExecutionPlans": 291, "QueryExceededMemoryLimitNoDiskUseAllowed": 292,
        "DataCorruptionDetected": 301, "MechanismUnavailable": 334,
        "KeyPatternShorterThanBound": 349, "NonConformantBSON": 378, "QueryRejectedBySettings": 411,
        "AtlasError": 8000,  # any request that Atlas itself rejects
        "CannotGrowDocumentInCappedNamespace": 10003,
        "BSONObjectTooLarge": 10334, "DuplicateKey": 11000,
        "Location16755": 16755,  # no valid GeoJSON for an index
        "Location17419": 17419,  # the document would become larger than 16 MB
        "Location17420": 17420,  # the same
        "IDLDuplicateField": 40413, "IDLFailedToParse": 40414, "IDLUnknownField": 40415,
    },
    DatabaseUnavailable: {
        "HostUnreachable": 6, "HostNotFound": 7, "LockTimeout": 24, "WriteConcernTimeout": 64,
        "ShardNotFound": 70, "NoProgressMade": 82, "NetworkTimeout": 89, "ShutdownInProgress": 91,
        "WriteConflict": 112, "FailedToSatisfyReadPreference": 133, "StaleEpoch": 150,
        "QueryPlanKilled": 175, "PrimarySteppedDown": 189, "NetworkInterfaceExceededTimeLimit": 202,
        "DatabaseDropPending": 215, "StaleDbVersion": 249, "ExceededTimeLimit": 262,
        "ClientDisconnect": 279, "SplitHorizonChange": 303, "MovePrimaryInProgress": 319,
        "ShardCannotRefreshDueToLocksHeld": 343, "TemporarilyUnavailable": 365,
        "UserWritesBlocked": 371, "ConnectionError": 384, "ResourceExhausted": 402,
        "PooledConnectionAcquisitionExceededTimeLimit": 407,
        "InterruptedDueToReshardingCriticalSection": 453, "SocketException": 9001,
        "NotWritablePrimary": 10107, "InterruptedAtShutdown": 11600, "Interrupted": 11601,
        "InterruptedDueToReplStateChange": 11602, "StaleConfig": 13388,
        "NotPrimaryNoSecondaryOk": 13435, "NotPrimaryOrSecondary": 13436, "OutOfDiskSpace": 14031,
    },
    QueryTimeout: {"MaxTimeMSExpired": 50},
    SnapshotTooOld: {
        "SnapshotTooOld": 239, "SnapshotUnavailable": 246, "StaleChunkHistory": 250,
        "MigrationConflict": 272,
    },
    ClientUnusable: {
        "TimeProofMismatch": 204, "ClusterTimeFailsRateLimiter": 205, "KeyNotFound": 211,
        "ReauthenticationRequired": 391,
    },
    ResyncRequired: {
        "CappedPositionLost": 136, "CloseChangeStream": 222, "RetryChangeStream": 234,
        "InvalidResumeToken": 260, "ChangeStreamFatalError": 280, "ChangeStreamHistoryLost": 286,
        "ChangeStreamInvalidated": 346,
    },
    UnsupportedServer: {
        "CommandNotFound": 59, "CommandNotSupported": 115, "InvalidPipelineOperator": 168,
        "NotImplemented": 238,
        "DocumentDBStageNotSupported": 304,  # Amazon DocumentDB; MongoDB has no such code
        "APIVersionError": 322, "APIStrictError": 323, "APIDeprecationError": 324,
        "ChangeStreamNotEnabled": 376,
        "Location40324": 40324,  # an unknown stage
    },
    AuthenticationFailed: {
        "UserNotFound": 11, "AuthenticationFailed": 18, "AuthenticationRestrictionUnmet": 214,
    },
    MissingPrivilege: {"Unauthorized": 13},
}
# fmt: on

_BY_CODE = {
    code: (error_type, name) for error_type, codes in CODES.items() for name, code in codes.items()
}


def classify_code(code: int | None) -> type[ServiceError] | None:
    """Return the error that a code becomes; None for a code that is not in the table."""
    return _BY_CODE[code][0] if code in _BY_CODE else None


def error_name(code: int | None) -> str:
    """Return the name of a code; "" for a code that is not in the table."""
    return _BY_CODE[code][1] if code in _BY_CODE else ""


def describe_code(code: int | None, server_name: str = "") -> str:
    """Return the number and the name of an error code, for the operator."""
    name = error_name(code) or server_name
    return f"code {code}, {name}" if name else f"error code {code} is unknown to this service"
