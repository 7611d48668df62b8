#!/usr/bin/env python3
"""The command: parse, load settings, connect, dispatch, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import config
from config import VERSION, ConfigError, Settings
from loyalty import report
from loyalty.daemon import Daemon
from loyalty.history import History, Outcome
from loyalty.mongo import (
    Connection,
    Misconfigured,
    ServiceError,
    connect,
    create_index,
    index_is_missing,
)
from loyalty.recount import Recount, Refused, orders_by_status

log = logging.getLogger("loyalty")

ENV_FILE = Path(__file__).with_name(".env")
URI_NAMES = {"MONGODB_URI", "MONGODB_URI_FILE"}
FOUND_SOMETHING, BUG, INTERRUPTED = 1, 70, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = _parse(argv)
    report.log_to_stderr()
    try:
        settings = _settings(args.env_file)
        log.setLevel(settings.log_level)
        return int(args.run(args, settings))
    except ConfigError as error:
        for fault in error.faults:
            log.error("%s", fault)
        log.error(
            "settings come from the environment or from %s; .env.example explains them; "
            "to try the service without a database of your own: make demo",
            args.env_file or ENV_FILE,
        )
        return error.exit_code
    except ServiceError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `--status | head`: whoever reads stdout has seen enough
        return 0
    except Exception:
        log.exception("bug")
        return BUG


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loyalty_microservice.py",
        description="Counts each customer's shipped orders and keeps loyalty_points in the users "
        "collection right: at once, then every RECOUNT_INTERVAL (2h) until it is stopped.",
        epilog="Exit codes: 0 fine; 1 a check found something, or users refused their update; "
        "2 usage; 65 refused by the guard; 69 database unreachable; 70 a bug; 78 configuration. "
        "Settings: see .env.example.",
    )
    parser.set_defaults(run=_daemon)
    modes = parser.add_mutually_exclusive_group()
    for flag, run, text in (
        ("--once", _once, "one recount, then exit"),
        ("--dry-run", _dry_run, "show what a recount would change; exit 1 if anything"),
        ("--status", _status, "the last recounts; exit 1 if the points are stale"),
        ("--check-config", _check_config, "check settings, connection and permissions"),
        ("--create-index", _create_index, "make the index on orders that recounts want"),
    ):
        modes.add_argument(flag, dest="run", action="store_const", const=run, help=text)
    customer = "only this customer; repeatable; with --once or --dry-run"
    parser.add_argument("--customer", metavar="ID", action="append", default=[], help=customer)
    force = "let this recount past the guard; with --once"
    parser.add_argument("--force", action="store_true", help=force)
    env_file = f"read settings from this file, not from {ENV_FILE.name}"
    parser.add_argument("--env-file", metavar="PATH", type=Path, help=env_file)
    parser.add_argument("--version", action="version", version=VERSION)
    args = parser.parse_args(argv)
    if args.customer and args.run not in (_once, _dry_run):
        parser.error("--customer goes with --once or --dry-run")
    if any("\udc80" <= character <= "\udcff" for character in "".join(args.customer)):
        parser.error("--customer: not text in this terminal's encoding")
    if args.force and args.run is not _once:
        parser.error("--force goes with --once")
    return args


def _settings(env_file: Path | None) -> Settings:
    values: dict[str, str] = {}
    path = env_file or ENV_FILE
    if env_file or path.exists():
        values = config.read_env_file(path)
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            log.warning("others can read %s: chmod 600 %s", path, path)
    if os.environ.keys() & URI_NAMES:  # either of them outside replaces both in the file
        values = {name: value for name, value in values.items() if name not in URI_NAMES}
    return config.load({**values, **os.environ})


def _connect(settings: Settings, *, writing: bool) -> Connection:
    connection = connect(settings, writing=writing)
    log.info("connected %s", connection.description)
    if not connection.snapshots:
        log.warning(
            "not_exact a standalone server cannot read as of one point in time: an order that "
            "changes during a recount may be missed or counted twice"
        )
    if index_is_missing(connection.orders):
        orders = connection.orders.full_name
        log.warning("no_index {status, customer_id} on %s: make it with --create-index", orders)
    return connection


def _daemon(args: argparse.Namespace, settings: Settings) -> int:
    service = _Service(settings, lambda: _settings(args.env_file))
    # The server ends a count at COUNT_TIMEOUT; after that every answer comes within a minute.
    patience = settings.count_timeout + timedelta(minutes=2)
    interval = settings.recount_interval
    Daemon(service.connect, service.work, interval=interval, patience=patience).run()
    return 0


class _Service:
    """What the daemon repeats: it keeps a connection, and makes a new one when that is rejected."""

    def __init__(self, settings: Settings, reload: Callable[[], Settings]) -> None:
        self._settings = settings
        self._reload = reload
        self._connection: Connection | None = None
        self._history = History(None)

    def connect(self) -> None:
        self._connection = _connect(self._settings, writing=True)
        self._history = History(self._connection.recounts)

    def work(self, on_progress: Callable[[], None]) -> str:
        connection = self._connection or self._connect_anew()
        recount = Recount(connection, self._settings, _now(), on_progress=on_progress)
        try:
            _run(recount, self._history)
        except Refused as error:  # to try again soon would not help; the next is on schedule
            log.error("refused %s", error)
            return f"refused: {error}"
        except Misconfigured:
            connection.client.close()
            self._connection = None
            raise
        totals = recount.totals
        return f"recounted as of {totals.as_of:%Y-%m-%d %H:%M:%S} UTC, {totals.changed:,} changed"

    def _connect_anew(self) -> Connection:
        try:
            self._settings = self._reload()  # the password may have changed, and the file with it
        except ConfigError as error:
            raise Misconfigured(str(error)) from error
        self.connect()
        assert self._connection is not None
        return self._connection


def _run(recount: Recount, history: History, *, force: bool = False) -> None:
    """Do a recount, record it and log it. Raises what ended it."""
    try:
        with recount:
            recount.count()
            if not force and (reason := recount.refusal()):
                raise Refused(reason)
            recount.write()
    except Exception as error:
        outcome: Outcome = "refused" if isinstance(error, Refused) else "failed"
        # The text of an exception that is not ours could hold anything.
        text = str(error) if isinstance(error, ServiceError) else type(error).__name__
        history.write(recount, outcome, text, _now())
        raise
    history.write(recount, "succeeded", None, _now())
    if not recount.totals.users:
        log.warning("no_users found: are MONGODB_DATABASE and USERS_COLLECTION right?")
    log.info(
        "recount outcome=succeeded %s", report.fields(recount.totals, _now() - recount.started_at)
    )


def _once(args: argparse.Namespace, settings: Settings) -> int:
    with _connect(settings, writing=True) as connection:
        if args.customer:
            return _customers(connection, settings, args.customer, write=True)
        recount = Recount(connection, settings, _now())
        _run(recount, History(connection.recounts), force=args.force)
    print(f"Recount succeeded in {(_now() - recount.started_at).total_seconds():.1f} s")
    report.print_totals(recount.totals)
    return 0


def _dry_run(args: argparse.Namespace, settings: Settings) -> int:
    with _connect(settings, writing=False) as connection:
        if args.customer:
            return _customers(connection, settings, args.customer, write=False)
        with Recount(connection, settings, _now()) as recount:
            recount.count()
    print("Dry run: nothing is written")
    report.print_totals(recount.totals)
    report.print_changes(recount.totals.largest)
    if reason := recount.refusal():
        print(f"The guard would refuse this: {reason}")
    return FOUND_SOMETHING if recount.totals.changed else 0


def _customers(
    connection: Connection, settings: Settings, customers: Sequence[str], *, write: bool
) -> int:
    code = 0
    for customer in customers:
        with Recount(connection, settings, _now(), customer=customer) as recount:
            recount.count()
            totals = recount.totals
            if write:
                recount.write()
        if totals.users:
            orders = orders_by_status(connection, customer)
            report.print_customer(customer, orders, totals.largest)
        else:
            print(f"{customer}: no user has this id, be it text, number, UUID or ObjectId")
        if not totals.users or (totals.changed and not write):
            code = FOUND_SOMETHING
    return code


def _status(args: argparse.Namespace, settings: Settings) -> int:
    with connect(settings, writing=False) as connection:
        history = History(connection.recounts)
        report.print_records(history.newest(10))
        fresh = report.print_age(history.age(_now()), settings.recount_interval)
    return 0 if fresh else FOUND_SOMETHING


def _check_config(args: argparse.Namespace, settings: Settings) -> int:
    with _connect(settings, writing=True) as connection:
        problem = History(connection.recounts).check()
        report.print_settings(settings, connection, problem)
    return FOUND_SOMETHING if problem else 0


def _create_index(args: argparse.Namespace, settings: Settings) -> int:
    with connect(settings, writing=False) as connection:
        print(f"{connection.orders.full_name} has the index {create_index(connection.orders)}")
    return 0


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    code = main()
    # The driver's exit handler would wait a second for each server that does not answer.
    with suppress(AttributeError, BrokenPipeError):  # stdout may be closed, at either end
        sys.stdout.flush()
    logging.shutdown()
    os._exit(code)
