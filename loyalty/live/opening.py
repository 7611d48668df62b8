"""Opens the change stream, and finds problems that prevent live updates."""

from config import Settings
from loyalty.errors import ConfigurationError, ServiceError
from loyalty.live.watcher import ChangeStreamWatcher, LiveLimits
from loyalty.logs import log
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.privileges import require_privileges
from loyalty.recount.index import find_index_problem
from loyalty.recount.snapshot import pin_cluster_time
from loyalty.retry import retry


def open_watcher(
    connection: Connection, settings: Settings, limits: LiveLimits
) -> ChangeStreamWatcher:
    """Open the change stream at the newest cluster time. Raises ServiceError."""

    def attempt() -> ChangeStreamWatcher:
        start_after = pin_cluster_time(connection)
        if start_after is None:
            reason = connection.snapshot_unsupported_reason or "the server has no snapshots"
            raise ConfigurationError(
                "live updates need MongoDB 5.0 or newer, as a replica set or a sharded cluster: "
                f"{reason}"
            )
        if problem := find_index_problem(connection.orders, settings):
            raise ConfigurationError(f"live updates need a usable index: {problem}")
        return ChangeStreamWatcher(connection, settings, start_after, limits)

    return retry(attempt, limits.opening_retry)


def find_live_updates_problem(connection: Connection, settings: Settings) -> str | None:
    """Return the reason why live updates cannot work, or None. Raises DatabaseUnavailable."""
    try:
        open_watcher(connection, settings, LiveLimits()).close()
        if connection.recounts is not None:  # for the heartbeat
            require_privileges(connection.recounts, "update")
    except ConfigurationError as error:
        return str(error)
    return None


def keeps_pre_images(connection: Connection) -> bool | None:
    """Return whether the orders keep pre-images; None if that option cannot be read."""
    try:
        with map_driver_errors("listCollections", connection.orders.database.name):
            options = connection.orders.options()
    except ServiceError:
        return None
    return bool(options.get("changeStreamPreAndPostImages", {}).get("enabled"))


def warn_if_pre_images_are_off(connection: Connection) -> None:
    """Warn if pre-images are off, for example after a restore, which does not restore them."""
    if connection.supports_pre_images and keeps_pre_images(connection) is False:
        log.warning(
            'pre_images_off effect="after an order is deleted or its customer changes, points '
            'change only at the next full recount" fix="--check-config prints the command"'
        )


def describe_mixed_case(settings: Settings) -> str:
    """Return why ids in mixed case end live updates, and the command that normalizes them."""
    field, key = settings.customer_field, settings.user_key_field
    hex_condition = "{$regex: '^[0-9A-Fa-f]{24}$', $not: {$type: 'array'}}"
    to_lower = "{$toLower: '$" + field + "'}"
    return (
        "some customer ids are hex strings in mixed case, which an index lookup cannot find. To "
        f"normalize those of orders: db.getCollection('{settings.orders}')."
        f"updateMany({{'{field}': {hex_condition}}}, [{{$set: {{'{field}': {to_lower}}}}}]). A "
        f"user whose {key} is such a string must "
        f"{'be inserted again in' if key == '_id' else 'get it in'} lower case"
    )
