"""`python -m step37_lit index`, and that nothing in shards is executed."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample
from datamodules.commands import index as index_command
from datamodules.conversations import parse_text
from datamodules.shards.index import ShardIndex, set_fingerprint
from step37_lit.errors import ConfigError
from step37_lit.processor import Step37Processor
from tests import tars
from tests.indexed_shards import small_processor, write_set
from tests.tars import picture, sample

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def processor() -> Step37Processor:
    return small_processor()


# ---- the command ----


def run(*arguments: str | Path) -> int:
    return index_command.main([os.fspath(argument) for argument in arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path)
    assert run(tmp_path, "--workers", "1") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("shards     3: 3 read, 0 compared, 0 unchanged")
    assert shown[1:3] == ["samples    12", f"index      {tmp_path}/index.arrow"]
    assert shown[3].startswith("lengths    none: --config RECIPE or --preset NAME")
    assert run(tmp_path, "--preset", "tiny", "--workers", "2") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("shards     3: 0 read, 0 compared, 3 unchanged")
    assert re.fullmatch(rf"tokenizer  \d+ tokens, trained on the texts of the set: {tmp_path}/tokenizer.json", shown[3])
    assert re.fullmatch(
        r"lengths    24 texts of \d+ to \d+ tokens, [\d.]+ on average; fingerprint [0-9a-f]{16}, 12 texts read",
        shown[4],
    )
    trained = (tmp_path / "tokenizer.json").read_bytes()
    assert run(tmp_path, "--preset", "tiny", "--prompt", "What?", "--multicrop", "--workers", "1") == 0
    assert "12 texts read" in capsys.readouterr().out and (tmp_path / "tokenizer.json").read_bytes() == trained
    assert len(ShardIndex.open(tmp_path).fingerprints) == 2


def test_the_command_with_a_recipe_gives_what_its_data_module_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datamodules.packed import PackedDataModule

    settings = {"preset": "tiny", "prompt": "What is it?", "max_length": 512}
    for name in ("one", "two"):
        write_set(tmp_path / name, shards=1)
    sets = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "datamodules.packed.PackedDataModule", "init_args": {"sets": sets, **settings}}
    recipe.write_text(json.dumps({"data": data}))
    with pytest.raises(ConfigError, match=r"data.tokenizer: expected a file, or .*one/tokenizer.json, which indexing"):
        run(tmp_path / "two", "--config", recipe)
    assert run(tmp_path / "one", "--config", recipe, "--workers", "1") == 0
    assert run(tmp_path / "two", "--config", recipe, "--workers", "1") == 0
    assert not (tmp_path / "two" / "tokenizer.json").exists()
    module = PackedDataModule(sets=str(tmp_path / "one"), **settings)
    fingerprint = set_fingerprint(module.processor, module.prompt)
    assert {ShardIndex.open(tmp_path / name).fingerprints for name in ("one", "two")} == {(fingerprint,)}


def test_the_command_lists_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars.write(tmp_path / "s.tar", [*sample("a"), ("b\x1b[31m.jpg", picture()), ("c.cls", b"1")])
    cut = tars.tar(sample("d"))
    tars.write(tmp_path / "t.tar", cut[: tars.end_of_members(cut)])
    with pytest.raises(BadSample):
        run(tmp_path, "--workers", "1")
    assert run(tmp_path, "--bad", "skip", "--workers", "1", "--preset", "tiny") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "samples    3; 1 members of other kinds left alone"
    assert re.fullmatch(r"damaged    t.tar: cut off .*", shown[3])
    assert shown[4] == "bad        2 of 3 samples; they stay in the index with the reason"
    assert shown[5] == "           shard s.tar, key 'b\\x1b[31m': no text member (json or txt)"
    assert re.fullmatch(r"           shard t.tar, key d: .*", shown[6])
    assert shown[-1].startswith("lengths    2 texts")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "t.json"], r"--preset or --hub: expected the model that the lengths are for"),
        (["--config", "r.yaml", "--preset", "tiny"], r"--config: expected a recipe or options of the model"),
        (["--config", "absent.yaml"], r"--config: expected a file, found 'absent.yaml'"),
        (["--config", "r.yaml"], r"r.yaml: data: expected class_path and init_args"),
        (["--preset", "tiny", "--tokenizer", "absent.json"], r"tokenizer: expected a file, found 'absent.json'"),
        (["--preset", "flash"], r"id of <im_start>: expected 128000"),
        (["--preset", "nonsense"], r"preset: expected .* found 'nonsense'"),
        (["--remote-schemes", "pipe"], r"remote_schemes: expected any of"),
        (["--index", "elsewhere/index.arrow"], r"--index: expected a file in the shards' folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "set", shards=1)
    (tmp_path / "r.yaml").write_text("data: 3\n")
    with pytest.raises(ConfigError, match=message):
        run("set", "--workers", "1", *arguments)
    assert not (tmp_path / "set" / "tokenizer.json").exists()


def test_an_index_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"index: expected files that can be read and written, found 'No space left"):
        run(tmp_path, "--workers", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-0.tar", "s-1.tar", "s-2.tar"]


def full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


# ---- nothing is executed ----


def test_no_reader_here_unpickles() -> None:
    """webdataset writes shards, nothing else: its readers would unpickle members and run what `pipe:` says."""
    for path in (REPOSITORY / "datamodules").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                assert not module.startswith(("pickle", "subprocess", "tarfile.TarFile", "torch.load")), path
                if module.startswith("webdataset"):
                    assert module in ("webdataset.TarWriter", "webdataset.ShardWriter"), path


def test_hostile_json_takes_no_quadratic_time() -> None:
    """A million quotes, each of which could begin a string that never ends, would take hours."""
    for data in (b'"' * 1_000_000, b'\\"' * 500_000, b"[" * 1_000_000, b'["' * 500_000, b"{" * 100 + b'"\\' * 400_000):
        with pytest.raises(ValueError, match=r"not JSON|nested"):
            parse_text("json", data)
