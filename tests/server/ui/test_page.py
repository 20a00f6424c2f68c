"""The files of the page over HTTP: what is served, under which policy, and what is not."""

from __future__ import annotations

import re

import pytest

from omni_engine.server.serve_arguments import serve_parser
from omni_engine.server.ui import page

FILES = sorted(file.name for file in page.FOLDER.iterdir())
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# What makes markup or code of a text.
SINKS = re.compile(
    r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function|DOMParser|createContextualFragment)\b"
)


async def fetch(client, path, **options):
    """Status, headers and body."""
    async with client.session.get(client.address + path, allow_redirects=False, **options) as response:
        return response.status, response.headers, await response.read()


def test_the_page_and_its_files_come_under_a_policy_that_lets_nothing_else_run(serve):
    async def scenario(client, engine):
        for path in ("/", *(f"/ui/{name}" for name in FILES)):
            status, headers, body = await fetch(client, path)
            assert (
                status == 200
                and body == (page.FOLDER / (path.removeprefix("/ui/").strip("/") or "index.html")).read_bytes()
            )
            assert headers["Content-Security-Policy"].startswith(POLICY)
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-cache"
            kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(path.rpartition(".")[2])
            assert headers["Content-Type"] == f"{kind or 'text/html'}; charset=utf-8"

    assert {"index.html", "style.css", "app.js", "chat.js", "engine.js", "markdown.js", "i18n.js"} <= set(FILES)
    serve(scenario)


def test_a_file_that_is_known_is_not_sent_again(serve):
    async def scenario(client, engine):
        status, headers, body = await fetch(client, "/ui/chat.js")
        tag = headers["ETag"]
        assert status == 200 and body and (await fetch(client, "/ui/app.js"))[1]["ETag"] != tag
        status, headers, body = await fetch(client, "/ui/chat.js", headers={"If-None-Match": f'"old", W/{tag}'})
        assert (status, body, headers["ETag"]) == (304, b"", tag) and "Content-Security-Policy" in headers
        assert (await fetch(client, "/ui/chat.js", headers={"If-None-Match": '"old"'}))[0] == 200

    serve(scenario)


@pytest.mark.parametrize("name", ["none.js", "..%2fpage.py", "%2e%2e%2fpage.py", "__init__.py", "..%5cpage.py", "."])
def test_nothing_but_these_files_is_served(serve, name):
    async def scenario(client, engine):
        status, _, body = await fetch(client, f"/ui/{name}")
        assert status == 404 and b"import" not in body

    serve(scenario)


def test_without_the_page_its_addresses_are_unknown(serve):
    async def scenario(client, engine):
        for path in ("/", "/ui/app.js", "/ui/live"):
            assert (await fetch(client, path))[0] == 404

    serve(scenario, ui=False)


def test_with_a_key_the_page_loads_and_the_stream_wants_it(serve):
    async def scenario(client, engine):
        assert (await fetch(client, "/"))[0] == 200 and (await fetch(client, "/ui/app.js"))[0] == 200
        assert (await fetch(client, "/ui/live"))[0] == 401
        assert (await fetch(client, "/ui/live", headers={"Authorization": "Bearer wrong"}))[0] == 401
        assert engine.num_watches == 0
        address = client.address + "/ui/live"
        async with client.session.get(address, headers={"Authorization": "Bearer secret"}) as response:
            assert response.status == 200 and (await response.content.readline()).startswith(b"data: ")

    serve(scenario, api_keys=("secret",))


def test_under_a_root_path_the_page_has_a_slash_so_that_its_files_are_found(serve):
    async def scenario(client, engine):
        status, headers, _ = await fetch(client, "/proxy")
        assert (status, headers["Location"]) == (308, "/proxy/")
        status, _, body = await fetch(client, "/proxy/")
        assert status == 200
        for address in re.findall(r'(?:src|href)="(ui/[^"]+)"', body.decode()):
            assert (await fetch(client, f"/proxy/{address}"))[0] == 200
        assert (await fetch(client, "/"))[0] == 200

    serve(scenario, root_path="/proxy")


def test_nothing_is_loaded_from_elsewhere_and_nothing_stands_inline():
    for name in FILES:
        text = (page.FOLDER / name).read_text(encoding="utf-8")
        addresses = set(re.findall(r"""["'(]((?:https?:)?//[^"')\s]+)""", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        if name.endswith(".js"):
            assert not SINKS.search(text), name
    index = (page.FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index)


def test_the_flag_turns_the_page_off():
    assert serve_parser().parse_args([]).ui is True
    assert serve_parser().parse_args(["--no-ui"]).ui is False


def words():
    """The page's words by language and key."""
    text = (page.FOLDER / "i18n.js").read_text(encoding="utf-8")
    found = {}
    for language, body in re.findall(r"^  (en|zh): \{\n(.*?)^  \},$", text, re.MULTILINE | re.DOTALL):
        found[language] = dict(re.findall(r'^    "([\w.]+)": "((?:[^"\\]|\\.)*)",$', body, re.MULTILINE))
        assert len(found[language]) == body.count("\n")
    return found


def test_both_languages_have_the_same_texts_with_the_same_gaps():
    found = words()
    assert len(found["en"]) > 100 and list(found["en"]) == list(found["zh"])
    for key, text in found["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", found["zh"][key])), key


def test_every_text_is_used_and_every_used_text_exists():
    keys = set(words()["en"])
    sources = "".join((page.FOLDER / name).read_text(encoding="utf-8") for name in FILES if name != "i18n.js")
    used = set(re.findall(r'data-i18n(?:-label|-placeholder)?(?:=|", |": )"([\w.]+)"', sources))
    used |= set(re.findall(r'(?:\b(?:text|note|button|announce|group|Chart)\(|words: |title: )"([\w.]+)"', sources))
    assert len(used) > 50 and used <= keys, used - keys
    built = tuple(re.findall(r"[`\"]([a-z]+\.)(?:\$\{|\" \+)", sources))  # `set.${name}`
    literal = set(re.findall(r'"([\w.]+)"', sources))
    assert {key for key in keys if key not in literal and not key.startswith(built)} == set()
