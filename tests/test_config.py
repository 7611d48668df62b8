"""Settings: accepted values, and that all problems are reported together, without secrets."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import bson
import pytest
from bson import ObjectId
from hypothesis import example, given
from hypothesis import strategies as st

from config import Settings, load, setting_specs, settings_help
from loyalty.env_file import load_settings, read_env_file
from loyalty.errors import ConfigurationError
from loyalty.service import Service

ROOT = Path(__file__).parents[1]
URI = "mongodb://localhost"
NO_FILE = Path("/nonexistent/.env")


@pytest.fixture(autouse=True)
def initial_log_level() -> None:
    """Undo what the settings of an earlier test did to the log."""
    logging.getLogger("loyalty").setLevel(logging.INFO)


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    file = tmp_path / ".env"
    file.touch(mode=0o600)
    return file


def load_one(name: str, value: str) -> Any:
    """Load the setting `name` from the value of its variable, and return what it became."""
    settings = load({"MONGODB_URI": URI, name: value})
    attributes = {spec.name: attribute for attribute, spec in setting_specs().items()}
    return getattr(settings, attributes[name])


def problems_of(values: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load({"MONGODB_URI": URI, **values})
    return list(caught.value.problems)


def problems_in(file: Path, environment: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(file, NO_FILE, environment)
    return list(caught.value.problems)


# Values


def test_only_the_uri_is_required_and_all_others_have_the_documented_defaults() -> None:
    assert load({"MONGODB_URI": URI}) == Settings(
        mongodb_uri=URI,
        database="oms_db",
        orders="orders",
        users="users",
        recounts="loyalty_recounts",
        changes="loyalty_changes",
        retention=timedelta(days=90),
        order_statuses=("Shipped",),
        points_per_order=1,
        status_field="status",
        customer_field="customer_id",
        order_filter={},
        user_key_field="_id",
        points_field="loyalty_points",
        recount_interval=timedelta(hours=2),
        count_timeout=timedelta(minutes=10),
        count_workers=2,
        live_updates=False,
        max_decrease_percent=90,
        batch_size=1000,
        log_level="INFO",
        log_format="text",
        metrics_file="",
    )


@pytest.mark.parametrize("file", [".env.example", "deploy/loyalty.env"])
def test_an_example_file_has_every_setting_once_in_order_with_its_default(file: str) -> None:
    text = (ROOT / file).read_text()
    lines = re.findall(r"^#?([A-Z_]+)=(.*)$", text, re.MULTILINE)
    listed = [(name, value) for name, value in lines if not name.startswith("MONGODB_URI")]
    specs = {spec.name: spec.default for spec in setting_specs().values()}
    specs.pop("MONGODB_URI")
    assert listed == list((specs | {"MONGODB_DATABASE": "oms_db"}).items())


def test_help_has_one_line_for_each_setting_with_its_default() -> None:
    lines = settings_help().splitlines()
    specs = list(setting_specs().values())
    assert [line.split()[0] for line in lines] == [spec.name for spec in specs]
    for line, spec in zip(lines, specs, strict=True):
        assert spec.description in line
        assert len(line) <= 100
        assert line.endswith(f"(default: {spec.default})" if spec.default else spec.description)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MONGODB_DATABASE", "shop", "shop"),
        ("ORDERS_COLLECTION", " o ", "o"),
        ("USERS_COLLECTION", "sales.users", "sales.users"),
        ("RECOUNTS_COLLECTION", "r", "r"),
        ("RECOUNTS_COLLECTION", "none", ""),
        ("CHANGES_COLLECTION", "c", "c"),
        ("CHANGES_COLLECTION", "None", ""),
        ("RETENTION", "4h", timedelta(hours=4)),
        ("RETENTION", "3650d", timedelta(days=3650)),
        ("ORDER_STATUSES", " Shipped, Delivered ,,Shipped", ("Shipped", "Delivered")),
        ("POINTS_PER_ORDER", "5", 5),
        ("ORDER_STATUS_FIELD", "order.state", "order.state"),
        ("ORDER_CUSTOMER_FIELD", "order.customer.id", "order.customer.id"),
        ("ORDER_CUSTOMER_FIELD", "status_id", "status_id"),
        ("ORDER_CUSTOMER_FIELD", "order.customer.$id", "order.customer.$id"),
        ("ORDER_FILTER", "none", {}),
        ("ORDER_FILTER", "{}", {}),
        ("ORDER_FILTER", '{"deleted": {"$ne": true}}', {"deleted": {"$ne": True}}),
        ("ORDER_FILTER", '{"a.b": "x", "n": [1, null]}', {"a.b": "x", "n": [1, None]}),
        ("ORDER_FILTER", '{"customer.$ref": "users"}', {"customer.$ref": "users"}),
        ("ORDER_FILTER", '{"status_code": 1}', {"status_code": 1}),
        (
            "ORDER_FILTER",
            '{"at": {"$gte": {"$date": "2026-01-01T02:00:00+02:00"}}}',
            {"at": {"$gte": datetime(2026, 1, 1, tzinfo=UTC)}},
        ),
        ("ORDER_FILTER", '{"s": {"$oid": "000000000000000000000000"}}', {"s": ObjectId("0" * 24)}),
        ("USER_KEY_FIELD", "profile.customer_no", "profile.customer_no"),
        ("USER_KEY_FIELD", "loyalty_points_key", "loyalty_points_key"),
        ("USER_POINTS_FIELD", "loyalty.points", "loyalty.points"),
        ("USER_POINTS_FIELD", "_id_points", "_id_points"),
        ("USER_POINTS_FIELD", "2027", "2027"),
        ("USER_POINTS_FIELD", "points.y2027.1a", "points.y2027.1a"),
        ("RECOUNT_INTERVAL", "90s", timedelta(seconds=90)),
        ("COUNT_TIMEOUT", "1d", timedelta(days=1)),
        ("COUNT_WORKERS", "16", 16),
        ("MAX_DECREASE_PERCENT", "100", 100),
        ("BATCH_SIZE", "1", 1),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("LOG_FORMAT", "JSON", "json"),
        ("METRICS_FILE", "/var/lib/loyalty.prom", "/var/lib/loyalty.prom"),
        ("METRICS_FILE", "none", ""),
        *(("LIVE_UPDATES", word, True) for word in ("yes", "TRUE", "on", "1", " Yes ")),
        *(("LIVE_UPDATES", word, False) for word in ("no", "false", "Off", "0")),
    ],
)
def test_a_valid_value_is_parsed(name: str, value: str, expected: object) -> None:
    assert load_one(name, value) == expected


BAD = {
    "MONGODB_DATABASE": ["a b", "a.b", "a/b", "x" * 64],
    "ORDERS_COLLECTION": ["a$b", "system.x", ".a", "a..b"],
    "USERS_COLLECTION": ["a$b"],
    "RECOUNTS_COLLECTION": ["a$b"],
    "CHANGES_COLLECTION": ["a$b", "system.changes"],
    "RETENTION": ["0d", "3651d", "forever"],
    "ORDER_STATUSES": [",", " , ", ",,", '""', '"Shipped', "'Shipped,Sent", '"Shipped" now'],
    "POINTS_PER_ORDER": ["0", "-1", "1.5", "x", "٣", "1e3", "9" * 30],
    "RECOUNT_INTERVAL": ["0s", "2", "2 h", "-2h", "2w", "h", "400d", "2H", "9" * 12 + "d"],
    "LIVE_UPDATES": ["y", "2", "enabled"],
    "COUNT_TIMEOUT": ["0m", "25d"],
    "COUNT_WORKERS": ["0", "17"],
    "ORDER_STATUS_FIELD": ["$status", ".a", "a.", "a..b", "a b.$c", " . "],
    "ORDER_CUSTOMER_FIELD": ["$id", ".$id", "a.$id.b", "a.$ref", "a.$id.$id"],
    "ORDER_FILTER": [
        "deleted",
        "[]",
        "7",
        '{"deleted": true',
        '{"a": 1, "a": 2}',
        '{"a": {"$ne": 1, "$ne": 2}}',
        '{"$where": "true"}',
        '{"$or": [{"a": 1}]}',
        '{"$expr": {}}',
        '{"$oid": "000000000000000000000000"}',
        '{"": 1}',
        '{"a..b": 1}',
        '{"a.$x": 1}',
        '{"$id": 1}',
        '{"a": {"$oid": "x"}}',
        '{"a": {"$date": "soon"}}',
        '{"a": 99999999999999999999}',
        '{"a\\u0000": 1}',
        '{"status": "Sent"}',
        '{"status.code": 1}',
        '{"customer_id": {"$ne": 7}}',
        "[" * 100_000,
    ],
    "USER_KEY_FIELD": ["$key", "a..b", "loyalty_points", "loyalty_points.id"],
    "USER_POINTS_FIELD": ["_id", "_id.points", "a.$b", "points.2027", "a.0.b"],
    "MAX_DECREASE_PERCENT": ["-1", "101", "90%"],
    "BATCH_SIZE": ["0", "100001", "1k"],
    "LOG_LEVEL": ["LOUD", "5"],
    "LOG_FORMAT": ["xml"],
    "METRICS_FILE": ["loyalty.prom", "/var/lib/node_exporter/loyalty.txt", "/a\0/b.prom"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_a_bad_value_is_one_problem_that_names_its_variable(name: str, value: str) -> None:
    (problem,) = problems_of({name: value})
    assert name in problem.split(": ")[0]
    assert "\n" not in problem


@pytest.mark.parametrize("options", ["", "/?appName=x", "/?authSource=admin&tls=true"])
def test_a_user_without_a_password_is_named_as_the_problem(options: str) -> None:
    (problem,) = problems_of({"MONGODB_URI": f"mongodb://shop@db{options}"})
    assert problem == "MONGODB_URI: has a user without a password"
    certificate = "mongodb://CN%3Dshop@db/?authMechanism=MONGODB-X509"
    assert load({"MONGODB_URI": certificate}).mongodb_uri == certificate


@pytest.mark.parametrize("before", ["", "\n", "\n \n\n", "# a comment\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("bad", ["BATCH_SIZE 5", "  BATCH_SIZE 5", "A='b"])
def test_the_number_of_a_bad_line_counts_the_empty_lines(
    env_file: Path, before: str, bad: str
) -> None:
    env_file.write_text(f"MONGODB_URI={URI}\n{before}{bad}\n", newline="")
    (problem,) = problems_in(env_file, {})
    assert problem.startswith(f"{env_file} line {2 + before.count(chr(10))}: not NAME=value")


def test_all_problems_are_reported_at_once(env_file: Path) -> None:
    bad = {name: values[0] for name, values in BAD.items()}
    found = problems_of(bad | {"MONGODB_URI": "http://x"})
    assert sorted(problem.split(":")[0] for problem in found) == sorted([*bad, "MONGODB_URI"])

    env_file.write_text(
        "MONGODB_URI=http://x\nLIVE_UPDATES=maybe\nORDER_STATUS=Sent\nbad line\nBATCH_SIZE=1k\n"
    )
    assert [problem.split(":")[0] for problem in problems_in(env_file, {"LOG_LEVEL": "LOUD"})] == [
        f"{env_file} line 4",
        "unknown setting ORDER_STATUS, did you mean ORDER_STATUSES?",
        "MONGODB_URI",
        "LIVE_UPDATES",
        "BATCH_SIZE",
        "LOG_LEVEL",
    ]


@pytest.mark.parametrize("customer", ["status", "status.id"])
def test_the_fields_of_status_and_customer_must_be_different(customer: str) -> None:
    (problem,) = problems_of({"ORDER_CUSTOMER_FIELD": customer})
    assert problem == "ORDER_STATUS_FIELD, ORDER_CUSTOMER_FIELD: must be different fields"


@pytest.mark.parametrize(
    ("key", "points", "is_valid"),
    [
        ("no", "points", True),
        ("no", "no_points", True),
        ("no", "no", False),
        ("no", "no.points", False),
        ("ids.no", "ids", False),
        ("_id.no", "points", True),
        ("no", "_id", False),
    ],
)
def test_points_are_not_written_to_the_field_that_orders_refer_to(
    key: str, points: str, *, is_valid: bool
) -> None:
    values = {"USER_KEY_FIELD": key, "USER_POINTS_FIELD": points}
    if is_valid:
        assert load({"MONGODB_URI": URI, **values}).user_key_field == key
    else:
        (problem,) = problems_of(values)
        assert problem.startswith("USER_POINTS_FIELD")


def test_a_filter_may_use_the_other_fields_of_the_dbref() -> None:
    values = {"ORDER_CUSTOMER_FIELD": "customer.$id"}
    assert load({"MONGODB_URI": URI, **values, "ORDER_FILTER": '{"customer.$ref": "users"}'})
    (problem,) = problems_of(values | {"ORDER_FILTER": '{"customer.$id": 1}'})
    assert problem == "ORDER_FILTER: must not contain customer.$id, the ORDER_CUSTOMER_FIELD"


def test_a_filter_can_be_encoded_and_written_but_not_changed() -> None:
    text = '{"deleted": {"$ne": true}, "at": {"$gte": {"$date": "2026-01-01T00:00:00Z"}}}'
    settings = load({"MONGODB_URI": URI, "ORDER_FILTER": text})
    assert settings != load({"MONGODB_URI": URI})
    assert settings.to_dict()["ORDER_FILTER"] == text
    assert bson.decode(bson.encode({"$match": settings.order_filter}))["$match"]["deleted"]
    with pytest.raises(TypeError):
        settings.order_filter["deleted"] = 1  # type: ignore[index]  # the test is about this


@pytest.mark.parametrize(
    "values",
    [
        {"USERS_COLLECTION": "orders"},
        {"RECOUNTS_COLLECTION": "orders"},
        {"CHANGES_COLLECTION": "users"},
        {"CHANGES_COLLECTION": "loyalty_recounts"},
        {"RECOUNTS_COLLECTION": "none", "CHANGES_COLLECTION": "orders"},
    ],
)
def test_collections_must_be_different(values: dict[str, str]) -> None:
    (problem,) = problems_of(values)
    assert "must be different collections" in problem
    both = {"RECOUNTS_COLLECTION": "none", "CHANGES_COLLECTION": "none"}
    assert load({"MONGODB_URI": URI, **both})


def test_a_record_must_not_expire_before_the_recount_after_the_next() -> None:
    values = {"RETENTION": "199s", "RECOUNT_INTERVAL": "100s"}
    (problem,) = problems_of(values)
    assert problem.startswith("RETENTION: must be at least twice RECOUNT_INTERVAL")
    assert load({"MONGODB_URI": URI, **values, "RETENTION": "200s"})


@pytest.mark.parametrize("name", ["MONGODB_DATABASE", "ORDER_STATUSES", "USERS_COLLECTION"])
def test_a_value_that_is_not_utf8_is_a_problem(name: str) -> None:
    value = "gr\udcf6\udcdfe"  # as Python decodes Latin-1 in the environment
    assert problems_of({name: value}) == [f"{name}: is not UTF-8 text"]
    uri = f"mongodb://h/?appName={value}"
    assert "MONGODB_URI: is not UTF-8 text" in problems_of({"MONGODB_URI": uri})


@given(values=st.dictionaries(st.sampled_from([*BAD, "MONGODB_URI"]), st.text(max_size=30)))
def test_any_values_give_settings_or_problems_of_one_line(values: dict[str, str]) -> None:
    try:
        load(values)
    except ConfigurationError as error:
        assert error.problems
        assert all("\n" not in problem for problem in error.problems)


# Environment and file


@pytest.mark.parametrize("empty", ["", " ", "\t\r\n"])
@pytest.mark.parametrize("name", [spec.name for spec in setting_specs().values()])
def test_an_empty_variable_in_the_environment_counts_as_not_given(
    env_file: Path, name: str, empty: str
) -> None:
    other = {
        "MONGODB_DATABASE": "b",
        "RETENTION": "7d",
        "ORDER_STATUSES": "Sent",
        "LIVE_UPDATES": "yes",
        "LOG_LEVEL": "ERROR",
        "LOG_FORMAT": "json",
        "METRICS_FILE": "/x.prom",
        "MAX_DECREASE_PERCENT": "100",
        "ORDER_FILTER": '{"a": 1}',
    }
    named = {spec.name: spec.default for spec in setting_specs().values()}
    value = other.get(name) or ("7" if named[name].isdigit() else "7m")
    in_file = {"MONGODB_URI": URI} | ({} if name == "MONGODB_URI" else {name: value})
    env_file.write_text("".join(f"{n}={v}\n" for n, v in in_file.items()))
    assert load_settings(env_file, NO_FILE, {name: empty}) == load(in_file)
    default = load({"MONGODB_URI": URI})
    if name != "MONGODB_URI":
        assert load(in_file) != default
        assert load_settings(None, NO_FILE, {"MONGODB_URI": URI, name: empty}) == default


@pytest.mark.parametrize("name", ["RECOUNTS_COLLECTION", "CHANGES_COLLECTION", "METRICS_FILE"])
def test_none_switches_a_setting_off_and_empty_is_the_default(env_file: Path, name: str) -> None:
    expected = load({"MONGODB_URI": URI, name: "none"})
    value = "/x.prom" if name == "METRICS_FILE" else "x"
    for in_file, in_environment in (("none", ""), (value, "none")):
        env_file.write_text(f"MONGODB_URI={URI}\n{name}={in_file}\n")
        assert load_settings(env_file, NO_FILE, {name: in_environment}) == expected
    for empty in ("", '""'):
        env_file.write_text(f"MONGODB_URI={URI}\n{name}={empty}\n")
        assert load_settings(env_file, NO_FILE, {}) == load({"MONGODB_URI": URI})


def test_a_uri_in_the_environment_replaces_both_variables_in_the_file(
    env_file: Path, tmp_path: Path
) -> None:
    uri_file = tmp_path / "uri"
    uri_file.write_text("mongodb://from-file")
    env_file.write_text("MONGODB_URI=mongodb://a\n")
    by_file = {"MONGODB_URI_FILE": str(uri_file)}
    assert load_settings(env_file, NO_FILE, by_file).hosts == "from-file"
    env_file.write_text(f"MONGODB_URI_FILE={uri_file}\n")
    assert load_settings(env_file, NO_FILE, {"MONGODB_URI": "mongodb://b"}).hosts == "b"
    assert load_settings(env_file, NO_FILE, {"MONGODB_URI": ""}).hosts == "from-file"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MONGODB_DATBASE", "MONGODB_DATABASE"),
        ("mongodb_database", "MONGODB_DATABASE"),
        ("ORDER_STATUS", "ORDER_STATUSES"),
        ("USER_COLLECTION", "USERS_COLLECTION"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("CHANGE_COLLECTION", "CHANGES_COLLECTION"),
    ],
)
def test_a_misspelt_name_is_a_problem_unless_the_setting_has_a_value(
    env_file: Path, name: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    env_file.write_text(f"MONGODB_URI={URI}\n{name}=x\nPATH_TO_SOMETHING=1\nTZ=UTC\n")
    for environment in ({}, {meant: ""}):
        assert problems_in(env_file, environment) == [
            f"unknown setting {name}, did you mean {meant}?"
        ]
    with env_file.open("a") as file:
        file.write(f"{meant}=\n")
    assert len(problems_in(env_file, {})) == 1
    assert not caplog.messages
    value = "INFO" if meant == "LOG_LEVEL" else "z"
    assert load_settings(env_file, NO_FILE, {meant: value})
    assert caplog.messages == [f"unknown_setting name={name} similar_to={meant}"]
    caplog.clear()
    with env_file.open("a") as file:
        file.write(f"{meant}={value}\n")
    assert load_settings(env_file, NO_FILE, {})
    assert caplog.messages == [f"unknown_setting name={name} similar_to={meant}"]


@pytest.mark.parametrize(
    "name",
    [
        "MONGODB_USER",
        "MONGODB_URL",
        "MONGO_URI",
        "TEST_MONGODB_URI",
        "MAX_BATCH_SIZE",
        "POINTS_PER_USER",
        "ACCOUNTS_COLLECTION",
        "CUSTOMERS_COLLECTION",
    ],
)
def test_the_name_of_another_program_causes_only_a_warning(
    env_file: Path, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri_file = tmp_path / "uri"
    uri_file.write_text(URI)
    for line in (f"MONGODB_URI={URI}", f"MONGODB_URI_FILE={uri_file}"):
        env_file.write_text(f"{line}\n{name}=ada\n")
        caplog.clear()
        assert load_settings(env_file, NO_FILE, {}).hosts == "localhost"
        (message,) = caplog.messages
        assert message.startswith(f"unknown_setting name={name} ")


def test_a_misspelt_name_in_the_environment_causes_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environment = {"MONGODB_URI": URI, "ORDER_STATUS": "Sent", "MONGODB_USER": "x", "HOME": "/"}
    assert load_settings(None, NO_FILE, environment).order_statuses == ("Shipped",)
    assert caplog.messages == ["unknown_setting name=ORDER_STATUS similar_to=ORDER_STATUSES"]


def test_a_comment_after_a_value_in_the_environment_causes_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environment = {"MONGODB_URI": URI, "ORDER_STATUSES": "Shipped,Sent # both"}
    assert load_settings(None, NO_FILE, environment).order_statuses == ("Shipped", "Sent # both")
    (message,) = caplog.messages
    assert message.startswith("comment_in_value name=ORDER_STATUSES ")


@pytest.mark.parametrize("text", [b"\xff", b"LOG_FORMAT=text\nLOG_LEVEL=ERROR\nBATCH_SIZE=x\n"])
def test_a_failed_reload_keeps_the_level_and_the_format_of_the_log(
    env_file: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    env_file.write_text(f"MONGODB_URI={URI}\nLOG_FORMAT=json\n")
    service = Service(
        load_settings(env_file, NO_FILE, {}), lambda: load_settings(env_file, NO_FILE, {})
    )
    env_file.write_bytes(text)
    with pytest.raises(ConfigurationError):
        service.reload()
    logging.getLogger("loyalty").info("event")
    assert caplog.handler.stream.getvalue().splitlines()[-1].startswith("{")


def test_the_log_gets_the_level_and_the_format_of_the_settings(
    env_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("loyalty")
    for text, level in (
        ("LOG_LEVEL=ERROR\nLOG_FORMAT=json", "ERROR"),
        ("LOG_LEVEL=debug", "DEBUG"),
    ):
        env_file.write_text(f"MONGODB_URI={URI}\n{text}\n")
        load_settings(env_file, NO_FILE, {})
        assert logging.getLevelName(log.level) == level
        log.critical("event")
        assert caplog.handler.stream.getvalue().splitlines()[-1].startswith("{") == (
            level == "ERROR"
        )
    env_file.write_text("LOG_LEVEL=ERROR\nLOG_FORMAT=json\n")
    problems_in(env_file, {})
    assert logging.getLevelName(log.level) == "DEBUG"


def test_a_misspelt_uri_is_reported_beside_the_missing_one(env_file: Path) -> None:
    env_file.write_text("MONGODB_URL=mongodb://a\n")
    misspelt, missing = problems_in(env_file, {})
    assert misspelt == "unknown setting MONGODB_URL, did you mean MONGODB_URI?"
    assert missing.startswith("MONGODB_URI: required")


@pytest.mark.parametrize("password", ["a#b", "a%b", "a$b", "${HOME}", "a'b", "$$", "a\\b", "é#"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_value_in_a_file_is_taken_as_written(env_file: Path, password: str, newline: str) -> None:
    uri = f"mongodb://u:{password.replace('%', '%25')}@host"
    lines = ["# comment", f"MONGODB_URI={uri}", "", "export BATCH_SIZE=5", ""]
    env_file.write_text(newline.join(lines), encoding="utf-8-sig", newline="")
    assert read_env_file(env_file) == ({"MONGODB_URI": uri, "BATCH_SIZE": "5"}, [])


def test_a_bad_line_in_a_file_is_reported_with_its_number(env_file: Path) -> None:
    env_file.write_text("A=1\nnonsense here\nB='open\nC\n")
    values, problems = read_env_file(env_file)
    assert values == {"A": "1"}
    assert [p.split(": ")[0] for p in problems] == [f"{env_file} line {n}" for n in (2, 3, 4)]


def test_a_file_that_cannot_be_read_is_a_problem(env_file: Path) -> None:
    (problem,) = problems_in(NO_FILE, {})
    assert problem == f"{NO_FILE}: cannot be read: No such file or directory"
    env_file.write_bytes(b"A=\xff\n")
    (problem,) = problems_in(env_file, {})
    assert problem.endswith("it is not UTF-8 text")


# Statuses


def write_statuses(statuses: tuple[str, ...]) -> str:
    """Quote statuses as `.env.example` says."""
    return ",".join(
        '"' + s.replace('"', '""') + '"' if s != s.strip() or re.search("[,\"']", s) else s
        for s in statuses
    )


STATUS = st.text(
    st.sampled_from("Shipped ,'\"\\#$=\tß\u200b\u00a0")
    | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=8,
)


@given(statuses=st.lists(STATUS, min_size=1, max_size=4, unique=True).map(tuple))
@example(statuses=("Shipped ",))
@example(statuses=("Shipped, partly",))
@example(statuses=(" ", "a\\", "'", '"', "#", "a #b", "a\r\nb"))
def test_statuses_are_loaded_as_written_from_a_file_and_from_the_environment(
    statuses: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    written = write_statuses(statuses)
    environment = {"MONGODB_URI": URI, "ORDER_STATUSES": written}
    assert load_settings(None, NO_FILE, environment).order_statuses == statuses
    file = tmp_path_factory.getbasetemp() / "statuses.env"
    escaped = written.replace("\\", "\\\\").replace("'", "\\'")
    text = f"MONGODB_URI={URI}\nORDER_STATUSES='{escaped}'\nBATCH_SIZE=7\n"
    file.write_text(text, encoding="utf-8", newline="")
    settings = load_settings(file, NO_FILE, {})
    assert settings.order_statuses == statuses
    assert settings.batch_size == 7


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Shipped", ("Shipped",)),
        ("Shipped  ", ("Shipped",)),
        ('"Shipped "', ("Shipped ",)),
        ("' Shipped'", (" Shipped",)),
        ("'\"Shipped \"'", ("Shipped ",)),
        ("\"'shipped ',Delivered\"", ("shipped ", "Delivered")),
        ("'\"Shipped, partly\"'", ("Shipped, partly",)),
        ("\"'Shipped, partly'\"", ("Shipped, partly",)),
        ('Delivered,"Shipped, partly" , Sent', ("Delivered", "Shipped, partly", "Sent")),
        ('"Shipped, Delivered "', ("Shipped", "Delivered")),
        ('"it\'s shipped"', ("it's shipped",)),
        ('\'"say ""yes"""\'', ('say "yes"',)),
        ("", ("Shipped",)),
        ('""', ("Shipped",)),
    ],
)
def test_quotes_in_a_file_keep_whitespace_and_commas(
    env_file: Path, line: str, expected: tuple[str, ...]
) -> None:
    env_file.write_text(f"MONGODB_URI={URI}\nORDER_STATUSES={line}\n")
    assert load_settings(env_file, NO_FILE, {}).order_statuses == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Shipped ", ("Shipped ",)),
        ('"Shipped "', ("Shipped ",)),
        ('"Shipped, partly"', ("Shipped, partly",)),
        ("Shipped\r\n", ("Shipped",)),
        ("Shipped ,Sent\n", ("Shipped", "Sent")),
    ],
)
def test_quotes_in_the_environment_keep_whitespace_and_commas(
    value: str, expected: tuple[str, ...]
) -> None:
    assert load_one("ORDER_STATUSES", value) == expected


