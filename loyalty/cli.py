"""The command line: arguments, dispatch, exit codes."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from config import VERSION, Settings, settings_help
from loyalty.commands import check_config, create_index, dry_run, once, status
from loyalty.daemon import Daemon
from loyalty.env_file import load_settings
from loyalty.errors import ConfigurationError, Exit, ServiceError
from loyalty.logs import log_to_stderr
from loyalty.service import Service

log = logging.getLogger("loyalty")

ENV_FILE = Path(__file__).parents[1] / ".env"
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
        ("--once", once.run, "one recount, then exit"),
        ("--dry-run", dry_run.run, "show what a recount would change; exit 1 if anything"),
        ("--status", status.run, "the last recounts; exit 1 if the points are stale"),
        (
            "--check-config",
            check_config.run,
            "check settings and permissions, and look at the data",
        ),
        ("--create-index", create_index.run, "make the index on orders that recounts want"),
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
    if args.customer and args.run not in (once.run, dry_run.run):
        parser.error("--customer goes with --once or --dry-run")
    if any("\udc80" <= character <= "\udcff" for character in "".join(args.customer)):
        parser.error("--customer: not text in this terminal's encoding")
    if args.force and (args.run is not once.run or args.customer):
        parser.error("--force goes with --once, of everyone")
    if args.json and args.run in (_daemon, create_index.run):
        parser.error("--json goes with --once, --dry-run, --status or --check-config")
    return args


def _daemon(args: argparse.Namespace, settings: Settings) -> int:
    service = Service(settings, lambda: load_settings(args.env_file, ENV_FILE))
    # The server ends a count at COUNT_TIMEOUT; after that every answer comes within a minute.
    stall_timeout = settings.count_timeout + timedelta(minutes=2)
    Daemon(service, interval=settings.recount_interval, stall_timeout=stall_timeout).run()
    return Exit.OK
