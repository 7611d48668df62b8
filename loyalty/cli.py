"""The command line: arguments, dispatch, exit codes."""

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bson import ObjectId

from config import VERSION, Settings, settings_help
from loyalty.commands import (
    changes,
    check_config,
    create_index,
    dry_run,
    once,
    status,
    undo,
    unknown_customers,
)
from loyalty.commands.output import ResultsNotWritten, flush_results
from loyalty.daemon import Daemon
from loyalty.env_file import load_settings
from loyalty.errors import ConfigurationError, Exit, RecountRefused, ServiceError
from loyalty.logs import log, log_to_stderr
from loyalty.service import Service

ENV_FILE = Path(__file__).parents[1] / ".env"
_DESCRIPTION = """\
Counts each customer's shipped orders (ORDER_STATUSES), and stores each user's points.
Without a command, it runs as a daemon: it recounts immediately, and then every RECOUNT_INTERVAL."""
_EPILOG = """\
exit codes:
  0   success
  1   a check found a problem, points would change, or some updates failed
  2   wrong usage
  65  the safety checks refused the recount
  69  the database is unavailable or slow, or there is no space for temporary files
  70  internal error
  78  wrong settings, credentials, privileges or server

settings, from the environment or from .env; .env.example explains each:
"""

_COMMANDS = (
    ("--once", once.run, "make one recount, then exit"),
    (
        "--dry-run",
        dry_run.run,
        "show what a recount would change; exit 1 if it would change points or be refused",
    ),
    ("--status", status.run, "show the last recounts; exit 1 if the points are stale"),
    (
        "--check-config",
        check_config.run,
        "check settings, privileges and data; exit 1 if there is a problem",
    ),
    ("--unknown-customers", unknown_customers.run, "list all unknown customers, as JSON lines"),
    ("--create-index", create_index.run, "create the indexes that recounts use"),
)


def run_process() -> NoReturn:
    """Run the command line as this process, and end it."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal can show every character
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.shutdown()
    os._exit(code)  # the driver's exit handler would wait for each server that does not answer


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_arguments(argv)
    log_to_stderr()
    try:
        return _run_command(args)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _run_command(args: argparse.Namespace) -> int:
    """Run the command and return its exit code. Raises KeyboardInterrupt."""
    try:
        if args.run is not _run_daemon:  # the handler of the entry point ends a daemon with 0
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            settings = load_settings(args.env_file, ENV_FILE)
        except ConfigurationError as error:
            _log_settings_problems(error, args.env_file or ENV_FILE)
            return error.exit_code
        try:
            return int(args.run(args, settings))
        finally:
            flush_results()
    except ResultsNotWritten as error:
        log.error('results_not_written error="%s"', error)
        return error.exit_code
    except RecountRefused as error:
        log.error('refused reason="%s"', error)
        return error.exit_code
    except ServiceError as error:
        log.error('failed error="%s"', error)
        return error.exit_code
    except Exception:
        log.exception("internal_error")
        return Exit.INTERNAL_ERROR


def _log_settings_problems(error: ConfigurationError, env_file: Path) -> None:
    for problem in error.problems:
        log.error('configuration_problem error="%s"', problem)
    explanation = "--help explains them"
    if ENV_FILE.with_name(".env.example").exists():  # an installation has none
        explanation = ".env.example explains them; to try the service without a database: make demo"
    log.info(
        'configuration_help env_file=%s text="settings come from the environment or this file; %s"',
        env_file,
        explanation,
    )


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; `run` is the function of the command."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    args.dry_run = args.run is dry_run.run
    if args.undo:
        if args.run not in (None, dry_run.run) or args.changes:
            parser.error("--undo cannot be combined with another command, except --dry-run")
        args.run = undo.run
    elif args.changes:
        args.run = changes.run
    if args.customer and args.run not in (once.run, dry_run.run):
        parser.error("--customer needs --once or --dry-run, without --undo")
    if args.force and (args.run is not once.run or args.customer):
        parser.error("--force needs --once, without --customer")
    if args.json and args.run in (None, create_index.run):
        parser.error("--json cannot be used with --create-index or with the daemon")
    args.run = args.run or _run_daemon
    return args


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loyalty_microservice.py",
        description=_DESCRIPTION,
        epilog=_EPILOG + settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the entry point knows the daemon by its options
    )
    commands = parser.add_mutually_exclusive_group()
    for flag, run, text in _COMMANDS:
        commands.add_argument(flag, dest="run", action="store_const", const=run, help=text)
    parser.add_argument(  # not in the group: it can be combined with --dry-run
        "--undo",
        metavar="RECOUNT",
        type=_parse_recount,
        help="restore the points that users had before a recount (its id, or last); with "
        "--dry-run, only show this; exit 1 if some users are not restored",
    )
    commands.add_argument(
        "--changes",
        metavar="RECOUNT",
        type=_parse_recount,
        help="list the changes of a recount (its id, or last)",
    )
    parser.add_argument(
        "--customer",
        metavar="ID",
        type=_parse_customer,
        action="append",
        default=[],
        help='with --once or --dry-run: recount only this customer; repeatable; "" shows the '
        "orders without customer; for an id that begins with a hyphen: --customer=-...",
    )
    parser.add_argument(
        "--force", action="store_true", help="with --once: override the safety checks"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--env-file",
        metavar="PATH",
        type=Path,
        help=f"read settings from this file instead of {ENV_FILE.name}",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def _parse_recount(text: str) -> str:
    if text != "last" and not ObjectId.is_valid(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither the id of a recount nor last")
    return text


def _parse_customer(text: str) -> str:
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise argparse.ArgumentTypeError("the id is not valid in this terminal's encoding")
    return text


def _run_daemon(args: argparse.Namespace, settings: Settings) -> Exit:
    Daemon(Service(settings, lambda: load_settings(args.env_file, ENV_FILE))).run()
    return Exit.OK
