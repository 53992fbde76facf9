"""A certificate authority for tests: made anew in a folder, with a server's and a client's certificate."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

from servers import Missing

USER, PASSWORD = "stentor", "s3cret/päss"


def files(folder: Path, mutual: bool) -> str:
    """The options of a URL that name the authority of a folder, and with ``mutual`` the client's certificate."""
    made = certificates(folder)
    names = {"ca": "ca.pem"} | ({"cert": "client.pem", "key": "client.key"} if mutual else {})
    return "&".join(f"{option}={quote(str(made / name))}" for option, name in names.items())


def certificates(folder: Path) -> Path:
    """A folder with ``ca.pem``, ``server.pem``/``server.key`` (for localhost) and ``client.pem``/``client.key``."""
    if (folder / "client.pem").exists():
        return folder
    openssl = shutil.which("openssl")
    if openssl is None:
        raise Missing("openssl is not installed; as root: apt-get install openssl")
    folder.mkdir(parents=True, exist_ok=True)

    def run(*args: str | Path) -> None:
        subprocess.run([openssl, *map(str, args)], cwd=folder, check=True, capture_output=True)

    run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=Stentor test CA",
        "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    names = {"server": "subjectAltName=DNS:localhost,IP:127.0.0.1", "client": "subjectAltName=DNS:client"}
    for name, alternative in names.items():
        (folder / f"{name}.ext").write_text(alternative + "\n")
        subject = "/CN=localhost" if name == "server" else f"/CN={USER}"
        run("req", "-newkey", "rsa:2048", "-nodes", "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30",
            "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
        (folder / f"{name}.key").chmod(0o600)
    return folder
