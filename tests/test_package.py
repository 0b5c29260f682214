"""The wheel puts `tucka_runtime` into site-packages and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_has_one_top_level_package(tmp_path):
    # No isolation: the build backend is installed already, and a fresh environment would download torch's.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"tucka_runtime", info}
    for part in (
        "kernels/dispatch.py",
        "kernels/fused/route.py",
        "server/serve.py",
        "loadtest/cli.py",
        "engine/process.py",
    ):
        assert f"tucka_runtime/{part}" in names
    sources = {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for prefix, folder in (
            ("tucka_runtime", ROOT / "tucka_runtime"),
            *((f"tucka_runtime/{name}", ROOT / name) for name in ("kernels", "server", "loadtest")),
        )
        for pattern in ("*.py", "*.cpp", "*.h", "*.html", "*.css", "*.js", "*.svg")
        for path in folder.rglob(pattern)
    }
    assert sources <= set(names), sources - set(names)
    assert not any("tests" in name.split("/") or name.endswith((".pyc", ".so")) for name in names)
