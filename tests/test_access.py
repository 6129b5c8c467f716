"""Entering a tracking server: MLflow's variables, its credentials file, TLS; what a server's no is told as."""

import base64
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.tracking import address
from orchestrator.tracking.access import Access, denied
from pipelines.errors import ClusterError, ConfigError

URI = "http://h:5000"
ENVIRONMENT = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "secret"}
VARIABLES = ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "INSECURE_TLS", "SERVER_CERT_PATH", "CLIENT_CERT_PATH")


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".mlflow").mkdir()
    return tmp_path


def file(home: Path, text: str) -> None:
    (home / ".mlflow" / "credentials").write_text(text)


# -- what is read ------------------------------------------------------------------------------------------------------

FILED = "[mlflow]\nmlflow_tracking_username = filed\nmlflow_tracking_password = in%%file\n"


@pytest.mark.parametrize(
    ("uri", "environment", "text", "expected"),
    [
        (URI, {}, "", {}),
        (URI, ENVIRONMENT, "", basic("me", "secret")),
        (URI, {}, FILED, basic("filed", "in%file")),
        (URI, ENVIRONMENT, FILED, basic("me", "secret")),
        (URI, {"MLFLOW_TRACKING_USERNAME": "me"}, FILED, basic("me", "in%file")),  # each by itself, as MLflow does
        (URI, {"MLFLOW_TRACKING_USERNAME": "me"}, "", {}),
        (URI, {"MLFLOW_TRACKING_TOKEN": "t"}, "", {"Authorization": "Bearer t"}),
        (URI, {**ENVIRONMENT, "MLFLOW_TRACKING_TOKEN": "t"}, "", basic("me", "secret")),
        ("http://you:s%40@h:5000", ENVIRONMENT, FILED, basic("you", "s@")),
        (URI, {}, "[other]\na = b\n", {}),
        (URI, {"MLFLOW_TRACKING_USERNAME": "jörg", "MLFLOW_TRACKING_PASSWORD": "ß"}, "", basic("jörg", "ß")),
    ],
)
def test_a_request_carries(home: Path, uri: str, environment: dict, text: str, expected: dict) -> None:
    file(home, text)
    assert Access.to(uri, environment, home).header == expected


