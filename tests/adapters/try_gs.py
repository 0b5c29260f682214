"""The reader of object stores against Google Cloud Storage's protocol: `pip install gcp-storage-emulator gcsfs`, then
`python -m tests.adapters.try_gs`. Not among the tests: the two are what no other test needs."""

import os
import socket
import sys
import tempfile
from pathlib import Path

from gcp_storage_emulator.server import create_server

from tests.support import GOLDEN
from tucka_runtime.adapters import readers
from tucka_runtime.adapters.remote import NoSuchAdapterError, Source, fetch

FOLDER = GOLDEN / "llama-qv-r8k3t3" / "adapter"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def main() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks by gRPC, which the emulator does not speak
    import gcsfs  # it reads the environment

    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="ours")
    server.start()
    try:
        store = gcsfs.GCSFileSystem(token="anon")
        for name in FILES:
            store.pipe_file(f"ours/ad/law/{name}", (FOLDER / name).read_bytes())
        readers.PIECE_BYTES = 1000  # many ranges
        reader = readers.reader_of(Source.parse("ours=gs://ours/ad"))
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder)
            fetch(reader, "law", target)
            assert all((target / name).read_bytes() == (FOLDER / name).read_bytes() for name in FILES)
            print("fetched, in ranges of", readers.PIECE_BYTES)
            print("digests:", sorted(reader.look("law/adapter_model.safetensors").digests))
            try:
                fetch(reader, "tax", target)
                raise AssertionError("there is no such adapter")
            except NoSuchAdapterError as error:
                print("what is not there:", error.message)
        look = reader.look("law/adapter_config.json")
        store.pipe_file("ours/ad/law/adapter_config.json", b"x" * look.size)
        assert reader.look("law/adapter_config.json") != look  # nothing of the first look is kept
        try:
            list(reader.read("law/adapter_config.json", look, 0))
            raise AssertionError("a file that was replaced meanwhile is taken")
        except readers.ChangedError:
            print("what is replaced while it is fetched is seen")
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
