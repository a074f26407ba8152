"""Who may use a server: what every front of the package asks."""

import pytest

from rollout.access import address, is_authorized, is_local


@pytest.mark.parametrize("header", ["Bearer secret", "bearer secret", b"BEARER  secret "])
def test_the_key_opens(header):
  assert is_authorized(header, "secret")
  assert is_authorized("Bearer of several words", "of several words")


@pytest.mark.parametrize(
  "header", ["", "secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer ü"]
)
def test_nothing_else_does_but_without_a_key_everything(header):
  assert not is_authorized(header, "secret")
  assert is_authorized(header, "")


def test_which_hosts_are_local():
  assert all(is_local(host) for host in ("localhost", "127.0.0.1", "127.8.0.1", "::1"))
  assert not any(is_local(host) for host in ("0.0.0.0", "::", "10.0.0.5", "127.0.0.1.example", "worker.example"))


def test_an_address_names_a_port_of_either_kind_of_host():
  assert address("10.0.0.7", 80) == "10.0.0.7:80" and address("::1", 80) == "[::1]:80"
