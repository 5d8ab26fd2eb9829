"""Where shards are: remote ones, and what is meant by a path."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample
from datamodules.shards.index import BuildCounts
from datamodules.shards.index_build import build_index
from datamodules.shards.lengths import add_lengths
from datamodules.shards.reader import ShardReader
from datamodules.shards.storage import Storage, expand_shards
from step37_lit.errors import ConfigError
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from tests.indexed_shards import flipped, small_processor, write_set

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def processor() -> Step37Processor:
    return small_processor()


# ---- remote shards ----


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and parts of them."""

    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.server.asked.append(self.headers.get("Range"))  # type: ignore[attr-defined]
        if asked is None or not self.ranges:
            self.send_response(200)
        else:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}")
            content = content[first : last + 1]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    handler = functools.partial(RangeHandler, directory=str(tmp_path / "remote"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_remote_shards(server: http.server.ThreadingHTTPServer, tmp_path: Path, processor: Step37Processor) -> None:
    local = build_index(write_set(tmp_path / "remote"))
    url, file = f"http://127.0.0.1:{server.server_port}/", tmp_path / "remote.arrow"
    shards, schemes = url + "s-{0..2}.tar", ("http",)
    with pytest.raises(ConfigError, match=r"shards: expected local paths .remote_schemes does not name http."):
        build_index(shards, index_file=file)
    with pytest.raises(ConfigError, match=r"--index: expected a local file for the index of remote shards"):
        build_index(shards, remote_schemes=schemes)
    assert server.asked == []  # type: ignore[attr-defined]
    index = build_index(shards, index_file=file, remote_schemes=schemes)
    assert index.table.equals(local.table) and index.folder == url
    assert build_index(shards, index_file=file, remote_schemes=schemes).counts == BuildCounts(shards_kept=3)
    index.check_fresh(Storage(schemes))
    with pytest.raises(ConfigError, match=r"remote_schemes does not name http"):
        ShardReader(index).read(0)
    reader = ShardReader(index, schemes)
    server.asked.clear()  # type: ignore[attr-defined]
    assert [reader.read(i) for i in range(12)] == [ShardReader(local).read(i) for i in range(12)]
    members = [m for i in range(12) for m in index.members(i)]
    assert server.asked == [f"bytes={m.offset}-{m.offset + m.size - 1}" for m in members]  # type: ignore[attr-defined]
    index = add_lengths(index, processor, DEFAULT_PROMPT, remote_schemes=schemes)
    expected = add_lengths(local, processor, DEFAULT_PROMPT)
    assert index.table.equals(expected.table) and index.folder == url

    content = (tmp_path / "remote" / "s-1.tar").read_bytes()
    (tmp_path / "remote" / "s-1.tar").write_bytes(flipped(content, index.members(4)[1].offset))
    with pytest.raises(BadSample, match=r"^shard s-1.tar, key 1-0, member jpg: CRC-32"):
        reader.read(4)
    (tmp_path / "remote" / "s-1.tar").write_bytes(content + bytes(512))
    with pytest.raises(ConfigError, match=r"/s-1.tar: size of the shard: expected \d+ bytes as indexed"):
        index.check_fresh(Storage(schemes))
    (tmp_path / "remote" / "s-1.tar").unlink()
    with pytest.raises(ConfigError, match=r"/s-1.tar: shard: expected a file of \d+ bytes.*found 'none'"):
        index.check_fresh(Storage(schemes))
    with pytest.raises(BadSample, match=r"^shard s-1.tar, key 1-0, member json: cannot be read: http://"):
        reader.read(4)
    with pytest.raises(ConfigError, match=r"s-1.tar: shard: expected a file that can be read"):
        build_index(shards, index_file=file, remote_schemes=schemes)


def test_a_server_without_ranges_is_noticed(
    server: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "remote", shards=1)
    url = f"http://127.0.0.1:{server.server_port}/s-0.tar"
    index = build_index(url, index_file=tmp_path / "remote.arrow", remote_schemes=["http"])
    monkeypatch.setattr(RangeHandler, "ranges", False)
    with pytest.raises(BadSample, match=r"member json: \d+ bytes read, \d+ indexed$"):
        ShardReader(index, ["http"]).read(0)


# ---- what is meant by a path ----


def test_paths(tmp_path: Path) -> None:
    write_set(tmp_path, shards=12, samples=1)
    (tmp_path / ".s-half.tar").touch()
    (tmp_path / "notes.txt").touch()
    every = sorted(str(tmp_path / f"s-{i}.tar") for i in range(12))
    assert expand_shards(tmp_path) == expand_shards(str(tmp_path / "*.tar")) == every
    assert expand_shards(str(tmp_path / "s-{2,{0..1}}.tar")) == [str(tmp_path / f"s-{i}.tar") for i in (2, 0, 1)]
    assert expand_shards([tmp_path / "s-3.tar", str(tmp_path / "s-1.tar")]) == [every[i] for i in (5, 1)]
    urls = "https://host/s-{08..10}.tar"
    assert expand_shards(urls, ["https"]) == [f"https://host/s-{i}.tar" for i in ("08", "09", "10")]