# The URI


def test_a_database_in_the_uri_is_used_unless_another_is_set() -> None:
    uri = "mongodb://u:p@a:1,b:2/shop?replicaSet=rs&w=majority"
    settings = load({"MONGODB_URI": uri})
    assert (settings.database, settings.hosts) == ("shop", "a:1,b:2")
    assert load({"MONGODB_URI": uri, "MONGODB_DATABASE": "b"}).database == "b"


def test_a_database_of_the_server_is_a_problem_unless_another_is_set() -> None:
    (problem,) = problems_of({"MONGODB_URI": "mongodb://h/admin"})
    assert problem.startswith("MONGODB_DATABASE: 'admin' is reserved for the server")
    assert load({"MONGODB_URI": "mongodb://h/admin", "MONGODB_DATABASE": "b"}).database == "b"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "required"),
        ("localhost:27017", "must begin with"),
        ("http://localhost", "must begin with"),
        ("mongodb://", "HOST"),
        ("mongodb://a:0x", "HOST"),
        ("mongodb://a:99999", "HOST"),
        ("mongodb://a b", "HOST"),
        ("mongodb://a,,b", "HOST"),
        (f"mongodb://{'a' * 64}", "HOST"),
        ("mongodb://[fe80::1", "HOST"),
        ("mongodb+srv://h.example.com:27017/", "one HOST and no PORT"),
        ("mongodb+srv://a.example.com,b.example.com/", "one HOST and no PORT"),
        ("mongodb://h/a b", "DATABASE"),
        ("mongodb://u:p/w@h/d", "percent-encoded"),
        ("mongodb://u:p?w@h/d", "percent-encoded"),
        ("mongodb://u:p?w=1@h/d", "percent-encoded"),
        ("mongodb://u:1?x=1&appName=1@h/d", "percent-encoded"),
        ("mongodb://u:p@w@h/d", "percent-encoded"),
        ("mongodb://u:p:w@h/d", "percent-encoded"),
        ("mongodb://u:p%w@h/d", "percent-encoded"),
        ("mongodb://u:1/w@h/d", "percent-encoded"),
        ("mongodb://u:1/w@h", "percent-encoded"),
        ("mongodb://@h/d", "percent-encoded"),
        ("mongodb://h/?retryWritess=true", "'retryWritess'"),
        ("mongodb://h/?connectTimeoutMS=soon", "'connectTimeoutMS'"),
        ("mongodb://h/?tlsCAFile=/nonexistent.pem", "'tlsCAFile'"),
        ("mongodb://h/?tls", "'tls'"),
        ("mongodb://h/?datetime_conversion=ms", "'datetime_conversion'"),
        ("mongodb://h/?compressors=snappy", "'compressors'"),
        ("mongodb://a,b/?w=1&directConnection=true", "w, directConnection"),
        ("mongodb://h/?tls=true&ssl=false", "tls, ssl"),
        ("mongodb://h/?w=1&w=2", "w, w"),
        ("mongodb://h/?authMechanism=SCRAM-SHA-256", "authMechanism"),
        (f"mongodb://h/?tls=true&tlsCAFile={__file__}", "not in PEM format: tls, tlsCAFile"),
    ],
)
def test_a_bad_uri_is_one_problem_in_plain_words(uri: str, words: str) -> None:
    (problem,) = problems_of({"MONGODB_URI": uri})
    assert problem.startswith("MONGODB_URI: ")
    assert words in problem


