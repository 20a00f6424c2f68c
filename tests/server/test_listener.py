"""The listening socket: TCP and unix, TLS, and what is answered to bytes that are no HTTP or too much of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from aiohttp import ClientSession, ServerDisconnectedError, TCPConnector, UnixConnector, web

from omni_engine.server import body as body_module
from omni_engine.server.app import build_app
from omni_engine.server.listener import listen
from omni_engine.server.settings import ServerSettings
from omni_engine.server.sockets import HeaderLimits, TlsFiles, address_of, bind, bind_unix, remove_unix
from omni_engine.server.tls_refresh import refresh_tls

LIMITS = HeaderLimits(field_bytes=1000, num_fields=20)


@pytest.fixture
def play(fake_engine):
    """Runs a scenario while the application answers on a listener."""

    def run(listener, scenario, tls=None, **settings):
        async def main():
            runner = web.AppRunner(build_app(fake_engine, ServerSettings(model="m", **settings)), shutdown_timeout=0.1)
            await runner.setup()
            server = await listen(runner, listener, tls, LIMITS)
            try:
                return await asyncio.wait_for(scenario(), 10)
            finally:
                server.close()
                await runner.cleanup()

        fake_engine.ready = asyncio.Event()
        with listener:
            return asyncio.run(main())

    return run


@contextlib.contextmanager
def connection(port):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        yield client


def exchange(port, data):
    """Send bytes, return status and body of what comes back until the server closes."""
    with connection(port) as client:
        client.sendall(data)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


WRONG = [
    (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    (b"no http at all\r\n\r\n", 400),
    (b"GET /health HTTP/9.9\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nno colon\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
    (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 2000 + b"\r\n\r\n", 431),
    (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(40)) + b"\r\n", 431),
]


@pytest.mark.parametrize(("data", "status"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_no_http_or_too_much_is_answered_in_the_one_error_shape(play, data, status):
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]

    async def scenario():
        return await asyncio.to_thread(exchange, port, data)

    got, body = play(listener, scenario)
    assert got == status
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "aaaa" not in error["message"]


@pytest.mark.parametrize("path", [b"/v1/completions", b"/nothing"])
def test_an_expectation_that_nobody_knows_is_refused_in_the_one_error_shape(play, path):
    listener = bind("127.0.0.1", 0)
    head = b"POST " + path + b" HTTP/1.1\r\nHost: a\r\nExpect: foo\r\nConnection: close\r\n\r\n"

    async def scenario():
        return await asyncio.to_thread(exchange, listener.getsockname()[1], head)

    status, body = play(listener, scenario)
    assert status == 417
    assert json.loads(body)["error"] == {
        "message": "Expectation Failed", "type": "Expectation Failed", "param": None, "code": 417,
    }  # fmt: skip


def test_a_client_that_waits_for_100_continue_gets_it(play):
    listener = bind("127.0.0.1", 0)
    head = b"POST /detokenize HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"

    def ask():
        with connection(listener.getsockname()[1]) as client:
            client.sendall(head)
            return client.recv(4096)

    async def scenario():
        return await asyncio.to_thread(ask)

    assert play(listener, scenario).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")


def test_heads_within_the_limits_are_served(play):
    listener = bind("127.0.0.1", 0)

    async def scenario():
        async with ClientSession(address_of(listener)) as session:
            headers = {f"X-{i}": "1" for i in range(10)} | {"X-Long": "a" * 900}
            async with session.get("/version", headers=headers) as response:
                return response.status

    assert play(listener, scenario) == 200


def test_a_body_over_the_cap_is_refused_before_it_is_sent(play, monkeypatch):
    monkeypatch.setattr(body_module, "MAX_BODY_BYTES", 1000)
    listener = bind("127.0.0.1", 0)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n"
    )

    def send_head_only():
        with connection(listener.getsockname()[1]) as client:
            client.sendall(head)
            return client.recv(4096)

    async def scenario():
        return await asyncio.to_thread(send_head_only)

    assert play(listener, scenario).startswith(b"HTTP/1.1 413 ")


def test_a_unix_socket_serves_and_leaves_no_file(play, tmp_path):
    path = str(tmp_path / "s.sock")
    listener = bind_unix(path)
    assert address_of(listener) == f"unix:{path}"

    async def scenario():
        async with ClientSession(connector=UnixConnector(path)) as session, session.get("http://a/version") as response:
            status = response.status
        remove_unix(path)
        return status

    assert play(listener, scenario) == 200
    assert list(tmp_path.iterdir()) == []


def test_a_dead_servers_socket_is_replaced_and_a_live_ones_is_not(tmp_path):
    path = str(tmp_path / "s.sock")
    bind_unix(path).close()  # its file stays
    with bind_unix(path), pytest.raises(ValueError, match=r"choose another --uds: .*s\.sock"):
        bind_unix(path)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    path.write_text("keep")
    with pytest.raises(ValueError, match="choose another --uds"):
        bind_unix(str(path))
    assert path.read_text() == "keep"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) files for localhost."""
    return make_certificate(tmp_path_factory)


@pytest.fixture(scope="module")
def other_certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory)


def make_certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    files = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-out", str(files[0]), "-keyout", str(files[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    return tuple(map(str, files))


async def version_status(port, trust):
    session = ClientSession(connector=TCPConnector(ssl=trust))
    async with session, session.get(f"https://localhost:{port}/version") as response:
        return response.status


def test_tls_serves_clients_that_trust_the_certificate(play, certificate):
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]

    async def scenario():
        trust = ssl.create_default_context(cafile=certificate[0])
        return await version_status(port, trust)

    assert play(listener, scenario, TlsFiles(*certificate).context()) == 200


def test_with_cert_reqs_2_a_client_without_a_certificate_is_turned_away(play, certificate):
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]

    async def ask(identity):
        trust = ssl.create_default_context(cafile=certificate[0])
        if identity:
            trust.load_cert_chain(*certificate)
        return await version_status(port, trust)

    async def scenario():
        with pytest.raises((OSError, ServerDisconnectedError)):
            await ask(None)
        return await ask(certificate)

    tls = TlsFiles(*certificate, ca_certs=certificate[0], cert_reqs=2).context()
    assert play(listener, scenario, tls) == 200


async def served_certificate(port):
    """The certificate that a new connection gets."""
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return ssl.DER_cert_to_PEM_cert(certificate)


def test_a_renewed_certificate_is_served_and_a_broken_one_is_not(
    play, certificate, other_certificate, tmp_path, caplog
):
    caplog.set_level(logging.INFO, logger="omni_engine.server.tls_refresh")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(certificate[0], cert)
    shutil.copy(certificate[1], key)
    files = TlsFiles(str(cert), str(key))
    context = files.context()
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]

    async def wait_for_log(number):
        while len(caplog.records) < number:
            await asyncio.sleep(0.01)

    async def scenario():
        refreshing = asyncio.create_task(refresh_tls(files, context, 0.02))
        await asyncio.sleep(0.1)
        assert caplog.records == []
        shutil.copy(other_certificate[0], cert)  # its key has not come yet
        await wait_for_log(1)
        half = await served_certificate(port)
        shutil.copy(other_certificate[1], key)
        await wait_for_log(2)
        whole = await served_certificate(port)
        refreshing.cancel()
        return half, whole

    half, whole = play(listener, scenario, context)
    assert half == Path(certificate[0]).read_text()
    assert whole == Path(other_certificate[0]).read_text()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_certificate_that_cannot_be_read_is_said_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"check the --ssl flags: .*missing\.pem"):
        TlsFiles(str(tmp_path / "missing.pem")).context()
