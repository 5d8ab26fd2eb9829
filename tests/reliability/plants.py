"""Where code is planted, and the commands that read it there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from datamodules.shards.index_file import INDEX_FILE
from step37_lit.checkpoint.manifest import MANIFEST, hash_file, read_manifest
from step37_lit.hub.importing import import_hub
from step37_lit.hub.safetensors_folder import INDEX_FILE as HUB_INDEX
from tests import tars
from tests.hub_folders import every_feature, write_hub
from tests.reliability import payloads
from tests.reliability.runs import Place, make_set

CHECKPOINT = "run/checkpoints/step_000002"
FIT = ("fit", "--config={made}/fit/recipe.yaml", "--trainer.default_root_dir=new", "--trainer.max_steps=1")
FRESH = ("--model.preset=null", "--model.text=null", "--model.vision=null")
CAPTION = ("caption", "picture.jpg", "--jsonl", "new", "--max-new-tokens", "2", "--model")


@dataclass(frozen=True)
class Case:
    """A command that reads what is planted.

    Args:
        kind: What is planted.
        name: Where.
        args: Of the command; `{made}` is the folder of what is good, `{marker}` what a payload makes.
        prepare: Plants it: the folder that the command runs in, and the marker.
        copied: Names of what is good that lies in that folder before.
        codes: Exit codes: 2 is refused, 0 is read without harm.
        short: Part of the short version.
    """

    kind: str
    name: str
    args: tuple[str, ...]
    prepare: Callable[[Path, Path], object]
    copied: tuple[str, ...] = ()
    codes: tuple[int, ...] = (2,)
    short: bool = False


def make(folder: Path) -> Path:
    """What is good: a set with an index, a run with a checkpoint, a hub folder, its import and a picture."""
    folder.mkdir(parents=True)
    make_set(folder)
    Place.make(folder / "fit", folder, 2, every=2, run=folder / "run").finish()
    write_hub(folder / "hub", every_feature())
    import_hub(folder / "hub", folder / "ckpt")
    (folder / "picture.jpg").write_bytes(tars.picture())
    return folder


def cases() -> list[Case]:
    return [*_checkpoints(), *_hubs(), *_recipes(), *_class_paths(), *_pipes(), *_templates(), *_shards(), *_others()]


def _planted(work: Path, marker: Path) -> None:
    (work / "planted.py").write_text(payloads.module(marker))


def _sealed(checkpoint: Path, name: str, content: bytes) -> None:
    """What an attacker does: the manifest says what the planted file is."""
    (checkpoint / name).write_bytes(content)
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, name: hash_file(checkpoint / name)}
    (checkpoint / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())


def _checkpoints() -> Iterator[Case]:
    commands = {
        "verify": ("checkpoint", "verify", CHECKPOINT),
        "resume": (*FIT, f"--ckpt_path={CHECKPOINT}", "--trainer.max_steps=3"),
        "begin with": (*FIT, *FRESH, f"--model.init_from={CHECKPOINT}"),
        "export": ("convert", "export", "--checkpoint", CHECKPOINT, "--output", "new"),
        "caption": (*CAPTION, "run"),
    }
    names = ("model/.metadata", "optimizer/.metadata", "model/__0_0.distcp", "optimizer/__0_0.distcp", "training.pt",
             "model.json", "recipe.json", "processor.json", "tokenizer.json", "chat_template.jinja")  # fmt: skip
    for name in names:
        for form in (payloads.pickled, payloads.saved):

            def plant(work: Path, marker: Path, name: str = name, form: Callable[[Path], bytes] = form) -> None:
                content, size = form(marker), (work / CHECKPOINT / name).stat().st_size
                _sealed(work / CHECKPOINT, name, content + bytes(max(0, size - len(content))))

            for command, args in commands.items():
                short = form is payloads.pickled and (name, command) in (
                    ("model/.metadata", "caption"), ("training.pt", "resume"), ("recipe.json", "resume"),
                )  # fmt: skip
                name_of = f"{form.__name__} in {name}, {command}"
                yield Case("pickles in checkpoints", name_of, args, plant, ("run", "picture.jpg"), (0, 2), short)


def _hubs() -> Iterator[Case]:
    commands = {
        "import": ("convert", "import", "--hub", "hub", "--output", "new"),
        "begin with": (*FIT, *FRESH, "--model.init_from=hub"),
        "caption": (*CAPTION, "hub"),
    }
    first = "model-00001-of-00003.safetensors"

    def remote_code(work: Path, marker: Path) -> None:
        for folder in (work, work / "hub"):
            (folder / "planted.py").write_text(payloads.module(marker))
        names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "planted.Thing")
        config = json.loads((work / "hub" / "config.json").read_text()) | {"auto_map": names}
        (work / "hub" / "config.json").write_text(json.dumps(config))
        (work / "hub" / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))

    def old_format(work: Path, marker: Path) -> None:
        for file in (work / "hub").glob("*.safetensors*"):
            file.unlink()
        (work / "hub" / "pytorch_model.bin").write_bytes(payloads.saved(marker))

    def beside(work: Path, marker: Path) -> None:
        (work / "hub" / "pytorch_model.bin").write_bytes(payloads.saved(marker))

    def linked(work: Path, marker: Path) -> None:
        (work / "evil").write_bytes(payloads.saved(marker))
        (work / "hub" / first).unlink()
        (work / "hub" / first).symlink_to(work / "evil")

    def elsewhere(path: str) -> Callable[[Path, Path], None]:
        def plant(work: Path, marker: Path) -> None:
            shutil.move(work / "hub" / first, work / first)
            target = path.replace("{work}", str(work)) + first
            file = work / "hub" / HUB_INDEX
            file.write_text(file.read_text().replace(f'"{first}"', json.dumps(target)))

        return plant

    def content(name: str) -> Callable[[Path, Path], object]:
        return lambda work, marker: (work / "hub" / name).write_bytes(payloads.pickled(marker))

    places: dict[str, Callable[[Path, Path], object]] = {
        "code of the model": remote_code, "pytorch_model.bin alone": old_format, "pytorch_model.bin beside": beside,
        "a link to a pickle": linked, "a shard in ..": elsewhere("../"), "a shard elsewhere": elsewhere("{work}/"),
        **{f"a pickle for {name}": content(name) for name in (first, HUB_INDEX, "config.json", "tokenizer.json",
                                                              "preprocessor_config.json", "generation_config.json")},
    }  # fmt: skip
    for name, plant in places.items():
        for command, args in commands.items():
            short = (name, command) in (("code of the model", "import"), ("pytorch_model.bin alone", "import"))
            yield Case("hub folders", f"{name}, {command}", args, plant, ("hub", "picture.jpg"), (0, 2), short)


def _recipes() -> Iterator[Case]:
    for name, tag in payloads.TAGS.items():

        def plant(work: Path, marker: Path, tag: str = tag) -> None:
            _planted(work, marker)
            text = tag.replace("{marker}", str(marker)).replace("{{}}", "{}")
            (work / "evil.yaml").write_text(f"model:\n  preset: {text}\n")
            (work / "child.yaml").write_text("base: evil.yaml\n")

        option = tag.replace("{{}}", "{}")
        places = {
            "recipe": ("fit", "--config=evil.yaml"),
            "base": ("fit", "--config=child.yaml"),
            "option": (*FIT, f"--model.preset={option}"),
            "section": (*FIT, f"--model={{preset: {option}}}"),
            "plan": ("plan", "--config=evil.yaml"),
        }
        for place, args in places.items():
            yield Case("YAML tags", f"{name}, {place}", args, plant, short=(name, place) == ("apply", "recipe"))


def _class_paths() -> Iterator[Case]:
    given = json.dumps({"class_path": "PATH", "init_args": {"path": "{marker}"}})
    options = {"data": f"--data={given}", "callbacks": f"--trainer.callbacks=[{given}]", "logger":
               f"--trainer.logger={given}", "strategy": f"--trainer.strategy={given}",
               "profiler": f"--trainer.profiler={given}", "plugins": f"--trainer.plugins=[{given}]"}  # fmt: skip
    paths = ("planted.Thing", "planted", "os.mkdir", "datamodules.planted.Thing", "step37_lit.resume.Path.mkdir",
             "datamodules.shards.storage.os.mkdir", "step37_lit..planted.Thing")  # fmt: skip
    for path in paths:
        for option, text in options.items():
            args = (*FIT, text.replace("PATH", path))
            short = (path, option) in (("planted.Thing", "data"), ("datamodules.shards.storage.os.mkdir", "callbacks"))
            yield Case("class paths", f"{path}, {option}", args, _planted, short=short)


def _pipes() -> Iterator[Case]:
    for form in ("pipe:mkdir {marker}", "pipe:mkdir {marker} #.tar", "gopen:pipe:mkdir {marker}", "|mkdir {marker}"):
        places = {
            "index": ("index", form),
            "sets": (*FIT, f"--data.sets={form}"),
            "val_sets": (*FIT, "--data.val_share=0", f"--data.val_sets={form}"),
            "tokenizer": (*FIT, f"--data.tokenizer={form}"),
            "template": (*FIT, f"--data.chat_template={form}"),
            "ckpt_path": (*FIT, f"--ckpt_path={form}"),
            "init_from": (*FIT, *FRESH, f"--model.init_from={form}"),
            "recipe": ("fit", f"--config={form}"),
            "import": ("convert", "import", "--hub", form, "--output", "new"),
            "caption": (*CAPTION, form),
        }
        for place, args in places.items():
            short = (place, form) == ("index", "pipe:mkdir {marker}")
            yield Case("pipe:", f"{form}, {place}", args, lambda work, marker: None, ("picture.jpg",), short=short)


def _templates() -> Iterator[Case]:
    for name, template in payloads.TEMPLATES.items():

        def option(work: Path, marker: Path, template: str = template) -> None:
            (work / "t.jinja").write_text(template.replace("{marker}", str(marker)))

        def checkpoint(work: Path, marker: Path, template: str = template) -> None:
            _sealed(work / CHECKPOINT, "chat_template.jinja", template.replace("{marker}", str(marker)).encode())

        def hub(work: Path, marker: Path, template: str = template) -> None:
            (work / "hub" / "chat_template.jinja").write_text(template.replace("{marker}", str(marker)))

        tokens = (
            "index",
            "set",
            "--tokenizer",
            "set/../tokenizer.json",
            "--preset",
            "tiny",
            "--chat-template",
            "t.jinja",
        )
        copied = ("set", "tokenizer.json")
        yield Case("chat templates", f"{name}, fit", (*FIT, "--data.chat_template=t.jinja"), option)
        yield Case("chat templates", f"{name}, index", tokens, option, copied)
        short = name == "globals"
        copied = ("run", "picture.jpg")
        yield Case("chat templates", f"{name}, caption", (*CAPTION, "run"), checkpoint, copied, short=short)
        yield Case("chat templates", f"{name}, hub", (*CAPTION, "hub"), hub, ("hub", "picture.jpg"))


def _shards() -> Iterator[Case]:
    for kind in payloads.OUTSIDE:

        def plant(work: Path, marker: Path, kind: str = kind) -> None:
            tars.write(work / "s.tar", payloads.outside_tar(kind))

        args = ("index", ".", "--workers", "1")
        yield Case("tar paths and links", kind, args, plant, short=kind in ("..", "symbolic link"))
    for suffix in ("pyd", "pkl", "pickle", "pth", "npy", "npz", "json", "jpg", "cls"):

        def member(work: Path, marker: Path, suffix: str = suffix) -> None:
            members = [("k.jpg", tars.picture()), ("k.json", tars.text(caption="a dog"))]
            members = [each for each in members if not each[0].endswith(suffix)]
            content = (f"k.{suffix}", payloads.pickled(marker))
            tars.write(work / "new" / "s.tar", [*tars.sample("first"), *members, content])

        yield Case("pickles in shards", suffix, ("index", "new", "--workers", "1"), member, codes=(0, 2))


def _extension(work: Path, marker: Path) -> None:
    """Arrow's extension type in Python, which was unpickled where a file was opened."""
    file = work / "set" / INDEX_FILE
    table = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).read_all()
    names = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payloads.pickled(marker)}
    fields = [field.with_metadata(names) for field in table.schema]
    table = pa.Table.from_arrays(table.columns, schema=pa.schema(fields, metadata=table.schema.metadata))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _others() -> Iterator[Case]:
    def file(name: str) -> Callable[[Path, Path], object]:
        def plant(work: Path, marker: Path) -> None:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(payloads.pickled(marker))

        return plant

    def dump(name: str) -> Callable[[Path, Path], None]:
        """A folder of a fault whose manifest is right."""

        def plant(work: Path, marker: Path) -> None:
            batch = shutil.copytree(work / "run" / "checkpoints" / "step_000002", work / "dump" / "batch")
            manifest = dataclasses.replace(read_manifest(batch), kind="fault")
            (batch / MANIFEST).write_text(manifest.to_json())
            fault = {"fault": {"step": 3, "kind": "loss", "rank": 0}, "circumstances": {}}
            _sealed(batch, "fault.json", json.dumps(fault).encode())
            _sealed(batch, "rank_0.json", b'{"packs": []}')
            _sealed(batch, name, payloads.pickled(marker))

        return plant

    data = (*FIT, "--data.sets=set")
    yield Case("index files", "a pickle", data, file(f"set/{INDEX_FILE}"), ("set",))
    yield Case("index files", "an extension type", data, _extension, ("set",), (0, 2), short=True)
    yield Case("tokenizers", "a pickle", (*FIT, "--data.tokenizer=t.json"), file("t.json"))
    yield Case("recipes", "a pickle", ("fit", "--config=r.yaml"), file("r.yaml"))
    yield Case("pictures", "a pickle", ("caption", "p.jpg", "--model", "{made}/run"), file("p.jpg"))
    yield Case("checkpoints of old", "a pickle", (*FIT, "--ckpt_path=old.ckpt"), file("old.ckpt"))
    for name in ("fault.json", "rank_0.json", "rank_0.safetensors", "model.json"):
        yield Case(
            "dumps", f"a pickle for {name}", ("replay", "dump"), dump(name), ("run",), short=name == "fault.json"
        )
