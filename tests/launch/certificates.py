"""A certificate for 127.0.0.1 that signs itself."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def write_certificate(folder, passphrase=b""):
  """(certificate, key): PEM files."""
  key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
  now = datetime.datetime.now(datetime.UTC)
  certificate = (
    x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    .not_valid_before(now - datetime.timedelta(hours=1))
    .not_valid_after(now + datetime.timedelta(days=1))
    .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    .sign(key, hashes.SHA256())
  )
  lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
  pem = serialization.Encoding.PEM
  (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
  (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
  return str(folder / "certificate.pem"), str(folder / "key.pem")
