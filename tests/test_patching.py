"""Patches on the real wheels they are for, downloaded from the package index."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from test_cli import cli

from sparse_backend import patching
from sparse_backend.errors import OptionError, SparseBackendError

# Both ends of the range.
VERSIONS = ("0.5.2", "0.5.10.post1")
PLUGINS, SERVER_ARGS = "sglang/srt/plugins.py", "sglang/srt/server_args.py"
GROUP = "sglang.srt.plugins"


def download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), f"sglang=={version}"], check=True)
    return next(folder.glob(f"sglang-{version}-*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def install_plugin(folder: Path, name: str, source: str) -> None:
    """A module with `register()` and its entry point, as pip would install them."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}:register\n")


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    return {version: download(version, folder) for version in VERSIONS}


@pytest.fixture(params=VERSIONS)
def site(request, wheels, tmp_path):
    """A site-packages folder that holds one SGLang."""
    return unpack(wheels[request.param], tmp_path / "site")


@pytest.fixture
def newest(wheels, tmp_path):
    return unpack(wheels[VERSIONS[-1]], tmp_path / "site")


def names(report):
    return [(change.verb, change.name) for change in report.changes]


def test_apply_again_and_reverse(site):
    before = digests(site)
    both = [("add", PLUGINS), ("change", SERVER_ARGS)]
    assert names(patching.patch_engine("sglang", dry_run=True, site_packages=site)) == both
    assert digests(site) == before

    (site / SERVER_ARGS).chmod(0o640)
    assert names(patching.patch_engine("sglang", site_packages=site)) == both
    after = digests(site)
    assert {name for name in after if after[name] != before.get(name)} == {PLUGINS, SERVER_ARGS}
    assert (site / SERVER_ARGS).stat().st_mode & 0o777 == 0o640
    assert names(patching.patch_engine("sglang", site_packages=site)) == []
    assert digests(site) == after

    reverse = [("change", SERVER_ARGS), ("remove", PLUGINS)]
    assert names(patching.patch_engine("sglang", reverse=True, dry_run=True, site_packages=site)) == reverse
    assert digests(site) == after
    assert names(patching.patch_engine("sglang", reverse=True, site_packages=site)) == reverse
    assert digests(site) == before
    assert names(patching.patch_engine("sglang", reverse=True, site_packages=site)) == []


def test_calls_are_where_they_should_be(site):
    patching.patch_engine("sglang", site_packages=site)
    for name in (PLUGINS, SERVER_ARGS):
        compile((site / name).read_text(), name, "exec")
    tree = ast.parse((site / SERVER_ARGS).read_text())
    server_args = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ServerArgs")
    methods = {n.name: n for n in server_args.body if isinstance(n, ast.FunctionDef)}
    # The innermost decorator, or it would wrap a staticmethod.
    for name in ("__post_init__", "add_cli_args"):
        assert ast.unparse(methods[name].decorator_list[-1]) == "plugins_first"
    assert ast.unparse(methods["__setstate__"].body[0]) == "load_plugins()"


def test_the_diff_also_applies_with_patch(site):
    """Someone without this package can use it."""
    before = digests(site)
    diff = Path(patching.__file__).parent / "patches" / patching.PATCHES[0].diff
    for arguments in ([], ["--reverse"]):
        with diff.open() as f:
            command = ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", *arguments]
            subprocess.run(command, stdin=f, cwd=site, check=True, capture_output=True)
        assert (digests(site) == before) == bool(arguments)


def test_loader_calls_plugins_once_and_reports_those_that_fail(newest, tmp_path):
    """The added module alone, which needs only the standard library, with real entry points."""
    patching.patch_engine("sglang", site_packages=newest)
    plugins = tmp_path / "plugins"
    install_plugin(
        plugins, "good", "def register():\n    import plugins\n    plugins.load_plugins()\n    print('good')"
    )
    install_plugin(plugins, "broken", "def register():\n    raise RuntimeError('no such device')")
    install_plugin(plugins, "unwanted", "def register():\n    print('unwanted')")
    script = "import plugins\n@plugins.plugins_first\ndef f(): print('called')\nf()\nf()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str((newest / PLUGINS).parent), str(plugins)])}

    def run(**env):
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env={**environment, **env}, capture_output=True, text=True, check=True)

    result = run(SGLANG_PLUGINS="good, broken")
    assert result.stdout.split() == ["good", "called", "called"]
    assert "plugin broken (broken:register) failed" in result.stderr
    assert "RuntimeError: no such device" in result.stderr
    assert "unwanted" in run().stdout


def rename_version(site: Path, version: str) -> None:
    info = next(site.glob("sglang-*.dist-info"))
    metadata = info / "METADATA"
    text = metadata.read_text()
    metadata.write_text(
        text.replace(f"\nVersion: {info.name.split('-')[1].removesuffix('.dist')}\n", f"\nVersion: {version}\n")
    )
    info.rename(site / f"sglang-{version}.dist-info")


