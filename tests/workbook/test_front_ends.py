"""Who reaches the notebooks' server where nothing says on which address it listens."""

import socket
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from front_ends import jupyter


@pytest.mark.slow
def test_jupyter_listens_on_loopback_alone_and_refuses_whoever_lacks_its_token(tmp_path):
    (tmp_path / "notebooks").mkdir()
    with jupyter(tmp_path) as address:
        server, kernels = urlsplit(address), address.format("api/kernels")
        assert urlopen(kernels).status == 200
        with pytest.raises(HTTPError, match="403"):
            urlopen(kernels.partition("?")[0])
        with pytest.raises(OSError):  # another address of loopback: where it listens everywhere, it answers there too
            socket.create_connection(("127.0.0.2", server.port), timeout=5)
