"""What can be wrong with a MongoDB URI, said without showing a credential."""

from __future__ import annotations

import re
import warnings
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.uri_parser import split_options

_SCHEME = re.compile(r"mongodb(\+srv)?://")
_LABEL = r"[^\s:/\[\]%.]{1,63}"  # between dots; Python cannot look up others
_HOST = re.compile(rf"(\[[0-9A-Fa-f:.%]+\]|{_LABEL}(\.{_LABEL})*\.?)(:\d{{1,5}})?|[^:/]+\.sock")
_NOT_IN_A_NAME = re.compile(r'[/\\. "$*<>:|?\0]')
_ENCODE = (
    "user name and password must be percent-encoded "
    "(/ is %2F, : is %3A, @ is %40, ? is %3F, # is %23, % is %25)"
)
_HOSTS = (
    "the hosts must be host[:port], separated by commas "
    "(and a user name and password percent-encoded, followed by @)"
)
_READ_CONCERNS = ("local", "available", "majority", "linearizable", "snapshot")


def split_uri(uri: str) -> tuple[str, str, str, str]:
    """Split a URI into user information, hosts, database and options, all as written."""
    rest = _SCHEME.sub("", uri, count=1)
    base, _, options = rest.partition("?")
    authority, _, database = base.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    return userinfo, hosts, unquote_plus(database), options


def options_of(uri: str) -> dict[str, str]:
    """Return the options of a URI, their names in lower case."""
    options = split_uri(uri)[3].replace(";", "&")
    return {name.lower(): value for name, value in parse_qsl(options, keep_blank_values=True)}


def database_name(text: str) -> str:
    """Return `text`. Raises ValueError if it can be no database's name."""
    if len(text.encode()) > 63 or _NOT_IN_A_NAME.search(text):
        raise ValueError('must be under 64 bytes, without spaces and / \\ . " $ * < > : | ?')
    return text


def uri_faults(uri: str) -> list[str]:
    """Return what is wrong with a URI.

    The driver's own messages quote what they stumbled over, which after an unescaped `/`, `?` or
    `@` is the tail of the password. So whatever stands near it is checked here, in words of ours.
    """
    if not _SCHEME.match(uri):
        return ["must begin with mongodb:// or mongodb+srv://"]
    userinfo, hosts, database, options = split_uri(uri)
    bad_escape = re.search(r"%(?![0-9A-Fa-f]{2})", userinfo)
    if "@" in userinfo + database + options or userinfo.count(":") > 1 or bad_escape:
        return [_ENCODE]
    if not all(_HOST.fullmatch(host) for host in hosts.split(",")):
        return [_HOSTS]
    faults = []
    try:
        database_name(database or "oms_db")
    except ValueError as error:
        faults.append(f"the database name {error}")
    for option in filter(None, re.split("[&;]", options)):
        faults += _option_faults(option)
    return faults or _driver_faults(uri)


def _option_faults(option: str) -> list[str]:
    name, given, value = option.partition("=")
    if not given:
        return ["options must be name=value, separated by &"]
    if name.lower() == "readconcernlevel" and value not in _READ_CONCERNS:  # the driver takes any
        return [f"bad value of option {name}"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `_driver_faults` makes faults of them
            split_options(option, warn=False)
    except (PyMongoError, ValueError, TypeError, OSError) as error:
        unknown = "Unknown option" in str(error)
        return [f"{'unknown option' if unknown else 'bad value of option'} {name}"]
    return []


def _driver_faults(uri: str) -> list[str]:
    """Let the driver judge the whole: how options go together, and files that they name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as a compressor whose library is not there
            MongoClient[dict[str, Any]](uri, connect=False).close()
    except (PyMongoError, ValueError, TypeError, OSError, UserWarning) as error:
        reason = str(error)
        userinfo, _, _, options = split_uri(uri)
        password = userinfo.partition(":")[2]
        secrets = {password, unquote_plus(password)}
        secrets |= {o.partition("=")[2] for o in options.split("&") if "password" in o.lower()}
        if any(secret and secret in reason for secret in secrets):
            reason = "the driver rejects it (its reason would show a credential)"
        return [reason]
    return []
