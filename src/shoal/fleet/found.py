"""Beginning a cluster: its authority, the head's own certificate, and the secret of its Ray."""

from __future__ import annotations

import secrets

from shoal.fleet.registrar import LOOPBACK
from shoal.fleet.state import Membership, StateFolder, check_node_name
from shoal.parallel.identity import (
    CA_FILE,
    CA_KEY_FILE,
    create_authority,
    install,
    issue,
    make_request,
)


def found_cluster(folder: StateFolder, *, node: str, address: str, port: int) -> Membership:
    """This machine as the head, of the cluster it had before if there is one.

    Its certificate is made anew each time, since name and address may change. Raises ConfigError.
    """
    check_node_name(node)
    folder.create()
    before = folder.find()
    if not (folder.authority / CA_KEY_FILE).exists():
        create_authority(folder.authority)
        before = None
    if before is None or not folder.ray_token.exists():
        folder.write(folder.ray_token, secrets.token_hex(32).encode())
    request = make_request(folder.identity, node)
    certificate = issue(folder.authority, request, node=node, addresses=[address, *LOOPBACK])
    install(folder.identity, certificate, (folder.authority / CA_FILE).read_bytes())
    membership = Membership(
        cluster=before.cluster if before else f"shoal-{secrets.token_hex(3)}",
        node=node,
        address=address,
        head_address=address,
        port=port,
    )
    folder.save(membership)
    return membership
