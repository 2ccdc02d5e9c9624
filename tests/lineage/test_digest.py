import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe_assets.lineage.digest import FileEntry, file_sha256, merkle_root, safe_relative, scan_tree
from vpmoe_assets.lineage.errors import UnsafePathError

relaxed = settings(deadline=None, max_examples=60)  # a busy machine is slow, not wrong

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
trees = st.dictionaries(names, st.binary(max_size=40), min_size=1, max_size=9)


def entries_of(tree: dict[str, bytes]) -> list[FileEntry]:
    return [FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in tree.items()]


def rfc6962(leaves: list[bytes]) -> bytes:
    """The Merkle tree hash as RFC 6962, section 2.1, defines it: recursively, with nothing but hashlib."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + rfc6962(leaves[:k]) + rfc6962(leaves[k:])).digest()


def naive_root(tree: dict[str, bytes]) -> str:
    ordered = sorted(tree.items(), key=lambda item: item[0].encode())
    leaves = [
        json.dumps([name, len(data), hashlib.sha256(data).hexdigest()], separators=(",", ":")).encode()
        for name, data in ordered
    ]
    return rfc6962(leaves).hex()


@relaxed
@given(trees, st.randoms())
def test_root_is_the_rfc_6962_tree_hash_in_any_order_of_listing(tree, random):
    entries = entries_of(tree)
    random.shuffle(entries)
    assert merkle_root(entries) == naive_root(tree)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 7, 8, 9, 31, 33, 100])
def test_root_agrees_with_rfc_6962_at_every_shape_of_tree(count):
    tree = {f"f{i}": bytes([i % 251]) for i in range(count)}
    assert merkle_root(entries_of(tree)) == naive_root(tree)


@relaxed
@given(trees, st.data())
def test_any_changed_byte_name_or_missing_file_changes_the_root(tree, data):
    root = merkle_root(entries_of(tree))
    name = data.draw(st.sampled_from(sorted(tree)))
    changed = dict(tree)
    content = bytearray(changed[name])
    if content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        assert merkle_root(entries_of(tree | {name: bytes(content)})) != root
    assert merkle_root(entries_of(tree | {name: tree[name] + b"\0"})) != root
    moved = changed.pop(name)
    assert merkle_root(entries_of(changed)) != root
    assert merkle_root(entries_of(changed | {name + "'": moved})) != root


def test_the_same_file_twice_is_refused():
    entry = FileEntry("a", 0, "0" * 64)
    with pytest.raises(UnsafePathError, match="twice"):
        merkle_root([entry, entry])


def test_scan_finds_every_file_whatever_its_name(tmp_path):
    tree = {"a": b"1", "b/c d": b"", "b/ü\n'\"$(x)": b"22", ".hidden": b"3", "-rf": b"4", "b/d/e/f": b"5"}
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    assert scan_tree(tmp_path) == sorted(entries_of(tree), key=lambda entry: entry.path.encode())
    assert merkle_root(scan_tree(tmp_path)) == naive_root(tree)


def test_scan_follows_links_inside_the_tree_and_refuses_all_others(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "real").write_bytes(b"x")
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "link").symlink_to("real")
    assert [entry.path for entry in scan_tree(root)] == ["link", "real"]
    for target in ("../outside", str(root / "real"), "nowhere", "."):
        (root / "bad").symlink_to(target)
        with pytest.raises(UnsafePathError, match="symlink 'bad'"):
            scan_tree(root)
        (root / "bad").unlink()


def test_scan_refuses_a_link_that_leaves_through_a_neighbour_with_the_same_prefix(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree2").mkdir()
    (tmp_path / "tree2" / "f").write_bytes(b"")
    (tmp_path / "tree" / "link").symlink_to("../tree2/f")
    with pytest.raises(UnsafePathError, match="leaves"):
        scan_tree(tmp_path / "tree")


def test_scan_refuses_pipes_and_names_that_are_not_utf8(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafePathError, match="regular files"):
        scan_tree(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / os.fsdecode(b"\xff\xfe")).write_bytes(b"")
    with pytest.raises(UnsafePathError, match="UTF-8"):
        scan_tree(tmp_path)


def test_scan_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        scan_tree(tmp_path / "absent")


@pytest.mark.parametrize(
    "path", ["", ".", "/etc/passwd", "../x", "a/../../x", "a/..", "a//b", "./a", "a/", "a\0b"]
)
def test_unsafe_paths_are_refused(path):
    with pytest.raises(UnsafePathError):
        safe_relative(path)


@pytest.mark.parametrize("path", ["a", "a/b", "..a", "a..b/c...", "-x", " ", "a\\b", "~", "\n"])
def test_odd_but_plain_paths_are_accepted(path):
    assert safe_relative(path) == path


@pytest.mark.parametrize("size", [0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1])
def test_file_digest_is_sha256(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()
