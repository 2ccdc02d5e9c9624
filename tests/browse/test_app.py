"""The server: who may ask, what is answered, what a browser is told."""

import pytest
from starlette.testclient import TestClient

from vpmoe_assets.browse.app import application, is_loopback
from vpmoe_assets.browse.links import page_of
from vpmoe_assets.browse.server import Server, ServerError


@pytest.fixture(scope="module")
def client(pages):
    with TestClient(application(pages), base_url="http://127.0.0.1:3100", follow_redirects=False) as client:
        yield client


def test_every_answer_forbids_what_comes_from_elsewhere(client, small):
    for path in ("/", "/nonesuch/", "/style.css", f"/{page_of(small.second)}", "/compare?a=x&b=y"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'")
        assert "script-src" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3100", "127.0.0.1.evil.example", "", "[::2]:3100"]
)
def test_a_name_that_was_made_to_point_here_is_refused(client, host):
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 421
    assert "store" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:3100"])
def test_this_machine_is_served_under_each_of_its_names(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading_is_answered(client, method):
    assert client.request(method, "/").status_code == 405


def test_what_is_not_there_is_404_and_addresses_without_their_slash_are_led_on(client):
    assert client.get("/smoke/nonesuch/").status_code == 404
    assert client.get("/smoke").headers["location"] == "/smoke/"
    assert client.get("//evil.example").headers.get("location", "/") in ("/", "//evil.example/"[1:])


@pytest.mark.parametrize(
    "path", ["/..%2f..%2fetc/passwd", "/smoke/../../etc/passwd", "/smoke/%2e%2e/x/", "/%00/", "/a%0ab/"]
)
def test_no_path_leads_outside_the_store(client, path):
    answer = client.get(path)
    assert answer.status_code in (308, 404)
    assert "root:" not in answer.text


def test_files_are_text_or_downloads_and_never_pages(client, small):
    base = f"/{page_of(small.second, 'raw')}"
    record = client.get(f"{base}record.json")
    assert record.json()["record_digest"] == small.second.record_digest
    log = client.get(f"{base}run/log.txt")
    assert (log.text, log.headers["content-type"]) == ("done\n", "text/plain; charset=utf-8")
    weights = client.get(f"{base}payload/model.safetensors")
    assert weights.headers["content-disposition"].startswith("attachment")
    assert client.get(f"{base}payload/nonesuch").status_code == 404


def test_two_artifacts_are_compared_by_name(client, small):
    names = [f"{each.experiment}/{each.asset}@{each.version}" for each in (small.first, small.second)]
    answer = client.get("/compare", params={"a": names[0], "b": names[1]})
    assert answer.status_code == 303
    assert "optimizer.lr" in client.get(answer.headers["location"]).text
    for word in (small.first.record_digest[:12], f"{small.first.asset}@{small.first.version}"):
        assert client.get("/compare", params={"a": word, "b": names[1]}).headers == answer.headers, word
    for a in ("x", "smoke/nonesuch", "smoke/synth@1", "a/b/c@1", "//evil.example@x", "", "../x", "\0"):
        answer = client.get("/compare", params={"a": a, "b": names[1]})
        assert answer.status_code == 404, a
    assert "is a whole experiment" in client.get("/compare", params={"a": "smoke", "b": names[1]}).text


def test_an_address_that_others_reach_has_to_be_meant(small):
    with pytest.raises(ServerError, match="--expose"):
        Server(small.store, "0.0.0.0", 3100)
    assert Server(small.store, "0.0.0.0", 3100, expose=True).url == "http://0.0.0.0:3100/"
    assert [is_loopback(host) for host in ("::1", "127.9.9.9", "localhost", "10.0.0.1", "x")] == [
        True
    ] * 3 + [False] * 2


def test_a_taken_port_is_refused_with_the_remedy(small):
    with Server(small.store, "127.0.0.1", 0).listening() as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerError, match=f"port {port} is taken: choose another with --port"),
            Server(small.store, "127.0.0.1", port).listening(),
        ):
            pass
