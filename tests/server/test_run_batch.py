"""`omni-engine run-batch`: OpenAI's batch format in and out, through the application of `serve`."""

from __future__ import annotations

import json

import pytest

from omni_engine.server import run_batch as module
from omni_engine.server.cli import main


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def line(custom_id, url="/v1/chat/completions", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@pytest.fixture
def batch(tmp_path, fake_engine, monkeypatch):
    """Runs a batch over the fake engine; the exit status and the lines of the output file."""

    async def nothing(*_args):
        pass

    fake_engine.start = fake_engine.shutdown = nothing
    monkeypatch.setattr(module.AsyncEngine, "from_engine_args", lambda *_args, **_options: fake_engine)

    def run(*lines, flags=()):
        source, target = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
        status = main(["run-batch", "-i", source, "-o", str(target), "--model", "tiny/model", *flags])
        found = [json.loads(text) for text in target.read_text().splitlines()] if target.exists() else None
        assert sorted(path.name for path in tmp_path.iterdir() if ".partial" in path.name) == [] or status
        return status, found

    return run


def test_every_line_is_answered_in_order_whatever_its_route(batch, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONCURRENT", 2)
    user = [{"role": "user", "content": "hi"}]
    status, answers = batch(
        line("a", messages=user, model="tiny/model"),
        "",
        line("b", "/v1/completions", prompt="hi"),
        line("c", "/v1/responses", input="hi"),
        line("d", messages=user, temperature=-1),
        line("e", messages=user, stream=True),
        line("f", "/v1/nothing", prompt="hi"),
        line("g", messages=user, max_tokens=2),
    )
    assert status == 0
    assert [answer["custom_id"] for answer in answers] == list("abcdefg")
    assert [answer["response"]["status_code"] for answer in answers] == [200, 200, 200, 400, 400, 404, 200]
    assert [answer["error"] is None for answer in answers] == [True, True, True, False, False, False, True]
    chat, completion, response = (answer["response"]["body"] for answer in answers[:3])
    assert chat["choices"][0]["message"]["content"] == "hello"
    assert (completion["object"], response["object"]) == ("text_completion", "response")
    assert answers[0]["response"]["request_id"] == chat["id"]
    assert answers[3]["error"]["error"]["param"] == "temperature" and answers[3]["response"]["body"] is None
    assert answers[6]["response"]["body"]["choices"][0]["message"]["content"] == "he"
    assert len({answer["id"] for answer in answers}) == 7


def test_flags_of_the_api_hold_and_those_of_listening_are_unknown(batch, capsys):
    _status, answers = batch(line("a", "/v1/completions", prompt="hi", model="x"), flags=["--served-model-name", "x"])
    assert answers[0]["response"]["body"]["model"] == "x"
    with pytest.raises(SystemExit):
        batch(line("a", "/v1/completions", prompt="hi"), flags=["--port", "1"])
    assert "--port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("{", "line 2"),
        ({"custom_id": "a", "method": "POST", "url": "/x"}, "line 2"),
        ({**line("a"), "method": "GET"}, "must be POST"),
        ({**line("a"), "url": "http://other/v1"}, "must be POST with a path"),
    ],
)
def test_a_file_with_a_wrong_line_is_refused_before_the_model_loads(batch, capsys, wrong, text):
    status, answers = batch(line("a", "/v1/completions", prompt="hi"), wrong)
    assert (status, answers) == (1, None)
    assert text in capsys.readouterr().err


def test_addresses_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["run-batch", "-i", "http://a/b", "-o", "out"])
    assert "must be a file" in capsys.readouterr().err