@pytest.mark.parametrize(
    "rest",
    [
        "h/?appName=@shop@",
        "u:p@h/?appName=@shop@&w=1",
        "h/?replicaSet=a@b",
        "[::1]",
        "[fe80::1%25eth0]",
        "u:p@[fe80::1%25eth0.5]:27018,h/shop?w=1",
        "shop.mongo.cosmos.azure.com:10255/?tls=true",
        "shop.cluster-x.us-east-1.docdb.amazonaws.com:27017/?retryWrites=false",
        "shop.docdb-elastic.amazonaws.com",
        "%2Ftmp%2Fmongodb-27017.sock",
        "h/?readPreference=nearest&readPreferenceTags=dc:a&readPreferenceTags=",
        "h/?authMechanism=MONGODB-X509&tls=true",
    ],
)
def test_a_uri_that_the_driver_accepts_is_accepted(rest: str) -> None:
    uri = f"mongodb://{rest}"
    assert load({"MONGODB_URI": uri}).mongodb_uri == uri


def test_two_bad_options_are_two_problems() -> None:
    uri = "mongodb://h/?a=1&w=majority&timeoutMS=x"
    assert [p.split()[-1] for p in problems_of({"MONGODB_URI": uri})] == ["'a'", "'timeoutMS'"]


SECRET = st.text(st.sampled_from("/?#%@:$&=,[]{}\\\"'` ;+!XYZ0"), min_size=4, max_size=20)


