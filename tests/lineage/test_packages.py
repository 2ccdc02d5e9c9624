import base64
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import time

from tests.conftest import ROOT
from vpmoe_assets.lineage.packages import edited_files, installed_packages

SHOW = "from vpmoe_assets.lineage.packages import installed_packages as f; print(*f(), sep='\\n')"


def test_every_installed_package_is_there_once_with_its_version_and_the_hash_of_its_files():
    found = {package["name"]: package for package in installed_packages()}
    assert len(found) == len(installed_packages()) > 100
    assert found["torch"]["version"] == importlib.metadata.version("torch")
    record = importlib.metadata.distribution("numpy").read_text("RECORD")
    assert found["numpy"]["record_sha256"] == hashlib.sha256(record.encode()).hexdigest()
    assert "vpmoe" in found


def install(directory, name: str, version: str, record: str | None) -> None:
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if record is not None:
        (info / "RECORD").write_text(record)


def listed(*path) -> str:
    """What a process says that has these directories before all others."""
    code = f"import sys; sys.path[:0] = {[str(entry) for entry in path]}; {SHOW}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_the_first_of_two_counts_and_a_changed_installation_has_another_hash(tmp_path):
    install(tmp_path / "first", "Some_Package", "2.0", "a.py,sha256=x,1\n")
    install(tmp_path / "second", "some.package", "1.0", None)
    both = listed(tmp_path / "first", tmp_path / "second")
    assert "'name': 'Some_Package', 'version': '2.0'" in both
    assert "some.package" not in both
    alone = listed(tmp_path / "second")
    assert "{'name': 'some.package', 'version': '1.0', 'record_sha256': None}" in alone
    (tmp_path / "first" / "~ome_package-1.9.dist-info").mkdir()  # left by an upgrade that was interrupted
    assert listed(tmp_path / "first", tmp_path / "second") == both
    (tmp_path / "first" / "Some_Package-2.0.dist-info" / "RECORD").write_text("a.py,sha256=y,1\n")
    assert listed(tmp_path / "first", tmp_path / "second") != both


def test_a_file_that_was_edited_after_the_installation_is_named(tmp_path, monkeypatch):
    def row(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        return f"{name},sha256={digest},{len(content)}\n"

    rows = [
        row(name, f"{name} = 1\n") for name in ("same.py", "edited.py", "longer.py", "gone.py", "back.py")
    ]
    own = "some_package-2.0.dist-info/RECORD,,\n../../bin/command,sha256=x,1\nsame.pyc,,\n"
    install(tmp_path, "some_package", "2.0", "".join(rows) + own)
    record = tmp_path / "some_package-2.0.dist-info" / "RECORD"
    for path in tmp_path.glob("*.py"):
        os.utime(path, ns=(0, 0))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert edited_files() == {}
    (tmp_path / "edited.py").write_text("edited.py = 2\n")
    os.utime(tmp_path / "edited.py", ns=(record.stat().st_mtime_ns + 1,) * 2)
    (tmp_path / "longer.py").write_text("longer.py = 1  # debug\n")
    os.utime(tmp_path / "longer.py", ns=(0, 0))
    (tmp_path / "back.py").write_text("back.py = 1\n")
    (tmp_path / "gone.py").unlink()
    assert edited_files() == {"some-package": ["edited.py", "gone.py", "longer.py"]}


def test_the_list_is_made_once_and_fast():
    installed_packages.cache_clear()
    begun = time.process_time()
    first = installed_packages()
    assert time.process_time() - begun < 1.0
    assert installed_packages() is first
