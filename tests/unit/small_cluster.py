"""An authority and certificates, good and bad, for tests of what stands on them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from shoal.parallel.identity import (
    CA_FILE,
    NODE_FILE,
    NODE_LIFETIME,
    Identity,
    create_authority,
    install,
    issue,
    load_identity,
    make_request,
)

ADDRESSES = ["127.0.0.1", "node.example"]


class SmallCluster:
    """`folder` holds the authority in ca/ and each node in a folder of its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_pem = create_authority(folder / "ca")

    def certificate(self, node: str, lifetime: timedelta = NODE_LIFETIME) -> bytes:
        request = make_request(self.folder / node, node)
        return issue(self.folder / "ca", request, node=node, addresses=ADDRESSES, lifetime=lifetime)

    def join(self, node: str) -> Identity:
        return install(self.folder / node, self.certificate(node), self.ca_pem)

    def expired(self, node: str) -> Identity:
        """An identity whose certificate ran out since it was loaded."""
        identity = self.join(node)
        folder = self.folder / node
        folder.joinpath(NODE_FILE).write_bytes(self.certificate(node, timedelta(seconds=-1)))
        for context in (identity.client_context, identity.server_context):
            context.load_cert_chain(folder / NODE_FILE, folder / "node.key")
        return identity

    def trusting(self, node: str, other: SmallCluster) -> Identity:
        """A node of this cluster that trusts another's authority, as an intruder would."""
        self.join(node)
        identity = load_identity(self.folder / node)
        for context in (identity.client_context, identity.server_context):
            context.load_verify_locations(other.folder / "ca" / CA_FILE)
        return identity
