"""Tables on a dashboard: paged, kept through a lost network, written to once; Supabase through its own client."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest
import sqlalchemy as sa
from conftest import needs

needs("gradio")

from diffusion_kit.cli import main  # noqa: E402
from diffusion_kit.ledger.sql import script  # noqa: E402
from diffusion_kit.studio import dashboard, grid  # noqa: E402
from diffusion_kit.studio.outbox import Outbox  # noqa: E402
from diffusion_kit.studio.tables import SqlTable, open_table  # noqa: E402

KEY = "sb_secret_that_must_not_be_seen"


class Rest(BaseHTTPRequestHandler):
    """As much of PostgREST as Supabase's client asks: select with a range, insert, upsert that leaves out what is there.
    It gives 1,000 rows at most, as Supabase does."""

    tables: dict[str, list[dict[str, Any]]] = {}
    seen: list[str] = []
    down = lose_answers = False

    def do_GET(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        asked = parse_qs(url.query)
        rows = self.tables.get(url.path.removeprefix("/rest/v1/"))
        if not self.allowed(rows):
            return
        start = int(asked.get("offset", ["0"])[0])
        count = min(int(asked.get("limit", ["1000"])[0]), 1000)
        self.answer(200, (rows or [])[start : start + count])

    def do_POST(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        rows = self.tables.get(url.path.removeprefix("/rest/v1/"))
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if rows is None or not self.allowed(rows):
            return
        if any("colour" in row for row in given):
            self.answer(400, {"message": "no column colour", "code": "PGRST204", "hint": None, "details": None})
            return
        ignore = "ignore-duplicates" in self.headers.get("Prefer", "")
        known = {row["product_id"] for row in rows}
        new = [row for row in given if not (ignore and row["product_id"] in known)]
        rows.extend(new)
        if self.lose_answers:
            self.close_connection = True
            return
        self.answer(201, new)

    def allowed(self, rows: list[dict[str, Any]] | None) -> bool:
        self.seen.append(self.headers.get("apikey", ""))
        if Rest.down:
            self.answer(503, {"message": f"down, says {KEY}", "code": "503", "hint": None, "details": None})
        elif self.headers.get("apikey") != KEY:
            self.answer(401, {"message": "no key", "code": "401", "hint": None, "details": None})
        elif rows is None:
            self.answer(404, {"message": "no table", "code": "404", "hint": None, "details": None})
        else:
            return True
        return False

    def answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    needs("supabase")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rest)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Rest, "tables", {"Product": []})
    monkeypatch.setattr(Rest, "down", False)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("SUPABASE_URL", url)
    monkeypatch.setenv("SUPABASE_SECRET_KEY", KEY)
    yield url
    server.shutdown()
    server.server_close()


def products(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"product_id": k, "product_name": f"Item {k}", "inventory_count": draw.randint(1, 100), "price": draw.random()}
        for k in range(count)
    ]


@pytest.fixture
def database(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    with sa.create_engine(url).begin() as connection:
        columns = "product_id INTEGER PRIMARY KEY, product_name TEXT, inventory_count INTEGER, price REAL"
        connection.execute(sa.text(f"CREATE TABLE Product ({columns})"))
    return url


# The guide's example


def test_the_guides_example_by_supabases_client(rest: str) -> None:
    """Ten rows are inserted by the client, as the guide writes it; the dashboard has two charts of them."""
    import supabase

    supabase.create_client(rest, KEY).table("Product").insert(products(10)).execute()
    live = dashboard.make_live(open_table("Product"), rest)
    dashboard.check_columns(live, "product_id", ["price", "inventory_count"])
    blocks = dashboard.build(live, "product_id", ["price", "inventory_count"], 60.0)
    plots = [own for own in blocks.blocks.values() if type(own).__name__ == "BarPlot"]
    assert [(own.x, own.y) for own in plots] == [("product_id", "price"), ("product_id", "inventory_count")]  # type: ignore[attr-defined]
    assert live.look().to_dict("records") == products(10)
    assert set(Rest.seen) == {KEY}


@pytest.mark.parametrize("count", [999, 1000, 2345])
def test_tables_are_read_page_by_page(rest: str, database: str, count: int) -> None:
    Rest.tables["Product"] = products(count)
    assert open_table("Product").read() == products(count)
    own = SqlTable(database, "Product")
    own.insert(products(count))
    assert own.read() == products(count)


def test_a_lost_network_keeps_the_data_and_says_their_age(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Rest.tables["Product"] = products(3)
    live = dashboard.make_live(open_table("Product"), rest)
    assert len(live.look()) == 3
    assert live.words == "3 rows, just read."
    Rest.down = True
    live.at -= 300
    assert len(live.look()) == 3
    assert "Not reached" in live.words
    assert "the data are 5 min old" in live.words
    assert KEY not in live.words
    Rest.down = False
    assert len(live.look()) == 3
    assert live.words == "3 rows, just read."


def test_rows_written_while_offline_are_sent_later_and_once(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = dashboard.make_live(open_table("Product"), rest)
    live.look()
    Rest.down = True
    for row in products(3):
        live.outbox.add([row])
    live.look()
    assert len(live.outbox) == 3
    assert "3 rows wait to be sent" in live.words
    Rest.down, Rest.lose_answers = False, True  # it takes them, and its answer is lost
    live.look()
    assert len(live.outbox) == 3
    Rest.lose_answers = False
    assert len(live.look()) == 3
    assert len(live.outbox) == 0
    assert Rest.tables["Product"] == products(3)


def test_a_batch_that_waits_outlives_the_process(database: str, tmp_path: Path) -> None:
    source = SqlTable(database, "Product")
    Outbox(tmp_path / "out", source).add(products(2))
    again = Outbox(tmp_path / "out", source)
    assert again.send() == 2
    assert again.send() == 0
    assert source.read() == products(2)


def test_the_key_comes_from_the_environment_alone(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUPABASE_SECRET_KEY")
    with pytest.raises(ValueError, match="SUPABASE_SECRET_KEY is not set"):
        open_table("Product")


def test_the_key_is_in_no_page_and_no_error(rest: str, capfd: pytest.CaptureFixture[str]) -> None:
    Rest.tables["Product"] = products(3)
    Rest.down = True
    live = dashboard.make_live(open_table("Product"), rest)
    live.look()
    blocks = dashboard.build(live, "product_id", ["price"], 60.0)
    assert KEY not in json.dumps(blocks.get_config_file(), default=str)
    assert KEY not in live.words
    assert live.problem is not None
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


def test_what_is_not_there_is_said(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["studio", "dashboard", "--source", database, "--x", "product_id", "--y", "price"]
    assert main([*call, "--table", "Produkt"]) == 2
    assert "no table 'Produkt'; there are Product" in capsys.readouterr().err
    assert main([*call[:-1], "cost", "--table", "Product"]) == 2
    assert "no column 'cost'; it has product_id, product_name" in capsys.readouterr().err
    assert main(["studio", "dashboard"]) == 2
    assert "needs --table" in capsys.readouterr().err


# The grid


def test_rows_of_a_grid_have_numbers_and_no_empty_ones() -> None:
    rows = pd.DataFrame([["7", "Item", "1.5"], ["", "", ""], [None, None, None]], columns=["a", "b", "c"])
    assert grid.rows_of(rows) == [{"a": 7, "b": "Item", "c": 1.5}]


def test_csv_in_and_out_are_each_others_inverse(tmp_path: Path) -> None:
    rows = pd.DataFrame([["1", 'a, "b"\nc'], ["2", ""]], columns=["id", "ü"])
    file = tmp_path / "rows.csv"
    file.write_text(grid.to_csv(rows))
    pd.testing.assert_frame_equal(grid.from_csv(str(file)), rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7), ("-7", -7), ("1.5", 1.5), ("2e3", 2000.0), ("007", "007"), ("1_000", "1_000"), ("nan", "nan"),
        ("inf", "inf"), ("", None), ("3 apples", "3 apples"),
    ],
)  # fmt: skip
def test_what_is_no_number_stays_text(text: str, expected: Any) -> None:
    assert grid.number(text) == expected


def test_rows_that_the_table_refuses_are_laid_aside_and_the_others_go_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("CREATE TABLE Sold (id INTEGER PRIMARY KEY, name TEXT NOT NULL, at DATETIME)"))
    live = dashboard.make_live(SqlTable(url, "Sold"), url)
    for rows in ([{"id": 1}], [{"id": 2, "name": 7, "at": "2026-11-30 07:30"}], [{"id": 3, "name": "a", "at": "soon"}]):
        live.outbox.add(rows)
    found = live.look()
    assert [(row["id"], row["name"], row["at"].hour) for row in found.to_dict("records")] == [(2, "7", 7)]
    assert len(live.outbox) == 0
    assert "1 rows, just read" in live.words
    assert "were refused (at is 'soon', which is no datetime)" in live.words
    assert len(list(live.outbox.folder.glob("*.refused"))) == 2


def test_empty_cells_are_as_the_table_says(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("CREATE TABLE Sold (id INTEGER PRIMARY KEY, name TEXT NOT NULL DEFAULT 'none')"))
    live = dashboard.make_live(SqlTable(url, "Sold"), url)
    dashboard.add(live, pd.DataFrame([["", "a"], ["7", ""], ["", "b"]], columns=["id", "name"]))
    assert live.look().to_dict("records") == [
        {"id": 1, "name": "a"}, {"id": 7, "name": "none"}, {"id": 8, "name": "b"}
    ]  # fmt: skip
    assert live.outbox.refused is None


def test_a_database_of_others_stays_as_it_is(database: str, tmp_path: Path) -> None:
    dashboard.make_live(SqlTable(database, "Product"), database).look()
    with sa.create_engine(database).connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "delete"
    with pytest.raises(ValueError, match="no database"):
        SqlTable(f"sqlite:///{tmp_path / 'no' / 'such.db'}", "Product")
    assert not (tmp_path / "no").exists()


def test_what_a_table_refuses_by_its_interface_does_not_hold_up_the_rest(rest: str) -> None:
    """An empty table of Supabase does not say its columns: rows with one that is none are found out by sending them."""
    Rest.tables["Product"], live = [], dashboard.make_live(open_table("Product"), rest)
    live.outbox.add([{"product_id": 1, "colour": "red"}])
    live.outbox.add(products(2))
    assert len(live.look()) == 2
    assert "were refused" in live.words


def test_rows_that_cannot_be_sent_hide_none_that_can_be_read(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Rest.tables["Product"], live = products(3), dashboard.make_live(open_table("Product"), rest)
    live.outbox.add([{"product_id": 9}])

    def lost(rows: Any) -> None:
        raise OSError("no way to write")

    monkeypatch.setattr(live.source, "insert", lost)
    assert len(live.look()) == 3
    assert "3 rows, just read. 1 rows wait to be sent (no way to write)" in live.words


def test_two_dashboards_send_a_row_once(tmp_path: Path) -> None:
    url, rows = f"sqlite:///{tmp_path / 'shop.db'}", 20
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("CREATE TABLE Sold (id INTEGER PRIMARY KEY, name TEXT)"))
    own = [Outbox(tmp_path / "outbox", SqlTable(url, "Sold")) for _ in range(2)]
    for k in range(rows):
        own[0].add([{"name": f"{k}"}])
    threads = [threading.Thread(target=box.send) for box in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(row["name"]) for row in SqlTable(url, "Sold").read()) == list(range(rows))


@pytest.mark.parametrize(
    ("text", "row", "column", "expected"),
    [
        ("1\tone\n2\ttwo\n", 0, 0, [["1", "one"], ["2", "two"]]),
        ("id\tname\n1\tone", 0, 0, [["1", "one"]]),
        ("two\nthree", 0, 1, [["", "two"], ["", "three"]]),
        ("1", 1, 0, [["", ""], ["1", ""]]),
        ('1\t"a\nb"', 0, 0, [["1", "a\nb"]]),
        ("1", 10**12, 10**12, [["", ""], ["", "1"]]),
        ("", 0, 0, [["", ""]]),
    ],
)
def test_cells_of_a_spreadsheet_go_where_they_are_pasted(text: str, row: int, column: int, expected: Any) -> None:
    rows = pd.DataFrame([["", None]], columns=["id", "name"])
    found = grid.pasted(rows, json.dumps({"text": text, "row": row, "column": column}))
    assert found.values.tolist() == expected
    assert list(found.columns) == ["id", "name"]


def test_a_grid_grows_with_what_is_pasted() -> None:
    found = grid.pasted(pd.DataFrame([["x"]], columns=["1"]), json.dumps({"text": "a\tb\tc", "row": 0, "column": 0}))
    assert (list(found.columns), found.values.tolist()) == (["1", "2", "3"], [["a", "b", "c"]])


def test_written_rows_reach_the_table(database: str) -> None:
    live = dashboard.make_live(SqlTable(database, "Product"), database)
    live.look()
    empty = dashboard.add(live, pd.DataFrame([["4", "Item 4", "9", "2.5"]], columns=live.columns))
    assert list(empty.columns) == live.columns
    assert live.look().to_dict("records") == [
        {"product_id": 4, "product_name": "Item 4", "inventory_count": 9, "price": 2.5}
    ]
    with pytest.raises(Exception, match="no column 'colour'"):
        dashboard.add(live, pd.DataFrame([["1"]], columns=["colour"]))
    with pytest.raises(Exception, match="write a row first"):
        dashboard.add(live, pd.DataFrame([[""]], columns=["price"]))


def test_the_ledgers_tables_as_sql(capsys: pytest.CaptureFixture[str]) -> None:
    """Run on a real Postgres by scripts/verify ledger; here, that every table has its security."""
    assert main(["studio", "sql"]) == 0
    text = capsys.readouterr().out
    assert text == script()
    for name in ("runs", "metrics", "pictures", "controls", "evaluations"):
        assert f"CREATE TABLE IF NOT EXISTS {name} " in text
        assert f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY;" in text
        assert f"ON {name} FOR SELECT TO authenticated USING (true);" in text
