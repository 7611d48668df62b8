"""Parses and checks connection strings. No result or message shows a credential."""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote_plus

from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_userinfo, split_hosts, split_options

from loyalty.parsers import describe_os_error

# Hosts that the driver accepts and that cannot exist: whitespace, and empty or too long labels.
_BAD_HOSTS = re.compile(r"\s|(^|[.,])\.|[^.,:%]{64}")
_SYNTAX = (
    "must be mongodb://USER:PASSWORD@HOST:PORT,HOST:PORT/DATABASE?OPTION=VALUE&OPTION=VALUE, "
    "where only a HOST is required and a PORT is from 1 to 65535, or mongodb+srv:// with one HOST "
    "and no PORT; user name and password must be percent-encoded "
    "(/ is %2F, : is %3A, @ is %40, ? is %3F, # is %23, % is %25)"
)


class UriParts(NamedTuple):
    """The parts of a URI as written; only the database is decoded."""

    userinfo: str
    hosts: str
    database: str
    options: str


def split_uri(uri: str) -> UriParts:
    base, _, options = uri.partition("://")[2].partition("?")
    authority, _, database = base.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    return UriParts(userinfo, hosts, unquote_plus(database), options)


def parse_options(uri: str) -> dict[str, str]:
    """Return the options of a URI by their names in lower case."""
    options = split_uri(uri).options.replace(";", "&")
    return {name.lower(): value for name, value in parse_qsl(options, keep_blank_values=True)}


def parse_database(text: str) -> str:
    """Return `text`. Raises ValueError if no database can have that name."""
    if len(text.encode()) > 63 or re.search(r'[/\\. "$*<>:|?\0]', text):
        raise ValueError('must have at most 63 bytes, and none of space / \\ . " $ * < > : | ?')
    return text


def read_uri(values: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the URI in MONGODB_URI, or in the file at MONGODB_URI_FILE, and its problems."""
    uri, file = (values.get(name, "").strip() for name in ("MONGODB_URI", "MONGODB_URI_FILE"))
    if uri and file:
        return "", ["MONGODB_URI and MONGODB_URI_FILE: set one of them, not both"]
    if file:
        try:
            uri = Path(file).read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            return "", [f"MONGODB_URI_FILE: {file}: {describe_os_error(error)}"]
        if not uri:
            return "", [f"MONGODB_URI_FILE: {file} is empty"]
    if not uri:
        return "", ["MONGODB_URI: required, for example mongodb://localhost:27017"]
    return uri, [f"MONGODB_URI: {problem}" for problem in check_uri(uri)]


def check_uri(uri: str) -> list[str]:
    """Return a line for each problem of a URI.

    The driver decides, but its messages are not shown. They quote the part that it could not parse:
    if the password contains an unescaped `/`, `?` or `@`, that is the end of the password.
    """
    if not uri.startswith(("mongodb://", "mongodb+srv://")):
        return ["must begin with mongodb:// or mongodb+srv://"]
    options = [option for option in re.split("[&;]", split_uri(uri).options) if option]
    bad_options = [option for option in options if not _is_accepted(split_options, option)]
    if not _has_valid_parts(uri) or (bad_options and "@" in "".join(options)):
        return [_SYNTAX]  # without the names: with an "@" they may be the end of a password
    if bad_options:
        names = [option.partition("=")[0] for option in bad_options]
        return [f"unknown option, or bad value of option {name!r}" for name in names]
    if not _is_accepted(_make_client, uri):
        userinfo = split_uri(uri).userinfo
        if userinfo and ":" not in userinfo and "authmechanism=" not in uri.lower():
            return ["has a user without a password"]
        together = ", ".join(option.partition("=")[0] for option in options)
        problem = (
            "these options contradict each other or another part of the URI, or name a file that "
            "is not in PEM format"
        )
        return [f"{problem}: {together}"]
    return []


def _has_valid_parts(uri: str) -> bool:
    """Return whether everything before the options is valid."""
    userinfo, hosts, database, _ = split_uri(uri)
    if _BAD_HOSTS.search(hosts) or not _is_accepted(split_hosts, hosts):
        return False
    if uri.startswith("mongodb+srv") and re.search("[,:]", hosts):
        return False
    has_userinfo = f"//{userinfo}@" in uri  # it may be empty
    if has_userinfo and not _is_accepted(parse_userinfo, userinfo):
        return False
    return _is_accepted(parse_database, database) and "@" not in database


def _is_accepted(parse: Callable[[str], object], text: str) -> bool:
    try:
        with warnings.catch_warnings():
            # A compressor that is not installed, or an option that is given twice.
            warnings.simplefilter("error", UserWarning)
            parse(text)
    except (PyMongoError, ValueError, TypeError, KeyError, OSError, UserWarning):
        return False
    return True


def _make_client(uri: str) -> None:
    if options := split_uri(uri).options:
        split_options(options)  # warns, for example, of an option that is given twice
    # A warning about the hosts is information only, such as "connected to a CosmosDB cluster".
    with warnings.catch_warnings(action="ignore"):
        MongoClient[dict[str, Any]](uri, connect=False).close()
