#!/usr/bin/env python3
"""The command: parse, load settings, connect, dispatch, exit codes."""

from __future__ import annotations

import os
import signal
import sys


def _leave(number: int, _frame: object) -> None:
    modes = [a for a in sys.argv[1:] if a.startswith("-") and not a.startswith("--env-file")]
    # A daemon that is told to stop has done so; of anything else, nobody is to think it is done.
    asked_to_stop = number == signal.SIGTERM and not modes
    os._exit(0 if asked_to_stop else 128 + number)


# Nothing has been begun until `main` takes over.
if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _leave)

import argparse
import io
import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from config import VERSION, Settings, help_on_settings
from loyalty import machine, report
from loyalty.daemon import Daemon
from loyalty.env_file import settings_of
from loyalty.errors import ConfigError, Exit, Misconfigured, ServiceError
from loyalty.examine import examine
from loyalty.history import History, is_fresh
from loyalty.live.watcher import keeps_pre_images, why_not_live
from loyalty.logs import log_to_stderr
from loyalty.metrics import Metrics
from loyalty.mongo.connection import connect
from loyalty.recount.customer_ids import forms_of
from loyalty.recount.index import create_index
from loyalty.recount.runner import Task, open_shop, perform
from loyalty.recount.statuses import explained, orders_of
from loyalty.service import Service

log = logging.getLogger("loyalty")

