"""Files that are refused: shards and their indexes, hub folders, checkpoints, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from datamodules.shards.index_file import INDEX_FILE, METADATA
from step37_lit.hub.importing import import_hub
from tests import tars
from tests.bad_kinds import SAMPLES, SHARDS, damaged_shard
from tests.broken_hubs import BAD_HUBS
from tests.checkpoints.damages import damage
from tests.hub_folders import every_feature, write_hub
from tests.reliability.bad_input import Case
from tests.reliability.runs import Place, make_set
from tests.tars import sample

# Places of shards: argument of `index`, and what the line names.
PLACES = {
    "pipe:touch executed": "local paths or URLs",
    "file:///etc/passwd": "local paths or URLs",
    "simplecache::https://127.0.0.1/s.tar": "local paths or URLs",
    "http://127.0.0.1:9/s.tar": "remote_schemes",
    "s3://bucket/s-{{000..999}}.tar": "remote_schemes",
    "nothing.tar": "nothing.tar",
    "nothing-*.tar": "nothing-*.tar",
    "s-{{0..9999999}}.tar": "at most 100000",
    "{{s.tar": "a range",
    "": "",
}


def make(folder: Path) -> Path:
    """What is good: a set with an index, a run with two checkpoints, a hub folder and its import."""
    folder.mkdir(parents=True)
    make_set(folder)
    place = Place.make(folder / "fit", folder, 6, every=3, run=folder / "run")
    place.finish()
    write_hub(folder / "hub", every_feature())
    import_hub(folder / "hub", folder / "ckpt")
    return folder


def cases() -> Iterator[Case]:
    yield from _shards()
    yield from _indexes()
    yield from _hubs()
    yield from _checkpoints()
    yield from _tokenizers()


def _shards() -> Iterator[Case]:
    for place, word in PLACES.items():
        yield Case("shards", f"at {place!r}", ("index", place), (word,))
    for name, (members, problems) in SAMPLES.items():
        bad = [key for key, problem in problems.items() if problem is not None]
        if bad:

            def write(folder: Path, members: list = members) -> None:
                tars.write(folder / "s.tar", [*sample("0first"), *members, *sample("zlast")])

            yield Case("shards", name, ("index", ".", "--workers", "1"), ("s.tar", bad[0]), write)
    for name in SHARDS:
        content, _, _ = damaged_shard(name)

        def damaged(folder: Path, content: bytes = content) -> None:
            tars.write(folder / "s.tar", sample("good"))
            tars.write(folder / "t.tar", content)

        yield Case("shards", name, ("index", ".", "--workers", "1"), ("t.tar",), damaged)


def _fit(*options: str) -> tuple[str, ...]:
    """A run on the set in the case's folder."""
    return ("fit", "--config={made}/fit/recipe.yaml", "--trainer.default_root_dir=new", "--data.sets=set", *options)


