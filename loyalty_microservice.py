#!/usr/bin/env python3
"""The command: parse, load settings, connect, dispatch, exit codes."""

from __future__ import annotations

import os
import signal
import sys


def _is_daemon() -> bool:
    return all(a.startswith("--env-file") for a in sys.argv[1:] if a.startswith("-"))


def _exit_on_early_signal(number: int, _frame: object) -> None:
    # A daemon that is told to stop has done so; of anything else, nobody is to think it is done.
    asked_to_stop = number == signal.SIGTERM and _is_daemon()
    os._exit(0 if asked_to_stop else 128 + number)


# Nothing has been begun until `main` takes over.
if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _exit_on_early_signal)
    if _is_daemon():  # SIGHUP waits until the daemon runs, which then reloads its settings
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

import argparse
import io
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from config import VERSION, Settings, settings_help
from loyalty import machine, report
from loyalty.daemon import Daemon
from loyalty.env_file import load_settings
from loyalty.errors import ConfigurationError, Exit, ServiceError
from loyalty.examine import run_preflight
from loyalty.history import History, is_fresh
from loyalty.live.watcher import keeps_pre_images, live_updates_blocker
from loyalty.logs import log_to_stderr
from loyalty.metrics import Metrics
from loyalty.mongo.connection import connect
from loyalty.recount.customer_ids import parse_id_argument
from loyalty.recount.index import create_index
from loyalty.recount.runner import RecountRequest, connect_and_verify, run_recount
from loyalty.recount.statuses import explained, orders_of
from loyalty.service import Service
from loyalty.systemd import update_environment

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
        try:
            settings = load_settings(args.env_file, ENV_FILE)
        except ConfigurationError as error:
            _log_settings_problems(error, args.env_file or ENV_FILE)
            return error.exit_code
        log.setLevel(settings.log_level)
        code = int(args.run(args, settings))
        if sys.stdout is not None:
            sys.stdout.flush()
    except ServiceError as error:
        log.error("%s", error, extra={"event": "failed"})
        return error.exit_code
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:  # `--status | head`: whoever reads stdout has seen enough
        return Exit.OK
    except OSError as error:  # of the driver's, and of files, none comes this far
        log.error(
            "the results cannot be written: %s", error.strerror, extra={"event": "no_results"}
        )
        return Exit.FINDINGS
    except Exception:
        log.exception("bug")
        return Exit.INTERNAL_ERROR
    return code


def _log_settings_problems(error: ConfigurationError, env_file: Path) -> None:
    for problem in error.problems:
        log.error("%s", problem, extra=_CONFIGURATION)
    log.error(
        "settings come from the environment or from %s; .env.example explains them; "
        "to try the service without a database of your own: make demo",
        env_file,
        extra=_CONFIGURATION,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loyalty_microservice.py",
        description=_WHAT,
        epilog=_EXIT_CODES + settings_help(),
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
    def reload_settings() -> Settings:
        update_environment()
        return load_settings(args.env_file, ENV_FILE)

    service = Service(settings, reload_settings)
    Daemon(service).run()
    return Exit.OK


def _once(args: argparse.Namespace, settings: Settings) -> int:
    if args.customer:
        return _customers(args, settings, write=True)
    metrics = Metrics(settings)
    with metrics.count_failures(), connect_and_verify(settings, writing=True) as connection:
        result = run_recount(
            connection, settings, History(connection.recounts), RecountRequest(force=args.force)
        )
    metrics.record_recount(result)
    if args.json:
        machine.print_json(machine.of_recount(result))
    else:
        print(f"Recount {result.outcome} in {result.seconds:.1f} s")
        report.print_totals(result)
    return Exit.OK if result.outcome == "succeeded" else Exit.FINDINGS


def _dry_run(args: argparse.Namespace, settings: Settings) -> int:
    if args.customer:
        return _customers(args, settings, write=False)
    with connect_and_verify(settings, writing=False) as connection:
        result = run_recount(connection, settings, History(None), RecountRequest(write=False))
    if args.json:
        machine.print_json(machine.of_dry_run(result))
    else:
        report.print_dry_run(result)
    return Exit.FINDINGS if result.totals.changed else Exit.OK


def _customers(args: argparse.Namespace, settings: Settings, *, write: bool) -> int:
    code, documents = Exit.OK, []
    with connect_and_verify(settings, writing=write) as connection:
        for text in args.customer:
            orders, changes, users = [], [], 0
            for customer, forms in parse_id_argument(text):
                task = RecountRequest(customers=[(customer, forms)], write=write)
                result = run_recount(connection, settings, History(None), task)
                changes += result.totals.largest
                users += result.totals.users
                if result.outcome != "succeeded" or (result.totals.changed and not write):
                    code = Exit.FINDINGS
                found = orders_of(connection, settings, customer, forms)
                orders += explained(settings, found, user_exists=result.totals.users > 0)
            if args.json:
                documents.append(machine.of_customer(text, orders, changes))
            else:
                report.print_customer(text, settings, orders, changes)
            if not users:
                code = Exit.FINDINGS
    if args.json:
        machine.print_json({"customers": documents})
    return code


def _status(args: argparse.Namespace, settings: Settings) -> int:
    with connect(settings, writing=False) as connection:
        history, now = History(connection.recounts), datetime.now(UTC)
        records, heartbeat, age = history.newest(10), history.heartbeat(), history.age(now)
    if args.json:
        machine.print_json(machine.of_status(records, heartbeat, age, now, settings))
    else:
        report.print_records(records)
        report.print_live(heartbeat, now, wanted=settings.live_updates)
        report.print_age(age, settings.recount_interval)
    return Exit.OK if is_fresh(age, settings.recount_interval) else Exit.FINDINGS


def _check_config(args: argparse.Namespace, settings: Settings) -> int:
    misplaced: ConfigurationError | None = None
    with connect_and_verify(settings, writing=True, recording=False) as connection:
        try:
            problem = History(connection.recounts).check()
        except ConfigurationError as error:  # said at the end: the data may have other problems
            problem, misplaced = str(error), error
        not_live = live_updates_blocker(connection, settings) if settings.live_updates else None
        if not args.json:  # before the look at the data, which takes its time
            report.print_settings(settings, connection, problem)
            if settings.live_updates:
                report.print_live_updates_check(connection, not_live, keeps_pre_images(connection))
        found = run_preflight(connection, settings)
        found.problems += filter(None, [Metrics(settings).check()])
        if not args.json:
            report.print_examination(found, settings)
        elif not misplaced:
            found.problems += [f"live updates will not work: {not_live}"] if not_live else []
            machine.print_json(machine.of_check(settings, connection, problem, found))
    if misplaced:
        raise misplaced
    return Exit.FINDINGS if problem or not_live or found.problems else Exit.OK


def _create_index(args: argparse.Namespace, settings: Settings) -> int:
    with connect(settings, writing=False) as connection:
        name = create_index(connection.orders, settings)
        print(f"{connection.orders.full_name} has the index {name}")
    return Exit.OK


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.shutdown()
    os._exit(code)  # the driver's exit handler would wait for each server that does not answer
