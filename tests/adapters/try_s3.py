"""The reader of object stores against S3's protocol: `pip install 'moto[s3,server]' s3fs`, then `python -m
tests.adapters.try_s3`. Not among the tests: moto's server and s3fs are a hundred megabytes."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.support import GOLDEN
from tucka_runtime.adapters import readers
from tucka_runtime.adapters.remote import NoSuchAdapterError, Source, fetch
from tucka_runtime.errors import SourceError

FOLDER = GOLDEN / "llama-qv-r8k3t3" / "adapter"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def main() -> int:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s3cret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    store = boto3.client("s3")
    store.create_bucket(Bucket="ours")
    for name in FILES:
        store.upload_file(str(FOLDER / name), "ours", f"ad/law/{name}")
    readers.PIECE_BYTES = 1000  # many ranges
    reader = readers.reader_of(Source.parse("ours=s3://ours/ad"))
    target = Path(tempfile.mkdtemp())
    fetch(reader, "law", target)
    assert all((target / name).read_bytes() == (FOLDER / name).read_bytes() for name in FILES)
    print("fetched, in ranges of", readers.PIECE_BYTES)
    for source, folder, kind in (
        ("ours=s3://ours/ad", "tax", NoSuchAdapterError),
        ("ours=s3://ours/ad", "la", NoSuchAdapterError),  # a prefix is no folder
        ("ours=s3://theirs/ad", "law", NoSuchAdapterError),
    ):
        try:
            fetch(readers.reader_of(Source.parse(source)), folder, target)
            raise AssertionError((source, folder))
        except kind as error:
            print(f"{source} {folder}:", error.message)
    look = reader.look("law/adapter_config.json")
    store.put_object(Bucket="ours", Key="ad/law/adapter_config.json", Body=b"x" * look.size)
    assert reader.look("law/adapter_config.json") != look  # nothing of the first look is kept
    try:
        list(reader.read("law/adapter_config.json", look, 0))
        raise AssertionError("a file that was replaced meanwhile is taken")
    except readers.ChangedError:
        print("what is replaced while it is fetched is seen")
    server.stop()
    with pytest.raises(SourceError) as away:
        fetch(readers.reader_of(Source.parse("ours=s3://ours/ad")), "law", target)
    assert "s3cret" not in away.value.message
    print("without a server:", away.value.message)
    shutil.rmtree(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
