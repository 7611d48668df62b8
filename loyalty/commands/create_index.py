"""`--create-index`: create the indexes on orders and users that recounts use."""

import argparse

from config import Settings
from loyalty.commands.output import print_line
from loyalty.errors import Exit
from loyalty.mongo.connection import connect
from loyalty.recount.index_build import create_index, create_user_index


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Create the indexes, and print their names. Raises ServiceError."""
    with connect(settings, verify=False) as connection:
        name = create_index(connection.orders, settings)
        print_line(f"{connection.orders.full_name} has the index {name}")
        if settings.user_key_field != "_id":
            name = create_user_index(connection.users, settings)
            print_line(f"{connection.users.full_name} has the index {name}")
    return Exit.OK