@given(secret=SECRET, tail=st.sampled_from(["", "/", "/shop", "/shop?w=1", "?w=1", "/?tls=x"]))
@example(secret="SECRET/hunter2", tail="/shop")
@example(secret="SECRET?hunter2=1", tail="")
@example(secret="%hunter2", tail="")
def test_a_password_that_is_not_encoded_is_never_shown(secret: str, tail: str) -> None:
    password = f"qJ7{secret}qJ7"
    try:
        settings = load({"MONGODB_URI": f"mongodb://user:{password}@host{tail}"})
    except ConfigurationError as error:
        text = str(error) + repr(error)
    else:
        text = repr(settings) + str(settings) + settings.hosts + str(settings.to_dict())
    assert "qJ7" not in text
    assert password not in text


@pytest.mark.parametrize(
    "options",
    [
        "tls=true&tlsCertificateKeyFilePassword=qJ7&tlsCertificateKeyFile=/nonexistent",
        "tlsCertificateKeyFilePassword=qJ7&ssl=true&tls=false",
        "proxyHost=h&proxyPassword=qJ7&proxyPort=x",
        "authMechanism=MONGODB-AWS&authMechanismProperties=AWS_SESSION_TOKEN:qJ7,X:qJ7",
    ],
)
def test_no_credential_in_an_option_is_in_a_problem(options: str) -> None:
    assert "qJ7" not in str(problems_of({"MONGODB_URI": f"mongodb://user:qJ7@h/?{options}"}))


