"""Settings: what is accepted, and that every fault is said at once and without secrets."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from urllib.parse import quote_plus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from config import Settings, declared, load
from loyalty.env_file import read_env_file
from loyalty.errors import ConfigurationError

URI = "mongodb://localhost"


def faults(**values: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load({"MONGODB_URI": URI, **values})
    return list(caught.value.problems)


def test_only_the_uri_is_required_and_the_rest_has_the_documented_defaults() -> None:
    assert load({"MONGODB_URI": URI}) == Settings(
        mongodb_uri=URI,
        database="oms_db",
        orders="orders",
        users="users",
        recounts="loyalty_recounts",
        order_statuses=("Shipped",),
        points_per_order=1,
        status_field="status",
        customer_field="customer_id",
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
def test_a_file_of_examples_names_every_setting_in_order_with_its_default(file: str) -> None:
    text = (Path(__file__).parents[1] / file).read_text()
    lines = [line.lstrip("#") for line in text.splitlines() if line.lstrip("#")[:1].isupper()]
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    values.pop("MONGODB_URI_FILE", None)  # in a unit it goes with LoadCredential=
    assert load(values) == load({"MONGODB_URI": values["MONGODB_URI"]})
    assert list(values) == [setting.name for setting in declared().values()]


def test_every_setting_is_read() -> None:
    settings = load(
        {
            "MONGODB_URI": "mongodb://u:p@a:1,b:2/shop?replicaSet=rs&w=majority",
            "ORDERS_COLLECTION": "o",
            "USERS_COLLECTION": "u",
            "RECOUNTS_COLLECTION": "",
            "ORDER_STATUSES": " Shipped, Delivered ,,Shipped",
            "POINTS_PER_ORDER": "5",
            "ORDER_STATUS_FIELD": "order.state",
            "ORDER_CUSTOMER_FIELD": "order.customer.id",
            "USER_POINTS_FIELD": "loyalty.points",
            "COUNT_WORKERS": "16",
            "RECOUNT_INTERVAL": "90s",
            "COUNT_TIMEOUT": "1d",
            "MAX_DECREASE_PERCENT": "100",
            "BATCH_SIZE": "1",
            "LOG_LEVEL": "debug",
            "LOG_FORMAT": "JSON",
            "METRICS_FILE": "/var/lib/node_exporter/loyalty.prom",
        }
    )
    assert settings.database == "shop"
    assert settings.hosts == "a:1,b:2"
    assert (settings.orders, settings.users, settings.recounts) == ("o", "u", "")
    assert settings.order_statuses == ("Shipped", "Delivered")
    assert settings.points_per_order == 5
    assert settings.status_field == "order.state"
    assert settings.customer_field == "order.customer.id"
    assert settings.points_field == "loyalty.points"
    assert settings.count_workers == 16
    assert settings.recount_interval == timedelta(seconds=90)
    assert settings.count_timeout == timedelta(days=1)
    assert (settings.max_decrease_percent, settings.batch_size) == (100, 1)
    assert (settings.log_level, settings.log_format) == ("DEBUG", "json")
    assert settings.metrics_file == "/var/lib/node_exporter/loyalty.prom"
    assert load({"MONGODB_URI": URI + "/a", "MONGODB_DATABASE": "b"}).database == "b"


BAD = {
    "MONGODB_DATABASE": ["a b", "a.b", "a/b", "x" * 64],
    "ORDERS_COLLECTION": ["a$b", "system.x", ".a", "a..b"],
    "USERS_COLLECTION": ["a$b"],
    "RECOUNTS_COLLECTION": ["a$b"],
    "ORDER_STATUSES": [",", " , "],
    "POINTS_PER_ORDER": ["0", "-1", "1.5", "x", "٣", "1e3", "9" * 30],
    "RECOUNT_INTERVAL": ["0s", "2", "2 h", "-2h", "2w", "h", "400d", "2H", "9" * 12 + "d"],
    "COUNT_TIMEOUT": ["0m", "25d"],
    "COUNT_WORKERS": ["0", "17"],
    "ORDER_STATUS_FIELD": ["$status", ".a", "a.", "a..b", "a b.$c", " . "],
    "ORDER_CUSTOMER_FIELD": ["$id"],
    "USER_POINTS_FIELD": ["_id", "_id.points", "a.$b"],
    "MAX_DECREASE_PERCENT": ["-1", "101", "90%"],
    "BATCH_SIZE": ["0", "100001", "1k"],
    "LOG_LEVEL": ["LOUD", "5"],
    "LOG_FORMAT": ["xml"],
    "METRICS_FILE": ["loyalty.prom", "/var/lib/node_exporter/loyalty.txt"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_a_bad_value_is_one_fault_that_names_its_variable(name: str, value: str) -> None:
    (fault,) = faults(**{name: value})
    assert fault.startswith(f"{name}: ")


def test_all_faults_are_said_at_once() -> None:
    found = faults(**{name: values[0] for name, values in BAD.items()}, MONGODB_URI="http://x")
    assert sorted(fault.split(":")[0] for fault in found) == sorted([*BAD, "MONGODB_URI"])


@pytest.mark.parametrize("customer", ["status", "status.id"])
def test_an_order_has_its_status_and_its_customer_in_different_fields(customer: str) -> None:
    (fault,) = faults(ORDER_CUSTOMER_FIELD=customer)
    assert fault == "ORDER_STATUS_FIELD, ORDER_CUSTOMER_FIELD: must be different fields"
    assert load({"MONGODB_URI": URI, "ORDER_CUSTOMER_FIELD": "status_id"})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("MONGODB_DATBASE", "MONGODB_DATABASE"),
        ("mongodb_database", "MONGODB_DATABASE"),
        ("ORDER_STATUS", "ORDER_STATUSES"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("MONGO_URI", "MONGODB_URI"),
    ],
)
def test_a_name_that_nearly_is_a_settings_is_a_fault_in_a_file(
    tmp_path: Path, misspelt: str, meant: str
) -> None:
    file = tmp_path / "env"
    file.write_text(f"{misspelt}=x\nPATH_TO_SOMETHING=1\nTZ=UTC\n")
    with pytest.raises(ConfigurationError) as caught:
        read_env_file(file)
    assert caught.value.problems == (f"unknown setting {misspelt}, did you mean {meant}?",)


def test_collections_must_differ() -> None:
    for name in ("USERS_COLLECTION", "RECOUNTS_COLLECTION"):
        (fault,) = faults(**{name: "orders"})
        assert "must be different" in fault


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "required"),
        ("localhost:27017", "must begin with"),
        ("mongodb://", "host"),
        ("mongodb://a:0x", "host"),
        ("mongodb://a:99999", "Port"),
        ("mongodb://a b", "host"),
        ("mongodb://a,,b", "host"),
        ("mongodb://u:p/w@h/d", "percent-encoded"),
        ("mongodb://u:p?w@h/d", "percent-encoded"),
        ("mongodb://u:p@w@h/d", "percent-encoded"),
        ("mongodb://u:p:w@h/d", "percent-encoded"),
        ("mongodb://u:p%w@h/d", "percent-encoded"),
        ("mongodb://@h/d", "not valid username"),
        ("mongodb://h/a b", "database name"),
        ("mongodb://h/?retryWritess=true", "unknown option retryWritess"),
        ("mongodb://h/?connectTimeoutMS=soon", "bad value of option connectTimeoutMS"),
        ("mongodb://h/?tls", "name=value"),
        ("mongodb://a,b/?directConnection=true", "multiple hosts"),
        ("mongodb://h/?tls=true&ssl=false", "conflicting"),
        ("mongodb://h/?readConcernLevel=bogus", "bad value of option readConcernLevel"),
        ("mongodb://h/?compressors=snappy", "snappy"),
        ("mongodb+srv://h.example.com:27017/", "port"),
        ("mongodb+srv://a.example.com,b.example.com/", "only one, hostname"),
    ],
)
def test_a_bad_uri_is_one_fault_in_plain_words(uri: str, words: str) -> None:
    (fault,) = faults(MONGODB_URI=uri)
    assert fault.startswith("MONGODB_URI")
    assert words in fault


def test_a_database_of_the_server_itself_is_a_fault_unless_another_is_named() -> None:
    (fault,) = faults(MONGODB_URI="mongodb://h/admin")
    assert "is the server's, not a shop's" in fault
    assert load({"MONGODB_URI": "mongodb://h/admin", "MONGODB_DATABASE": "b"}).database == "b"


def test_two_bad_options_are_two_faults() -> None:
    assert len(faults(MONGODB_URI="mongodb://h/?a=1&w=majority&timeoutMS=x")) == 2


SECRET = st.text(st.sampled_from("/?#%@:$&=,[]{}\\\"'` ;+!XYZ0"), min_size=4, max_size=20)


@given(secret=SECRET, tail=st.sampled_from(["", "/", "/shop", "/shop?w=1", "?w=1", "/?tls=x"]))
@example(secret="SECRET/hunter2", tail="/shop")
@example(secret="SECRET?hunter2=1", tail="")
@example(secret="%hunter2", tail="")
def test_no_part_of_a_raw_password_is_in_a_fault_or_repr(secret: str, tail: str) -> None:
    password = f"qJ7{secret}qJ7"
    try:
        settings = load({"MONGODB_URI": f"mongodb://user:{password}@host{tail}"})
    except ConfigurationError as error:
        said = str(error) + repr(error)
    else:
        said = repr(settings) + str(settings) + settings.hosts
    assert "qJ7" not in said
    assert password not in said


@given(password=st.text(min_size=1), user=st.text(min_size=1))
def test_an_encoded_password_of_any_characters_is_accepted(password: str, user: str) -> None:
    try:
        uri = f"mongodb://{quote_plus(user)}:{quote_plus(password)}@host/shop"
    except UnicodeEncodeError:
        return
    assert load({"MONGODB_URI": uri}).hosts == "host"
    assert load({"MONGODB_URI": uri.replace("+", "%20")}).database == "shop"


@given(values=st.dictionaries(st.sampled_from([*BAD, "MONGODB_URI"]), st.text(max_size=30)))
def test_whatever_is_set_ends_in_settings_or_in_faults(values: dict[str, str]) -> None:
    try:
        load(values)
    except ConfigurationError as error:
        assert error.problems
        assert all("\n" not in fault for fault in error.problems)


@given(rest=st.text(st.sampled_from("ab:/?@&=%,.[]+1"), max_size=25))
def test_any_malformed_uri_is_a_fault_not_a_traceback(rest: str) -> None:
    for scheme in ("mongodb://", "mongodb+srv://"):
        try:
            load({"MONGODB_URI": scheme + rest})
        except ConfigurationError as error:
            assert error.problems


def test_the_uri_can_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "uri"
    file.write_text("mongodb://from-file/shop\n")
    assert load({"MONGODB_URI_FILE": str(file)}).hosts == "from-file"
    (fault,) = faults(MONGODB_URI_FILE=str(file))
    assert "not both" in fault
    for text, words in ((b"", "empty"), (b"\xff\xfe", "UTF-8")):
        file.write_bytes(text)
        (fault,) = faults(MONGODB_URI="", MONGODB_URI_FILE=str(file))
        assert words in fault
    (fault,) = faults(MONGODB_URI="", MONGODB_URI_FILE=str(tmp_path / "none"))
    assert "No such file" in fault


@pytest.mark.parametrize("password", ["a#b", "a%b", "a$b", "${HOME}", "a'b", "$$", "a\\b", "é#"])
def test_an_env_file_is_taken_literally(tmp_path: Path, password: str) -> None:
    file = tmp_path / "env"
    uri = f"mongodb://u:{password.replace('%', '%25')}@host"
    file.write_text(f"# comment\nMONGODB_URI={uri}\n\nexport BATCH_SIZE=5\n", encoding="utf-8-sig")
    assert read_env_file(file) == {"MONGODB_URI": uri, "BATCH_SIZE": "5"}


def test_a_bad_env_file_says_which_line(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("A=1\nnonsense here\nB='open\nC\n")
    with pytest.raises(ConfigurationError) as caught:
        read_env_file(file)
    assert [f.split(": ")[0] for f in caught.value.problems] == [
        f"{file} line {n}" for n in (2, 3, 4)
    ]
    with pytest.raises(ConfigurationError, match="No such file"):
        read_env_file(tmp_path / "none")
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_env_file(file)