ENV_FILE = Path(__file__).with_name(".env")
_CONFIGURATION = {"event": "configuration"}  # for LOG_FORMAT=json
_WHAT = """\
Counts each customer's shipped orders and keeps loyalty_points in the users collection right:
at once, then every RECOUNT_INTERVAL until it is stopped."""
_EXIT_CODES = """\
exit codes:
  0 fine; 1 a check found something, or users refused their update; 2 usage;
  65 refused by the guard; 69 database unreachable, or too slow; 70 a bug; 78 configuration

settings, from the environment or .env; .env.example explains them:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = _parse(argv)
    log_to_stderr()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        settings = settings_of(args.env_file, ENV_FILE)
        log.setLevel(settings.log_level)
        code = int(args.run(args, settings))
        if sys.stdout is not None:
            sys.stdout.flush()
    except ConfigError as error:
        for fault in error.faults:
            log.error("%s", fault, extra=_CONFIGURATION)
        log.error(
            "settings come from the environment or from %s; .env.example explains them; "
            "to try the service without a database of your own: make demo",
            args.env_file or ENV_FILE,
            extra=_CONFIGURATION,
        )
        return error.exit_code
    except ServiceError as error:
        log.error("%s", error, extra={"event": "failed"})
        return error.exit_code
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:  # `--status | head`: whoever reads stdout has seen enough
        return Exit.FINE
    except OSError as error:  # of the driver's, and of files, none comes this far
        log.error(
            "the results cannot be written: %s", error.strerror, extra={"event": "no_results"}
        )
        return Exit.FOUND
    except Exception:
        log.exception("bug")
        return Exit.BUG
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loyalty_microservice.py",
        description=_WHAT,
        epilog=_EXIT_CODES + help_on_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_daemon)
    modes = parser.add_mutually_exclusive_group()
    for flag, run, text in (
        ("--once", _once, "one recount, then exit"),
        ("--dry-run", _dry_run, "show what a recount would change; exit 1 if anything"),
        ("--status", _status, "the last recounts; exit 1 if the points are stale"),
        ("--check-config", _check_config, "check settings and permissions, and look at the data"),
        ("--create-index", _create_index, "make the index on orders that recounts want"),
    ):
        modes.add_argument(flag, dest="run", action="store_const", const=run, help=text)
    customer = "only this customer; repeatable; with --once or --dry-run"
    parser.add_argument("--customer", metavar="ID", action="append", default=[], help=customer)
    force = "let this recount past the guard; with --once"
    parser.add_argument("--force", action="store_true", help=force)
    parser.add_argument("--json", action="store_true", help="results as one JSON document")
    env_file = f"read settings from this file, not from {ENV_FILE.name}"
    parser.add_argument("--env-file", metavar="PATH", type=Path, help=env_file)
    parser.add_argument("--version", action="version", version=VERSION)
    args = parser.parse_args(argv)
    if args.customer and args.run not in (_once, _dry_run):
        parser.error("--customer goes with --once or --dry-run")
    if any("\udc80" <= character <= "\udcff" for character in "".join(args.customer)):
        parser.error("--customer: not text in this terminal's encoding")
    if args.force and (args.run is not _once or args.customer):
        parser.error("--force goes with --once, of everyone")
    if args.json and args.run in (_daemon, _create_index):
        parser.error("--json goes with --once, --dry-run, --status or --check-config")
    return args


def _daemon(args: argparse.Namespace, settings: Settings) -> int:
    service = Service(settings, lambda: settings_of(args.env_file, ENV_FILE))
    # The server ends a count at COUNT_TIMEOUT; after that every answer comes within a minute.
    patience = settings.count_timeout + timedelta(minutes=2)
    Daemon(service, interval=settings.recount_interval, patience=patience).run()
    return Exit.FINE


def _once(args: argparse.Namespace, settings: Settings) -> int:
    if args.customer:
        return _customers(args, settings, write=True)
    metrics = Metrics(settings)
    with metrics.counting(), open_shop(settings, writing=True) as connection:
        result = perform(connection, settings, History(connection.recounts), Task(force=args.force))
    metrics.recounted(result)
    if args.json:
        machine.print_json(machine.of_recount(result))
    else:
        print(f"Recount {result.outcome} in {result.seconds:.1f} s")
        report.print_totals(result)
    return Exit.FINE if result.outcome == "succeeded" else Exit.FOUND


def _dry_run(args: argparse.Namespace, settings: Settings) -> int:
    if args.customer:
        return _customers(args, settings, write=False)
    with open_shop(settings, writing=False) as connection:
        result = perform(connection, settings, History(None), Task(write=False))
    if args.json:
        machine.print_json(machine.of_dry_run(result))
    else:
        report.print_dry_run(result)
    return Exit.FOUND if result.totals.changed else Exit.FINE


def _customers(args: argparse.Namespace, settings: Settings, *, write: bool) -> int:
    code, documents = Exit.FINE, []
    with open_shop(settings, writing=write) as connection:
        for text in args.customer:
            orders, changes, users = [], [], 0
            for customer, forms in forms_of(text):
                task = Task(customers=[(customer, forms)], write=write)
                result = perform(connection, settings, History(None), task)
                changes += result.totals.largest
                users += result.totals.users
                if result.outcome != "succeeded" or (result.totals.changed and not write):
                    code = Exit.FOUND
                found = orders_of(connection, settings, customer, forms)
                orders += explained(settings, found, of_a_user=result.totals.users > 0)
            if args.json:
                documents.append(machine.of_customer(text, orders, changes))
            else:
                report.print_customer(text, settings, orders, changes)
            if not users:
                code = Exit.FOUND
    if args.json:
        machine.print_json({"customers": documents})
    return code


def _status(args: argparse.Namespace, settings: Settings) -> int:
    with connect(settings, writing=False) as connection:
        history, now = History(connection.recounts), datetime.now(UTC)
        records, beat, age = history.newest(10), history.heartbeat(), history.age(now)
    if args.json:
        machine.print_json(machine.of_status(records, beat, age, now, settings))
    else:
        report.print_records(records)
        report.print_live(beat, now, wanted=settings.live_updates)
        report.print_age(age, settings.recount_interval)
    return Exit.FINE if is_fresh(age, settings.recount_interval) else Exit.FOUND


def _check_config(args: argparse.Namespace, settings: Settings) -> int:
    misplaced: Misconfigured | None = None
    with open_shop(settings, writing=True, recording=False) as connection:
        try:
            problem = History(connection.recounts).check()
        except Misconfigured as error:  # said at the end: the data may have other problems
            problem, misplaced = str(error), error
        not_live = why_not_live(connection, settings) if settings.live_updates else None
        if not args.json:  # before the look at the data, which takes its time
            report.print_settings(settings, connection, problem)
            if settings.live_updates:
                report.print_prospects(connection, not_live, keeps_pre_images(connection))
        found = examine(connection, settings)
        found.problems += filter(None, [Metrics(settings).check()])
        if not args.json:
            report.print_examination(found, settings)
        elif not misplaced:
            found.problems += [f"live updates will not work: {not_live}"] if not_live else []
            machine.print_json(machine.of_check(settings, connection, problem, found))
    if misplaced:
        raise misplaced
    return Exit.FOUND if problem or not_live or found.problems else Exit.FINE


def _create_index(args: argparse.Namespace, settings: Settings) -> int:
    with connect(settings, writing=False) as connection:
        name = create_index(connection.orders, settings)
        print(f"{connection.orders.full_name} has the index {name}")
    return Exit.FINE


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.shutdown()
    os._exit(code)  # the driver's exit handler would wait for each server that does not answer
