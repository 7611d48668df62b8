"""The error codes of MongoDB servers: their names, and what each means for the service.

The names are those of the server's src/mongo/base/error_codes.yml (read at 9.0). A name such as
Location17217 is how the server names an error that has only a number. A code that is not in the
table is treated as transient, and reported as unknown.
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
        "MaxStalenessOutOfRange": 160,
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
        "Location17217": 17217,  # distinct: the values take more than 16 MB
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
        "NamespaceNotFound": 26,
        "IndexNotFound": 27,
        "CursorNotFound": 43,
        "LockBusy": 46,
        "WriteConcernTimeout": 64,
        "ShardNotFound": 70,
        "NodeNotFound": 74,
        "OperationIncomplete": 77,
        "NoProgressMade": 82,
        "RemoteResultsUnavailable": 83,
        "NetworkTimeout": 89,
        "ShutdownInProgress": 91,
        "NotYetInitialized": 94,
        "OperationFailed": 96,
        "LockFailed": 107,
        "ConfigurationInProgress": 109,
        "WriteConflict": 112,
        "ConflictingOperationInProgress": 117,
        "FailedToSatisfyReadPreference": 133,
        "ReadConcernMajorityNotAvailableYet": 134,
        "SSLHandshakeFailed": 141,
        "PooledConnectionsDropped": 145,
        "StaleEpoch": 150,
        "QueryPlanKilled": 175,
        "LinearizableReadConcernError": 187,
        "PrimarySteppedDown": 189,
        "NetworkInterfaceExceededTimeLimit": 202,
        "ShardingStateNotInitialized": 203,
        "NoSuchSession": 206,
        "TooManyLocks": 208,
        "StaleClusterTime": 209,
        "CannotVerifyAndSignLogicalTime": 210,
        "DatabaseDropPending": 215,
        "ElectionInProgress": 216,
        "CursorKilled": 237,
        "StaleDbVersion": 249,
        "NoSuchTransaction": 251,
        "TooManyLogicalSessions": 261,
        "ExceededTimeLimit": 262,
        "TooManyFilesOpen": 264,
        "IndexBuildAborted": 276,
        "ClientDisconnect": 279,
        "IndexBuildAlreadyInProgress": 285,
        "SplitHorizonChange": 303,
        "ObjectIsBusy": 314,
        "ConnectionPoolExpired": 317,
        "MovePrimaryInProgress": 319,
        "ReshardCollectionInProgress": 338,
        "ShardCannotRefreshDueToLocksHeld": 343,
        "InterruptedDueToStorageChange": 355,
        "TemporarilyUnavailable": 365,
        "UserWritesBlocked": 371,
        "ConnectionError": 384,
        "ResourceExhausted": 402,
        "LDAPRoleAcquisitionError": 404,
        "MigrationBlockingOperationCoordinatorCleaningUp": 406,
        "PooledConnectionAcquisitionExceededTimeLimit": 407,
        "AdmissionQueueOverflow": 433,
        "RateLimitExceeded": 449,
        "PooledConnectionAcquisitionRejected": 450,
        "InterruptedDueToReshardingCriticalSection": 453,
        "IngressRequestRateLimitExceeded": 462,
        "SocketException": 9001,
        "LegacyNotPrimary": 10058,
        "NotWritablePrimary": 10107,
        "InterruptedAtShutdown": 11600,
        "Interrupted": 11601,
        "InterruptedDueToReplStateChange": 11602,
        "BackgroundOperationInProgressForDatabase": 12586,
        "BackgroundOperationInProgressForNamespace": 12587,
        "StaleConfig": 13388,
        "NotPrimaryNoSecondaryOk": 13435,
        "NotPrimaryOrSecondary": 13436,
        "OutOfDiskSpace": 14031,
        "ClientMarkedKilled": 46841,
        "RetriableRemoteCommandFailure": 91331,
        "InterruptedDueToFCVChange": 10045600,
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


def classify(code: int | None) -> ErrorClass:
    """Return what an error code means; a code that is not in the table is transient."""
    return _BY_CODE[code][0] if code in _BY_CODE else ErrorClass.TRANSIENT


def is_known(code: int | None) -> bool:
    """Return whether the table has this code."""
    return code in _BY_CODE


def describe(code: int | None) -> str:
    """Return the name and the number of an error code, for the operator."""
    if code in _BY_CODE:
        return f"code {code}, {_BY_CODE[code][1]}"
    return f"error code {code} is unknown to this service"
