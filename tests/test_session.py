"""Joining a cluster: one that asks for no token is told."""

import pytest

from orchestrator.cluster import session


@pytest.mark.parametrize(("address", "token", "lines"), [
    ("auto", True, []),
    ("auto", False, [session.OPEN]),
    ("", False, []),  # of this process alone: nobody is joined
])  # fmt: skip
def test_a_cluster_without_a_token_is_told(monkeypatch, address, token, lines):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(session.ray, "init", lambda **_: None)
    monkeypatch.setattr(session, "is_token_auth_enabled", lambda: token)
    said = []
    with session.session(1, said.append):
        assert said == lines
