"""`--unknown-customers`: every unknown customer with counted orders, as JSON lines."""

import argparse

from config import Settings
from loyalty.commands.output import print_json
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.similar_ids import UnknownCustomerList


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Count, write nothing, and print `{customer, orders, kind}` for each unknown customer."""
    unknown = UnknownCustomerList()
    with connect_and_verify(settings, writing=False) as connection:
        request = RecountRequest(write=False, rows=unknown)
        run_recount(connection, settings, History(connection.recounts, settings), request)
        for row in unknown:
            print_json(row)
    return Exit.OK
