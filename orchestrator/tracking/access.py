"""How a tracking server is entered: what the variables that MLflow reads itself say, and what a server's no means.

MLflow is left to read them for itself. They are read here for the one question that is asked before it is loaded, so
that a password that is missing or wrong is known at the start, in a sentence. No password is ever in one.
"""

import base64
import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.errors import ConfigError

USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
INSECURE, AUTHORITY = "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH"
CERTIFICATE = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
OTHER_WAYS = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
CREDENTIALS = "~/.mlflow/credentials"


@dataclass(frozen=True)
class Access:
    """To one server. verify: as requests takes it, True for the authorities that everybody trusts (and those of
    REQUESTS_CA_BUNDLE), else a file of others, or False. other_way: a plugin of MLflow signs requests."""

    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    verify: bool | str = True
    certificate: str = ""
    other_way: bool = False

    @staticmethod
    def to(uri: str, environment: Mapping[str, str] | None = None, home: Path | None = None) -> "Access":
        """By the URI, else the environment, else the credentials file in `home`: the order in which MLflow looks.

        Raises ConfigError where they cannot be used.
        """
        shell = os.environ if environment is None else environment
        filed = _filed((home or Path.home()) / CREDENTIALS.removeprefix("~/"))
        parts = urlsplit(uri)
        user, password = (shell.get(name) or filed.get(name.lower(), "") for name in (USER, PASSWORD))
        if parts.username:
            user, password = unquote(parts.username), unquote(parts.password or "")
        others = any(shell.get(name, "").lower() not in ("", "false", "0") for name in OTHER_WAYS)
        return Access(user, password, shell.get(TOKEN, ""), _verify(shell), shell.get(CERTIFICATE, ""), others)

    @property
    def secret(self) -> bool:
        """Whether a request carries more than its question."""
        return bool(self.user or self.password or self.token or self.certificate or self.other_way)

    @property
    def header(self) -> dict[str, str]:
        """What a request carries."""
        if self.user and self.password:
            pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            return {"Authorization": f"Basic {pair}"}
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


def denied(status: int, shown: str, access: Access) -> ConfigError:
    """What a server's 401 or 403 means. shown: the server's URI without a password."""
    ways = f"{USER} and {PASSWORD}, or both in {CREDENTIALS}"
    who = f"user '{access.user}'" if access.user else TOKEN if access.token else "an unnamed user"
    if status == 403:
        return ConfigError(f"MLflow at {shown} does not let {who} do this (status 403); ask its administrator for the "
                           f"permission, or to allow this host name, or set {ways}, of another user")  # fmt: skip
    if not access.header:
        half = f", and {PASSWORD if access.user else USER} is not set" if access.user or access.password else ""
        return ConfigError(f"MLflow at {shown} asks for a user and a password (status 401){half}; set {ways}")
    return ConfigError(f"MLflow at {shown} does not take the password of {who} (status 401); correct {ways}"
                       if access.user and access.password else
                       f"MLflow at {shown} does not take {TOKEN} (status 401); correct it, or set {ways}")  # fmt: skip


def _verify(shell: Mapping[str, str]) -> bool | str:
    insecure, authority = shell.get(INSECURE, "false").lower(), shell.get(AUTHORITY, "")
    if insecure not in ("true", "1", "false", "0"):
        raise ConfigError(f"{INSECURE} is '{insecure}'; use true or false")
    if insecure in ("true", "1") and authority:
        raise ConfigError(f"{INSECURE} is {insecure} and {AUTHORITY} is {authority}; set one of them")
    if authority and not Path(authority).exists():
        raise ConfigError(f"{AUTHORITY} is {authority}, which does not exist; name a file of certificates")
    return authority or insecure in ("false", "0")


def _filed(path: Path) -> dict[str, str]:
    """What stands in a credentials file, by small names."""
    parser = configparser.ConfigParser()
    try:
        parser.read(path)
        return dict(parser["mlflow"]) if "mlflow" in parser else {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:  # whose words may hold the password
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); it holds [mlflow], then "
                          f"{USER.lower()} = ... and {PASSWORD.lower()} = ..., a % as %%") from None  # fmt: skip
