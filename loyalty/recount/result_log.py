"""The log lines about a finished full recount."""

from __future__ import annotations

import logging

from loyalty.recount.tally import COUNTS, Result

log = logging.getLogger("loyalty")


def log_result(result: Result) -> None:
    """Log one line about a recount, and a warning for each thing that needs attention."""
    totals = result.totals
    fields: dict[str, object] = {
        "outcome": result.outcome,
        **{name: getattr(totals, name) for name in ("users", *COUNTS)},
        "failed_updates": result.failed_updates,
        "as_of": f"{result.as_of:%Y-%m-%dT%H:%M:%SZ}",
        "exact": result.exact,
        "seconds": round(result.seconds, 1),
    }
    words = [f"{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in fields.items()]
    log.info("recount %s", " ".join(words), extra={"fields": fields})
    if totals.unknown_sample:  # at DEBUG only: an id may be an e-mail address
        log.debug('unknown_customers sample="%s"', ", ".join(totals.unknown_sample))
    if not totals.users:
        log.warning("no_users are MONGODB_DATABASE and USERS_COLLECTION right?")
    if result.failed_updates:
        log.warning(
            'incomplete failed_updates=%d changed=%d errors="%s"',
            *(result.failed_updates, totals.changed, result.failed),
        )
