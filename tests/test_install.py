"""What a user gets from `pip install`: the wheel's contents, and an install with no compiled extension or a broken one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from pygpt.ops import backends

ROOT = Path(__file__).resolve().parents[1]


def build_wheel(folder: Path, environment: dict[str, str], *options: str) -> Path:
    """Build the package's wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, *options, "-w", str(folder), str(ROOT)], env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as PYGPT_BUILD_EXT=off installs it, unpacked."""
    folder = tmp_path_factory.mktemp("pure")
    wheel = build_wheel(folder, {**os.environ, "PYGPT_BUILD_EXT": "off"}, f"-Cbuild-dir={folder}/build")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "pygpt/model.py" in names
        assert "pygpt/kernels/__init__.py" in names
        assert not [name for name in names if name.endswith((".so", ".cpp")) or name.startswith(("kernels/", "tests/"))]
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.timeout(900)  # where that folder is not there, all is compiled
@pytest.mark.skipif(backends.extension is None, reason="no C++ compiler here: pygpt._C was not built")
def test_the_compiled_wheel_holds_kernels_and_is_small(tmp_path):
    """Installed, it serves the CPU ops. Built as this environment's install was and in the same folder, where little is left to
    compile: that of the CUDA library, if there is one, depends on the machine."""
    wheel = build_wheel(tmp_path, {**os.environ, "PYGPT_CUDA": "auto" if backends._cuda_spec else "off"})
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library, *cuda = sorted(name for name in names if name.endswith((".so", ".pyd")))
        assert library.startswith("pygpt/_C.")
        assert archive.getinfo(library).file_size < 5 << 20
        assert cuda in ([], ["pygpt/_cuda.so"])
        assert "pygpt/kernels/attention.py" in names
        assert not [name for name in names if name.endswith((".cpp", ".h", ".cu")) or name.startswith("kernels/")]
        archive.extractall(tmp_path / "site")
    # -S: an editable install's import hook would find the source folder first.
    code = f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}, {sysconfig.get_path('purelib')!r}]\n" + (
        "import pygpt\nassert pygpt.backends()['layer_norm']['cpu'] == 'cpp'\nprint(pygpt.__file__)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path))


def test_without_a_compiler_the_install_is_pure_python(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "sh", "uname"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": str(tools), "PYGPT_CUDA": "off"}
    wheel = build_wheel(tmp_path, environment, f"-Cbuild-dir={tmp_path}/build")
    with zipfile.ZipFile(wheel) as archive:
        assert "pygpt/model.py" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def run_in(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    # -S -I: without the editable install that the tests themselves run on.
    packages = sysconfig.get_paths()["purelib"]
    paths = [str(site), packages] + [path for path in sys.path if path.endswith("site-packages") and path != packages]
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )


TRAIN = """
import torch, pygpt
assert {row["cpu"] for row in pygpt.backends().values()} == {"eager"}, pygpt.backends()
torch.manual_seed(0)
model = pygpt.GPT(pygpt.GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8, dropout=0.1))
idx = torch.randint(20, (4, 8))
optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
for _ in range(60):
    loss = model(idx, idx)[1]
    loss.backward(); optimizer.step(); optimizer.zero_grad()
assert loss < 2.0, loss
print(model.generate(idx[:1], 3).shape)
print(next(row for row in pygpt.ops.backends.report() if row.op == "layer_norm").why_not["cpp"])
"""


def test_pure_python_install_trains(pure):
    done = run_in(pure, TRAIN)
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout


def test_broken_extension_is_reported_not_swallowed(pure):
    broken = pure / "pygpt" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    broken.write_bytes(b"not a shared object")
    try:
        done = run_in(pure, TRAIN)
    finally:
        broken.unlink()
    assert done.returncode == 0, done.stderr
    assert "failed to load" in done.stdout
    assert "pygpt._C failed to load" in done.stderr


def test_forcing_cpp_without_the_extension_is_an_error(pure):
    done = run_in(pure, "import pygpt; pygpt.use_backend('cpp')")
    assert done.returncode == 1
    assert "backend 'cpp' is not available: not built" in done.stderr
