"""Which transport is chosen, by servers that can be reached in one way only: TLS, a proxy, loopback beside a proxy."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.loadgen_server import ScriptedServer
from toolkit.loadgen.client import choose_transport
from toolkit.records.requests import read_requests
from toolkit.records.status import read_status


def run(url: str, out: Path, **env: str) -> tuple[str, str]:
    """(transport of the point, what was logged); proxies only as given."""
    words = [f"url={url}", "model=demo", f"out={out}", "osl=3", "concurrency=2", "max_client_verdict=client_limited"]
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.loadgen", *words], env=clean | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    status = read_status(out)
    assert set(read_requests(out)["status"]) == {"ok"}
    assert status.points[0].client is not None
    return status.points[0].client.transport, done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_an_encrypted_server(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ScriptedServer(context).running() as server:
        assert server.url.startswith("https://")
        transport, said = run(server.url, tmp_path / "out", SSL_CERT_FILE=str(certificate))
    assert transport == "aiohttp"
    assert "https is encrypted" in said, "the choice and its reason are said"
    assert len(server.bodies) == 2 + 4


def test_a_server_behind_a_proxy(tmp_path: Path) -> None:
    with ScriptedServer().running() as proxy:
        transport, said = run("http://model.invalid:9000", tmp_path, http_proxy=proxy.url)
    assert transport == "aiohttp"
    assert "a proxy is set in the environment" in said
    assert {headers["host"] for headers in proxy.headers} == {"model.invalid:9000"}


def test_loopback_is_never_reached_through_a_proxy(tmp_path: Path) -> None:
    with ScriptedServer().running() as server, ScriptedServer().running() as proxy:
        transport, _ = run(server.url, tmp_path, http_proxy=proxy.url, HTTP_PROXY=proxy.url)
    assert transport == "socket"
    assert not proxy.bodies and len(server.bodies) == 6


def test_a_transport_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transport=socket does not work here: https is encrypted.*transport=aiohttp"):
        choose_transport("socket", "https://127.0.0.1:1")
