"""gs:// without a network: an emulator in a process of its own.

It speaks the JSON interface of Google Cloud Storage over HTTP, which is what gcsfs and
tensorstore use. gcp-storage-emulator lacks the generations that tensorstore's writers
of one file rely on; `serve` adds them. Not emulated: credentials, gRPC, delays, quotas,
buckets with folders; objects live in its memory.
"""

import contextlib
import http
import logging
import subprocess
import sys

import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def emulator(log):
    """Makes gs://bucket work here and in child processes.

    Yields a function that gives the requests so far, such as
    'GET /storage/v1/b/bucket/o/run%2Fconfig.json?alt=media HTTP/1.1" 200 -'.
    """
    pytest.importorskip("gcp_storage_emulator")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings(url).items():
                patch.setenv(name, value)
            yield lambda: log.read_text().splitlines()
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


def settings(url):
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",  # nobody looks for Google's metadata server
        "GCE_METADATA_ROOT": url.removeprefix("http://"),
        # Kinds of buckets that need gRPC.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def serve():
    """Serves until standard input ends, so until the tests are gone, however."""
    from gcp_storage_emulator.handlers import objects

    insert, download = objects.insert, objects.download

    def generation(request, storage, name):
        found = storage.objects.get(request.params["bucket_name"], {}).get(name)
        return found["generation"] if found else "0"

    def insert_if_unchanged(request, response, storage, *args, **kwargs):
        expected = request.query.get("ifGenerationMatch")
        if expected and "name" in request.query:
            if [generation(request, storage, request.query["name"][0])] != expected:
                _ = request.data  # A body that nobody reads resets the connection.
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return
        insert(request, response, storage, *args, **kwargs)

    def download_with_generation(request, response, storage, *args, **kwargs):
        name = request.params["object_id"]
        response["x-goog-generation"] = generation(request, storage, name)
        download(request, response, storage, *args, **kwargs)

    objects.insert, objects.download = insert_if_unchanged, download_with_generation
    from gcp_storage_emulator import server  # Its table takes the functions above.

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("api.object").setLevel(logging.CRITICAL)
    server.RequestHandler.log_message = lambda _, text, *args: print(
        text % args, file=sys.stderr, flush=True
    )
    store = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    store.start()
    print(store._api._httpd.server_address[1], flush=True)
    sys.stdin.read()
    store.stop()


if __name__ == "__main__":
    serve()