def test_it_is_what_mlflow_sends(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words of the same file and the same variables."""
    from mlflow.utils.credentials import get_default_host_creds

    monkeypatch.setenv("HOME", str(home))
    for name in VARIABLES:
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    for text, environment in [(FILED, {}), (FILED, {"MLFLOW_TRACKING_USERNAME": "me"}), ("", ENVIRONMENT)]:
        file(home, text)
        with monkeypatch.context() as shell:
            for name, value in environment.items():
                shell.setenv(name, value)
            theirs, ours = get_default_host_creds(URI), Access.to(URI)
            assert (ours.user, ours.password, ours.verify) == (theirs.username, theirs.password, theirs.verify)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MLFLOW_TRACKING_INSECURE_TLS": "yes"}, "MLFLOW_TRACKING_INSECURE_TLS is 'yes'; use true or false"),
        ({"MLFLOW_TRACKING_INSECURE_TLS": "1", "MLFLOW_TRACKING_SERVER_CERT_PATH": "/"}, "set one of them"),
        ({"MLFLOW_TRACKING_SERVER_CERT_PATH": "/no/ca.pem"}, "is /no/ca.pem, which does not exist"),
    ],
)
def test_variables_that_cannot_be_used(home: Path, environment: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Access.to(URI, environment, home)


@pytest.mark.parametrize("text", ["secret\n", "[mlflow]\nmlflow_tracking_password = 100%secret\n", "[mlflow]\nsecret"])
def test_file_that_cannot_be_read_is_not_quoted(home: Path, text: str) -> None:
    file(home, text)
    with pytest.raises(ConfigError, match=r"\.mlflow/credentials cannot be read .*a % as %%") as caught:
        Access.to(URI, {}, home)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


# -- what a no means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "access", "said"),
    [
        (401, Access(), "asks for a user and a password (status 401); set MLFLOW_TRACKING_USERNAME and MLFLOW_"),
        (401, Access(user="me"), "(status 401), and MLFLOW_TRACKING_PASSWORD is not set; set"),
        (401, Access(password="secret"), "(status 401), and MLFLOW_TRACKING_USERNAME is not set; set"),
        (401, Access("me", "secret"), "does not take the password of user 'me' (status 401); correct MLFLOW_TRACKING_"),
        (401, Access(token="secret"), "does not take MLFLOW_TRACKING_TOKEN (status 401); correct it, or set MLFLOW_"),
        (403, Access("me", "secret"), "does not let user 'me' do this (status 403); ask its administrator"),
    ],
)
def test_a_no_names_what_to_set_and_no_password(status: int, access: Access, said: str) -> None:
    text = str(denied(status, "http://h", access))
    assert text.startswith("MLflow at http://h ")
    assert said in text
    assert "MLFLOW_TRACKING_USERNAME" in text
    assert "MLFLOW_TRACKING_PASSWORD" in text
    assert "~/.mlflow/credentials" in text
    assert "secret" not in text + repr(access)


# -- servers -----------------------------------------------------------------------------------------------------------


class Asked:
    """A server on 127.0.0.1 that answers with one status and keeps the Authorization headers that it saw."""

    def __init__(self, status: int, certificate: Path | None = None) -> None:
        self.seen: list[str | None] = []
        asked = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.seen.append(self.headers["Authorization"])
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # a handshake that fails
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.uri = f"http{'s' if certificate else ''}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Asked":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def shell(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment that says nothing."""
    monkeypatch.setenv("HOME", str(home))
    for name in [f"MLFLOW_TRACKING_{name}" for name in (*VARIABLES, "AWS_SIGV4")] + ["REQUESTS_CA_BUNDLE"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_password_travels_and_is_taken(shell: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        shell.setenv(name, value)
    with Asked(200) as server:
        address.probe(server.uri)
    assert server.seen == [basic("me", "secret")["Authorization"]]


@pytest.mark.parametrize(
    ("status", "said"), [(401, "asks for a user and a password"), (403, "does not let an unnamed")]
)
def test_no_is_a_setting_to_change(shell: pytest.MonkeyPatch, status: int, said: str) -> None:
    with Asked(status) as server, pytest.raises(ConfigError, match=said) as caught:
        address.probe(server.uri)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("status", [401, 403])
def test_no_is_an_answer_to_who_only_asks_for_one(shell: pytest.MonkeyPatch, status: int) -> None:
    with Asked(status) as server:
        address.answers(server.uri)
    assert server.seen == [None]


def test_wrong_password_in_the_uri_is_not_shown(shell: pytest.MonkeyPatch) -> None:
    with Asked(401) as server, pytest.raises(ConfigError, match="does not take the password of user 'me'") as caught:
        address.probe(server.uri.replace("//", "//me:secret@"))
    assert server.seen == [basic("me", "secret")["Authorization"]]
    assert "secret" not in str(caught.value)


def test_plugins_of_mlflow_are_left_to_it(shell: pytest.MonkeyPatch) -> None:
    shell.setenv("MLFLOW_TRACKING_AUTH", "kubernetes")
    with Asked(401) as server:
        address.probe(server.uri)


@pytest.mark.parametrize(("status", "answers"), [(404, True), (500, False), (503, False)])
def test_server_that_is_ill_does_not_answer(shell: pytest.MonkeyPatch, status: int, answers: bool) -> None:
    with Asked(status) as server:
        if answers:
            address.probe(server.uri)
        else:
            with pytest.raises(ClusterError, match=rf"does not answer \(status {status}\)"):
                address.probe(server.uri)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its own certificate for 127.0.0.1, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now, host = datetime.datetime.now(datetime.UTC), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    day = datetime.timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    made = made.add_extension(x509.SubjectAlternativeName([host]), critical=True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def test_own_certificate_is_refused_in_a_sentence(shell: pytest.MonkeyPatch, certificate: Path) -> None:
    said = r"https://127.* is not trusted \(.*certificate verify failed.*\); set MLFLOW_TRACKING_SERVER_CERT_PATH"
    with Asked(200, certificate) as server, pytest.raises(ConfigError, match=said):
        address.probe(server.uri)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE"])
def test_own_certificate_that_is_named_is_trusted(shell: pytest.MonkeyPatch, certificate: Path, name: str) -> None:
    shell.setenv(name, str(certificate))
    with Asked(200, certificate) as server:
        address.probe(server.uri)
    assert server.seen == [None]


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_certificates_need_not_be_looked_at(shell: pytest.MonkeyPatch, certificate: Path) -> None:
    shell.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    with Asked(200, certificate) as server:
        address.probe(server.uri)
    assert server.seen == [None]
