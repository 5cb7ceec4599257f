"""Pages in browsers: the server's own, those of allowed origins (CORS), and refusals (cases N2-02 and N2-03)."""

import pytest
from fake_server import PATHS, error_of, serving

from pshare_jax.errors import PshareError
from pshare_jax.server.config import ServeConfig, ServerConfig, check_config
from pshare_jax.server.origins import Origins, is_origin

pytestmark = pytest.mark.host
APP, LOCAL = "app://obsidian.md", "http://localhost:3000"
BODY = {"model": "abc", "prompt": "p", "messages": [{"role": "user", "content": "p"}]}


@pytest.fixture(scope="module")
def server():
    with serving(allowed_origins=[APP, "HTTP://localhost:3000", "https://ai.example.org"], api_key="key") as running:
        yield running


def preflight(server, path, origin, headers="authorization,content-type,x-stainless-os"):
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": headers}
    return server.client.options(path, headers=asked)


@pytest.mark.parametrize("path", [*PATHS, "/v1/models", "/tokenize"])
@pytest.mark.parametrize("origin", [APP, LOCAL])
def test_preflights_of_allowed_pages(server, path, origin):
    answer = preflight(server, path, origin)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-allow-methods"] == "POST"
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert "origin" in answer.headers["vary"].lower()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_allowed_pages_may_read_answers_and_errors(server, path, stream):
    for key, status in (("key", 200), ("wrong", 401)):
        headers = {"origin": LOCAL, "authorization": f"Bearer {key}"}
        answer = server.client.post(path, json={**BODY, "stream": stream}, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == LOCAL
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    models = server.client.get("/v1/models", headers={"origin": APP, "authorization": "Bearer key"})
    assert models.headers["access-control-allow-origin"] == APP


@pytest.mark.parametrize("origin", ["http://localhost:3001", "https://localhost:3000", "http://evil.example", "null"])
def test_other_pages_are_refused_with_the_setting(server, origin):
    headers = {"origin": origin, "authorization": "Bearer key"}
    for answer in (server.client.post(PATHS[0], json=BODY, headers=headers), preflight(server, PATHS[0], origin)):
        message = error_of(answer, 403)["message"]
        host = f"{server.client.base_url.host}:{server.client.base_url.port}"
        assert all(part in message for part in (repr(origin), repr(host), "server.allowed_origins"))
        assert "access-control-allow-origin" not in answer.headers
    # A browser does not let the page read this one.
    models = server.client.get("/v1/models", headers=headers)
    assert (models.status_code, "access-control-allow-origin" in models.headers) == (200, False)


def test_without_the_setting_only_the_own_page_may_call():
    with serving() as server:
        host = f"{server.client.base_url.host}:{server.client.base_url.port}"
        for origin, status in (("http://evil.example", 403), ("null", 403), (APP, 403), (f"http://{host}", 200)):
            for path in ("/flush_cache", PATHS[0]):
                answer = server.client.post(path, json=BODY, headers={"origin": origin})
                assert answer.status_code == status
                assert "access-control-allow-origin" not in answer.headers
                assert "vary" not in answer.headers


def test_an_ordinary_options_request_has_its_error(server):
    assert server.client.options(PATHS[0], headers={"authorization": "Bearer key"}).status_code == 405


def test_a_star_allows_every_page():
    with serving(allowed_origins=["*"]) as server:
        for origin in (APP, "null", "http://evil.example"):
            assert preflight(server, PATHS[0], origin).status_code == 204
            answer = server.client.post(PATHS[0], json=BODY, headers={"origin": origin})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)


# (allowed, Origin, Host, X-Forwarded-Host, whether the page may call)
PROXIES = [
    ([], "https://ai.example.org", "127.0.0.1:8301", None, False),
    ([], "https://ai.example.org", "127.0.0.1:8301", "ai.example.org", False),
    (["https://ai.example.org"], "https://ai.example.org", "127.0.0.1:8301", None, True),
    (["https://ai.example.org"], "https://ai.example.org:443", "127.0.0.1:8301", None, True),
    (["https://ai.example.org"], "http://ai.example.org", "127.0.0.1:8301", None, False),
    ([], "https://ai.example.org", "ai.example.org", None, True),
    ([], "https://ai.example.org", "ai.example.org:443", None, True),
    ([], "https://ai.example.org", "AI.example.org:443", None, True),
    ([], "http://ai.example.org", "ai.example.org:80", None, True),
    ([], "https://ai.example.org", "ai.example.org:8443", None, False),
    ([], "http://[::1]:8000", "[::1]:8000", None, True),
    ([], "https://", "", None, False),
    ([], "https://ai.example.org@evil.example", "ai.example.org@evil.example", None, False),
]


@pytest.mark.parametrize(("allowed", "origin", "host", "forwarded", "expected"), PROXIES)
def test_public_names_behind_a_proxy(allowed, origin, host, forwarded, expected):
    headers = {b"origin": origin.encode(), b"host": host.encode()}
    if forwarded:
        headers[b"x-forwarded-host"] = forwarded.encode()
    assert Origins(allowed).allows(headers) == expected


@pytest.mark.parametrize(
    "origin", ["ai.example.org", "https://ai.example.org/", "https://ai.example.org/x", "", "http://"]
)
def test_the_setting_takes_origins_only(origin):
    assert not is_origin(origin)
    config = ServeConfig(base="b", tasks={"a": "base"}, server=ServerConfig(allowed_origins=[origin]))
    with pytest.raises(PshareError, match=r"server\.allowed_origins"):
        check_config(config)


def test_the_setting_takes_every_kind_of_origin():
    origins = [APP, LOCAL, "https://ai.example.org", "http://[::1]:3000", "null", "*"]
    check_config(ServeConfig(base="b", tasks={"a": "base"}, server=ServerConfig(allowed_origins=origins)))