@given(password=st.text(min_size=1), user=st.text(min_size=1))
def test_an_encoded_password_of_any_characters_is_accepted(password: str, user: str) -> None:
    try:
        uri = f"mongodb://{quote_plus(user)}:{quote_plus(password)}@host/shop"
    except UnicodeEncodeError:
        return
    assert load({"MONGODB_URI": uri}).hosts == "host"
    assert load({"MONGODB_URI": uri.replace("+", "%20")}).database == "shop"


@given(rest=st.text(st.sampled_from("ab:/?@&=%,.[]+1"), max_size=25))
def test_any_malformed_uri_is_a_problem_and_not_a_traceback(rest: str) -> None:
    for scheme in ("mongodb://", "mongodb+srv://"):
        try:
            load({"MONGODB_URI": scheme + rest})
        except ConfigurationError as error:
            assert error.problems


@pytest.mark.parametrize("text", ["{}", "{}\n", "\ufeff{}", "{}\r\n", "\ufeff{}\r\n\r\n", " {} "])
def test_the_uri_is_read_from_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "uri"
    file.write_text(text.format("mongodb://u:p@from-file/shop"), encoding="utf-8", newline="")
    settings = load({"MONGODB_URI_FILE": str(file)})
    assert settings.mongodb_uri == "mongodb://u:p@from-file/shop"


def test_a_file_without_a_uri_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "uri"
    for content, words in ((b"", "is empty"), (b"\xff\xfe", "UTF-8"), (b"h", "must begin with")):
        file.write_bytes(content)
        (problem,) = problems_of({"MONGODB_URI": "", "MONGODB_URI_FILE": str(file)})
        assert words in problem
    (problem,) = problems_of({"MONGODB_URI_FILE": str(file)})
    assert "not both" in problem
    (problem,) = problems_of({"MONGODB_URI": "", "MONGODB_URI_FILE": "/run/x\0y"})
    assert problem.endswith("embedded null byte")
    (problem,) = problems_of({"MONGODB_URI": "", "MONGODB_URI_FILE": str(tmp_path / "none")})
    assert "No such file" in problem