@pytest.mark.parametrize("version", ["0.5.1", "0.5.2rc1", "0.5.10rc0", "0.5.11", "0.5.23", "main"])
def test_unknown_versions_are_refused(newest, version):
    rename_version(newest, version)
    before = digests(newest)
    with pytest.raises(
        patching.PatchError, match=f"sglang {version}; .*0.5.2 to 0.5.10.post1; 0.5.11 and later .* no patch"
    ):
        patching.patch_engine("sglang", site_packages=newest)
    assert digests(newest) == before


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", [SERVER_ARGS, PLUGINS])
def test_modified_files_are_left_alone(newest, name, patched):
    if patched:
        patching.patch_engine("sglang", site_packages=newest)
    with (newest / name).open("a") as f:
        f.write("# mine\n")
    before = digests(newest)
    for reverse in (False, True):
        with pytest.raises(patching.PatchError, match=f"{name} is not as in sglang 0.5.10.post1's wheel"):
            patching.patch_engine("sglang", reverse=reverse, site_packages=newest)
        assert digests(newest) == before


def test_missing_file_and_missing_record_are_refused(newest):
    next(newest.glob("*.dist-info/RECORD")).unlink()
    with pytest.raises(patching.PatchError, match="is not as in"):
        patching.patch_engine("sglang", site_packages=newest)
    (newest / SERVER_ARGS).unlink()
    with pytest.raises(patching.PatchError, match="is not as in"):
        patching.patch_engine("sglang", site_packages=newest)
    assert not (newest / PLUGINS).exists()


def test_a_failure_half_way_is_rolled_back(newest, monkeypatch):
    before, calls, replace = digests(newest), [], os.replace

    def fail_second(source, target):
        calls.append(Path(target).name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(patching.PatchError, match=r"cannot change .*: No space left on device; nothing was changed"):
        patching.patch_engine("sglang", site_packages=newest)
    assert calls == ["plugins.py", "server_args.py"]
    assert digests(newest) == before


def test_an_interrupted_run_is_completed(newest):
    """Killed between two files: either direction goes on from there."""
    before = digests(newest)
    patching.patch_engine("sglang", site_packages=newest)
    after, plugins = digests(newest), (newest / PLUGINS).read_bytes()
    patching.patch_engine("sglang", reverse=True, site_packages=newest)
    (newest / PLUGINS).write_bytes(plugins)
    assert names(patching.patch_engine("sglang", site_packages=newest)) == [("change", SERVER_ARGS)]
    assert digests(newest) == after
    patching.patch_engine("sglang", reverse=True, site_packages=newest)
    (newest / PLUGINS).write_bytes(plugins)
    assert names(patching.patch_engine("sglang", reverse=True, site_packages=newest)) == [("remove", PLUGINS)]
    assert digests(newest) == before


def test_unknown_engine_and_empty_folder(tmp_path):
    with pytest.raises(OptionError, match="'vllm'; allowed: sglang"):
        patching.patch_engine("vllm")
    with pytest.raises(SparseBackendError, match="no such folder"):
        patching.patch_engine("sglang", site_packages=tmp_path / "none")
    with pytest.raises(SparseBackendError, match=r"no sglang in .*--site-packages DIR"):
        patching.patch_engine("sglang", site_packages=tmp_path)


def test_command(newest):
    arguments = ("patch", "sglang", "--site-packages", newest)
    before = digests(newest)
    result = cli(*arguments, "--dry-run")
    assert (result.returncode, digests(newest)) == (0, before)
    assert f"sglang 0.5.10.post1 in {newest}\n  would add {PLUGINS}\n  would change {SERVER_ARGS}\n" == result.stdout
    assert "HookRegistry, which sparse-compiled uses, needs SGLang 0.5.11 or later" in cli(*arguments).stdout
    result = cli(*arguments)
    assert (result.returncode, result.stdout.splitlines()[1:]) == (0, ["already patched: nothing to do"])
    assert cli(*arguments, "--reverse").stdout.endswith(f"  remove {PLUGINS}\npatch taken out\n")
    assert digests(newest) == before
    rename_version(newest, "0.5.11")
    result = cli(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--dry-run" in cli("patch", "--help").stdout


def test_table_and_folder_agree():
    folder = Path(patching.__file__).parent / "patches"
    assert sorted(p.name for p in folder.glob("*.diff")) == sorted(p.diff for p in patching.PATCHES)
    readme = (Path(__file__).parents[1] / "patches" / "README.md").read_text()
    for patch in patching.PATCHES:
        assert patch.diff in readme
        assert patch.upstream in readme
    assert all(Version(v) in patching.SpecifierSet(patching.PATCHES[0].versions) for v in VERSIONS)
