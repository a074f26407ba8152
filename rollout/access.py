"""Who may use a server of this package: a shared key that callers send as a bearer token, and what needs none.

A server without a key takes everybody, and so belongs on an address that only its own machine can reach.
"""

import hmac
import ipaddress


def is_authorized(header: str | bytes, key: str) -> bool:
  """Whether an authorization header brings the key (empty: none is asked for).

  It takes a time that does not tell how much of a wrong key was right.
  """
  scheme, _, given = (header if isinstance(header, bytes) else header.encode()).partition(b" ")
  return not key or (scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key.encode()))


def is_local(host: str) -> bool:
  """Whether only this machine can reach what listens there."""
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def address(host: str, port: int) -> str:
  """HOST:PORT, with an IPv6 host in brackets."""
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