def _indexes() -> Iterator[Case]:
    def described(change: Callable[[dict], object]) -> Callable[[Path], None]:
        def edit(folder: Path) -> None:
            file = folder / "set" / INDEX_FILE
            table = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).read_all()
            plain = json.loads(table.schema.metadata[METADATA])
            change(plain)
            table = table.replace_schema_metadata({METADATA: json.dumps(plain)})
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

        return edit

    def rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
        def edit(folder: Path) -> None:
            file = folder / "set" / INDEX_FILE
            table = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).read_all()
            table = change(table).replace_schema_metadata(table.schema.metadata)
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

        return edit

    def at(place: float) -> Callable[[Path], None]:
        def cut(folder: Path) -> None:
            file = folder / "set" / INDEX_FILE
            content = file.read_bytes()
            file.write_bytes(content[: int(place * len(content))])

        return cut

    def index(content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / "set" / INDEX_FILE).write_bytes(content)

    broken: dict[str, tuple[Callable[[Path], object], str]] = {
        "no index": (lambda folder: (folder / "set" / INDEX_FILE).unlink(), "index"),
        "an empty index": (index(b""), INDEX_FILE),
        "an index of text": (index(b"key,shard\n" * 40), INDEX_FILE),
        "a pickle": (index(b"\x80\x04K\x01."), INDEX_FILE),
        **{f"cut at {place}": (at(place), INDEX_FILE) for place in (0.02, 0.3, 0.6, 0.9, 0.999)},
        "another version": (described(lambda plain: plain.update(version=9)), "version 1"),
        "no shards": (described(lambda plain: plain.pop("shards")), INDEX_FILE),
        "a shard elsewhere": (described(lambda plain: plain["shards"][0].update(name="../s.tar")), "../s.tar"),
        "a shard of that name": (described(lambda plain: plain["shards"][0].update(name="/etc/passwd")), "/etc/passwd"),
        "a folder elsewhere": (described(lambda plain: plain.update(folder="pipe:ls")), "pipe:ls"),
        "other numbers of samples": (described(lambda plain: plain["shards"][0].update(num_samples=3)), "samples"),
        "a field more": (described(lambda plain: plain["shards"][0].update(more=3)), INDEX_FILE),
        "a number for a name": (described(lambda plain: plain["shards"][0].update(name=3)), INDEX_FILE),
        "a text for a size": (described(lambda plain: plain["shards"][0].update(size="x")), INDEX_FILE),
        "a column less": (rewritten(lambda table: table.drop_columns(["members"])), "columns"),
        "a column more": (rewritten(lambda table: table.append_column("more", table["key"])), "columns"),
        "rows twice": (rewritten(lambda table: pa.concat_tables([table, table])), "samples"),
        "a shard is missing": (lambda folder: (folder / "set" / "part-0001.tar").unlink(), "part-0001.tar"),
        "a shard was cut": (lambda folder: _cut(folder / "set" / "part-0001.tar"), "part-0001.tar"),
        "a shard is new": (lambda folder: tars.write(folder / "set" / "part-0009.tar", sample("new")), "part-0009.tar"),
        "shards that are not all written": (lambda folder: (folder / "set" / "writing.json").write_text("{}"), "set"),
    }
    for name, (prepare, word) in broken.items():
        yield Case("index", name, _fit(), (word,), prepare, ("set",))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def _hubs() -> Iterator[Case]:
    for name, (breaks, words) in BAD_HUBS.items():

        def prepare(folder: Path, breaks: Callable[[Path], object] = breaks) -> None:
            breaks(folder / "hub")

        yield Case(
            "hub folder",
            name,
            ("convert", "import", "--hub", "hub", "--output", "new"),
            tuple(words),
            prepare,
            ("hub",),
        )
    every_third = list(BAD_HUBS.items())[::3]
    for name, (breaks, words) in every_third:

        def broken(folder: Path, breaks: Callable[[Path], object] = breaks) -> None:
            breaks(folder / "hub")

        args = (*_fit(), "--model.preset=null", "--model.text=null", "--model.vision=null", "--model.init_from=hub")
        yield Case("hub folder", f"{name}, to train from", args, tuple(words[:1]), broken, ("hub", "set"))


def _checkpoints() -> Iterator[Case]:
    for name, (breaks, _) in damage().items():

        def prepare(folder: Path, breaks: Callable[[Path], object] = breaks) -> None:
            breaks(folder / "run" / "checkpoints" / "step_000006")

        newest, fit = "run/checkpoints/step_000006", ("fit", "--config={made}/fit/recipe.yaml")
        commands: dict[str, tuple[str, ...]] = {
            "verify": ("checkpoint", "verify", newest),
            "resume must": (*fit, "--trainer.default_root_dir=run", "--resume=must"),
            "continue": (*fit, f"--ckpt_path={newest}", "--trainer.default_root_dir=new"),
            "begin with": (*_fit(), f"--model.init_from={newest}", "--model.preset=null", "--model.text=null",
                           "--model.vision=null"),
            "export": ("convert", "export", "--checkpoint", newest, "--output", "new"),
        }  # fmt: skip
        for command, args in commands.items():
            yield Case("checkpoint", f"{name}, {command}", args, ("step_000006",), prepare, ("run", "set"))


def _tokenizers() -> Iterator[Case]:
    contents = {
        "no JSON": b"{",
        "no UTF-8": b"\xff\xfe",
        "a list": b"[]",
        "another object": b'{"version": "1.0"}',
        "deep": b"[" * 100_000,
        "a pickle": b"\x80\x04K\x01.",
        "empty": b"",
    }
    for name, content in contents.items():

        def write(folder: Path, content: bytes = content) -> None:
            (folder / "tokenizer.json").write_bytes(content)

        yield Case("tokenizer", name, _fit("--data.tokenizer=tokenizer.json"), ("tokenizer.json",), write, ("set",))
    templates = {
        "does not parse": "{{% for",
        "no UTF-8": None,
        "endless": "{{% for i in range(10**9) %}}x{{% endfor %}}",
    }
    for name, text in templates.items():

        def template(folder: Path, text: str | None = text) -> None:
            content = b"\xff" if text is None else text.replace("{{", "{").replace("}}", "}").encode()
            (folder / "t.jinja").write_bytes(content)

        yield Case(
            "tokenizer", f"template {name}", _fit("--data.chat_template=t.jinja"), ("template",), template, ("set",)
        )
